"""The samplers: against CompVis's chains, against diffusers' schedulers, and against exact solutions."""

import inspect
import json
import math
import pickle
import pydoc
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd import sampling
from minisd.noising import ExactDenoiser, NoiseSchedule
from minisd.sampling import (
    SAMPLERS,
    Guided,
    classifier_free_guidance,
    ddim,
    ddpm,
    dpmpp_2m,
    euler,
    euler_ancestral,
    heun,
    make_timesteps,
    plms,
    randn,
)

FIXTURES = Path(__file__).parent / "fixtures"
SCHEDULE = NoiseSchedule.scaled_linear()
CALLS = json.loads((FIXTURES / "samplers_compvis.json").read_text())["config"]["calls"]
BY_NAME = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
DETERMINISTIC = {"ddim": ddim, "plms": plms, "dpmpp_2m": dpmpp_2m, "euler": euler, "heun": heun}


@pytest.fixture(scope="module")
def compvis(load_fixture):
    return load_fixture("samplers_compvis")[0]


# -- eps_models --------------------------------------------------------------------------------------------


def column(t, x):
    """t or a context [b], as [b 1 ... 1]."""
    return t.to(x).reshape(-1, *[1] * (x.ndim - 1))


class Recorder:
    """The two functions that stood in for a network when CompVis's samplers were recorded; notes each t."""

    def __init__(self, name: str):
        self.name, self.calls, self.batches = name, [], []

    def __call__(self, x, t, c=None):
        self.calls.append(int(t[0]))
        self.batches.append(len(x))
        if self.name == "lin":
            eps = 0.1 * x + torch.sin(column(t, x))
        else:
            eps = 0.9 * torch.tanh(x) + 0.1 * torch.cos(column(t, x) / 100) * torch.roll(x, 1, -1)
        return eps if c is None else eps + column(c, x)


def gaussian(std: float):
    """The exact eps_model if the data are N(0, std²): E[ε | x_t] = √(1-ᾱ) x_t / (ᾱ std² + 1 - ᾱ)."""

    def eps_model(x, t):
        alpha_bar = SCHEDULE.alpha_bar(int(t[0]))
        return math.sqrt(1 - alpha_bar) / (alpha_bar * std**2 + 1 - alpha_bar) * x

    return eps_model


def noise(seed: int, *shape: int):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def replay(monkeypatch, noises):
    """Let the samplers draw recorded noises, in their order."""
    noises = iter(noises)
    monkeypatch.setattr(sampling, "randn", lambda shape, generator=None: next(noises))


def last(steps):
    return list(steps)[-1].x


def assert_equal(ours, theirs):
    """To 5e-5, of the largest number in it: without a real model some of these chains grow to 50."""
    torch.testing.assert_close(ours, theirs, atol=5e-5 * max(1.0, theirs.abs().max().item()), rtol=0)


# -- against CompVis ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("compvis")])
def test_ddim_and_plms_equal_compvis(compvis, monkeypatch, name):
    # compvis_ddim.nl.eta0.5.S50: sampler, eps_model, guidance or noise if any, steps
    sampler, function, how, steps = re.fullmatch(r"compvis_(\w+)\.(\w+)\.(?:(.+)\.)?S(\d+)", name).groups("")
    eps_model = model = Recorder(function)
    options = {}
    if how == "cfg7.5":
        eps_model = classifier_free_guidance(model, compvis["cond"], compvis["uncond"], 7.5)
    if how.startswith("eta"):
        options = {"eta": float(how.removeprefix("eta"))}
        replay(monkeypatch, compvis["ddim_eta.noises_50"])

    trajectory = list(SAMPLERS[sampler](eps_model, compvis["x_T"], SCHEDULE, int(steps), **options))
    assert len(trajectory) == int(steps)
    assert model.calls == CALLS[name]
    assert_equal(trajectory[0].x0, compvis[f"{name}.pred_x0_step1"])
    assert_equal(trajectory[0].x, compvis[f"{name}.x_after_step1"])
    assert_equal(trajectory[1].x, compvis[f"{name}.x_after_step2"])
    assert_equal(trajectory[-1].x, compvis[f"{name}.x0"])


def test_ddpm_is_the_line_of_the_paper_at_every_timestep():
    """Algorithm 2 in ε̂, the posterior mean with x̂_0 in it, and our rule: docs/faq.md has the algebra."""
    schedule = NoiseSchedule.scaled_linear(0.00085, 0.012, timesteps=1000)
    generator = torch.Generator().manual_seed(0)
    x_t, eps = torch.randn(2, 1, 4, 8, 8, generator=generator, dtype=torch.float64)
    for t in range(1000):
        a_t, a_prev = schedule.alpha_bar(t), schedule.alpha_bar(t - 1) if t else 1.0
        alpha = a_t / a_prev
        paper = (x_t - (1 - alpha) / math.sqrt(1 - a_t) * eps) / math.sqrt(alpha)
        ours, x0, _ = sampling.SAMPLERS["ddpm"].rule(x_t, eps, a_t, a_prev, torch.zeros_like(x_t))
        assert torch.allclose(ours, paper, rtol=1e-9, atol=1e-9)
        mean, variance, _ = schedule.q_posterior(x0, x_t, torch.tensor([t]))
        assert torch.allclose(mean, paper, rtol=1e-4, atol=1e-4)  # its table is in float32
        assert (float(variance) == 0) == (t == 0)  # no noise is added in the last step


