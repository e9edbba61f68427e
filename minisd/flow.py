"""Stage 14: flow matching. The same model on a straight path, as in Stable Diffusion 3 and Flux.

    x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε    the path of Stable Diffusion v1, at T timesteps                        (DDPM, eq. 4)
    z_τ = (1-τ) x_0 + τ ε          the straight path, for any τ from 0, the picture, to 1, the noise      (SD3, eq. 13)

On the straight path a picture moves to its noise at a constant velocity, u = dz/dτ = ε - x_0. Flow matching trains a
network to predict u. A drawing starts at pure noise, z_1, and follows the predicted velocity back to z_0:

    z_τ' = z_τ + (τ' - τ) u(z_τ, τ)          Euler's method, for τ' < τ

There is no noise schedule and no ᾱ in this. Nevertheless a model of one kind can be used in place of the other, for two
reasons. If you divide x_t by the sum of its two factors, you get a z_τ, so the noise schedule only changes the time and
the scale (`to_straight`). And ε, v and u can be computed from one another. Three things differ: how training weights
the times, at which times a sampler makes its steps, and what an error of the network does to the picture. The papers
that the comments cite:

    DDPM             Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020 (arXiv:2006.11239)
    Flow matching    Lipman et al., "Flow Matching for Generative Modeling", 2022 (arXiv:2210.02747)
    Rectified flow   Liu et al., "Flow Straight and Fast", 2022 (arXiv:2209.03003)
    SD3              Esser et al., "Scaling Rectified Flow Transformers …", 2024 (arXiv:2403.03206)

Time has the direction of SD3. In the two papers of 2022, 0 is the noise and 1 the picture, so their velocity is -u. All
three write t for the time. Here it is τ, because t is an integer timestep in this package. diffusers writes σ.
"""

from collections.abc import Callable
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from .loss import squared_error
from .noising import Data, Factors, Generators, NoiseSchedule, Times, extract_into_tensor, randn

Tau = Float[Tensor, "b"]  # τ, one for each picture of the batch
VelocityModel = Callable[[Tensor, Tensor, Tensor | None], Tensor]  # model(z, tau, context) -> u, shaped like z


# -- the path, and the loss -----------------------------------------------------------------------------------


def _factors(tau: Tau, x: Data) -> tuple[Factors, Factors]:
    """1-τ and τ, by which the picture and the noise in z_τ are multiplied: [b 1 ... 1] each."""
    tau = tau.to(x).reshape(-1, *[1] * (x.ndim - 1))
    return 1 - tau, tau


def interpolate(x_0: Data, tau: Tau, noise: Data) -> Data:
    """z_τ = (1-τ) x_0 + τ ε, on the straight line from the picture to the noise (SD3, eq. 13)."""
    signal, sigma = _factors(tau, x_0)
    return signal * x_0 + sigma * noise


def velocity(x_0: Data, noise: Data) -> Data:
    """u = dz/dτ = ε - x_0, the same at all times, because the line is straight (target of Flow matching, eq. 23)."""
    return noise - x_0


def logit_normal(count: int, mean: float = 0.0, std: float = 1.0, generator: Generators | None = None) -> Tau:
    """Draw times τ whose logit, log(τ / (1-τ)), is normal, so that more of them lie in the middle (SD3, eq. 19).

    At both ends there is little to learn (SD3, section 3.1). At τ = 1 no picture can be seen in z = ε, so the best u is
    ε minus the mean of all pictures. At τ = 0 no noise can be seen in z = x_0, so the best u is the mean of all noise,
    which is 0, minus x_0. mean: above 0, more of the times are noisy ones.
    """
    return torch.sigmoid(mean + std * randn((count,), generator))


