"""Stage 1: the forward process. A picture dissolves into noise in T small steps.

    q(x_t | x_{t-1}) = N(√(1-β_t) x_{t-1}, β_t I)         one small step                      (DDPM, eq. 2)
    q(x_t | x_0)     = N(√ᾱ_t x_0, (1-ᾱ_t) I)             any number of steps at once         (DDPM, eq. 4)

where α_t = 1 - β_t and ᾱ_t = α_1 α_2 ... α_t. Each step scales the picture down a little and adds a little noise.
A sum of independent Gaussians is a Gaussian again, so t steps can be taken at once, and training does not have to go
through them. Nothing here is learned: a schedule consists of T numbers β_t, and all else is computed from them.

The steps have to be small because of the reverse process. A network can learn to undo a small step, because
q(x_{t-1} | x_t) is then nearly Gaussian. For a large step it can have any shape. The comments cite these papers:

    DDPM            Ho, Jain & Abbeel, "Denoising Diffusion Probabilistic Models", 2020
    Improved DDPM   Nichol & Dhariwal, "Improved Denoising Diffusion Probabilistic Models", 2021
    VDM             Kingma et al., "Variational Diffusion Models", 2021
    v-prediction    Salimans & Ho, "Progressive Distillation for Fast Sampling of Diffusion Models", 2022
    EDM             Karras et al., "Elucidating the Design Space of Diffusion-Based Generative Models", 2022

The papers count t = 1 ... T. The code counts t = 0 ... T-1, as the code published with the papers does. So t = 0
is not the clean picture but the picture after the first small step. The clean picture, ᾱ = 1, has no index.
"""

import math
import operator
from collections.abc import Callable, Sequence
from typing import SupportsIndex

import torch
from jaxtyping import Float, Int
from torch import Tensor

Seed = SupportsIndex  # an int, or an integer of numpy or torch
# One for the whole batch, or one for each picture, or a function that draws noise [b *shape] for all, given the shape.
Generators = torch.Generator | Sequence[torch.Generator] | Callable[..., Tensor]
Data = Float[Tensor, "b *d"]  # of any rank: latents [b c h w], points of a toy example [b 2], plain numbers [b]
Times = Int[Tensor, "b"]  # t, one for each picture of the batch
Factors = Float[Tensor, "b *ones"]  # a coefficient for each picture, [b 1 ... 1], to multiply the whole picture by


def seeded(seed: Seed) -> torch.Generator:
    """A random generator of the CPU.

    Raises ValueError if it has more than 64 bits, TypeError if it is no integer.
    """
    number = operator.index(seed)
    if not -(2**63) <= number < 2**63:
        raise ValueError(f"a seed must lie between -2^63 and 2^63 - 1, but this one is {number}.")
    return torch.Generator("cpu").manual_seed(number)


def randn(shape: Sequence[int], generator: Generators | None = None) -> Float[Tensor, "*d"]:
    """Draw ε ~ N(0, I) in float32 on the CPU, so that a seed gives the same noise on every device.

    With a generator for each picture, a picture gets the same noise in a batch as it would get alone.
    Raises ValueError if there are not as many generators as pictures.
    """
    if callable(generator):  # such as the method `randn` of a training batch
        return generator(*shape[1:])
    if not isinstance(generator, Sequence):
        return torch.randn(tuple(shape), generator=generator, dtype=torch.float32, device="cpu")
    if len(generator) != shape[0]:
        raise ValueError(f"{len(generator)} generators cannot draw noise for {shape[0]} pictures: pass one for each.")
    return torch.stack([randn(shape[1:], g) for g in generator])


