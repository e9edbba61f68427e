"""Stage 6: from noise back to a picture, step by step.

    for step in ddim(eps_model, x_T, schedule, steps=50):
        step.x_t, step.eps, step.x0, step.x  # what went in, the noise in it, the picture behind it, what came out
    picture = step.x

The trained model only predicts the noise in x_t. A sampler is a rule that uses this prediction to compute a slightly
less noisy x. Everything else is the same for all samplers and is in one loop, `_walk`. The rules:

    ddpm              a small random step at each timestep of the training: the forward process, reversed
    ddim              the same step without the randomness, so that the steps can be long
    plms              ddim's step in a better direction: a polynomial through the last four ε
    dpmpp_2m          a straight line through the last two x̂_0, in a variable in which the equation is nearly linear
    euler             a straight line along ε, in a variable in which ε is the slope. Equal to ddim
    euler_ancestral   euler's line, but longer, and fresh noise afterwards. Equal to ddpm
    heun              euler's line along the mean of the slopes at its two ends: two calls of the model for each step

What every sampler takes and returns: eps_model(x, t) takes x [b *d] and t int64 [b], and returns ε [b *d] or
`Guided`. x_T is drawn from N(0, I). Each x has the scale of the forward process (none is divided by √ᾱ), so that
the trajectories of all samplers can be compared. Exactly `steps` steps are yielded, and the last `.x` is the result.

    steps             how many steps; None means one for each timestep of the schedule
    eta               how much of the noise is drawn afresh in each step, for the samplers that can
    spacing           which timesteps are visited: see `make_timesteps`
    set_alpha_to_one  whether the last step leads to the clean picture, ᾱ = 1, or only to ᾱ_0 (0.99915 in SD v1)
    timesteps         the timesteps themselves, in falling order, instead of `steps`; img2img starts at a smaller t
    before_step       (x, t) -> x, with t an int. It is called before each step and not after the last. Inpainting uses
                      it to put the known part of the picture into x
    generator         a torch.Generator of the CPU, or one for each picture, for the samplers that draw noise

A bad argument raises ValueError, and NaN or infinity from the model raises FloatingPointError. A sampler is a Python
generator, so nothing happens before the first step is asked for. The papers that the comments cite:

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

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial, wraps
from math import expm1, inf, isfinite, log, sqrt
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from minisd.noising import Generators, NoiseSchedule, randn

X = Float[Tensor, "b *d"]  # a batch of pictures, of latents, or of points on a line


class Guided(NamedTuple):
    """What a guided eps_model returns: the ε to use, and the two from which it was computed. Each [b *d]."""

    eps: X
    cond: X | None = None
    uncond: X | None = None


EpsModel = Callable[[X, Int[Tensor, "b"]], X | Guided]
Ask = Callable[[X], Guided]
Context = Tensor | Mapping[str, Tensor]  # [b n d], or such tensors by name: see classifier_free_guidance
BeforeStep = Callable[[X, int], X]
Timesteps = Sequence[int] | Int[Tensor, "steps"]


@dataclass(frozen=True, eq=False)
class Step:
    """One step of a sampler, from timestep t down to the next."""

    i: int  # 0, 1, ... steps-1
    t: int  # the timestep of x_t
    x_t: X  # the input of the step, after before_step
    eps: X  # the noise that the step removes (plms and heun combine several predictions of the model)
    x0: X  # x̂_0, the estimate of the picture from x_t and eps: blurred in the first steps
    x: X  # the output of the step: x_t of the next one, or the result
    eps_cond: X | None = None  # with guidance, the noise predicted with the prompt ...
    eps_uncond: X | None = None  # ... and without it


# -- which timesteps are visited ------------------------------------------------------------------------------


def make_timesteps(steps: int, T: int, spacing: str = "leading") -> list[int]:
    """Choose `steps` of the T timesteps, evenly spaced and in falling order. For 50 of 1000:

        "leading"    981 961 ... 21 1     CompVis. It starts at 981, although x_T is pure noise, which belongs to 999
        "linspace"   999 979 ... 20 0     Improved DDPM. Includes both ends
        "trailing"   999 979 ... 39 19    starts at the last timestep, and the last step is as long as the others

    If two libraries draw different pictures from one x_T, they often differ here, or in where the last step leads
    (`set_alpha_to_one`). Raises ValueError if steps is not in [1, T] or the spacing is none of these.
    """
    if not 1 <= steps <= T:
        raise ValueError(f"steps must lie between 1 and {T}, the schedule's timesteps, but it is {steps}.")
    if spacing == "leading":
        # CompVis takes every (T // steps)-th timestep and adds 1. For 30 steps this gives 31, and for 1000 steps it
        # includes t = 1000, which does not exist. Here you get the number that you asked for, and the same
        # timesteps as CompVis whenever steps divides T.
        rising = [i * T // steps + (1 if steps < T else 0) for i in range(steps)]
    elif spacing == "linspace":
        rising = [round(i * (T - 1) / (steps - 1)) for i in range(steps)] if steps > 1 else [T - 1]
    elif spacing == "trailing":
        rising = [round((i + 1) * T / steps) - 1 for i in range(steps)]
    else:
        raise ValueError(f'spacing must be "leading", "linspace" or "trailing", but it is "{spacing}".')
    return rising[::-1]


def remaining_timesteps(timesteps: list[int], strength: float) -> list[int]:
    """The timesteps that are left if you start from a picture: the last int(strength · steps) of them (SDEdit).

    Raises ValueError if strength is not in (0, 1], or so small that no step is left. (CompVis: scripts/img2img.py)
    """
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, but it is {strength}")
    steps = len(timesteps)
    left = int(strength * steps)  # rounded down, as in CompVis: 37 of 50 at strength 0.75
    if left == 0:
        raise ValueError(f"at strength {strength}, none of {steps} steps is made: raise one of them")
    return timesteps[-left:]


# -- the loop, which all samplers share -----------------------------------------------------------------------

# The loop calls rule(x_t, eps, a_t, a_prev), and adds those of the following that the rule has as parameters. (See
# `sampler`, below.)
OFFERED = ("eta", "noise", "past", "ask", "i", "steps")
# A rule returns x_prev, the x̂_0 that the step aims at, and the ε that it uses. It may also return x_prev alone. Then
# ε is the model's prediction, and x̂_0 is computed from it.
Rule = Callable[..., X | tuple[X, X, X]]


def _walk(
    name: str,
    rule: Rule,
    eps_model: EpsModel,
    x_T: X,
    schedule: NoiseSchedule,
    steps: int | None = None,
    eta: float = 0.0,
    *,
    spacing: str = "leading",
    set_alpha_to_one: bool = True,
    timesteps: Timesteps | None = None,
    before_step: BeforeStep | None = None,
    generator: Generators | None = None,
    **options: object,
) -> Iterator[Step]:
    """Go through the timesteps from x_T to the picture. The rule computes each step."""
    takes = _taken_from_the_loop(rule)
    _check_eta(name, eta, takes)
    # The last step leads to the clean picture, ᾱ = 1, or to the lowest noise level of the training, ᾱ_0.
    path = _path(schedule, steps, spacing, timesteps, 1.0 if set_alpha_to_one else schedule.alpha_bar(0))
    x, no_noise = x_T, torch.zeros_like(x_T)
    offered = {"eta": eta, "past": [], "steps": len(path)}

    for i, t, a_t, a_prev in path:
        # Inpainting puts the known part of the picture into x here, as noisy as x is at this timestep.
        x_t = before_step(x, t) if before_step else x

        # The model predicts the noise in x_t. This call takes nearly all of the time. `no_grad` is only around the call
        # and not around the loop, because after a yield it would also hold in the caller's code.
        with torch.no_grad():
            answer = eps_model(x_t, _batch_of(t, x_t))
        eps, eps_cond, eps_uncond = _checked(answer, x_t, i, t)

        # What else the rule may need. A second call of the model in this step (`ask`) is at the timestep of the next
        # step. (The last step has no next one, and uses its own timestep.)
        t_next = path[min(i + 1, len(path) - 1)][1]
        offered |= {"i": i, "ask": partial(_ask_again, eps_model, i=i, t=t_next), "noise": no_noise}
        # Noise is drawn only if the step needs it. A step to the clean picture, ᾱ_prev = 1, does not need any, and
        # neither does a step from t = 0 to ᾱ_0, which does not change the noise level.
        if "noise" in takes and a_t < a_prev < 1 and (eta > 0 or "eta" not in takes):
            dtype = torch.result_type(x_t, eps)  # noise is added to a sum of x_t and ε
            offered["noise"] = randn(x_t.shape, generator).to(x_t.device, dtype, non_blocking=True)

        # The rule computes the step. A rule that returns x_prev alone may be your first one, so its shape is checked.
        made = rule(x_t, eps, a_t, a_prev, **{name: offered[name] for name in takes}, **options)
        if not isinstance(made, tuple):
            if getattr(made, "shape", None) != x_t.shape:
                shapes = f"{list(x_t.shape)}, but it returned {list(made.shape) if isinstance(made, Tensor) else made}"
                raise ValueError(f"The rule of {name} must return x_prev with the shape of x_t, {shapes}.")
            made = made, predict_x0(x_t, eps, a_t), eps
        x, x0, eps = made
        yield Step(i, t, x_t, eps, x0, x, eps_cond, eps_uncond)


def _path(
    schedule: NoiseSchedule, steps: int | None, spacing: str, timesteps: Timesteps | None, a_end: float
) -> list[tuple[int, int, float, float]]:
    """For each step: its number i, its t, ᾱ_t, and ᾱ_prev, where it leads. The last step leads to a_end.

    All of them are Python numbers, ᾱ with the precision of float64. If they were in a tensor on a GPU, the CPU could
    only read them after the GPU had finished all work before them, so it would wait at each step.
    """
    if timesteps is None:
        T = schedule.timesteps
        timesteps = make_timesteps(T if steps is None else steps, T, spacing)
    timesteps = [int(t) for t in timesteps]
    if not timesteps or any(t <= t_next for t, t_next in zip(timesteps, timesteps[1:], strict=False)):
        raise ValueError(f"timesteps must be one or more falling numbers, but they are {timesteps}.")
    alphas = [schedule.alpha_bar(t) for t in timesteps]
    return list(zip(range(len(timesteps)), timesteps, alphas, [*alphas[1:], a_end], strict=True))


@torch.no_grad()
def _ask_again(eps_model: EpsModel, x: X, i: int, t: int) -> Guided:
    """Call the model again, for a rule that needs the noise in another x as well."""
    return _checked(eps_model(x, _batch_of(t, x)), x, i, t)


def _batch_of(t: int, x: X) -> Int[Tensor, "b"]:
    """The timestep, repeated for each picture, on the device of the pictures."""
    return torch.full((x.shape[0],), t, device=x.device)


def _checked(answer: Tensor | Guided, x_t: X, i: int, t: int) -> Guided:
    """The model's prediction, after a check of its shape and for NaN and infinity."""
    guided = answer if isinstance(answer, Guided) else Guided(answer)
    if guided.eps.shape != x_t.shape:
        shapes = f"{list(x_t.shape)}, not {list(guided.eps.shape)}"
        raise ValueError(f"eps_model must return an ε with the shape of x, {shapes}.")
    # If any number is NaN, the maximum is NaN. (On a CPU, this is several times faster than .isfinite().all().) The CPU
    # has to wait for the GPU here, once for each call of the model, and nowhere else.
    if not isfinite(guided.eps.abs().max()):
        raise FloatingPointError(f"The model returned NaN or infinity at step {i}, t = {t}.")
    return guided


