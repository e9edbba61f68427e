"""The loss: against the equations written out, and what any right loss must do."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minisd.loss import LOSSES, epsilon_loss, min_snr_weight, text_dropout, v_loss, x0_loss
from minisd.noising import ExactDenoiser, NoiseSchedule

SCHEDULE = NoiseSchedule.scaled_linear()
BY_NAME = pytest.mark.parametrize("name", LOSSES)
seeds = st.integers(0, 2**31)


def draw(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def target_of(name: str, x_0, noise, t):
    """What a perfect model returns, from ᾱ_t alone, in float64."""
    a = torch.tensor([SCHEDULE.alpha_bar(int(i)) for i in t], dtype=torch.float64).reshape(-1, *[1] * (x_0.ndim - 1))
    v = a.sqrt() * noise.double() - (1 - a).sqrt() * x_0.double()
    return {"eps": noise.double(), "v": v, "x0": x_0.double()}[name]


@BY_NAME
@pytest.mark.parametrize("gamma", [None, 5.0])
@pytest.mark.parametrize("shape", [(3, 4, 2, 6), (3, 2), (3,)], ids=["latents", "points", "numbers"])
def test_the_loss_by_hand(name, gamma, shape):
    """One picture after the other: noise it, ask the model, square the error, weight it, take the mean."""
    x_0, noise, t = draw(0, *shape), draw(1, *shape), torch.tensor([0, 300, 999])
    expected = 0.0
    for i in range(3):
        a = SCHEDULE.alpha_bar(int(t[i]))
        x_t = a**0.5 * x_0[i].double() + (1 - a) ** 0.5 * noise[i].double()
        prediction = torch.sin(x_t) + 0.001 * t[i] + 0.5  # the model below; 0.5 is its context
        target = target_of(name, x_0[i : i + 1], noise[i : i + 1], t[i : i + 1])[0]
        snr = a / (1 - a)
        weight = 1.0 if gamma is None else min(snr, gamma) / {"eps": snr, "v": snr + 1, "x0": 1.0}[name]
        expected += weight * float(((target - prediction) ** 2).mean()) / 3

    def model(x, t, context):
        return torch.sin(x) + 0.001 * t.reshape(-1, *[1] * (x.ndim - 1)) + context.mean()

    loss = LOSSES[name](model, SCHEDULE, x_0, torch.full((3, 1, 2), 0.5), t, noise, min_snr_gamma=gamma)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=2e-5)


@BY_NAME
@pytest.mark.parametrize("gamma", [None, 5.0])
def test_without_a_reduction_there_is_a_loss_for_each_sample(name, gamma):
    x_0, noise, t = draw(0, 4, 3, 2), draw(1, 4, 3, 2), torch.tensor([0, 100, 500, 999])

    def loss(which, reduction="mean"):
        return LOSSES[name](lambda x, t, c: x / 2, SCHEDULE, x_0[which], None, t[which], noise[which], gamma, reduction)

    each = loss(slice(None), "none")
    torch.testing.assert_close(each, torch.stack([loss([i]) for i in range(4)]))
    torch.testing.assert_close(each.mean(), loss(slice(None)))


def test_the_losses_have_their_names():
    assert LOSSES == {"eps": epsilon_loss, "v": v_loss, "x0": x0_loss}


@settings(max_examples=25, deadline=None)
@given(seed=seeds, name=st.sampled_from(list(LOSSES)), gamma=st.sampled_from([None, 1.0, 5.0]))
def test_a_perfect_model_has_no_loss_and_any_other_has(seed, name, gamma):
    x_0, noise = draw(seed, 4, 3, 2), draw(seed + 1, 4, 3, 2)
    t = torch.randint(1000, (4,), generator=torch.Generator().manual_seed(seed))
    answer = target_of(name, x_0, noise, t).float()
    loss = LOSSES[name](lambda *_: answer, SCHEDULE, x_0, t=t, noise=noise, min_snr_gamma=gamma)
    assert loss.item() == pytest.approx(0, abs=1e-10)
    worse = LOSSES[name](lambda *_: answer + 0.1, SCHEDULE, x_0, t=t, noise=noise, min_snr_gamma=gamma)
    assert worse > 1e-6 and (gamma or worse.item() == pytest.approx(0.01, rel=1e-4))


@settings(max_examples=50, deadline=None)
@given(seed=seeds, t=st.integers(0, 999), gamma=st.floats(0.1, 20))
def test_under_min_snr_the_three_losses_weigh_one_error_alike(seed, t, gamma):
    """A wrong x_0, told as noise, as velocity or as itself: the same loss, min(SNR, γ) times its square."""
    x_0, noise, error = draw(seed, 2, 8), draw(seed + 1, 2, 8), draw(seed + 2, 2, 8)
    t = torch.full((2,), t)
    x_t = SCHEDULE.q_sample(x_0, t, noise)
    a = torch.tensor(SCHEDULE.alpha_bar(int(t[0])), dtype=torch.float64)
    wrong_x0 = x_0 + error
    wrong_noise = (x_t - a.sqrt() * wrong_x0) / (1 - a).sqrt()
    answers = {"eps": wrong_noise, "v": a.sqrt() * wrong_noise - (1 - a).sqrt() * wrong_x0, "x0": wrong_x0}
    expected = min(float(a / (1 - a)), gamma) * float(error.square().mean())
    for name, answer in answers.items():
        loss = LOSSES[name](lambda *_, a=answer: a, SCHEDULE, x_0, t=t, noise=noise, min_snr_gamma=gamma)
        assert loss.item() == pytest.approx(expected, rel=2e-3), name


def test_min_snr_weights_by_hand():
    snr = torch.tensor([0.1, 5.0, 1000.0])
    torch.testing.assert_close(min_snr_weight(snr), torch.tensor([1.0, 1.0, 0.005]))
    torch.testing.assert_close(min_snr_weight(snr, 5.0, "v"), torch.tensor([0.1 / 1.1, 5 / 6, 5 / 1001]))
    torch.testing.assert_close(min_snr_weight(snr, 2.0, "x0"), torch.tensor([0.1, 2.0, 2.0]))


@BY_NAME
def test_times_and_noise_are_drawn_where_they_are_left_out(name):
    """Every time equally often, and noise of variance 1, another for each picture."""
    schedule, seen = NoiseSchedule.linear(0.1, 0.5, timesteps=5), []

    def model(x, t, context):
        assert context is None
        seen.append((x, t))
        return torch.zeros_like(x)

    torch.manual_seed(0)
    n = 20_000
    loss = LOSSES[name](model, schedule, torch.zeros(n, 2))
    ((x_t, t),) = seen
    counts = t.bincount()
    assert len(counts) == 5 and ((counts - n / 5).abs() < 5 * (n / 5) ** 0.5).all()
    noise = x_t / schedule.sqrt_one_minus_alphas_cumprod[t][:, None]  # since x_0 = 0
    assert noise.mean().abs() < 5 / (2 * n) ** 0.5 and noise.std().item() == pytest.approx(1, abs=0.03)
    assert (noise[:, 0] * noise[:, 1]).mean().abs() < 5 / n**0.5
    if name == "eps":
        assert loss.item() == pytest.approx(1, abs=0.03)  # to answer zero costs the variance of the noise
    again = LOSSES[name](lambda x, t, c: torch.zeros_like(x), schedule, torch.zeros(n, 2))
    assert name == "x0" or again != loss


def test_the_exact_denoiser_is_a_floor():
    """No other answer has a smaller loss, on the mean over the noise: not zero, and nothing near the exact one."""
    data = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [0.0, -1.5]])
    exact = ExactDenoiser(data, SCHEDULE)
    n = 6000
    x_0, noise = data.repeat(n // 3, 1), draw(0, n, 2)
    t = torch.randint(1000, (n,), generator=torch.Generator().manual_seed(1))
    others = {
        "exact": exact,
        "zero": lambda x, t, c: torch.zeros_like(x),
        "x_t": lambda x, t, c: x,
        "smaller": lambda x, t, c: 0.9 * exact(x, t),
        "larger": lambda x, t, c: 1.1 * exact(x, t),
        "shifted": lambda x, t, c: exact(x, t) + 0.1,
        "late": lambda x, t, c: exact(x, (t + 100).clamp(max=999)),
        "of half the data": ExactDenoiser(data[:2], SCHEDULE),
    }
    losses = {name: epsilon_loss(model, SCHEDULE, x_0, t=t, noise=noise).item() for name, model in others.items()}
    floor = losses.pop("exact")
    assert 0.01 < floor < 0.5 * losses["zero"]
    assert all(loss > floor * 1.01 for loss in losses.values()), (floor, losses)


def test_gradients_reach_the_model_and_are_those_of_the_mean_square():
    weight = torch.tensor(0.3, requires_grad=True)
    x_0, noise, t = draw(0, 5, 3), draw(1, 5, 3), torch.tensor([0, 10, 300, 800, 999])
    x_t = SCHEDULE.q_sample(x_0, t, noise)
    epsilon_loss(lambda x, t, c: weight * x, SCHEDULE, x_0, t=t, noise=noise).backward()
    expected = (2 * (0.3 * x_t - noise) * x_t).mean()  # d/dw of the mean of (w x_t - ε)²
    assert weight.grad.item() == pytest.approx(expected.item(), rel=1e-5)


@BY_NAME
def test_the_error_is_squared_in_float32_whatever_the_model_computes_in(name):
    x_0, noise, answer = (draw(i, 4, 3).bfloat16() for i in range(3))
    t = torch.tensor([1, 2, 500, 999])
    loss = LOSSES[name](lambda *_: answer, SCHEDULE, x_0, t=t, noise=noise)
    target = {"eps": noise, "v": SCHEDULE.get_v(x_0, noise, t), "x0": x_0}[name]
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx((target.float() - answer.float()).square().mean().item(), rel=1e-6)


@BY_NAME
@pytest.mark.parametrize("wrong", [(4, 1), (4, 3, 1), (1, 3), ()], ids=str)
def test_an_answer_of_another_shape_is_refused(name, wrong):
    """It could be broadcast, and the model would train to a grey mean in silence."""
    with pytest.raises(ValueError, match=r"the model returned \(.*\) for a target of \(4, 3\)"):
        LOSSES[name](lambda *_: torch.zeros(wrong), SCHEDULE, draw(0, 4, 3), t=torch.tensor([1, 2, 3, 4]))


@settings(max_examples=25, deadline=None)
@given(drop=st.lists(st.booleans(), min_size=1, max_size=6))
def test_text_dropout_swaps_the_dropped_rows_and_no_others(drop):
    context, empty = draw(0, len(drop), 3, 4), draw(1, 1, 3, 4)
    out = text_dropout(context, empty, torch.tensor(drop))
    for row, before, dropped in zip(out, context, drop, strict=True):
        assert torch.equal(row, empty[0] if dropped else before)


@BY_NAME
def test_the_gradient_of_each_sample_can_be_taken_by_vmap(name):
    """Under vmap, PyTorch does not allow to look at a value, such as whether t is in its range."""
    x, t = draw(0, 3, 1, 2, 2), torch.tensor([0, 500, 999])

    def loss(x_0, t):
        return LOSSES[name](lambda x_t, t, c: x_t**2, SCHEDULE, x_0[None], None, t[None], x_0[None], 5.0)

    gradients = torch.func.vmap(torch.func.grad(loss))(x, t)
    torch.testing.assert_close(gradients, torch.stack([torch.func.grad(loss)(x[k], t[k]) for k in range(3)]))
