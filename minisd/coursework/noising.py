"""Exercises of stage 1: the forward process, and the step back that one could take if one knew the picture."""

import math  # noqa: F401  mistakes name it

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..noising import ExactDenoiser, NoiseSchedule
from .exercise import exercise

# --- what they are tried on: betas that differ much, so that no index and no root goes unnoticed ---------------------


def betas_of(timesteps: int) -> Float[Tensor, "T"]:
    return torch.linspace(0.04, 0.5, timesteps)


def alphas_cumprod_of(timesteps: int) -> Float[Tensor, "T"]:
    return torch.cumprod(1 - betas_of(timesteps), dim=0)


def pictures(b: int, h: int = 4, w: int = 5) -> Float[Tensor, "b 3 h w"]:
    return torch.randn(b, 3, h, w)


def timed(*names: str, schedule: str = "alphas_cumprod", ends: bool = True):
    """Cases for a function of pictures, of times and of a schedule. `names` in the order of the arguments."""

    def cases():
        stable = NoiseSchedule.scaled_linear()
        make = {"betas": betas_of, "alphas_cumprod": alphas_cumprod_of}[schedule]

        def case(t, values, h=4, w=5):
            t = torch.tensor(t)
            given = {"t": t, schedule: values}
            return {name: given[name] if name in given else pictures(len(t), h, w) for name in names}

        found = {
            "three pictures, 12 timesteps": case([3, 8, 5], make(12)),
            "one picture": case([6], make(12)),
            "as many pictures as columns": case([7, 2, 9, 4], make(12), h=3, w=4),
            "square pictures": case([1, 6], make(10), h=3, w=3),
            "Stable Diffusion's schedule": case([120, 900, 500], getattr(stable, schedule)),
        }
        return found | ({"the first and the last timestep": case([0, 11], make(12))} if ends else {})

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


# Mistakes that are made with every function of t.
NOT_RESHAPED = (
    ".reshape(-1, 1, 1, 1)",
    "",
    "The coefficients have the shape [b], and [b] times [b c h w] multiplies the columns of a picture, not the"
    " pictures: reshape them to [b 1 1 1]. (With as many pictures as columns it goes wrong without an error.)",
)
ON_CHANNELS = (
    ".reshape(-1, 1, 1, 1)",
    ".reshape(1, -1, 1, 1)",
    "The coefficients have the shape [1 b 1 1] and multiply the channels: the batch comes first, [b 1 1 1].",
)
FIRST_T = (
    "[t]",
    "[t[:1]]",
    "You use the first timestep for the whole batch, but each picture has its own t.",
)
MEAN_T = (
    "[t]",
    "[t].mean().expand(len(t))",
    "You took the mean over the batch, one coefficient for all: each picture has its own t.",
)
T_EARLY = (
    "[t]",
    "[(t - 1).clamp(min=0)]",
    "Your coefficients are those of t-1: the code counts t = 0 ... T-1, so that ᾱ_t is alphas_cumprod[t], with nothing"
    " to subtract.",
)
T_LATE = (
    "[t]",
    "[(t + 1).clamp(max=len(alphas_cumprod) - 1)]",
    "Your coefficients are those of t+1: the code counts t = 0 ... T-1, so that ᾱ_t is alphas_cumprod[t], with nothing"
    " to add.",
)


# --- the exercises ---------------------------------------------------------------------------------------------------


@exercise(
    difficulty=1,
    minutes=10,
    cases=lambda: {
        "Stable Diffusion's 1000 steps": {"beta_start": 0.00085, "beta_end": 0.012, "timesteps": 1000},
        "10 steps of other numbers": {"beta_start": 0.01, "beta_end": 0.3, "timesteps": 10},
        "7 steps": {"beta_start": 0.02, "beta_end": 0.5, "timesteps": 7},
    },
    hints=(
        "Which quantity grows linearly here: β, or √β?",
        "`torch.linspace(a, b, n)` gives n numbers from a to b, both ends among them.",
        "Take the roots of both ends, go from one to the other, and square what you get.",
    ),
    mistakes=[
        ("roots**2", "roots",
         "You returned √β: it is the root that grows linearly, and what is wanted is β. Square at the end."),
        ("beta_start**0.5, beta_end**0.5", "beta_start, beta_end",
         "You squared without taking roots first: from √β_start to √β_end, and then squared, so that the ends are"
         " β_start and β_end."),
        ("", "return torch.linspace(beta_start, beta_end, timesteps)",
         "This is DDPM's schedule, in which β grows linearly. In Stable Diffusion √β does, which leaves more of the"
         " picture at first."),
        ("timesteps)", "timesteps + 1)[:-1]",
         "Your steps are a little too short: from 0 to T-1 there are T-1 steps, and the last β is beta_end itself."),
        ("timesteps)", "timesteps + 1)[1:]", "Your first β is not beta_start: T numbers, both ends among them."),
        ("beta_start**0.5, beta_end**0.5", "beta_end**0.5, beta_start**0.5",
         "Your schedule runs backwards: β grows with t, since a step's noise should be small where the picture is"
         " still clear."),
        ("", "return torch.linspace(beta_start, beta_end, timesteps)**0.5",
         "You took the root of a linear schedule: first the roots of the ends, then linearly, then the square."),
        ("roots**2", "roots * 2", "You doubled the roots: square them."),
        ("roots**2", "1 - roots**2", "You returned α = 1 - β; wanted is β, the variance of the noise of each step."),
        ("", "return torch.logspace(math.log10(beta_start), math.log10(beta_end), timesteps)",
         "Your β grow by the same factor each step; in this schedule it is √β that grows by the same amount."),
        ("timesteps)", "1000)", "You wrote down 1000 timesteps: the number comes with the argument `timesteps`."),
        ("", "return beta_start + (beta_end - beta_start) * torch.linspace(0, 1, timesteps)**2",
         "You squared the time, and β grows from β_start by its square: it is √β that grows linearly."),
        ("",
         "s = 0.008\nangles = (torch.linspace(0, 1, timesteps + 1) + s) / (1 + s) * math.pi / 2\nbar = angles.cos()"
         " ** 2"
         "\nreturn (1 - bar[1:] / bar[:-1]).clamp(0, 0.999)",
         "This is the cosine schedule (Nichol & Dhariwal 2021): in Stable Diffusion √β grows linearly from √beta_start"
         " to √beta_end."),
        ("", "return torch.sigmoid(torch.linspace(-6, 6, timesteps)) * (beta_end - beta_start) + beta_start",
         "This is a sigmoid schedule: in Stable Diffusion √β grows linearly."),
        ("", "return torch.linspace(beta_start**0.5, beta_end**0.5, timesteps)**0.5",
         "You took a root where a square belongs: √β grows linearly, β is its square."),
        ("", "return torch.linspace(beta_start**2, beta_end**2, timesteps)**0.5",
         "Square and root are exchanged: first the roots of the ends, then the square of what lies between."),
        ("roots**2", "torch.cumprod(1 - roots**2, 0)", "You returned ᾱ, the product of all 1 - β; wanted is β itself."),
    ],
    swap=lambda f: [
        (NoiseSchedule, "scaled_linear",
         classmethod(lambda cls, beta_start=0.00085, beta_end=0.012,
                     timesteps=1000: cls(f(beta_start, beta_end, timesteps)))),
    ],
)  # fmt: skip
def scaled_linear_betas(beta_start: float, beta_end: float, timesteps: int) -> Float[Tensor, "T"]:
    """The noise of each step in Stable Diffusion: √β grows linearly from √beta_start to √beta_end.

    Returns the betas, `timesteps` of them; the first is beta_start and the last beta_end.
    """
    # BEGIN SOLUTION
    roots = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps)
    return roots**2
    # END SOLUTION


