"""Exercises of stage 6: from noise back to a picture, one step at a time."""

import math
from collections.abc import Callable

import numpy as np  # noqa: F401  mistakes name it
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from minisd import latent_diffusion, sampling
from minisd.sampling import Guided, predict_x0

from .exercise import case, cases, exercise
from .noising import alphas_cumprod_of
from .places import context_of, function, instead_of, rule_of
from .texts import say

# --- what they are tried on ------------------------------------------------------------------------------------------


def latents(b: int = 2, h: int = 3, w: int = 5) -> Float[Tensor, "b 4 h w"]:
    return torch.randn(b, 4, h, w)


def steps_of(*names: str, **values):
    """Cases for a step from ᾱ_t to ᾱ_prev."""

    def cases():
        def case(a_t, a_prev, shape, **more):
            known = {"a_t": a_t, "a_prev": a_prev, **values, **more}
            return tuple(known[name] if name in known else latents(*shape) for name in names)

        return {
            "a step in the middle": case(0.3, 0.6, (2, 3, 5), eta=0.7),
            "a small step of one picture": case(0.7, 0.75, (1, 4, 3), eta=0.0),
            "a step at the start, of square latents": case(0.02, 0.1, (3, 4, 4), eta=1.0),
            "the last step, to the clean picture": case(0.95, 1.0, (2, 3, 4), eta=0.3),
        }

    return cases


def alphas(a_t: float, a_prev: float, **_) -> dict[str, float]:
    return {"ᾱ_t": a_t, "ᾱ_prev": a_prev, "α_t": a_t / a_prev}


# --- the exercises ---------------------------------------------------------------------------------------------------


@exercise(
    linear=("x_t", "eps", "noise"),
    quantities=alphas,
    swap=rule_of("ddpm")(lambda f, real, x_t, eps, a_t, a_prev, noise: f(x_t, eps, a_t, a_prev, noise)),
)
@cases(steps_of("x_t", "eps", "a_t", "a_prev", "noise"))
def ddpm_step(
    x_t: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    a_t: float,
    a_prev: float,
    noise: Float[Tensor, "b c h w"],
) -> Float[Tensor, "b c h w"]:
    """One step of ancestral sampling: a draw from q(x_prev | x_t, x̂_0), where x̂_0 is guessed from ε.

        β = 1 - ᾱ_t / ᾱ_prev
        μ̃ = √ᾱ_prev β / (1-ᾱ_t) x̂_0  +  √(1-β) (1-ᾱ_prev) / (1-ᾱ_t) x_t
        β̃ = (1-ᾱ_prev) / (1-ᾱ_t) β                            (DDPM, eq. 7, 15 and Algorithm 2)

    a_t and a_prev are ᾱ_t and ᾱ_prev, Python numbers; `eps` is what the network sees, `noise` is z ~ N(0, I).
    """
    # BEGIN SOLUTION
    x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    beta = 1 - a_t / a_prev
    mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t
    variance = (1 - a_prev) / (1 - a_t) * beta
    return mean + variance**0.5 * noise
    # END SOLUTION


@exercise(
    linear=("x_t", "eps", "noise"),
    quantities=lambda eta, **k: alphas(**k) | {"η": eta},
    swap=rule_of("ddim")(lambda f, real, x_t, eps, a_t, a_prev, eta, noise: f(x_t, eps, a_t, a_prev, eta, noise)),
)
@cases(steps_of("x_t", "eps", "a_t", "a_prev", "eta", "noise"))
def ddim_step(
    x_t: Float[Tensor, "b c h w"],
    eps: Float[Tensor, "b c h w"],
    a_t: float,
    a_prev: float,
    eta: float,
    noise: Float[Tensor, "b c h w"],
) -> Float[Tensor, "b c h w"]:
    """One step of the implicit model, from ᾱ_t to ᾱ_prev. (a_t and a_prev are these two: DDIM writes α for ᾱ.)

        x̂_0    = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t
        σ      = η √((1-ᾱ_prev) / (1-ᾱ_t)) √(1 - ᾱ_t / ᾱ_prev)                    (DDIM, eq. 16)
        x_prev = √ᾱ_prev x̂_0 + √(1 - ᾱ_prev - σ²) ε + σ z                         (DDIM, eq. 12)

    `noise` is z ~ N(0, I).
    """
    # BEGIN SOLUTION
    x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
    sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5
    return a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps + sigma * noise
    # END SOLUTION


