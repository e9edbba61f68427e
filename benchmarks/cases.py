"""What is compared, and the goal of each: `cases(...)` lists them.

A pair of functions `ours_…`, `theirs_…` builds each peer, and returns a call that does the work once.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import diffusers
import torch
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

import minisd
from minisd import PRESETS, AutoencoderConfig, NoiseSchedule, UNetConfig, epsilon_loss
from minisd.sampling import SAMPLERS

from .measure import Call, Case, Unavailable
from .peers import our_unet, our_vae, their_unet, their_vae

GROUPS = ("unet", "vae", "sampler", "train", "import", "load")


@dataclass(frozen=True)
class Options:
    """What the command line decides about the cases."""

    device: str = "cpu"
    small: bool = False  # everything scaled down: to see that it runs, not how fast
    folder: Path = Path("outputs/benchmarks")  # where `load` may write a model


def cases(options: Options, only: tuple[str, ...] = GROUPS) -> Iterator[Case]:
    """The cases of these groups, in order."""
    lists = {
        "unet": unet_cases, "vae": vae_cases, "sampler": sampler_cases, "train": train_cases,
        "import": import_cases, "load": load_cases,
    }  # fmt: skip
    for group in GROUPS:
        if group in only:
            yield from lists[group](options)


@dataclass(frozen=True)
class Kind:
    """The numbers that a network computes with. Half-precision convolutions are made for channels_last."""

    name: str
    dtype: torch.dtype
    memory_format: torch.memory_format
    tolerance: float  # of the output, against the other library
    compiled: bool = False

    def place(self, model: nn.Module, device: str) -> nn.Module:
        # not model.to, which in diffusers warns of layers that have to stay in float32, though there are none here
        return nn.Module.to(model, device, self.dtype, memory_format=self.memory_format)


FP32 = Kind("fp32", torch.float32, torch.contiguous_format, 1e-3)
BF16 = Kind("bf16 channels_last", torch.bfloat16, torch.channels_last, 0.1)
COMPILED = Kind("bf16 channels_last compiled", torch.bfloat16, torch.channels_last, 0.1, compiled=True)


def kinds(device: str) -> list[Kind]:
    return [FP32, BF16, COMPILED] if device == "cuda" else [FP32, BF16]


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- UNet: one prediction, as in each step of a drawing with guidance ---------------------------------------------

SMALL_UNET = UNetConfig(
    model_channels=32, num_res_blocks=1, channel_mult=(1, 2), attention_resolutions=(2, 1), num_heads=4, context_dim=32
)


def unet_cases(options: Options) -> Iterator[Case]:
    config, size = (SMALL_UNET, 8) if options.small else (UNetConfig(), 64)
    for batch in (2, 16) if options.device == "cuda" and not options.small else (2,):
        for kind in kinds(options.device):
            yield Case(
                "unet", f"{size}x{size}, batch {batch} ({batch // 2} with guidance), {kind.name}",
                partial(ours_unet, config, size, batch, kind, options.device),
                partial(theirs_unet, config, size, batch, kind, options.device),
                goal="time <= 1.02x, memory <= 1.00x", max_time=1.02, max_memory=1.0, tolerance=kind.tolerance,
            )  # fmt: skip


def unet_inputs(config: UNetConfig, size: int, batch: int, kind: Kind, device: str) -> tuple[Tensor, Tensor, Tensor]:
    x = draw(1, batch, config.in_channels, size, size).to(device, kind.dtype, memory_format=kind.memory_format)
    t = torch.full((batch,), 500, device=device)
    return x, t, draw(2, batch, 77, config.context_dim).to(device, kind.dtype)


def ours_unet(config: UNetConfig, size: int, batch: int, kind: Kind, device: str) -> Call:
    model = kind.place(our_unet(config), device)
    inputs = unet_inputs(config, size, batch, kind, device)
    run = torch.compile(model) if kind.compiled else model
    return torch.no_grad()(lambda: run(*inputs))


def theirs_unet(config: UNetConfig, size: int, batch: int, kind: Kind, device: str) -> Call:
    model = kind.place(their_unet(config), device)
    inputs = unet_inputs(config, size, batch, kind, device)
    run = torch.compile(model) if kind.compiled else model
    return torch.no_grad()(lambda: run(*inputs, return_dict=False)[0])


# -- VAE: from a latent to a picture ------------------------------------------------------------------------------


def vae_cases(options: Options) -> Iterator[Case]:
    config, size = (AutoencoderConfig(ch=32), 16) if options.small else (AutoencoderConfig(), 64)
    for kind in kinds(options.device):
        yield Case(
            "vae", f"decode {8 * size}x{8 * size}, {kind.name}",
            partial(ours_vae, config, size, kind, options.device),
            partial(theirs_vae, config, size, kind, options.device),
            goal="time <= 1.02x", max_time=1.02, tolerance=kind.tolerance,
        )  # fmt: skip
    yield Case(
        "vae", f"decode {8 * size}x{8 * size}, fp32, tiled against our own untiled",
        partial(ours_vae, config, size, FP32, options.device, tiled=True),
        partial(ours_vae, config, size, FP32, options.device),
        goal="memory <= 0.65x", max_memory=0.65,
    )  # fmt: skip
    yield Case(
        "vae", f"decode {8 * size}x{8 * size}, fp32, both tiled",
        partial(ours_vae, config, size, FP32, options.device, tiled=True),
        partial(theirs_vae, config, size, FP32, options.device, tiled=True),
        goal="(none)", tolerance=FP32.tolerance,
    )  # fmt: skip


def ours_vae(config: AutoencoderConfig, size: int, kind: Kind, device: str, tiled: bool = False) -> Call:
    model = kind.place(our_vae(config), device)
    if tiled:
        if not hasattr(model, "enable_tiling"):
            raise Unavailable("this minisd has no tiled decoding")
        model.enable_tiling(size * 4)  # half a picture a tile, 256 of 512 pixels
    z = draw(1, 1, config.embed_dim, size, size).to(device, kind.dtype, memory_format=kind.memory_format)
    decode = torch.compile(model.decode) if kind.compiled else model.decode
    return torch.no_grad()(lambda: decode(z))


def theirs_vae(config: AutoencoderConfig, size: int, kind: Kind, device: str, tiled: bool = False) -> Call:
    model = kind.place(their_vae(config), device)
    if tiled:
        model.enable_tiling()
        model.tile_sample_min_size, model.tile_latent_min_size = size * 4, size // 2
    z = draw(1, 1, config.embed_dim, size, size).to(device, kind.dtype, memory_format=kind.memory_format)
    decode = torch.compile(model.decode) if kind.compiled else model.decode
    return torch.no_grad()(lambda: decode(z, return_dict=False)[0])


# -- samplers: a drawing in 50 steps in which the model costs nothing ---------------------------------------------

STEPS = 50
SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SCHEDULERS = {
    "ddpm": lambda: diffusers.DDPMScheduler(**SD, clip_sample=False, timestep_spacing="linspace"),
    "ddim": lambda: diffusers.DDIMScheduler(**SD, clip_sample=False, set_alpha_to_one=False, steps_offset=1),
    "plms": lambda: diffusers.PNDMScheduler(**SD, skip_prk_steps=True, set_alpha_to_one=False, steps_offset=1),
    "dpmpp_2m": lambda: diffusers.DPMSolverMultistepScheduler(**SD, timestep_spacing="trailing"),
    "euler": lambda: diffusers.EulerDiscreteScheduler(**SD),
    "euler_ancestral": lambda: diffusers.EulerAncestralDiscreteScheduler(**SD),
    "heun": lambda: diffusers.HeunDiscreteScheduler(**SD),
}


def sampler_cases(options: Options) -> Iterator[Case]:
    for name in SAMPLERS:
        if name in SCHEDULERS:
            yield Case(
                "sampler", f"{name}, 64x64, a step without the model",
                partial(ours_sampler, name, 64, options.device), partial(theirs_sampler, name, 64, options.device),
                goal="time < 1x", max_time=0.99, per=(STEPS, STEPS), measures_memory=False,
            )  # fmt: skip
    config = PRESETS["emoji"].unet
    for name in SAMPLERS:
        yield Case(
            "sampler", f"{name}, 8x8, a step against one call of the `emoji` UNet (batch 2, fp32)",
            partial(ours_sampler, name, 8, options.device),
            partial(ours_unet, config, 8, 2, FP32, options.device),
            goal="time < 0.01x", max_time=0.0099, per=(STEPS, 1), measures_memory=False,
        )  # fmt: skip


def ours_sampler(name: str, size: int, device: str) -> Call:
    schedule = NoiseSchedule.scaled_linear(SD["beta_start"], SD["beta_end"], timesteps=1000)
    x_T, eps = draw(1, 1, 4, size, size).to(device), draw(2, 1, 4, size, size).to(device)

    def call() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        x = x_T
        for step in SAMPLERS[name](lambda x, t: eps, x_T, schedule, steps=STEPS, generator=generator):
            x = step.x  # nothing else is kept: diffusers' loop has no trajectory either
        return x

    return call


def theirs_sampler(name: str, size: int, device: str) -> Call:
    """The loop of diffusers' pipelines. As with ours, setting up the timesteps is part of the drawing."""
    scheduler = SCHEDULERS[name]()
    x_T, eps = draw(1, 1, 4, size, size).to(device), draw(2, 1, 4, size, size).to(device)
    draws = {"generator": None} if name in ("ddpm", "euler_ancestral") else {}

    @torch.no_grad()
    def call() -> Tensor:
        options = {key: torch.Generator().manual_seed(0) for key in draws}
        scheduler.set_timesteps(STEPS, device=device)
        x = x_T * scheduler.init_noise_sigma
        for t in scheduler.timesteps:
            scheduler.scale_model_input(x, t)
            x = scheduler.step(eps, t, x, **options, return_dict=False)[0]
        return x

    return call


