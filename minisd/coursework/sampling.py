"""Exercises of stage 6: from noise back to a picture, one step at a time."""

import math
from collections.abc import Callable

import numpy as np  # noqa: F401  mistakes name it
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from .. import latent_diffusion, sampling
from ..sampling import SAMPLERS, Guided, Step, randn
from .exercise import exercise
from .noising import alphas_cumprod_of

# --- a student's step in the place of minisd's -----------------------------------------------------------------------


def put_sampler(name: str, step: Callable, spacing: str = "leading", ends_at_one: bool = False) -> list:
    """The sampler of that name, with `step` in the middle of its loop: where it goes, for `swap`."""
    if name == "ddpm":
        spacing, ends_at_one = "linspace", True

    def sampler(
        eps_model, x_T, schedule, steps=50, eta=0.0, *, spacing=spacing, set_alpha_to_one=ends_at_one, timesteps=None,
        before_step=None, generator=None,
    ):  # fmt: skip
        x, past = x_T, []
        path = sampling._path(schedule, steps, spacing, timesteps, 1.0 if set_alpha_to_one else schedule.alpha_bar(0))
        for i, t, a_t, a_prev in path:
            x_t = before_step(x, t) if before_step else x
            eps, cond, uncond = sampling._predict(eps_model, x_t, i, t)
            x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
            draws = (name == "ddpm" and a_prev < 1) or eta > 0
            noise = randn(x_t.shape, generator).to(x_t) if draws else torch.zeros_like(x_t)
            x = step(
                x_t=x_t, eps=eps, x0=x0, a_t=a_t, a_prev=a_prev, eta=eta, noise=noise, t=t, i=i, path=path, past=past,
                schedule=schedule, eps_model=eps_model,
            ).to(x_t)  # fmt: skip
            yield Step(i, t, x_t, eps, x0, x, cond, uncond)

    return [(SAMPLERS, name, sampler), (sampling, name, sampler)]


# --- what they are tried on ------------------------------------------------------------------------------------------


def latents(b: int = 2, h: int = 3, w: int = 5) -> Float[Tensor, "b 4 h w"]:
    return torch.randn(b, 4, h, w)


def steps_of(*names: str, **values):
    """Cases for a step from ᾱ_t to ᾱ_prev."""

    def cases():
        def case(a_t, a_prev, shape, **more):
            known = {"a_t": a_t, "a_prev": a_prev, **values, **more}
            return {name: known[name] if name in known else latents(*shape) for name in names}

        etas = [0.7, 0.0, 1.0, 0.3] if "eta" in names else [None] * 4
        return {
            "a step in the middle": case(0.3, 0.6, (2, 3, 5), eta=etas[0]),
            "a small step of one picture": case(0.7, 0.75, (1, 4, 3), eta=etas[1]),
            "a step at the start, of square latents": case(0.02, 0.1, (3, 4, 4), eta=etas[2]),
            "the last step, to the clean picture": case(0.95, 1.0, (2, 3, 4), eta=etas[3]),
        }

    return cases


def alphas(a_t: float, a_prev: float, **_) -> dict[str, float]:
    return {"ᾱ_t": a_t, "ᾱ_prev": a_prev, "α_t": a_t / a_prev}


# --- the exercises ---------------------------------------------------------------------------------------------------


