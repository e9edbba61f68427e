"""Stage 6: from noise back to a picture. Each sampler is a generator of steps.

    for step in ddim(eps_model, x_T, schedule, steps=50):
        step.x_t, step.eps, step.x0, step.x  # what went in, its noise, the picture behind it, what came out
    picture = step.x

The trained model answers one question only: which noise is in x_t? The samplers differ in what they do next.

    ddpm              one small random step for each timestep of the training: the forward process, reversed
    ddim              the same without the randomness, which makes long steps possible
    plms              ddim's step in a better direction: a polynomial through the last four ε
    dpmpp_2m          a line through the last two x_0, in the variable in which the equation is nearly linear
    euler             a straight line along ε, in the variable in which ε is the slope: ddim, seen from there
    euler_ancestral   the same line, drawn too far, and fresh noise on top: ddpm, seen from there
    heun              the same line, along the mean of the slopes at both of its ends: two calls a step

The contract. eps_model(x, t) takes x [b *d] and t int64 [b], and returns ε [b *d] or `Guided`. x_T is drawn
from N(0, I), and each x has the variance of the forward process (none is divided by √ᾱ), so that all
trajectories share their axes. Exactly `steps` steps come out; the last `.x` is the result. All samplers take:

    spacing       which timesteps are visited: see `make_timesteps`
    timesteps     the timesteps themselves, falling, instead of `steps`; they may start further down (img2img)
    before_step   (x, t) -> x, with t an int, before each step and not after the last: what is known of the
                  picture can be blended into x (inpainting)
    generator     a torch.Generator of the CPU, or one for each picture, for the samplers that draw noise

A bad argument raises ValueError; NaN or infinity from the model raises FloatingPointError. As always with
generators, nothing happens before the first step is asked for. The papers that the comments cite:

    DDPM            Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020
    Improved DDPM   Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021
    DDIM            Song, Meng & Ermon, "Denoising Diffusion Implicit Models", 2021
    CFG             Ho & Salimans, "Classifier-Free Diffusion Guidance", 2022
    PNDM            Liu et al., "Pseudo Numerical Methods for Diffusion Models on Manifolds", 2022
    DPM-Solver++    Lu et al., "DPM-Solver++: Fast Solver for Guided Sampling of Diffusion Models", 2022
    SDE             Song et al., "Score-Based Generative Modeling through Stochastic Differential Equations", 2021
    EDM             Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022
    SDEdit          Meng et al., "Guided Image Synthesis and Editing with Stochastic Differential Equations", 2022
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import expm1, inf, isfinite, log, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minisd.noising import NoiseSchedule


class Guided(NamedTuple):
    """What a guided eps_model returns: the ε to go by, and the two that it was made from. Each [b *d]."""

    eps: Float[Tensor, "b *d"]
    cond: Float[Tensor, "b *d"] | None = None
    uncond: Float[Tensor, "b *d"] | None = None


EpsModel = Callable[[Float[Tensor, "b *d"], Int[Tensor, "b"]], Float[Tensor, "b *d"] | Guided]
Context = Tensor | Mapping[str, Tensor]  # [b n d], or such tensors by name: see classifier_free_guidance
BeforeStep = Callable[[Float[Tensor, "b *d"], int], Float[Tensor, "b *d"]]
Timesteps = Sequence[int] | Int[Tensor, "steps"]
Generators = torch.Generator | Sequence[torch.Generator]


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a sampler, from timestep t down to the next."""

    i: int  # 0, 1, ... steps-1
    t: int  # the timestep of x_t
    x_t: Float[Tensor, "b *d"]  # what went in, after before_step
    eps: Float[Tensor, "b *d"]  # the noise that was taken out of it (plms, heun: combined from several calls)
    x0: Float[Tensor, "b *d"]  # the picture that remains without that noise: at first a blur
    x: Float[Tensor, "b *d"]  # what came out: x_t of the next step, or the result
    eps_cond: Float[Tensor, "b *d"] | None = None  # under guidance, the noise as seen with the prompt ...
    eps_uncond: Float[Tensor, "b *d"] | None = None  # ... and without it


