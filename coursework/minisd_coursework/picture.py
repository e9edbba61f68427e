"""draw("q_sample", my_q_sample): minisd draws a picture with a student's function in it.

Each function takes part in something else. Where it takes part in the drawing, the picture shows just that; where it
takes part in training, a shipped network is trained on for a few steps first, with the student's function.
"""

import copy
import io
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from minisd import pictures
from minisd.checkpoint import load, load_clip
from minisd.data import CaptionedPictures, sample, shape_corpus
from minisd.data.sample_pictures import SAMPLE
from minisd.latent_diffusion import Cond, LatentDiffusion
from minisd.loss import LOSSES
from minisd.noising import ExactDenoiser
from minisd.sampling import SAMPLERS, make_timesteps, randn
from minisd.training import clip as training_clip
from minisd.training import trainer
from minisd.training import unet as training_unet
from minisd.training import vae as training_vae
from minisd.training.engine import SingleDevice
from minisd.viz import curves, matrices, sheet
from minisd.vq import VectorQuantizer

from .exercise import find, swap
from .running import default_torch_state
from .texts import read, say

PROMPTS = ("a fox, noto style", "a rocket, noto style", "a snowman, noto style")


def draw(
    name: str,
    function: Callable | None = None,
    prompt: str | Sequence[str] = PROMPTS,
    model: str = "emoji",
    steps: int = 10,
    seed: int = 0,
) -> Image.Image | None:
    """What minisd draws with `function` in the place of its own, beside what it draws with its own.

    Args:
        name: of an exercise.
        function: None draws only what it should be.
        prompt, model, steps, seed: as for `minisd.load(model).txt2img(...)`. Where a network is trained on first,
            `steps` is the number of steps of that, too.

    Returns:
        A picture; `caption(name)` says what it shows. None, and a sentence is printed, if the function leads to none.

    Raises:
        ValueError: there is no such exercise.
    """
    arguments = (find(name).name, prompt, model, steps, seed)
    try:
        yours = function and drawn_with(function, *arguments)
    except NotImplementedError:
        print(say("picture.unwritten", name=name))
    except Exception as error:  # whatever a wrong function leads to
        message = (str(error).splitlines() or [say("picture.no_message")])[0]
        print(say("picture.failed", name=name, kind=type(error).__name__, message=message))
    else:
        right = drawn_with(None, *arguments)
        return _labelled({say("picture.yours"): yours, say("picture.should_be"): right}) if yours else right
    return None


@default_torch_state()
def drawn_with(
    function: Callable | None, name: str, prompt: str | Sequence[str], model: str, steps: int, seed: int
) -> Image.Image:
    """One of the two pictures of `draw`. With None for a function, it is what it should be."""
    exercise, prompts = find(name), [prompt] if isinstance(prompt, str) else list(prompt)
    with swap(name, function) if function and callable(exercise.swap) else nullcontext():
        sampler = read("pictures.toml")["samplers"].get(name, "ddim")
        order = Order(load(model, "cpu"), function or exercise.compile(), prompts, sampler, steps, seed)
        return PICTURES[kind_of(name)](order)


def _labelled(images: dict[str, Image.Image], gap: int = 24, above: int = 26) -> Image.Image:
    """Images side by side, each below its label."""
    width, height = (max(image.size[i] for image in images.values()) for i in (0, 1))
    page = Image.new("RGB", (len(images) * (width + gap) - gap, height + above), "white")
    for i, (label, image) in enumerate(images.items()):
        page.paste(image, (i * (width + gap), above))
        ImageDraw.Draw(page).text((i * (width + gap), 2), label, "black", ImageFont.load_default(16))
    return page


def kind_of(name: str) -> str:
    """Which of the PICTURES shows what an exercise does."""
    return next((kind for kind, names in read("pictures.toml")["exercises"].items() if name in names), "drawn")


def caption(name: str) -> str:
    """What the picture of `draw(name)` shows, in a sentence."""
    sampler = read("pictures.toml")["samplers"].get(name)
    return say("picture.drawn_by", sampler=sampler) if sampler else say(f"caption.{kind_of(name)}")


