"""Stage 2: the loss. From the variational bound to "guess the noise".

Take a picture, a timestep and some noise. Mix them, ask the network for the noise, and square its error:

    L_simple = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t, c)‖²                                           (DDPM, eq. 14)

That is the whole training objective of Stable Diffusion v1. The variational bound, from which it is derived, is the
same sum with another weight for each t (DDPM, eq. 12). Leaving the weights out counts the very noisy timesteps more and
the nearly clean ones less, and the pictures become better.

A network can be asked for three things that carry the same information, because each follows from another and x_t:
the noise ε, the clean picture x_0, or the velocity v = √ᾱ_t ε - √(1-ᾱ_t) x_0. The comments cite:

    DDPM           Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239)
    v-prediction   Salimans & Ho, "Progressive Distillation for Fast Sampling …", 2022 (arXiv:2202.00512)
    min-SNR        Hang et al., "Efficient Diffusion Training via Min-SNR Weighting Strategy", 2023 (arXiv:2303.09556)
    CFG            Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022 (arXiv:2207.12598)

(CompVis: ldm/models/diffusion/ddpm.py, DDPM.p_losses and LatentDiffusion.p_losses)
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .noising import NoiseSchedule

Model = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # model(x, t, context) -> a prediction, shaped like x


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
    """Mean squared error of the predicted noise: Stable Diffusion v1's loss (DDPM, eq. 14).

    Args:
        model: called as model(x_t, t, context); predicts the noise.
        schedule: how much noise there is at each timestep.
        x_0: [b *d], clean data of about unit variance.
        context: [b n e], the output of the text encoder; None for a model that takes none.
        t: [b], a timestep for each sample. Left out, it is drawn uniformly from {0, …, T-1}.
        noise: [b *d]. Left out, it is drawn from N(0, I).
        min_snr_gamma: γ of the min-SNR weights, which keep the many easy, nearly clean timesteps from dominating; 5 is
            usual. None: every timestep counts the same.
        reduction: "mean" over the batch, a scalar; "none" for the loss of each sample, [b].

    Raises:
        ValueError: the model's prediction has another shape than its target.
    """
    return _loss(model, schedule, x_0, context, t, noise, "eps", min_snr_gamma, reduction)


def v_loss(
    model, schedule, x_0, context=None, t=None, noise=None, min_snr_gamma=None, reduction="mean"
) -> Float[Tensor, "*b"]:
    """The same for a model that predicts the velocity v = √ᾱ_t ε - √(1-ᾱ_t) x_0 (v-prediction, section 4).

    The arguments are those of `epsilon_loss`.
    """
    return _loss(model, schedule, x_0, context, t, noise, "v", min_snr_gamma, reduction)


def x0_loss(
    model, schedule, x_0, context=None, t=None, noise=None, min_snr_gamma=None, reduction="mean"
) -> Float[Tensor, "*b"]:
    """The same for a model that predicts the clean x_0. The arguments are those of `epsilon_loss`."""
    return _loss(model, schedule, x_0, context, t, noise, "x0", min_snr_gamma, reduction)


LOSSES = {"eps": epsilon_loss, "v": v_loss, "x0": x0_loss}  # by what the model predicts


def _loss(model, schedule, x_0, context, t, noise, parameterization, min_snr_gamma, reduction) -> Tensor:
    # Each sample has a timestep of its own, so one step of training sees many amounts of noise. The sum over t in the
    # bound has a thousand terms; drawing one of them gives it in the mean (DDPM, algorithm 1).
    if t is None:
        t = torch.randint(0, schedule.timesteps, (len(x_0),), device=x_0.device)
    if noise is None:
        noise = torch.randn_like(x_0)
    # x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, in one go: no need to walk through the timesteps before t            (DDPM, eq. 4)
    x_t = schedule.q_sample(x_0, t, noise)
    prediction = model(x_t, t, context)
    loss = squared_error(prediction, loss_target(parameterization, schedule, x_0, noise, t), reduction="none")
    # The nearly clean timesteps are easy and many. Smaller weights keep them from taking most of the gradient.
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
    """What the network should have answered about x_t: "eps" the noise in it, "x0" the picture, "v" the velocity."""
    if parameterization == "v":
        return schedule.get_v(x_0, noise, t)
    return {"eps": noise, "x0": x_0}[parameterization]


def squared_error(
    prediction: Tensor, target: Float[Tensor, "b *d"], reduction: Literal["mean", "none"] = "mean"
) -> Float[Tensor, "*b"]:
    """‖target - prediction‖², as a mean over all numbers of a sample.

    reduction: "mean" over the batch too, a scalar; "none" for the error of each sample, [b].
    """
    if prediction.shape != target.shape:
        # PyTorch would broadcast one to the other without a word, and the model would learn a grey mean.
        raise ValueError(
            f"the model returned {tuple(prediction.shape)} for a target of {tuple(target.shape)}: it must return a "
            "prediction in the shape of its input"
        )
    # [b *d] -> [b]. The difference of two numbers that are nearly equal is taken in float32, even if the model
    # computed them in bfloat16.
    loss = (target.float() - prediction.float()).square().reshape(len(target), -1).mean(dim=1)
    return loss.mean() if reduction == "mean" else loss


def min_snr_weight(snr: Float[Tensor, "b"], gamma: float = 5.0, parameterization: str = "eps") -> Float[Tensor, "b"]:
    """The weight min(SNR, γ) of a squared error in x_0, converted to what the model predicts (min-SNR, section 3.4).

    Args:
        snr: [b], the signal-to-noise ratios ᾱ_t / (1-ᾱ_t).
        gamma: the largest weight of an error in x_0.
        parameterization: "eps", "v" or "x0": what the model predicts.

    Returns [b].
    """
    # With ε, x_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t: an error of the noise is √SNR times the error of x_0 that comes with it.
    # With v, it is √(SNR + 1) times. The errors are squared, so the weights are divided by SNR and by SNR + 1.
    divisor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[parameterization]
    return snr.clamp(max=gamma) / divisor


def text_dropout(
    context: Float[Tensor, "b n e"], empty_context: Float[Tensor, "1 n e"], drop: Bool[Tensor, "b"]
) -> Float[Tensor, "b n e"]:
    """Replace the context by that of the empty prompt wherever `drop` is True (CFG, algorithm 1).

    Classifier-free guidance compares what one network predicts with the prompt and without it, so the network has to
    learn both. The checkpoints from Stable Diffusion v1.3 on were trained with 10% of the captions dropped, by their
    model cards; CompVis' public code does not show how.
    """
    # [b] -> [b 1 1]: one decision for each picture, for all of its tokens.
    return torch.where(drop[:, None, None], empty_context, context)