# -- a step of training -------------------------------------------------------------------------------------------

# 17.8 million parameters; 16x16 latents, with transformers at 8x8, 8 heads of 16 and of 32 channels.
TRAINED_UNET = UNetConfig(model_channels=64, channel_mult=(1, 2, 4), attention_resolutions=(2,), context_dim=384)
LR, CLIP_GRAD = 1e-4, 1.0


@dataclass(frozen=True)
class TheirSetting:
    """How diffusers' UNet is trained. The first is what one gets without doing anything."""

    name: str
    autocast: bool = False
    plain_attention: bool = False
    fused: bool = True
    channels_last: bool = False


DEFAULT = TheirSetting("the defaults: fp32, SDPA, AdamW", fused=False)
OTHERS = [
    TheirSetting("fp32, SDPA, fused AdamW"),
    TheirSetting("fp32, plain attention, fused AdamW", plain_attention=True),
    TheirSetting("bf16 autocast, SDPA, fused AdamW", autocast=True),
    TheirSetting("bf16 autocast, plain attention, fused AdamW", autocast=True, plain_attention=True),
    TheirSetting(
        "bf16 autocast, plain attention, fused AdamW, channels_last",
        autocast=True, plain_attention=True, channels_last=True,
    ),
]  # fmt: skip


def train_cases(options: Options) -> Iterator[Case]:
    """Ours as minisd's trainer does it, against each setting of theirs: who beats all of them beats the best."""
    config, size, batch = (SMALL_UNET, 8, 4) if options.small else (TRAINED_UNET, 16, 64)
    what = f"17.8M UNet, {size}x{size}, batch {batch}" if not options.small else f"{size}x{size}, batch {batch}"
    for setting in [DEFAULT, *OTHERS]:
        by_default = setting is DEFAULT
        yield Case(
            "train", f"{what}; ours bf16 autocast, fused AdamW; theirs {setting.name}",
            partial(ours_train, config, size, batch, options.device),
            partial(theirs_train, config, size, batch, options.device, setting),
            goal=">= 1.3x the speed (time <= 0.77x)" if by_default else ">= 0.98x the speed (time <= 1.02x)",
            max_time=0.77 if by_default else 1.02, tolerance=0.02,
        )  # fmt: skip