def _put_alphas_cumprod(f):
    real = NoiseSchedule.__init__

    def init(self, betas):
        # the step back to the betas that belong to the student's ᾱ
        bar = f(torch.as_tensor(betas).double()).double()
        real(self, (1 - bar / torch.cat([bar.new_ones(1), bar[:-1]])).clamp(1e-6, 1 - 1e-6))

    return [(NoiseSchedule, "__init__", init)]


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "12 betas": {"betas": betas_of(12)},
        "5 betas in no order": {"betas": torch.tensor([0.3, 0.1, 0.4, 0.2, 0.5])},
        "one beta": {"betas": torch.tensor([0.3])},
    },
    hints=(
        "Each step multiplies the picture's variance by α = 1 - β.",
        "What is left after t steps is the product of all α so far: there is a function for running products.",
    ),
    mistakes=[
        ("1 - betas", "betas", "You multiplied the β: what is left of the picture is the product of the α = 1 - β."),
        ("cumprod", "cumsum", "You added the α up: what is left after two steps is the product, α_1 α_2."),
        ("", "return 1 - torch.cumsum(betas, dim=0)",
         "You subtracted the sum of all β from 1. That is nearly right while they are small; the exact form is the"
         " product of all 1 - β."),
        ("", "return torch.prod(1 - betas, dim=0, keepdim=True).expand(len(betas))",
         "You have the product of all α at each t: ᾱ_t is the product of those up to t only."),
        ("torch.cumprod(1 - betas, dim=0)", "torch.cat([torch.ones(1), torch.cumprod(1 - betas, dim=0)[:-1]])",
         "Yours is shifted by one: at t = 0 one step has been taken, so that ᾱ_0 = α_0, not 1."),
        ("torch.cumprod(1 - betas, dim=0)", "1 - torch.cumprod(1 - betas, dim=0)",
         "You returned 1 - ᾱ, the variance of the noise; wanted is ᾱ, what is left of the picture's."),
        ("torch.cumprod(1 - betas, dim=0)", "torch.cumprod(1 - betas, dim=0).sqrt()",
         "You returned √ᾱ, which multiplies the picture; ᾱ is its variance, without the root."),
        ("torch.cumprod(1 - betas, dim=0)", "torch.prod(1 - betas)",
         "You returned one number, the product of all α: ᾱ_t is wanted for each t, by the running product, cumprod."),
        ("torch.cumprod(1 - betas, dim=0)", "1 - betas",
         "You returned α, of one step each; ᾱ_t is the product of all up to t."),
        ("torch.cumprod(1 - betas, dim=0)", "torch.cumprod(1 - betas.flip(0), dim=0).flip(0)",
         "Your product runs from the end: ᾱ_t is the product of α_0 ... α_t."),
        ("torch.cumprod(1 - betas, dim=0)", "1 - torch.cumprod(betas, dim=0)",
         "1 minus the product of β is not the product of 1 - β: subtract first, multiply then."),
        ("torch.cumprod(1 - betas, dim=0)", "torch.exp(-torch.cumsum(betas, dim=0))",
         "exp(-Σβ) is what the product becomes for very small β: the exact form is the product of all 1 - β."),
        ("torch.cumprod(1 - betas, dim=0)", "(1 - betas) ** torch.arange(1, len(betas) + 1)",
         "You took a power of the last α: the α differ from step to step, so it is their product."),
        ("1 - betas", "1 - torch.cat([betas[:1], betas[:-1]])",
         "Each factor after the first is that of the step before, so that α_0 comes twice: ᾱ_t ends with α_t itself."),
        ("torch.cumprod(1 - betas, dim=0)", "torch.cat([torch.ones(1), torch.cumprod(1 - betas, dim=0)])",
         "There is a 1 too many at the beginning: there are T entries, and ᾱ_0 = α_0."),
        ("1 - betas", "torch.cat([betas[:1], 1 - betas[1:]])",
         "Your product begins with β_0: the first factor is α_0 = 1 - β_0, like the others."),
        ("1 - betas", "1 + betas", "α is 1 - β, not 1 + β: the picture shrinks with each step."),
    ],
    swap=_put_alphas_cumprod,
)  # fmt: skip
def alphas_cumprod(betas: Float[Tensor, "T"]) -> Float[Tensor, "T"]:
    """ᾱ_t = α_0 α_1 ... α_t with α_t = 1 - β_t: how much of the picture's variance is left at t. (DDPM, section 2)"""
    # BEGIN SOLUTION
    return torch.cumprod(1 - betas, dim=0)
    # END SOLUTION


def _put_all_steps(f):
    """x_t by all the steps that lead there. Their noises are drawn so that together they are just `noise`."""

    def q_sample(self, x_0, t, noise):
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

    return [(NoiseSchedule, "q_sample", q_sample)]