@exercise(
    difficulty=3,
    minutes=20,
    cases=steps_of("x_t", "eps", "a_t", "a_prev", "noise"),
    hints=(
        "Three lines: guess x_0 from ε; take the mean of q(x_prev | x_t, x_0); add noise of its variance.",
        "The step's own β is 1 - ᾱ_t / ᾱ_prev. (If no timestep is left out, that is β_t.)",
        "The variance is (1-ᾱ_prev) / (1-ᾱ_t) β. At the last step ᾱ_prev is 1, and no noise is left to add.",
    ),
    mistakes=[
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "(x_t + (1 - a_t) ** 0.5 * eps) / a_t**0.5",
         "In x_0 the noise is added, but has to be subtracted: x_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t."),
        ("mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t",
         "mean = a_prev**0.5 * beta / (1 - a_t) * x_t + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x0",
         "x̂_0 and x_t have exchanged their factors in the mean."),
        ("return mean + variance**0.5 * noise", "return x0 + variance**0.5 * noise",
         "The mean of the step is x̂_0 in yours: it is the weighted sum of x̂_0 and x_t."),
        ("beta = 1 - a_t / a_prev\nmean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1"
         " - a_t) * x_t\nvariance = (1 - a_prev) / (1 - a_t) * beta",
         "beta = 1 - a_t\nmean = (x_t - beta / (1 - a_t) ** 0.5 * eps) / (1 - beta) ** 0.5\nvariance = (1 - a_prev) /"
         " (1 - a_t) * beta",
         "You took ᾱ_t for α_t in μ = (x_t - β/√(1-ᾱ_t) ε) / √α_t: β of one step is 1 - ᾱ_t / ᾱ_prev."),
        ("mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t",
         "mean = x_t - beta / (1 - a_t) ** 0.5 * eps",
         "The mean is not divided by √α_t = √(1-β): μ = (x_t - β/√(1-ᾱ_t) ε) / √(1-β)."),
        ("mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t",
         "mean = (x_t - beta / (1 - a_t) * eps) / (1 - beta) ** 0.5",
         "ε comes with β / √(1-ᾱ_t) in the mean: the root is missing."),
        ("mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t",
         "mean = (x_t - beta / (1 - a_t) ** 0.5 * eps) / a_t**0.5",
         "The mean is divided by √ᾱ_t: by √α_t = √(1-β), that of one step."),
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "(x_t - (1 - a_t) ** 0.5 * eps)", "x_0 is not divided by √ᾱ_t."),
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "(x_t - (1 - a_t) * eps) / a_t**0.5",
         "ε has the wrong factor: √(1-ᾱ_t), with the root, in x_0; or β / √(1-ᾱ_t), not β alone, where the mean is"
         " written with ε."),
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "(x_t - (1 - a_t) ** 0.5 * eps) / a_t",
         "x_0 is divided by √ᾱ_t, not by ᾱ_t."),
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "((x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5).clamp(-1, 1)",
         "You clamped x_0 to [-1, 1]: that suits pixels, but these are latents."),
        ("1 - a_t / a_prev", "1 - a_t",
         "The β of this step is 1 - ᾱ_t / ᾱ_prev; 1-ᾱ_t is the noise of all steps so far."),
        ("1 - a_t / a_prev", "1 - a_prev / a_t",
         "The quotient in β is the wrong way round: ᾱ_t / ᾱ_prev is less than 1."),
        ("1 - a_t / a_prev", "a_t / a_prev", "That is α of the step; β is 1 - α."),
        ("a_prev**0.5 * beta", "a_t**0.5 * beta", "The factor of x_0 has √ᾱ_prev in it, not √ᾱ_t."),
        ("a_prev**0.5 * beta", "a_prev * beta", "The factor of x_0 has the root of ᾱ_prev in it."),
        ("(1 - beta) ** 0.5 * (1", "(1 - beta) * (1",
         "The factor of x_t has √α in it, with the root, where α = 1 - β."),
        ("(1 - a_prev) / (1 - a_t) * x_t", "(1 - a_t) / (1 - a_prev) * x_t",
         "The quotient in the factor of x_t is the wrong way round: 1-ᾱ_prev above, 1-ᾱ_t below."),
        ("variance**0.5 * noise", "variance * noise",
         "You multiplied the noise by the variance: its root, the standard deviation, scales noise."),
        ("+ variance**0.5 * noise", "",
         "You returned the mean. DDPM draws: the noise √β̃ z is missing, and pictures become blurred without it."),
        ("variance**0.5 * noise", "noise", "The fresh noise comes in at full strength: its factor √β̃ is missing."),
        ("variance = (1 - a_prev) / (1 - a_t) * beta", "variance = beta",
         "You used β as the variance (the upper bound, which DDPM names too): asked for is β̃ = (1-ᾱ_prev) / (1-ᾱ_t) β,"
         " which is 0 at the last step. Yours still adds noise to the finished picture."),
        ("variance = (1 - a_prev) / (1 - a_t) * beta", "variance = (1 - a_t) / (1 - a_prev + 1e-9) * beta",
         "The quotient in the variance is the wrong way round."),
        ("variance = (1 - a_prev) / (1 - a_t) * beta", "variance = (1 - a_prev) / (1 - a_t)",
         "The factor β of the variance is missing."),
        ("mean + v", "mean - v", "The fresh noise is added, not subtracted: it is given, so its sign counts here."),
        ("beta / (1 - a_t) * x0", "beta / (1 - a_t) * eps",
         "The mean is a mixture of x_0 and x_t; you put ε where x_0 belongs."),
        ("return mean + variance**0.5 * noise", "return a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * eps",
         "This is a step of DDIM with η = 0, which puts ε back: DDPM draws, with the mean μ̃ and the variance β̃."),
        ("return mean + variance**0.5 * noise", "return a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * noise",
         "You noised x̂_0 anew, with fresh noise alone: x_t has its part in the mean, and the fresh noise has the"
         " variance β̃."),
        ("variance**0.5 * noise", "math.exp(variance / 2) * noise",
         "You took the variance for its logarithm: exp(... / 2) is for that, here it is the root, √β̃."),
        ("mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t",
         "mean = (x_t - beta / (1 - a_t) ** 0.5 * eps) / (1 - beta)",
         "The mean is divided by √α_t = √(1-β): the root is missing."),
        ("mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t",
         "mean = (x_t - beta / (1 - a_t) ** 0.5 * eps) * (1 - beta) ** 0.5",
         "The mean is multiplied by √α_t: forwards x was, so on the way back it is divided."),
        ("mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t",
         "mean = (x_t - (beta / (1 - a_t)) ** 0.5 * eps) / (1 - beta) ** 0.5",
         "ε comes with β / √(1-ᾱ_t) in the mean: you took a root of β, too."),
        ("variance = (1 - a_prev) / (1 - a_t) * beta", "variance = 1 - a_prev",
         "The variance is that of one step, β̃: 1-ᾱ_prev is that of all noise in x_prev."),
    ],
    linear=("x_t", "eps", "noise"),
    quantities=alphas,
    swap=lambda f: put_sampler("ddpm", lambda x_t, eps, a_t, a_prev, noise, **_: f(x_t, eps, a_t, a_prev, noise)),
)  # fmt: skip
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
    difficulty=3,
    minutes=20,
    cases=steps_of("x_t", "eps", "a_t", "a_prev", "eta", "noise"),
    hints=(
        "Guess x_0; then noise it again, but only to the level of ᾱ_prev, and with the ε that you know.",
        "If a part of the noise is fresh, with variance σ², the old one gets the rest: 1 - ᾱ_prev - σ².",
        "x_prev = √ᾱ_prev x̂_0 + √(1-ᾱ_prev-σ²) ε + σ z",
    ),
    mistakes=[
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "(x_t + (1 - a_t) ** 0.5 * eps) / a_t**0.5",
         "In x_0 the noise is added, but has to be subtracted: x_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t."),
        ("return a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps + sigma * noise", "return a_prev**0.5 * x0",
         "Only x̂_0 comes in, shrunk: the old noise ε and the fresh noise z are missing."),
        ("",
         "sigma = eta * ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5\nx0 = (x_t - (1 - a_t) * eps) / a_t\n"
         "return a_prev * x0 + (1 - a_prev - sigma**2) * eps + sigma * noise",
         "All roots are missing: the factors of pictures and noises are √ᾱ and √(1-ᾱ), not ᾱ and 1-ᾱ."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps + sigma * noise", "(1 - a_prev - sigma**2) ** 0.5 * noise + sigma * eps",
         "ε and the fresh noise are exchanged: σ multiplies z, and √(1-ᾱ_prev-σ²) the old noise ε."),
        ("return a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps + sigma * noise", "return x0",
         "You returned x̂_0: it has to be noised again, to the level of ᾱ_prev."),
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "x_t - (1 - a_t) ** 0.5 * eps", "x_0 is not divided by √ᾱ_t."),
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "(x_t - (1 - a_t) * eps) / a_t**0.5",
         "In x_0 the noise has the factor √(1-ᾱ_t): the root is missing."),
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "(x_t - (1 - a_t) ** 0.5 * eps) / a_t",
         "x_0 is divided by √ᾱ_t, not by ᾱ_t."),
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5", "x_t",
         "You took x_t for the picture x_0: subtract its noise first, and divide by √ᾱ_t."),
        ("a_prev**0.5 * x0", "x0", "x_0 has to be shrunk again, by √ᾱ_prev, to the level where the step ends."),
        ("a_prev**0.5 * x0", "a_prev * x0", "x_0 is multiplied by √ᾱ_prev: the root is missing."),
        ("a_prev**0.5 * x0", "a_t**0.5 * x0",
         "You went back to where you came from: x_0 is multiplied by √ᾱ_prev, not √ᾱ_t."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps", "(1 - a_prev) ** 0.5 * eps",
         "You forgot to take σ² out of the old noise: together, the old and the fresh noise have the variance"
         " 1-ᾱ_prev; yours have σ² too much."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps", "(1 - a_prev - sigma) ** 0.5 * eps",
         "It is σ² that is taken out of the variance, not σ."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps", "((1 - a_prev) ** 0.5 - sigma) * eps",
         "You subtracted σ from the standard deviation: variances add up, not standard deviations, so σ² is taken"
         " out under the root."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps", "abs(1 - a_prev - sigma**2) * eps",
         "The old noise is scaled by a standard deviation: the root is missing."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps", "(1 - a_t) ** 0.5 * eps",
         "The noise is put back at the old level: 1-ᾱ_prev - σ², not 1-ᾱ_t."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps", "0 * eps",
         "The old noise is missing: x_prev lies on the way, and still has noise √(1-ᾱ_prev-σ²) ε."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps", "(1 - a_prev + sigma**2) ** 0.5 * eps",
         "σ² is subtracted from the old noise's variance, not added."),
        ("sigma * noise", "sigma**2 * noise", "The fresh noise is multiplied by σ, the standard deviation, not by σ²."),
        ("sigma * noise", "eta * noise", "The fresh noise is multiplied by σ, of which η is only one factor."),
        ("sigma * noise", "eta * sigma * noise", "η comes in twice: it is in σ already."),
        (" + sigma * noise", "", "The fresh noise is missing: for η > 0 a part σ z is drawn anew."),
        ("eta * ((", "((", "η is missing in σ: with η = 0 nothing is random."),
        ("(1 - a_t / a_prev)) ** 0.5", "(1 - a_t / a_prev))",
         "σ has a root: without it, yours is η times the variance."),
        ("(1 - a_prev) / (1 - a_t) * (1", "(1 - a_t) / (1 - a_prev + 1e-12) * (1",
         "The first quotient in σ is the wrong way round: (1-ᾱ_prev) / (1-ᾱ_t)."),
        ("(1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)", "(1 - a_t / a_prev)",
         "The first quotient in σ, (1-ᾱ_prev) / (1-ᾱ_t), is missing."),
        ("(1 - a_t / a_prev)", "(1 - a_t)",
         "The second factor in σ is 1 - ᾱ_t / ᾱ_prev, the β of this step, not 1-ᾱ_t."),
        ("a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps",
         "a_prev**0.5 * x0 - (1 - a_prev - sigma**2) ** 0.5 * eps",
         "The old noise is put back with a minus: it is added, only less of it."),
        ("a_prev**0.5 * x0 + (1 - a_prev - sigma**2) ** 0.5 * eps",
         "(1 - a_prev - sigma**2) ** 0.5 * x0 + a_prev**0.5 * eps",
         "The factors of x_0 and ε are exchanged."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps", "(1 - a_t - sigma**2) ** 0.5 * eps",
         "What is left for the old noise is 1 - ᾱ_prev - σ², at the end of the step: you have ᾱ_t in it."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps + sigma * noise", "(1 - a_prev) ** 0.5 * noise",
         "All noise is fresh in yours: the old ε is put back, and only the part σ of the noise is drawn anew."),
        ("(1 - a_prev - sigma**2) ** 0.5 * eps + sigma * noise",
         "max(1 - a_prev - eta**2, 0) ** 0.5 * eps + eta * noise",
         "You took η for σ: η is one factor of σ only, from 0 (DDIM) to 1 (DDPM)."),
        ("(x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5",
         "((x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5).clamp(-1, 1)",
         "You clamped x_0 to [-1, 1]: that suits pixels, but these are latents."),
        ("",
         "x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5\nsigma = eta * (1 - a_t / a_prev) ** 0.5\nreturn"
         " a_prev**0.5 * x0 + max(1 - a_prev - sigma**2, 0) ** 0.5 * eps + sigma * noise",
         "σ is η √β of the step, without √((1-ᾱ_prev) / (1-ᾱ_t)): σ² can so exceed 1-ᾱ_prev, and the root of"
         " what is left does not exist."),
    ],
    linear=("x_t", "eps", "noise"),
    quantities=lambda eta, **k: alphas(**k) | {"η": eta},
    swap=lambda f: put_sampler("ddim", lambda x_t, eps, a_t, a_prev, eta, noise,
                               **_: f(x_t, eps, a_t, a_prev, eta, noise)),
)  # fmt: skip
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


