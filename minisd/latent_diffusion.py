"""LatentDiffusion: the three networks as one.

    training   picture ─ encode_first_stage ─► z ─ q_sample(t, noise) ─► z_t ┐
               caption ─ get_learned_conditioning ─► context ────────────────┴ apply_model ─► eps ─► p_losses
    drawing    prompt ─ get_learned_conditioning ─► context ─► sample: x_T … x_0 ─ decode_first_stage ─► picture

Names and methods are those of CompVis `ldm/models/diffusion/ddpm.py: LatentDiffusion`. Rombach et al. 2022
(arXiv:2112.10752).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn

from .clip import CLIPTextConfig, CLIPTextModel, FrozenCLIPEmbedder, Tokenizer
from .loss import LOSSES
from .noising import NoiseSchedule
from .sampling import SAMPLERS, Step, classifier_free_guidance, randn
from .unet import UNetConfig, UNetModel
from .vae import AutoencoderConfig, AutoencoderKL, DiagonalGaussianDistribution
from .viz import sheet, to_pil


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """What a whole model is. The defaults are Stable Diffusion v1."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    first_stage: AutoencoderConfig = field(default_factory=AutoencoderConfig)
    cond_stage: CLIPTextConfig = field(default_factory=CLIPTextConfig)
    image_size: int = 512  # pixels along each side, as it was trained
    scale_factor: float = 0.18215  # latents times this have variance 1; measured on the training pictures
    linear_start: float = 0.00085  # β of the first timestep; √β grows linearly …
    linear_end: float = 0.012  # … to that of the last
    timesteps: int = 1000
    parameterization: str = "eps"  # what the UNet predicts: "eps" (SD v1), "v" or "x0"


# What the models that ship are made of, and Stable Diffusion v1.
PRESETS = {
    # 32x32 pictures of coloured shapes: for notebooks, tests, the first lesson
    "tiny": LatentDiffusionConfig(
        unet=UNetConfig(
            model_channels=32,
            num_res_blocks=1,
            channel_mult=(1, 1),
            attention_resolutions=(2,),
            num_heads=None,
            num_head_channels=32,
            context_dim=32,
        ),
        first_stage=AutoencoderConfig(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1),
        cond_stage=CLIPTextConfig(vocab_size=640, max_length=16, width=32, layers=2, heads=2, projection_dim=32),
        image_size=32,
        scale_factor=1.0,  # measured when the autoencoder is trained
    ),
    # 32x32 emoji in seven styles, small enough to be trained from scratch on a laptop
    "emoji": LatentDiffusionConfig(
        unet=UNetConfig(
            model_channels=96,
            num_res_blocks=1,
            channel_mult=(1, 2),
            attention_resolutions=(2,),
            num_heads=None,
            num_head_channels=64,
            context_dim=192,
        ),
        first_stage=AutoencoderConfig(ch=32, ch_mult=(1, 2, 3), num_res_blocks=1),
        cond_stage=CLIPTextConfig(vocab_size=3072, max_length=24, width=192, layers=3, heads=3, projection_dim=192),
        image_size=32,
        scale_factor=1.0,
    ),
    "sd-v1": LatentDiffusionConfig(),
}


class DiffusionWrapper(nn.Module):
    """Holds the UNet under the name that the checkpoint gives it: `model.diffusion_model`."""

    def __init__(self, diffusion_model: nn.Module):
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return self.diffusion_model(x, t, context)


