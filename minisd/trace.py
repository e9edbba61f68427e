"""One drawing, or one training step, with everything that happened on the way: the map of the whole model.

    print(trace(sd, "fox, noto style"))              # prompt, tokens, context, x_T, …, latent, picture
    print(trace(sd, "fox, noto style", image="fox.png"))    # picture, latent, noise, x_t, …, loss
    trace(sd, "fox, noto style")["x_T"].value        # the tensor itself

Each line names the stage (its module and notebook), the equation, and who does it in CompVis's source.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .clip import FrozenCLIPEmbedder
from .latent_diffusion import LatentDiffusion, Prompt
from .pictures import Picture, read_picture
from .sampling import randn
from .unet import timestep_embedding

WIDTH = 110  # of the table, in columns
# A stage's module and notebook share its name.
STAGES = {1: "noising", 2: "loss", 3: "unet", 4: "vae", 5: "clip", 6: "sampling", 7: "latent_diffusion"}

# Files of the CompVis source.
DDPM, DDIM = "ldm/models/diffusion/ddpm.py", "ldm/models/diffusion/ddim.py"
UNET, UTIL = "ldm/modules/diffusionmodules/openaimodel.py", "ldm/modules/diffusionmodules/util.py"
ENCODERS, AUTOENCODER = "ldm/modules/encoders/modules.py", "ldm/models/autoencoder.py"


@dataclass(frozen=True, eq=False)
class Intermediate:
    """One thing that was computed, and where to read about it."""

    stage: int  # which notebook and module explain it: see STAGES
    symbol: str  # as in the equations: "x_T"
    name: str  # in words
    value: Tensor | str
    equation: str  # how it came about
    compvis: str  # the method that computes it in CompVis's source, or what it is called there
    file: str

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape) if isinstance(self.value, Tensor) else ()

    @property
    def dtype(self) -> torch.dtype | None:
        return self.value.dtype if isinstance(self.value, Tensor) else None

    @property
    def range(self) -> tuple[float, float]:
        """The smallest and the largest number in it."""
        return self.value.min().item(), self.value.max().item()

    @property
    def std(self) -> float:
        return self.value.float().std(correction=0).item()

    def __str__(self) -> str:
        """Two lines: what it is and its numbers; how it came about, and where that stands."""
        if isinstance(self.value, str):
            numbers = repr(self.value)
        else:
            low, high = (f"{x:d}" if isinstance(x, int) else f"{x:.3f}" for x in self.range)
            std = f"{self.std:.3f}" if self.value.is_floating_point() and self.value.numel() > 1 else ""
            numbers = f"{list(self.shape)!s:15} {str(self.dtype).removeprefix('torch.'):7} {low:>8} {high:>8} {std:>8}"
        where = f"{self.compvis}, {'/'.join(self.file.split('/')[-2:])}"
        width = 46 + self.equation.count("\N{COMBINING CIRCUMFLEX ACCENT}")  # the hat of x̂ takes no room of its own
        first, second = f"{self.stage:2}  {self.symbol:10} {self.name:32} {numbers}", f"{self.equation:{width}} {where}"
        return f"{_cut(first.rstrip())}\n    {second}"


@dataclass(frozen=True)
class Trace:
    """All intermediates in the order in which they came about. By place, or by symbol: `trace["x_T"].value`."""

    title: str
    entries: list[Intermediate]

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[Intermediate]:
        return iter(self.entries)

    def __getitem__(self, key: int | str) -> Intermediate:
        if isinstance(key, int):
            return self.entries[key]
        for entry in self.entries:
            if entry.symbol == key:
                return entry
        raise KeyError(f"there is no {key!r} in this trace, but {', '.join(e.symbol for e in self.entries)}")

    def __str__(self) -> str:
        head = f" #  {'symbol':10} {'what it is':32} {'shape':15} {'dtype':7} {'min':>8} {'max':>8} {'std':>8}"
        under = f"    {'how it came about':46} where in CompVis's source"
        legend = "#: module and notebook. " + ", ".join(f"{number} {name}" for number, name in STAGES.items())
        return "\n".join([self.title, head, under, "-" * WIDTH, *map(str, self), "-" * WIDTH, legend])


def trace(
    sd: LatentDiffusion,
    prompt: Prompt,
    steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int = 0,
    step: int = 0,
    image: Picture | None = None,
    t: int = 500,
) -> Trace:
    """Draw one picture by DDIM, as `sd.txt2img(prompt, …, sampler="ddim")` does, and keep each intermediate.

    Args:
        prompt: one string.
        step: which of the steps to show from the inside; the others are made, too.
        image: a picture that the prompt describes. With it, one training step is traced instead of a drawing: the
            picture is encoded, noised to the timestep `t`, and its noise predicted.

    Raises:
        ValueError: a model that reads no prompts or is shown more than the noisy latent; not one prompt; no such step.
    """
    if not isinstance(sd.cond_stage_model, FrozenCLIPEmbedder) or sd.config.concat_channels:
        raise ValueError("trace draws from a prompt alone: this model is told something else, or something more")
    if not isinstance(prompt, str):
        raise ValueError(f"trace follows one drawing: prompt must be one string, not {prompt!r}")
    if image is not None:
        return _training(sd, prompt, image, t, seed)
    return _drawing(sd, prompt, steps, guidance_scale, seed, step)


@torch.no_grad()
def _drawing(sd: LatentDiffusion, prompt: str, steps: int, scale: float, seed: int, step: int) -> Trace:
    if not 0 <= step < steps:
        raise ValueError(f"step must lie in [0, {steps}), but it is {step}")
    drawing = sd.txt2img(prompt, steps=steps, guidance_scale=scale, seed=seed, sampler="ddim")
    run = drawing.trajectory
    now, last = run[step], run[len(run) - 1]
    timesteps = torch.tensor([s.t for s in run])
    t, before = now.t, run[step + 1].t if step + 1 < steps else 0
    x_t, x_prev = "x_T" if step == 0 else f"x_{t}", f"x_{before}"

    entries = _conditioning(sd, prompt)
    entries.append(Intermediate(5, "c_empty", "context of the empty prompt", sd.get_learned_conditioning([""]),
                   'c_∅ = CLIP(tokens of "")', "LatentDiffusion.get_learned_conditioning", DDPM))  # fmt: skip
    entries += [
        Intermediate(6, "timesteps", f"the {steps} that are visited", timesteps,
                     f"{steps} of 0, …, {sd.schedule.timesteps - 1}, falling", "make_ddim_timesteps", UTIL),
        Intermediate(6, x_t, "pure noise" if step == 0 else "noisy latent", now.x_t,
                     "x_T ~ N(0, I)" if step == 0 else "out of the step before",
                     "start_code" if step == 0 else "DDIMSampler.p_sample_ddim",
                     "scripts/txt2img.py" if step == 0 else DDIM),
    ]  # fmt: skip
    entries += _time(sd, t, f"timesteps[{step}]")
    if now.eps_cond is not None:
        entries += [
            Intermediate(3, "eps_uncond", "noise, seen without the prompt", now.eps_uncond,
                         f"ε(x_t, t, c_∅)  with x_t = {x_t}, t = {t}", "UNetModel.forward", UNET),
            Intermediate(3, "eps_cond", "noise, seen with the prompt", now.eps_cond,
                         f"ε(x_t, t, c)    with x_t = {x_t}, t = {t}", "UNetModel.forward", UNET),
            Intermediate(6, "eps", "noise, guided", now.eps,
                         f"ε = ε(c_∅) + s (ε(c) - ε(c_∅)), s = {scale:g}", "DDIMSampler.p_sample_ddim, e_t", DDIM),
        ]  # fmt: skip
    else:
        entries.append(Intermediate(3, "eps", "noise, seen with the prompt", now.eps, f"ε(x_t, t, c)  with t = {t}",
                                    "UNetModel.forward", UNET))  # fmt: skip
    entries += [
        Intermediate(6, "x0", "the latent it has in mind", now.x0,
                     "x̂_0 = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t", "DDIMSampler.p_sample_ddim, pred_x0", DDIM),
        Intermediate(6, x_prev, "a little less noisy", now.x,
                     "x_prev = √ᾱ_prev x̂_0 + √(1-ᾱ_prev) ε", "DDIMSampler.p_sample_ddim, x_prev", DDIM),
    ]  # fmt: skip
    scale_factor = sd.scale_factor
    entries += [
        Intermediate(6, "z", f"latent after {steps} steps", last.x,
                     "the same again, until no t is left", "DDIMSampler.sample", DDIM),
        Intermediate(7, "z/s", "latent as the decoder knows it", last.x / scale_factor,
                     f"z / scale_factor, {scale_factor:.5f}", "LatentDiffusion.decode_first_stage", DDPM),
        Intermediate(4, "x", "picture, in [-1, 1]", drawing.pictures,
                     "x = D(z / scale_factor)", f"{type(sd.first_stage_model).__name__}.decode", AUTOENCODER),
    ]  # fmt: skip
    title = f"drawing {prompt!r}: ddim, {steps} steps, guidance {scale:g}, seed {seed}; step {step} from the inside"
    return Trace(title, entries)


@torch.no_grad()
def _training(sd: LatentDiffusion, prompt: str, image: Picture, t: int, seed: int) -> Trace:
    if not 0 <= t < sd.schedule.timesteps:
        raise ValueError(f"t must lie in [0, {sd.schedule.timesteps}), but it is {t}")
    x = read_picture(image, sd.config.image_size, sd.config.image_size)[:1].to(sd.device)
    sd.latent_shape(*x.shape[-2:])
    generator = torch.Generator().manual_seed(seed)
    posterior = sd.encode_first_stage(x)
    encoded = posterior if isinstance(posterior, Tensor) else posterior.mode()
    z = sd.get_first_stage_encoding(posterior, generator)
    noise = randn(z.shape, generator).to(z)
    at = torch.full((1,), t, device=sd.device)
    x_t = sd.q_sample(z, at, noise)
    context = sd.get_learned_conditioning([prompt])

    entries = _conditioning(sd, prompt)
    entries += [
        Intermediate(7, "x", "picture, in [-1, 1]", x, "from the data set", "LatentDiffusion.get_input", DDPM),
        Intermediate(4, "E(x)", "latent, the middle of it", encoded,
                     "E(x) = μ of q(z|x) = N(μ, σ²)", "LatentDiffusion.encode_first_stage", DDPM),
        Intermediate(7, "z", "latent, drawn and scaled: x_0", z,
                     f"z = scale_factor (μ + σ ξ), {sd.scale_factor:.5f}",
                     "LatentDiffusion.get_first_stage_encoding", DDPM),
        Intermediate(1, "noise", "the noise to be found", noise, "ε ~ N(0, I)", "DDPM.p_losses", DDPM),
        Intermediate(1, "x_t", "noisy latent", x_t, "x_t = √ᾱ_t z + √(1-ᾱ_t) ε", "DDPM.q_sample", DDPM),
    ]  # fmt: skip
    entries += _time(sd, t, f"t ~ U{{0, …, {sd.schedule.timesteps - 1}}}")
    said = {"eps": "noise, says the UNet", "v": "velocity, says the UNet", "x0": "latent, says the UNet"}
    entries += [
        Intermediate(3, "output", said[sd.config.parameterization], sd.apply_model(x_t, at, context),
                     f"{sd.config.parameterization}(x_t, t, c)", "LatentDiffusion.apply_model", DDPM),
        Intermediate(2, "loss", "how wrong that is", sd.p_losses(z, context, at, noise),
                     "L = mean |ε - ε(x_t, t, c)|²" if sd.config.parameterization == "eps" else
                     f"the mean square of the error in {sd.config.parameterization}",
                     "LatentDiffusion.p_losses", DDPM),
    ]  # fmt: skip
    return Trace(f"training on {prompt!r} and its picture: t = {t}, seed {seed}", entries)


def _conditioning(sd: LatentDiffusion, prompt: str) -> list[Intermediate]:
    return [
        Intermediate(5, "prompt", "what to draw", prompt, "", "prompt", "scripts/txt2img.py"),
        Intermediate(5, "tokens", "numbers of pieces of words", sd.cond_stage_model.tokenize([prompt]),
                     "start, pieces, end, then end to the length", "FrozenCLIPEmbedder.tokenizer", ENCODERS),
        Intermediate(5, "c", "context: a vector for each token", sd.get_learned_conditioning([prompt]),
                     "c = CLIP(tokens), the last hidden state", "LatentDiffusion.get_learned_conditioning", DDPM),
    ]  # fmt: skip


def _time(sd: LatentDiffusion, t: int, origin: str) -> list[Intermediate]:
    unet = sd.model.diffusion_model
    at = torch.full((1,), t, device=sd.device)
    embedding = timestep_embedding(at, sd.config.unet.model_channels)
    return [
        Intermediate(3, "t", "timestep", at, origin, "timesteps", UNET),
        Intermediate(3, "t_emb", "timestep embedding", embedding,
                     "cos(t ω_i), sin(t ω_i), ω_i = 10000^(-i/half)", "timestep_embedding", UTIL),
        Intermediate(3, "emb", "what each ResBlock is told of t", unet.time_embed(embedding.to(sd.dtype)).float(),
                     "emb = W_2 SiLU(W_1 t_emb)", "UNetModel.time_embed", UNET),
    ]  # fmt: skip


def _cut(line: str) -> str:
    return line if len(line) <= WIDTH else line[: WIDTH - 1] + "…"
