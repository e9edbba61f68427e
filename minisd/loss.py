"""The loss: from the variational bound to "guess the noise".

Take a picture, a time and some noise; mix them; ask the network for the noise; square the error:

    L_simple = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t, c)‖²          (Ho et al. 2020, arXiv:2006.11239, eq. 14)

That is all. The bound itself weights each t in its own way; dropping the weights draws better pictures. What the
network is asked for can be written in three ways that carry the same information: the noise ε (Stable Diffusion v1),
the clean picture x_0, or the velocity v = √ᾱ_t ε - √(1-ᾱ_t) x_0 (Salimans & Ho 2022, arXiv:2202.00512).

CompVis `ddpm.py: DDPM.p_losses, LatentDiffusion.p_losses`.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .noising import NoiseSchedule

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # model(x, t, context) -> its prediction, of the shape of x


def epsilon_loss(
    model: Model,
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "b *d"],
    context: Float[Tensor, "b n e"] | None = None,
    t: Int[Tensor, "b"] | None = None,
    noise: Float[Tensor, "b *d"] | None = None,
    min_snr_gamma: float | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, "*b"]:
    """Mean squared error of the predicted noise: Stable Diffusion's loss.

    Args:
        model: called as model(x_t, t, context); predicts the noise.
        x_0: clean data of about unit variance.
        context: what the prompts became; None for a model without.
        t: a time for each sample; drawn evenly from {0, …, T-1} where it is left out.
        noise: drawn from N(0, I) where it is left out.
        min_snr_gamma: weight each sample by min(SNR, γ)/SNR, so that the easy, nearly clean times do not drown the
            others; 5 is usual. None: every time counts the same. Hang et al. 2023 (arXiv:2303.09556).
        reduction: "mean" over the batch, a scalar; "none" leaves a loss for each sample [b].
    """
    return _loss(model, schedule, x_0, context, t, noise, "eps", min_snr_gamma, reduction)


def v_loss(
    model, schedule, x_0, context=None, t=None, noise=None, min_snr_gamma=None, reduction="mean"
) -> Float[Tensor, "*b"]:
    """The same for a model that predicts the velocity v = √ᾱ_t ε - √(1-ᾱ_t) x_0. Arguments as in `epsilon_loss`."""
    return _loss(model, schedule, x_0, context, t, noise, "v", min_snr_gamma, reduction)


def x0_loss(
    model, schedule, x_0, context=None, t=None, noise=None, min_snr_gamma=None, reduction="mean"
) -> Float[Tensor, "*b"]:
    """The same for a model that predicts the clean x_0. Arguments as in `epsilon_loss`."""
    return _loss(model, schedule, x_0, context, t, noise, "x0", min_snr_gamma, reduction)


def _loss(model, schedule, x_0, context, t, noise, parameterization, min_snr_gamma, reduction) -> Tensor:
    if t is None:
        t = torch.randint(0, schedule.timesteps, (len(x_0),), device=x_0.device)
    if noise is None:
        noise = torch.randn_like(x_0)
    # x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε
    x_t = schedule.q_sample(x_0, t, noise)
    prediction = model(x_t, t, context)
    loss = squared_error(prediction, loss_target(parameterization, schedule, x_0, noise, t), "none")
    if min_snr_gamma is not None:
        loss = loss * min_snr_weight(schedule.snr(t), min_snr_gamma, parameterization).to(loss)
    return loss.mean() if reduction == "mean" else loss


def loss_target(
    parameterization: str,
    schedule: NoiseSchedule,
    x_0: Float[Tensor, "b *d"],
    noise: Float[Tensor, "b *d"],
    t: Int[Tensor, "b"],
) -> Float[Tensor, "b *d"]:
    """What the network should have said about x_t: "eps" the noise in it, "x0" the picture, "v" the velocity."""
    if parameterization == "v":
        return schedule.get_v(x_0, noise, t)
    return {"eps": noise, "x0": x_0}[parameterization]


def squared_error(
    prediction: Tensor, target: Float[Tensor, "b *d"], reduction: Literal["mean", "none"] = "mean"
) -> Float[Tensor, "*b"]:
    """‖target - prediction‖², a mean over all numbers of a sample, in float32 whatever the model computes in.

    reduction: "mean" over the batch too, a scalar; "none" leaves an error for each sample [b].
    """
    if prediction.shape != target.shape:
        # Broadcasting would accept many wrong shapes in silence, and the network would learn a grey mean.
        raise ValueError(f"the model returned {tuple(prediction.shape)} for a target of {tuple(target.shape)}")
    loss = (target.float() - prediction.float()).square().reshape(len(target), -1).mean(dim=1)
    return loss.mean() if reduction == "mean" else loss


def min_snr_weight(snr: Float[Tensor, "b"], gamma: float = 5.0, parameterization: str = "eps") -> Float[Tensor, "b"]:
    """min(SNR, γ) as a weight of the x_0 error, translated to what the model predicts (Hang et al. 2023, section 3.4).

    An error of ε is an error of x_0 times √SNR, one of v times √(SNR + 1): hence the divisors.
    """
    divisor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[parameterization]
    return snr.clamp(max=gamma) / divisor


def text_dropout(
    context: Float[Tensor, "b n e"], empty_context: Float[Tensor, "1 n e"], drop: Bool[Tensor, "b"]
) -> Float[Tensor, "b n e"]:
    """Swap in the context of the empty prompt where `drop` is set: the model learns to draw without a prompt, too.

    Classifier-free guidance needs both answers of one network (Ho & Salimans 2022, arXiv:2207.12598, algorithm 1).
    Stable Diffusion v1.3 on dropped 10% of the captions; its public code has no trace of it.
    """
    return torch.where(drop[:, None, None], empty_context, context)


LOSSES = {"eps": epsilon_loss, "v": v_loss, "x0": x0_loss}  # by what the model predicts