@pytest.mark.parametrize("clip", [False, True])
def test_ddpm_equals_compvis_over_1000_steps(compvis, monkeypatch, clip):
    replay(monkeypatch, compvis["ddpm.noises"])
    trajectory = list(ddpm(Recorder("lin"), compvis["ddpm.x_T"], SCHEDULE, clip_denoised=clip))
    assert [step.t for step in trajectory] == list(range(999, -1, -1))
    for t in (999, 500, 1, 0):
        assert_equal(trajectory[999 - t].x, compvis[f"ddpm.clip{int(clip)}.x_after_t{t}"])


def test_img2img_equals_compvis(compvis):
    """Strength 0.75 of 50 steps: noised to t = 741, and denoised from 721, as CompVis has it."""
    timesteps = make_timesteps(50, 1000)[-37:]
    t = torch.full((2,), timesteps[0] + 20)
    x = SCHEDULE.q_sample(compvis["img2img.x0"], t, compvis["img2img.noise"])
    assert_equal(x, compvis["img2img.z_enc_t37of50"])
    model = Recorder("nl")
    assert_equal(last(ddim(model, x, SCHEDULE, timesteps=timesteps)), compvis["img2img.decoded"])
    assert model.calls == CALLS["img2img"]


def test_inpainting_equals_compvis(compvis):
    noises, mask, x_0 = iter(compvis["inpaint.q_noises"]), compvis["inpaint.mask"], compvis["img2img.x0"]
    seen = []

    def blend(x, t):
        seen.append(t)
        known = SCHEDULE.q_sample(x_0, torch.full((2,), t), next(noises))
        return mask * known + (1 - mask) * x

    trajectory = list(ddim(Recorder("nl"), compvis["x_T"], SCHEDULE, 10, before_step=blend))
    assert_equal(trajectory[-1].x, compvis["inpaint.S10.x0"])
    assert seen == CALLS["inpaint"]


# -- against diffusers -------------------------------------------------------------------------------------

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


# What diffusers calls each sampler, and how it is told to do the same. A sampler that diffusers does not have: None.
SCHEDULERS = {
    "ddpm": ("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_small"}),
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": False}),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True, "set_alpha_to_one": False}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
}
IN_DIFFUSERS = pytest.mark.parametrize("name", [name for name in SAMPLERS if SCHEDULERS.get(name)])
IN_SIGMA = ["euler", "euler_ancestral", "heun"]  # diffusers' x is our x / √ᾱ
DRAWS = {"ddpm", "euler_ancestral"}


def make_scheduler(diffusers, name, steps, spacing="leading"):
    """diffusers' scheduler of that name, and its timesteps, whole numbers, without those that it visits twice."""
    kind, options = SCHEDULERS[name]
    scheduler = getattr(diffusers, kind)(**SD, timestep_spacing=spacing, steps_offset=1, **options)
    scheduler.set_timesteps(steps)
    timesteps = scheduler.timesteps.unique_consecutive()
    if (timesteps % 1 != 0).any():  # as of 20 steps of "linspace": those that a model was trained with, for both
        timesteps = torch.tensor(make_timesteps(steps, 1000, spacing))
        if name == "euler_ancestral":  # takes no timesteps, so it is told the σ that belong to them
            sigmas = (1 / SCHEDULE.alphas_cumprod[timesteps] - 1).sqrt()
            scheduler.timesteps, scheduler.sigmas = timesteps.float(), torch.cat([sigmas, torch.zeros(1)])
        else:
            scheduler.set_timesteps(timesteps=timesteps.tolist())
    return scheduler, timesteps.long()


def run_diffusers(scheduler, timesteps, x=None, eps_model=None, before_step=None, **options):
    """diffusers' loop around a scheduler. Without x, from the noise that `run_ours` starts from."""
    name = type(scheduler).__name__
    eps_model = eps_model or Recorder("nl")
    x = noise(0, 2, 4, 8, 8) * scheduler.init_noise_sigma if x is None else x
    if name == "PNDMScheduler":  # the calls of the model: plms looks ahead in its first step ...
        timesteps = torch.cat([timesteps[:2], timesteps[1:]])
    if name == "HeunDiscreteScheduler":  # ... and heun in each
        timesteps = torch.cat([timesteps[:1], timesteps[1:].repeat_interleave(2)])
    for i, t in enumerate(timesteps.to(scheduler.timesteps.dtype)):
        looks_ahead = (name == "PNDMScheduler" and i == 1) or (name == "HeunDiscreteScheduler" and i % 2 == 1)
        if before_step and not looks_ahead:
            scale = SCHEDULE.alpha_bar(int(t)) ** 0.5 if scheduler.init_noise_sigma != 1 else 1.0
            x = before_step(scale * x, int(t)) / scale
        eps = eps_model(scheduler.scale_model_input(x, t), torch.full((2,), int(t)))
        x = scheduler.step(getattr(eps, "eps", eps), t, x, **options).prev_sample
    return x


def run_ours(sampler, *args, **options):
    return last(sampler(Recorder("nl"), noise(0, 2, 4, 8, 8), SCHEDULE, *args, **options))


def seed_of(name):
    """The generator's argument, for those that draw noise."""
    return {"generator": gen(1)} if name in DRAWS else {}


@pytest.mark.parametrize("steps", [10, 20, 50])
@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
@pytest.mark.parametrize("name", IN_SIGMA)
def test_euler_and_heun_equal_diffusers(diffusers, name, spacing, steps):
    scheduler, timesteps = make_scheduler(diffusers, name, steps, spacing)
    theirs = run_diffusers(scheduler, timesteps, **seed_of(name))
    # Except for "leading", diffusers starts from x̄ = σ x_T, which makes x = √ᾱ σ x_T = √(1-ᾱ) x_T
    x_T = noise(0, 2, 4, 8, 8)
    if spacing != "leading":
        x_T = math.sqrt(1 - SCHEDULE.alpha_bar(999)) * x_T
    options = {} if spacing == "linspace" else {"spacing": spacing}  # it is the default, here and there
    trajectory = list(SAMPLERS[name](Recorder("nl"), x_T, SCHEDULE, steps, **options, **seed_of(name)))
    assert [step.t for step in trajectory] == timesteps.tolist()
    assert_equal(trajectory[-1].x, theirs)


