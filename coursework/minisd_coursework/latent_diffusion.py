"""Exercises of stage 7: the three networks as one, and what keeps the training of it together."""

from collections.abc import Callable
from functools import wraps

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from PIL import Image
from torch import Tensor

from minisd import latent_diffusion as latent_diffusion_module
from minisd import pictures as pictures_module
from minisd import sampling
from minisd.latent_diffusion import LatentDiffusion
from minisd.sampling import SAMPLERS
from minisd.training import trainer

from .exercise import case, exercise
from .loss import ToyUNet, _put_epsilon_loss
from .noising import alphas_cumprod_of, pictures
from .places import instead_of
from .sampling import latents

# --- the running mean of the weights ---------------------------------------------------------------------------------


@instead_of("update", trainer.EMA)
@torch.no_grad()
def _put_ema(f, real, self, model):
    self.num_updates += 1
    decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
    parameters = dict(model.named_parameters())
    for name, mean in self.weights.items():
        mean.copy_(f(mean.clone(), parameters[name].detach(), decay))


@instead_of("update", trainer.EMA)
@torch.no_grad()
def _put_ema_decay(f, real, self, model):
    self.num_updates += 1
    parameters = dict(model.named_parameters())
    weights = [parameters[name].detach() for name in self.weights]
    torch._foreach_lerp_(list(self.weights.values()), weights, 1 - float(f(self.num_updates, self.decay)))


@exercise(linear=("ema", "weight"), quantities=lambda decay, **_: {"decay": decay}, may_change=("ema",), swap=_put_ema)
@case("decay 0.99", lambda: (torch.randn(3, 4), torch.randn(3, 4), 0.99))
@case("decay 0.5", lambda: (torch.randn(5, 2), torch.randn(5, 2), 0.5))
@case("decay 0", lambda: (torch.randn(4, 3), torch.randn(4, 3), 0.0))
@case("decay 0.9", lambda: (torch.randn(2, 6), torch.randn(2, 6), 0.9))
def ema_update(ema: Float[Tensor, "*d"], weight: Float[Tensor, "*d"], decay: float) -> Float[Tensor, "*d"]:
    """The running mean of a weight, after a step of the optimiser: `decay` of the old mean, and the rest of the weight.

    Return the new mean; `ema` may be changed in place. (CompVis: ldm/modules/ema.py, LitEma)
    """
    # BEGIN SOLUTION
    return decay * ema + (1 - decay) * weight
    # END SOLUTION


@exercise(tolerance=2e-6, swap=_put_ema_decay)
@case("after 1 updates", lambda: (1, 0.9999))
@case("after 10 updates", lambda: (10, 0.9999))
@case("after 100 updates", lambda: (100, 0.99))
@case("after 100000 updates", lambda: (100_000, 0.9999))
@case("after 7 updates", lambda: (7, 0.5))
@case("after 20 updates", lambda: (20, 0.5))
@case("after 1000 updates", lambda: (1000, 0.999))
def ema_decay(num_updates: int, decay: float) -> float:
    """The decay of the running mean after n updates: min(decay, (1 + n) / (10 + n)), so that the random start is soon
    forgotten.
    """
    # BEGIN SOLUTION
    return min(decay, (1 + num_updates) / (10 + num_updates))
    # END SOLUTION


# --- in and out of the latent space ----------------------------------------------------------------------------------


def _encoding_case(b: int, h: int, w: int, scale: float) -> tuple:
    return latents(b, h, w), latents(b, h, w), latents(b, h, w), scale


@instead_of("get_first_stage_encoding", LatentDiffusion)
def _put_encoding(f, real, self, encoder_posterior, generator=None):
    if isinstance(encoder_posterior, Tensor):  # of a VQModel: there is nothing to draw
        return real(self, encoder_posterior)
    mean = encoder_posterior.mean
    noise = sampling.randn(mean.shape, generator).to(mean)
    return f(mean, encoder_posterior.logvar, noise, self.scale_factor).float()


@exercise(swap=_put_encoding)
@case("Stable Diffusion's factor", lambda: _encoding_case(2, 3, 5, 0.18215))
@case("one picture, a factor above 1", lambda: _encoding_case(1, 4, 3, 1.7))
@case("square latents", lambda: _encoding_case(3, 4, 4, 0.5))
def first_stage_encoding(
    mean: Float[Tensor, "b c h w"],
    logvar: Float[Tensor, "b c h w"],
    noise: Float[Tensor, "b c h w"],
    scale_factor: float,
) -> Float[Tensor, "b c h w"]:
    """The latent that diffusion works on: a sample of N(mean, diag(exp(logvar))), scaled to variance 1.

    (CompVis: LatentDiffusion.get_first_stage_encoding)
    """
    # BEGIN SOLUTION
    std = torch.exp(0.5 * logvar)
    return scale_factor * (mean + std * noise)
    # END SOLUTION