def classifier_free_guidance(
    model: Callable[[Tensor, Tensor, Context], Tensor],
    context: Context,
    uncond_context: Context,
    scale: float,
) -> EpsModel:
    """Make an eps_model(x, t) of model(x, t, context), exaggerating what the context changes (CFG, eq. 6).

    context: the prompts, [b n d]; uncond_context: the empty prompt, or a negative one, [b n d] or [1 n d]. Or both a
    mapping of such tensors, {"c_crossattn": context, "c_concat": a map}, as `LatentDiffusion.apply_model` takes it.
    scale: 7.5 is Stable Diffusion's default. 1.0 is the plain conditional model: then the other half is not
    computed, and ε is returned alone. The paper's weight w counts from 0, scale = 1 + w.
    (CompVis: ldm/models/diffusion/ddim.py, DDIMSampler.p_sample_ddim, unconditional_guidance_scale)
    """

    def eps_model(x: Float[Tensor, "b *d"], t: Int[Tensor, "b"]) -> Float[Tensor, "b *d"] | Guided:
        if scale == 1.0:
            return model(x, t, _batched([context], len(x)))
        # One call for both, in this order: [unconditional, conditional].
        contexts = _batched([uncond_context, context], len(x))  # [2b n d]
        eps_uncond, eps_cond = model(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
        # ε = ε(x_t) + s (ε(x_t, c) - ε(x_t))
        return Guided(eps_uncond + scale * (eps_cond - eps_uncond), eps_cond, eps_uncond)

    return eps_model


def _batched(contexts: list[Context], count: int) -> Context:
    """One after the other, each for `count` pictures; of a mapping, each of its parts."""
    if isinstance(contexts[0], Mapping):
        return {name: _batched([context[name] for context in contexts], count) for name in contexts[0]}
    return torch.cat([context.expand(count, *context.shape[1:]) for context in contexts])


def make_timesteps(steps: int, T: int, spacing: str = "leading") -> list[int]:
    """Choose `steps` of the T timesteps, evenly spread and falling. For 50 of 1000:

        "leading"    981 961 ... 21 1     CompVis; leaves out 999, although x_T is what one would find there
        "linspace"   999 979 ... 20 0     Improved DDPM; both ends
        "trailing"   999 979 ... 39 19    from the very end, and with a last step as long as the others

    Two libraries that draw different pictures from one x_T often differ here, or in where the last step leads
    (`set_alpha_to_one`). Raises ValueError if steps is not in [1, T] or the spacing is none of these.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie between 1 and {T}, the schedule's timesteps, but it is {steps}.")
    if spacing == "leading":
        # CompVis takes every (T // steps)-th and adds 1: asked for 30 steps it makes 31, for 1000 it goes up
        # to t = 1000. Here one gets what one asked for; it is the same wherever steps divides T.
        rising = [i * T // steps + (1 if steps < T else 0) for i in range(steps)]
    elif spacing == "linspace":
        rising = [round(i * (T - 1) / (steps - 1)) for i in range(steps)] if steps > 1 else [T - 1]
    elif spacing == "trailing":
        rising = [round((i + 1) * T / steps) - 1 for i in range(steps)]
    else:
        raise ValueError(f'spacing must be "leading", "linspace" or "trailing", but it is "{spacing}".')
    return rising[::-1]


def remaining_timesteps(timesteps: list[int], strength: float) -> list[int]:
    """Those that are left if one starts from a picture: the last int(strength · steps) of them (SDEdit).

    Raises ValueError if strength is not in (0, 1], or so small that no step is left. (CompVis: scripts/img2img.py)
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, but it is {strength}")
    steps = len(timesteps)
    left = int(strength * steps)
    if left == 0:
        raise ValueError(f"at strength {strength}, none of {steps} steps is made: raise one of them")
    return timesteps[-left:]


def randn(shape: Sequence[int], generator: Generators | None = None) -> Float[Tensor, "b *d"]:
    """Draw N(0, I) in float32 on the CPU, so that one seed means one noise, whatever the device.

    With a generator for each picture, picture k of a batch gets the very noise that it would get alone.
    """
    if not isinstance(generator, Sequence):
        return torch.randn(tuple(shape), generator=generator, device="cpu")
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators cannot draw noise for a batch of {shape[0]} pictures.")
    return torch.stack([torch.randn(tuple(shape[1:]), generator=g, device="cpu") for g in generator])


# -- what the samplers have in common -----------------------------------------------------------------------


def _path(
    schedule: NoiseSchedule, steps: int, spacing: str, timesteps: Timesteps | None, a_end: float
) -> list[tuple[int, int, float, float]]:
    """For each step: its number i, its t, ᾱ_t, and ᾱ_prev, where it leads to (the last one: to a_end).

    All of them are Python numbers, ᾱ in float64: to read them off a GPU, the CPU would have to wait for it.
    """
    if timesteps is None:
        timesteps = make_timesteps(steps, schedule.timesteps, spacing)
    timesteps = [int(t) for t in timesteps]
    if not timesteps or any(t <= t_next for t, t_next in zip(timesteps, timesteps[1:], strict=False)):
        raise ValueError(f"timesteps must be one or more falling numbers, but they are {timesteps}.")
    alphas = [schedule.alpha_bar(t) for t in timesteps]
    return list(zip(range(len(timesteps)), timesteps, alphas, [*alphas[1:], a_end], strict=True))


@torch.no_grad()  # here, since a `with` around a yield would switch gradients off in the caller's loop, too
def _predict(eps_model: EpsModel, x_t: Float[Tensor, "b *d"], i: int, t: int) -> Guided:
    """Ask the model for the noise in x_t, and make sure that the answer can be used."""
    answer = eps_model(x_t, torch.full((len(x_t),), t, device=x_t.device))
    guided = answer if isinstance(answer, Guided) else Guided(answer)
    if guided.eps.shape != x_t.shape:
        shapes = f"{list(x_t.shape)}, not {list(guided.eps.shape)}"
        raise ValueError(f"eps_model must return an ε with the shape of x, {shapes}.")
    # The largest |ε| is NaN if any ε is. (On a CPU, this takes a seventh of the time of .isfinite().all().)
    # Here, once a call, and nowhere else, the CPU waits for a GPU.
    if not isfinite(guided.eps.abs().amax()):
        raise FloatingPointError(f"The model returned NaN or infinity at step {i}, t = {t}.")
    return guided


def _check_eta(eta: float) -> None:
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 (no fresh noise) and 1 (as in ddpm), but it is {eta}.")


def _refuse_eta(sampler: str, eta: float) -> None:
    if eta != 0:
        raise ValueError(
            f"{sampler} draws no noise, so eta must be 0, but it is {eta}; ddim and euler_ancestral take an eta."
        )


# -- the samplers -------------------------------------------------------------------------------------------


def ddpm(
    eps_model: EpsModel,
    x_T: Float[Tensor, "b *d"],
    schedule: NoiseSchedule,
    steps: int | None = None,
    *,
    clip_denoised: bool = False,
    spacing: str = "linspace",
    timesteps: Timesteps | None = None,
    before_step: BeforeStep | None = None,
    generator: Generators | None = None,
) -> Iterator[Step]:
    """Ancestral sampling (DDPM, Algorithm 2): guess x_0, then draw the step back that q would make from it.

    steps: all T if left out. Fewer are DDPM on a schedule of fewer, longer steps (Improved DDPM, section 4).
    clip_denoised: clamp the guess to [-1, 1]; True suits pixels, False latents, which know no such bound.
    (CompVis: ldm/models/diffusion/ddpm.py, DDPM.p_sample_loop)
    """
    x = x_T
    steps = schedule.timesteps if steps is None else steps
    for i, t, a_t, a_prev in _path(schedule, steps, spacing, timesteps, a_end=1.0):
        x_t = before_step(x, t) if before_step else x
        eps, eps_cond, eps_uncond = _predict(eps_model, x_t, i, t)
        # x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t                                                     (DDPM, eq. 15)
        x0 = (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t)
        if clip_denoised:
            x0 = x0.clamp(-1, 1)
        # β_t = 1 - ᾱ_t / ᾱ_prev: the schedule's own, if no timestep is left out     (Improved DDPM, eq. 19)
        beta = 1 - a_t / a_prev
        # μ̃_t = √ᾱ_prev β_t / (1-ᾱ_t) x̂_0  +  √α_t (1-ᾱ_prev) / (1-ᾱ_t) x_t                   (DDPM, eq. 7)
        mean = sqrt(a_prev) * beta / (1 - a_t) * x0 + sqrt(1 - beta) * (1 - a_prev) / (1 - a_t) * x_t
        # β̃_t = (1-ᾱ_prev) / (1-ᾱ_t) β_t
        variance = (1 - a_prev) / (1 - a_t) * beta
        # x_prev = μ̃_t + √β̃_t z, with z ~ N(0, I); the last step leads to ᾱ = 1, where β̃ is 0
        x = mean
        if variance > 0:
            x = mean + sqrt(variance) * randn(x.shape, generator).to(x, non_blocking=True)
        yield Step(i, t, x_t, eps, x0, x, eps_cond, eps_uncond)


def ddim(
    eps_model: EpsModel,
    x_T: Float[Tensor, "b *d"],
    schedule: NoiseSchedule,
    steps: int = 50,
    eta: float = 0.0,
    *,
    spacing: str = "leading",
    set_alpha_to_one: bool = False,
    timesteps: Timesteps | None = None,
    before_step: BeforeStep | None = None,
    generator: Generators | None = None,
) -> Iterator[Step]:
    """The implicit model (DDIM, eq. 12): guess x_0, then put the same noise back, only less of it.

    eta: how much of the noise is drawn afresh. 0: none, x_T decides on the picture; 1: as much as in ddpm.
    set_alpha_to_one: whether the last step leads to the clean picture, ᾱ = 1, or only to ᾱ_0 (0.99915), which
    leaves a trace of the noise, as CompVis does. (CompVis: ldm/models/diffusion/ddim.py, DDIMSampler)
    """
    _check_eta(eta)
    x = x_T
    a_end = 1.0 if set_alpha_to_one else schedule.alpha_bar(0)
    for i, t, a_t, a_prev in _path(schedule, steps, spacing, timesteps, a_end):
        x_t = before_step(x, t) if before_step else x
        eps, eps_cond, eps_uncond = _predict(eps_model, x_t, i, t)
        # (The paper's α is what everybody else writes as ᾱ.)
        # x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t                                                      (DDIM, eq. 9)
        x0 = (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t)
        # σ_t = η √((1-ᾱ_prev) / (1-ᾱ_t)) √(1 - ᾱ_t / ᾱ_prev)                                 (DDIM, eq. 16)
        sigma_t = eta * sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
        # x_prev = √ᾱ_prev x̂_0 + √(1 - ᾱ_prev - σ_t²) ε + σ_t z                               (DDIM, eq. 12)
        x = sqrt(a_prev) * x0 + sqrt(1 - a_prev - sigma_t**2) * eps
        if sigma_t > 0:
            x = x + sigma_t * randn(x.shape, generator).to(x, non_blocking=True)
        yield Step(i, t, x_t, eps, x0, x, eps_cond, eps_uncond)


# What the last 2, 3 or 4 values of ε weigh, the newest first, in their mean over the coming step: that of the
# polynomial through them, if all steps are equally long.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms(
    eps_model: EpsModel,
    x_T: Float[Tensor, "b *d"],
    schedule: NoiseSchedule,
    steps: int = 50,
    eta: float = 0.0,
    *,
    spacing: str = "leading",
    set_alpha_to_one: bool = False,
    timesteps: Timesteps | None = None,
    before_step: BeforeStep | None = None,
    generator: Generators | None = None,
) -> Iterator[Step]:
    """Pseudo linear multi-step (PNDM, Algorithm 2): ddim's step along an ε combined from the last four.

    "Pseudo", as they are combined as in a linear multi-step method (Adams-Bashforth), but followed along the
    curve of ddim instead of a straight line. The first step has no past yet and asks the model twice, which
    makes steps + 1 calls. (The paper starts with three Runge-Kutta steps, of four calls each.)
    eta must be 0; set_alpha_to_one: see `ddim`. (CompVis: ldm/models/diffusion/plms.py, PLMSSampler)
    """
    _refuse_eta("plms", eta)
    x = x_T
    old_eps: list[Tensor] = []  # at most four, newest first
    a_end = 1.0 if set_alpha_to_one else schedule.alpha_bar(0)
    path = _path(schedule, steps, spacing, timesteps, a_end)
    for i, t, a_t, a_prev in path:
        x_t = before_step(x, t) if before_step else x
        e_t, eps_cond, eps_uncond = _predict(eps_model, x_t, i, t)
        old_eps = [e_t, *old_eps[:3]]
        if i == 0:
            # improved Euler: make the step, look which noise is seen from there, go back, and use the mean
            x_next, _ = _transfer(x_t, e_t, a_t, a_prev)
            t_next = path[min(1, len(path) - 1)][1]
            eps = (e_t + _predict(eps_model, x_next, i, t_next).eps) / 2
        else:
            # ε' = (55 ε_t - 59 ε_{t+1} + 37 ε_{t+2} - 9 ε_{t+3}) / 24, or a shorter form       (PNDM, eq. 12)
            w_t, *weights = ADAMS_BASHFORTH[len(old_eps)]
            eps = w_t * e_t
            for w, e in zip(weights, old_eps[1:], strict=True):
                eps = eps.add(e, alpha=w)  # eps + w e, in one pass over memory
        x, x0 = _transfer(x_t, eps, a_t, a_prev)
        yield Step(i, t, x_t, eps, x0, x, eps_cond, eps_uncond)