@pytest.mark.parametrize("steps", [10, 20, 50])
@IN_DIFFUSERS
def test_guided_samplers_equal_diffusers(diffusers, compvis, name, steps):
    scheduler, timesteps = make_scheduler(diffusers, name, steps)
    eps_model = classifier_free_guidance(Recorder("nl"), compvis["cond"], compvis["uncond"], 7.5)
    theirs = run_diffusers(scheduler, timesteps, eps_model=eps_model, **seed_of(name))
    x_T = noise(0, 2, 4, 8, 8)
    ours = SAMPLERS[name](eps_model, x_T, SCHEDULE, timesteps=timesteps, **seed_of(name))
    assert_equal(last(ours), theirs)


@IN_DIFFUSERS
def test_img2img_equals_diffusers(diffusers, name):
    scheduler, timesteps = make_scheduler(diffusers, name, 50)
    timesteps, x_0, z = timesteps[13:], noise(3, 2, 4, 8, 8), noise(4, 2, 4, 8, 8)
    start = timesteps[:1].repeat(2)
    x = scheduler.add_noise(x_0, z, start.to(scheduler.timesteps.dtype))
    theirs = run_diffusers(scheduler, timesteps, x, **seed_of(name))
    x = SCHEDULE.q_sample(x_0, start, z)
    ours = SAMPLERS[name](Recorder("nl"), x, SCHEDULE, timesteps=timesteps, **seed_of(name))
    assert_equal(last(ours), theirs)


@IN_DIFFUSERS
def test_inpainting_equals_diffusers(diffusers, name):
    x_0, z, mask = noise(3, 2, 4, 8, 8), noise(4, 2, 4, 8, 8), (noise(5, 1, 1, 8, 8) > 0).float()

    def blend(x, t):
        return mask * SCHEDULE.q_sample(x_0, torch.full((2,), t), z) + (1 - mask) * x

    scheduler, timesteps = make_scheduler(diffusers, name, 20)
    theirs = run_diffusers(scheduler, timesteps, before_step=blend, **seed_of(name))
    assert_equal(run_ours(SAMPLERS[name], timesteps=timesteps, before_step=blend, **seed_of(name)), theirs)


@pytest.mark.parametrize("to_one", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("steps", [10, 20, 50])
def test_ddim_equals_diffusers(diffusers, steps, eta, to_one):
    scheduler = diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=to_one, steps_offset=1)
    scheduler.set_timesteps(steps)
    theirs = run_diffusers(scheduler, scheduler.timesteps, eta=eta, generator=gen(1))
    assert_equal(run_ours(ddim, steps, eta, set_alpha_to_one=to_one, generator=gen(1)), theirs)


@pytest.mark.parametrize("spacing", ["linspace", "trailing"])
@pytest.mark.parametrize("steps", [7, 20, 50])
def test_timesteps_equal_diffusers(diffusers, steps, spacing):
    scheduler = diffusers.DDIMScheduler(**SD, timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert make_timesteps(steps, 1000, spacing) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("steps", [10, 20, 50, 100])
def test_respaced_ddpm_equals_diffusers(diffusers, steps, clip):
    scheduler = diffusers.DDPMScheduler(
        **SD, clip_sample=clip, variance_type="fixed_small", timestep_spacing="leading"
    )
    scheduler.set_timesteps(steps)
    theirs = run_diffusers(scheduler, scheduler.timesteps, generator=gen(1))
    ours = run_ours(ddpm, timesteps=scheduler.timesteps, clip_denoised=clip, generator=gen(1))
    assert_equal(ours, theirs)


@pytest.mark.parametrize("steps", [5, 10, 20, 50])
def test_plms_equals_diffusers(diffusers, steps):
    assert_equal(run_ours(plms, steps), run_diffusers(*make_scheduler(diffusers, "plms", steps)))


@pytest.mark.parametrize("spacing", ["linspace", "leading", "trailing"])
@pytest.mark.parametrize("end", ["zero", "sigma_min"])
@pytest.mark.parametrize("steps", [1, 2, 8, 10, 14, 15, 20, 25, 50])
def test_dpmpp_2m_equals_diffusers(diffusers, steps, end, spacing):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD, final_sigmas_type=end, timestep_spacing=spacing, steps_offset=1
    )
    scheduler.set_timesteps(steps)
    ours = run_ours(dpmpp_2m, timesteps=scheduler.timesteps, set_alpha_to_one=end == "zero")
    assert_equal(ours, run_diffusers(scheduler, scheduler.timesteps))
    if spacing == "trailing":
        assert_equal(run_ours(dpmpp_2m, steps, set_alpha_to_one=end == "zero"), ours)


def test_dpmpp_2m_without_lower_order_final_equals_diffusers(diffusers):
    scheduler = diffusers.DPMSolverMultistepScheduler(
        **SD, final_sigmas_type="sigma_min", lower_order_final=False
    )
    scheduler.set_timesteps(8)
    options = {"timesteps": scheduler.timesteps, "set_alpha_to_one": False}
    ours = run_ours(dpmpp_2m, lower_order_final=False, **options)
    assert_equal(ours, run_diffusers(scheduler, scheduler.timesteps))
    assert (ours - run_ours(dpmpp_2m, **options)).abs().max() > 0.01