def train_step(model: nn.Module, predict, optimizer, config: UNetConfig, size: int, batch: int, device: str,
               autocast: bool) -> Call:  # fmt: skip
    """Loss, gradients, clipping, AdamW: the same for both. Returns the loss."""
    schedule = NoiseSchedule.scaled_linear(SD["beta_start"], SD["beta_end"], timesteps=1000)
    z, noise = draw(1, batch, 4, size, size).to(device), draw(2, batch, 4, size, size).to(device)
    context = draw(3, batch, 77, config.context_dim).to(device)
    t = torch.randint(1000, (batch,), generator=torch.Generator().manual_seed(4)).to(device)

    def call() -> Tensor:
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            loss = epsilon_loss(predict, schedule, z, context, t, noise)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_GRAD)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.detach()

    return call


def ours_train(config: UNetConfig, size: int, batch: int, device: str) -> Call:
    model = our_unet(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    return train_step(model, model, optimizer, config, size, batch, device, autocast=True)


def theirs_train(config: UNetConfig, size: int, batch: int, device: str, setting: TheirSetting) -> Call:
    model = their_unet(config).to(device).train()
    if setting.channels_last:
        model.to(memory_format=torch.channels_last)
    model.set_attn_processor(AttnProcessor() if setting.plain_attention else AttnProcessor2_0())
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=setting.fused or None)

    def predict(x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        return model(x, t, context, return_dict=False)[0]

    return train_step(model, predict, optimizer, config, size, batch, device, setting.autocast)


# -- import -------------------------------------------------------------------------------------------------------


def import_cases(options: Options) -> Iterator[Case]:
    yield Case(
        "import", "what txt2img needs, in a new process",
        partial(python, "import minisd; minisd.load; minisd.LatentDiffusion"),
        partial(python, "from diffusers import StableDiffusionPipeline"),
        goal="time <= 0.35x", max_time=0.35, measures_memory=False,
    )  # fmt: skip


def python(code: str) -> Call:
    """A call that runs Python code in a process of its own."""
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    return lambda: subprocess.run(command, env=environment, check=True, capture_output=True)


# -- loading ------------------------------------------------------------------------------------------------------


def load_cases(options: Options) -> Iterator[Case]:
    """A folder as diffusers writes it, of the size of SD v1, in float32: 4.3 GB on the disk while it runs."""
    yield Case(
        "load", "a diffusers folder of SD v1's size, fp32",
        partial(ours_load, options.folder, options.small), partial(theirs_load, options.folder, options.small),
        goal="(none)", tolerance=0.0,
    )  # fmt: skip


def ours_load(folder: Path, small: bool) -> Call:
    write_diffusers_folder(folder, small)

    def call() -> Tensor:
        try:
            sd = minisd.load(folder, device="cpu")
        except (FileNotFoundError, ValueError) as error:
            raise Unavailable(f"this minisd does not load the folder: {error}") from error
        return sd.model.diffusion_model.out[2].bias

    return call


def theirs_load(folder: Path, small: bool) -> Call:
    write_diffusers_folder(folder, small)

    def call() -> Tensor:
        pipeline = diffusers.StableDiffusionPipeline.from_pretrained(folder, safety_checker=None, local_files_only=True)
        return pipeline.unet.conv_out.bias

    return call


def write_diffusers_folder(folder: Path, small: bool) -> None:
    """Random weights, and the tokenizer of `emoji`: nobody draws with it. Nothing happens if it is there already."""
    if (folder / "model_index.json").exists():
        return
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    unet, vae = (SMALL_UNET, AutoencoderConfig(ch=32)) if small else (UNetConfig(), AutoencoderConfig())
    width = unet.context_dim
    text = CLIPTextConfig(
        vocab_size=49_408, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2 if small else 12,
        num_attention_heads=4 if small else 12, max_position_embeddings=77, hidden_act="quick_gelu",
        projection_dim=width,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=their_vae(vae), unet=their_unet(unet), text_encoder=CLIPTextModel(text),
        tokenizer=CLIPTokenizer.from_pretrained(minisd.checkpoint.SHIPPED / "emoji" / "tokenizer"),
        scheduler=SCHEDULERS["plms"](), safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    ).save_pretrained(folder)  # fmt: skip