@exercise(
    difficulty=1,
    minutes=10,
    cases=timed("x", "t", "noise", "betas", schedule="betas"),
    hints=(
        "Two terms: what is left of x, and the fresh noise.",
        "A number that multiplies noise of variance 1 is its standard deviation, not its variance.",
        "x_t = √(1-β_t) x_{t-1} + √β_t ε, with β_t reshaped to [b 1 1 1].",
    ),
    mistakes=[
        NOT_RESHAPED, ON_CHANNELS, FIRST_T, MEAN_T,
        ("(1 - beta).sqrt() * x", "x",
         "You only add noise, and the variance grows with each step. x has to shrink by √(1-β_t): that is what"
         " preserves the variance."),
        ("(1 - beta).sqrt()", "(1 - beta)",
         "You multiplied x by 1 - β_t, not by its root: the variance is then (1-β)² + β, which is less than 1."),
        ("beta.sqrt()", "beta",
         "You multiplied the noise by β_t, not by its root: β_t is the variance, and noise is scaled by the"
         " standard deviation."),
        ("(1 - beta).sqrt() * x", "beta.sqrt() * x",
         "x is multiplied by √β_t, as the noise is: what is left of x is √(1-β_t)."),
        ("beta.sqrt() * noise", "(1 - beta).sqrt() * noise",
         "The noise is multiplied by √(1-β_t), as x is; its factor is √β_t."),
        ("(1 - beta).sqrt() * x", "(1 - beta.sqrt()) * x", "It is the root of 1 - β_t, not 1 minus the root of β_t."),
        ("* x + beta", "* x - beta",
         "You subtracted the noise; it is added (that the noise is symmetric is no reason: it is given)."),
        ("betas[t]", "1 - torch.cumprod(1 - betas, 0)[t]",
         "You went from x_0 to x_t at once, with ᾱ_t: here it is one step only, from t-1 to t, with β_t."),
        ("betas[t]", "betas[(t - 1).clamp(min=0)]", "Off by one: the step that leads to x_t has β_t, not that of t-1."),
    ],
    linear=("x", "noise"),
    quantities=lambda t, betas, **_: {"β_t": betas[t], "ᾱ_t": torch.cumprod(1 - betas, 0)[t],
                                      "β_{t-1}": betas[(t - 1).clamp(min=0)]},
    swap=_put_all_steps,
)  # fmt: skip
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


@exercise(
    difficulty=1,
    minutes=10,
    cases=timed("x_0", "t", "noise", "alphas_cumprod"),
    hints=(
        "q(x_t | x_0) = N(√ᾱ_t x_0, (1-ᾱ_t) I). A sample of N(μ, σ² I) is μ + σ ε.",
        "`alphas_cumprod[t]` has the shape [b]: it must become [b 1 1 1] to multiply pictures.",
        "x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε",
    ),
    mistakes=[
        NOT_RESHAPED, ON_CHANNELS, FIRST_T, MEAN_T, T_EARLY, T_LATE,
        ("alpha_bar.sqrt() * x_0", "alpha_bar * x_0",
         "You multiplied x_0 by ᾱ_t, not by its root: the variance is then ᾱ_t² + (1-ᾱ_t), which is less than 1, while"
         " √ᾱ_t squared gives ᾱ_t + (1-ᾱ_t) = 1."),
        ("(1 - alpha_bar).sqrt() * noise", "(1 - alpha_bar) * noise",
         "You multiplied the noise by its variance 1-ᾱ_t: noise is scaled by the standard deviation, √(1-ᾱ_t)."),
        ("(1 - alpha_bar).sqrt()", "(1 - alpha_bar.sqrt())",
         "It is the root of 1-ᾱ_t, not 1 minus the root of ᾱ_t: the squares of the two factors have to sum to 1."),
        ("alpha_bar.sqrt() * x_0", "(1 - alpha_bar).sqrt() * x_0",
         "x_0 is multiplied by √(1-ᾱ_t), which belongs to the noise: what is left of the picture is √ᾱ_t."),
        ("(1 - alpha_bar).sqrt() * noise", "alpha_bar.sqrt() * noise",
         "The noise is multiplied by √ᾱ_t, which belongs to the picture; the noise grows as √(1-ᾱ_t)."),
        ("alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise",
         "(1 - alpha_bar).sqrt() * x_0 + alpha_bar.sqrt() * noise",
         "Picture and noise have exchanged their factors: at small t, where ᾱ_t is nearly 1, x_t has to be nearly"
         " x_0."),
        ("* x_0 + (1", "* x_0 - (1",
         "You subtracted the noise. It is added; the model learns to see this noise, not its negative."),
        ("alpha_bar.sqrt() * x_0", "x_0",
         "x_0 is not shrunk: without the factor √ᾱ_t the variance grows beyond 1, and x_T does not become N(0, I)."),
        ("(1 - alpha_bar).sqrt() * noise", "noise",
         "The noise comes in at full strength at each t: its factor √(1-ᾱ_t) is missing."),
        ("alphas_cumprod[t]", "(alphas_cumprod / torch.cat([torch.ones(1), alphas_cumprod[:-1]]))[t]",
         "You used α_t of the single step. To come from x_0 to x_t at once takes the product of all of them, ᾱ_t."),
        ("(1 - alpha_bar).sqrt() * noise", "(1 - alpha_bar**2).sqrt() * noise",
         "The noise's factor is √(1-ᾱ_t²): 1 minus ᾱ_t itself, which is already the square of the picture's factor."),
        ("return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise",
         "p, q = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()\nreturn (p * x_0 + q * noise) / (p + q)",
         "You divided by the sum of the two factors: it is their squares that sum to 1, and nothing is divided."),
        ("alpha_bar.sqrt() * x_0", "alpha_bar.sqrt() * (2 * x_0 - 1)",
         "You mapped x_0 from [0, 1] to [-1, 1]: it comes as it is to be used."),
        ("* noise", "* (noise - noise.mean()) / noise.std()",
         "You normalised the noise, to a mean of 0 and a deviation of 1: it is used as it is."),
        ("alphas_cumprod[t]", "alphas_cumprod.cumprod(0)[t]",
         "You took the running product once more: alphas_cumprod holds ᾱ already, the product of all α."),
        ("alphas_cumprod[t]", "alphas_cumprod.flip(0)[t]",
         "Your time runs backwards: at t = 0 there is almost no noise, at t = T-1 almost nothing else."),
        ("alphas_cumprod[t]", "torch.cumprod(1 - alphas_cumprod, dim=0)[t]",
         "You took alphas_cumprod for the β and made ᾱ of it once more: it holds ᾱ already, alphas_cumprod[t]."),
        ("return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise",
         "return x_0 + ((1 - alpha_bar) / alpha_bar).sqrt() * noise",
         "This is x_t / √ᾱ_t, as Karras et al. count the noise: in DDPM x_0 shrinks by √ᾱ_t, and the noise has"
         " √(1-ᾱ_t)."),
        ("return alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise",
         "return (alpha_bar * x_0**2 + (1 - alpha_bar) * noise**2).sqrt()",
         "You added squares and took the root of the sum: variances add up so, but picture and noise are added"
         " themselves."),
    ],
    linear=("x_0", "noise"),
    quantities=of_t,
    swap=lambda f: [
        (NoiseSchedule, "q_sample", lambda self, x_0, t,
         noise: f(x_0, t, noise, self.alphas_cumprod.to(x_0.device)).to(x_0)),
    ],
)  # fmt: skip
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