# -- which timesteps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [10, 20, 50, 100, 250])
def test_leading_timesteps_equal_compvis(steps, load_fixture):
    theirs = load_fixture("schedules")[0][f"compvis_ddim_ts_{steps}"]
    assert make_timesteps(steps, 1000) == theirs.flip(0).tolist()


@given(st.data(), st.sampled_from(["leading", "linspace", "trailing"]))
def test_as_many_timesteps_as_asked_for(data, spacing):
    T = data.draw(st.integers(1, 1200))
    steps = data.draw(st.integers(1, T))
    timesteps = make_timesteps(steps, T, spacing)
    assert len(timesteps) == steps
    assert 0 <= timesteps[-1] and timesteps[0] < T
    gaps = {t - t_next for t, t_next in zip(timesteps, timesteps[1:], strict=False)}
    assert all(gap >= 1 for gap in gaps) and (not gaps or max(gaps) - min(gaps) <= 1), "falling, and evenly"
    if spacing != "leading":
        assert timesteps[0] == T - 1
    if steps == T:
        assert timesteps == list(range(T - 1, -1, -1))


@pytest.mark.parametrize("steps", [1, 3, 7, 30])
@BY_NAME
def test_steps_that_do_not_divide_1000(sampler, steps):
    assert len(list(sampler(gaussian(1.0), noise(0, 1, 2), SCHEDULE, steps))) == steps


@BY_NAME
def test_no_spacing_reaches_t_1000(sampler):
    for spacing in ("leading", "linspace", "trailing"):
        first = next(sampler(gaussian(1.0), noise(0, 1, 2), SCHEDULE, 1000, spacing=spacing))
        assert first.t == 999


def test_plms_makes_one_call_more_than_steps():
    model = Recorder("lin")
    list(plms(model, noise(0, 1, 2), SCHEDULE, 50))
    assert model.calls[:4] == [981, 961, 961, 941]
    assert len(model.calls) == 51


def test_heun_makes_two_calls_a_step_and_one_in_the_last():
    model = Recorder("lin")
    list(heun(model, noise(0, 1, 2), SCHEDULE, 50, spacing="leading"))
    assert model.calls[:5] == [981, 961, 961, 941, 941]
    assert model.calls[-3:] == [21, 1, 1]
    assert len(model.calls) == 99


# -- against exact solutions -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "order"), [(ddim, 1), (plms, 2), (dpmpp_2m, 2), (euler, 1), (heun, 2)], ids=DETERMINISTIC
)
def test_error_falls_with_the_order_of_the_sampler(sampler, order):
    """With a third of the step, the error is to fall to a third; or, with a method of order two, to a ninth.

    If the data are N(0, std²), the exact solution is known: x keeps its place in a normal distribution
    whose width changes.
    """
    std, x_T = 0.5, torch.tensor([[1.0]], dtype=torch.float64)

    def width(t):
        return math.sqrt(SCHEDULE.alpha_bar(t) * std**2 + 1 - SCHEDULE.alpha_bar(t))

    def error(steps):
        trajectory = sampler(gaussian(std), x_T, SCHEDULE, steps, spacing="linspace")
        x = next(step.x_t for step in trajectory if step.t == 324)
        return (x - x_T * width(324) / width(999)).abs().item()

    coarse, fine = error(112), error(334)  # one in nine timesteps, and one in three
    assert fine < 5e-4
    assert coarse / fine == pytest.approx(3**order, rel=0.1)


@pytest.mark.parametrize("options", [{}, {"steps": 100}], ids=["T steps", "respaced"])
def test_ddpm_restores_the_distribution_of_the_data(options):
    x = last(
        ddpm(gaussian(0.5), noise(0, 8000), SCHEDULE, generator=torch.Generator().manual_seed(1), **options)
    )
    assert x.mean().item() == pytest.approx(0, abs=0.02)
    assert x.std().item() == pytest.approx(0.5, abs=0.02)


@BY_NAME
def test_exact_denoiser_is_led_to_pictures_of_its_data(sampler):
    data = noise(1, 12, 3, 4, 4)
    x_T = noise(2, 8, 3, 4, 4)
    trajectory = list(sampler(ExactDenoiser(data, SCHEDULE), x_T, SCHEDULE, 50, generator=torch.Generator()))

    def distance_to_data(x):
        return torch.cdist(x.flatten(1), data.flatten(1)).min(dim=1).values.max() / 48**0.5

    assert distance_to_data(trajectory[-1].x0) < 1e-3
    # CompVis's ddim and plms end at ᾱ_0: √(1-ᾱ_0) = 0.03 of the noise is still there
    assert distance_to_data(trajectory[-1].x) < (0.05 if sampler in (ddim, plms) else 1e-3)
    assert distance_to_data(x_T) > 0.5


@pytest.mark.parametrize("steps", [20, 1000])
def test_ddim_with_eta_1_is_ddpm(steps):
    """The two papers write the same step in different words."""
    x_T, denoiser = noise(0, 4, 2), ExactDenoiser(noise(1, 30, 2), SCHEDULE)
    options = {"timesteps": make_timesteps(steps, 1000)[-20:]}
    one = last(ddim(denoiser, x_T, SCHEDULE, eta=1.0, set_alpha_to_one=True, generator=gen(3), **options))
    other = last(ddpm(denoiser, x_T, SCHEDULE, generator=gen(3), **options))
    torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("steps", [10, 50])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_euler_ancestral_is_ddim_in_other_words(steps, eta):
    """And euler is both without fresh noise; with as much of it as in ddpm, all are ddpm (see above)."""
    options = {"timesteps": make_timesteps(steps, 1000)}
    ancestral = run_ours(euler_ancestral, eta=eta, generator=gen(1), **options)
    assert_equal(ancestral, run_ours(ddim, eta=eta, set_alpha_to_one=True, generator=gen(1), **options))
    if eta == 0:
        assert_equal(run_ours(euler, **options), ancestral)