@dataclass
class Order:
    """What is to be drawn, and with what."""

    sd: LatentDiffusion
    function: Callable  # the student's, or the solution; in minisd itself it stands already, where it has a place there
    prompts: list[str]
    sampler: str
    steps: int
    seed: int

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    @property
    def options(self) -> dict:
        """For txt2img and its sisters."""
        return {"steps": self.steps, "sampler": self.sampler, "seed": self.seed, "guidance_scale": 3.0}

    def shapes(self) -> tuple[Float[Tensor, "16 3 h w"], list[str]]:
        """Coloured shapes in [-1, 1], and their captions."""
        pixels, captions = shape_corpus(16, self.sd.config.image_size, self.seed)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, captions

    def latents(self, generator: torch.Generator) -> tuple[Float[Tensor, "16 c h w"], list[str]]:
        """The same, as latents."""
        x, captions = self.shapes()
        return self.sd.get_first_stage_encoding(self.sd.encode_first_stage(x), generator), captions

    def pictures(self) -> Float[Tensor, "8 3 h w"]:
        return sample(self.sd.config.image_size).batch(range(8))

    def cat(self) -> Float[Tensor, "1 3 h w"]:
        """A picture that nobody asked for."""
        data = sample(self.sd.config.image_size)
        return data.batch([data.captions.index("cat face, noto style")])


# --- where it takes part in the drawing -------------------------------------------------------------------------------


def _drawn(order: Order) -> Image.Image:
    x = order.sd.txt2img(order.prompts, **order.options).pictures
    return _beside(x, _again(order, x))