def flow_loss(
    model: VelocityModel,
    x_0: Float[Tensor, "b *d"],
    context: Float[Tensor, "b n e"] | None = None,
    tau: Float[Tensor, "b"] | None = None,
    noise: Float[Tensor, "b *d"] | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> Float[Tensor, "*b"]:
    """Mean squared error of the predicted velocity (Flow matching, eq. 23 with σ_min = 0; Rectified flow, section 2.1).

    The arguments are those of `epsilon_loss`, with τ in the place of a schedule and t. If τ is not given, it is drawn
    uniformly from [0, 1), as in the two papers of 2022. To train as SD3 was trained, give `logit_normal(len(x_0))`.
    """
    if tau is None:
        tau = torch.rand(len(x_0), device=x_0.device)
    if noise is None:
        noise = torch.randn_like(x_0)
    # Three lines, as in `loss.py`: mix, predict, compare.
    z = interpolate(x_0, tau, noise)
    prediction = model(z, tau, context)
    # Many lines between pictures and noises pass through one z. The prediction with the smallest error is their mean
    # velocity, E[ε - x_0 | z_τ = z]. Following it takes the distribution of the noise to that of the pictures
    # (Flow matching, theorem 1).
    return squared_error(prediction, velocity(x_0, noise), reduction)


# -- what a network predicts: u, x_0 or ε ----------------------------------------------------------------------


def start_from_velocity(z: Data, tau: Tau, u: Data) -> Data:
    """x̂_0 = z_τ - τ u: follow the velocity all the way back, to τ = 0."""
    return z - _factors(tau, z)[1] * u


def noise_from_velocity(z: Data, tau: Tau, u: Data) -> Data:
    """ε̂ = z_τ + (1-τ) u: follow the velocity all the way on, to τ = 1."""
    return z + _factors(tau, z)[0] * u


def velocity_from_noise(z: Data, tau: Tau, noise: Data) -> Data:
    """u = (ε - z_τ) / (1-τ), the inverse of `noise_from_velocity`, for τ < 1.

    At τ = 1 it would be 0/0: z is the noise itself, so a prediction of the noise does not say where the pictures are.
    Just below 1, a small error in ε becomes a large one in u. This is one reason to predict u (or v) instead.
    """
    return (noise - z) / _factors(tau, z)[0]


def velocity_from_v(x_t: Data, v: Data, schedule: NoiseSchedule, t: Times) -> Data:
    """u from the v of `v_loss`: both are made of x_0 and ε, with other factors."""
    signal, sigma = schedule._signal_and_sigma(t, x_t)
    # x_0 = √ᾱ x_t - √(1-ᾱ) v and ε = √(1-ᾱ) x_t + √ᾱ v. Their difference:
    # u = (√(1-ᾱ) - √ᾱ) x_t + (√(1-ᾱ) + √ᾱ) v. Where picture and noise have the same factor, u is √2 v.
    return (sigma - signal) * x_t + (sigma + signal) * v


# -- the noise schedule as a change of time and scale ----------------------------------------------------------


def straight_time(schedule: NoiseSchedule, t: Times) -> Tau:
    """The τ at which z_τ has the same ratio of picture to noise as x_t. SD v1: from 0.028 to 0.936."""
    signal = extract_into_tensor(schedule.sqrt_alphas_cumprod, t, ndim=1)
    sigma = extract_into_tensor(schedule.sqrt_one_minus_alphas_cumprod, t, ndim=1)
    # (1-τ) / τ = √ᾱ_t / √(1-ᾱ_t), solved for τ
    return sigma / (signal + sigma)


def to_straight(schedule: NoiseSchedule, x_t: Data, t: Times) -> tuple[Data, Tau]:
    """x_t as a point z_τ of the straight path, and its τ. No network is needed, and nothing is approximated."""
    signal, sigma = schedule._signal_and_sigma(t, x_t)
    # x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε. Divided by the sum of the factors, the new factors sum to 1: they are 1-τ and τ.
    return x_t / (signal + sigma), straight_time(schedule, t)


def from_straight(schedule: NoiseSchedule, z: Data, t: Times) -> Data:
    """The inverse of `to_straight`, for the z_τ that belongs to the timestep t."""
    signal, sigma = schedule._signal_and_sigma(t, z)
    return z * (signal + sigma)


def straight_schedule(timesteps: int = 1000) -> NoiseSchedule:
    """A noise schedule whose timesteps are evenly spaced in τ: τ_t = (t+1) / (T+1).

    With it, the samplers of this package make equal steps along the straight path. The last τ is just below 1, because
    at τ = 1 there is no picture left, ᾱ = 0, and samplers divide by √ᾱ.
    """
    tau = torch.arange(1, timesteps + 1, dtype=torch.float64, device="cpu") / (timesteps + 1)
    # ᾱ / (1-ᾱ) = ((1-τ) / τ)², solved for ᾱ; and β_t = 1 - ᾱ_t / ᾱ_{t-1}, where ᾱ is 1 before the first step.
    alphas_cumprod = (1 - tau) ** 2 / ((1 - tau) ** 2 + tau**2)
    before = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])
    return NoiseSchedule(1 - alphas_cumprod / before)