def test_plms_begins_with_a_step_of_heun():
    ours, other = (next(sampler(Recorder("nl"), noise(0, 2, 4), SCHEDULE, timesteps=[800, 600, 400]))
                   for sampler in (heun, plms))  # fmt: skip
    assert_equal(ours.x, other.x)
    assert_equal(ours.eps, other.eps)
    assert_equal(ours.x0, other.x0)


# -- the contract ------------------------------------------------------------------------------------------


@BY_NAME
def test_each_step_starts_where_the_one_before_it_ended(sampler):
    x_T = noise(0, 3, 4, 8, 8)
    trajectory = list(sampler(Recorder("nl"), x_T, SCHEDULE, 20, generator=gen(0)))
    assert [step.i for step in trajectory] == list(range(20))
    assert torch.equal(trajectory[0].x_t, x_T)
    for step, after in zip(trajectory, trajectory[1:], strict=False):
        assert torch.equal(step.x, after.x_t)
        assert step.t > after.t
    for step in trajectory:
        t = torch.full((3,), step.t)
        assert_equal(SCHEDULE.q_sample(step.x0, t, step.eps), step.x_t)
        assert step.eps_cond is None and step.eps_uncond is None


@BY_NAME
@pytest.mark.parametrize("shape", [(5,), (5, 2), (2, 4, 8, 8)], ids=str)
def test_samplers_take_data_of_any_rank(sampler, shape):
    x = last(sampler(Recorder("lin"), noise(0, *shape).double(), SCHEDULE, 5, generator=gen(0)))
    assert x.shape == shape
    assert x.dtype == torch.float64


@BY_NAME
def test_gradients_are_off_inside_and_on_outside(sampler):
    weight = torch.ones(1, requires_grad=True)
    for step in sampler(lambda x, t: weight * x, noise(0, 1, 2), SCHEDULE, 3):
        assert torch.is_grad_enabled()
        assert not step.x.requires_grad


@BY_NAME
def test_before_step_acts_before_each_step_and_not_after_the_last(sampler):
    seen = []

    def double(x, t):
        seen.append((t, x))
        return 2 * x

    trajectory = list(
        sampler(Recorder("lin"), noise(0, 1, 2), SCHEDULE, 5, before_step=double, generator=gen(0))
    )
    assert [t for t, _ in seen] == [step.t for step in trajectory]
    for (_, x), step in zip(seen, trajectory, strict=True):
        assert torch.equal(step.x_t, 2 * x)
    assert torch.equal(seen[-1][1], trajectory[-2].x)


@BY_NAME
def test_timesteps_may_start_part_of_the_way(sampler):
    trajectory = list(
        sampler(Recorder("lin"), noise(0, 1, 2), SCHEDULE, timesteps=torch.tensor([700, 300, 20]))
    )
    assert [step.t for step in trajectory] == [700, 300, 20]


# -- randomness --------------------------------------------------------------------------------------------


def gen(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


STOCHASTIC = pytest.mark.parametrize(
    ("sampler", "options"),
    [(ddpm, {}), (ddim, {"eta": 0.5}), (euler_ancestral, {})],
    ids=["ddpm", "ddim eta 0.5", "euler_ancestral"],
)


@STOCHASTIC
def test_one_seed_one_picture(sampler, options):
    def draw(seed):
        return last(sampler(Recorder("nl"), noise(0, 2, 4, 4), SCHEDULE, 10, generator=gen(seed), **options))

    assert torch.equal(draw(1), draw(1))
    assert (draw(1) - draw(2)).abs().max() > 0.1


@STOCHASTIC
def test_a_batch_of_generators_equals_the_pictures_one_by_one(sampler, options):
    def draw(seeds):
        generators = [gen(seed) for seed in seeds]
        x_T = randn((len(seeds), 4, 8, 8), generators)
        return last(sampler(Recorder("nl"), x_T, SCHEDULE, 10, generator=generators, **options))

    together = draw([5, 6, 7])
    for k, seed in enumerate([5, 6, 7]):
        torch.testing.assert_close(together[k : k + 1], draw([seed]), atol=1e-5, rtol=0)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_noise_of_a_batch_of_generators_is_that_of_each_alone():
    together = randn((2, 3, 5), [gen(8), gen(9)])
    assert torch.equal(together[:1], randn((1, 3, 5), gen(8)))
    assert torch.equal(together[1:], randn((1, 3, 5), gen(9)))


@pytest.mark.parametrize("sampler", DETERMINISTIC.values(), ids=DETERMINISTIC)
def test_deterministic_samplers_draw_nothing(sampler):
    generator = gen(0)
    before = generator.get_state()
    list(sampler(Recorder("nl"), noise(0, 1, 2), SCHEDULE, 5, generator=generator))
    assert torch.equal(before, generator.get_state())


# -- guidance ----------------------------------------------------------------------------------------------


def test_guidance_asks_for_both_in_one_call_unconditional_first():
    asked = []

    def model(x, t, context):
        asked.append((x, t, context))
        return x * context[:, :1, 0]

    x, t = torch.tensor([[1.0], [2.0]]), torch.tensor([7, 7])
    context, empty = torch.full((2, 5, 3), 10.0), torch.full((1, 5, 3), 4.0)
    eps, cond, uncond = classifier_free_guidance(model, context, empty, 2.5)(x, t)
    [(x_in, t_in, context_in)] = asked
    assert x_in.tolist() == [[1.0], [2.0], [1.0], [2.0]]
    assert t_in.tolist() == [7, 7, 7, 7]
    assert context_in[:, 0, 0].tolist() == [4.0, 4.0, 10.0, 10.0]
    assert uncond.tolist() == [[4.0], [8.0]]
    assert cond.tolist() == [[10.0], [20.0]]
    assert eps.tolist() == [[19.0], [38.0]]  # 4 + 2.5 (10 - 4), and twice that


def test_guidance_of_scale_1_asks_only_for_the_conditional_half(compvis):
    model = Recorder("nl")
    eps_model = classifier_free_guidance(model, compvis["cond"], compvis["uncond"], 1.0)
    x = last(ddim(eps_model, compvis["x_T"], SCHEDULE, 5))
    assert model.batches == [2] * 5
    plain = ddim(lambda x, t: model(x, t, compvis["cond"]), compvis["x_T"], SCHEDULE, 5)
    assert torch.equal(x, last(plain))


@settings(deadline=None, max_examples=30)
@given(st.floats(-3, 20).filter(lambda scale: scale != 1))
def test_guidance_extrapolates(scale):
    x, t = noise(0, 2, 3), torch.tensor([500, 500])
    cond, uncond = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 0.25])
    model = Recorder("nl")
    guided = classifier_free_guidance(model, cond, uncond, scale)(x, t)
    weight = scale - 1  # the paper's w: ε = (1 + w) ε(x, c) - w ε(x)
    expected = (1 + weight) * model(x, t, cond) - weight * model(x, t, uncond)
    torch.testing.assert_close(guided.eps, expected, atol=1e-5, rtol=1e-5)


