"""Exercises of stage 2: from "which noise is in it?" to a number that can be trained on."""

from collections.abc import Callable

import torch
import torch.nn.functional as F  # noqa: F401  for mistakes that name it
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from minisd import loss
from minisd.latent_diffusion import LatentDiffusion
from minisd.noising import NoiseSchedule
from minisd.training import unet as training_unet

from .exercise import case, exercise
from .noising import alphas_cumprod_of, of_t, pictures, points
from .places import context_of, function, instead_of


class ToyUNet(nn.Module):
    """A model with weights to learn, which hears x, t and context."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return torch.tanh(self.conv(x)) + 0.1 * t.view(-1, 1, 1, 1) + context.mean(dim=(1, 2)).view(-1, 1, 1, 1)


def _loss_case(t: list[int], T: int, h: int = 4, w: int = 5) -> tuple:
    b = len(t)
    given = ToyUNet(), pictures(b, h, w), torch.randn(b, 3, 6)
    return *given, torch.tensor(t), pictures(b, h, w), alphas_cumprod_of(T)


@instead_of("_loss", loss)
def _put_loss(f, real, model, schedule, x_0, cond, t, noise, parameterization, min_snr_gamma, reduction):
    """The function returns the mean over a batch. Where the loss of each sample is wanted, it is called for each."""
    if parameterization != "eps" or min_snr_gamma is not None:
        return real(model, schedule, x_0, cond, t, noise, parameterization, min_snr_gamma, reduction)
    t = torch.randint(schedule.timesteps, (len(x_0),), device=x_0.device) if t is None else t
    noise = torch.randn_like(x_0) if noise is None else noise

    def mean_over(samples: slice) -> Tensor:
        context, told = context_of(model, cond, samples)
        bars = schedule.alphas_cumprod.to(x_0.device)
        return f(told, x_0[samples], context, t[samples], noise[samples], bars)

    if reduction == "mean":
        return mean_over(slice(None))
    return torch.stack([mean_over(slice(k, k + 1)) for k in range(len(x_0))])


def _put_epsilon_loss(f):
    def p_losses(self, x_start, cond, t, noise=None, reduction="mean"):
        kind = self.config.parameterization
        return loss._loss(self.apply_model, self.schedule, x_start, cond, t, noise, kind, None, reduction)

    return [*_put_loss(f), (LatentDiffusion, "p_losses", p_losses)]


@exercise(gradients=("model",), swap=_put_epsilon_loss)
@case("three pictures", lambda: _loss_case([3, 8, 5], 12))
@case("one picture", lambda: _loss_case([6], 12, 3, 4))
@case("square pictures", lambda: _loss_case([1, 9], 10, 3, 3))
@case("as many pictures as columns", lambda: _loss_case([2, 7, 9, 4], 12, 3, 4))
def epsilon_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_0: Float[Tensor, "b c h w"],
    context: Float[Tensor, "b n d"],
    t: Int[Tensor, "b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, ""]:
    """The training loss of Stable Diffusion: the mean squared error of the predicted noise.

        L_simple = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t, c)‖²              (DDPM, eq. 14)

    model(x_t, t, context) predicts the noise. Returns one number, the mean over everything, from which gradients flow
    back to the model.
    """
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    x_t = alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise
    prediction = model(x_t, t, context)
    return (noise - prediction).square().mean()
    # END SOLUTION


def _dropout_case(drop: list[bool], n: int, d: int) -> tuple:
    return torch.randn(len(drop), n, d), torch.randn(1, n, d), torch.tensor(drop)


@exercise(swap=function("text_dropout", loss, training_unet))
@case("three captions, one dropped", lambda: _dropout_case([False, True, False], 5, 6))
@case("one caption, kept", lambda: _dropout_case([False], 4, 6))
@case("as many captions as tokens", lambda: _dropout_case([True, False, False, True], 4, 4))
@case("all dropped", lambda: _dropout_case([True, True], 3, 5))
def text_dropout(
    context: Float[Tensor, "b n d"], empty_context: Float[Tensor, "1 n d"], drop: Bool[Tensor, "b"]
) -> Float[Tensor, "b n d"]:
    """Forget some captions: where `drop` is set, the context of the empty prompt takes the place of the caption's.

    The network so learns to draw without a prompt, too, as guidance needs. (Ho & Salimans 2022, algorithm 1)
    """
    # BEGIN SOLUTION
    return torch.where(drop[:, None, None], empty_context, context)
    # END SOLUTION


@instead_of("min_snr_weight", loss, training_unet)
def _put_min_snr(f, real, snr, gamma=5.0, parameterization="eps"):
    return f(snr, gamma) if parameterization == "eps" else real(snr, gamma, parameterization)


@exercise(swap=_put_min_snr)
@case("gamma 5", lambda: (torch.tensor([1000.0, 20.0, 5.0, 1.0, 0.01]), 5.0))
@case("gamma 1", lambda: (torch.tensor([3.0, 0.5, 7.0, 0.2]), 1.0))
@case("one time", lambda: (torch.tensor([40.0]), 2.0))
def min_snr_weight(snr: Float[Tensor, "b"], gamma: float) -> Float[Tensor, "b"]:
    """How much each sample's squared error of ε counts: min(SNR, γ) / SNR.

    Nearly clean pictures, where SNR is large, are easy, and would drown the others. (Hang et al. 2023, section 3.4)
    """
    # BEGIN SOLUTION
    return snr.clamp(max=gamma) / snr
    # END SOLUTION


@instead_of("predict_noise_from_v", NoiseSchedule)
def _put_noise_from_v(f, real, self, x_t, t, v):
    bars = self.alphas_cumprod.to(x_t.device)
    return f(x_t.flatten(1), t, v.flatten(1), bars).to(x_t).view_as(x_t)


@exercise(linear=("x_t", "v"), quantities=of_t, swap=_put_noise_from_v)
@case("three points", lambda: points([3, 8, 5], 3, 6, 12))
@case("one point", lambda: points([6], 1, 4, 12))
@case("as many points as coordinates", lambda: points([1, 9, 4, 6], 4, 4, 11))
def predict_noise_from_v(
    x_t: Float[Tensor, "b d"], t: Int[Tensor, "b"], v: Float[Tensor, "b d"], alphas_cumprod: Float[Tensor, "T"]
) -> Float[Tensor, "b d"]:
    """The noise in x_t, from the velocity v: samplers ask for ε, even of a model that predicts v.

    v = √ᾱ_t ε - √(1-ᾱ_t) x_0. Here x_t holds points, such as those of a 2-D toy. (Salimans & Ho 2022, appendix D)
    """
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t][:, None]
    return (1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v
    # END SOLUTION


@exercise(
    swap="minisd has no place for it: a training needs the mean over all times, and this is to look at a model with.",
)
@case("eight losses of four bins", lambda: (torch.rand(8), torch.tensor([0, 3, 5, 11, 7, 8, 2, 10]), 12, 4))
@case("all bins hit", lambda: (torch.rand(6), torch.tensor([0, 9, 4, 5, 1, 6]), 10, 2))
@case("one bin", lambda: (torch.rand(5), torch.tensor([0, 3, 7, 1, 2]), 8, 1))
@case("nearly all early, none at the ends", lambda: (torch.rand(9), torch.tensor([2, 1, 3, 1, 2, 1, 5, 7, 8]), 12, 3))
@case("bins that T does not divide", lambda: (torch.rand(7), torch.tensor([6, 0, 3, 4, 5, 2, 1]), 7, 2))
def loss_by_time(losses: Float[Tensor, "n"], t: Int[Tensor, "n"], T: int, bins: int) -> Float[Tensor, "bins"]:
    """The mean loss in each of `bins` equally long stretches of time: where is the model good, and where not?

    losses: one number a sample, at its timestep t in 0 ... T-1. Bin 0 holds the smallest t. No bin is empty. One looks
    at it because the mean over all times hides that nearly clean pictures are hard and nearly pure noise is easy.
    """
    # BEGIN SOLUTION
    place = t * bins // T
    sums = torch.bincount(place, weights=losses, minlength=bins)
    counts = torch.bincount(place, minlength=bins)
    return sums / counts
    # END SOLUTION
