"""draw("q_sample", my_q_sample): minisd draws a picture with a student's function in it.

Each function takes part in something else. Where it takes part in the drawing, the picture shows just that; where it
takes part in training, a shipped network is trained on for a few steps first, with the student's function.
"""

import copy
import io
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

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
from minisd.viz import curves, matrices, sheet, to_pil
from minisd.vq import VectorQuantizer

from .exercise import find, swap
from .running import default_torch_state
from .texts import say


@default_torch_state()
def draw(
    name: str,
    function: Callable | None = None,
    prompt: str = "a fox, noto style",
    model: str = "emoji",
    steps: int = 10,
    seed: int = 0,
) -> Image.Image | None:
    """What minisd draws with `function` in the place of its own; None: with its own, to compare.

    Args:
        name: of an exercise.
        prompt, model, steps, seed: as for `minisd.load(model).txt2img(...)`. Where a network is trained on first,
            `steps` is the number of steps of that, too.

    Returns:
        A picture; `caption(name)` says what it shows. None, and a sentence is printed, if the function leads to none.

    Raises:
        ValueError: there is no such exercise.
    """
    exercise = find(name)
    solution = exercise.compile()
    try:
        with swap(name, function) if function and callable(exercise.swap) else nullcontext():
            order = Order(load(model, "cpu"), function or solution, prompt, SAMPLER_OF.get(name, "ddim"), steps, seed)
            return ROUTES.get(name, _drawn)(order)
    except NotImplementedError:
        print(say("picture.unwritten", name=name))
    except Exception as error:  # whatever a wrong function leads to
        if function is None:
            raise
        message = (str(error).splitlines() or [say("picture.no_message")])[0]
        print(say("picture.failed", name=name, kind=type(error).__name__, message=message))
    return None


def caption(name: str) -> str:
    """What the picture of `draw(name)` shows, in a sentence."""
    if name in SAMPLER_OF:
        return say("picture.drawn_by", sampler=SAMPLER_OF[name])
    return say(f"caption.{ROUTES.get(name, _drawn).__name__[1:]}")


@dataclass
class Order:
    """What is to be drawn, and with what."""

    sd: LatentDiffusion
    function: Callable  # the student's, or the solution; in minisd itself it stands already, where it has a place there
    prompt: str
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
    out = order.sd.txt2img(order.prompt, **order.options)
    return sheet([*out.images, *to_pil(_again(order, out.pictures))], scale=4)


