"""Exercises of stage 7: the three networks as one, and what keeps the training of it together."""

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int, UInt8
from torch import Tensor

from .. import drawing, sampling
from .. import latent_diffusion as latent_diffusion_module
from ..latent_diffusion import LatentDiffusion
from ..training import trainer
from .exercise import exercise
from .loss import ToyUNet, _put_epsilon_loss
from .noising import NOT_RESHAPED, alphas_cumprod_of
from .sampling import SAMPLERS, latents

# --- the running mean of the weights ---------------------------------------------------------------------------------


def _put_ema(f):
    @torch.no_grad()
    def update(self, model):
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = dict(model.named_parameters())
        for name, mean in self.weights.items():
            mean.copy_(f(mean.clone(), parameters[name].detach(), decay))

    return [(trainer.EMA, "update", update)]


def _put_ema_decay(f):
    @torch.no_grad()
    def update(self, model):
        self.num_updates += 1
        parameters = dict(model.named_parameters())
        weights = [parameters[name].detach() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), weights, 1 - float(f(self.num_updates, self.decay)))

    return [(trainer.EMA, "update", update)]


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "decay 0.99": {"ema": torch.randn(3, 4), "weight": torch.randn(3, 4), "decay": 0.99},
        "decay 0.5": {"ema": torch.randn(5, 2), "weight": torch.randn(5, 2), "decay": 0.5},
        "decay 0": {"ema": torch.randn(4, 3), "weight": torch.randn(4, 3), "decay": 0.0},
        "decay 0.9": {"ema": torch.randn(2, 6), "weight": torch.randn(2, 6), "decay": 0.9},
    },
    hints=("The mean keeps `decay` of itself, and takes the rest from the weight.",),
    mistakes=[
        ("decay * ema + (1 - decay) * weight", "(1 - decay) * ema + decay * weight",
         "ema and weight have exchanged their factors: with a decay of 0.999 the mean should hardly move."),
        ("decay * ema + (1 - decay) * weight", "decay * ema + weight",
         "The factor (1 - decay) of the weight is missing: the mean would grow without end."),
        ("decay * ema + (1 - decay) * weight", "ema + (1 - decay) * weight",
         "The factor `decay` of ema is missing: the mean would grow without end."),
        ("decay * ema + (1 - decay) * weight", "decay * ema",
         "The weight does not come in: the mean would shrink to 0."),
        ("decay * ema + (1 - decay) * weight", "ema - (1 - decay) * (weight - ema)",
         "The sign is wrong: the mean moves away from the weight."),
        ("decay * ema + (1 - decay) * weight", "(ema + weight) / 2",
         "You took the plain mean of both: `decay` says how much of the old one is kept."),
        ("decay * ema + (1 - decay) * weight", "ema + decay * (weight - ema) / 2",
         "The step is (1 - decay) of the difference."),
        ("decay * ema + (1 - decay) * weight", "decay * ema - (1 - decay) * weight",
         "A minus for a plus: the weight's part is added."),
        ("decay * ema + (1 - decay) * weight", "decay * (ema + weight)",
         "Both are multiplied by `decay`: the weight by 1 - decay."),
        ("decay * ema + (1 - decay) * weight", "0.999 * ema + 0.001 * weight",
         "You wrote down the decay 0.999: it comes with the argument."),
        ("decay * ema + (1 - decay) * weight", "weight",
         "You returned the weight itself: nothing of the mean is left."),
        ("decay * ema + (1 - decay) * weight", "ema",
         "You returned the mean as it was: nothing of the weight comes in."),
    ],
    linear=("ema", "weight"),
    quantities=lambda decay, **_: {"decay": decay},
    may_change=("ema",),
    swap=_put_ema,
)  # fmt: skip
def ema_update(ema: Float[Tensor, "*d"], weight: Float[Tensor, "*d"], decay: float) -> Float[Tensor, "*d"]:
    """The running mean of a weight, after a step of the optimiser: `decay` of the old mean, and the rest of the weight.

    Return the new mean; `ema` may be changed in place. (CompVis: ldm/modules/ema.py, LitEma)
    """
    # BEGIN SOLUTION
    return decay * ema + (1 - decay) * weight
    # END SOLUTION


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {f"after {n} updates": {"num_updates": n, "decay": d} for n,
                   d in ((1, 0.9999), (10, 0.9999), (100, 0.99), (100_000, 0.9999), (7, 0.5), (20, 0.5),
                         (1000, 0.999))},
    hints=("A fraction that begins small and goes to 1, cut off at `decay`.",),
    mistakes=[
        ("min(", "max(", "You took the larger of the two: the decay warms up from small values to `decay`."),
        ("min(decay, (1 + num_updates) / (10 + num_updates))", "decay",
         "Yours is `decay` from the start: the warm-up (1 + n) / (10 + n) is missing, upside down or without its"
         " parentheses, so that it is never the smaller of the two. The random start would be remembered for"
         " thousands of steps."),
        ("min(decay, (1 + num_updates) / (10 + num_updates))", "(1 + num_updates) / (10 + num_updates)",
         "The bound is missing: it never exceeds `decay`."),
        ("(1 + num_updates) / (10 + num_updates)", "num_updates / (10 + num_updates)",
         "The 1 in the numerator is missing: (1 + n) / (10 + n)."),
        ("(1 + num_updates) / (10 + num_updates)", "(1 + num_updates) / 10",
         "The n in the denominator is missing: (1 + n) / (10 + n)."),
        ("min(decay, (1 + num_updates) / (10 + num_updates))", "decay * (1 + num_updates) / (10 + num_updates)",
         "You multiplied the two: the smaller one counts."),
        ("min(decay, (1 + num_updates) / (10 + num_updates))",
         "1 - min(decay, (1 + num_updates) / (10 + num_updates))",
         "You returned 1 - decay, the part that is new."),
        ("min(decay, (1 + num_updates) / (10 + num_updates))", "decay**num_updates",
         "A power of the decay falls with n: it has to rise."),
        ("min(decay, (1 + num_updates) / (10 + num_updates))", "1 - decay**num_updates",
         "This is Adam's correction of the start: here it is (1 + n) / (10 + n)."),
        ("min(decay, (1 + num_updates) / (10 + num_updates))", "(1 + num_updates) // (10 + num_updates) * decay",
         "An integer division: // rounds down to 0."),
    ],
    tolerance=2e-6,
    swap=_put_ema_decay,
)  # fmt: skip
def ema_decay(num_updates: int, decay: float) -> float:
    """The decay of the running mean after n updates: min(decay, (1 + n) / (10 + n)), so that the random start is soon
    forgotten.
    """
    # BEGIN SOLUTION
    return min(decay, (1 + num_updates) / (10 + num_updates))
    # END SOLUTION


