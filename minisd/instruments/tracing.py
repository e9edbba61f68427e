"""One drawing, or one training step, with everything that is computed on the way.

    print(trace(sd, "fox, noto style"))              # prompt, tokens, context, x_T, …, latent, picture
    print(trace(sd, "fox, noto style", image="fox.png"))    # picture, latent, noise, x_t, …, loss
    trace(sd, "fox, noto style")["x_T"].value        # the tensor itself

Each line names the stage (its module and notebook), the equation, and the method that computes it in CompVis's source.
The texts are in `tracing.toml`.
"""

import tomllib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..clip import FrozenCLIPEmbedder
from ..latent_diffusion import LatentDiffusion, Prompt
from ..noising import Seed, randn, seeded
from ..pictures import Picture, read_picture
from ..unet import timestep_embedding

WIDTH = 110  # of the printed table, in columns
# A stage's module and notebook share its name.
STAGES = {1: "noising", 2: "loss", 3: "unet", 4: "vae", 5: "clip", 6: "sampling", 7: "latent_diffusion"}

# What can stand in a trace: stage, name, equation, and the method and file of CompVis's source.
TEXTS = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


@dataclass(frozen=True, eq=False)
class Intermediate:
    """One intermediate value, and where to read about it."""

    stage: int  # the number of the notebook and module that explain it: see STAGES
    symbol: str  # as in the equations: "x_T"
    name: str  # in words
    value: Tensor | str
    equation: str  # how it is computed
    compvis: str  # the method that computes it in CompVis's source, or its name there
    file: str  # the file of CompVis's source

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if isinstance(self.value, Tensor) else ()

    @property
    def dtype(self) -> torch.dtype | None:
        return self.value.dtype if isinstance(self.value, Tensor) else None

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number of the value."""
        return self.value.min().item(), self.value.max().item()

    @property
    def std(self) -> float:
        return self.value.float().std(correction=0).item()

    def __str__(self) -> str:
        """Two lines: the name and its numbers; then the equation and the place in CompVis's source."""
        if isinstance(self.value, str):
            numbers = repr(self.value)
        else:
            low, high = (f"{x:d}" if isinstance(x, int) else f"{x:.3f}" for x in self.range)
            std = f"{self.std:.3f}" if self.value.is_floating_point() and self.value.numel() > 1 else ""
            numbers = f"{list(self.shape)!s:15} {str(self.dtype).removeprefix('torch.'):7} {low:>8} {high:>8} {std:>8}"
        where = f"{self.compvis}, {'/'.join(self.file.split('/')[-2:])}"
        width = 46 + self.equation.count("\N{COMBINING CIRCUMFLEX ACCENT}")  # the combining hat of x̂ takes no column
        first, second = f"{self.stage:2}  {self.symbol:10} {self.name:32} {numbers}", f"{self.equation:{width}} {where}"
        first = first.rstrip()
        return f"{first if len(first) <= WIDTH else first[: WIDTH - 1] + '…'}\n    {second}"


class Trace(list[Intermediate]):
    """All intermediate values in the order of their computation. Index by number or symbol: `trace["x_T"].value`."""

    def __init__(self, title: str, entries: list[Intermediate]):
        super().__init__(entries)
        self.title = title

    def __getitem__(self, key):
        if not isinstance(key, str):
            return super().__getitem__(key)
        for entry in self:
            if entry.symbol == key:
                return entry
        raise KeyError(f"there is no {key!r} in this trace: choose one of {', '.join(entry.symbol for entry in self)}")

    def __str__(self) -> str:
        head = f" #  {'symbol':10} {'what it is':32} {'shape':15} {'dtype':7} {'min':>8} {'max':>8} {'std':>8}"
        under = f"    {'how it is computed':46} where in CompVis's source"
        legend = "#: module and notebook. " + ", ".join(f"{number} {name}" for number, name in STAGES.items())
        return "\n".join([self.title, head, under, "-" * WIDTH, *map(str, self), "-" * WIDTH, legend])


def trace(
    sd: LatentDiffusion,
    prompt: Prompt,
    steps: int = 50,
    guidance_scale: float = 7.5,
    seed: Seed = 0,
    step: int = 0,
    image: Picture | None = None,
    t: int = 500,
) -> Trace:
    """Draw one picture with DDIM, as `sd.txt2img(prompt, …, sampler="ddim")` does, and keep each intermediate value.

    Args:
        prompt: one string.
        step: the step whose intermediate values are shown. All steps are computed.
        image: a picture that the prompt describes. With it, one training step is traced instead of a drawing: the
            picture is encoded, the noise of timestep `t` is added to it, and the UNet predicts this noise.

    Raises:
        ValueError: the model has no text encoder, or has further input channels; prompt is not one string; there is no
            such step.
    """
    if not isinstance(sd.cond_stage_model, FrozenCLIPEmbedder) or sd.config.concat_channels:
        raise ValueError(
            "trace needs a model that is conditioned on a prompt alone, but this one has another condition, or takes "
            "further input channels such as a mask"
        )
    if not isinstance(prompt, str):
        raise ValueError(f"trace follows one drawing: prompt must be one string, not {prompt!r}")
    if image is not None:
        return _training(sd, prompt, image, t, seed)
    return _drawing(sd, prompt, steps, guidance_scale, seed, step)


