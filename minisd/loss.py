"""Stage 2: the loss. From the variational bound to "predict the noise".

Take a picture, a timestep and some noise. Mix them, let the network predict the noise, and square its error:

    L_simple = E ‖ε - ε_θ(√ᾱ_t x_0 + √(1-ᾱ_t) ε, t, c)‖²                                           (DDPM, eq. 14)

That is the whole training objective of Stable Diffusion v1. It is derived from the variational bound, which is the same
sum with a weight for each t (DDPM, eq. 12). Without these weights, the very noisy timesteps count more than in the
bound, and the nearly clean ones less. DDPM found that the pictures become better.

A network can predict the noise ε, the clean picture x_0, or the velocity v = √ᾱ_t ε - √(1-ᾱ_t) x_0. They carry the same
information, because given x_t, each can be computed from either of the others. The comments cite:

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
        min_snr_gamma: γ of the min-SNR weights, which keep the timesteps with little noise from dominating the
            gradient; 5 is usual. None: every timestep has the weight 1.
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
    # Each sample gets its own timestep, so one training step sees many levels of noise. The bound is a sum over a
    # thousand timesteps. A term drawn uniformly is an unbiased estimate of their mean (DDPM, algorithm 1).
    if t is None:
        t = torch.randint(0, schedule.timesteps, (len(x_0),), device=x_0.device)
    if noise is None:
        noise = torch.randn_like(x_0)
    # x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, directly: the timesteps before t do not have to be computed           (DDPM, eq. 4)
    x_t = schedule.q_sample(x_0, t, noise)
    # The network sees x_t, the timestep and the context, and predicts ε (or x_0 or v): [b *d] -> [b *d].
    prediction = model(x_t, t, context)
    # The mean squared error of each sample, [b].
    loss = squared_error(prediction, loss_target(parameterization, schedule, x_0, noise, t), reduction="none")
    # A squared error in ε is SNR times the squared error in x_0, and the SNR is above 1000 at the first timesteps. So
    # the timesteps with little noise would dominate the gradient. This factor limits their weight (min-SNR, sec. 3.4).
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
    """The correct prediction for x_t: the noise for "eps", the clean picture for "x0", the velocity for "v"."""
    if parameterization == "v":
        return schedule.get_v(x_0, noise, t)
    return {"eps": noise, "x0": x_0}[parameterization]


def squared_error(
    prediction: Tensor, target: Float[Tensor, "b *d"], reduction: Literal["mean", "none"] = "mean"
) -> Float[Tensor, "*b"]:
    """The mean squared error, over all numbers of a sample.

    reduction: "mean" over the batch too, a scalar; "none" for the error of each sample, [b].
    """
    if prediction.shape != target.shape:
        # PyTorch might broadcast one to the shape of the other without a warning, and the model would learn an average.
        raise ValueError(
            f"the model returned {tuple(prediction.shape)} for a target of {tuple(target.shape)}: it must return a "
            "prediction in the shape of its input"
        )
    # [b *d] -> [b]. Prediction and target are nearly equal, so their difference is computed in float32, even if the
    # model computes in bfloat16.
    loss = (target.float() - prediction.float()).square().reshape(len(target), -1).mean(dim=1)
    return loss.mean() if reduction == "mean" else loss


def min_snr_weight(snr: Float[Tensor, "b"], gamma: float = 5.0, parameterization: str = "eps") -> Float[Tensor, "b"]:
    """The weight min(SNR, γ) for a squared error in x_0, converted to what the model predicts (min-SNR, section 3.4).

    Args:
        snr: [b], the signal-to-noise ratios ᾱ_t / (1-ᾱ_t).
        gamma: the largest weight of a squared error in x_0.
        parameterization: "eps", "v" or "x0": what the model predicts.

    Returns [b].
    """
    # x_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t, so an error in ε is √SNR times the error in x_0 that it causes. For v, the factor
    # is √(SNR + 1). The errors are squared, so the weights are divided by SNR and by SNR + 1.
    divisor = {"eps": snr, "v": snr + 1, "x0": torch.ones_like(snr)}[parameterization]
    return snr.clamp(max=gamma) / divisor


def text_dropout(
    context: Float[Tensor, "b n e"], empty_context: Float[Tensor, "1 n e"], drop: Bool[Tensor, "b"]
) -> Float[Tensor, "b n e"]:
    """Replace the context by that of the empty prompt where `drop` is True (CFG, algorithm 1).

    Classifier-free guidance needs two predictions of the same network, with the prompt and without it, so the network
    has to learn both. According to their model cards, the checkpoints from Stable Diffusion v1.3 on were trained with
    10% of the captions dropped. CompVis's public code does not show how.
    """
    # [b] -> [b 1 1]: one decision for each picture, which holds for all of its tokens.
    return torch.where(drop[:, None, None], empty_context, context)