def predict_x0(x_t: X, eps: X, a_t: float) -> X:
    """The estimate x̂_0 of the picture, given the noise in x_t: x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, solved for x_0."""
    # x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t                                               (DDPM, eq. 15; DDIM, eq. 9)
    return (x_t - sqrt(1 - a_t) * eps) / sqrt(a_t)


# -- how a rule becomes a sampler -----------------------------------------------------------------------------


# What `@sampler` makes from a rule: a function with the attributes .steps, .eta, .spacing and .set_alpha_to_one, which
# are the defaults of its arguments, and .rule. If you assign another rule to .rule, the sampler uses that one.
Sampler = Callable[..., Iterator[Step]]
SAMPLERS: dict[str, Sampler] = {}  # by name, in the order of this file


def sampler(
    *, steps: int | None, spacing: str, eta: float | None = 0.0, set_alpha_to_one: bool | None = None
) -> Callable[[Rule], Sampler]:
    """Decorator that makes a sampler from a rule, and adds it to `SAMPLERS`. This is a complete sampler:

        @sampler(steps=50, spacing="leading")
        def my_ddim(x_t, eps, a_t, a_prev):
            return sqrt(a_prev) * predict_x0(x_t, eps, a_t) + sqrt(1 - a_prev) * eps

    steps, spacing, eta, set_alpha_to_one: the defaults. Without eta or set_alpha_to_one (None), the sampler has no
    such argument, and the last step leads to ᾱ = 1. If the rule has no parameter eta, the only eta allowed is 0.

    The first four parameters of a rule are always these:

        x_t, eps      the noisy x, and the noise ε that the model predicts for it, [b *d]
        a_t, a_prev   ᾱ_t, and the ᾱ_prev to which the step leads. They are Python numbers, not tensors

    After them, a rule can have any of these parameters:

        eta           how much of the noise is to be drawn afresh
        noise         z ~ N(0, I), [b *d]. If the step does not need noise, none is drawn, and this is 0
        past          a list, empty at first. What the rule puts into it is kept for the next steps
        ask           x -> Guided. It calls the model once more, for an x at the timestep of the next step
        i, steps      the number of the step, 0, 1, ... steps-1, and how many there are

    Parameters after a `*` are the rule's own options, and become arguments of the sampler. `txt2img` does not have them
    among its own arguments, so pass it the sampler with the option in it: `sampler=functools.partial(mine, option=2)`.

    A rule returns x_prev, the x̂_0 that the step aims at, and the ε that it uses; or x_prev alone. Its docstring becomes
    that of the sampler.
    """
    defaults = {"steps": steps, "eta": eta, "spacing": spacing, "set_alpha_to_one": set_alpha_to_one}
    absent = {name for name in ("eta", "set_alpha_to_one") if defaults[name] is None}
    used = {name: value for name, value in defaults.items() if name not in absent}

    def enter(rule: Rule) -> Sampler:
        # The arguments of the sampler are those of the loop, with these defaults, and the rule's own options.
        _taken_from_the_loop(rule)
        arguments = inspect.signature(_walk).parameters.values()
        arguments = [p for p in arguments if p.name not in {"name", "rule", "options", *absent}]
        arguments = [p.replace(default=used.get(p.name, p.default)) for p in arguments]
        arguments += [p for p in inspect.signature(rule).parameters.values() if p.kind is p.KEYWORD_ONLY]
        signature = inspect.Signature(arguments, return_annotation=Iterator[Step])

        @wraps(rule, assigned=["__module__", "__name__", "__qualname__", "__doc__"])
        def sample(*args, **named):
            # A wrong argument raises an error now, and not only when the first step is asked for.
            try:
                given = signature.bind(*args, **named).arguments
            except TypeError as error:
                raise TypeError(f"{rule.__name__}: {error}. It takes {', '.join(signature.parameters)}.") from None
            return _walk(rule.__name__, sample.rule, **(used | given))

        sample.__signature__ = signature
        sample.__annotations__ = {p.name: p.annotation for p in arguments}
        vars(sample).update(defaults, rule=rule)
        SAMPLERS[rule.__name__] = sample
        return sample

    return enter


