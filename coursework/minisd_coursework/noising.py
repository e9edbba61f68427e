"""Exercises of stage 1: the forward process, and the step back that one could take if one knew the picture."""

import math  # noqa: F401  mistakes name it

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minisd import sampling
from minisd.noising import ExactDenoiser, NoiseSchedule
from minisd.sampling import predict_x0

from .exercise import case, cases, exercise
from .places import instead_of, of_the_schedule, rule_of

# --- what they are tried on: betas that differ much, so that no index and no root goes unnoticed ---------------------


def betas_of(timesteps: int) -> Float[Tensor, "T"]:
    return torch.linspace(0.04, 0.5, timesteps)


def alphas_cumprod_of(timesteps: int) -> Float[Tensor, "T"]:
    return torch.cumprod(1 - betas_of(timesteps), dim=0)


def pictures(b: int, h: int = 4, w: int = 5) -> Float[Tensor, "b 3 h w"]:
    return torch.randn(b, 3, h, w)


def timed(*names: str, schedule: str = "alphas_cumprod"):
    """Cases for a function of pictures, of times and of a schedule. `names` in the order of the arguments."""

    def cases():
        stable = NoiseSchedule.scaled_linear()
        make = {"betas": betas_of, "alphas_cumprod": alphas_cumprod_of}[schedule]

        def case(t, values, h=4, w=5):
            t = torch.tensor(t)
            given = {"t": t, schedule: values}
            return tuple(given[name] if name in given else pictures(len(t), h, w) for name in names)

        return {
            "three pictures, 12 timesteps": case([3, 8, 5], make(12)),
            "one picture": case([6], make(12)),
            "as many pictures as columns": case([7, 2, 9, 4], make(12), h=3, w=4),
            "square pictures": case([1, 6], make(10), h=3, w=3),
            "Stable Diffusion's schedule": case([120, 900, 500], getattr(stable, schedule)),
            "the first and the last timestep": case([0, 11], make(12)),
        }

    return cases


def at(t: Tensor, alphas_cumprod: Tensor) -> dict[str, Tensor]:
    """The numbers of a timestep, by their symbols."""
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod])
    return {
        "ᾱ_t": alphas_cumprod[t],
        "α_t": alphas_cumprod[t] / before[t],
        "ᾱ_{t-1}": before[t],
        "ᾱ_{t+1}": alphas_cumprod[(t + 1).clamp(max=len(alphas_cumprod) - 1)],
    }


def of_t(t: Tensor, alphas_cumprod: Tensor, **_) -> dict[str, Tensor]:
    return at(t, alphas_cumprod)


def of_t_and_betas(t: Tensor, betas: Tensor, **_) -> dict[str, Tensor]:
    return at(t, torch.cumprod(1 - betas, 0))


# --- the exercises ---------------------------------------------------------------------------------------------------


def _put_betas(f):
    def scaled_linear(beta_start=0.00085, beta_end=0.012, timesteps=1000):
        return NoiseSchedule(f(beta_start, beta_end, timesteps))

    return [(NoiseSchedule, "scaled_linear", staticmethod(scaled_linear))]


@exercise(swap=_put_betas)
@case("Stable Diffusion's 1000 steps", lambda: (0.00085, 0.012, 1000))
@case("10 steps of other numbers", lambda: (0.01, 0.3, 10))
@case("7 steps", lambda: (0.02, 0.5, 7))
def scaled_linear_betas(beta_start: float, beta_end: float, timesteps: int) -> Float[Tensor, "T"]:
    """The noise of each step in Stable Diffusion: √β grows linearly from √beta_start to √beta_end.

    Returns the betas, `timesteps` of them; the first is beta_start and the last beta_end.
    """
    # BEGIN SOLUTION
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps)
    return roots**2
    # END SOLUTION


@instead_of("__init__", NoiseSchedule)
def _put_alphas_cumprod(f, real, self, betas):
    # the step back to the betas that belong to the student's ᾱ
    bar = f(torch.as_tensor(betas).double()).double()
    real(self, (1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])).clamp(1e-6, 1 - 1e-6))