def _put_timesteps(f):
    real = sampling.make_timesteps

    def make_timesteps(steps, T, spacing="leading"):
        if spacing != "leading" or T % steps or steps == T:
            return real(steps, T, spacing)
        return [max(0, min(T - 1, int(t))) for t in f(steps, T)]

    return [(sampling, "make_timesteps", make_timesteps)]


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "50 of 1000": {"steps": 50, "T": 1000},
        "4 of 20": {"steps": 4, "T": 20},
        "10 of 20": {"steps": 10, "T": 20},
        "one step": {"steps": 1, "T": 100},
    },
    hints=(
        "The stride is T // steps. Which multiples of it, and plus what?",
        "For 4 of 20: 16 11 6 1.",
        "The multiples 0, 5, 10, 15, plus 1, falling.",
    ),
    mistakes=[
        ("[::-1]", "", "Your timesteps rise; sampling goes from much noise to little, so that they fall."),
        (" + 1 ", " ", "The + 1 is missing: CompVis goes ... 21 1, not ... 20 0."),
        (" + 1 ", " - 1 ", "One is added to each, not subtracted."),
        ("i * (T // steps) + 1", "(i + 1) * (T // steps) - 1",
         'Yours are spaced "trailing", from T-1 down. Here the first of each stride is taken, plus 1.'),
        ("[i * (T // steps) + 1 for i in range(steps)]", "list(range(1, T, steps))",
         "You took `steps` for the stride: it is their number, and the stride is T // steps."),
        ("[i * (T // steps) + 1 for i in range(steps)]", "list(range(0, T, steps))",
         "You took `steps` for the stride, and the + 1 is missing: `steps` is their number, and the stride is T //"
         " steps."),
        ("i * (T // steps) + 1", "(i + 1) * (T // steps)",
         "You start at T, which is one too far: there are the timesteps 0 ... T-1."),
        ("i * (T // steps) + 1", "round(i * (T - 1) / max(steps - 1, 1))",
         'Yours are spaced "linspace", with both ends; here the stride is T // steps.'),
        ("[i * (T // steps) + 1 for i in range(steps)][::-1]",
         "np.linspace(T - 1, 0, steps).round().astype(int).tolist()",
         'Yours are spaced "linspace", from T-1 down to 0: here the stride is T // steps, and the last one is 1.'),
        ("[i * (T // steps) + 1 for i in range(steps)][::-1]", "np.linspace(T - 1, 0, steps).astype(int).tolist()",
         'Yours are spaced "linspace", from T-1 down to 0, and cut off: here the stride is T // steps.'),
        ("[i * (T // steps) + 1 for i in range(steps)][::-1]", "np.linspace(T, 1, steps).round().astype(int).tolist()",
         "Yours go evenly from T down to 1: here the stride is T // steps, and the largest is T - T // steps + 1."),
        ("i * (T // steps) + 1", "int(i * (T - 1) / max(steps - 1, 1))",
         'Yours are spaced "linspace", with both ends, and cut off: here the stride is T // steps.'),
        ("range(steps)", "range(steps + 1)", "There is one timestep too many: exactly `steps` of them."),
        ("range(steps)", "range(1, steps)", "There is one timestep too few: the smallest, 1, belongs to it."),
        ("T // steps", "steps", "The stride is T // steps, not steps: 50 steps of 1000 are 20 apart."),
        ("T // steps", "1000 // steps", "You wrote down 1000 timesteps: the number comes with the argument T."),
        ("i * (T // steps) + 1", "i",
         "You took the first `steps` of all timesteps: they have to be spread over all T."),
        ("i * (T // steps) + 1", "T - steps + i",
         "You took the last `steps` of all timesteps: they have to be spread over all T."),
        ("return [i * (T // steps) + 1 for i in range(steps)][::-1]",
         "return [i + 1 for i in range(0, T, steps)][::-1]",
         "You took `steps` for the stride: the stride is T // steps, and there are `steps` timesteps."),
        ("return [i * (T // steps) + 1 for i in range(steps)][::-1]",
         "return [round(i) for i in np.linspace(1, T - 1, steps)][::-1]",
         "Yours are spread evenly from 1 to T-1: here the stride is T // steps exactly, so that the first one is T -"
         " T // steps + 1."),
        ("return [i * (T // steps) + 1 for i in range(steps)][::-1]",
         "return list(range(0, T + 1, T // steps))[::-1]",
         "From 0 to T, both ends, there is one too many: `steps` of them, from 1 on, with T left out."),
        ("return [i * (T // steps) + 1 for i in range(steps)][::-1]",
         "return [int(i) + 1 for i in np.linspace(0, (0.8 * T) ** 0.5, steps) ** 2][::-1]",
         "These are spaced quadratically, close together near t = 0: here they are evenly spread."),
    ],
    swap=_put_timesteps,
)  # fmt: skip
def leading_timesteps(steps: int, T: int) -> list[int]:
    """Which of the T timesteps a sampler of fewer steps visits, as CompVis has it: falling, evenly spread, the last
    one 1.

    For 50 of 1000: 981 961 ... 21 1. `steps` divides T and is smaller. (CompVis: make_ddim_timesteps)
    """
    # BEGIN SOLUTION
    return [i * (T // steps) + 1 for i in range(steps)][::-1]
    # END SOLUTION


def _put_plms(f):
    def step(x_t, eps, a_t, a_prev, past, i, path, eps_model, **_):
        past.insert(0, eps)
        del past[4:]
        if i == 0:  # no past yet: the mean of two looks, as in minisd's own
            x_next, _ = sampling._transfer(x_t, eps, a_t, a_prev)
            combined = (eps + sampling._predict(eps_model, x_next, i, path[min(1, len(path) - 1)][1]).eps) / 2
        else:
            combined = f(list(past))
        return sampling._transfer(x_t, combined, a_t, a_prev)[0]

    return put_sampler("plms", step)


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        f"{n} of them": {"old_eps": [latents() for _ in range(n)]} for n in (4, 3, 2, 1)
    },
    hints=(
        "The weights are those of Adams and Bashforth. In each row they sum to 1.",
        "Four: 55 -59 37 -9, by 24. Three: 23 -16 5, by 12. Two: 3 -1, by 2.",
        "The newest ε has the largest weight; it comes first in the list.",
    ),
    mistakes=[
        ("zip(weights, old_eps", "zip(weights, old_eps[::-1]",
         "The list begins with the newest ε, which has the largest weight: you began with the oldest."),
        ("-59 / 24", "59 / 24", "The second of four weights is -59/24: the signs alternate, and the weights sum to 1."),
        ("-9 / 24", "9 / 24", "The last of four weights is -9/24: the signs alternate, and the weights sum to 1."),
        ("-16 / 12", "16 / 12",
         "The second of three weights is -16/12: the signs alternate, and the weights sum to 1."),
        ("-1 / 2", "1 / 2", "The second of two weights is -1/2: the line through both, half a step further on."),
        ("23 / 12, -16 / 12, 5 / 12", "23 / 24, -16 / 24, 5 / 24",
         "Three ε are divided by 12: your weights do not sum to 1."),
        ("55 / 24, -59 / 24, 37 / 24, -9 / 24", "55 / 12, -59 / 12, 37 / 12, -9 / 12",
         "Four ε are divided by 24: your weights do not sum to 1."),
        ("4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)", "4: (23 / 12, -16 / 12, 5 / 12, 0)",
         "Of four ε you use three: the fourth order is 55 -59 37 -9 by 24."),
        ("2: (3 / 2, -1 / 2)", "2: (1 / 2, 1 / 2)",
         "Two ε are not averaged: 3/2 of the newer minus 1/2 of the older looks ahead."),
        ("55 / 24, -59 / 24, 37 / 24, -9 / 24", "9 / 24, 19 / 24, -5 / 24, 1 / 24",
         "These are the weights of Adams and Moulton, which need the ε at the end of the step; the explicit ones"
         " are Adams-Bashforth's."),
        ("1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)",
         "n: (1 / n,) * n for n in (1, 2, 3, 4)",
         "You took the plain mean. Adams-Bashforth follows the trend of the past ε into the step."),
        ("1: (1.0,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)",
         "n: (1.0,) + (0.0,) * (n - 1) for n in (1, 2, 3, 4)",
         "Only the newest ε is used: that is DDIM. The older ones make the direction better."),
        ("",
         "e = old_eps\nreturn {1: lambda: e[0], 2: lambda: 3 * e[0] - e[1] / 2, 3: lambda: 23 * e[0] - 16 * e[1] + 5 *"
         " e[2] / 12, 4: lambda: 55 * e[0] - 59 * e[1] + 37 * e[2] - 9 * e[3] / 24}[len(e)]()",
         "Only the last term is divided: the whole sum is. Parentheses!"),
        ("sum(w * e for w, e in zip(weights, old_eps, strict=True))",
         "sum(w * e for w, e in zip(weights, old_eps, strict=True)) / len(old_eps)",
         "You divided by the number of ε as well: the weights sum to 1 already."),
        ("37 / 24", "31 / 24", "The third of four weights is 37/24."),
        ("5 / 12", "-5 / 12", "The third of three weights is +5/12: the signs alternate, and the weights sum to 1."),
        ("37 / 24", "-37 / 24", "The third of four weights is +37/24: the signs alternate, and the weights sum to 1."),
        ("weights = table[len(old_eps)]",
         "weights = table[4] if len(old_eps) == 4 else (1.0,) + (0.0,) * (len(old_eps) - 1)",
         "With fewer than four ε yours takes the newest one alone: two and three of them have weights of their own."),
        ("", "return (55 * old_eps[0] - 59 * old_eps[1] + 37 * old_eps[2] - 9 * old_eps[3]) / 24",
         "You always take four ε: at the first steps there are fewer, each with a formula of its own."),
        ("4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)", "4: (55 / 24, 59 / 24, 37 / 24, 9 / 24)",
         "The minus signs of the four weights are missing: +55, -59, +37, -9."),
        ("",
         "weights = {1: (1,), 2: (3, -1), 3: (23, -16, 5), 4: (55, -59, 37, -9)}[len(old_eps)]\nreturn sum(w * e for"
         " w, e in zip(weights, old_eps, strict=True))",
         "The sums are not divided, by 2, 12 and 24: the weights have to sum to 1."),
    ],
    linear=("old_eps",),
    swap=_put_plms,
)  # fmt: skip
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