def _transfer(
    x_t: Float[Tensor, "b *d"], eps: Float[Tensor, "b *d"], a_t: float, a_prev: float
) -> tuple[Float[Tensor, "b *d"], Float[Tensor, "b *d"]]:
    """ddim's step without fresh noise, along any ε, and the x_0 it heads for (PNDM, eq. 9)."""
    x0 = (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t)
    return sqrt(a_prev) * x0 + sqrt(1 - a_prev) * eps, x0


def dpmpp_2m(
    eps_model: EpsModel,
    x_T: Float[Tensor, "b *d"],
    schedule: NoiseSchedule,
    steps: int = 25,
    eta: float = 0.0,
    *,
    spacing: str = "trailing",
    set_alpha_to_one: bool = True,
    lower_order_final: bool = True,
    timesteps: Timesteps | None = None,
    before_step: BeforeStep | None = None,
    generator: Generators | None = None,
) -> Iterator[Step]:
    """DPM-Solver++(2M), of second order with one call a step (DPM-Solver++, Algorithm 2).

    With α = √ᾱ, σ = √(1-ᾱ) and λ = log(α/σ), the step to the next timestep is known exactly up to an integral
    of x_0 over λ. To take x_0 as constant in it is ddim; to take it as the line through the last two is this.
    set_alpha_to_one: whether the last step leads to the clean picture, λ = ∞, or to ᾱ_0 as in `ddim`.
    lower_order_final: whether the last of fewer than 15 steps, long as it is, goes without the line.
    On small data, in 10 to 25 steps, no other defaults came clearly closer to the exact solution.
    eta must be 0. (CompVis: ldm/models/diffusion/dpm_solver/, DPMSolverSampler, with fractional timesteps)
    """
    _refuse_eta("dpmpp_2m", eta)
    x = x_T
    x0_old = h_old = None  # of the step before
    a_end = 1.0 if set_alpha_to_one else schedule.alpha_bar(0)
    path = _path(schedule, steps, spacing, timesteps, a_end)
    for i, t, a_t, a_prev in path:
        x_t = before_step(x, t) if before_step else x
        eps, eps_cond, eps_uncond = _predict(eps_model, x_t, i, t)
        x0 = (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t)
        # h = λ_prev - λ_t
        h = _lambda(a_prev) - _lambda(a_t)
        is_last = i == len(path) - 1
        if i == 0 or a_prev == 1 or (is_last and lower_order_final and len(path) < 15):
            D = x0  # first order: the line does not exist yet, or would have to reach to λ = ∞, or too far
        else:
            # D = (1 + 1/2r) x_0 - 1/2r x_0^old, where r = h_old / h: the line, half a step further on
            D = x0 + h / (2 * h_old) * (x0 - x0_old)
        # x_prev = σ_prev / σ_t x_t - α_prev (e^(-h) - 1) D
        x = sqrt((1 - a_prev) / (1 - a_t)) * x_t - sqrt(a_prev) * expm1(-h) * D
        x0_old, h_old = x0, h
        yield Step(i, t, x_t, eps, x0, x, eps_cond, eps_uncond)


