"""The samplers: against CompVis's chains, against diffusers' schedulers, and against exact solutions."""

import json
import math
from pathlib import Path

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minisd import sampling
from minisd.noising import ExactDenoiser, NoiseSchedule
from minisd.sampling import SAMPLERS, Guided, classifier_free_guidance, ddim, ddpm, dpmpp_2m, make_timesteps, plms, randn

FIXTURES = Path(__file__).parent / "fixtures"
SCHEDULE = NoiseSchedule.scaled_linear()
CALLS = json.loads((FIXTURES / "samplers_compvis.json").read_text())["config"]["calls"]
BY_NAME = pytest.mark.parametrize("sampler", SAMPLERS.values(), ids=SAMPLERS)
DETERMINISTIC = {"ddim": ddim, "plms": plms, "dpmpp_2m": dpmpp_2m}


@pytest.fixture
def unchecked(monkeypatch):
    """No check of every signature, as the tests have it: a mistake gets as far as it does for a user."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


@pytest.fixture(scope="module")
def compvis():
    return load_file(FIXTURES / "samplers_compvis.safetensors")


@pytest.fixture(scope="module")
def diffusers():
    return pytest.importorskip("diffusers")


# -- eps_models ------------------------------------------------------------------------------------------------


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


# -- against CompVis -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in CALLS if name.startswith("compvis")])
def test_ddim_and_plms_equal_compvis(compvis, monkeypatch, name):
    sampler, function, *how, steps = name.removeprefix("compvis_").split(".", 2)[:2] + ["", ""]
    function, *how = name.split(".")[1:-1]
    how, steps = ".".join(how), int(name.rpartition(".S")[2])
    eps_model = model = Recorder(function)
    options = {}
    if how == "cfg7.5":
        eps_model = classifier_free_guidance(model, compvis["cond"], compvis["uncond"], 7.5)
    if how.startswith("eta"):
        options = {"eta": float(how.removeprefix("eta"))}
        replay(monkeypatch, compvis["ddim_eta.noises_50"])

    trajectory = list(SAMPLERS[sampler](eps_model, compvis["x_T"], SCHEDULE, steps, **options))
    assert len(trajectory) == steps
    assert model.calls == CALLS[name]
    assert_equal(trajectory[0].x0, compvis[f"{name}.pred_x0_step1"])
    assert_equal(trajectory[0].x, compvis[f"{name}.x_after_step1"])
    assert_equal(trajectory[1].x, compvis[f"{name}.x_after_step2"])
    assert_equal(trajectory[-1].x, compvis[f"{name}.x0"])


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
    model = Recorder(IMG2IMG)
    assert_equal(last(ddim(model, x, SCHEDULE, timesteps=timesteps)), compvis["img2img.decoded"])
    assert model.calls == CALLS["img2img"]


def test_inpainting_equals_compvis(compvis):
    noises, mask, x_0 = iter(compvis["inpaint.q_noises"]), compvis["inpaint.mask"], compvis[INPAINT_X0]
    seen = []

    def blend(x, t):
        seen.append(t)
        known = SCHEDULE.q_sample(x_0, torch.full((2,), t), next(noises))
        return mask * known + (1 - mask) * x

    trajectory = list(ddim(Recorder(INPAINT), compvis["x_T"], SCHEDULE, 10, before_step=blend))
    assert_equal(trajectory[-1].x, compvis["inpaint.S10.x0"])
    assert seen == CALLS["inpaint"]