def extract_into_tensor(a: Float[Tensor, "T"], t: Times, ndim: int) -> Factors:
    """Look up one coefficient for each picture of a batch, shaped to multiply that batch.

    Returns a[t] on t's device, with `ndim` dimensions: [b 1 ... 1]. Raises TypeError if t does not hold
    integers, ValueError if it is not one-dimensional or not all of it lies in [0, T).
    (CompVis: ldm/modules/diffusionmodules/util.py, extract_into_tensor)
    """
    if t.dtype not in (torch.int64, torch.int32):
        raise TypeError(f"t must hold integers (torch.int64), one for each picture, not {t.dtype}.")
    if t.ndim != 1:
        raise ValueError(f"t must have the shape [b], one timestep for each picture, not {list(t.shape)}.")
    # A negative t would count from the end, without any error, so it is replaced by one that is too large. No value is
    # looked at here: on a GPU, that would make the CPU wait in every step, and `torch.func.vmap` does not allow it.
    inside = torch.where(t < 0, len(a), t).long()
    try:
        # [T] -> [b] -> [b 1 ... 1]: the ones let PyTorch broadcast each coefficient over its whole picture.
        return a.to(t.device, non_blocking=True)[inside].reshape(-1, *[1] * (ndim - 1))
    except IndexError:
        raise ValueError(f"t must lie in [0, {len(a)}), but it spans [{int(t.min())}, {int(t.max())}].") from None