def _lambda(a: float) -> float:
    """λ = log(√ᾱ / √(1-ᾱ)), half the log of the signal-to-noise ratio."""
    return log(a / (1 - a)) / 2 if a < 1 else inf


# -- the same process without its dimming: the samplers of k-diffusion ----------------------------------------
#
# The forward process dims the picture while it adds the noise. Undo the dimming, x̄ = x / √ᾱ, and what is left
# is the picture under a growing heap of noise. σ is its height, from 0 up to 14.6 in SD v1:
#
#     x̄ = x_0 + σ ε,   σ = √(1-ᾱ) / √ᾱ,   x = √ᾱ x̄ = x̄ / √(1+σ²)           (EDM, eq. 4, where s(t) = √ᾱ_t)
#
# From noise to picture one follows the probability flow (SDE, eq. 13), which is nowhere simpler than here:
#
#     dx̄/dσ = -σ ∇log p(x̄; σ) = (x̄ - x̂_0) / σ = ε      (EDM, eq. 1 and 3, where σ(t) = t; DDIM, eq. 14)
#
# The model is asked for the slope, and to draw is to follow it down to σ = 0. (x.add(y, alpha=w), below, is
# x + w y in one pass over memory.)
#
# By the contract, x_T ~ N(0, I) is x: it has the variance that x_t would have, and x̄ starts as √(1+σ²) x_T.
# k-diffusion and, except with "leading", diffusers start from σ x_T, as if no picture were in it: to draw what
# they draw, hand in √(1-ᾱ_t) x_T, which is smaller by 0.2% at t = 999. They also interpolate σ for timesteps
# that are no whole numbers; here t is always one that the model was trained with.