@BY_NAME
def test_steps_have_both_halves_of_a_guided_prediction(sampler):
    model = Recorder("nl")
    cond, uncond = torch.tensor([1.0, 2.0]), torch.tensor([0.0, 0.5])
    eps_model = classifier_free_guidance(model, cond, uncond, 3.0)
    for step in sampler(eps_model, noise(0, 2, 4), SCHEDULE, 5, generator=gen(0)):
        t = torch.full((2,), step.t)
        torch.testing.assert_close(step.eps_cond, model(step.x_t, t, cond))
        torch.testing.assert_close(step.eps_uncond, model(step.x_t, t, uncond))


# -- a rule and what is made of it -------------------------------------------------------------------------

# The arguments of each sampler after eps_model, x_T and schedule, and their defaults.
FURTHER = {"timesteps": None, "before_step": None, "generator": None}
ARGUMENTS = {
    "ddpm": {"steps": None, "spacing": "linspace", "clip_denoised": False},
    "ddim": {"steps": 50, "eta": 0.0, "spacing": "leading", "set_alpha_to_one": False},
    "plms": {"steps": 50, "eta": 0.0, "spacing": "leading", "set_alpha_to_one": False},
    "dpmpp_2m": {
        "steps": 25, "eta": 0.0, "spacing": "trailing", "set_alpha_to_one": True, "lower_order_final": True,
    },
    "euler": {"steps": 50, "eta": 0.0, "spacing": "linspace"},
    "euler_ancestral": {"steps": 50, "eta": 1.0, "spacing": "linspace"},
    "heun": {"steps": 25, "eta": 0.0, "spacing": "linspace"},
}  # fmt: skip


def test_samplers_stand_in_the_order_in_which_they_are_taught():
    assert list(SAMPLERS) == list(ARGUMENTS), "a new sampler: enter its arguments and their defaults in ARGUMENTS"
    assert set(SAMPLERS) == set(SCHEDULERS), "a new sampler: enter in SCHEDULERS what diffusers calls it, or None"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_signature_and_help_of_a_sampler_show_all_its_arguments(name):
    sampler, parameters = SAMPLERS[name], inspect.signature(SAMPLERS[name]).parameters
    assert sampler is getattr(sampling, name) and pickle.loads(pickle.dumps(sampler)) is sampler
    assert {p: parameters[p].default for p in list(parameters)[3:]} == ARGUMENTS[name] | FURTHER
    in_order = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert in_order == ["eps_model", "x_T", "schedule", "steps", "eta"][: 4 if name == "ddpm" else 5]

    page = pydoc.render_doc(sampler, renderer=pydoc.plaintext)
    assert f"function {name} in module minisd.sampling" in page
    assert all(re.search(rf"[(,*] ?{p}: ", page) for p in parameters)
    assert sampler.__doc__.splitlines()[0] in page
    assert re.search(rf"def {name}\(\s*x_t: ", inspect.getsource(sampler)), "the source that is shown is the rule's"


@pytest.mark.parametrize("name", ARGUMENTS)
def test_defaults_of_a_sampler_are_its_attributes(name):
    shared = {p: getattr(SAMPLERS[name], p) for p in ("steps", "eta", "spacing", "set_alpha_to_one")}
    assert shared == {p: ARGUMENTS[name].get(p) for p in shared}


def exact_step(x_t, eps, a_t, a_prev):
    """ddim's step with η = 0, as a beginner would write it."""
    x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    return a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * eps