@cache
def _taken_from_the_loop(rule: Rule) -> list[str]:
    """The rule's parameters after the first four, x_t, eps, a_t and a_prev, and before a `*`."""
    parameters = inspect.signature(rule).parameters.values()
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)][4:]
    if unknown := [name for name in names if name not in OFFERED]:
        raise ValueError(
            f"After x_t, eps, a_t and a_prev, a rule may name {', '.join(OFFERED)}, but not {', '.join(unknown)}."
            " An option of its own has to stand after a *, with a default."
        )
    return names


def _check_eta(name: str, eta: float, takes: list[str]) -> None:
    if "eta" in takes and not 0 <= eta <= 1:
        raise ValueError(f"eta must lie between 0 (no fresh noise) and 1 (as in ddpm), but it is {eta}.")
    if "eta" not in takes and eta != 0:
        able = " and ".join(other for other, made in SAMPLERS.items() if "eta" in _taken_from_the_loop(made.rule))
        raise ValueError(f"{name} draws no noise, so eta must be 0, but it is {eta}; {able} take an eta.")


# -- the rules ------------------------------------------------------------------------------------------------


@sampler(steps=None, eta=None, spacing="linspace")
def ddpm(x_t: X, eps: X, a_t: float, a_prev: float, noise: X, *, clip_denoised: bool = False) -> tuple[X, X, X]:
    """Ancestral sampling (DDPM, Algorithm 2): estimate x_0, then draw x_prev from q(x_prev | x_t, x_0).

    steps: all T by default. Fewer steps are DDPM on a schedule of fewer, longer steps (Improved DDPM, section 4).
    clip_denoised: clamp the estimate to [-1, 1]. This suits pixels, but not latents, which have no such bound.
    (CompVis: ldm/models/diffusion/ddpm.py, DDPM.p_sample_loop)
    """
    # The model's estimate of the picture. At first it is blurred: the mean of all pictures that x_t may come from.
    x0 = predict_x0(x_t, eps, a_t)
    if clip_denoised:
        x0 = x0.clamp(-1, 1)
    # How much noise the forward process adds in this step. It is the schedule's own β_t if no timestep is left out.
    # β_t = 1 - ᾱ_t / ᾱ_prev                                                             (Improved DDPM, eq. 19)
    beta = 1 - a_t / a_prev
    # If x_0 is known, the reverse step is Gaussian, q(x_prev | x_t, x_0). We use x̂_0 in place of x_0. The mean:
    # μ̃_t = √ᾱ_prev β_t / (1-ᾱ_t) x̂_0  +  √(1-β_t) (1-ᾱ_prev) / (1-ᾱ_t) x_t                        (DDPM, eq. 7)
    mean = sqrt(a_prev) * beta / (1 - a_t) * x0 + sqrt(1 - beta) * (1 - a_prev) / (1 - a_t) * x_t
    # The variance. It is 0 in the last step, which leads to ᾱ = 1, so no noise is left in the picture:
    # β̃_t = (1-ᾱ_prev) / (1-ᾱ_t) β_t                                                               (DDPM, eq. 7)
    variance = (1 - a_prev) / (1 - a_t) * beta
    # x_prev = μ̃_t + √β̃_t z, with z ~ N(0, I)                                                (DDPM, Algorithm 2)
    x_prev = mean
    if variance > 0:
        x_prev = mean + sqrt(variance) * noise
    return x_prev, x0, eps