class LatentDiffusion(nn.Module):
    """A diffusion model in the latent space of an autoencoder, told what to draw by a text encoder.

    Its `state_dict()` has the names of `sd-v1-4.ckpt`. The autoencoder and the text encoder are frozen: each is trained
    before, on its own. CompVis `ddpm.py: LatentDiffusion`.
    """

    def __init__(self, config: LatentDiffusionConfig, tokenizer: Tokenizer):
        super().__init__()
        self.config = config
        self.model = DiffusionWrapper(UNetModel(config.unet))
        self.first_stage_model = AutoencoderKL(config.first_stage).eval().requires_grad_(False)
        self.cond_stage_model = FrozenCLIPEmbedder(
            CLIPTextModel(config.cond_stage), tokenizer, config.cond_stage.max_length
        )
        self.schedule = NoiseSchedule.scaled_linear(config.linear_start, config.linear_end, config.timesteps)
        self.scale_factor = config.scale_factor

    @property
    def device(self) -> torch.device:
        return next(self.parameters()).device

    # --- the stages, under their names in CompVis ------------------------------------------------------------------

    def get_learned_conditioning(self, prompts: list[str]) -> Float[Tensor, "b n d"]:
        """Prompts → context, one row of hidden states for each."""
        return self.cond_stage_model.encode(prompts)

    @torch.no_grad()
    def encode_first_stage(self, x: Float[Tensor, "b 3 H W"]) -> DiagonalGaussianDistribution:
        """Pictures in [-1, 1] → the distribution of their latents, not scaled yet."""
        return self.first_stage_model.encode(x)

    def get_first_stage_encoding(
        self, encoder_posterior: DiagonalGaussianDistribution, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b 4 h w"]:
        """z = scale_factor · sample: latents of about unit variance, which is what diffusion works on."""
        return self.scale_factor * encoder_posterior.sample(generator)

    @torch.no_grad()
    def decode_first_stage(self, z: Float[Tensor, "b 4 h w"]) -> Float[Tensor, "b 3 H W"]:
        """Scaled latents → pictures in about [-1, 1]."""
        return self.first_stage_model.decode(z / self.scale_factor)

    def apply_model(
        self, x_noisy: Float[Tensor, "b 4 h w"], t: Int[Tensor, "b"], cond: Float[Tensor, "b n d"]
    ) -> Float[Tensor, "b 4 h w"]:
        """What the UNet says about noisy latents: the noise in them (or v, or x_0, if it was trained so)."""
        return self.model(x_noisy, t, cond)

    def q_sample(
        self, x_start: Float[Tensor, "b 4 h w"], t: Int[Tensor, "b"], noise: Float[Tensor, "b 4 h w"] | None = None
    ) -> Float[Tensor, "b 4 h w"]:
        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε."""
        return self.schedule.q_sample(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def p_losses(
        self,
        x_start: Float[Tensor, "b 4 h w"],
        cond: Float[Tensor, "b n d"],
        t: Int[Tensor, "b"],
        noise: Float[Tensor, "b 4 h w"] | None = None,
    ) -> Float[Tensor, ""]:
        """The training loss at the times t."""
        return LOSSES[self.config.parameterization](self.apply_model, self.schedule, x_start, cond, t, noise)

    # --- drawing ---------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompt: str | list[str],
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str = "ddim",
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        **options,
    ) -> Iterator[Step]:
        """The steps from noise to latent, one at a time: what `txt2img` runs through. Arguments as there."""
        if sampler not in SAMPLERS:
            raise ValueError(f"there is no sampler {sampler!r}: choose one of {', '.join(SAMPLERS)}")
        if num_images < 1 or prompt == []:
            raise ValueError(f"there is nothing to draw: num_images is {num_images}, the prompt {prompt!r}")
        prompts = [prompt] * num_images if isinstance(prompt, str) else [p for p in prompt for _ in range(num_images)]
        # One generator a picture: picture k is drawn from seed + k, however many are drawn beside it.
        generators = [torch.Generator().manual_seed(seed + k) for k in range(len(prompts))]
        x_T = randn((len(prompts), *self.latent_shape(height, width)), generators).to(self.device)
        context = self.get_learned_conditioning(prompts)
        empty = self.get_learned_conditioning([""])
        eps_model = classifier_free_guidance(self._predict_noise, context, empty, guidance_scale)
        return SAMPLERS[sampler](eps_model, x_T, self.schedule, steps=steps, generator=generators, **options)

    def txt2img(self, prompt: str | list[str], progress: bool = False, **options) -> "Drawing":
        """Draw pictures.

        Args:
            prompt: what to draw; or several. The empty prompt draws whatever comes.
            steps: calls of the UNet, between 1 and 1000.
            guidance_scale: 1 draws by the prompt as it is, larger exaggerates what the prompt changes.
            sampler: "ddpm", "ddim", "plms", "dpmpp_2m", "euler", "euler_ancestral" or "heun" (two calls a step).
            seed: picture k is drawn from seed + k.
            num_images: pictures for each prompt.
            height, width: pixels; as it was trained where they are left out. Must be divisible by what autoencoder and
                UNet halve together (64 in Stable Diffusion v1).
            progress: show a progress bar.
            options: handed to the sampler: `eta`, `spacing`, …

        Returns:
            A `Drawing`: `.images`, and the `.trajectory` that led to them.
        """
        steps = self.sample(prompt, **options)
        if progress:
            from tqdm import tqdm

            steps = tqdm(steps, total=options.get("steps", 50), desc="drawing")
        return Drawing(Trajectory(list(steps), self.decode_first_stage))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape [c h w] of the latent of a picture of that size.

        Raises:
            ValueError: the networks can't make that size.
        """
        height, width = height or self.config.image_size, width or self.config.image_size
        f = self.config.first_stage.downsampling
        multiple = f * self.config.unet.downsampling
        if height < 1 or width < 1 or height % multiple or width % multiple:
            raise ValueError(
                f"height and width must be positive multiples of {multiple} for this model, not {height}x{width}"
            )
        return self.config.first_stage.embed_dim, height // f, width // f

    def _predict_noise(self, x: Tensor, t: Tensor, context: Tensor) -> Tensor:
        """ε, whichever of ε, v and x_0 the UNet predicts: the samplers ask for the noise."""
        prediction = self.apply_model(x, t, context)
        if self.config.parameterization == "v":
            return self.schedule.predict_noise_from_v(x, t, prediction)
        if self.config.parameterization == "x0":
            return self.schedule.predict_noise_from_start(x, t, prediction)
        return prediction


@dataclass(frozen=True)
class Trajectory:
    """All steps of a drawing; decoded to pictures when asked."""

    steps: list[Step]
    decode: Callable[[Tensor], Tensor]  # latents → pictures in [-1, 1]

    def __len__(self) -> int:
        return len(self.steps)

    def __getitem__(self, i: int) -> Step:
        return self.steps[i]

    def x0_images(self) -> list[list[Image.Image]]:
        """For each step, the pictures that the model has in mind: x_0 as it is predicted there, decoded."""
        return [to_pil(self.decode(step.x0)) for step in self.steps]

    def x_t_images(self) -> list[list[Image.Image]]:
        """For each step, the noisy latents that went in, decoded as if they were clean."""
        return [to_pil(self.decode(step.x_t)) for step in self.steps]

    def save(self, path: str | Path, frame_ms: int = 80, scale: int = 4) -> None:
        """A film of the predictions of x_0, as .webp or .gif; it rests on the last."""
        frames = [sheet(images, scale=scale) for images in self.x0_images()]
        durations = [frame_ms] * (len(frames) - 1) + [20 * frame_ms]
        options = {"lossless": True} if Path(path).suffix == ".webp" else {}
        frames[0].save(path, save_all=True, append_images=frames[1:], duration=durations, loop=0, **options)


@dataclass(frozen=True)
class Drawing:
    """What `txt2img` returns."""

    trajectory: Trajectory

    @cached_property
    def pictures(self) -> Float[Tensor, "b 3 H W"]:
        """The pictures as a tensor, in about [-1, 1]."""
        return self.trajectory.decode(self.trajectory[-1].x)

    @cached_property
    def images(self) -> list[Image.Image]:
        """The pictures as PIL images."""
        return to_pil(self.pictures)