@instead_of("make_timesteps", sampling)
def _put_timesteps(f, real, steps, T, spacing="leading"):
    if spacing != "leading" or T % steps or steps == T:
        return real(steps, T, spacing)
    return [max(0, min(T - 1, int(t))) for t in f(steps, T)]


@exercise(swap=_put_timesteps)
@case("50 of 1000", lambda: (50, 1000))
@case("4 of 20", lambda: (4, 20))
@case("10 of 20", lambda: (10, 20))
@case("one step", lambda: (1, 100))
def leading_timesteps(steps: int, T: int) -> list[int]:
    """Which of the T timesteps a sampler of fewer steps visits, as CompVis has it: falling, evenly spread, the last
    one 1.

    For 50 of 1000: 981 961 ... 21 1. `steps` divides T and is smaller. (CompVis: make_ddim_timesteps)
    """
    # BEGIN SOLUTION
    return [i * (T // steps) + 1 for i in range(steps)][::-1]
    # END SOLUTION


@exercise(
    linear=("old_eps",),
    swap=lambda f: [(sampling, "plms_combine", lambda old_eps: f(list(old_eps)).to(old_eps[0]))],
)
@cases(lambda: { f"{n} of them": ([latents() for _ in range(n)],) for n in (4, 3, 2, 1) })
def plms_combine(old_eps: list[Float[Tensor, "b c h w"]]) -> Float[Tensor, "b c h w"]:
    """The direction of a PLMS step, from the last one to four ε, the newest first.

        four:   (55 ε_t - 59 ε_{t+1} + 37 ε_{t+2} - 9 ε_{t+3}) / 24                (PNDM, eq. 12)
        three:  (23 ε_t - 16 ε_{t+1} + 5 ε_{t+2}) / 12
        two:    (3 ε_t - ε_{t+1}) / 2                       one: ε_t itself
    """
    # BEGIN SOLUTION
    table = {1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    weights = table[len(old_eps)]
    return sum(w * e for w, e in zip(weights, old_eps, strict=True))
    # END SOLUTION


@instead_of("classifier_free_guidance", sampling)
def _put_guidance(f, real, model, context, uncond_context, scale):
    guided = real(model, context, uncond_context, scale)

    def eps_model(x, t):
        if scale == 1.0:
            return guided(x, t)
        _, cond, uncond = guided(x, t)
        return Guided(f(uncond, cond, scale).to(x), cond, uncond)

    return eps_model


@exercise(linear=("eps_uncond", "eps_cond"), quantities=lambda scale, **_: {"scale": scale}, swap=_put_guidance)
@case("scale 7.5", lambda: (latents(), latents(), 7.5))
@case("scale 3, one picture", lambda: (latents(1), latents(1), 3.0))
@case("scale 1", lambda: (latents(3), latents(3), 1.0))
@case("scale 0", lambda: (latents(), latents(), 0.0))
def guidance(
    eps_uncond: Float[Tensor, "b c h w"], eps_cond: Float[Tensor, "b c h w"], scale: float
) -> Float[Tensor, "b c h w"]:
    """Classifier-free guidance: exaggerate what the prompt changes.

    eps_uncond is the noise as seen without the prompt, eps_cond with it. scale = 1 gives eps_cond, as Stable Diffusion
    counts. (Ho & Salimans 2022, eq. 6, where the weight w counts from 0: scale = 1 + w.)
    """
    # BEGIN SOLUTION
    return eps_uncond + scale * (eps_cond - eps_uncond)
    # END SOLUTION


class ToyModel(torch.nn.Module):
    """model(x, t, context): not linear, and each sample's answer depends on all three arguments of that sample."""

    asked = 0  # the size of the last batch

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        self.asked = len(x)
        if not len(x) == len(t) == len(context):
            sizes = f"{len(x)}, {len(t)} and {len(context)}"
            raise RuntimeError(f"x, t and context must have the same batch size, not {sizes}")
        told = (context * torch.arange(1, context[0].numel() + 1).view(context.shape[1:])).flatten(1).mean(1)
        return torch.tanh(x + 0.1 * t.view(-1, 1, 1, 1) + told.view(-1, 1, 1, 1))


@instead_of("classifier_free_guidance", sampling)
def _put_guided_eps(f, real, model, context, uncond_context, scale):
    context, told = context_of(model, context)
    uncond_context, _ = context_of(model, uncond_context)

    def eps_model(x, t):
        both = [c.expand(len(x), *c.shape[1:]) for c in (context, uncond_context)]
        return f(told, x, t, *both, scale).to(x)

    return eps_model


def _guided_case(t: list[int], words: int, scale: float) -> tuple:
    b = len(t)
    return ToyModel(), latents(b), torch.tensor(t), torch.randn(b, words, 6), torch.randn(b, words, 6), scale


def _of_two_calls(model: ToyModel, x: Tensor, **_) -> str:
    return say("verdict.two_calls") if model.asked < 2 * len(x) else ""


@exercise(swap=_put_guided_eps, remark=_of_two_calls)
@case("two pictures", lambda: _guided_case([3, 7], 5, 4.0))
@case("one picture", lambda: _guided_case([5], 5, 7.5))
@case("three pictures, a small scale", lambda: _guided_case([1, 9, 4], 4, 0.5))
def guided_eps(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    x: Float[Tensor, "b c h w"],
    t: Int[Tensor, "b"],
    context: Float[Tensor, "b n d"],
    uncond_context: Float[Tensor, "b n d"],
    scale: float,
) -> Float[Tensor, "b c h w"]:
    """Ask the model with and without the prompt, in one call, and guide.

    model(x, t, context) returns ε for a batch of any size. Call it once, with a batch of 2b, since that is faster than
    two calls. Then ε = ε_uncond + scale (ε_cond - ε_uncond). (CompVis: DDIMSampler.p_sample_ddim)
    """
    # BEGIN SOLUTION
    contexts = torch.cat([uncond_context, context])
    eps_uncond, eps_cond = model(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
    return eps_uncond + scale * (eps_cond - eps_uncond)
    # END SOLUTION


@rule_of("dpmpp_2m")
def _put_dpmpp(f, real, x_t, eps, a_t, a_prev, past, i, steps, *, lower_order_final=True):
    before = list(past)
    x_prev, x0, _ = real(x_t, eps, a_t, a_prev, past, i, steps, lower_order_final=lower_order_final)
    first_order = not before or a_prev == 1 or (lower_order_final and i == steps - 1 and steps < 15)
    return x_prev if first_order else f(x_t, x0, *before, a_t, a_prev)


@exercise(linear=("x_t", "x0", "x0_old"), swap=_put_dpmpp)
@case("a step in the middle", lambda: (latents(), latents(), latents(), 0.1, 0.3, 0.6))
@case("a small step after a large one", lambda: (latents(1), latents(1), latents(1), 0.2, 0.8, 0.85))
@case("a large step after a small one", lambda: (latents(3, 4, 4), latents(3, 4, 4), latents(3, 4, 4), 0.28, 0.3, 0.9))
def dpmpp_2m_step(
    x_t: Float[Tensor, "b c h w"],
    x0: Float[Tensor, "b c h w"],
    x0_old: Float[Tensor, "b c h w"],
    a_old: float,
    a_t: float,
    a_prev: float,
) -> Float[Tensor, "b c h w"]:
    """One step of DPM-Solver++(2M), from ᾱ_t to ᾱ_prev; the step before led from ᾱ_old to ᾱ_t.

    With α = √ᾱ, σ = √(1-ᾱ), λ = log(α/σ), h = λ_prev - λ_t, h_old = λ_t - λ_old and r = h_old / h:

        D      = (1 + 1/(2r)) x_0 - 1/(2r) x_0^old
        x_prev = σ_prev / σ_t x_t - α_prev (e^(-h) - 1) D              (DPM-Solver++, Algorithm 2)

    x0 is the model's guess now, x0_old that at the step before. All three ᾱ are Python numbers less than 1.
    """
    # BEGIN SOLUTION
    def lam(a):
        return math.log(a / (1 - a)) / 2

    h, h_old = lam(a_prev) - lam(a_t), lam(a_t) - lam(a_old)
    D = x0 + h / (2 * h_old) * (x0 - x0_old)
    return ((1 - a_prev) / (1 - a_t)) ** 0.5 * x_t - a_prev**0.5 * math.expm1(-h) * D
    # END SOLUTION


@rule_of("euler")
def _put_euler(f, real, x_t, eps, a_t, a_prev):
    """In x / √ᾱ, over σ = √((1-ᾱ)/ᾱ)."""
    sigma, sigma_next = (((1 - a) / a) ** 0.5 for a in (a_t, a_prev))
    return a_prev**0.5 * f(x_t / a_t**0.5, predict_x0(x_t, eps, a_t), sigma, sigma_next)


@exercise(
    linear=("x", "denoised"),
    quantities=lambda sigma, sigma_next, **_: {"σ": sigma, "σ_next": sigma_next, "(σ_next/σ)": sigma_next / sigma},
    swap=_put_euler,
)
@case("from 3 to 2", lambda: (latents(), latents(), 3.0, 2.0))
@case("one picture, a large step", lambda: (latents(1), latents(1), 14.6, 7.0))
@case("the last step, to 0", lambda: (latents(3, 4, 4), latents(3, 4, 4), 0.3, 0.0))
def euler_step(
    x: Float[Tensor, "b c h w"], denoised: Float[Tensor, "b c h w"], sigma: float, sigma_next: float
) -> Float[Tensor, "b c h w"]:
    """One step of Euler's method along dx/dσ = (x - denoised) / σ, from noise of size σ to σ_next.

    Here x is the picture plus σ times noise (not shrunk by √ᾱ), and `denoised` is the model's guess at the picture.
    (Karras et al. 2022, Algorithm 1, with s(t) = 1 and σ(t) = t)
    """
    # BEGIN SOLUTION
    slope = (x - denoised) / sigma
    return x + slope * (sigma_next - sigma)
    # END SOLUTION


@exercise(swap=function("remaining_timesteps", sampling))
@case("ten steps, strength 0.7", lambda: (list(range(91, 0, -10)), 0.7))
@case("strength 1", lambda: ([80, 60, 40, 20, 0], 1.0))
@case("twenty steps, strength 0.25", lambda: (list(range(951, 0, -50)), 0.25))
@case("a strength that leaves a fraction", lambda: ([70, 60, 50, 40, 30, 20, 10], 0.5))
@case("timesteps that are not evenly spread", lambda: ([900, 500, 400, 300, 20, 10], 0.5))
@case("a strength that leaves less", lambda: ([70, 60, 50, 40, 30, 20, 10], 0.6))
@case("a strength that leaves nothing", lambda: ([70, 60, 50, 40, 30, 20, 10], 0.1))
def img2img_timesteps(timesteps: list[int], strength: float) -> list[int]:
    """The timesteps that are left if one starts from a picture: a part `strength` of them, in (0, 1], the last ones.

    The picture is noised to the first timestep that is returned, and sampled from there. The number of steps is rounded
    down. (Meng et al. 2022, SDEdit; CompVis: scripts/img2img.py)
    """
    # BEGIN SOLUTION
    n = int(strength * len(timesteps))
    return timesteps[len(timesteps) - n :]
    # END SOLUTION


@instead_of("_put_back", latent_diffusion.LatentDiffusion)
def _put_blend(f, real, self, x_t, z, noise, mask, t):
    return f(x_t, z, noise, mask.bool(), self.schedule.alpha_bar(int(t[0]))).to(x_t)


def _blend_case(b: int, h: int, w: int, kept: float, a_t: float) -> tuple:
    return *(latents(b, h, w) for _ in range(3)), torch.rand(b, 1, h, w) > kept, a_t


@exercise(swap=_put_blend)
@case("two pictures", lambda: _blend_case(2, 3, 5, 0.5, 0.4))
@case("one picture, little noise", lambda: _blend_case(1, 3, 5, 0.5, 0.9))
@case("square latents, much noise", lambda: _blend_case(3, 4, 4, 0.3, 0.05))
def inpaint_blend(
    x_t: Float[Tensor, "b c h w"],
    z_0: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    mask: Bool[Tensor, "b 1 h w"],
    a_t: float,
) -> Float[Tensor, "b c h w"]:
    """Before each step of inpainting: where `mask` is set keep x_t, elsewhere put what is known of the picture.

    The known latent z_0 is noised to the level of x_t first: √ᾱ_t z_0 + √(1-ᾱ_t) ε, with a_t = ᾱ_t.
    (CompVis: DDIMSampler.ddim_sampling, whose mask is the other way round)
    """
    # BEGIN SOLUTION
    known = a_t**0.5 * z_0 + (1 - a_t) ** 0.5 * noise
    return torch.where(mask, x_t, known)
    # END SOLUTION


# The samplers ask for one σ at a time: the table is of one entry.
@exercise(swap=lambda f: [(sampling, "_sigma", lambda a: float(f(torch.tensor([a], dtype=torch.float64))[0]))])
@case("twelve timesteps", lambda: (alphas_cumprod_of(12),))
@case("five timesteps", lambda: (alphas_cumprod_of(5),))
def sigmas(alphas_cumprod: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """The noise of each timestep as Karras et al. count it: x_t / √ᾱ_t = x_0 + σ_t ε. Returns σ_t for all t."""
    # BEGIN SOLUTION
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    # END SOLUTION