# --- in and out of the latent space ----------------------------------------------------------------------------------


def _encoding_case(b: int, h: int, w: int, scale: float) -> dict:
    return {"mean": torch.randn(b, 4, h, w), "logvar": torch.randn(b, 4, h, w), "noise": torch.randn(b, 4, h, w),
            "scale_factor": scale}


def _put_encoding(f):
    def get_first_stage_encoding(self, encoder_posterior, generator=None):
        noise = torch.randn(encoder_posterior.mean.shape, generator=generator, device="cpu").to(encoder_posterior.mean)
        return f(encoder_posterior.mean, encoder_posterior.logvar, noise, self.scale_factor).to(noise)

    return [(LatentDiffusion, "get_first_stage_encoding", get_first_stage_encoding)]


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "Stable Diffusion's factor": _encoding_case(2, 3, 5, 0.18215),
        "one picture, a factor above 1": _encoding_case(1, 4, 3, 1.7),
        "square latents": _encoding_case(3, 4, 4, 0.5),
    },
    hints=("First a sample of the distribution, then scale all of it.", "z = scale_factor (mean + exp(logvar/2) ε)"),
    mistakes=[
        ("scale_factor * (", "(", "The scale factor is missing: the UNet wants latents of variance 1."),
        ("scale_factor * (", "1 / scale_factor * (",
         "You divided by the scale factor: on the way in one multiplies, on the way out one divides."),
        ("scale_factor * (mean + std * noise)", "scale_factor * mean + std * noise",
         "Only the mean is scaled: the whole sample is. Parentheses!"),
        ("scale_factor * (mean + std * noise)", "mean + scale_factor * std * noise",
         "Only the noise is scaled: the whole sample is."),
        ("scale_factor * (mean + std * noise)", "scale_factor * mean",
         "You scaled the mean: a sample is wanted, with its noise."),
        ("torch.exp(0.5 * logvar)", "torch.exp(logvar)",
         "exp(logvar) is the variance: the standard deviation is exp(logvar / 2)."),
        ("torch.exp(0.5 * logvar)", "logvar", "You took the log variance for the standard deviation: exp(logvar / 2)."),
        ("scale_factor * (mean + std * noise)", "scale_factor * (scale_factor * mean + std * noise)",
         "The mean is scaled twice."),
        ("scale_factor * (mean + std * noise)", "scale_factor * (mean + scale_factor * std * noise)",
         "The noise is scaled twice."),
        ("std * noise", "noise", "The noise is not scaled by the standard deviation."),
        ("mean + std", "mean - std", "The noise is subtracted: it is added."),
        ("scale_factor * (mean", "scale_factor**2 * (mean", "The scale factor comes in twice."),
        ("scale_factor * (mean + std * noise)", "0.18215 * (mean + std * noise)",
         "You wrote down 0.18215: the factor comes with the argument."),
        ("scale_factor * (mean + std * noise)", "scale_factor + mean + std * noise",
         "The factor is added: it multiplies."),
        ("scale_factor * (mean + std * noise)", "(mean + std * noise - (mean + std * noise).mean()) * scale_factor",
         "You subtracted the mean of the latents: they are only scaled."),
        ("torch.exp(0.5 * logvar)", "torch.exp(-0.5 * logvar)",
         "The sign in the exponent is wrong: exp(+ logvar / 2)."),
    ],
    swap=_put_encoding,
)  # fmt: skip
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