@sampler(steps=50, eta=0.0, spacing="leading", set_alpha_to_one=False)
def ddim(x_t: X, eps: X, a_t: float, a_prev: float, eta: float, noise: X) -> tuple[X, X, X]:
    """The implicit model (DDIM, eq. 12): estimate x_0, then add back less of the same noise.

    eta: how much of the noise is drawn afresh. With 0, x_T alone determines the picture; 1 is as much as in ddpm.
    set_alpha_to_one: whether the last step leads to the clean picture, ᾱ = 1, or only to ᾱ_0 (0.99915). The latter is
    what CompVis does, and leaves a little noise. (CompVis: ldm/models/diffusion/ddim.py, DDIMSampler)
    """
    # The paper writes α for what all other papers call ᾱ.
    x0 = predict_x0(x_t, eps, a_t)
    # The standard deviation of the fresh noise. For η = 1 it is that of ddpm, √β̃_t.
    # σ_t = η √((1-ᾱ_prev) / (1-ᾱ_t)) √(1 - ᾱ_t / ᾱ_prev)                                         (DDIM, eq. 16)
    sigma_t = eta * sqrt((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev))
    # All noise in x_prev together must have the variance 1 - ᾱ_prev. σ_t² of it is fresh, the rest is the old ε.
    # x_prev = √ᾱ_prev x̂_0 + √(1 - ᾱ_prev - σ_t²) ε + σ_t z                                       (DDIM, eq. 12)
    x_prev = sqrt(a_prev) * x0 + sqrt(1 - a_prev - sigma_t**2) * eps
    if sigma_t > 0:
        x_prev = x_prev + sigma_t * noise
    return x_prev, x0, eps