@exercise(
    difficulty=2,
    minutes=10,
    cases=timed("x_t", "t", "noise", "alphas_cumprod"),
    hints=(
        "x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε is one equation; you know x_t and ε.",
        "Bring the noise to the other side, then divide.",
        "x_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t",
    ),
    mistakes=[
        NOT_RESHAPED, ON_CHANNELS, FIRST_T, MEAN_T, T_EARLY, T_LATE,
        ("x_t - (1", "x_t + (1", "You added the noise once more; to get rid of it, subtract it."),
        ("/ alpha_bar.sqrt()", "* alpha_bar.sqrt()",
         "You multiplied by √ᾱ_t: forwards the picture was multiplied by it, so on the way back it is divided."),
        ("/ alpha_bar.sqrt()", "/ alpha_bar",
         "You divided by ᾱ_t, not by its root: the picture went in with the factor √ᾱ_t."),
        ("/ alpha_bar.sqrt()", "", "The picture that is left is still shrunk: divide by √ᾱ_t."),
        ("(1 - alpha_bar).sqrt() * noise", "(1 - alpha_bar) * noise",
         "You subtracted (1-ᾱ_t) ε: the noise went in with its standard deviation √(1-ᾱ_t), with the root."),
        ("(1 - alpha_bar).sqrt() * noise", "noise",
         "You subtracted the noise at full strength; in x_t it stands with the factor √(1-ᾱ_t)."),
        ("(x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()",
         "x_t - (1 - alpha_bar).sqrt() * noise / alpha_bar.sqrt()",
         "Only the noise is divided by √ᾱ_t: parentheses are missing around the difference."),
        ("(x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()",
         "x_t / alpha_bar.sqrt() - (1 - alpha_bar).sqrt() * noise",
         "Only x_t is divided by √ᾱ_t: the noise has to be, too."),
        ("(1 - alpha_bar).sqrt() * noise", "alpha_bar.sqrt() * noise",
         "The noise went in with √(1-ᾱ_t), not with √ᾱ_t."),
        ("(1 - alpha_bar).sqrt()", "(1 - alpha_bar.sqrt())", "It is the root of 1-ᾱ_t, not 1 minus the root of ᾱ_t."),
        ("(x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()",
         "(x_t - alpha_bar.sqrt() * noise) / (1 - alpha_bar).sqrt()",
         "You solved for the noise, with the two factors exchanged: it is x_0 that is wanted."),
        ("(x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()",
         "((1 - alpha_bar).sqrt() * noise - x_t) / alpha_bar.sqrt()",
         "The difference is the wrong way round: x_t minus the noise."),
        ("(x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()",
         "((x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()).clamp(-1, 1)",
         "You clamped x_0 to [-1, 1]. That suits pixels; latents know no such bound, and the equation has no clamp."),
        ("alphas_cumprod[t]", "(alphas_cumprod / torch.cat([torch.ones(1), alphas_cumprod[:-1]]))[t]",
         "You used α_t of the single step; from x_t to x_0 it is all of them, ᾱ_t."),
        ("return (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()", "return x_t - noise",
         "You subtracted the noise at full strength: x_t holds √(1-ᾱ_t) of it, and what is left is divided by √ᾱ_t."),
        ("return (x_t - (1 - alpha_bar).sqrt() * noise) / alpha_bar.sqrt()",
         "return alpha_bar.sqrt() * x_t + (1 - alpha_bar).sqrt() * noise",
         "This is q_sample, the way forwards, once more: here one solves it for x_0."),
    ],
    linear=("x_t", "noise"),
    quantities=of_t,
    swap=lambda f: [
        (NoiseSchedule, "predict_start_from_noise",
         lambda self, x_t, t, noise: f(x_t, t, noise, self.alphas_cumprod.to(x_t.device)).to(x_t)),
        *_everywhere_x0(f),
    ],
)  # fmt: skip
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


def _everywhere_x0(f):
    """ddim with the student's guess at x_0."""
    from .sampling import put_sampler

    def step(x_t, eps, a_t, a_prev, t, schedule, **_):
        times = torch.full((len(x_t),), t, device=x_t.device)
        x0 = f(x_t, times, eps, schedule.alphas_cumprod.to(x_t.device)).to(x_t)
        return a_prev**0.5 * x0 + (1 - a_prev) ** 0.5 * eps

    return put_sampler("ddim", step)