# -- drawing: with the samplers that are there already ---------------------------------------------------------


def as_eps_model(model: VelocityModel, schedule: NoiseSchedule) -> Callable[..., Tensor]:
    """Make an eps_model(x, t, context) of a model that predicts velocities, so that every sampler can draw with it.

        schedule = straight_schedule()
        steps = sampling.euler(as_eps_model(model, schedule), x_T, schedule, steps=20)

    This is Euler's method along the straight path, z ← z + (τ' - τ) u. (diffusers: FlowMatchEulerDiscreteScheduler)
    The reason: `sampling.ddim` and `sampling.euler` mix x̂_0 and ε̂ again, with the factors of the next time. On the
    straight path, this mixture is (1-τ') x̂_0 + τ' ε̂ = z + (τ' - τ) u. With another schedule, the steps lie at other τ.
    """

    def eps_model(x: Data, t: Times, context: Tensor | None = None) -> Data:
        z, tau = to_straight(schedule, x, t)
        return noise_from_velocity(z, tau, model(z, tau, context))

    return eps_model


# -- the best possible model of a finite data set --------------------------------------------------------------


class ExactVelocity:
    """The velocity with the smallest possible loss for a finite data set, in closed form: no network, no training.

    x_0_all: [n *d], the whole data set. Called as a velocity model is, with τ from just above 0 to 1.

        w_i = softmax_i( -|z - (1-τ) x_i|² / (2 τ²) )       x̂_0 = Σ_i w_i x_i       (as in `ExactDenoiser`)
        u   = E[ε - x_0 | z_τ = z] = (z - x̂_0) / τ

    If the data set is one picture, all paths are straight, and one step of Euler's method draws it. With several
    pictures the paths bend, because x̂_0 begins as the mean of all pictures and moves to one of them on the way.
    """

    def __init__(self, x_0_all: Float[Tensor, "n *d"]):
        self.shape = x_0_all.shape[1:]
        self.data = x_0_all.detach().double().reshape(len(x_0_all), -1)  # [n d]

    def __call__(self, z: Data, tau: Tau, context: Tensor | None = None) -> Data:
        """The mean velocity of all lines through z at the time τ, [b *d]. The context is ignored."""
        if z.shape[1:] != self.shape:
            raise ValueError(f"z {list(z.shape)} must hold pictures of the data's shape, {list(self.shape)}.")
        flat = z.to(self.data).reshape(len(z), -1)  # [b d]
        signal, sigma = _factors(tau, flat)
        # How far is z from (1-τ) x_i, for each picture? In float64, because the softmax depends on small differences of
        # large numbers. [b n]
        squared_distances = (flat[:, None] - signal[:, None] * self.data).square().sum(-1)
        # Bayes' rule gives the probability of each picture, given z. x̂_0 is their mean with these as weights:
        # [b n] @ [n d] -> [b d]
        x_0 = torch.softmax(-squared_distances / (2 * sigma**2), dim=1) @ self.data
        return ((flat - x_0) / sigma).reshape(z.shape).to(z)  # z = x̂_0 + τ u