# The weights of the last 2, 3 or 4 values of ε, the newest first. The weighted sum is the mean over the coming step of
# the polynomial through these values, if all steps are equally long.
ADAMS_BASHFORTH = {
    2: (3 / 2, -1 / 2),
    3: (23 / 12, -16 / 12, 5 / 12),
    4: (55 / 24, -59 / 24, 37 / 24, -9 / 24),
}


def plms_combine(old_eps: list[X]) -> X:
    """The ε for the coming step, a combination of the last 2, 3 or 4 values of ε, the newest first."""
    # ε' = (55 ε_t - 59 ε_{t+1} + 37 ε_{t+2} - 9 ε_{t+3}) / 24, or a shorter form                 (PNDM, eq. 12)
    w_t, *weights = ADAMS_BASHFORTH[len(old_eps)]
    eps = w_t * old_eps[0]
    for w, e in zip(weights, old_eps[1:], strict=True):
        eps = eps.add(e, alpha=w)  # eps + w e, in one pass over memory
    return eps


@sampler(steps=50, spacing="leading", set_alpha_to_one=False)
def plms(x_t: X, eps: X, a_t: float, a_prev: float, past: list[X], ask: Ask) -> tuple[X, X, X]:
    """Pseudo linear multi-step (PNDM, Algorithm 2): ddim's step along an ε that is combined from the last four.

    A linear multi-step method (Adams-Bashforth) combines slopes in this way and follows a straight line. "Pseudo"
    means that the combined ε is used in ddim's step instead. The first step has no earlier ε and calls the model
    twice, which makes steps + 1 calls. (The paper starts with three Runge-Kutta steps of four calls each.)
    eta must be 0; set_alpha_to_one: see `ddim`. (CompVis: ldm/models/diffusion/plms.py, PLMSSampler)
    """
    past[:] = [eps, *past[:3]]
    if len(past) == 1:
        # Improved Euler: make the step, predict the noise there, go back, and make the step along the mean of both.
        x_next, _ = _transfer(x_t, eps, a_t, a_prev)
        eps = (eps + ask(x_next).eps) / 2
    else:
        eps = plms_combine(past)
    x_prev, x0 = _transfer(x_t, eps, a_t, a_prev)
    return x_prev, x0, eps


