"""Flow matching: against the equations written out, closed forms, and diffusers' sampler."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd import flow, sampling
from minisd.noising import ExactDenoiser, NoiseSchedule

SCHEDULES = {"scaled_linear": NoiseSchedule.scaled_linear(), "cosine": NoiseSchedule.cosine(),
             "straight": flow.straight_schedule()}  # fmt: skip
EACH = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


times = st.lists(st.integers(0, 999), min_size=3, max_size=3).map(torch.tensor)
taus = st.lists(st.floats(0.01, 0.99), min_size=3, max_size=3).map(lambda t: torch.tensor(t, dtype=torch.float64))
seeds = st.integers(0, 2**31)


@EACH
@settings(deadline=None, max_examples=25)
@given(seed=seeds, t=times)
def test_a_noise_schedule_is_the_straight_path_at_other_times_and_another_scale(schedule, seed, t):
    """Noise a picture, map it, and it lies on the straight line between the same picture and the same noise."""
    x_0, noise = draw(seed, 3, 2, 4), draw(seed + 1, 3, 2, 4)
    x_t = schedule.q_sample(x_0, t, noise)
    z, tau = flow.to_straight(schedule, x_t, t)
    torch.testing.assert_close(z, flow.interpolate(x_0, tau, noise), atol=1e-6, rtol=1e-6)
    torch.testing.assert_close(flow.from_straight(schedule, z, t), x_t)
    ratio = (1 - tau) / tau  # of picture to noise, which the map must not change
    torch.testing.assert_close(ratio, schedule.snr(t).sqrt(), rtol=1e-4, atol=1e-6)


@settings(deadline=None, max_examples=25)
@given(seed=seeds, tau=taus)
def test_picture_noise_and_velocity_follow_from_one_another(seed, tau):
    x_0, noise = draw(seed, 3, 5), draw(seed + 1, 3, 5)
    z, u = flow.interpolate(x_0, tau, noise), flow.velocity(x_0, noise)
    torch.testing.assert_close(flow.start_from_velocity(z, tau, u), x_0)
    torch.testing.assert_close(flow.noise_from_velocity(z, tau, u), noise)
    torch.testing.assert_close(flow.velocity_from_noise(z, tau, noise), u)


@EACH
@settings(deadline=None, max_examples=25)
@given(seed=seeds, t=times)
def test_v_becomes_the_velocity_without_a_division(schedule, seed, t):
    x_0, noise = draw(seed, 3, 5), draw(seed + 1, 3, 5)
    x_t, v = schedule.q_sample(x_0, t, noise), schedule.get_v(x_0, noise, t)
    expected = flow.velocity(x_0, noise)
    torch.testing.assert_close(flow.velocity_from_v(x_t, v, schedule, t), expected, atol=1e-6, rtol=1e-5)


def test_the_velocity_is_the_derivative_of_the_path():
    x_0, noise, tau = draw(0, 3, 4), draw(1, 3, 4), torch.tensor([0.2, 0.5, 0.9], dtype=torch.float64)
    _, slope = torch.func.jvp(lambda at: flow.interpolate(x_0, at, noise), (tau,), (torch.ones_like(tau),))
    torch.testing.assert_close(slope, flow.velocity(x_0, noise))


@pytest.mark.parametrize("shape", [(3, 4, 2, 6), (3, 2), (3,)], ids=["latents", "points", "numbers"])
def test_the_loss_by_hand(shape):
    x_0, noise, tau = draw(0, *shape), draw(1, *shape), torch.tensor([0.1, 0.5, 1.0], dtype=torch.float64)

    def model(z, at, context):
        return torch.sin(z) + at.reshape(-1, *[1] * (z.ndim - 1)) + context.mean()

    each = []
    for x, e, at in zip(x_0, noise, tau.tolist(), strict=True):
        each.append(((e - x - (torch.sin((1 - at) * x + at * e) + at + 0.5)) ** 2).mean())
    context = torch.full((3, 1, 2), 0.5)
    loss = flow.flow_loss(model, x_0, context, tau, noise, reduction="none")
    torch.testing.assert_close(loss.double(), torch.stack(each))
    torch.testing.assert_close(flow.flow_loss(model, x_0, context, tau, noise), loss.mean())


def test_the_loss_draws_its_own_times_and_noise():
    seen = []
    flow.flow_loss(lambda z, tau, c: seen.append((z, tau)) or z, torch.zeros(500, 2))
    (z, tau), = seen  # fmt: skip
    assert 0 <= tau.min() < 0.05 and 0.95 < tau.max() < 1
    assert (z / tau[:, None]).std() == pytest.approx(1, abs=0.1)  # a black picture, so that z is τ ε


def test_logit_normal_times_have_a_normal_logit():
    tau = flow.logit_normal(20_000, mean=0.5, std=0.8, generator=torch.Generator().manual_seed(0))
    assert tau.shape == (20_000,) and 0 < tau.min() and tau.max() < 1
    logit = torch.logit(tau)
    assert logit.mean() == pytest.approx(0.5, abs=0.02) and logit.std() == pytest.approx(0.8, abs=0.02)


def test_a_straight_schedule_is_evenly_spaced():
    tau = flow.straight_time(flow.straight_schedule(99), torch.arange(99))
    torch.testing.assert_close(tau, torch.arange(1, 100) / 100, atol=1e-6, rtol=1e-6)


# -- exact fields ---------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(z=st.floats(-3, 3), tau=st.floats(0.05, 1))
def test_two_numbers_have_a_velocity_in_closed_form(z, tau):
    """For the data -1 and 1, Bayes' rule gives x̂_0 = tanh((1-τ) z / τ²)."""
    exact = flow.ExactVelocity(torch.tensor([-1.0, 1.0], dtype=torch.float64))
    z, tau = torch.tensor([z], dtype=torch.float64), torch.tensor([tau], dtype=torch.float64)
    expected = (z - torch.tanh((1 - tau) * z / tau**2)) / tau
    torch.testing.assert_close(exact(z, tau), expected)