@exercise(
    difficulty=2,
    minutes=10,
    cases=timed("x_0", "noise", "t", "alphas_cumprod"),
    hints=(
        "Write cos φ = √ᾱ_t and sin φ = √(1-ᾱ_t). Then x_t = cos φ x_0 + sin φ ε; v is its derivative by φ.",
        "At small t, v is nearly ε; at large t, nearly -x_0.",
        "v = √ᾱ_t ε - √(1-ᾱ_t) x_0",
    ),
    mistakes=[
        NOT_RESHAPED, ON_CHANNELS, FIRST_T, MEAN_T, T_EARLY, T_LATE,
        ("alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0",
         "alpha_bar.sqrt() * x_0 - (1 - alpha_bar).sqrt() * noise",
         "Picture and noise are exchanged: v is √ᾱ_t times the noise minus √(1-ᾱ_t) times the picture, nearly ε at"
         " small t."),
        ("alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0",
         "(1 - alpha_bar).sqrt() * x_0 - alpha_bar.sqrt() * noise",
         "The sign of the whole is wrong: v = √ᾱ_t ε - √(1-ᾱ_t) x_0, not the other way round."),
        ("* x_0", "* (alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise)",
         "You took x_t in the place of x_0: v is made of the clean picture and the noise."),
        ("noise - (1", "noise + (1", "A plus for a minus: v is orthogonal to x_t, the derivative of cos is -sin."),
        ("alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0",
         "alpha_bar.sqrt() * x_0 + (1 - alpha_bar).sqrt() * noise",
         "This is x_t itself: v is what one gets by turning (x_0, ε) by 90° more, √ᾱ_t ε - √(1-ᾱ_t) x_0."),
        ("alpha_bar.sqrt() * noise", "alpha_bar * noise", "The noise is multiplied by ᾱ_t: its root is missing."),
        ("(1 - alpha_bar).sqrt() * x_0", "(1 - alpha_bar) * x_0", "x_0 is multiplied by 1-ᾱ_t: its root is missing."),
        ("alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0",
         "(1 - alpha_bar).sqrt() * noise - alpha_bar.sqrt() * x_0",
         "The two factors are exchanged: √ᾱ_t belongs to the noise here, √(1-ᾱ_t) to the picture. (Just the other"
         " way than in x_t.)"),
        ("alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * x_0", "noise - x_0",
         "noise - x_0 is the velocity of rectified flow, where x_t is a straight mixture. Here the two factors are"
         " √ᾱ_t and √(1-ᾱ_t)."),
        ("(1 - alpha_bar).sqrt()", "(1 - alpha_bar.sqrt())", "It is the root of 1-ᾱ_t, not 1 minus the root of ᾱ_t."),
    ],
    linear=("x_0", "noise"),
    quantities=of_t,
    swap=lambda f: [
        (NoiseSchedule, "get_v", lambda self, x_0, noise,
         t: f(x_0, noise, t, self.alphas_cumprod.to(x_0.device)).to(x_0)),
    ],
)  # fmt: skip
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


@exercise(
    difficulty=3,
    minutes=15,
    cases=timed("x_t", "t", "v", "alphas_cumprod"),
    hints=(
        "Two equations, x_t = √ᾱ x_0 + √(1-ᾱ) ε and v = √ᾱ ε - √(1-ᾱ) x_0, and two unknowns.",
        "Multiply the first by √ᾱ and the second by √(1-ᾱ), and subtract: ε falls out.",
        "x_0 = √ᾱ_t x_t - √(1-ᾱ_t) v",
    ),
    mistakes=[
        NOT_RESHAPED, ON_CHANNELS, FIRST_T, MEAN_T, T_EARLY, T_LATE,
        ("x_t - (1", "x_t + (1", "A plus for a minus: put x_t and v in, and see which sign makes ε fall out."),
        ("alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v", "(1 - alpha_bar).sqrt() * x_t + alpha_bar.sqrt() * v",
         "This is the noise ε, which also follows from x_t and v. Wanted is the picture: √ᾱ_t x_t - √(1-ᾱ_t) v."),
        ("alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v", "(1 - alpha_bar).sqrt() * x_t - alpha_bar.sqrt() * v",
         "The two factors are exchanged: x_t comes with √ᾱ_t, v with √(1-ᾱ_t)."),
        ("alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v",
         "(x_t - (1 - alpha_bar).sqrt() * v) / alpha_bar.sqrt()",
         "You took v for the noise: this is how x_0 follows from ε. From v it is √ᾱ_t x_t - √(1-ᾱ_t) v, without a"
         " division."),
        ("alpha_bar.sqrt() * x_t", "alpha_bar * x_t", "x_t is multiplied by ᾱ_t: its root is missing."),
        ("(1 - alpha_bar).sqrt() * v", "(1 - alpha_bar) * v", "v is multiplied by 1-ᾱ_t: its root is missing."),
        ("alpha_bar.sqrt() * x_t", "x_t", "The factor √ᾱ_t of x_t is missing."),
        ("alpha_bar.sqrt() * x_t", "x_t / alpha_bar.sqrt()",
         "x_t is multiplied by √ᾱ_t, not divided: v has done the rest."),
        ("alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v", "(1 - alpha_bar).sqrt() * v - alpha_bar.sqrt() * x_t",
         "The difference is the wrong way round: √ᾱ_t x_t minus √(1-ᾱ_t) v."),
    ],
    linear=("x_t", "v"),
    quantities=of_t,
    swap=lambda f: [
        (NoiseSchedule, "predict_start_from_v",
         lambda self, x_t, t, v: f(x_t, t, v, self.alphas_cumprod.to(x_t.device)).to(x_t)),
    ],
)  # fmt: skip
def predict_start_from_v(
    x_t: Float[Tensor, "b c h w"], t: Int[Tensor, "b"], v: Float[Tensor, "b c h w"], alphas_cumprod: Float[Tensor, "T"]
) -> Float[Tensor, "b c h w"]:
    """The picture x_0 in x_t, from the velocity v = √ᾱ_t ε - √(1-ᾱ_t) x_0. (Salimans & Ho 2022, appendix D)"""
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    return alpha_bar.sqrt() * x_t - (1 - alpha_bar).sqrt() * v
    # END SOLUTION


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "three times": {"t": torch.tensor([3, 8, 5]), "alphas_cumprod": alphas_cumprod_of(12)},
        "all times": {"t": torch.arange(10), "alphas_cumprod": alphas_cumprod_of(10)},
        "Stable Diffusion's schedule": {"t": torch.tensor([120, 900]),
                                        "alphas_cumprod": NoiseSchedule.scaled_linear().alphas_cumprod},
    },
    hints=("Signal to noise: the variance of the one by the variance of the other.",
           "The variances are ᾱ_t and 1-ᾱ_t."),
    mistakes=[
        ("alpha_bar / (1 - alpha_bar)", "(1 - alpha_bar) / alpha_bar",
         "The quotient is the wrong way round: this is noise to signal. It should fall as t grows."),
        ("alpha_bar / (1 - alpha_bar)", "(alpha_bar / (1 - alpha_bar)).sqrt()",
         "You took a root: the ratio is one of variances, ᾱ_t / (1-ᾱ_t), not of standard deviations."),
        ("alpha_bar / (1 - alpha_bar)", "(alpha_bar / (1 - alpha_bar)) ** 2",
         "You squared: ᾱ_t and 1-ᾱ_t are variances already."),
        ("alpha_bar / (1 - alpha_bar)", "(alpha_bar / (1 - alpha_bar)).log()",
         "You returned the logarithm of the ratio (log-SNR); wanted is the ratio itself."),
        ("alpha_bar / (1 - alpha_bar)", "alpha_bar / (1 - alpha_bar).sqrt()",
         "The variance of the noise is 1-ᾱ_t, without a root."),
        ("alpha_bar / (1 - alpha_bar)", "alpha_bar.sqrt() / (1 - alpha_bar)",
         "The variance of the signal is ᾱ_t, without a root."),
        ("alpha_bar / (1 - alpha_bar)", "alpha_bar",
         "You returned ᾱ_t, the signal's variance; divide it by that of the noise, 1-ᾱ_t."),
        ("alpha_bar / (1 - alpha_bar)", "1 / (1 - alpha_bar)", "The signal's variance is ᾱ_t, not 1."),
        ("alpha_bar / (1 - alpha_bar)", "10 * (alpha_bar / (1 - alpha_bar)).log10()",
         "You returned decibels; wanted is the plain ratio."),
        T_EARLY, T_LATE,
        ("alphas_cumprod[t]", "(alphas_cumprod / torch.cat([torch.ones(1), alphas_cumprod[:-1]]))[t]",
         "You used α_t of the single step; what is left of the picture at t is ᾱ_t."),
    ],
    swap=lambda f: [(NoiseSchedule, "snr", lambda self, t: f(t, self.alphas_cumprod.to(t.device)).float())],
)  # fmt: skip
def snr(t: Int[Tensor, "b"], alphas_cumprod: Float[Tensor, "T"]) -> Float[Tensor, "b"]:
    """The signal-to-noise ratio at t: the variance that is left of the picture by the variance of the noise.

    (Kingma et al. 2021, "Variational Diffusion Models", eq. 2)
    """
    # BEGIN SOLUTION
    alpha_bar = alphas_cumprod[t]
    return alpha_bar / (1 - alpha_bar)
    # END SOLUTION