def _transfer(x_t: X, eps: X, a_t: float, a_prev: float) -> tuple[X, X]:
    """ddim's step without fresh noise for any ε, and the x̂_0 that it aims at (PNDM, eq. 9)."""
    x0 = predict_x0(x_t, eps, a_t)
    return sqrt(a_prev) * x0 + sqrt(1 - a_prev) * eps, x0


@sampler(steps=25, spacing="trailing", set_alpha_to_one=True)
def dpmpp_2m(
    x_t: X, eps: X, a_t: float, a_prev: float, past: list, i: int, steps: int, *, lower_order_final: bool = True
) -> tuple[X, X, X]:
    """DPM-Solver++(2M), of second order with one call of the model for each step (DPM-Solver++, Algorithm 2).

    With α = √ᾱ, σ = √(1-ᾱ) and λ = log(α/σ), the step to the next timestep is known exactly, except for an integral
    of x̂_0 over λ. ddim takes x̂_0 as constant in it. This sampler extrapolates the line through its last two values.
    set_alpha_to_one: whether the last step leads to the clean picture, λ = ∞, or to ᾱ_0 as in `ddim`.
    lower_order_final: whether the last step is of first order if there are fewer than 15 steps, because it is long.
    On small data sets, with 10 to 25 steps, no other defaults came clearly closer to the exact solution.
    eta must be 0. (CompVis: ldm/models/diffusion/dpm_solver/, DPMSolverSampler, with fractional timesteps)
    """
    x0 = predict_x0(x_t, eps, a_t)
    # h = λ_prev - λ_t, the length of the step
    h = _lambda(a_prev) - _lambda(a_t)
    # First order, D = x̂_0, where extrapolation is not possible or not good: the first step has only one x̂_0, a step to
    # the clean picture would extrapolate to λ = ∞, and the last of a few long steps would extrapolate too far.
    D = x0
    is_long = lower_order_final and i == steps - 1 and steps < 15
    if past and a_prev < 1 and not is_long:
        # D = (1 + 1/2r) x̂_0 - 1/2r x̂_0^old, where r = h_old / h: the line, half a step further on
        x0_old, a_old = past
        h_old = _lambda(a_t) - _lambda(a_old)
        D = x0 + h / (2 * h_old) * (x0 - x0_old)
    past[:] = [x0, a_t]
    # x_prev = σ_prev / σ_t x_t - α_prev (e^(-h) - 1) D                               (DPM-Solver++, Algorithm 2)
    x_prev = sqrt((1 - a_prev) / (1 - a_t)) * x_t - sqrt(a_prev) * expm1(-h) * D
    return x_prev, x0, eps