class NoiseSchedule:
    """How much noise there is at each of T timesteps, and everything that follows from that.

    betas: [T], each in (0, 1), or `.scaled_linear()` (Stable Diffusion), `.linear()` (DDPM), `.cosine()`.

    Every buffer is [T], float32, on the CPU. The methods move what they need to the device and the dtype of the
    data, which may have any rank.
    (CompVis: ldm/models/diffusion/ddpm.py, DDPM.register_schedule)
    """

    def __init__(self, betas: Float[Tensor, "T"]):
        # Everything is computed in float64 and rounded to float32 once at the end, because a product of a thousand
        # factors would accumulate a thousand rounding errors.
        betas = torch.as_tensor(betas, dtype=torch.float64, device="cpu")
        if betas.ndim != 1 or not len(betas) or not ((betas > 0) & (betas < 1)).all():
            raise ValueError(f"betas must be [T] numbers strictly between 0 and 1, not {betas}.")
        # ᾱ_t = Π_{s≤t} (1 - β_s): the share of the picture's variance that is left after step t. Before the first
        # step it is 1, so ᾱ_{t-1} is 1 for t = 0.
        alphas_cumprod = torch.cumprod(1 - betas, dim=0)
        alphas_cumprod_prev = torch.cat([alphas_cumprod.new_ones(1), alphas_cumprod[:-1]])

        self.timesteps = len(betas)  # T
        self.betas = betas.float()
        self.alphas_cumprod = alphas_cumprod.float()
        self.alphas_cumprod_prev = alphas_cumprod_prev.float()
        self._alphas_cumprod = alphas_cumprod.tolist()  # not rounded to float32, for `alpha_bar`

        # x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε                                                           (DDPM, eq. 4)
        self.sqrt_alphas_cumprod = alphas_cumprod.sqrt().float()
        self.sqrt_one_minus_alphas_cumprod = (1 - alphas_cumprod).sqrt().float()

        # The same, solved for the picture: x_0 = √(1/ᾱ_t) x_t - √(1/ᾱ_t - 1) ε                 (DDPM, eq. 15)
        self.sqrt_recip_alphas_cumprod = (1 / alphas_cumprod).sqrt().float()
        self.sqrt_recipm1_alphas_cumprod = (1 / alphas_cumprod - 1).sqrt().float()

        # If the picture x_0 is known, one reverse step is Gaussian by Bayes' rule:
        #   q(x_{t-1} | x_t, x_0) = N(μ̃_t, β̃_t I)
        # Its mean is a weighted sum of x_0 and x_t. Its variance is smaller than β_t, because x_0 is known as well:
        #   β̃_t = (1-ᾱ_{t-1}) / (1-ᾱ_t) β_t
        #   μ̃_t = √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0  +  √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t             (DDPM, eq. 6, 7)
        posterior_variance = (1 - alphas_cumprod_prev) / (1 - alphas_cumprod) * betas
        coef1 = alphas_cumprod_prev.sqrt() * betas / (1 - alphas_cumprod)
        coef2 = (1 - betas).sqrt() * (1 - alphas_cumprod_prev) / (1 - alphas_cumprod)
        self.posterior_variance = posterior_variance.float()
        # β̃_0 = 0, because the reverse step from t = 0 leads to x_0 itself. Clamping keeps the logarithm finite.
        self.posterior_log_variance_clipped = posterior_variance.clamp(min=1e-20).log().float()
        self.posterior_mean_coef1 = coef1.float()
        self.posterior_mean_coef2 = coef2.float()

    # -- the three schedules in use ------------------------------------------------------------------------

    @classmethod
    def scaled_linear(
        cls, beta_start: float = 0.00085, beta_end: float = 0.012, timesteps: int = 1000
    ) -> "NoiseSchedule":
        """Stable Diffusion's schedule: √β grows linearly.

        The names differ: what diffusers and minisd call "scaled_linear" is "linear" in CompVis, and what they
        call "linear" is "sqrt_linear" there.
        (CompVis: ldm/modules/diffusionmodules/util.py, make_beta_schedule)
        """
        # The square of a linear function starts flatter than a straight line between the same ends, so the early steps
        # add less noise than with `linear`.
        roots = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64, device="cpu")
        return cls(roots**2)

    @classmethod
    def linear(cls, beta_start: float = 1e-4, beta_end: float = 0.02, timesteps: int = 1000) -> "NoiseSchedule":
        """DDPM's schedule: β grows linearly (DDPM, section 4). CompVis calls it "sqrt_linear"."""
        return cls(torch.linspace(beta_start, beta_end, timesteps, dtype=torch.float64, device="cpu"))

    @classmethod
    def cosine(cls, timesteps: int = 1000, s: float = 0.008, max_beta: float = 0.999) -> "NoiseSchedule":
        """Improved DDPM's schedule: ᾱ falls as a squared cosine, slowly at both ends (section 3.2).

        With DDPM's linear schedule, small pictures are almost pure noise long before t = T, so the last steps teach
        the network little. s keeps the first steps from being too small, max_beta the last ones from being too large.
        """
        # ᾱ_t = f(t) / f(0),   f(t) = cos²( (t/T + s) / (1 + s) · π/2 )                (Improved DDPM, eq. 17)
        t = torch.arange(timesteps + 1, dtype=torch.float64, device="cpu") / timesteps
        f = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
        # β_t = 1 - ᾱ_t / ᾱ_{t-1}. The cosine ends at ᾱ = 0, where β would be 1. Other equations divide by ᾱ, so β is
        # clipped.
        return cls((1 - f[1:] / f[:-1]).clamp(max=max_beta))

    def __repr__(self) -> str:
        first, last = self._alphas_cumprod[0], self._alphas_cumprod[-1]
        return f"NoiseSchedule(timesteps={self.timesteps}, alphas_cumprod={first:.4g}...{last:.4g})"

    # -- reading it ----------------------------------------------------------------------------------------

    def alpha_bar(self, t: int) -> float:
        """ᾱ_t as a Python number, with float64's precision. Samplers use it, since it needs no copy from a GPU.

        Raises ValueError unless 0 <= t < T.
        """
        if not 0 <= t < self.timesteps:
            raise ValueError(f"t must lie in [0, {self.timesteps}), but it is {t}.")
        return self._alphas_cumprod[t]

    def snr(self, t: Times) -> Float[Tensor, "b"]:
        """Signal-to-noise ratio ᾱ_t / (1-ᾱ_t), [b], float32 (VDM, eq. 2). SD v1: 1175 down to 0.0047."""
        # Computed as (√ᾱ / √(1-ᾱ))², from the buffers that were rounded only at the end. Computing 1 - ᾱ here, in
        # float32, would lose three digits where ᾱ is close to 1.
        signal = extract_into_tensor(self.sqrt_alphas_cumprod, t, ndim=1)
        return (signal / extract_into_tensor(self.sqrt_one_minus_alphas_cumprod, t, ndim=1)) ** 2

    def log_snr(self, t: Times) -> Float[Tensor, "b"]:
        """log(ᾱ_t / (1-ᾱ_t)), [b], float32. It is twice the λ_t in which DPM-Solver measures the length of a step."""
        return self.snr(t).log()

    def _at(self, a: Float[Tensor, "T"], t: Times, x: Data) -> Factors:
        """a[t] with the number of dimensions, dtype and device of x, so that it can be multiplied by x."""
        if t.shape != x.shape[:1]:
            raise ValueError(
                f"t must hold one timestep for each picture, but t is {list(t.shape)} and the batch {list(x.shape)}."
            )
        return extract_into_tensor(a, t, x.ndim).to(x)

    def _signal_and_sigma(self, t: Times, x: Data) -> tuple[Factors, Factors]:
        """√ᾱ_t and √(1-ᾱ_t), by which the picture and the noise in x_t are multiplied."""
        return self._at(self.sqrt_alphas_cumprod, t, x), self._at(self.sqrt_one_minus_alphas_cumprod, t, x)

    # -- forwards ------------------------------------------------------------------------------------------

    def q_sample(self, x_0: Data, t: Times, noise: Data) -> Data:
        """Draw x_t from q(x_t | x_0): add the noise of its own timestep to each picture, in one step.

        noise: ε ~ N(0, I), shaped like x_0.
        (DDPM, eq. 4; CompVis: DDPM.q_sample)
        """
        _same_shape(x_0=x_0, noise=noise)
        signal, sigma = self._signal_and_sigma(t, x_0)
        # x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε. The squares of the two factors sum to 1. So if x_0 has variance 1, x_t has
        # variance 1 at every t, and the network's inputs always have the same scale ("variance preserving").
        return signal * x_0 + sigma * noise

    def q_mean_variance(self, x_0: Data, t: Times) -> tuple[Data, Factors, Factors]:
        """Mean [b *d], variance [b 1 ... 1] and log variance of q(x_t | x_0).

        (DDPM, eq. 4; CompVis: DDPM.q_mean_variance)
        """
        mean = self._at(self.sqrt_alphas_cumprod, t, x_0) * x_0
        variance = self._at(self.sqrt_one_minus_alphas_cumprod, t, x_0) ** 2
        return mean, variance, variance.log()

    # -- the same equation, solved for the picture and for the noise ---------------------------------------

    def predict_start_from_noise(self, x_t: Data, t: Times, noise: Data) -> Data:
        """The picture x_0 that x_t was made from, given the noise in x_t (DDPM, eq. 15; CompVis: same name)."""
        _same_shape(x_t=x_t, noise=noise)
        recip = self._at(self.sqrt_recip_alphas_cumprod, t, x_t)
        recipm1 = self._at(self.sqrt_recipm1_alphas_cumprod, t, x_t)
        # x_0 = √(1/ᾱ_t) x_t - √(1/ᾱ_t - 1) ε. Near t = T both factors are large (14.6 in SD v1), and an error in ε
        # is multiplied by the second. So a sampler's first estimates of the picture are poor.
        return recip * x_t - recipm1 * noise

    def predict_noise_from_start(self, x_t: Data, t: Times, x_0: Data) -> Data:
        """The noise that leads from x_0 to x_t: the inverse of `predict_start_from_noise`."""
        _same_shape(x_t=x_t, x_0=x_0)
        recip = self._at(self.sqrt_recip_alphas_cumprod, t, x_t)
        recipm1 = self._at(self.sqrt_recipm1_alphas_cumprod, t, x_t)
        # ε = (√(1/ᾱ_t) x_t - x_0) / √(1/ᾱ_t - 1). An error in x_0 is multiplied by a large factor at small t, where x_t
        # contains little noise.
        return (recip * x_t - x_0) / recipm1

    # -- v-prediction: if √ᾱ_t = cos φ and √(1-ᾱ_t) = sin φ, then (x_t, v) is (x_0, ε) rotated by φ --------

    def get_v(self, x_0: Data, noise: Data, t: Times) -> Data:
        """The velocity v: nearly ε where x_t is nearly clean, nearly -x_0 where x_t is nearly pure noise.

        (v-prediction, section 4 and appendix D. The 768-pixel version of Stable Diffusion 2 predicts v.)
        """
        _same_shape(x_0=x_0, noise=noise)
        signal, sigma = self._signal_and_sigma(t, x_0)
        # v = √ᾱ_t ε - √(1-ᾱ_t) x_0
        return signal * noise - sigma * x_0

    def predict_start_from_v(self, x_t: Data, t: Times, v: Data) -> Data:
        """The picture in x_t, from v (v-prediction, appendix D)."""
        _same_shape(x_t=x_t, v=v)
        signal, sigma = self._signal_and_sigma(t, x_t)
        # x_0 = √ᾱ_t x_t - √(1-ᾱ_t) v: (x_t, v) is rotated back by φ. Neither factor exceeds 1, so an error in v is not
        # amplified at any t.
        return signal * x_t - sigma * v

    def predict_noise_from_v(self, x_t: Data, t: Times, v: Data) -> Data:
        """The noise in x_t, from v. With it, a model that predicts v can be used as a sampler's eps_model."""
        _same_shape(x_t=x_t, v=v)
        signal, sigma = self._signal_and_sigma(t, x_t)
        # ε = √(1-ᾱ_t) x_t + √ᾱ_t v
        return sigma * x_t + signal * v

    # -- one step back, if x_0 is known --------------------------------------------------------------------

    def q_posterior(self, x_0: Data, x_t: Data, t: Times) -> tuple[Data, Factors, Factors]:
        """Mean [b *d], variance [b 1 ... 1] and clipped log variance of q(x_{t-1} | x_t, x_0).

        The learned reverse process p(x_{t-1} | x_t) is trained to match this without knowing x_0. DDPM's sampler uses
        the network's estimate x̂_0 in place of x_0.
        (DDPM, eq. 6 and 7; CompVis: DDPM.q_posterior)
        """
        _same_shape(x_0=x_0, x_t=x_t)
        coef1 = self._at(self.posterior_mean_coef1, t, x_t)
        coef2 = self._at(self.posterior_mean_coef2, t, x_t)
        # μ̃_t = √ᾱ_{t-1} β_t / (1-ᾱ_t) x_0  +  √α_t (1-ᾱ_{t-1}) / (1-ᾱ_t) x_t
        mean = coef1 * x_0 + coef2 * x_t
        variance = self._at(self.posterior_variance, t, x_t)
        log_variance = self._at(self.posterior_log_variance_clipped, t, x_t)
        return mean, variance, log_variance