@torch.no_grad()
def _again(order: Order, pictures: Float[Tensor, "b 3 h w"]) -> Float[Tensor, "b 3 h w"]:
    """Into the latent space, noised half way, and drawn from there, by the calls that have a name in CompVis."""
    sd, generator = order.sd, order.generator
    z = sd.get_first_stage_encoding(sd.encode_first_stage(pictures.clamp(-1, 1)), generator)
    left = make_timesteps(order.steps, sd.schedule.timesteps)[order.steps // 2 :]
    z_t = sd.q_sample(z, torch.full((len(z),), left[0]), randn(z.shape, generator))
    context = sd.get_learned_conditioning([order.prompt] * len(z))

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
    for step in sd.sample(order.prompt, **order.options):
        t = torch.full((1,), step.t)
        v = sd.schedule.get_v(step.x0, step.eps, t)
        guesses.append(sd.decode_first_stage(sd.schedule.predict_start_from_v(step.x_t, t, v)))
    return sheet(to_pil(torch.cat(guesses)), columns=5, scale=3)


def _exact(order: Order) -> Image.Image:
    x, _ = order.shapes()
    x_T = randn((4, *x.shape[1:]), order.generator)
    schedule = order.sd.schedule
    *_, last = SAMPLERS[order.sampler](ExactDenoiser(x, schedule), x_T, schedule, steps=order.steps)
    return sheet(to_pil(last.x), scale=4)


def _drawn_over(order: Order) -> Image.Image:
    cat = order.cat()
    over = [order.sd.img2img(order.prompt, cat, strength, **order.options).images[0] for strength in (0.25, 0.5, 0.75)]
    return sheet([*to_pil(cat), *over], scale=3)


def _inpainted(order: Order) -> Image.Image:
    cat = order.cat()
    mask = torch.zeros(cat.shape[-2:])
    mask[:, mask.shape[1] // 2 :] = 1
    out = order.sd.inpaint(order.prompt, cat, mask, blend="before", **order.options)
    return sheet([*to_pil(cat), *out.images], scale=4)


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
        return sheet(sd.txt2img(order.prompt, num_images=2, **order.options).images, scale=4)


def _trained_on_v(order: Order) -> Image.Image:
    return _trained(order, kind="v")


def _trained_with_weights(order: Order) -> Image.Image:
    return _trained(order, gamma=1.0)


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


def _above_and_below(x: Float[Tensor, "b 3 h w"], x_hat: Float[Tensor, "b 3 h w"]) -> Image.Image:
    return sheet(to_pil(torch.cat([x, x_hat])), columns=len(x), scale=2)


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


def _quantised(order: Order, rounds: int = 0) -> Image.Image:
    vae, quantizer, x = order.sd.first_stage_model, _codebook(order), order.pictures()
    if rounds:
        quantizer.embedding.weight.data *= 0.5  # something to learn
    slow, fast = {"params": vae.encoder.requires_grad_().parameters()}, {"params": quantizer.parameters(), "lr": 0.03}

    def loss() -> Tensor:
        codes = quantizer(vae.encode(x).mode())
        return F.l1_loss(vae.decode(codes.z), x) + codes.loss

    _train(torch.optim.Adam([slow, fast], lr=1e-4), rounds, loss)
    with torch.no_grad():
        return _above_and_below(x, vae.decode(quantizer(vae.encode(x).mode()).z))


def _quantised_and_trained(order: Order) -> Image.Image:
    return _quantised(order, rounds=order.steps)


def _searched_through_codes(order: Order) -> Image.Image:
    vae, quantizer, x = order.sd.first_stage_model, _codebook(order), order.pictures()
    z = torch.zeros_like(vae.encode(x).mode()).requires_grad_()

    def loss() -> Tensor:
        return F.mse_loss(vae.decode(quantizer(z).z), x)

    _train(torch.optim.Adam([z], lr=0.2), 2 * order.steps, loss)
    with torch.no_grad():
        return _above_and_below(x, vae.decode(quantizer(z).z))


def _matched(order: Order, rounds: int = 0) -> Image.Image:
    """Captions against pictures, by CLIP."""
    clip, tokenizer = load_clip("emoji")
    data = sample(clip.vision_config.image_size)
    chosen = range(0, len(data), len(data) // 8)[:8]
    x, captions = data.batch(chosen), [data.captions[i] for i in chosen]
    ids = tokenizer(captions, clip.text_config.max_length).ids

    def loss() -> Tensor:
        return training_clip.contrastive_loss(clip(ids, x))

    _train(torch.optim.AdamW(clip.parameters(), lr=1e-3), rounds, loss)
    with torch.no_grad():
        return _picture(matrices({"": clip(ids, x).softmax(dim=1)}, columns=captions, pictures=x))


def _trained_to_match(order: Order) -> Image.Image:
    return _matched(order, rounds=order.steps)


def _picture(figure) -> Image.Image:
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return Image.open(buffer).convert("RGB")


# Which sampler a function takes part in, if it is not ddim.
SAMPLER_OF = {
    "q_posterior_mean": "ddpm", "q_posterior_variance": "ddpm", "ddpm_step": "ddpm", "plms_combine": "plms",
    "dpmpp_2m_step": "dpmpp_2m", "euler_step": "euler", "sigmas": "euler",
}  # fmt: skip
# Which way to a picture leads through which functions; _drawn for those that are not named.
EXERCISES_OF = {
    _exact: ["exact_x0"],
    _of_v: ["predict_noise_from_v"],
    _guessed_from_v: ["predict_start_from_v"],
    _drawn_over: ["img2img_timesteps"],
    _inpainted: ["inpaint_blend"],
    _rescaled: ["scale_factor"],
    _trained: ["epsilon_loss", "text_dropout", "training_loss", "ema_update", "ema_decay"],
    _trained_with_weights: ["min_snr_weight", "snr"],
    _trained_on_v: ["get_v"],
    _curve_of_the_loss: ["loss_by_time"],
    _trained_on_vae_loss: ["vae_loss"],
    _trained_with_kl: ["kl"],
    _quantised: ["nearest_code"],
    _searched_through_codes: ["straight_through"],
    _quantised_and_trained: ["vq_loss"],
    _matched: ["pooled_state", "patchify"],
    _trained_to_match: ["contrastive_loss"],
}
ROUTES = {name: route for route, names in EXERCISES_OF.items() for name in names}