def _lambda(a: float) -> float:
    """λ = log(√ᾱ / √(1-ᾱ)), half the logarithm of the signal-to-noise ratio."""
    return log(a / (1 - a)) / 2 if a < 1 else inf


# -- the same process without the scaling by √ᾱ: the samplers of k-diffusion ------------------------------------
#
# The forward process scales the picture down while it adds noise. If you undo the scaling, x̄ = x / √ᾱ, the result is
# the picture plus more and more noise. σ is the noise's standard deviation, and grows from 0 to 14.6 in SD v1:
#
#     x̄ = x_0 + σ ε,   σ = √(1-ᾱ) / √ᾱ,   x = √ᾱ x̄ = x̄ / √(1+σ²)                (EDM, eq. 4, where s(t) = √ᾱ_t)
#
# Noise turns into a picture along an ordinary differential equation, the probability flow (SDE, eq. 13). It has its
# simplest form for x̄:
#
#     dx̄/dσ = -σ ∇log p(x̄; σ) = (x̄ - x̂_0) / σ = ε           (EDM, eq. 1 and 3, where σ(t) = t; DDIM, eq. 14)
#
# So ε is the slope of the curve x̄(σ). The model predicts the slope, and the sampler follows the curve down to σ = 0. In
# the code, x.add(y, alpha=w) is x + w y, computed in one pass over memory.
#
# x_T ~ N(0, I) is a value of x, which has the variance of x_t, so x̄ starts as √(1+σ²) x_T. k-diffusion starts from
# σ x_T, as if there were no picture in it, and so does diffusers, except with "leading". To get the same pictures, pass
# √(1-ᾱ_t) x_T, which is smaller by 0.2% at t = 999. They also interpolate σ at fractional timesteps. Here t is always a
# timestep that the model was trained with.


@sampler(steps=50, spacing="linspace")
def euler(x_t: X, eps: X, a_t: float, a_prev: float) -> tuple[X, X, X]:
    """Euler's method: a straight line along ε, down to the next σ (DDIM, eq. 13; EDM, Algorithm 1).

    The same as ddim with set_alpha_to_one, but with other timesteps: ddim's step is this line, scaled by √ᾱ. The last
    step leads to σ = 0. eta must be 0. (k-diffusion: sample_euler; diffusers: EulerDiscreteScheduler)
    """
    sigma, sigma_prev = _sigma(a_t), _sigma(a_prev)
    x_bar = x_t / sqrt(a_t)
    # x̂_0 = x̄ - σ ε: where the line ends if it is followed down to σ = 0
    x0 = x_bar.add(eps, alpha=-sigma)
    # x̄_prev = x̄ + (σ_prev - σ) ε                                                                 (DDIM, eq. 13)
    x_prev = sqrt(a_prev) * x_bar.add(eps, alpha=sigma_prev - sigma)
    return x_prev, x0, eps


@sampler(steps=50, eta=1.0, spacing="linspace")
def euler_ancestral(x_t: X, eps: X, a_t: float, a_prev: float, eta: float, noise: X) -> tuple[X, X, X]:
    """euler's step to a lower noise level than σ_prev, then fresh noise up to σ_prev (SDE, appendix F).

    eta: how much of the noise is drawn afresh. 0 is euler. 1 is k-diffusion's default, and equals ddpm on the same
    timesteps. In between, it equals ddim with that eta and set_alpha_to_one. (EDM's stochastic sampler, Algorithm 2,
    is different: it adds noise before the step, so that x is noisier than before.)
    (k-diffusion: sample_euler_ancestral; diffusers: EulerAncestralDiscreteScheduler)
    """
    sigma, sigma_prev = _sigma(a_t), _sigma(a_prev)
    # The variances of independent noises add up: σ_prev² = σ_down² + σ_up². For η = 1, the fresh noise has the standard
    # deviation of q(x̄_prev | x̄, x_0):
    # σ_up = η √(σ_prev² (σ² - σ_prev²) / σ²)
    sigma_up = eta * sigma_prev * sqrt(1 - (sigma_prev / sigma) ** 2)
    sigma_down = sqrt(sigma_prev**2 - sigma_up**2)
    x_bar = x_t / sqrt(a_t)
    x0 = x_bar.add(eps, alpha=-sigma)
    # x̄_prev = x̄ + (σ_down - σ) ε + σ_up z, with z ~ N(0, I)
    x_bar = x_bar.add(eps, alpha=sigma_down - sigma)
    if sigma_up > 0:
        x_bar = x_bar.add(noise, alpha=sigma_up)
    return sqrt(a_prev) * x_bar, x0, eps