class ToyDecoder(torch.nn.Module):
    """Not linear, so that it makes a difference whether one scales before or behind it."""

    def forward(self, z: Tensor) -> Tensor:
        return 1.5 * torch.tanh(z[:, :3].repeat_interleave(2, -1).repeat_interleave(2, -2) + 0.3 * z[:, 3:].mean())


@instead_of("decode_first_stage", LatentDiffusion)
@torch.no_grad()
def _put_decoding(f, real, self, z):
    return f(z, self.scale_factor, self.first_stage_model.decode)


@exercise(swap=_put_decoding)
@case("Stable Diffusion's factor", lambda: (0.3 * latents(), 0.18215, ToyDecoder()))
@case("one latent, a factor above 1", lambda: (latents(1), 1.7, ToyDecoder()))
@case("square latents", lambda: (latents(3, 4, 4), 0.5, ToyDecoder()))
def decode_first_stage(
    z: Float[Tensor, "b c h w"], scale_factor: float, decode: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b 3 H W"]:
    """Scaled latents to pictures: `decode` is the autoencoder's decoder, which was trained on unscaled latents.

    (CompVis: LatentDiffusion.decode_first_stage)
    """
    # BEGIN SOLUTION
    return decode(z / scale_factor)
    # END SOLUTION


@instead_of("to_pil", pictures_module)
def _put_uint8(f, real, images):
    return [Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())) for picture in f(images)]


@exercise(tolerance=1e-6, swap=_put_uint8)
@case("from -1.5 to 1.5", lambda: (torch.linspace(-1.5, 1.5, 2 * 3 * 4 * 5).view(2, 3, 4, 5),))
@case("a square picture", lambda: (torch.rand(1, 3, 4, 4) * 2 - 1,))
@case("black, grey, white", lambda: (torch.tensor([-1.0, 0.25, 1.0]).view(1, 3, 1, 1),))
def to_uint8(x: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """Pictures in [-1, 1] to bytes: -1 becomes 0, 1 becomes 255, rounded to the nearest; what lies outside is clamped.
    """
    # BEGIN SOLUTION
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    # END SOLUTION


# --- drawing ---------------------------------------------------------------------------------------------------------


@instead_of("randn", latent_diffusion_module)
def _put_noise(f, real, shape, generator=None):
    """In the place of x_T, the first that each generator draws."""
    seeds = [g.initial_seed() for g in generator]
    fresh = [torch.Generator().manual_seed(seed).get_state() for seed in seeds]
    is_first = all(map(torch.equal, fresh, (g.get_state() for g in generator)))
    drawn = real(shape, generator)  # the generators move on
    return f(seeds, list(shape[1:])).float() if is_first else drawn


@exercise(tolerance=1e-6, swap=_put_noise)
@case("seeds 0 and 1", lambda: ([0, 1], [4, 3, 5]))
@case("one seed", lambda: ([7], [4, 2, 2]))
@case("a seed twice", lambda: ([3, 3, 9], [2, 4, 4]))
def initial_noise(seeds: list[int], shape: list[int]) -> Float[Tensor, "b c h w"]:
    """x_T for a batch: picture k is drawn from N(0, I) by a generator of its own, on the CPU, seeded with seeds[k].

    So a picture is the same whatever is drawn beside it. `shape` is that of one latent, [c, h, w].
    """
    # BEGIN SOLUTION
    return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
    # END SOLUTION


class ToyEps(torch.nn.Module):
    """eps_model(x, t) that is not linear and wants t as a tensor [b] of integers, as a UNet does."""

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        if not isinstance(t, Tensor) or t.shape != x.shape[:1] or t.is_floating_point():
            got = f"{list(t.shape)} of {t.dtype}" if isinstance(t, Tensor) else type(t).__name__
            raise ValueError(f"t must be a tensor of integers, one for each picture, [{len(x)}], not {got}")
        return torch.tanh(x) * (0.5 + 0.05 * t.view(-1, 1, 1, 1))


def _put_loop(f):
    @wraps(SAMPLERS["ddim"])
    def sampler(eps_model, x_T, schedule, steps=50, *, spacing="leading", timesteps=None, before_step=None, **_):
        seen, after = [], []

        def listens(x, t):
            after.append(x.clone())
            if before_step:
                x.copy_(before_step(x, int(t[0])))  # in place: the step is made from this x
            answer = sampling._ask_again(eps_model, x, len(seen), int(t[0]))
            seen.append((x.clone(), int(t[0]), answer))
            return answer.eps

        timesteps = timesteps or sampling.make_timesteps(steps, schedule.timesteps, spacing)
        last = f(listens, x_T.clone(), list(timesteps), schedule.alphas_cumprod.to(x_T.device)).to(x_T)
        for i, ((x_t, t, answer), x) in enumerate(zip(seen, [*after[1:], last], strict=True)):
            x0 = sampling.predict_x0(x_t, answer.eps, schedule.alpha_bar(t))
            yield sampling.Step(i, t, x_t, answer.eps, x0, x, answer.cond, answer.uncond)

    return [(SAMPLERS, "ddim", sampler), (sampling, "ddim", sampler)]


@exercise(swap=_put_loop)
@case("four steps", lambda: (ToyEps(), latents(), [9, 7, 4, 1], alphas_cumprod_of(12)))
@case("one step", lambda: (ToyEps(), latents(1), [5], alphas_cumprod_of(10)))
@case("all timesteps of square latents", lambda: (ToyEps(), latents(3, 4, 4), [5, 4, 3, 2, 1], alphas_cumprod_of(6)))
def sampling_loop(
    eps_model: Callable[[Tensor, Tensor], Tensor],
    x_T: Float[Tensor, "b c h w"],
    timesteps: list[int],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, "b c h w"]:
    """From noise to a latent: DDIM without randomness (η = 0) through all `timesteps`, which fall.

    Each step leads to the next timestep of the list, the last one to t = 0, as in CompVis. eps_model(x, t) wants t as
    a tensor of integers, one for each picture.

        x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t,     x_next = √ᾱ_next x̂_0 + √(1-ᾱ_next) ε
    """
    # BEGIN SOLUTION
    x = x_T
    for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):
        eps = eps_model(x, torch.full((len(x),), t))
        a_t, a_next = alphas_cumprod[t], alphas_cumprod[t_next]
        x0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()
        x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps
    return x
    # END SOLUTION