def euler(
    eps_model: EpsModel,
    x_T: Float[Tensor, "b *d"],
    schedule: NoiseSchedule,
    steps: int = 50,
    eta: float = 0.0,
    *,
    spacing: str = "linspace",
    timesteps: Timesteps | None = None,
    before_step: BeforeStep | None = None,
    generator: Generators | None = None,
) -> Iterator[Step]:
    """Euler's method: a straight line along ε, down to the next σ (DDIM, eq. 13; EDM, Algorithm 1).

    The same as ddim with set_alpha_to_one, on other timesteps: ddim's curve is this line, dimmed. The last
    step leads to σ = 0. eta must be 0. (k-diffusion: sample_euler; diffusers: EulerDiscreteScheduler)
    """
    _refuse_eta("euler", eta)
    x = x_T
    for i, t, a_t, a_prev in _path(schedule, steps, spacing, timesteps, a_end=1.0):
        x_t = before_step(x, t) if before_step else x
        eps, eps_cond, eps_uncond = _predict(eps_model, x_t, i, t)
        sigma, sigma_prev = _sigma(a_t), _sigma(a_prev)
        x_bar = x_t / sqrt(a_t)
        # x̂_0 = x̄ - σ ε: where the line would end, followed down to σ = 0
        x0 = x_bar.add(eps, alpha=-sigma)
        # x̄_prev = x̄ + (σ_prev - σ) ε                                                        (DDIM, eq. 13)
        x = sqrt(a_prev) * x_bar.add(eps, alpha=sigma_prev - sigma)
        yield Step(i, t, x_t, eps, x0, x, eps_cond, eps_uncond)