def _put_decoding(f):
    @torch.no_grad()
    def decode_first_stage(self, z):
        return f(z, self.scale_factor, self.first_stage_model.decode)

    return [(LatentDiffusion, "decode_first_stage", decode_first_stage)]


@exercise(
    difficulty=1,
    minutes=5,
    cases=lambda: {
        "Stable Diffusion's factor": {"z": 0.3 * latents(), "scale_factor": 0.18215, "decode": ToyDecoder()},
        "one latent, a factor above 1": {"z": latents(1), "scale_factor": 1.7, "decode": ToyDecoder()},
        "square latents": {"z": latents(3, 4, 4), "scale_factor": 0.5, "decode": ToyDecoder()},
    },
    hints=("On the way in the latent was multiplied by scale_factor. The decoder wants it as it was before.",),
    mistakes=[
        ("z / scale_factor", "z * scale_factor",
         "You multiplied by the scale factor: on the way out one divides. (Pictures become grey and flat.)"),
        ("z / scale_factor", "z", "The scale factor is missing: the decoder wants latents as the encoder made them."),
        ("decode(z / scale_factor)", "decode(z) / scale_factor",
         "You scaled the picture: the latent is scaled, before it is decoded."),
        ("decode(z / scale_factor)", "decode(z) * scale_factor",
         "You scaled the picture: the latent is divided by the factor, before it is decoded."),
        ("z / scale_factor", "z / 0.18215", "You wrote down 0.18215: the factor comes with the argument."),
        ("decode(z / scale_factor)", "decode(z / scale_factor).clamp(-1, 1)",
         "You clamped to [-1, 1]: the picture is returned as it is, and clamped when it is shown."),
        ("decode(z / scale_factor)", "decode(z / scale_factor).clamp(0, 1)",
         "You clamped to [0, 1]: pictures are in about [-1, 1], and are clamped when they are shown."),
        ("decode(z / scale_factor)", "(decode(z / scale_factor) + 1) / 2",
         "You mapped to [0, 1]: pictures stay in about [-1, 1] here."),
        ("z / scale_factor", "z / scale_factor**2", "You divided twice."),
        ("z / scale_factor", "z / scale_factor**0.5",
         "There is no root: the factor was multiplied to the latents, not to their variance."),
        ("decode(z / scale_factor)", "z / scale_factor", "The latent is not decoded."),
        ("z / scale_factor", "z - scale_factor", "You subtracted the factor: divide by it."),
    ],
    swap=_put_decoding,
)  # fmt: skip
def decode_first_stage(
    z: Float[Tensor, "b c h w"], scale_factor: float, decode: Callable[[Tensor], Tensor]
) -> Float[Tensor, "b 3 H W"]:
    """Scaled latents to pictures: `decode` is the autoencoder's decoder, which knows nothing of the scale.

    (CompVis: LatentDiffusion.decode_first_stage)
    """
    # BEGIN SOLUTION
    return decode(z / scale_factor)
    # END SOLUTION