@torch.no_grad()
def _drawing(sd: LatentDiffusion, prompt: str, steps: int, scale: float, seed: Seed, step: int) -> Trace:
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in [0, {steps}), but it is {step}")
    drawing = sd.txt2img(prompt, steps=steps, guidance_scale=scale, seed=seed, sampler="ddim")
    run = drawing.trajectory
    now, last = run[step], run[len(run) - 1]
    x_t, following = "x_T" if step == 0 else f"x_{now.t}", run[step + 1].t if step + 1 < steps else 0

    # With a guidance scale of 1, there is no prediction for the empty prompt.
    predictions = ["eps_without_guidance"] if now.eps_cond is None else ["eps_uncond", "eps_cond", "eps"]
    visited = torch.tensor([s.t for s in run], device="cpu")
    entries = [
        *_conditioning(sd, prompt),
        _entry("c_empty", sd.get_learned_conditioning([""])),
        _entry("timesteps", visited, steps=steps, last=sd.schedule.timesteps - 1),
        _entry("x_T" if step == 0 else "x_t", now.x_t, t=now.t),
        *_time(sd, now.t, f"timesteps[{step}]"),
        *(_entry(key, getattr(now, key, now.eps), x_t=x_t, t=now.t, s=scale) for key in predictions),
        _entry("x0", now.x0),
        _entry("x_prev", now.x, t=following),
        _entry("z", last.x, steps=steps),
        _entry("z/s", last.x / sd.scale_factor, scale_factor=sd.scale_factor),
        _entry("x", drawing.pictures, autoencoder=type(sd.first_stage_model).__name__),
    ]
    title = f"drawing {prompt!r}: ddim, {steps} steps, guidance {scale:g}, seed {seed}; step {step} from the inside"
    return Trace(title, entries)


@torch.no_grad()
def _training(sd: LatentDiffusion, prompt: str, image: Picture, t: int, seed: Seed) -> Trace:
    if not 0 <= t < sd.schedule.timesteps:
        raise ValueError(f"t must lie in [0, {sd.schedule.timesteps}), but it is {t}")
    # The same calls in the same order as in a training step; each result is kept.
    x = read_picture(image, sd.config.image_size, sd.config.image_size)[:1].to(sd.device)
    sd.latent_shape(*x.shape[-2:])  # raises if the autoencoder can't halve these sides
    generator = seeded(seed)
    posterior = sd.encode_first_stage(x)
    z = sd.get_first_stage_encoding(posterior, generator)
    noise = randn(z.shape, generator).to(z)
    at = torch.full((1,), t, device=sd.device)
    x_t = sd.q_sample(z, at, noise)
    context = sd.get_learned_conditioning([prompt])
    predicted = sd.config.parameterization
    words = TEXTS["predicted"][predicted]
    entries = [
        *_conditioning(sd, prompt),
        _entry("x_of_the_data", x),
        _entry("E(x)", posterior if isinstance(posterior, Tensor) else posterior.mode()),
        _entry("z_of_the_data", z, scale_factor=sd.scale_factor),
        _entry("noise", noise),
        _entry("x_t_of_the_data", x_t),
        *_time(sd, t, f"t ~ U{{0, …, {sd.schedule.timesteps - 1}}}"),
        _entry("output", sd.apply_model(x_t, at, context), parameterization=predicted, **words),
        _entry("loss", sd.p_losses(z, context, at, noise), **words),
    ]
    return Trace(f"training on {prompt!r} and its picture: t = {t}, seed {seed}", entries)


def _entry(key: str, value: Tensor | str, **given) -> Intermediate:
    """A value with its texts from `tracing.toml`. `given` fills the braces in them."""
    texts = {"symbol": key} | TEXTS[key]
    filled = {name: text.format(**given) if isinstance(text, str) else text for name, text in texts.items()}
    return Intermediate(value=value, **filled)


def _conditioning(sd: LatentDiffusion, prompt: str) -> list[Intermediate]:
    tokens, context = sd.cond_stage_model.tokenize([prompt]), sd.get_learned_conditioning([prompt])
    return [_entry("prompt", prompt), _entry("tokens", tokens), _entry("c", context)]


def _time(sd: LatentDiffusion, t: int, origin: str) -> list[Intermediate]:
    at = torch.full((1,), t, device=sd.device)
    t_emb = timestep_embedding(at, sd.config.unet.model_channels)
    emb = sd.model.diffusion_model.time_embed(t_emb.to(sd.dtype)).float()
    return [_entry("t", at, origin=origin), _entry("t_emb", t_emb), _entry("emb", emb)]