def test_the_exact_velocity_is_that_of_the_exact_denoiser():
    data, schedule, t = draw(0, 6, 2), SCHEDULES["scaled_linear"], torch.tensor([5, 400, 999])
    x = draw(1, 3, 2)
    z, tau = flow.to_straight(schedule, x, t)
    eps = ExactDenoiser(data, schedule)(x, t)
    expected = flow.velocity_from_noise(z, tau, eps)
    torch.testing.assert_close(flow.ExactVelocity(data)(z, tau), expected, atol=1e-5, rtol=1e-5)


def test_the_exact_velocity_has_the_smallest_loss():
    data = draw(0, 4, 2)
    x_0, noise, tau = data.repeat(2000, 1), draw(1, 8000, 2), torch.rand(8000, dtype=torch.float64) * 0.9 + 0.1
    exact = flow.ExactVelocity(data)
    best = flow.flow_loss(exact, x_0, None, tau, noise)
    for other in (lambda z, at, c: 1.1 * exact(z, at), lambda z, at, c: exact(z, at) + 0.1):
        assert flow.flow_loss(other, x_0, None, tau, noise) > best


def test_one_picture_is_drawn_in_one_step_and_two_are_not():
    z = draw(0, 50, 3)
    ones = torch.ones(50, dtype=torch.float64)
    one = draw(1, 1, 3)
    torch.testing.assert_close(z - flow.ExactVelocity(one)(z, ones), one.expand(50, 3))
    two = draw(1, 2, 3)  # the first step leads to their mean
    torch.testing.assert_close(z - flow.ExactVelocity(two)(z, ones), two.mean(0).expand(50, 3))


# -- drawing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ddim", "euler"])
def test_a_sampler_on_the_straight_path_equals_diffusers_flow_matching(diffusers, name):
    schedule, exact, steps = flow.straight_schedule(), flow.ExactVelocity(draw(0, 5, 3, 4, 4)), 8
    x_T = draw(1, 2, 3, 4, 4)
    options = {"set_alpha_to_one": True} if name == "ddim" else {}
    model = flow.as_eps_model(exact, schedule)
    made = list(sampling.SAMPLERS[name](model, x_T, schedule, steps, spacing="trailing", **options))

    theirs = diffusers.FlowMatchEulerDiscreteScheduler()
    t = torch.tensor([step.t for step in made])
    sigmas = flow.straight_time(schedule, t)
    theirs.set_timesteps(sigmas=sigmas.tolist())
    z, _ = flow.to_straight(schedule, x_T, t[:1].expand(2))
    for step, at in zip(made, theirs.timesteps, strict=True):
        ours, _ = flow.to_straight(schedule, step.x_t, torch.full((2,), step.t))
        torch.testing.assert_close(ours, z, atol=1e-3, rtol=1e-3)
        z = theirs.step(exact(z, (at / 1000).expand(2)), at, z).prev_sample
    torch.testing.assert_close(made[-1].x, z, atol=1e-3, rtol=1e-3)


def test_a_guided_velocity_model_is_guided_as_any_other():
    """ε is u with factors that do not depend on the prompt, so guidance in one is guidance in the other."""
    schedule, x, t = flow.straight_schedule(), draw(0, 2, 3), torch.tensor([100, 700])

    def model(z, tau, context):
        return z * context[:, 0]

    contexts = torch.full((1, 1, 3), 2.0).double(), torch.full((1, 1, 3), 0.5).double()
    eps_model = sampling.classifier_free_guidance(flow.as_eps_model(model, schedule), *contexts, scale=3.0)
    z, tau = flow.to_straight(schedule, x, t)
    expected = flow.noise_from_velocity(z, tau, z * (0.5 + 3 * (2 - 0.5)))
    torch.testing.assert_close(eps_model(x, t).eps, expected)