def _put_uint8(f):
    from PIL import Image

    def to_pil(images):
        return [Image.fromarray(np.ascontiguousarray(picture.permute(1, 2, 0).cpu().numpy())) for picture in f(images)]

    return [(drawing, "to_pil", to_pil)]


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "from -1.5 to 1.5": {"x": torch.linspace(-1.5, 1.5, 2 * 3 * 4 * 5).view(2, 3, 4, 5)},
        "a square picture": {"x": torch.rand(1, 3, 4, 4) * 2 - 1},
        "black, grey, white": {"x": torch.tensor([-1.0, 0.25, 1.0]).view(1, 3, 1, 1)},
    },
    hints=("-1 becomes 0 and 1 becomes 255; what lies outside is clamped first.", "(x + 1) · 127.5, rounded."),
    mistakes=[
        (".clamp(-1, 1)", "", "It is not clamped: 256 becomes 0 in a byte, and a bright spot black."),
        (".round()", "", "It is cut off, not rounded: 254.99 becomes 254, and all pictures a little darker."),
        ("(x.clamp(-1, 1) + 1) * 127.5", "x.clamp(0, 1) * 255",
         "You took the picture to be in [0, 1]: it is in [-1, 1]."),
        ("* 127.5", "* 128", "1 becomes 256 in yours, which is 0 in a byte: (x + 1) · 127.5."),
        ("((x.clamp(-1, 1) + 1) * 127.5).round()", "(x * 128 + 128).round().clamp(0, 255)",
         "You stretched to 256 steps, x · 128 + 128: from 0 to 255 it is (x + 1) · 127.5."),
        ("((x.clamp(-1, 1) + 1) * 127.5).round()", "(x * 127 + 128).round().clamp(0, 255)",
         "x · 127 + 128 does not begin at 0: it is (x + 1) · 127.5."),
        ("((x.clamp(-1, 1) + 1) * 127.5).round()", "((x.clamp(-1, 1) * 0.5 + 0.5).round() * 255)",
         "You rounded too early, to 0 or 1: first to [0, 255], then round."),
        ("* 127.5", "* 127", "White becomes 254: (x + 1) · 127.5."),
        ("* 127.5", "* 255", "(x + 1) goes from 0 to 2: multiply by 127.5."),
        ("((x.clamp(-1, 1) + 1) * 127.5).round()", "((x.clamp(-1, 1) + 1) * 128).floor().clamp(max=255)",
         "You cut [-1, 1] into 256 equal parts, (x + 1) · 128 cut off: it is (x + 1) · 127.5, rounded."),
        (".round()", ".ceil()", "You rounded up: to the nearest."),
        ("((x.clamp(-1, 1) + 1) * 127.5).round()", "((x.clamp(-1, 1) + 1) / 2)",
         "You mapped to [0, 1], and a byte of that is 0 or 1: multiply by 255 and round."),
        (".to(torch.uint8)", ".long()", "These are integers, but not bytes: torch.uint8 is wanted."),
        (".to(torch.uint8)", "", "It is still float: bytes are wanted, torch.uint8."),
        (".to(torch.uint8)", ".to(torch.int8)", "int8 goes from -128 to 127: torch.uint8."),
        ("(x.clamp(-1, 1) + 1) * 127.5", "(x - x.min()) / (x.max() - x.min()) * 255",
         "You stretched to the smallest and largest value: -1 is black and 1 is white, for all pictures."),
        ("(x.clamp(-1, 1) + 1)", "(x + 1).clamp(0, 1)", "You clamped (x + 1) to [0, 1]: it goes from 0 to 2."),
        ("(x.clamp(-1, 1) + 1)", "(1 - x.clamp(-1, 1))", "Black and white are exchanged."),
        (".to(torch.uint8)", ".to(torch.uint8).permute(0, 2, 3, 1)",
         "The channels are last: the shape stays [b 3 h w]."),
        ("x.clamp(-1, 1)", "x.clamp(0, 1)",
         "You clamped to [0, 1] before the shift, and the dark half is lost: clamp x to [-1, 1]."),
        ("((x.clamp(-1, 1) + 1) * 127.5)", "((x + 1) * 255).clamp(0, 255)",
         "You multiplied (x + 1) by 255: it goes from 0 to 2, so the factor is 127.5, and the bright half is lost."),
        ("((x.clamp(-1, 1) + 1) * 127.5)", "((x.clamp(-1, 1) + 1) / 510)",
         "All bytes are 0: (x + 1) is multiplied by 127.5, not divided."),
    ],
    tolerance=1e-6,
    swap=_put_uint8,
)  # fmt: skip
def to_uint8(x: Float[Tensor, "b 3 h w"]) -> UInt8[Tensor, "b 3 h w"]:
    """Pictures in [-1, 1] to bytes: -1 becomes 0, 1 becomes 255, rounded to the nearest; what lies outside is clamped.
    """
    # BEGIN SOLUTION
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    # END SOLUTION


