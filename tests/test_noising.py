"""The forward process: against CompVis's numbers, Bayes' rule worked out once more, and brute force."""

import jaxtyping
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd.noising import ExactDenoiser, NoiseSchedule, extract_into_tensor

SCHEDULES = {
    "scaled_linear": NoiseSchedule.scaled_linear(),
    "linear": NoiseSchedule.linear(),
    "cosine": NoiseSchedule.cosine(),
    "short": NoiseSchedule.linear(0.02, 0.4, timesteps=12),
}
schedules = st.sampled_from(list(SCHEDULES.values()))
seeds = st.integers(0, 2**31)


@pytest.fixture(scope="module")
def compvis(load_fixture):
    return load_fixture("schedules")[0]


@pytest.fixture
def unchecked(monkeypatch):
    """Off with the check of every signature: mistakes are to get as far as they do for a user."""
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)


def draw(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def some_t(seed: int, schedule: NoiseSchedule, b: int) -> torch.Tensor:
    return torch.randint(schedule.timesteps, (b,), generator=torch.Generator().manual_seed(seed))


# -- against CompVis and diffusers -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "betas"),
    [
        (NoiseSchedule.scaled_linear(), "betas_f64"),
        (NoiseSchedule.linear(0.00085, 0.012), "betas_sqrt_linear_f64"),
        (NoiseSchedule.linear(0.00085, 0.012), "diffusers_betas_linear_f32"),
        (NoiseSchedule.cosine(), "betas_cosine_f64"),
        (NoiseSchedule.cosine(), "diffusers_betas_squaredcos_f32"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_betas_equal_the_references(compvis, schedule, betas):
    torch.testing.assert_close(schedule.betas.double(), compvis[betas].double(), atol=1e-6, rtol=1e-5)


def test_alphas_cumprod_equal_the_references(compvis):
    schedule = NoiseSchedule.scaled_linear()
    torch.testing.assert_close(
        schedule.alphas_cumprod.double(), compvis["alphas_cumprod_f64"], atol=4e-8, rtol=0
    )
    torch.testing.assert_close(
        schedule.alphas_cumprod, compvis["diffusers_alphas_cumprod_f32"], atol=1e-6, rtol=0
    )
    exact = torch.tensor([schedule.alpha_bar(t) for t in range(1000)], dtype=torch.float64)
    torch.testing.assert_close(exact, compvis["alphas_cumprod_f64"], atol=1e-14, rtol=0)


@pytest.mark.parametrize(
    "name",
    [
        "posterior_variance",
        "posterior_log_variance_clipped",
        "posterior_mean_coef1",
        "posterior_mean_coef2",
        "sqrt_recip_alphas_cumprod",
        "sqrt_recipm1_alphas_cumprod",
    ],
)
def test_buffers_equal_compvis(compvis, name):
    buffer = getattr(NoiseSchedule.scaled_linear(), name)
    assert buffer.dtype == torch.float32
    torch.testing.assert_close(buffer, compvis[f"ddpm_{name}"], atol=0, rtol=1e-6)


def test_q_sample_equals_compvis(load_fixture):
    f, _ = load_fixture("samplers_compvis")
    x_t = NoiseSchedule.scaled_linear().q_sample(f["loss.x_start"], f["loss.t"], f["loss.noise"])
    torch.testing.assert_close(x_t, f["loss.q_sample"], atol=1e-6, rtol=0)


# -- the mathematics ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_many_small_steps_make_the_long_one(schedule):
    """Mean and variance of q(x_t | x_{t-1}), iterated from x_0 = 1, are those of q(x_t | x_0)."""
    means, variances = [1.0], [0.0]
    for beta in schedule.betas.tolist():
        means.append((1 - beta) ** 0.5 * means[-1])
        variances.append((1 - beta) * variances[-1] + beta)
    x_0 = torch.ones(schedule.timesteps, dtype=torch.float64)
    mean, variance, log_variance = schedule.q_mean_variance(x_0, torch.arange(schedule.timesteps))
    # the clipped β of the cosine ends at 0.999, of which float32 keeps 1 - β to four digits only
    torch.testing.assert_close(mean, torch.tensor(means[1:]).double(), rtol=1e-4, atol=0)
    torch.testing.assert_close(variance, torch.tensor(variances[1:]).double(), rtol=1e-6, atol=0)
    torch.testing.assert_close(log_variance.exp(), variance)


@settings(deadline=None, max_examples=50)
@given(schedules, seeds)
def test_variance_is_preserved(schedule, seed):
    """x_0 and ε at right angles and of one length: x_t, between the two, has that length too."""
    t = some_t(seed, schedule, 4)
    x_0 = torch.tensor([[1.0, 0.0]]).expand(4, 2)
    noise = torch.tensor([[0.0, 1.0]]).expand(4, 2)
    length = schedule.q_sample(x_0, t, noise).norm(dim=1)
    torch.testing.assert_close(length, torch.ones(4), atol=1e-6, rtol=0)


@settings(deadline=None, max_examples=50)
@given(schedules, seeds)
def test_start_and_noise_are_found_again_in_x_t(schedule, seed):
    t = some_t(seed, schedule, 5)
    x_0, noise = draw(seed, 5, 3), draw(seed + 1, 5, 3)
    x_t = schedule.q_sample(x_0, t, noise)
    # float32's 6e-8 in the coefficients is divided by √ᾱ on the way to x_0, by √(1-ᾱ) on the way to ε
    worst = max(max(schedule.alpha_bar(s) ** -0.5, (1 - schedule.alpha_bar(s)) ** -0.5) for s in t.tolist())
    close = {"atol": 2e-6 * worst, "rtol": 0}
    torch.testing.assert_close(schedule.predict_start_from_noise(x_t, t, noise), x_0, **close)
    torch.testing.assert_close(schedule.predict_noise_from_start(x_t, t, x_0), noise, **close)


@settings(deadline=None, max_examples=50)
@given(schedules, seeds)
def test_start_and_noise_are_found_again_in_v(schedule, seed):
    t = some_t(seed, schedule, 5)
    x_0, noise = draw(seed, 5, 3), draw(seed + 1, 5, 3)
    x_t, v = schedule.q_sample(x_0, t, noise), schedule.get_v(x_0, noise, t)
    torch.testing.assert_close(schedule.predict_start_from_v(x_t, t, v), x_0, atol=2e-6, rtol=0)
    torch.testing.assert_close(schedule.predict_noise_from_v(x_t, t, v), noise, atol=2e-6, rtol=0)


def test_v_is_the_noise_at_first_and_the_picture_at_last():
    schedule = NoiseSchedule.cosine()
    x_0, noise = draw(0, 1, 8), draw(1, 1, 8)
    first, last = torch.tensor([0]), torch.tensor([schedule.timesteps - 1])
    torch.testing.assert_close(schedule.get_v(x_0, noise, first), noise, atol=0.03, rtol=0)
    torch.testing.assert_close(schedule.get_v(x_0, noise, last), -x_0, atol=0.03, rtol=0)


@settings(deadline=None, max_examples=50)
@given(schedules, seeds)
def test_posterior_is_the_product_of_two_gaussians(schedule, seed):
    """q(x_{t-1} | x_t, x_0) ∝ q(x_t | x_{t-1}) q(x_{t-1} | x_0): precisions add, means weigh by precision."""
    t = some_t(seed, schedule, 4).clamp(min=1)
    x_0, x_t = draw(seed, 4, 2), draw(seed + 1, 4, 2)
    for k, s in enumerate(t.tolist()):
        alpha_bar_prev = schedule.alpha_bar(s - 1)
        alpha = schedule.alpha_bar(s) / alpha_bar_prev
        prior = 1 / (1 - alpha_bar_prev)  # precision of x_{t-1} around √ᾱ_{t-1} x_0
        likelihood = alpha / (1 - alpha)  # precision of x_t / √α around x_{t-1}
        variance = 1 / (prior + likelihood)
        mean = variance * (prior * alpha_bar_prev**0.5 * x_0[k] + likelihood * x_t[k] / alpha**0.5)

        q_mean, q_variance, q_log_variance = schedule.q_posterior(x_0, x_t, t)
        torch.testing.assert_close(q_mean[k], mean, atol=1e-5, rtol=1e-5)
        assert q_variance[k].item() == pytest.approx(variance, rel=1e-5)
        assert q_log_variance[k].exp().item() == pytest.approx(variance, rel=1e-5)


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_posterior_of_the_first_step_is_the_picture(schedule):
    x_0, x_t = draw(0, 3, 2), draw(1, 3, 2)
    mean, variance, log_variance = schedule.q_posterior(x_0, x_t, torch.zeros(3, dtype=torch.int64))
    torch.testing.assert_close(mean, x_0, atol=1e-6, rtol=0)
    assert (variance == 0).all()
    assert log_variance.isfinite().all()


@pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)
def test_snr_falls(schedule):
    t = torch.arange(schedule.timesteps)
    snr = schedule.snr(t)
    exact = torch.tensor([schedule.alpha_bar(s) / (1 - schedule.alpha_bar(s)) for s in t.tolist()])
    torch.testing.assert_close(snr, exact, rtol=1e-6, atol=0)
    assert (snr.diff() < 0).all()
    torch.testing.assert_close(schedule.log_snr(t).exp(), exact, rtol=1e-5, atol=0)


def test_cosine_falls_to_nothing_with_no_beta_above_the_limit():
    schedule = NoiseSchedule.cosine(100, max_beta=0.9)
    assert schedule.betas.max() == pytest.approx(0.9)
    assert schedule.alpha_bar(49) == pytest.approx(0.5, abs=0.02)
    assert schedule.alpha_bar(99) < 1e-4


# -- data of any kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(3,), (3, 2), (3, 4, 8, 8)], ids=str)
def test_rank_and_dtype_of_the_data_are_kept(shape, dtype):
    schedule, t = NoiseSchedule.scaled_linear(), torch.tensor([0, 500, 999])
    x_0, noise = draw(0, *shape, dtype=dtype), draw(1, *shape, dtype=dtype)
    one_by_one = torch.cat(
        [schedule.q_sample(x_0[k : k + 1], t[k : k + 1], noise[k : k + 1]) for k in range(3)]
    )
    x_t = schedule.q_sample(x_0, t, noise)
    assert x_t.dtype == dtype
    torch.testing.assert_close(x_t, one_by_one)
    for result in schedule.q_posterior(x_0, x_t, t):
        assert result.dtype == dtype
        assert result.ndim == len(shape)
    assert ExactDenoiser(x_0, schedule)(x_t, t).dtype == dtype


def test_extract_into_tensor_picks_one_coefficient_for_each_picture():
    a = torch.tensor([10.0, 20.0, 30.0])
    picked = extract_into_tensor(a, torch.tensor([2, 0]), ndim=4)
    assert picked.shape == (2, 1, 1, 1)
    assert picked.flatten().tolist() == [30.0, 10.0]


# -- mistakes ----------------------------------------------------------------------------------------------

X = torch.zeros(2, 3)


@pytest.mark.parametrize(
    ("t", "noise", "error", "says"),
    [
        (torch.tensor([0, 1000]), X, ValueError, r"must lie in \[0, 1000\).*\[0, 1000\]"),
        (torch.tensor([-1, 5]), X, ValueError, r"must lie in \[0, 1000\).*\[-1, 5\]"),
        (torch.tensor([0.5, 0.7]), X, TypeError, "must hold integers.*float32"),
        (torch.tensor([True, False]), X, TypeError, "must hold integers.*bool"),
        (torch.tensor([1]), X, ValueError, r"one timestep for each picture.*\[1\].*\[2, 3\]"),
        (torch.tensor(1), X, ValueError, r"one timestep for each picture.*\[\].*\[2, 3\]"),
        (torch.tensor([1, 2]), X[:1], ValueError, r"x_0 \[2, 3\] and noise \[1, 3\]"),
    ],
)
def test_mistakes_are_named(unchecked, t, noise, error, says):
    with pytest.raises(error, match=says):
        NoiseSchedule.scaled_linear().q_sample(X, t, noise)


@pytest.mark.parametrize("betas", [[], [0.0, 0.1], [0.1, 1.0], [[0.1]], [0.1, float("nan")]], ids=str)
def test_betas_must_be_between_0_and_1(unchecked, betas):
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        NoiseSchedule(torch.tensor(betas))


@pytest.mark.parametrize("t", [-1, 1000])
def test_alpha_bar_knows_its_range(t):
    with pytest.raises(ValueError, match=r"\[0, 1000\)"):
        NoiseSchedule.scaled_linear().alpha_bar(t)


# -- the exact denoiser ------------------------------------------------------------------------------------


def brute_force(data, x, t, schedule):
    """The sum over the data set written out, one picture at a time."""
    eps, x0, weights = [], [], []
    for picture, s in zip(x, t.tolist(), strict=True):
        alpha_bar = schedule.alpha_bar(s)
        d2 = torch.stack([(picture - alpha_bar**0.5 * one).square().sum() for one in data])
        w = torch.exp(-(d2 - d2.min()) / (2 * (1 - alpha_bar)))
        w = w / w.sum()
        mean = sum(p * one for p, one in zip(w, data, strict=True))
        weights.append(w)
        x0.append(mean)
        eps.append((picture - alpha_bar**0.5 * mean) / (1 - alpha_bar) ** 0.5)
    return torch.stack(eps), torch.stack(x0), torch.stack(weights)


@settings(deadline=None, max_examples=40)
@given(schedules, seeds, st.sampled_from([(), (2,), (3, 2, 2)]), st.integers(1, 6))
def test_exact_denoiser_equals_brute_force(schedule, seed, shape, n):
    data, noise, t = draw(seed, n, *shape), draw(seed + 1, 4, *shape), some_t(seed, schedule, 4)
    x = schedule.q_sample(data[torch.arange(4) % n], t, noise)
    denoiser = ExactDenoiser(data, schedule)
    eps, x0, weights = brute_force(data, x, t, schedule)
    torch.testing.assert_close(denoiser.posterior(x, t), weights, atol=1e-4, rtol=0)
    torch.testing.assert_close(denoiser.x0(x, t), x0, atol=1e-4, rtol=0)
    # at t = 0 an error in x0 is √(ᾱ/(1-ᾱ)), some hundred times as large in ε
    torch.testing.assert_close(denoiser(x, t), eps, atol=1e-2, rtol=0)
    torch.testing.assert_close(
        denoiser(x, t), schedule.predict_noise_from_start(x, t, denoiser.x0(x, t)), atol=1e-2, rtol=0
    )


def test_exact_denoiser_tells_apart_close_pictures_far_from_the_origin():
    """Where |x|² is a million times the distances that decide: float32 would see only rounding."""
    schedule, t = NoiseSchedule.scaled_linear(), torch.tensor([0])
    data = 100 + torch.linspace(0, 0.05, 6, dtype=torch.float64)[:, None].expand(6, 64)
    x = schedule.q_sample(data[2:3], t, draw(0, 1, 64)).float()
    _, _, weights = brute_force(data, x.double(), t, schedule)
    assert 0.01 < weights.max() < 0.99
    torch.testing.assert_close(
        ExactDenoiser(data.float(), schedule).posterior(x, t).double(), weights, atol=5e-3, rtol=0
    )


def test_exact_denoiser_sees_the_picture_in_a_little_noise_and_the_mean_in_a_lot():
    schedule, data = NoiseSchedule.cosine(), draw(0, 50, 3, 4, 4)
    denoiser = ExactDenoiser(data, schedule)
    noise = draw(1, 50, 3, 4, 4)
    little, lots = torch.full((50,), 10), torch.full((50,), 999)
    torch.testing.assert_close(
        denoiser.x0(schedule.q_sample(data, little, noise), little), data, atol=1e-6, rtol=0
    )
    guess = denoiser.x0(schedule.q_sample(data, lots, noise), lots)
    torch.testing.assert_close(guess, data.mean(0).expand_as(data), atol=0.02, rtol=0)


def test_no_other_estimate_of_the_noise_is_better():
    """It minimises E|ε - ε(x_t)|²: it beats itself made a little smaller, larger, or shifted."""
    schedule = NoiseSchedule.scaled_linear()
    data = draw(0, 20, 2)
    t = torch.full((4000,), 500)
    noise = draw(2, 4000, 2)
    x_t = schedule.q_sample(data[some_t(1, SCHEDULES["short"], 4000)], t, noise)
    eps = ExactDenoiser(data[:12], schedule)(x_t, t)

    def loss(guess):
        return (noise - guess).square().mean()

    assert all(loss(eps) < loss(other) for other in [0.9 * eps, 1.1 * eps, eps + 0.1, eps - 0.1, eps.flip(1)])


@pytest.mark.parametrize("x", [torch.zeros(2, 4), torch.zeros(2, 3, 1)], ids=lambda x: str(list(x.shape)))
def test_exact_denoiser_refuses_pictures_of_another_shape(x):
    with pytest.raises(ValueError, match=r"of the data's shape, \[3\]"):
        ExactDenoiser(torch.zeros(5, 3), NoiseSchedule.scaled_linear())(x, torch.tensor([1, 2]))


def test_exact_denoiser_refuses_an_empty_data_set():
    with pytest.raises(ValueError, match="one picture or more"):
        ExactDenoiser(torch.zeros(0, 3), NoiseSchedule.scaled_linear())