def test_a_new_sampler_is_one_function(monkeypatch):
    monkeypatch.setattr(sampling, "SAMPLERS", {})

    @sampling.sampler(steps=20, spacing="trailing", set_alpha_to_one=True)
    def my_ddim(x_t, eps, a_t, a_prev, past, i, steps, *, stop_at: float = 1.0):
        """My own."""
        past.append(i)
        assert past == list(range(i + 1)) and steps == 20
        return exact_step(x_t, eps, a_t, min(a_prev, stop_at))

    assert sampling.SAMPLERS == {"my_ddim": my_ddim}
    assert (my_ddim.steps, my_ddim.eta, my_ddim.spacing, my_ddim.__doc__) == (20, 0.0, "trailing", "My own.")
    ours = list(my_ddim(Recorder("nl"), noise(0, 2, 4), SCHEDULE))
    theirs = list(ddim(Recorder("nl"), noise(0, 2, 4), SCHEDULE, 20, spacing="trailing", set_alpha_to_one=True))
    for step, other in zip(ours, theirs, strict=True):
        assert (step.i, step.t) == (other.i, other.t)
        for field in ("x_t", "eps", "x0", "x"):
            assert_equal(getattr(step, field), getattr(other, field))
    assert (my_ddim.rule(torch.ones(1), torch.ones(1), 0.5, 0.5, [], 0, 20) == 1).all(), "a rule can be called alone"
    stopped = last(my_ddim(Recorder("nl"), noise(0, 2, 4), SCHEDULE, stop_at=0.5))
    assert (stopped - ours[-1].x).abs().max() > 0.1
    with pytest.raises(ValueError, match="my_ddim draws no noise, so eta must be 0"):
        next(my_ddim(Recorder("nl"), noise(0, 2, 4), SCHEDULE, eta=0.5))


def ddpm_step(x_t, eps, a_t, a_prev, noise):
    x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    beta = 1 - a_t / a_prev
    mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t
    return mean + ((1 - a_prev) / (1 - a_t) * beta) ** 0.5 * noise


def ddim_step(x_t, eps, a_t, a_prev, eta, noise):
    x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
    return a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps + sigma * noise


@pytest.mark.parametrize(
    ("sampler", "step", "options"),
    [(ddpm, ddpm_step, {}), (ddim, ddim_step, {}), (ddim, ddim_step, {"eta": 0.5}), (ddim, exact_step, {})],
    ids=["ddpm", "ddim", "ddim eta 0.5", "ddim without eta"],
)
def test_a_students_step_takes_the_place_of_the_rule(monkeypatch, sampler, step, options):
    """Also where the step always adds noise: if the sampler draws none, it is 0."""

    def draw():
        return list(sampler(Recorder("nl"), noise(0, 2, 4, 8, 8), SCHEDULE, 12, generator=gen(1), **options))

    ours = draw()
    monkeypatch.setattr(sampler, "rule", step)
    for mine, theirs in zip(ours, draw(), strict=True):
        assert_equal(theirs.x, mine.x)
        assert_equal(theirs.x0, mine.x0)
    monkeypatch.setattr(sampler, "rule", lambda x_t, eps, a_t, a_prev, eta, noise: torch.full_like(x_t, 7))
    assert (draw()[-1].x == 7).all()


@pytest.mark.parametrize("answer", [None, torch.zeros(3)], ids=["None", "[3]"])
def test_a_rule_without_a_usable_x_is_named(monkeypatch, answer):
    monkeypatch.setattr(ddim, "rule", lambda x_t, eps, a_t, a_prev: answer)
    with pytest.raises(ValueError, match=r"ddim must return x_prev .* x_t, \[2, 4\], but it returned (None|\[3\])\."):
        next(ddim(Recorder("lin"), noise(0, 2, 4), SCHEDULE, 5))


def test_a_rule_with_an_unknown_argument_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="may name eta, noise, past, ask, i, steps, but not sigma, clip.* after a [*]"):
        sampling.sampler(steps=5, spacing="leading")(lambda x_t, eps, a_t, a_prev, sigma, noise, clip: x_t)


@pytest.mark.parametrize(
    ("options", "draws"),
    [
        ({"sampler": ddpm}, 9),  # none in the step to the clean picture
        ({"sampler": ddim, "eta": 0.5}, 10),  # from t = 1 to ᾱ_0 there is room for noise,
        ({"sampler": ddim, "eta": 0.5, "spacing": "linspace"}, 9),  # from t = 0 to ᾱ_0 there is none,
        ({"sampler": ddim, "eta": 0.5, "set_alpha_to_one": True}, 9),  # nor at ᾱ = 1
        ({"sampler": ddim}, 0),
        ({"sampler": euler_ancestral}, 9),
        ({"sampler": euler_ancestral, "eta": 0.0}, 0),
    ],
    ids=lambda options: " ".join(str(getattr(o, "__name__", o)) for o in options.values())
    if isinstance(options, dict)
    else str(options),
)
def test_noise_is_drawn_for_the_steps_that_use_it(monkeypatch, options, draws):
    shapes = []
    monkeypatch.setattr(sampling, "randn", lambda shape, generator=None: shapes.append(shape) or torch.ones(shape))
    options = dict(options)
    list(options.pop("sampler")(Recorder("nl"), noise(0, 2, 3), SCHEDULE, 10, **options))
    assert shapes == [(2, 3)] * draws


@BY_NAME
def test_nothing_happens_before_the_first_step_is_asked_for(sampler):
    model, seen = Recorder("lin"), []
    steps = sampler(model, noise(0, 1, 2), SCHEDULE, 5, before_step=lambda x, t: seen.append(t) or x)
    assert not model.calls and not seen
    sampler(model, noise(0, 1, 2), SCHEDULE, -5, spacing="even")  # not asked for a step, it does not complain
    next(steps)
    assert len(seen) == 1


@BY_NAME
def test_steps_are_differentiable_in_x_but_not_through_the_model(sampler):
    """A caller who steers the picture by a gradient needs this. (Gradients are off inside the model.)"""
    grad = []

    def model(x, t):
        grad.append(torch.is_grad_enabled())
        return 0.5 * x

    x_T = noise(0, 1, 2).requires_grad_()
    x = last(sampler(model, x_T, SCHEDULE, 3, generator=gen(0)))
    assert x.requires_grad and torch.autograd.grad(x.sum(), x_T)[0].abs().min() > 0
    assert not any(grad)