@exercise(
    difficulty=3,
    minutes=20,
    cases=timed("x_0", "x_t", "t", "betas", schedule="betas"),
    hints=(
        "Prepare α_t, ᾱ_t and ᾱ_{t-1} first. Before the first step nothing is lost: ᾱ_{-1} = 1.",
        "ᾱ_{t-1} is ᾱ shifted by one, with a 1 in front.",
        "μ̃ = √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0 + √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t",
    ),
    mistakes=[
        (".reshape(-1, 1, 1, 1) for a in", " for a in", NOT_RESHAPED[2]),
        ("(a[t]", "(a[t[:1]]", FIRST_T[2]),
        ("alpha_bar_prev.sqrt() * beta", "alpha_bar.sqrt() * beta",
         "The factor of x_0 has √ᾱ_{t-1} in it, not √ᾱ_t: the mean lies at t-1."),
        ("alpha_bar_prev.sqrt() * beta", "alpha_bar_prev * beta",
         "The factor of x_0 has the root of ᾱ_{t-1} in it, not ᾱ_{t-1}."),
        ("alpha_bar_prev.sqrt() * beta", "alpha_bar_prev.sqrt() * beta.sqrt()",
         "β_t stands in the factor of x_0 as it is, without a root."),
        ("(1 - beta).sqrt() * (1", "(1 - beta) * (1", "The factor of x_t has √α_t in it, not α_t."),
        ("(1 - beta).sqrt() * (1", "beta.sqrt() * (1",
         "The factor of x_t has √α_t in it, with α_t = 1 - β_t, not √β_t."),
        ("(1 - beta).sqrt() * (1", "alpha_bar.sqrt() * (1",
         "The factor of x_t has √α_t in it, that of one step, not √ᾱ_t."),
        ("(1 - alpha_bar_prev) / (1 - alpha_bar) * x_t", "(1 - alpha_bar) / (1 - alpha_bar) * x_t",
         "The factor of x_t has 1-ᾱ_{t-1} above and 1-ᾱ_t below: you have ᾱ_t in both, and they cancel."),
        ("(1 - alpha_bar_prev) / (1 - alpha_bar) * x_t", "(1 - alpha_bar) / (1 - alpha_bar_prev) * x_t",
         "The quotient in the factor of x_t is the wrong way round: (1-ᾱ_{t-1}) / (1-ᾱ_t), which is less than 1."),
        ("from_x_0 + from_x_t", "from_x_0 - from_x_t",
         "A minus for a plus: the mean lies between what x_0 says and what x_t says."),
        ("",
         "\n    bars = torch.cumprod(1 - betas, dim=0)\n    bars_prev = torch.cat([bars.new_ones(1), bars[:-1]])\n"
         "    beta, alpha_bar, alpha_bar_prev = (a[t].reshape(-1, 1, 1, 1) for a in (betas, bars, bars_prev))\n"
         "    from_x_t = alpha_bar_prev.sqrt() * beta / (1 - alpha_bar) * x_t\n    from_x_0 = (1 - beta).sqrt() * (1"
         " - alpha_bar_prev) / (1 - alpha_bar) * x_0\n    return from_x_0 + from_x_t\n",
         "x_0 and x_t have exchanged their factors: at large t one step back changes x_t only a little, so that x_t"
         " has the large factor."),
        ("bars[:-1]]", "bars[1:], bars[-1:]][1:]",
         "Your ᾱ_{t-1} is ᾱ_{t+1}: the shift goes the wrong way. Put a 1 in front and leave the last one out."),
        ("bars.new_ones(1)", "bars[:1]", "Before the first step nothing is lost: ᾱ_{-1} is 1. (You repeated ᾱ_0.)"),
        ("bars.new_ones(1)", "bars[-1:]",
         "At t = 0 you read index -1, which is the last entry of the table: before the first step nothing is lost,"
         " ᾱ_{-1} = 1."),
        ("bars.new_ones(1)", "bars.new_zeros(1)", "Before the first step nothing is lost: ᾱ_{-1} is 1, not 0."),
        ("beta / (1 - alpha_bar) * x_0", "beta / alpha_bar * x_0",
         "The factor of x_0 is divided by 1-ᾱ_t, not by ᾱ_t."),
        ("beta / (1 - alpha_bar) * x_0", "beta * x_0", "The factor of x_0 is not divided by 1-ᾱ_t."),
        ("",
         "bars = torch.cumprod(1 - betas, dim=0)\nbars_prev = torch.cat([bars.new_ones(1), bars[:-1]])\nbeta,"
         " alpha_bar_prev = (a[t].reshape(-1, 1, 1, 1) for a in (betas, bars_prev))\nreturn alpha_bar_prev.sqrt() *"
         " beta * x_0 + (1 - beta).sqrt() * (1 - alpha_bar_prev) * x_t",
         "Neither term is divided by 1-ᾱ_t: the two factors are then much too small."),
        ("return from_x_0 + from_x_t",
         "return (x_t - beta / (1 - alpha_bar).sqrt() * x_0) / (1 - beta).sqrt()",
         "This is the formula for a model's ε, (x_t - β_t/√(1-ᾱ_t) ε) / √α_t, with x_0 in the place of ε: here x_0"
         " is known."),
    ],
    linear=("x_0", "x_t"),
    quantities=of_t_and_betas,
    swap=lambda f: [(NoiseSchedule, "q_posterior", _posterior(f, None)), *_put_posterior_mean(f)],
)  # fmt: skip
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


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "three times": {"t": torch.tensor([3, 8, 5]), "betas": betas_of(12)},
        "the first and the last timestep": {"t": torch.tensor([0, 9]), "betas": betas_of(10)},
        "all times": {"t": torch.arange(7), "betas": betas_of(7)},
        "Stable Diffusion's schedule": {"t": torch.tensor([120, 900]), "betas": NoiseSchedule.scaled_linear().betas},
    },
    hints=(
        "Prepare ᾱ_t and ᾱ_{t-1}; before the first step, ᾱ is 1.",
        "β̃_t = (1-ᾱ_{t-1}) / (1-ᾱ_t) β_t; at t = 0 it is 0.",
    ),
    mistakes=[
        ("(1 - bars_prev[t]) / (1 - bars[t]) * betas[t]", "betas[t]",
         "You returned β_t, the variance of the step forwards. Who knows x_0 knows more: the step back has"
         " (1-ᾱ_{t-1}) / (1-ᾱ_t) of it."),
        ("(1 - bars_prev[t]) / (1 - bars[t])", "(1 - bars[t]) / (1 - bars_prev[t])",
         "The quotient is the wrong way round: β̃_t is less than β_t, and 0 at t = 0."),
        ("(1 - bars_prev[t]) / (1 - bars[t]) * betas[t]", "((1 - bars_prev[t]) / (1 - bars[t]) * betas[t]).sqrt()",
         "You returned the standard deviation; wanted is the variance, without the root."),
        ("(1 - bars_prev[t]) / (1 - bars[t]) * betas[t]", "(1 - bars_prev[t]) / (1 - bars[t])",
         "The factor β_t is missing."),
        ("(1 - bars_prev[t]) / (1 - bars[t]) * betas[t]", "bars_prev[t] / bars[t] * betas[t]",
         "It is 1-ᾱ above and below, the variances of the noise, not ᾱ."),
        ("(1 - bars_prev[t]) / (1 - bars[t]) * betas[t]", "(1 - bars_prev[t]) / (1 - bars[t]) * (1 - betas[t])",
         "The last factor is β_t, not α_t = 1 - β_t."),
        ("(1 - bars_prev[t]) / (1 - bars[t]) * betas[t]",
         "((1 - bars_prev[t]) / (1 - bars[t]) * betas[t]).clamp(min=1e-20).log()",
         "You returned the logarithm of the variance; wanted is the variance."),
        ("bars.new_ones(1), bars[:-1]", "bars[1:], bars[-1:]",
         "Your ᾱ_{t-1} is ᾱ_{t+1}: the shift goes the wrong way."),
        ("bars.new_ones(1)", "bars[:1]", "Before the first step nothing is lost: ᾱ_{-1} is 1, which makes β̃_0 = 0."),
        ("bars.new_ones(1)", "bars[-1:]",
         "At t = 0 you read index -1, which is the last entry of the table: before the first step nothing is lost,"
         " ᾱ_{-1} = 1."),
        ("bars.new_ones(1)", "bars.new_zeros(1)", "Before the first step nothing is lost: ᾱ_{-1} is 1, not 0."),
        ("torch.cumprod(1 - betas, dim=0)", "1 - betas", "You used α of single steps where ᾱ belongs, their product."),
        ("(1 - bars_prev[t]) / (1 - bars[t]) * betas[t]", "((1 - bars_prev[t]) / (1 - bars[t])).sqrt() * betas[t]",
         "A root too many: the quotient of the variances stands as it is."),
        ("(1 - bars_prev[t]) / (1 - bars[t]) * betas[t]",
         "((1 - bars_prev[t]) / (1 - bars[t]) * betas[t]).clamp(min=1e-3)",
         "You clamped the variance. That is needed for its logarithm only; at t = 0 it is 0 exactly."),
        ("return (1 - bars_prev[t]) / (1 - bars[t]) * betas[t]", "return 1 - bars[t]",
         "You returned 1 - ᾱ_t, the variance of all noise in x_t: wanted is that of one step back."),
    ],
    swap=lambda f: [(NoiseSchedule, "q_posterior", _posterior(None, f)), *_put_posterior_variance(f)],
)  # fmt: skip
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