# --- training --------------------------------------------------------------------------------------------------------


def _training_case(t: list[int], T: int, drop: list[bool], scale: float, h: int = 4, w: int = 5) -> tuple:
    b = len(t)
    latent = ToyUNet(), pictures(b, h, w), torch.rand(b, 3, h, w), pictures(b, h, w), scale
    contexts = torch.randn(b, 3, 6), torch.randn(1, 3, 6), torch.tensor(drop)
    return *latent, *contexts, torch.tensor(t), pictures(b, h, w), alphas_cumprod_of(T)


def _put_training_step(f):
    """The loss from a latent that is drawn and scaled already: a latent without a doubt, in the scale 1."""

    def whole(model, x_0, context, t, noise, alphas_cumprod):
        kept = torch.zeros(len(x_0), dtype=torch.bool, device=x_0.device)
        none = torch.zeros_like(x_0)
        return f(model, x_0, none, none, 1.0, context, torch.zeros_like(context[:1]), kept, t, noise, alphas_cumprod)

    return _put_epsilon_loss(whole)


@exercise(gradients=("model",), swap=_put_training_step)
@case("three pictures, one caption dropped", lambda: _training_case([3, 8, 5], 12, [False, True, False], 0.4))
@case("one picture", lambda: _training_case([6], 12, [False], 2.0, 3, 4))
@case("as many pictures as columns", lambda: _training_case([1, 9, 4, 6], 12, [True, False, False, True], 0.7, 3, 4))
def training_loss(
    model: Callable[[Tensor, Tensor, Tensor], Tensor],
    mean: Float[Tensor, "b c h w"],
    std: Float[Tensor, "b c h w"],
    encoder_noise: Float[Tensor, "b c h w"],
    scale_factor: float,
    context: Float[Tensor, "b n d"],
    empty_context: Float[Tensor, "1 n d"],
    drop: Bool[Tensor, "b"],
    t: Int[Tensor, "b"],
    noise: Float[Tensor, "b c h w"],
    alphas_cumprod: Float[Tensor, "T"],
) -> Float[Tensor, ""]:
    """The loss of one training step of latent diffusion, from what the encoders said to one number.

    Draw z from N(mean, std²) with encoder_noise, and scale it; noise it to t; replace the context where `drop` is set
    by the empty one; ask model(z_t, t, context) for the noise; return the mean squared error, through which gradients
    flow.
    """
    # BEGIN SOLUTION
    z = scale_factor * (mean + std * encoder_noise)
    alpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)
    z_t = alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise
    context = torch.where(drop[:, None, None], empty_context, context)
    prediction = model(z_t, t, context)
    return (noise - prediction).square().mean()
    # END SOLUTION