# -- mistakes ----------------------------------------------------------------------------------------------


@BY_NAME
def test_an_unknown_argument_is_named_at_once(sampler):
    with pytest.raises(TypeError, match=rf"^{sampler.__name__}: .*'etta'. It takes eps_model, x_T, schedule, steps, "):
        sampler(Recorder("lin"), noise(0, 1, 2), SCHEDULE, etta=0.5)
    with pytest.raises(TypeError, match=rf"^{sampler.__name__}: missing .*'schedule'"):
        sampler(Recorder("lin"), noise(0, 1, 2))
    with pytest.raises(TypeError, match=rf"^{sampler.__name__}: too many positional arguments"):
        sampler(Recorder("lin"), noise(0, 1, 2), SCHEDULE, 5, 0.0, "leading")


def test_a_sampler_refuses_an_argument_that_it_does_not_use():
    for sampler, option in [(ddpm, "eta"), (euler, "set_alpha_to_one"), (ddim, "clip_denoised")]:
        with pytest.raises(TypeError, match=f"'{option}'"):
            sampler(Recorder("lin"), noise(0, 1, 2), SCHEDULE, **{option: 0})


@BY_NAME
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_found_at_once(sampler, bad):
    calls = []

    def model(x, t):
        calls.append(int(t[0]))
        return torch.where(t[:, None] < 500, bad, x)

    with pytest.raises(FloatingPointError, match=r"NaN or infinity at step \d+, t = ") as error:
        list(sampler(model, noise(0, 1, 2), SCHEDULE, 10))
    assert re.search(r"t = (\d+)", str(error.value))[1] == str(calls[-1])
    assert calls[-1] < 500 <= calls[-2]


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 1000), st.data(), st.sampled_from([float("nan"), float("inf"), -float("inf")]))
def test_one_bad_number_among_many_is_enough(size, data, bad):
    eps = noise(0, 1, size)
    eps[0, data.draw(st.integers(0, size - 1))] = bad
    with pytest.raises(FloatingPointError):
        next(ddim(lambda x, t: eps, noise(1, 1, size), SCHEDULE, 10))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_the_largest_numbers_are_not_mistaken_for_infinity(dtype):
    x = torch.zeros(1, 100, dtype=dtype)
    eps = torch.full_like(x, torch.finfo(dtype).max)
    assert next(ddim(lambda x, t: eps, x, SCHEDULE, 10)).eps is eps


@BY_NAME
@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "between 1 and 1000, the schedule's timesteps, but it is 0"),
        ({"steps": -3}, "but it is -3"),
        ({"steps": 1001}, "but it is 1001"),
        ({"spacing": "even"}, '"leading", "linspace" or "trailing", but it is "even"'),
        ({"timesteps": [1, 21, 41]}, r"falling numbers, but they are \[1, 21, 41\]"),
        ({"timesteps": [500, 500]}, "falling"),
        ({"timesteps": []}, "falling"),
        ({"timesteps": [1000, 500]}, r"must lie in \[0, 1000\), but it is 1000"),
        ({"timesteps": [500, -1]}, "but it is -1"),
    ],
    ids=str,
)
def test_bad_steps_are_named(sampler, options, says):
    with pytest.raises(ValueError, match=says):
        next(sampler(Recorder("lin"), noise(0, 1, 2), SCHEDULE, **options))


@pytest.mark.parametrize(
    ("sampler", "eta", "says"),
    [
        (ddim, -0.1, "eta must lie between 0"),
        (ddim, 1.5, "eta must lie between 0"),
        (plms, 0.5, "plms draws no noise, so eta must be 0"),
        (dpmpp_2m, 1.0, "dpmpp_2m draws no noise, so eta must be 0"),
        (euler, 1.0, "euler draws no noise, so eta must be 0, but it is 1.0; ddim and euler_ancestral"),
        (heun, 0.5, "heun draws no noise, so eta must be 0"),
        (euler_ancestral, 1.5, "eta must lie between 0"),
    ],
)
def test_bad_eta_is_named(sampler, eta, says):
    with pytest.raises(ValueError, match=says):
        next(sampler(Recorder("lin"), noise(0, 1, 2), SCHEDULE, 5, eta))


def test_the_error_about_eta_names_a_sampler_that_was_added(monkeypatch):
    monkeypatch.setitem(SAMPLERS, "mine", ddim)
    with pytest.raises(ValueError, match="; ddim and euler_ancestral and mine take an eta"):
        next(euler(Recorder("lin"), noise(0, 1, 2), SCHEDULE, 5, 1.0))


@BY_NAME
def test_a_model_that_returns_another_shape_is_named(sampler):
    """As one does that predicts a variance beside the noise."""
    with pytest.raises(ValueError, match=r"the shape of x, \[2, 4\], not \[2, 8\]"):
        next(sampler(lambda x, t: torch.cat([x, x], dim=1), noise(0, 2, 4), SCHEDULE, 5))


def test_there_must_be_a_generator_for_each_picture():
    with pytest.raises(ValueError, match="2 generators cannot draw noise for 3 pictures"):
        randn((3, 4), [gen(0), gen(1)])


def test_a_model_may_return_guided_by_itself():
    def model(x, t):
        return Guided(0.5 * x, x, -x)

    step = next(ddim(model, torch.ones(1, 2), SCHEDULE, 5))
    assert (step.eps.tolist(), step.eps_cond.tolist(), step.eps_uncond.tolist()) == (
        [[0.5] * 2],
        [[1.0] * 2],
        [[-1.0] * 2],
    )