def _same_shape(**tensors: Tensor) -> None:
    (name_a, a), (name_b, b) = tensors.items()
    if a.shape != b.shape:
        raise ValueError(f"{name_a} {list(a.shape)} and {name_b} {list(b.shape)} must have the same shape.")


class ExactDenoiser:
    """The best possible eps_model for a finite data set, in closed form: no network, no training.

    x_0_all: [n *d], the whole data set; a few thousand pictures, since it is kept in float64.

    If the data are n equally likely pictures, Bayes' rule gives the probability w_i that a noisy x was made from
    picture i. The estimate of x_0 with the smallest mean squared error is the average with these weights:

        w_i = softmax_i( -|x - √ᾱ_t x_i|² / (2 (1-ᾱ_t)) )       x̂_0 = Σ_i w_i x_i       (EDM, appendix B.3)
        ε   = (x - √ᾱ_t x̂_0) / √(1-ᾱ_t)

    A network with the smallest possible training loss would compute exactly this, and would only reproduce the
    training pictures. Real networks draw new pictures because they differ from it. With this denoiser you can try
    every sampler before any network is trained, and compare its result with an exact answer.
    """

    def __init__(self, x_0_all: Float[Tensor, "n *d"], schedule: NoiseSchedule):
        if x_0_all.ndim == 0 or len(x_0_all) == 0:
            raise ValueError(f"x_0_all must hold one picture or more, [n *d], not {list(x_0_all.shape)}.")
        self.schedule = schedule
        self.shape = x_0_all.shape[1:]
        # Apple's GPUs have no float64. In that case the data stays on the CPU, and x is moved there and back.
        device = "cpu" if x_0_all.device.type == "mps" else x_0_all.device
        self.data = x_0_all.detach().to(device).double().reshape(len(x_0_all), -1)  # [n d]
        self.squared_norms = self.data.square().sum(dim=1)  # |x_i|², [n]

    def __call__(self, x: Data, t: Times, context: Tensor | None = None) -> Data:
        """The best estimate of the noise in x, E[ε | x_t = x], [b *d].

        The arguments are those of a UNet, so it can be used in place of one; the context is ignored.
        Raises ValueError if x does not hold pictures of the data's shape.
        """
        x_0, (flat, signal, sigma) = self._x0(x, t)
        # ε = (x - √ᾱ_t x̂_0) / √(1-ᾱ_t): the noise that leads from the estimated picture to x.
        eps = (flat - signal * x_0) / sigma
        return eps.reshape(x.shape).to(x.dtype).to(x.device)

    def x0(self, x: Data, t: Times) -> Data:
        """The best estimate of the picture in x, E[x_0 | x_t = x], [b *d]: blurred while many are possible."""
        return self._x0(x, t)[0].reshape(x.shape).to(x.dtype).to(x.device)

    def posterior(self, x: Data, t: Times) -> Float[Tensor, "b n"]:
        """The probability that x was made from each of the n pictures, p(x_i | x_t = x). Each row sums to 1."""
        return self._weights(*self._flatten(x, t)).to(x.dtype).to(x.device)

    def _x0(self, x: Tensor, t: Tensor) -> tuple[Float[Tensor, "b d"], tuple[Tensor, Tensor, Tensor]]:
        flattened = self._flatten(x, t)
        return self._weights(*flattened) @ self.data, flattened

    def _flatten(self, x: Tensor, t: Tensor) -> tuple[Float[Tensor, "b d"], Float[Tensor, "b 1"], Float[Tensor, "b 1"]]:
        """x as one row for each picture, in float64 and on the data's device; √ᾱ_t; √(1-ᾱ_t)."""
        if x.shape[1:] != self.shape:
            raise ValueError(f"x {list(x.shape)} must hold pictures of the data's shape, {list(self.shape)}.")
        t = t.to(self.data.device)
        flat = x.to(self.data.device).double().reshape(len(x), -1)
        return flat, *self.schedule._signal_and_sigma(t, flat)

    def _weights(self, flat: Tensor, signal: Tensor, sigma: Tensor) -> Float[Tensor, "b n"]:
        # |x - √ᾱ x_i|² = |x|² - 2 √ᾱ x·x_i + ᾱ |x_i|². The first term is the same for every i, and the softmax
        # does not change when all its inputs are shifted alike, so it is left out. The second is a matrix product,
        # which never stores the b × n × d differences. float64 is needed because large numbers nearly cancel.
        squared_distances = signal**2 * self.squared_norms - 2 * signal * (flat @ self.data.T)  # [b n]
        return torch.softmax(-squared_distances / (2 * sigma**2), dim=1)