def _put_guidance(f):
    real = sampling.classifier_free_guidance

    def classifier_free_guidance(model, context, uncond_context, scale):
        def eps_model(x, t):
            if scale == 1.0:
                return model(x, t, context.expand(len(x), *context.shape[1:]))
            _, cond, uncond = real(model, context, uncond_context, scale)(x, t)
            return Guided(f(uncond, cond, scale).to(x), cond, uncond)

        return eps_model

    return _everywhere(classifier_free_guidance)


def _everywhere(guidance):
    return [(module, "classifier_free_guidance", guidance) for module in (sampling, latent_diffusion)]


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "scale 7.5": {"eps_uncond": latents(), "eps_cond": latents(), "scale": 7.5},
        "scale 3, one picture": {"eps_uncond": latents(1), "eps_cond": latents(1), "scale": 3.0},
        "scale 1": {"eps_uncond": latents(3), "eps_cond": latents(3), "scale": 1.0},
        "scale 0": {"eps_uncond": latents(), "eps_cond": latents(), "scale": 0.0},
    },
    hints=(
        "What does the prompt change? Exaggerate that.",
        "Scale 1 is the conditional answer, scale 0 the unconditional one.",
    ),
    mistakes=[
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "eps_cond + scale * (eps_uncond - eps_cond)",
         "Conditional and unconditional are exchanged: you walk away from the prompt. Scale 1 has to give eps_cond."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "eps_cond + scale * (eps_cond - eps_uncond)",
         "You start from eps_cond: that is the paper's weight w, which counts from 0. Here scale = 1 + w, and one"
         " starts from eps_uncond."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "scale * (eps_cond - eps_uncond)",
         "The eps_uncond that one starts from is missing."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "eps_uncond + scale * eps_cond",
         "It is the difference of the two that is scaled, not eps_cond alone."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "(eps_uncond + eps_cond) / 2",
         "You took the mean of both, and the scale is not used: guidance goes beyond eps_cond."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "eps_uncond + scale * (eps_cond + eps_uncond)",
         "You scaled the sum of the two: it is their difference, what the prompt changes."),
        ("return eps_uncond + scale * (eps_cond - eps_uncond)",
         "g = eps_uncond + scale * (eps_cond - eps_uncond)\nreturn g * eps_cond.std() / g.std()",
         "You rescaled the result to the deviation of eps_cond (as Lin et al. 2023 do): here it stays as it is."),
        ("return eps_uncond + scale * (eps_cond - eps_uncond)",
         "return eps_cond if scale <= 1 else eps_uncond + scale * (eps_cond - eps_uncond)",
         "You return eps_cond for every scale up to 1: scale 0 gives eps_uncond, and what lies between lies between."),
        ("return eps_uncond + scale * (eps_cond - eps_uncond)",
         "return eps_uncond if scale <= 1 else eps_uncond + scale * (eps_cond - eps_uncond)",
         "You return eps_uncond for every scale up to 1: scale 1 gives eps_cond."),
        ("eps_uncond + scale", "eps_uncond - scale",
         "A sign is wrong: one goes on from eps_uncond towards eps_cond, by scale (eps_cond - eps_uncond), not away"
         " from it."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "(1 + scale) * eps_cond + scale * eps_uncond",
         "A sign is wrong: the weight of eps_uncond is negative, since the two weights sum to 1."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "eps_uncond + (scale - 1) * (eps_cond - eps_uncond)",
         "Your scale is one too small: 1 has to give eps_cond, not eps_uncond."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "(eps_uncond + scale * eps_cond) / (1 + scale)",
         "You took a weighted mean: that lies between the two. Guidance goes beyond eps_cond."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "scale * eps_uncond + (eps_cond - eps_uncond)",
         "The scale multiplies the difference, not eps_uncond."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "scale * eps_cond",
         "eps_uncond does not come in: what the prompt changes is the difference of the two."),
        ("scale * (", "7.5 * (", "You wrote down the scale 7.5: it comes with the argument."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "eps_uncond + (eps_cond - eps_uncond) / scale",
         "You divided by the scale; it multiplies the difference."),
    ],
    linear=("eps_uncond", "eps_cond"),
    quantities=lambda scale, **_: {"scale": scale},
    swap=_put_guidance,
)  # fmt: skip
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
    """model(x, t, context): not linear, and each sample's answer hangs on all three arguments of that sample."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        if not len(x) == len(t) == len(context):
            sizes = f"{len(x)}, {len(t)} and {len(context)}"
            raise RuntimeError(f"x, t and context must have the same batch size, not {sizes}")
        told = (context * torch.arange(1, context[0].numel() + 1).view(context.shape[1:])).flatten(1).mean(1)
        return torch.tanh(x + 0.1 * t.view(-1, 1, 1, 1) + told.view(-1, 1, 1, 1))


def _put_guided_eps(f):
    def classifier_free_guidance(model, context, uncond_context, scale):
        def eps_model(x, t):
            both = [c.expand(len(x), *c.shape[1:]) for c in (context, uncond_context)]
            return f(model, x, t, *both, scale).to(x)

        return eps_model

    return _everywhere(classifier_free_guidance)


@exercise(
    difficulty=3,
    minutes=15,
    cases=lambda: {
        "two pictures": {"model": ToyModel(), "x": latents(2), "t": torch.tensor([3, 7]),
                         "context": torch.randn(2, 5, 6),
                         "uncond_context": torch.randn(2, 5, 6), "scale": 4.0},
        "one picture": {"model": ToyModel(), "x": latents(1), "t": torch.tensor([5]), "context": torch.randn(1, 5, 6),
                        "uncond_context": torch.randn(1, 5, 6), "scale": 7.5},
        "three pictures, a small scale": {"model": ToyModel(), "x": latents(3), "t": torch.tensor([1, 9, 4]),
                                          "context": torch.randn(3, 4, 6),
                                          "uncond_context": torch.randn(3, 4, 6), "scale": 0.5},
    },
    hints=(
        "Put both questions into one batch of 2b: x twice, t twice, both contexts.",
        "`torch.cat` along the first axis; `.chunk(2)` takes the answer apart again, in the same order.",
    ),
    mistakes=[
        ("[uncond_context, context]", "[context, uncond_context]",
         "The two halves come back in the order in which they went in: you put the prompt first and read the"
         " unconditional answer first."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "eps_cond + scale * (eps_cond - eps_uncond)",
         "You start from eps_cond: one starts from eps_uncond, so that scale 1 gives eps_cond."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "scale * (eps_cond - eps_uncond)",
         "The eps_uncond that one starts from is missing."),
        ("", "return model(x, t, uncond_context + scale * (context - uncond_context))",
         "You mixed the contexts: the model is not linear in them. It is its two answers that are mixed."),
        ("torch.cat([x, x])", "torch.cat([x, torch.zeros_like(x)])",
         "Both questions are about the same x: put it in twice."),
        ("torch.cat([t, t])", "torch.cat([t, 0 * t])", "Both questions are about the same t: put it in twice."),
        ("torch.cat([x, x])", "torch.cat([x, torch.randn_like(x)])",
         "Both questions are about the same x: the second half of yours is something else."),
        ("chunk(2)", "chunk(2, dim=1)", "The halves lie along the batch, axis 0: you cut the channels."),
        (".chunk(2)", ".unflatten(0, (-1, 2)).unbind(1)",
         "The batch is [all unconditional, all conditional]; you read it as pairs, one picture after the other."),
        ("torch.cat([x, x])", "x.repeat_interleave(2, dim=0)",
         "x is repeated in pairs, a a b b, while the contexts come as two halves: `torch.cat([x, x])`."),
        ("torch.cat([t, t])", "t.repeat_interleave(2)",
         "t is repeated in pairs, a a b b, while the contexts come as two halves: `torch.cat([t, t])`."),
        ("torch.cat([x, x]), torch.cat([t, t])", "x.repeat_interleave(2, dim=0), t.repeat_interleave(2)",
         "x and t are repeated in pairs, a a b b, while the contexts come as two halves: `torch.cat([x, x])`, or"
         " x.repeat(2, 1, 1, 1)."),
        ("[uncond_context, context]", "[context, context]",
         "Guidance does nothing, you have the conditional answer: were both halves asked with the prompt, so that"
         " their difference is 0?"),
        ("", "u, c = model(torch.cat([x, x]), torch.cat([t, t]), torch.cat([uncond_context, context])).chunk(2)"
         "\nreturn u + scale * (scale * c - u)",
         "The scale multiplies eps_cond once more, inside of the parentheses: scale (ε_cond - ε_uncond)."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "eps_uncond + scale * eps_cond",
         "It is the difference of the two answers that is scaled, not eps_cond alone."),
        ("", "return scale * model(x, t, context)",
         "You scaled the conditional answer: it is its difference from the unconditional one that is scaled."),
        ("return eps_uncond + scale * (eps_cond - eps_uncond)", "return eps_uncond, eps_cond",
         "You returned both answers: mix them, ε_uncond + scale (ε_cond - ε_uncond)."),
        ("eps_uncond, eps_cond = model(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)",
         "out = model(torch.cat([x, x]), torch.cat([t, t]), contexts)\neps_uncond, eps_cond = out[:len(x) // 2],"
         " out[len(x) // 2:]",
         "You cut the answer at len(x) // 2: it has 2b entries, so that the halves meet at len(x)."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "eps_uncond + (scale - 1) * (eps_cond - eps_uncond)",
         "Your scale is one too small: 1 has to give the conditional answer."),
        ("[uncond_context, context]", "[uncond_context, uncond_context]", "Both halves were asked without the prompt."),
        ("[uncond_context, context]", "[torch.zeros_like(context), context]",
         "The unconditional half got zeros: it is asked with uncond_context, that of the empty prompt."),
        ("eps_uncond + scale * (eps_cond - eps_uncond)", "(eps_cond + eps_uncond) / 2",
         "You took the mean of both answers: guidance goes beyond eps_cond, by the scale."),
    ],
    swap=_put_guided_eps,
)  # fmt: skip
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


def _put_dpmpp(f):
    def step(x_t, x0, a_t, a_prev, past, i, path, **_):
        if i == 0 or a_prev == 1 or (i == len(path) - 1 and len(path) < 15):  # first order: minisd's own
            h = sampling._lambda(a_prev) - sampling._lambda(a_t)
            x = math.sqrt((1 - a_prev) / (1 - a_t)) * x_t - math.sqrt(a_prev) * math.expm1(-h) * x0
        else:
            x0_old, a_old = past[0]
            x = f(x_t, x0, x0_old, a_old, a_t, a_prev)
        past[:] = [(x0, a_t)]
        return x

    return put_sampler("dpmpp_2m", step, spacing="trailing", ends_at_one=True)


@exercise(
    difficulty=5,
    minutes=30,
    cases=lambda: {
        "a step in the middle": {"x_t": latents(), "x0": latents(), "x0_old": latents(), "a_old": 0.1, "a_t": 0.3,
                                 "a_prev": 0.6},
        "a small step after a large one": {"x_t": latents(1), "x0": latents(1), "x0_old": latents(1), "a_old": 0.2,
                                           "a_t": 0.8, "a_prev": 0.85},
        "a large step after a small one": {"x_t": latents(3, 4, 4), "x0": latents(3, 4, 4), "x0_old": latents(3, 4, 4),
                                           "a_old": 0.28, "a_t": 0.3, "a_prev": 0.9},
    },
    hints=(
        "Write a small function for λ(ᾱ) = ½ log(ᾱ / (1-ᾱ)). Then h = λ_prev - λ_t and h_old = λ_t - λ_old.",
        "D lies on the line through the last two x_0, half a step further on: D = x_0 + h / (2 h_old) (x_0 - x_0^old).",
        "e^(-h) - 1 is negative, so that the minus before it makes D's weight positive.",
    ),
    mistakes=[
        ("math.log(a / (1 - a)) / 2", "math.log(a / (1 - a))",
         "λ is half the log of the signal-to-noise ratio: log(√ᾱ / √(1-ᾱ)), with the roots."),
        ("math.log(a / (1 - a)) / 2", "math.log((1 - a) / a) / 2",
         "The sign of h is wrong: h = λ_prev - λ_t with λ = log(α/σ), signal by noise, which grows towards the"
         " picture, and it is e^(-h) - 1."),
        ("math.log(a / (1 - a)) / 2", "math.log(a / (1 - a) ** 0.5)",
         "In λ = log(α/σ), α is √ᾱ: its root is missing."),
        ("math.log(a / (1 - a)) / 2", "math.log(a**0.5 / (1 - a))",
         "In λ = log(α/σ), σ is √(1-ᾱ): its root is missing."),
        ("math.log(a / (1 - a)) / 2", "math.log10(a / (1 - a)) / 2", "λ is a natural logarithm, log, not log10."),
        ("math.log(a / (1 - a)) / 2", "(a / (1 - a)) ** 0.5", "The logarithm is missing: λ = log(α/σ)."),
        ("h / (2 * h_old)", "h_old / (2 * h)",
         "The quotient is the wrong way round: r = h_old / h, and D = x_0 + 1/(2r) (x_0 - x_0^old)."),
        ("h / (2 * h_old)", "h / h_old",
         "The 2 is missing: D is the line's value half a step further on, not a whole one."),
        ("h / (2 * h_old)", "0.5", "You took both steps to be equally long: the factor is h / (2 h_old)."),
        ("* (x0 - x0_old)", "* (x0_old - x0)", "The line goes the wrong way: x_0 minus the older x_0."),
        ("x0 + h / (2 * h_old) * (x0 - x0_old)", "x0",
         "You left out the line through the last two x_0: that is DDIM, of first order."),
        ("x0 + h / (2 * h_old) * (x0 - x0_old)", "(x0 + x0_old) / 2",
         "You averaged the two x_0: the line goes on beyond the newer, not back to the older."),
        ("math.expm1(-h)", "math.exp(-h)", "The -1 is missing: e^(-h) - 1."),
        ("x_t - a_prev", "x_t + a_prev",
         "A plus for a minus: e^(-h) - 1 is negative, and D has to come in positively."),
        ("((1 - a_prev) / (1 - a_t)) ** 0.5", "((1 - a_prev) / (1 - a_t))",
         "The factor of x_t is σ_prev / σ_t, with σ = √(1-ᾱ): the root is missing."),
        ("((1 - a_prev) / (1 - a_t)) ** 0.5", "((1 - a_t) / (1 - a_prev)) ** 0.5",
         "The factor of x_t is the wrong way round: σ_prev / σ_t, less than 1."),
        ("((1 - a_prev) / (1 - a_t)) ** 0.5", "(a_prev / a_t) ** 0.5",
         "The factor of x_t is σ_prev / σ_t, the quotient of the noises, not that of the signals."),
        ("a_prev**0.5 * math", "a_prev * math", "The factor of D is α_prev = √ᾱ_prev: the root is missing."),
        ("a_prev**0.5 * math", "a_t**0.5 * math", "The factor of D is √ᾱ_prev, at the end of the step, not √ᾱ_t."),
        ("a_prev**0.5 * math", "math", "The factor √ᾱ_prev of D is missing."),
    ],
    linear=("x_t", "x0", "x0_old"),
    swap=_put_dpmpp,
)  # fmt: skip
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


def _put_euler(f):
    """ddim's way is Euler's method in x / √ᾱ over σ = √((1-ᾱ)/ᾱ): with the right step, the same picture."""

    def step(x_t, x0, a_t, a_prev, **_):
        sigma, sigma_next = (((1 - a) / a) ** 0.5 for a in (a_t, a_prev))
        return a_prev**0.5 * f(x_t / a_t**0.5, x0, sigma, sigma_next)

    return put_sampler("ddim", step)


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "from 3 to 2": {"x": latents(), "denoised": latents(), "sigma": 3.0, "sigma_next": 2.0},
        "one picture, a large step": {"x": latents(1), "denoised": latents(1), "sigma": 14.6, "sigma_next": 7.0},
        "the last step, to 0": {"x": latents(3, 4, 4), "denoised": latents(3, 4, 4), "sigma": 0.3, "sigma_next": 0.0},
    },
    hints=(
        "The slope dx/dσ is (x - denoised) / σ.",
        "Euler's method: x + slope · (σ_next - σ). The step is negative, since σ falls.",
    ),
    mistakes=[
        ("(x - denoised) / sigma", "(denoised - x) / sigma",
         "You go the wrong way, towards more noise: the slope is (x - denoised) / σ, and the step σ_next - σ, which"
         " is negative, since σ falls."),
        ("(x - denoised) / sigma", "(x - denoised)", "The slope is not divided by σ."),
        ("(x - denoised) / sigma", "(x - denoised) / sigma_next if sigma_next else 0 * x",
         "The slope is taken at the start of the step: divide by σ, not by σ_next."),
        ("(x - denoised) / sigma", "(x - denoised) / sigma**2",
         "You divided by σ²: that is the score, up to its sign. The slope dx/dσ is (x - denoised) / σ."),
        ("return x + slope", "return denoised + slope", "You started from `denoised`; the step goes on from x."),
        ("(x - denoised) / sigma\nreturn x + slope * (sigma_next - sigma)",
         "(x - denoised) / (sigma - sigma_next)\nreturn x - slope",
         "You divided by the step: the slope is divided by σ, and multiplied by the step σ_next - σ."),
        ("(sigma_next - sigma)", "sigma_next",
         "The slope is multiplied by the length of the step, σ_next - σ, not by σ_next."),
        ("return x + slope * (sigma_next - sigma)", "return slope",
         "You returned the slope: the step goes from x along it, x + slope (σ_next - σ)."),
        ("return x + slope * (sigma_next - sigma)", "return x + slope",
         "The slope is not multiplied by the step σ_next - σ."),
        ("return x + slope * (sigma_next - sigma)", "return denoised",
         "You went all the way to the denoised picture: a step goes from σ to σ_next only."),
        ("(x - denoised) / sigma", "denoised",
         "You took the network's picture for the slope, which is (x - denoised) / σ."),
        ("(sigma_next - sigma)", "(sigma_next**2 - sigma**2)", "The step is in σ, not in σ²."),
        ("(sigma_next - sigma)", "abs(sigma_next**2 - sigma**2) ** 0.5",
         "The step of an ODE is σ_next - σ; differences of squares under a root belong to noise that is added."),
        ("(x - denoised) / sigma", "(x - denoised) / (sigma_next or sigma)",
         "The slope is divided by σ, where the step begins, not by σ_next."),
        ("(x - denoised) / sigma", "(x - denoised) / sigma_next",
         "The slope is divided by σ, where the step begins, not by σ_next, which is 0 at the last step."),
        ("(x - denoised) / sigma", "denoised / sigma",
         "The slope is (x - denoised) / σ: you left x out."),
        ("(x - denoised) / sigma", "x / sigma - denoised",
         "Only x is divided by σ: the difference is. Parentheses!"),
        ("return x + slope * (sigma_next - sigma)", "return denoised + sigma_next * x",
         "You put x itself back as the noise: the noise in x is (x - denoised) / σ."),
    ],
    linear=("x", "denoised"),
    quantities=lambda sigma, sigma_next, **_: {"σ": sigma, "σ_next": sigma_next, "(σ_next/σ)": sigma_next / sigma},
    swap=_put_euler,
)  # fmt: skip
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


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "ten steps, strength 0.7": {"timesteps": list(range(91, 0, -10)), "strength": 0.7},
        "strength 1": {"timesteps": [80, 60, 40, 20, 0], "strength": 1.0},
        "twenty steps, strength 0.25": {"timesteps": list(range(951, 0, -50)), "strength": 0.25},
        "a strength that leaves a fraction": {"timesteps": [70, 60, 50, 40, 30, 20, 10], "strength": 0.5},
        "timesteps that are not evenly spread": {"timesteps": [900, 500, 400, 300, 20, 10], "strength": 0.5},
        "a strength that leaves less": {"timesteps": [70, 60, 50, 40, 30, 20, 10], "strength": 0.6},
    },
    hints=(
        "Strength 1 takes all the steps, strength 0.25 a quarter of them. Which quarter?",
        "Those of the end, where there is little noise: the picture is to be kept.",
        "n = int(strength * len(timesteps)); the last n.",
    ),
    mistakes=[
        ("timesteps[len(timesteps) - n :]", "timesteps[:n]",
         "You kept the first steps, with the most noise, and leave before the picture is done: the last ones are"
         " taken."),
        ("timesteps[len(timesteps) - n :]", "timesteps[n:]",
         "You left a part `strength` out and kept the rest: strength 1 takes all steps, 0.25 the last quarter."),
        ("timesteps[len(timesteps) - n :]", "timesteps[:len(timesteps) - n]",
         "You left the last ones out: a part `strength` of the steps is kept, and it is the last ones."),
        ("int(strength * len(timesteps))", "round(strength * len(timesteps) + 1e-9)",
         "You rounded to the nearest: int() rounds down, as in CompVis."),
        ("strength * len", "(1 - strength) * len",
         "Strength is the other way round: 1 forgets the picture and takes all steps, 0 keeps it and takes none."),
        ("timesteps[len(timesteps) - n :]", "timesteps[len(timesteps) - n - 1 :] if n < len(timesteps) else timesteps",
         "You take one step too many."),
        ("timesteps[len(timesteps) - n :]", "timesteps[len(timesteps) - n + 1 :]", "You take one step too few."),
        ("int(strength * len(timesteps))", "math.ceil(strength * len(timesteps))",
         "Half a step is left out, as in CompVis: int() rounds down."),
        ("timesteps[len(timesteps) - n :]", "timesteps[len(timesteps) - n :][::-1]",
         "The timesteps that remain still have to fall."),
        ("return timesteps[len(timesteps) - n :]", "return n",
         "You returned how many steps are left: the timesteps themselves are wanted."),
        ("return timesteps[len(timesteps) - n :]", "return timesteps[:: int(1 / strength)]",
         "You left out timesteps in between: the steps stay as close as they are, and the first ones are left out."),
        ("timesteps[len(timesteps) - n :]", "[t for t in timesteps if t <= strength * max(timesteps)]",
         "You compared timesteps with a part of the largest one (≤): what counts is the number of steps."),
        ("int(strength * len(timesteps))", "int(strength * timesteps[0])",
         "You take too many steps: int(strength * number of steps) of them. (A part of the largest timestep is more"
         " than there are.)"),
        ("strength * len(timesteps)", "strength * 50", "You wrote down 50 steps: count those that are given."),
        ("timesteps[len(timesteps) - n :]", "[t for t in timesteps if t < strength * max(timesteps)]",
         "You compared timesteps with a part of the largest one: what counts is the number of steps."),
        ("return timesteps[len(timesteps) - n :]", "return [t for t in timesteps if t <= 1000 * strength]",
         "You compared timesteps with 1000 · strength: what counts is the number of steps."),
        ("return timesteps[len(timesteps) - n :]",
         "return [timesteps[i * len(timesteps) // n] for i in range(n)] if n else []",
         "You thinned all timesteps out, and begin at pure noise: the last n are taken, each of them."),
    ],
    swap=lambda f: [(latent_diffusion, "remaining_timesteps", f)],
)  # fmt: skip
def img2img_timesteps(timesteps: list[int], strength: float) -> list[int]:
    """The timesteps that are left if one starts from a picture: a part `strength` of them, in (0, 1], the last ones.

    The picture is noised to the first timestep that is returned, and sampled from there. The number of steps is rounded
    down. (Meng et al. 2022, SDEdit; CompVis: scripts/img2img.py)
    """
    # BEGIN SOLUTION
    n = int(strength * len(timesteps))
    return timesteps[len(timesteps) - n :]
    # END SOLUTION


def _put_blend(f):
    def put_back(self, x_t, z, noise, mask, t):
        return f(x_t, z, noise, mask.bool(), self.schedule.alpha_bar(int(t[0]))).to(x_t)

    return [(latent_diffusion.LatentDiffusion, "_put_back", put_back)]


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "two pictures": {"x_t": latents(), "z_0": latents(), "noise": latents(), "mask": torch.rand(2, 1, 3, 5) > 0.5,
                         "a_t": 0.4},
        "one picture, little noise": {"x_t": latents(1), "z_0": latents(1), "noise": latents(1),
                                      "mask": torch.rand(1, 1, 3, 5) > 0.5, "a_t": 0.9},
        "square latents, much noise": {"x_t": latents(3, 4, 4), "z_0": latents(3, 4, 4), "noise": latents(3, 4, 4),
                                       "mask": torch.rand(3, 1, 4, 4) > 0.3, "a_t": 0.05},
    },
    hints=(
        "The known part has to be as noisy as x_t is: noise z_0 to ᾱ_t first.",
        "mask * a + (1 - mask) * b, or torch.where.",
    ),
    mistakes=[
        ("torch.where(mask, x_t, known)", "torch.where(mask, known, x_t)",
         "The mask is the wrong way round: where it is set, the picture is drawn anew, so x_t stays."),
        ("a_t**0.5 * z_0 + (1 - a_t) ** 0.5 * noise", "z_0",
         "The known part is clean, x_t is noisy: noise z_0 to the same level first, or the seam will show."),
        ("known = a_t**0.5 * z_0 + (1 - a_t) ** 0.5 * noise\nreturn torch.where(mask, x_t, known)",
         "return torch.where(mask, x_t, a_t**0.5 * z_0) + (1 - a_t) ** 0.5 * noise",
         "The noise is added to x_t as well: it belongs to the known part only."),
        ("known = a_t**0.5 * z_0 + (1 - a_t) ** 0.5 * noise\nreturn torch.where(mask, x_t, known)",
         "return a_t**0.5 * torch.where(mask, x_t, z_0) + (1 - a_t) ** 0.5 * noise",
         "You noised x_t once more: it is as noisy as it should be, and only z_0 is noised."),
        ("a_t**0.5 * z_0", "a_t * z_0", "z_0 is multiplied by √ᾱ_t: the root is missing."),
        ("(1 - a_t) ** 0.5 * noise", "(1 - a_t) * noise", "The noise is multiplied by √(1-ᾱ_t): the root is missing."),
        ("a_t**0.5 * z_0", "z_0", "z_0 is not shrunk by √ᾱ_t."),
        ("(1 - a_t) ** 0.5 * noise", "a_t**0.5 * noise", "The noise has the factor of z_0, √ᾱ_t: its own is √(1-ᾱ_t)."),
        ("(1 - a_t) ** 0.5 * noise", "noise", "The noise comes in at full strength: its factor √(1-ᾱ_t) is missing."),
        ("a_t**0.5 * z_0 + (1 - a_t) ** 0.5 * noise", "(1 - a_t) ** 0.5 * z_0 + a_t**0.5 * noise",
         "The factors of z_0 and of the noise are exchanged."),
        ("torch.where(mask, x_t, known)", "mask * x_t + mask * known",
         "Both are multiplied by the mask: the known part belongs where the mask is not set, 1 - mask."),
        ("torch.where(mask, x_t, known)", "known",
         "You returned the known picture everywhere: where the mask is set, x_t stays."),
        ("torch.where(mask, x_t, known)", "mask * x_t",
         "Outside the mask there is 0: there the known picture belongs."),
        ("torch.where(mask, x_t, known)", "mask * x_t + known",
         "The known part is added everywhere: it comes in only where the mask is not set."),
        ("torch.where(mask, x_t, known)", "(x_t + known) / 2",
         "You took the mean of both everywhere, and did not use the mask."),
        ("z_0 + (1", "z_0 - (1", "The noise is added to z_0, not subtracted."),
    ],
    swap=_put_blend,
)  # fmt: skip
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


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "twelve timesteps": {"alphas_cumprod": alphas_cumprod_of(12)},
        "five timesteps": {"alphas_cumprod": alphas_cumprod_of(5)},
    },
    hints=("Divide x_t by √ᾱ_t: what is now the factor of the noise?",),
    mistakes=[
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "(1 - alphas_cumprod).sqrt()",
         "This is the noise's size in x_t. Divided by √ᾱ_t, x is the picture itself plus more noise: √((1-ᾱ)/ᾱ)."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "(1 - alphas_cumprod) / alphas_cumprod",
         "You have σ²: the root is missing."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "(alphas_cumprod / (1 - alphas_cumprod)).sqrt()",
         "The quotient is the wrong way round: σ grows with t."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "(1 - alphas_cumprod).sqrt() / alphas_cumprod",
         "Both are under the root: √(1-ᾱ) / √ᾱ."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "(1 - alphas_cumprod) / alphas_cumprod.sqrt()",
         "Both are under the root; in yours the numerator is not."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "(1 / alphas_cumprod).sqrt()",
         "σ² is 1/ᾱ - 1; you left out the - 1."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "((1 - alphas_cumprod) / alphas_cumprod).sqrt().flip(0)",
         "Yours falls with t. (Samplers go through it backwards, but this table is by t.)"),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "((1 - alphas_cumprod) / alphas_cumprod).sqrt().max()",
         "You returned the largest σ: that of each t is wanted, the whole table."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "((1 - alphas_cumprod) / alphas_cumprod).log() / 2",
         "You returned log σ; wanted is σ."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()",
         "torch.cat([((1 - alphas_cumprod) / alphas_cumprod).sqrt(), torch.zeros(1)])",
         "There is a 0 too many at the end: samplers append it, but the table has T entries."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()",
         "(1 - alphas_cumprod.sqrt()) / alphas_cumprod.sqrt()",
         "It is the root of 1-ᾱ, not 1 minus the root of ᾱ."),
        ("((1 - alphas_cumprod) / alphas_cumprod).sqrt()", "alphas_cumprod.sqrt()",
         "This is √ᾱ_t, the factor of the picture in x_t: σ_t is the noise's, √(1-ᾱ_t), divided by it."),
    ],
    # The samplers ask for one σ at a time: the table is of one entry.
    swap=lambda f: [(sampling, "_sigma", lambda a: float(f(torch.tensor([a], dtype=torch.float64))[0]))],
)  # fmt: skip
def sigmas(alphas_cumprod: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """The noise of each timestep as Karras et al. count it: x_t / √ᾱ_t = x_0 + σ_t ε. Returns σ_t for all t."""
    # BEGIN SOLUTION
    return ((1 - alphas_cumprod) / alphas_cumprod).sqrt()
    # END SOLUTION