@torch.no_grad()
def _again(order: Order, x: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Into the latent space, noised half way, and drawn from there, by the calls that have a name in CompVis."""
    sd, generator = order.sd, order.generator
    z = sd.get_first_stage_encoding(sd.encode_first_stage(x.clamp(-1, 1)), generator)
    left = make_timesteps(order.steps, sd.schedule.timesteps)[order.steps // 2 :]
    z_t = sd.q_sample(z, torch.full((len(z),), left[0]), randn(z.shape, generator))
    context = sd.get_learned_conditioning(order.prompts)

    def eps_model(x: Tensor, t: Tensor) -> Tensor:
        return sd.predict_noise(x, t, context)

    options = {"steps": len(left), "timesteps": left, "generator": generator}
    *_, last = SAMPLERS[order.sampler](eps_model, z_t, sd.schedule, **options)
    return sd.decode_first_stage(last.x)


def _of_v(order: Order) -> Image.Image:
    sd = copy.copy(order.sd)
    sd.config = replace(sd.config, parameterization="v")
    predict_noise = sd.apply_model

    def answers_v(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        signal, sigma = sd.schedule._signal_and_sigma(t, x)
        return (predict_noise(x, t, cond) - sigma * x) / signal  # made of ε = √(1-ᾱ) x_t + √ᾱ v

    sd.apply_model = answers_v
    return _drawn(replace(order, sd=sd))


def _guessed_from_v(order: Order) -> Image.Image:
    sd, guesses = order.sd, []
    for step in sd.sample(order.prompts[0], **order.options):
        t = torch.full((1,), step.t)
        v = sd.schedule.get_v(step.x0, step.eps, t)
        guesses.append(sd.decode_first_stage(sd.schedule.predict_start_from_v(step.x_t, t, v)))
    return _sheet(torch.cat(guesses), columns=5, side=64)


def _exact(order: Order) -> Image.Image:
    x, _ = order.shapes()
    x_T = randn((4, *x.shape[1:]), order.generator)
    schedule = order.sd.schedule
    *_, last = SAMPLERS[order.sampler](ExactDenoiser(x, schedule), x_T, schedule, steps=order.steps)
    return _sheet(last.x, columns=2)


def _drawn_over(order: Order) -> Image.Image:
    cat = order.cat()
    strengths = (0.25, 0.5, 0.75)
    over = [order.sd.img2img(order.prompts, cat, strength, **order.options).pictures for strength in strengths]
    return _beside(cat.expand_as(over[0]), *over, side=96)


def _inpainted(order: Order) -> Image.Image:
    cat = order.cat()
    mask = torch.zeros(cat.shape[-2:])
    mask[:, mask.shape[1] // 2 :] = 1
    new = order.sd.inpaint(order.prompts, cat, mask, blend="before", **order.options).pictures
    return _beside(cat.expand_as(new), new)


def _rescaled(order: Order) -> Image.Image:
    data = CaptionedPictures(SAMPLE, order.sd.config.image_size, split="test_concept")
    order.sd.scale_factor = training_vae.measure_scale_factor(order.sd.first_stage_model, data, SingleDevice("cpu"))
    return _drawn(order)


# --- where it takes part in a training --------------------------------------------------------------------------------


def _train(optimizer: torch.optim.Optimizer, rounds: int, loss: Callable, after: Callable = lambda: None) -> None:
    for _ in range(rounds):
        value = loss()
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        after()


def _trained(order: Order, kind: str = "eps", gamma: float | None = None) -> Image.Image:
    """The UNet, on shapes, with captions dropped; drawn with the running mean of its weights."""
    sd, generator = order.sd, order.generator
    z, captions = order.latents(generator)
    contexts, empty = sd.get_learned_conditioning(captions), sd.get_learned_conditioning([""])
    unet = sd.model.diffusion_model

    def loss() -> Tensor:
        t = torch.randint(sd.schedule.timesteps, (len(z),), generator=generator)
        drop = torch.rand(len(z), generator=generator) < 0.5
        context = training_unet.text_dropout(contexts, empty, drop)
        return LOSSES[kind](sd.apply_model, sd.schedule, z, context, t, randn(z.shape, generator), gamma)

    ema = trainer.EMA(unet, decay=0.9)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    _train(optimizer, max(1, order.steps // 2), loss, after=lambda: ema.update(unet))
    with ema.applied_to(unet):
        return _sheet(sd.txt2img(order.prompts, num_images=2, **order.options).pictures, columns=2)


@torch.no_grad()
def _curve_of_the_loss(order: Order) -> Image.Image:
    sd, T, generator = order.sd, order.sd.schedule.timesteps, order.generator
    z, captions = order.latents(generator)
    context = sd.get_learned_conditioning(captions)
    times = (torch.arange(len(z) * 10) * T // (len(z) * 10)).view(len(z), 10).T
    losses = []
    for t in times:  # each batch has all times in it
        noise = randn(z.shape, generator)
        eps = sd.apply_model(sd.q_sample(z, t, noise), t, context)
        losses.append((eps - noise).square().mean(dim=(1, 2, 3)))
    means = order.function(torch.cat(losses), times.flatten(), T, 10)
    return _picture(curves({"the loss by time": {"": ((torch.arange(len(means)) + 0.5) * T / len(means), means)}}, "t"))


def _sheet(x: Float[Tensor, "b 3 h w"], columns: int, side: int = 128) -> Image.Image:
    """Pictures of any size, enlarged to about `side` pixels."""
    return sheet(pictures.to_pil(x), columns, scale=max(1, side // x.shape[-1]))  # to_pil may be a student's


def _beside(*columns: Float[Tensor, "b 3 h w"], side: int = 128) -> Image.Image:
    """A row for each picture of a batch."""
    return _sheet(torch.stack(columns, dim=1).flatten(0, 1), len(columns), side)


def _above_and_below(x: Float[Tensor, "b 3 h w"], x_hat: Float[Tensor, "b 3 h w"]) -> Image.Image:
    return _sheet(torch.cat([x, x_hat]), columns=len(x), side=64)


def _autoencoder(order: Order, loss: Callable) -> Image.Image:
    vae, generator, x = order.sd.first_stage_model.requires_grad_(), order.generator, order.pictures()

    def of_both() -> Tensor:
        reconstruction, posterior = vae(x, generator=generator)
        return loss(x, reconstruction, posterior)

    _train(torch.optim.AdamW(vae.parameters(), lr=1e-3), order.steps, of_both)
    with torch.no_grad():
        return _above_and_below(x, vae(x, generator=generator)[0])


def _trained_on_vae_loss(order: Order) -> Image.Image:
    return _autoencoder(order, lambda x, x_hat, q: order.function(x, x_hat, q.mean, q.logvar, 0.01))


def _trained_with_kl(order: Order) -> Image.Image:
    return _autoencoder(order, lambda x, x_hat, q: F.l1_loss(x_hat, x) + q.kl().mean() / x[0].numel())


def _codebook(order: Order) -> VectorQuantizer:
    """64 codes: vectors of latents of the shipped autoencoder, taken at random."""
    data = sample(order.sd.config.image_size)
    with torch.no_grad():
        vectors = rearrange(order.sd.first_stage_model.encode(data.batch(range(64))).mode(), "b d h w -> (b h w) d")
    quantizer = VectorQuantizer(64, vectors.shape[1], legacy=False)
    quantizer.embedding.weight.data = vectors[torch.randperm(len(vectors), generator=order.generator)[:64]]
    return quantizer


def _quantised(order: Order, trained: bool = False) -> Image.Image:
    vae, quantizer, x = order.sd.first_stage_model, _codebook(order), order.pictures()
    if trained:
        quantizer.embedding.weight.data *= 0.5  # something to learn
    slow, fast = {"params": vae.encoder.requires_grad_().parameters()}, {"params": quantizer.parameters(), "lr": 0.03}

    def loss() -> Tensor:
        codes = quantizer(vae.encode(x).mode())
        return F.l1_loss(vae.decode(codes.z), x) + codes.loss

    _train(torch.optim.Adam([slow, fast], lr=1e-4), order.steps * trained, loss)
    with torch.no_grad():
        return _above_and_below(x, vae.decode(quantizer(vae.encode(x).mode()).z))


def _searched_through_codes(order: Order) -> Image.Image:
    vae, quantizer, x = order.sd.first_stage_model, _codebook(order), order.pictures()
    z = torch.zeros_like(vae.encode(x).mode()).requires_grad_()
    _train(torch.optim.Adam([z], lr=0.2), 2 * order.steps, lambda: F.mse_loss(vae.decode(quantizer(z).z), x))
    with torch.no_grad():
        return _above_and_below(x, vae.decode(quantizer(z).z))


def _matched(order: Order, trained: bool = False) -> Image.Image:
    """Captions against pictures, by CLIP."""
    clip, tokenizer = load_clip("emoji")
    data = sample(clip.vision_config.image_size)
    chosen = range(0, len(data), len(data) // 8)[:8]
    x, captions = data.batch(chosen), [data.captions[i] for i in chosen]
    ids = tokenizer(captions, clip.text_config.max_length).ids
    optimizer = torch.optim.AdamW(clip.parameters(), lr=1e-3)
    _train(optimizer, order.steps * trained, lambda: training_clip.contrastive_loss(clip(ids, x)))
    with torch.no_grad():
        return _picture(matrices({"": clip(ids, x).softmax(dim=1)}, columns=captions, pictures=x))


def _picture(figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return Image.open(buffer).convert("RGB")


# By their names in pictures.toml and in sentences.toml.
PICTURES = {
    "drawn": _drawn, "exact": _exact, "of_v": _of_v, "guessed_from_v": _guessed_from_v, "drawn_over": _drawn_over,
    "inpainted": _inpainted, "rescaled": _rescaled, "curve_of_the_loss": _curve_of_the_loss, "trained": _trained,
    "trained_with_weights": partial(_trained, gamma=1.0), "trained_on_v": partial(_trained, kind="v"),
    "trained_on_vae_loss": _trained_on_vae_loss, "trained_with_kl": _trained_with_kl, "quantised": _quantised,
    "quantised_and_trained": partial(_quantised, trained=True), "searched_through_codes": _searched_through_codes,
    "matched": _matched, "trained_to_match": partial(_matched, trained=True),
}  # fmt: skip