def euler_ancestral(
    eps_model: EpsModel,
    x_T: Float[Tensor, "b *d"],
    schedule: NoiseSchedule,
    steps: int = 50,
    eta: float = 1.0,
    *,
    spacing: str = "linspace",
    timesteps: Timesteps | None = None,
    before_step: BeforeStep | None = None,
    generator: Generators | None = None,
) -> Iterator[Step]:
    """euler's line down to less noise than asked for, then fresh noise for the rest (SDE, appendix F).

    eta: how much of the noise is drawn afresh. 0 is euler; 1 is k-diffusion's default, and the same as ddpm on
    the same timesteps. Between them lies what ddim does with that eta and set_alpha_to_one. (EDM's stochastic
    sampler, Algorithm 2, is another: there, noise is added before the step, beyond what is in x.)
    (k-diffusion: sample_euler_ancestral; diffusers: EulerAncestralDiscreteScheduler)
    """
    _check_eta(eta)
    x = x_T
    for i, t, a_t, a_prev in _path(schedule, steps, spacing, timesteps, a_end=1.0):
        x_t = before_step(x, t) if before_step else x
        eps, eps_cond, eps_uncond = _predict(eps_model, x_t, i, t)
        sigma, sigma_prev = _sigma(a_t), _sigma(a_prev)
        # σ_prev² = σ_down² + σ_up²: variances of independent noise add up.
        # σ_up = η √(σ_prev² (σ² - σ_prev²) / σ²), for η = 1 the width of q(x̄_prev | x̄, x_0)
        sigma_up = eta * sigma_prev * sqrt(1 - (sigma_prev / sigma) ** 2)
        sigma_down = sqrt(sigma_prev**2 - sigma_up**2)
        x_bar = x_t / sqrt(a_t)
        x0 = x_bar.add(eps, alpha=-sigma)
        # x̄_prev = x̄ + (σ_down - σ) ε + σ_up z, with z ~ N(0, I)
        x_bar = x_bar.add(eps, alpha=sigma_down - sigma)
        if sigma_up > 0:
            x_bar = x_bar.add(randn(x.shape, generator).to(x, non_blocking=True), alpha=sigma_up)
        x = sqrt(a_prev) * x_bar
        yield Step(i, t, x_t, eps, x0, x, eps_cond, eps_uncond)