# --- drawing ---------------------------------------------------------------------------------------------------------


def _put_noise(f):
    real = latent_diffusion_module.randn

    def randn(shape, generator=None):
        if isinstance(generator, list) and len({g.initial_seed() for g in generator}) == len(generator):
            drawn = f([g.initial_seed() for g in generator], list(shape[1:]))
            real(shape, generator)  # the generators move on, as if they had drawn
            return drawn.float()
        return real(shape, generator)

    return [(latent_diffusion_module, "randn", randn)]


@exercise(
    difficulty=2,
    minutes=10,
    cases=lambda: {
        "seeds 0 and 1": {"seeds": [0, 1], "shape": [4, 3, 5]},
        "one seed": {"seeds": [7], "shape": [4, 2, 2]},
        "a seed twice": {"seeds": [3, 3, 9], "shape": [2, 4, 4]},
    },
    hints=(
        "A generator for each seed: torch.Generator().manual_seed(seed).",
        "torch.stack makes a batch of the pictures' noises.",
    ),
    mistakes=[
        ("torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])",
         "torch.randn(len(seeds), *shape, generator=torch.Generator().manual_seed(seeds[0]))",
         "One generator draws for the whole batch: picture k then depends on how many are drawn beside it. A"
         " generator for each seed."),
        ("return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])",
         "g = torch.Generator().manual_seed(seeds[0])\nreturn torch.stack([torch.randn(shape, generator=g) for _ in"
         " seeds])",
         "One generator, seeded with the first seed, draws all pictures one after the other: what the second is then"
         " depends on the first. A generator for each seed."),
        ("return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])",
         "g = torch.Generator().manual_seed(seeds[-1])\nreturn torch.stack([torch.randn(shape, generator=g) for _ in"
         " seeds])",
         "One generator, seeded with the last seed, draws all pictures: a generator for each seed."),
        ("torch.randn(shape, generator=torch.Generator().manual_seed(seed))",
         "torch.from_numpy(np.random.RandomState(seed).randn(*shape)).float()",
         "NumPy's generator draws other numbers from the same seed: torch.randn with a torch.Generator."),
        ("torch.randn(shape, generator=torch.Generator().manual_seed(seed))",
         "torch.from_numpy(np.random.default_rng(seed).standard_normal(shape)).float()",
         "NumPy's default_rng draws other numbers from the same seed: torch.randn with a torch.Generator."),
        ("torch.randn(shape,", "torch.rand(shape,",
         "torch.rand draws evenly from [0, 1]: the noise is normal, torch.randn."),
        ("torch.stack(", "torch.cat(", "torch.cat joins the channels: torch.stack makes the axis of the batch."),
        ("manual_seed(seed)", "manual_seed(seeds[0])", "Every picture has the first seed, and the same noise."),
        ("return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])",
         "return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed + k)) for k, seed in"
         " enumerate(seeds)])",
         "You added the place in the batch to the seed: picture k is drawn from seeds[k] itself."),
        ("return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])",
         "return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seeds[0] + k)) for k in"
         " range(len(seeds))])",
         "You counted on from the first seed: picture k is drawn from seeds[k]."),
        ("manual_seed(seed)", "manual_seed(seed + 1)", "Your seeds are one too large."),
        ("return torch.stack(", "return 0.18215 * torch.stack(", "The noise is scaled: x_T has the variance 1."),
        ("torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]",
         "torch.randn(shape, generator=torch.Generator().manual_seed(k)) for k, _ in enumerate(seeds)]",
         "You used 0, 1, 2, ... as seeds: those that are given."),
        ("return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])",
         "g = torch.Generator().manual_seed(seeds[0])\nreturn torch.stack([torch.randn(shape,"
         " generator=g.manual_seed(sum(seeds))) for seed in seeds])",
         "All pictures are drawn from the sum of the seeds."),
    ],
    tolerance=1e-6,
    swap=_put_noise,
)  # fmt: skip
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
    def sampler(eps_model, x_T, schedule, steps=50, eta=0.0, *, spacing="leading", timesteps=None, **_):
        seen = []

        def listens(x, t):
            answer = sampling._predict(eps_model, x, len(seen), int(t[0]))
            seen.append((x, int(t[0]), answer))
            return answer.eps

        timesteps = timesteps or sampling.make_timesteps(steps, schedule.timesteps, spacing)
        last = f(listens, x_T, list(timesteps), schedule.alphas_cumprod.to(x_T.device)).to(x_T)
        after = [x for x, *_ in seen[1:]] + [last]
        for i, ((x_t, t, answer), x) in enumerate(zip(seen, after, strict=True)):
            a_t = schedule.alpha_bar(t)
            x0 = (x_t - (1 - a_t) ** 0.5 * answer.eps) / a_t**0.5
            yield sampling.Step(i, t, x_t, answer.eps, x0, x, answer.cond, answer.uncond)

    return [(SAMPLERS, "ddim", sampler)]