@exercise(swap=_put_alphas_cumprod)
@case("12 betas", lambda: (betas_of(12),))
@case("5 betas in no order", lambda: (torch.tensor([0.3, 0.1, 0.4, 0.2, 0.5]),))
@case("one beta", lambda: (torch.tensor([0.3]),))
def alphas_cumprod(betas: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """ᾱ_t = α_0 α_1 ... α_t with α_t = 1 - β_t: how much of the picture's variance is left at t. (DDPM, section 2)"""
    # BEGIN SOLUTION
    return torch.cumprod(1 - betas, dim=0)
    # END SOLUTION


@instead_of("q_sample", NoiseSchedule)
def _put_all_steps(f, real, self, x_0, t, noise):
    """x_t by all the steps that lead there. Their noises are drawn so that together they are just `noise`."""
    s = torch.arange(int(t.max()) + 1)  # the steps
    bar_t, bar = self.alphas_cumprod[t.cpu(), None], self.alphas_cumprod[s]
    # what is left at t of the noise of step s: √(β_s ᾱ_t/ᾱ_s), as a part of √(1-ᾱ_t); the squares of the parts
    # add up to 1, so that moving each noise by its part of what their sum lacks leaves them N(0, I), given that sum
    part = (self.betas[s] * bar_t / bar / (1 - bar_t)).sqrt() * (s <= t.cpu()[:, None])  # [b s]
    part = part.T.reshape(*part.T.shape, *[1] * (x_0.ndim - 1)).to(x_0)  # [s b 1 1 1]
    noises = torch.randn(len(s), *x_0.shape, generator=torch.Generator().manual_seed(0)).to(x_0)
    noises = noises + part * (noise - (part * noises).sum(dim=0))
    x = x_0
    for i in range(len(s)):
        stepped = f(x, torch.full_like(t, i), noises[i], self.betas.to(x.device)).to(x)
        x = torch.where((i <= t).reshape(-1, *[1] * (x.ndim - 1)), stepped, x)
    return x


@exercise(
    linear=("x", "noise"),
    quantities=lambda t, betas, **_: {"β_t": betas[t], "ᾱ_t": torch.cumprod(1 - betas, 0)[t],
                                      "β_{t-1}": betas[(t - 1).clamp(min=0)]},
    swap=_put_all_steps,
)  # fmt: skip
@cases(timed("x", "t", "noise", "betas", schedule="betas"))
def q_step(
    x: Float[Tensor, "b c h w"], t: Int[Tensor, "b"], noise: Float[Tensor, "b c h w"], betas: Float[Tensor, "T"]
) -> Float[Tensor, "b c h w"]:
    """One small step of the forward process: from x = x_{t-1} to x_t.

        q(x_t | x_{t-1}) = N(√(1-β_t) x_{t-1}, β_t I)                    (DDPM, eq. 2)

    `noise` is ε ~ N(0, I); each picture of the batch has its own t.
    """
    # BEGIN SOLUTION
    beta = betas[t].reshape(-1, 1, 1, 1)
    return (1 - beta).sqrt() * x + beta.sqrt() * noise
    # END SOLUTION


@exercise(linear=("x_0", "noise"), quantities=of_t, swap=of_the_schedule("q_sample"))
@cases(timed("x_0", "t", "noise", "alphas_cumprod"))
def q_sample(
    x_0: Float[Tensor, "b c h w"],
    t: Int[Tensor, "b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, "b c h w"]:
    """Noise each picture to its own timestep, in one go: a sample of q(x_t | x_0).

        q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I)                            (DDPM, eq. 4)

    `noise` is ε ~ N(0, I), to be used as it is; ᾱ_t is alphas_cumprod[t].
    """
    # BEGIN SOLUTION
    # x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    # END SOLUTION


@instead_of("predict_x0", sampling)
def _put_x0_in_samplers(f, real, x_t, eps, a_t):
    """They know ᾱ_t, but not t: it is looked up in the schedule of Stable Diffusion, which is that of our models."""
    table = NoiseSchedule.scaled_linear().alphas_cumprod
    t = (table - a_t).abs().argmin()
    table[t] = a_t  # if the schedule is another, at least this entry is right
    return f(x_t, t.to(x_t.device).expand(len(x_t)), eps, table.to(x_t.device)).to(x_t)


@exercise(
    linear=("x_t", "noise"),
    quantities=of_t,
    swap=lambda f: [*of_the_schedule("predict_start_from_noise")(f), *_put_x0_in_samplers(f)],
)
@cases(timed("x_t", "t", "noise", "alphas_cumprod"))
def predict_start_from_noise(
    x_t: Float[Tensor, "b c h w"],
    t: Int[Tensor, "b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, "b c h w"]:
    """The picture x_0 that x_t was made from, if `noise` is the noise in it: q_sample, solved for x_0. (DDPM, eq. 15)
    """
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()
    # END SOLUTION


@exercise(linear=("x_0", "noise"), quantities=of_t, swap=of_the_schedule("get_v"))
@cases(timed("x_0", "noise", "t", "alphas_cumprod"))
def get_v(
    x_0: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    t: Int[Tensor, "b"],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, "b c h w"]:
    """The velocity v, which some models predict in the place of the noise.

        v = √ᾱ_t ε - √(1-ᾱ_t) x_0                     (Salimans & Ho 2022, section 4)
    """
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0
    # END SOLUTION


@exercise(linear=("x_t", "v"), quantities=of_t, swap=of_the_schedule("predict_start_from_v"))
@cases(timed("x_t", "t", "v", "alphas_cumprod"))
def predict_start_from_v(
    x_t: Float[Tensor, "b c h w"], t: Int[Tensor, "b"], v: Float[Tensor, "b c h w"], alphas_cumprod: Float[Tensor, "T"]
) -> Float[Tensor, "b c h w"]:
    """The picture x_0 in x_t, from the velocity v = √ᾱ_t ε - √(1-ᾱ_t) x_0. (Salimans & Ho 2022, appendix D)"""
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v
    # END SOLUTION


@exercise(swap=lambda f: [(NoiseSchedule, "snr", lambda self, t: f(t, self.alphas_cumprod.to(t.device)).float())])
@case("three times", lambda: (torch.tensor([3, 8, 5]), alphas_cumprod_of(12)))
@case("all times", lambda: (torch.arange(10), alphas_cumprod_of(10)))
@case("Stable Diffusion's schedule", lambda: (torch.tensor([120, 900]), NoiseSchedule.scaled_linear().alphas_cumprod))
def snr(t: Int[Tensor, "b"], alphas_cumprod: Float[Tensor, "T"]) -> Float[Tensor, "b"]:
    """The signal-to-noise ratio at t: the variance that is left of the picture by the variance of the noise.

    (Kingma et al. 2021, "Variational Diffusion Models", eq. 2)
    """
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t]
    return alpha_bar / (1 - alpha_bar)
    # END SOLUTION


@exercise(
    linear=("x_0", "x_t"),
    quantities=of_t_and_betas,
    swap=lambda f: [*_put_mean(f), *_put_posterior_mean(f)],
)
@cases(timed("x_0", "x_t", "t", "betas", schedule="betas"))
def q_posterior_mean(
    x_0: Float[Tensor, "b c h w"], x_t: Float[Tensor, "b c h w"], t: Int[Tensor, "b"], betas: Float[Tensor, "T"]
) -> Float[Tensor, "b c h w"]:
    """The mean of q(x_{t-1} | x_t, x_0): one step back, for somebody who knows the picture.

        μ̃_t = √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0  +  √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t          (DDPM, eq. 7)

    with α_t = 1 - β_t, ᾱ_t the product of all α up to t, and ᾱ_{t-1} = 1 at t = 0.
    """
    # BEGIN SOLUTION
    bars = torch.cumprod(1 - betas, dim=0)
    bars_prev = torch.cat([bars.new_ones(1), bars[:-1]])
    beta, alpha_bar, alpha_bar_prev = (a[t].reshape(-1, 1, 1, 1) for a in (betas, bars, bars_prev))
    from_x_0 = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar) * x_0
    from_x_t = (1 - beta).sqrt() * (1 - alpha_bar_prev) / (1 - alpha_bar) * x_t
    return from_x_0 + from_x_t
    # END SOLUTION


@exercise(swap=lambda f: [*_put_variance(f), *_put_posterior_variance(f)])
@case("three times", lambda: (torch.tensor([3, 8, 5]), betas_of(12)))
@case("the first and the last timestep", lambda: (torch.tensor([0, 9]), betas_of(10)))
@case("all times", lambda: (torch.arange(7), betas_of(7)))
@case("Stable Diffusion's schedule", lambda: (torch.tensor([120, 900]), NoiseSchedule.scaled_linear().betas))
def q_posterior_variance(t: Int[Tensor, "b"], betas: Float[Tensor, "T"]) -> Float[Tensor, "b"]:
    """The variance of q(x_{t-1} | x_t, x_0), for each t.

        β̃_t = (1-ᾱ_{t-1}) / (1-ᾱ_t) β_t              (DDPM, eq. 7)

    with ᾱ_{t-1} = 1 at t = 0: the last step back leads to x_0 itself, without a doubt.
    """
    # BEGIN SOLUTION
    bars = torch.cumprod(1 - betas, dim=0)
    bars_prev = torch.cat([bars.new_ones(1), bars[:-1]])
    return (1 - bars_prev[t]) / (1 - bars[t]) * betas[t]
    # END SOLUTION


@instead_of("q_posterior", NoiseSchedule)
def _put_mean(f, real, self, x_0, x_t, t):
    _, variance, log_variance = real(self, x_0, x_t, t)
    return f(x_0, x_t, t, self.betas.to(t.device)).to(x_t), variance, log_variance


@instead_of("q_posterior", NoiseSchedule)
def _put_variance(f, real, self, x_0, x_t, t):
    mean, variance, _ = real(self, x_0, x_t, t)
    variance = f(t, self.betas.to(t.device)).to(x_t).reshape(variance.shape)
    return mean, variance, variance.clamp(min=1e-20).log()


def _longer(a_t: float, a_prev: float) -> Tensor:
    """The betas of a schedule of two steps, the second of which leads from ᾱ_prev to ᾱ_t."""
    return torch.tensor([1 - a_prev, 1 - a_t / a_prev], dtype=torch.float64)


@rule_of("ddpm")
def _put_posterior_mean(f, real, x_t, eps, a_t, a_prev, noise):
    t = torch.ones(len(x_t), dtype=torch.int64, device=x_t.device)
    mean = f(predict_x0(x_t, eps, a_t), x_t, t, _longer(a_t, a_prev).to(x_t))
    return mean + ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5 * noise


@rule_of("ddpm")
def _put_posterior_variance(f, real, x_t, eps, a_t, a_prev, noise):
    mean, _, _ = real(x_t, eps, a_t, a_prev, torch.zeros_like(x_t))
    t = torch.ones(len(x_t), dtype=torch.int64, device=x_t.device)
    return mean + f(t, _longer(a_t, a_prev).to(x_t)).to(x_t).reshape(-1, 1, 1, 1).sqrt() * noise


def points(t: list[int], n: int, d: int, T: int) -> tuple:
    return torch.randn(len(t), d), torch.tensor(t), torch.randn(n, d), alphas_cumprod_of(T)


@exercise(swap=lambda f: [*_put_exact_x0(f), *_put_exact_pair(f)])
@case("five pictures, three noisy ones", lambda: points([3, 8, 5], 5, 2, 12))
@case("two points, one noisy", lambda: points([4], 2, 2, 12))
@case("as many points as noisy ones", lambda: points([2, 6, 9, 4], 4, 3, 11))
def exact_x0(
    x: Float[Tensor, "b d"], t: Int[Tensor, "b"], data: Float[Tensor, "n d"], alphas_cumprod: Float[Tensor, "T"]
) -> Float[Tensor, "b d"]:
    """The best guess at the clean point in each noisy x, if the data are the n points x_i, each as likely as the next.

        w_i = softmax_i( -|x - √ᾱ_t x_i|² / (2 (1-ᾱ_t)) )       x̂_0 = Σ_i w_i x_i      (EDM, appendix B.3)
    """
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t][:, None, None]  # [b 1 1]
    squared = (x[:, None] - alpha_bar.sqrt() * data).square().sum(dim=-1)  # [b n]
    weights = torch.softmax(-squared / (2 * (1 - alpha_bar[..., 0])), dim=1)
    return weights @ data
    # END SOLUTION


@instead_of("x0", ExactDenoiser)
def _put_exact_x0(f, real, self, x, t):
    flat = x.reshape(len(x), -1).double()
    return f(flat, t, self.data, self.schedule.alphas_cumprod.double()).reshape(x.shape).to(x)


@instead_of("_x0", ExactDenoiser)
def _put_exact_pair(f, real, self, x, t):
    flattened = self._flatten(x, t)
    return f(flattened[0], t, self.data, self.schedule.alphas_cumprod.double()), flattened