def heun(
    eps_model: EpsModel,
    x_T: Float[Tensor, "b *d"],
    schedule: NoiseSchedule,
    steps: int = 25,
    eta: float = 0.0,
    *,
    spacing: str = "linspace",
    timesteps: Timesteps | None = None,
    before_step: BeforeStep | None = None,
    generator: Generators | None = None,
) -> Iterator[Step]:
    """Heun's method, of second order (EDM, Algorithm 1): euler's step, made again along a better slope.

    Each step asks the model twice: where it starts, and where euler's step led, at the timestep of the next
    step. The last step leads to σ = 0, where no noise is left to ask for, and stays euler's: this makes
    2 · steps - 1 calls. before_step comes before the first of the two. (plms begins with one such step.)
    With "trailing", the last step, euler's, is as long as the others: its error stays, however good these are.
    eta must be 0. (k-diffusion: sample_heun; diffusers: HeunDiscreteScheduler, where each call is a step)
    """
    _refuse_eta("heun", eta)
    x = x_T
    path = _path(schedule, steps, spacing, timesteps, a_end=1.0)
    for i, t, a_t, a_prev in path:
        x_t = before_step(x, t) if before_step else x
        eps, eps_cond, eps_uncond = _predict(eps_model, x_t, i, t)
        sigma, sigma_prev = _sigma(a_t), _sigma(a_prev)
        x_bar = x_t / sqrt(a_t)
        x = sqrt(a_prev) * x_bar.add(eps, alpha=sigma_prev - sigma)
        if sigma_prev > 0:
            # x̄_prev = x̄ + (σ_prev - σ) (ε + ε') / 2, with ε' as seen from the end of the line
            eps = (eps + _predict(eps_model, x, i, t=path[i + 1][1]).eps) / 2
            x = sqrt(a_prev) * x_bar.add(eps, alpha=sigma_prev - sigma)
        x0 = x_bar.add(eps, alpha=-sigma)
        yield Step(i, t, x_t, eps, x0, x, eps_cond, eps_uncond)


def _sigma(a: float) -> float:
    """σ = √(1-ᾱ) / √ᾱ, the noise in x̄ for one unit of the picture: e^(-λ)."""
    return sqrt((1 - a) / a)


# Look a sampler up by its name.
SAMPLERS: dict[str, Callable[..., Iterator[Step]]] = {
    "ddpm": ddpm,
    "ddim": ddim,
    "plms": plms,
    "dpmpp_2m": dpmpp_2m,
    "euler": euler,
    "euler_ancestral": euler_ancestral,
    "heun": heun,
}