def _posterior(mean, variance):
    """NoiseSchedule.q_posterior with one of its two quantities a student's."""
    real = NoiseSchedule.q_posterior

    def q_posterior(self, x_0, x_t, t):
        true_mean, true_variance, log_variance = real(self, x_0, x_t, t)
        if mean:
            true_mean = mean(x_0, x_t, t, self.betas.to(t.device)).to(x_t)
        if variance:
            true_variance = variance(t, self.betas.to(t.device)).to(x_t).reshape(true_variance.shape)
            log_variance = true_variance.clamp(min=1e-20).log()
        return true_mean, true_variance, log_variance

    return q_posterior


def _longer(a_t: float, a_prev: float) -> Tensor:
    """The betas of a schedule of two steps, the second of which leads from ᾱ_prev to ᾱ_t."""
    return torch.tensor([1 - a_prev, 1 - a_t / a_prev], dtype=torch.float64)


def _put_posterior_mean(f):
    from .sampling import put_sampler

    def step(x_t, eps, a_t, a_prev, noise, **_):
        x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        t = torch.ones(len(x_t), dtype=torch.int64, device=x_t.device)
        mean = f(x0, x_t, t, _longer(a_t, a_prev).to(x_t))
        return mean + ((1 - a_prev) / (1 - a_t) * (1 - a_t / a_prev)) ** 0.5 * noise

    return put_sampler("ddpm", step)