@sampler(steps=25, spacing="linspace")
def heun(x_t: X, eps: X, a_t: float, a_prev: float, ask: Ask) -> tuple[X, X, X]:
    """Heun's method, of second order (EDM, Algorithm 1): euler's step, repeated with a better slope.

    Each step calls the model twice: at its start, and at the end of euler's step with the timestep of the next step.
    The last step leads to σ = 0, where there is no noise to predict, so it remains euler's. This makes 2 · steps - 1
    calls. before_step is called before the first of the two. (plms begins with one such step.)
    With "trailing", the last step is as long as the others. It is euler's, so its error limits the whole result.
    eta must be 0. (k-diffusion: sample_heun; diffusers: HeunDiscreteScheduler, where each call is a step)
    """
    sigma, sigma_prev = _sigma(a_t), _sigma(a_prev)
    x_bar = x_t / sqrt(a_t)
    # euler's step: x̄_prev = x̄ + (σ_prev - σ) ε
    x_prev = sqrt(a_prev) * x_bar.add(eps, alpha=sigma_prev - sigma)
    if sigma_prev > 0:
        # ε' is the slope at the end of that line. Go back, and follow the mean of the two:
        # x̄_prev = x̄ + (σ_prev - σ) (ε + ε') / 2
        eps = (eps + ask(x_prev).eps) / 2
        x_prev = sqrt(a_prev) * x_bar.add(eps, alpha=sigma_prev - sigma)
    x0 = x_bar.add(eps, alpha=-sigma)
    return x_prev, x0, eps


def _sigma(a: float) -> float:
    """σ = √(1-ᾱ) / √ᾱ = e^(-λ), the standard deviation of the noise in x̄."""
    return sqrt((1 - a) / a)


# -- guidance -------------------------------------------------------------------------------------------------


def classifier_free_guidance(
    model: Callable[[Tensor, Tensor, Context], Tensor], context: Context, uncond_context: Context, scale: float
) -> EpsModel:
    """Make an eps_model(x, t) from model(x, t, context) that amplifies the effect of the context (CFG, eq. 6).

    context: the prompts, [b n d]; uncond_context: the empty prompt, or a negative one, [b n d] or [1 n d]. Or both are
    mappings of such tensors, {"c_crossattn": context, "c_concat": a map}, as `LatentDiffusion.apply_model` takes them.
    scale: 7.5 is Stable Diffusion's default. 1.0 is the conditional model without guidance. Then the unconditional ε
    is not computed, and ε is returned alone. The paper's weight w is 0 without guidance, so scale = 1 + w.
    (CompVis: ldm/models/diffusion/ddim.py, DDIMSampler.p_sample_ddim, unconditional_guidance_scale)
    """

    def eps_model(x: X, t: Int[Tensor, "b"]) -> X | Guided:
        if scale == 1.0:
            return model(x, t, _batched([context], len(x)))
        # One call of twice the batch is faster than two calls. The order is [unconditional, conditional].
        contexts = _batched([uncond_context, context], len(x))  # [2b n d]
        eps_uncond, eps_cond = model(torch.cat([x, x]), torch.cat([t, t]), contexts).chunk(2)
        # The difference is how the prompt changes the predicted noise. It is multiplied by s:
        # ε = ε(x_t) + s (ε(x_t, c) - ε(x_t))                                                          (CFG, eq. 6)
        return Guided(eps_uncond + scale * (eps_cond - eps_uncond), eps_cond, eps_uncond)

    return eps_model


def _batched(contexts: list[Context], count: int) -> Context:
    """Concatenate contexts, each expanded to `count` pictures. For mappings, do so for each of their entries."""
    if isinstance(contexts[0], Mapping):
        return {name: _batched([context[name] for context in contexts], count) for name in contexts[0]}
    return torch.cat([context.expand(count, *context.shape[1:]) for context in contexts])
