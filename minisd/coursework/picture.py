"""draw("q_sample", my_q_sample): the real pipeline draws a picture with a student's function in it."""

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from PIL import Image
from torch import Tensor

from ..checkpoint import load
from ..data import shape_corpus
from ..latent_diffusion import Cond, LatentDiffusion
from ..loss import LOSSES
from ..noising import ExactDenoiser
from ..sampling import SAMPLERS, make_timesteps, randn
from ..training import trainer
from ..training import unet as training_unet
from ..viz import sheet, to_pil
from .exercise import find, swap


def draw(
    name: str,
    function: Callable | None = None,
    prompt: str = "a fox, noto style",
    model: str = "emoji",
    steps: int = 10,
    seed: int = 0,
) -> Image.Image:
    """What minisd draws with `function` in the place of its own; None: with its own, to compare.

    Where a function takes part in the drawing, the picture on the left is drawn from noise, and that on the right from
    the left one, noised half way. Where it takes part in training, the UNet is trained for a few steps before.

    Raises:
        ValueError: there is no such exercise, or no picture depends on it.
    """
    exercise = find(name)
    route = ROUTES.get(name, _drawn)
    if exercise.swap is None or route is None:
        raise ValueError(f"no picture depends on {name}")
    sampler = "ddim"
    if function is None:
        function = exercise.compile()
        places = exercise.swap(function)
        sampler = next((key for target, key, _ in places if target is SAMPLERS), sampler)
        return route(load(model, "cpu"), prompt, sampler, steps, seed)
    sampler = next((key for target, key, _ in exercise.swap(function) if target is SAMPLERS), sampler)
    with swap(name, function):
        return route(load(model, "cpu"), prompt, sampler, steps, seed)


def _drawn(sd: LatentDiffusion, prompt: str, sampler: str, steps: int, seed: int) -> Image.Image:
    """From noise, and from that picture again."""
    out = sd.txt2img(prompt, steps=steps, guidance_scale=3.0, sampler=sampler, seed=seed)
    return sheet([*out.images, *to_pil(again(sd, out.pictures, prompt, sampler, steps, seed))], scale=4)


@torch.no_grad()
def again(sd: LatentDiffusion, pictures: Tensor, prompt: str, sampler: str, steps: int, seed: int) -> Tensor:
    """A picture into the latent space, noised half way, and drawn from there."""
    generator = torch.Generator().manual_seed(seed)
    posterior = sd.encode_first_stage(pictures.clamp(-1, 1))
    z = sd.get_first_stage_encoding(posterior, generator)
    left = make_timesteps(steps, sd.schedule.timesteps)[steps // 2 :]
    z_t = sd.q_sample(z, torch.full((len(z),), left[0]), randn(z.shape, generator))
    context = sd.get_learned_conditioning([prompt] * len(z))

    def eps_model(x: Tensor, t: Tensor) -> Tensor:
        return sd._predict_noise(x, t, context)

    last = list(SAMPLERS[sampler](eps_model, z_t, sd.schedule, steps=len(left), timesteps=left,
                                  generator=generator))[-1]
    return sd.decode_first_stage(last.x)


def _trained(
    sd: LatentDiffusion, prompt: str, sampler: str, steps: int, seed: int, kind: str = "eps", gamma: float | None = None
) -> Image.Image:
    """Train the UNet on shapes, a few steps, and draw with the running mean of its weights."""
    pixels, captions = shape_corpus(16, sd.config.image_size, seed)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(seed)
    z = sd.get_first_stage_encoding(sd.encode_first_stage(x), generator)
    contexts, empty = sd.get_learned_conditioning(captions), sd.get_learned_conditioning([""])
    unet = sd.model.diffusion_model
    ema = trainer.EMA(unet, decay=0.9)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3)
    for _ in range(max(1, steps // 2)):
        t = torch.randint(sd.schedule.timesteps, (len(z),), generator=generator)
        drop = torch.rand(len(z), generator=generator) < 0.5
        context = training_unet.text_dropout(contexts, empty, drop)
        loss = LOSSES[kind](sd.apply_model, sd.schedule, z, context, t, randn(z.shape, generator), gamma)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update(unet)
    with ema.applied_to(unet):
        return sheet(sd.txt2img(prompt, steps=steps, guidance_scale=3.0, seed=seed, num_images=2).images, scale=4)


def _trained_on_v(*args) -> Image.Image:
    return _trained(*args, kind="v")


def _trained_with_weights(*args) -> Image.Image:
    return _trained(*args, gamma=1.0)


def _of_v(sd: LatentDiffusion, *args) -> Image.Image:
    """The UNet's answer taken for a v, made of its ε: so that a sampler has to find the ε in it again."""
    sd = copy.copy(sd)
    sd.config = replace(sd.config, parameterization="v")
    predict_noise = sd.apply_model

    def answers_v(x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        signal = sd.schedule._at(sd.schedule.sqrt_alphas_cumprod, t, x)
        sigma = sd.schedule._at(sd.schedule.sqrt_one_minus_alphas_cumprod, t, x)
        return (predict_noise(x, t, cond) - sigma * x) / signal  # ε = √(1-ᾱ) x_t + √ᾱ v

    sd.apply_model = answers_v
    return _drawn(sd, *args)


def _exact(sd: LatentDiffusion, prompt: str, sampler: str, steps: int, seed: int) -> Image.Image:
    """No network: the exact denoiser of 16 pictures, which draws nothing but these."""
    pixels, _ = shape_corpus(16, sd.config.image_size, seed)
    x = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1
    x_T = randn((4, *x.shape[1:]), torch.Generator().manual_seed(seed))
    return sheet(to_pil(list(SAMPLERS[sampler](ExactDenoiser(x, sd.schedule), x_T, sd.schedule, steps=steps))[-1].x),
                 scale=4)


# Which way to a picture leads through a function; _drawn for those that are not named, None: no way.
ROUTES = {
    "epsilon_loss": _trained,
    "text_dropout": _trained,
    "training_loss": _trained,
    "ema_update": _trained,
    "ema_decay": _trained,
    "min_snr_weight": _trained_with_weights,
    "snr": _trained_with_weights,
    "get_v": _trained_on_v,
    "predict_noise_from_v": _of_v,
    "exact_x0": _exact,
    "predict_start_from_v": None,
    "kl": None,
    "scale_factor": None,
    "pooled_state": None,
    "contrastive_loss": None,
    "patchify": None,
}