def _put_posterior_variance(f):
    from .sampling import put_sampler

    def step(x_t, eps, a_t, a_prev, noise, **_):
        x0 = (x_t - (1 - a_t) ** 0.5 * eps) / a_t**0.5
        beta = 1 - a_t / a_prev
        mean = a_prev**0.5 * beta / (1 - a_t) * x0 + (1 - beta) ** 0.5 * (1 - a_prev) / (1 - a_t) * x_t
        t = torch.ones(len(x_t), dtype=torch.int64, device=x_t.device)
        return mean + f(t, _longer(a_t, a_prev).to(x_t)).to(x_t).reshape(-1, 1, 1, 1).sqrt() * noise

    return put_sampler("ddpm", step)


@exercise(
    difficulty=4,
    minutes=25,
    cases=lambda: {
        "five pictures, three noisy ones": {"x": torch.randn(3, 2), "t": torch.tensor([3, 8, 5]),
                                            "data": torch.randn(5, 2),
                                            "alphas_cumprod": alphas_cumprod_of(12)},
        "two points, one noisy": {"x": torch.randn(1, 2), "t": torch.tensor([4]), "data": torch.randn(2, 2),
                                  "alphas_cumprod": alphas_cumprod_of(12)},
        "as many points as noisy ones": {"x": torch.randn(4, 3), "t": torch.tensor([2, 6, 9, 4]),
                                         "data": torch.randn(4, 3),
                                         "alphas_cumprod": alphas_cumprod_of(11)},
    },
    hints=(
        "Each point i of the data could have made x. How probable is it? N(x; √ᾱ_t x_i, (1-ᾱ_t) I), as a function of"
        " i.",
        "The weights are a softmax over i of the log probabilities: -|x - √ᾱ_t x_i|² / (2 (1-ᾱ_t)).",
        "Differences [b n d] = x[:, None] - √ᾱ_t data[None]; squares, summed over d; softmax over n; weights @ data.",
    ),
    mistakes=[
        ("alpha_bar.sqrt() * data", "data",
         "Forwards, x_i was shrunk by √ᾱ_t: x is compared with √ᾱ_t x_i, not with x_i."),
        ("alpha_bar.sqrt() * data", "alpha_bar * data", "x is compared with √ᾱ_t x_i: the root is missing."),
        ("-squared", "squared", "The minus in the exponent is missing: points far away are to weigh less, not more."),
        ("(2 * (1 - alpha_bar[..., 0]))", "(1 - alpha_bar[..., 0])", "The 2 is missing: a Gaussian is exp(-d² / 2σ²)."),
        ("(2 * (1 - alpha_bar[..., 0]))", "(2 * (1 - alpha_bar[..., 0]).sqrt())",
         "The squared distance is divided by 2σ², the variance 1-ᾱ_t, not by its root."),
        ("(2 * (1 - alpha_bar[..., 0]))", "2",
         "The squared distance is not divided by the variance of the noise, 1-ᾱ_t."),
        ("(2 * (1 - alpha_bar[..., 0]))", "(2 * alpha_bar[..., 0])", "The variance of the noise is 1-ᾱ_t, not ᾱ_t."),
        (".square().sum", ".norm(dim=-1, keepdim=True).sum",
         "The distance in the exponent is squared; you have the distance itself."),
        (".square().sum", ".abs().sum", "You added absolute differences: a Gaussian sees the sum of their squares."),
        (".square().sum", ".square().mean", "You took the mean over the coordinates: |x - √ᾱ_t x_i|² is the sum."),
        ("dim=1)", "dim=0)",
         "The softmax runs over the noisy ones: for each x the weights of the n data points are to sum to 1."),
        ("torch.softmax(-squared / (2 * (1 - alpha_bar[..., 0])), dim=1)",
         "torch.exp(-squared / (2 * (1 - alpha_bar[..., 0])))",
         "The weights are not normalised: divide them by their sum over the data, as a softmax does."),
        ("torch.softmax(-squared / (2 * (1 - alpha_bar[..., 0])), dim=1)",
         "torch.sigmoid(-squared / (2 * (1 - alpha_bar[..., 0])))",
         "The weights have to sum to 1 over the data: that is a softmax, not a sigmoid."),
        ("return weights @ data", "return weights",
         "You returned the weights: multiply them with the data, and add up."),
        ("return weights @ data", "return data.mean(dim=0).expand(len(x), -1)",
         "Every point has the same weight in yours: those near x weigh more."),
        ("(x[:, None] - alpha_bar.sqrt() * data)", "(alpha_bar.sqrt() * x[:, None] - data)",
         "You shrank x by √ᾱ_t: it is the data point that is shrunk, √ᾱ_t x_i, since x is noisy already."),
        ("return weights @ data", "return data[weights.argmax(dim=1)]",
         "You returned the most probable point. The best guess in the mean square is the average of all, by their"
         " weights."),
        ("return weights @ data", "return (weights[..., None] * alpha_bar.sqrt() * data).sum(dim=1)",
         "You averaged √ᾱ_t x_i: the average is of the x_i themselves."),
        ("(x[:, None] - alpha_bar.sqrt() * data)", "(x[:, None] / alpha_bar.sqrt() - data)",
         "You divided x by √ᾱ_t, and its noise with it: the variance is then (1-ᾱ_t) / ᾱ_t. Or compare x with √ᾱ_t"
         " x_i."),
        ("return weights @ data", "return weights @ (alpha_bar[:, 0].mean().sqrt() * data)",
         "The average is of the x_i themselves, not of the shrunken ones."),
    ],
    swap=lambda f: [(ExactDenoiser, "x0", _exact_x0(f)), (ExactDenoiser, "_x0", _exact_pair(f))],
)  # fmt: skip
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


def _exact_x0(f):
    def x0(self, x, t):
        flat = x.reshape(len(x), -1).double()
        return f(flat, t, self.data, self.schedule.alphas_cumprod.double()).reshape(x.shape).to(x)

    return x0


def _exact_pair(f):
    def _x0(self, x, t):
        flattened = self._flatten(x, t)
        return f(flattened[0], t, self.data, self.schedule.alphas_cumprod.double()), flattened

    return _x0