@exercise(
    difficulty=4,
    minutes=30,
    cases=lambda: {
        "four steps": {"eps_model": ToyEps(), "x_T": latents(), "timesteps": [9, 7, 4, 1],
                       "alphas_cumprod": alphas_cumprod_of(12)},
        "one step": {"eps_model": ToyEps(), "x_T": latents(1), "timesteps": [5],
                     "alphas_cumprod": alphas_cumprod_of(10)},
        "all timesteps of square latents": {"eps_model": ToyEps(), "x_T": latents(3, 4, 4),
                                            "timesteps": [5, 4, 3, 2, 1], "alphas_cumprod": alphas_cumprod_of(6)},
    },
    hints=(
        "For each timestep: ask the model, guess x_0, and noise it to the level of the next one.",
        "The next of timesteps[i] is timesteps[i + 1]; after the last one comes 0, as CompVis has it: ᾱ_0.",
        "The model wants t as a tensor: torch.full((len(x),), t).",
    ),
    mistakes=[
        ("[*timesteps[1:], 0]", "[t - 1 for t in timesteps]",
         "You went to t - 1: where timesteps are left out, a step leads to the next one of the list."),
        ("alphas_cumprod[t_next]", "alphas_cumprod[t_next] if t_next else torch.tensor(1.0)",
         "Your last step leads to ᾱ = 1, or you returned the last x_0, which is the same: asked for is ᾱ_0, as"
         " CompVis has it."),
        ("a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps", "x0",
         "You put x_0 in the place of x: it has to be noised again, to the level of the next timestep."),
        ("a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps", "a_t.sqrt() * x0 + (1 - a_t).sqrt() * eps",
         "Your step leads back to where it came from: ᾱ of the next timestep belongs there."),
        ("[*timesteps[1:], 0], strict=True", "timesteps[1:], strict=False",
         "The last step is missing: the last timestep of the list is visited, too, and leads to t = 0."),
        ("eps = eps_model(x, ", "eps = eps_model(x_T, ",
         "The model is asked about x_T again and again: it is asked about x."),
        ("(x - (1 - a_t).sqrt() * eps) / a_t.sqrt()", "(x + (1 - a_t).sqrt() * eps) / a_t.sqrt()",
         "In x_0 the noise is added: subtract it."),
        ("(x - (1 - a_t).sqrt() * eps) / a_t.sqrt()", "(x - (1 - a_t).sqrt() * eps)", "x_0 is not divided by √ᾱ_t."),
        ("(x - (1 - a_t).sqrt() * eps) / a_t.sqrt()", "(x - (1 - a_t) * eps) / a_t.sqrt()",
         "In x_0 the noise has the factor √(1-ᾱ_t): the root is missing."),
        ("(1 - a_next).sqrt() * eps", "(1 - a_next) * eps",
         "The noise is put back with the factor √(1-ᾱ): the root is missing."),
        ("(1 - a_next).sqrt() * eps", "0 * eps", "The noise is not put back: x_0 alone is no x_t."),
        ("x = x_T\nfor t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):",
         "x = x_T\nfor t, t_next in zip(timesteps[:1], [*timesteps[1:], 0], strict=False):",
         "Only the first step is taken: is there a `return` inside of the loop?"),
        ("torch.full((len(x),), t)", "torch.full((len(x),), timesteps.index(t))",
         "The model is told the number of the step, 0, 1, 2, ...: it is told the timestep itself."),
        ("(1 - a_next).sqrt() * eps", "(1 - a_next).sqrt() * torch.randn_like(x)",
         "You put fresh noise back: with η = 0 it is the model's ε, and nothing is random."),
        ("for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):",
         "for t, t_next in zip(range(timesteps[0], 0, -1), range(timesteps[0] - 1, -1, -1), strict=True):",
         "You went through every t: only through those of the list."),
        ("(x - (1 - a_t).sqrt() * eps) / a_t.sqrt()", "((x - (1 - a_t).sqrt() * eps) / a_t.sqrt()).clamp(-1, 1)",
         "You clamped x_0 to [-1, 1]: that suits pixels, but these are latents."),
        ("alphas_cumprod[t_next]", "alphas_cumprod[timesteps.index(t)]",
         "ᾱ is read at the number of the step, 0, 1, 2, ...: it is read at the next timestep."),
        ("zip(timesteps, ", "zip(timesteps[::-1], ",
         "You go through the timesteps backwards: they fall already, from much noise to little."),
        ("torch.full((len(x),), t)", "torch.full((len(x),), t_next)",
         "The model is told the next timestep: it is told the one at which x is."),
        ("torch.full((len(x),), t)", "t",
         "The model is given t as a Python number: it wants a tensor, one t for each picture, torch.full((b,), t)."),
        ("a_next.sqrt() * x0", "a_next * x0", "x_0 is shrunk by √ᾱ of the next timestep: the root is missing."),
        ("torch.full((len(x),), t)", "torch.tensor([t])",
         "The model is given one t for the whole batch: one for each picture, torch.full((b,), t)."),
        ("for t, t_next in zip(timesteps, [*timesteps[1:], 0], strict=True):\n    eps = eps_model(x,"
         " torch.full((len(x),), t))",
         "eps = eps_model(x, torch.full((len(x),), timesteps[0]))\nfor t, t_next in zip(timesteps, [*timesteps[1:],"
         " 0], strict=True):",
         "The model is asked once only, at the first timestep: ask it anew at each. (With one ε, all steps amount to"
         " a single one to t = 0.)"),
        ("[*timesteps[1:], 0]", "[*timesteps[1:], timesteps[0]]",
         "The last step leads back to the first timestep, to nearly pure noise: after the last one comes t = 0."),
        ("x0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()\n    x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps",
         "x0 = (x - (1 - a_t) * eps) / a_t\n    x = a_next * x0 + (1 - a_next) * eps",
         "All roots are missing: the factors of picture and noise are √ᾱ and √(1-ᾱ)."),
        ("x0 = (x - (1 - a_t).sqrt() * eps) / a_t.sqrt()\n    x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps",
         "x = x - eps",
         "You subtract ε at each step: guess x_0 by the formula, and noise it again to the level of the next"
         " timestep."),
        ("x = a_next.sqrt() * x0 + (1 - a_next).sqrt() * eps",
         "x = a_next.sqrt() * x0 + (1 - a_t).sqrt() * eps",
         "You put the noise back at the old level, √(1-ᾱ_t): x_next has √(1-ᾱ_next) of it."),
    ],
    swap=_put_loop,
)  # fmt: skip
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


def _training_case(t: list[int], T: int, drop: list[bool], scale: float, h: int = 4, w: int = 5) -> dict:
    b = len(t)
    return {
        "model": ToyUNet(), "mean": torch.randn(b, 3, h, w), "std": torch.rand(b, 3, h, w),
        "encoder_noise": torch.randn(b, 3, h, w), "scale_factor": scale, "context": torch.randn(b, 3, 6),
        "empty_context": torch.randn(1, 3, 6), "drop": torch.tensor(drop), "t": torch.tensor(t),
        "noise": torch.randn(b, 3, h, w), "alphas_cumprod": alphas_cumprod_of(T),
    }  # fmt: skip


def _put_training_step(f):
    """The loss from a latent that is drawn and scaled already: a latent without a doubt, in the scale 1."""

    def whole(model, x_0, context, t, noise, alphas_cumprod):
        kept = torch.zeros(len(x_0), dtype=torch.bool, device=x_0.device)
        none = torch.zeros_like(x_0)
        return f(model, x_0, none, none, 1.0, context, torch.zeros_like(context[:1]), kept, t, noise, alphas_cumprod)

    return _put_epsilon_loss(whole)


@exercise(
    difficulty=4,
    minutes=25,
    cases=lambda: {
        "three pictures, one caption dropped": _training_case([3, 8, 5], 12, [False, True, False], 0.4),
        "one picture": _training_case([6], 12, [False], 2.0, 3, 4),
        "as many pictures as columns": _training_case([1, 9, 4, 6], 12, [True, False, False, True], 0.7, 3, 4),
    },
    hints=(
        "Four things, one after the other: draw z; noise it; forget captions; compare.",
        "z = scale_factor (mean + std · encoder_noise)",
        "The target is the noise of the diffusion, not that of the encoder.",
    ),
    mistakes=[
        NOT_RESHAPED,
        ("scale_factor * (mean + std * encoder_noise)", "mean + std * encoder_noise",
         "The scale factor is missing: diffusion works on latents of variance 1."),
        ("scale_factor * (mean + std * encoder_noise)", "(mean + std * encoder_noise) / scale_factor",
         "You divided by the scale factor: on the way in one multiplies."),
        ("scale_factor * (mean + std * encoder_noise)", "scale_factor * mean",
         "You took the mean of the encoder: a sample, with std times the encoder's noise."),
        ("scale_factor * (mean + std * encoder_noise)", "scale_factor * mean + std * encoder_noise",
         "Only the mean is scaled: the whole sample is."),
        ("std * encoder_noise", "std * noise",
         "The same noise is used twice, in the encoder's sample and in x_t: the first is encoder_noise."),
        ("",
         "z = mean + std * encoder_noise\nalpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)\nz_t = scale_factor *"
         " (alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise)\ncontext = torch.where(drop[:, None, None],"
         " empty_context, context)\nreturn (noise - model(z_t, t, context)).square().mean()",
         "You scaled z_t, and the noise with it: z is scaled, before it is noised."),
        ("std * encoder_noise", "torch.exp(0.5 * std) * encoder_noise",
         "You took std for a log variance: it is the standard deviation already."),
        ("std * encoder_noise", "std**2 * encoder_noise", "You multiplied by the variance: by std as it is."),
        ("std * encoder_noise", "encoder_noise", "The encoder's noise is not scaled by std."),
        ("",
         "z = scale_factor * (mean + std * encoder_noise)\nalpha_bar = alphas_cumprod[t].reshape(-1, 1, 1, 1)\nz_t ="
         " alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise\nreturn (noise[~drop] - model(z_t[~drop], t[~drop],"
         " context[~drop])).square().mean()",
         "You left the samples out whose caption is dropped: they stay in the batch, with the empty context."),
        ("* z + (1 - alpha_bar).sqrt() * noise", "* z + (1 - alpha_bar).sqrt() * encoder_noise",
         "x_t is made with the encoder's noise, but the model is asked for `noise`."),
        ("return (noise - prediction)", "return (encoder_noise - prediction)",
         "The target is the encoder's noise: the model is to find the diffusion's."),
        ("model(z_t, t, context)", "model(z_t, t / len(alphas_cumprod), context)",
         "The model is told t / T: it is told t itself, an integer."),
        ("return (noise - prediction)", "return (z - prediction)",
         "The target is z: this model is asked for the noise."),
        ("drop[:, None, None], empty_context, context", "drop[:, None, None], context, empty_context",
         "Captions are dropped the wrong way round: where `drop` is set, the empty context comes in."),
        ("context = torch.where(drop[:, None, None], empty_context, context)", "pass",
         "No caption is dropped: guidance needs a model that can draw without."),
        ("drop[:, None, None], empty_context, context", "drop[:, None, None], 0 * context, context",
         "A dropped caption becomes zeros: the empty prompt's context belongs there."),
        ("model(z_t, t, context)", "model(z, t, context)", "The model is shown the clean z: z_t."),
        ("alpha_bar.sqrt() * z +", "alpha_bar * z +", "In z_t, z is multiplied by ᾱ_t: the root is missing."),
        ("(1 - alpha_bar).sqrt() * noise", "(1 - alpha_bar) * noise",
         "In z_t, the noise is multiplied by 1-ᾱ_t: the root is missing."),
        (".square().mean()", ".square().sum()", "You took the sum: a mean over everything."),
        (".square().mean()", ".abs().mean()", "You took absolute differences: squares."),
        ("prediction = model(z_t, t, context)", "prediction = model(z_t, t, context).detach()",
         "The prediction is detached: no gradient reaches the model."),
        ("alpha_bar.sqrt() * z + (1 - alpha_bar).sqrt() * noise",
         "(1 - alpha_bar).sqrt() * z + alpha_bar.sqrt() * noise",
         "In z_t the factors of z and of the noise are exchanged."),
        ("(noise - prediction)", "(alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * z - prediction)",
         "The target is the velocity v: this model is asked for the noise."),
        ("model(z_t, t, context)", "model(z_t, 0 * t, context)",
         "The model is told t = 0 for all: it is told the t of each sample."),
    ],
    gradients=("model",),
    swap=_put_training_step,
)  # fmt: skip
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
