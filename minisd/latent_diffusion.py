"""LatentDiffusion: the three networks as one.

    training   picture ─ encode_first_stage ─► z ─ q_sample(t, noise) ─► z_t ┐
               caption ─ get_learned_conditioning ─► context ────────────────┴ apply_model ─► eps ─► p_losses
    drawing    prompt ─ get_learned_conditioning ─► context ─► sample: x_T … x_0 ─ decode_first_stage ─► picture
    img2img    picture ─ encode_first_stage ─► z ─ q_sample ─► z_t, and from there as in drawing
    inpaint    the same, but for what a mask keeps

Names and methods are those of CompVis `ldm/models/diffusion/ddpm.py: LatentDiffusion`. Rombach et al. 2022
(arXiv:2112.10752).
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from .clip import CLIPTextConfig, CLIPTextModel, FrozenCLIPEmbedder, Tokenizer
from .drawing import Drawing, Picture, Trajectory, read_mask, read_picture
from .loss import LOSSES
from .noising import NoiseSchedule
from .sampling import SAMPLERS, Step, classifier_free_guidance, make_timesteps, randn, remaining_timesteps
from .unet import UNetConfig, UNetModel
from .vae import AutoencoderConfig, AutoencoderKL, DiagonalGaussianDistribution, IdentityConfig, IdentityFirstStage
from .vq import VQConfig, VQModelInterface


@dataclass(frozen=True)
class ClassConfig:
    """What a `ClassEmbedder` is. The defaults are those of CompVis's ImageNet model."""

    n_classes: int = 1001  # the last one stands for "no class": guidance needs it, no picture has it
    embed_dim: int = 512  # width of the context


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """What a whole model is. The defaults are Stable Diffusion v1."""

    unet: UNetConfig = field(default_factory=UNetConfig)
    first_stage: AutoencoderConfig | VQConfig | IdentityConfig = field(default_factory=AutoencoderConfig)
    cond_stage: CLIPTextConfig | ClassConfig | None = field(default_factory=CLIPTextConfig)  # prompts, classes, or none
    image_size: int = 512  # pixels along each side, as it was trained
    scale_factor: float = 0.18215  # latents times this have variance 1; measured on the training pictures
    beta_schedule: str = "scaled_linear"  # how β grows: the name of a constructor of NoiseSchedule
    linear_start: float = 0.00085  # β of the first timestep; √β grows linearly …
    linear_end: float = 0.012  # … to that of the last ("cosine" reads neither)
    timesteps: int = 1000
    parameterization: str = "eps"  # what the UNet predicts: "eps" (SD v1), "v" or "x0"

    @property
    def concat_channels(self) -> int:
        """Channels that the UNet takes in beside the noisy latent: 5 in Stable Diffusion v1 for inpainting, else 0."""
        return self.unet.in_channels - self.first_stage.embed_dim

    def schedule(self) -> NoiseSchedule:
        """The noise schedule that these fields describe."""
        if self.beta_schedule == "cosine":
            return NoiseSchedule.cosine(self.timesteps)
        if self.beta_schedule not in ("scaled_linear", "linear"):
            raise ValueError(f'beta_schedule must be "scaled_linear", "linear" or "cosine", not "{self.beta_schedule}"')
        return getattr(NoiseSchedule, self.beta_schedule)(self.linear_start, self.linear_end, self.timesteps)


# What reads the captions of emoji, at whichever size they are drawn.
EMOJI_TEXT = CLIPTextConfig(vocab_size=3072, max_length=24, width=192, layers=3, heads=3, projection_dim=192)
# What the models that ship are made of, and Stable Diffusion v1.
PRESETS = {
    # 32x32 pictures of coloured shapes: for notebooks, tests, the first lesson
    "tiny": LatentDiffusionConfig(
        unet=UNetConfig(
            model_channels=64,  # with 32, GroupNorm has one channel in each group, and takes the time out again
            num_res_blocks=0,  # a ResBlock, a transformer and a ResBlock in the middle, and one ResBlock on the way up
            channel_mult=(1,),
            attention_resolutions=(),
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
        cond_stage=EMOJI_TEXT,
        image_size=32,
        scale_factor=1.0,
    ),
    # the same pictures at 64x64, for a GPU: latents of 16x16, and a wider autoencoder for their detail
    "emoji-64": LatentDiffusionConfig(
        unet=UNetConfig(
            model_channels=64,
            num_res_blocks=1,
            channel_mult=(1, 2, 2),
            attention_resolutions=(2, 4),
            num_heads=None,
            num_head_channels=64,
            context_dim=192,
        ),
        first_stage=AutoencoderConfig(ch=64, ch_mult=(1, 1, 2), num_res_blocks=1),
        cond_stage=EMOJI_TEXT,
        image_size=64,
        scale_factor=1.0,
    ),
    "sd-v1": LatentDiffusionConfig(),
    # the same with five channels more to look at: the mask, and what is left of the picture
    "sd-v1-inpainting": LatentDiffusionConfig(unet=UNetConfig(in_channels=9)),
}


class DiffusionWrapper(nn.Module):
    """Holds the UNet under the name that the checkpoint gives it, `model.diffusion_model`, and hands the conditions on.

    There are two ways in. `c_crossattn` [b n d] is a sequence that every pixel may look at: words, a class. `c_concat`
    [b c h w] is a map that lies on the noisy latent, pixel by pixel, as further channels: a mask, a sketch. Both
    together are CompVis's "hybrid", neither is an unconditional model. CompVis `ddpm.py: DiffusionWrapper`.
    """

    def __init__(self, diffusion_model: nn.Module):
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(
        self,
        x: Float[Tensor, "b c h w"],
        t: Int[Tensor, "b"],
        c_crossattn: Float[Tensor, "b n d"] | None = None,
        c_concat: Float[Tensor, "b c2 h w"] | None = None,
    ) -> Float[Tensor, "b c3 h w"]:
        if c_concat is not None:
            x = torch.cat([x, c_concat], dim=1)  # the noise first
        return self.diffusion_model(x, t, c_crossattn)


class ClassEmbedder(nn.Module):
    """Classes → context [b 1 d]: a table, a learned vector for each. CompVis `encoders/modules.py: ClassEmbedder`."""

    def __init__(self, config: ClassConfig = ClassConfig()):
        super().__init__()
        self.config = config
        self.embedding = nn.Embedding(config.n_classes, config.embed_dim)

    @property
    def unconditional(self) -> int:
        """The class that stands for none."""
        return self.config.n_classes - 1

    @torch.no_grad()
    def encode(self, classes: Sequence) -> Float[Tensor, "b 1 d"]:
        """Look the classes up.

        Raises:
            ValueError: a class that is no number from 0 to n_classes - 1.
        """
        wrong = [c for c in classes if isinstance(c, str) or not 0 <= int(c) < self.config.n_classes]
        if wrong:
            raise ValueError(f"this model draws classes, numbers from 0 to {self.unconditional}, and not {wrong[0]!r}")
        ids = torch.tensor([int(c) for c in classes], device=self.embedding.weight.device)
        return self.embedding(ids)[:, None]


FIRST_STAGES = {AutoencoderConfig: AutoencoderKL, VQConfig: VQModelInterface, IdentityConfig: IdentityFirstStage}
# What a model may be asked to draw: a prompt or a class, or several. None: whatever comes.
Prompt = str | int | None | Sequence[str | int | None]
# One conditioning, or both under their names in CompVis: {"c_crossattn": …, "c_concat": …}.
Cond = Tensor | Mapping[str, Tensor | Sequence[Tensor] | None] | None


class LatentDiffusion(nn.Module):
    """A diffusion model in the latent space of an autoencoder, told what to draw by a text encoder.

    Its `state_dict()` has the names of `sd-v1-4.ckpt`. The autoencoder and the text encoder are frozen: each is trained
    before, on its own. CompVis `ddpm.py: LatentDiffusion`.
    """

    def __init__(self, config: LatentDiffusionConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        self.model = DiffusionWrapper(UNetModel(config.unet))
        first_stage = FIRST_STAGES[type(config.first_stage)]
        self.first_stage_model = first_stage(config.first_stage).eval().requires_grad_(False)
        self.cond_stage_model = None
        if isinstance(config.cond_stage, CLIPTextConfig):
            if tokenizer is None:
                raise ValueError("a model that reads prompts needs a tokenizer: for SD v1, BPETokenizer.clip()")
            self.cond_stage_model = FrozenCLIPEmbedder(
                CLIPTextModel(config.cond_stage), tokenizer, config.cond_stage.max_length
            )
        elif config.cond_stage is not None:
            self.cond_stage_model = ClassEmbedder(config.cond_stage).eval().requires_grad_(False)
        with torch.device("cpu"):  # numbers and no weights: they are there even where networks are built without memory
            self.schedule = config.schedule()
        self.scale_factor = config.scale_factor

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.empty(0)).device

    @property
    def dtype(self) -> torch.dtype:
        """What the networks compute in. The latents between them, and what the samplers do, stay in float32."""
        return next(self.parameters(), torch.empty(0)).dtype

    # --- the stages, under their names in CompVis ------------------------------------------------------------------

    def get_learned_conditioning(self, c: Sequence[str | int]) -> Float[Tensor, "b n d"]:
        """Prompts (or classes, for a model of those) → context, one row of hidden states for each."""
        return self.cond_stage_model.encode(c)

    @torch.no_grad()
    def encode_first_stage(self, x: Float[Tensor, "b c H W"]) -> DiagonalGaussianDistribution | Tensor:
        """Pictures in [-1, 1] → their latents, not scaled yet: a distribution, or (VQ, none) a tensor [b d h w]."""
        return self.first_stage_model.encode(x.to(self.dtype))

    def get_first_stage_encoding(
        self, encoder_posterior: DiagonalGaussianDistribution | Tensor, generator: torch.Generator | None = None
    ) -> Float[Tensor, "b d h w"]:
        """z = scale_factor · sample: latents of about unit variance, which is what diffusion works on."""
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample(generator)
        return self.scale_factor * encoder_posterior.float()

    @torch.no_grad()
    def decode_first_stage(self, z: Float[Tensor, "b d h w"]) -> Float[Tensor, "b c H W"]:
        """Scaled latents → pictures in about [-1, 1]."""
        return self.first_stage_model.decode((z / self.scale_factor).to(self.dtype)).float()

    def apply_model(
        self, x_noisy: Float[Tensor, "b d h w"], t: Int[Tensor, "b"], cond: Cond = None
    ) -> Float[Tensor, "b d h w"]:
        """What the UNet says about noisy latents: the noise in them (or v, or x_0, if it was trained so).

        cond: a context [b n d]; or, as in CompVis, {"c_crossattn": context, "c_concat": map [b c h w]}, each a tensor
        or a list of tensors. Computed in the model's dtype, returned in that of x_noisy.
        """
        if not isinstance(cond, Mapping):
            cond = {"c_crossattn": cond}
        context, concat = _joined(cond.get("c_crossattn")), _joined(cond.get("c_concat"))
        given = 0 if concat is None else concat.shape[1]
        if given != self.config.concat_channels:
            raise ValueError(
                f"this model takes {self.config.concat_channels} channels beside the noisy latent, and {given} were "
                "given: c_concat of apply_model and sample"
            )
        inputs = (x if x is None else x.to(self.dtype) for x in (context, concat))
        return self.model(x_noisy.to(self.dtype), t, *inputs).to(x_noisy.dtype)

    def q_sample(
        self, x_start: Float[Tensor, "b d h w"], t: Int[Tensor, "b"], noise: Float[Tensor, "b d h w"] | None = None
    ) -> Float[Tensor, "b d h w"]:
        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε."""
        return self.schedule.q_sample(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def p_losses(
        self,
        x_start: Float[Tensor, "b d h w"],
        cond: Cond,
        t: Int[Tensor, "b"],
        noise: Float[Tensor, "b d h w"] | None = None,
    ) -> Float[Tensor, ""]:
        """The training loss at the times t."""
        return LOSSES[self.config.parameterization](self.apply_model, self.schedule, x_start, cond, t, noise)

    # --- drawing ---------------------------------------------------------------------------------------------------

    def sample(
        self,
        prompt: Prompt,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str = "ddim",
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: Prompt = None,
        c_concat: Float[Tensor, "#b c h w"] | None = None,
        start_code: Float[Tensor, "#b d h w"] | None = None,
        generator: list[torch.Generator] | None = None,
        **options,
    ) -> Iterator[Step]:
        """The steps from noise to latent, one at a time: what `txt2img` runs through. Arguments as there.

        generator: one for each picture, in place of those of the seed.
        """
        draw, prompts = _sampler(sampler), _prompts(prompt, num_images)
        generators = _generators(seed, len(prompts)) if generator is None else generator
        if start_code is None:
            start_code = randn((len(prompts), *self.latent_shape(height, width)), generators)
        x_T = _repeated(start_code, len(prompts), "start codes").to(self.device)
        eps_model = self._guided(prompts, negative_prompt, guidance_scale, c_concat)
        return draw(eps_model, x_T, self.schedule, steps, generator=generators, **options)

    def txt2img(self, prompt: Prompt, progress: bool = False, **options) -> Drawing:
        """Draw pictures.

        Args:
            prompt: what to draw; or several. The empty prompt draws whatever comes. (A class or several, for a model of
                classes; None for a model that is told nothing.)
            steps: calls of the UNet, between 1 and 1000.
            guidance_scale: 1 draws by the prompt as it is, larger exaggerates what the prompt changes.
            sampler: "ddpm", "ddim", "plms", "dpmpp_2m", "euler", "euler_ancestral" or "heun" (two calls a step).
            seed: picture k is drawn from seed + k.
            num_images: pictures for each prompt.
            height, width: pixels; as it was trained where they are left out. Must be divisible by what the autoencoder
                halves (8 in Stable Diffusion v1).
            negative_prompt: what not to draw: it takes the place of the empty prompt in guidance. One for all, or one
                for each prompt.
            c_concat: further channels of the UNet, for a model that has them, on the latent's grid.
            start_code: x_T itself, in place of the seed's; standard normal.
            progress: show a progress bar.
            options: handed to the sampler: `eta`, `spacing`, …

        Returns:
            A `Drawing`: `.images`, and the `.trajectory` that led to them.
        """
        return self._drawing(self.sample(prompt, **options), options.get("steps", 50), progress)

    def img2img(
        self,
        prompt: Prompt,
        image: Picture,
        strength: float = 0.75,
        noise_ahead: bool = False,
        steps: int = 50,
        sampler: str = "ddim",
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        progress: bool = False,
        **options,
    ) -> Drawing:
        """Draw over a picture: noise its latent part of the way, and denoise it under a prompt.

        Args:
            image: a PIL image or the path of one, or pictures [c H W] or [b c H W] in [-1, 1]. An image is resized to
                `height` and `width` where they are given.
            strength: how far back it goes, from just above 0 (nothing changes) to 1 (nothing remains): of `steps`
                steps, the last int(strength · steps) are made.
            noise_ahead: the picture is noised to the timestep where the steps begin (diffusers), or, if set, to the one
                ahead of it, as CompVis's img2img.py does: 741, where the first of 37 steps of 50 takes 721 for granted.
                A little of the noise is then left in the result.
            The others are as in `txt2img`.

        (SDEdit, Meng et al. 2022; CompVis `scripts/img2img.py`, `ddim.py: DDIMSampler.stochastic_encode, decode`.)
        """
        count = len(_prompts(prompt, num_images))
        generators = _generators(seed, count)
        z = self._encode(self._pictures(image, count, height, width), generators)
        timesteps, start = self._remaining(sampler, steps, strength, options.pop("spacing", None), noise_ahead)
        noise = randn(z.shape, generators).to(z)
        x = self.q_sample(z, torch.full((count,), start, device=z.device), noise)
        options |= {"sampler": sampler, "num_images": num_images, "start_code": x, "timesteps": timesteps}
        return self._drawing(self.sample(prompt, generator=generators, **options), len(timesteps), progress)

    def inpaint(
        self,
        prompt: Prompt,
        image: Picture,
        mask: Picture,
        strength: float = 1.0,
        blend: str = "after",
        steps: int = 50,
        sampler: str = "ddim",
        seed: int = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        progress: bool = False,
        **options,
    ) -> Drawing:
        """Draw a part of a picture anew.

        A model with 9 channels was trained for it: it is shown the mask and the rest of the picture at each step. Any
        other model draws the whole picture, and at each step all but the masked part is put back, as noisy as it has
        to be then (RePaint, Lugmayr et al. 2022, without its resampling).

        Args:
            image: as in `img2img`.
            mask: white (1) where it is to be drawn anew, black (0) where it is to be kept: a PIL image or the path of
                one, or [H W] in [0, 1]. So do diffusers and CompVis's scripts have it; its samplers, the opposite.
            strength: as in `img2img`; at 1, the part starts from noise alone.
            blend: when what is kept is put back, in a model of four channels. "after" each step, always with the noise
                of x_T, and clean after the last (diffusers); or "before" each step, with fresh noise, and not after the
                last (CompVis's DDIMSampler): then seams are softer, and what was to be kept has changed a little.
            The others are as in `txt2img`.
        """
        if blend not in ("after", "before"):
            raise ValueError(f'blend must be "after" or "before" each step, but it is {blend!r}')
        count = len(_prompts(prompt, num_images))
        generators = _generators(seed, count)
        pictures = self._pictures(image, count, height, width)
        mask = _repeated(read_mask(mask, *pictures.shape[-2:]).to(pictures), count, "masks")
        latent_mask = F.interpolate(mask, self.latent_shape(*pictures.shape[-2:])[1:])  # by the nearest pixel
        timesteps, start = self._remaining(sampler, steps, strength, options.pop("spacing", None))
        nine = self.config.concat_channels > 0

        # What is needed is drawn in the order of diffusers: latent, noise, latent of what is kept.
        z = None if nine and strength == 1 else self._encode(pictures, generators)
        noise = randn((count, *self.latent_shape(*pictures.shape[-2:])), generators).to(pictures)
        at = functools.partial(torch.full, (count,), device=noise.device)
        x = noise if strength == 1 else self.q_sample(z, at(start), noise)
        if nine:
            # What the UNet is shown beside x: where to draw, and the picture with a hole there (grey, which is 0).
            hole = self._encode(pictures * (1 - mask), generators)
            options["c_concat"] = torch.cat([latent_mask, hole], dim=1)

        def put_back(x: Tensor, t: int) -> Tensor:
            if blend == "after" and t == start:  # no step has been made yet
                return x
            fresh = noise if blend == "after" else randn(z.shape, generators).to(z)
            return self._put_back(x, z, fresh, latent_mask, at(t))

        options |= {"sampler": sampler, "num_images": num_images, "start_code": x, "timesteps": timesteps}
        run = self.sample(prompt, generator=generators, before_step=None if nine else put_back, **options)
        drawing = self._drawing(run, len(timesteps), progress)
        if not nine and blend == "after":
            last = drawing.trajectory[-1]
            drawing.trajectory.steps[-1] = replace(last, x=latent_mask * last.x + (1 - latent_mask) * z)
        return drawing

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape [d h w] of the latent of a picture of that size.

        Raises:
            ValueError: the autoencoder can't make that size.
        """
        height, width = height or self.config.image_size, width or self.config.image_size
        f = self.config.first_stage.downsampling
        if height < 1 or width < 1 or height % f or width % f:
            raise ValueError(
                f"height and width must be positive multiples of {f} for this model, not {height}x{width}: try "
                f"{max(f, round(height / f) * f)}x{max(f, round(width / f) * f)}"
            )
        return self.config.first_stage.embed_dim, height // f, width // f

    # --- how it is done --------------------------------------------------------------------------------------------

    def _remaining(
        self, sampler: str, steps: int, strength: float, spacing: str | None, noise_ahead: bool = False
    ) -> tuple[list[int], int]:
        """The timesteps that are left at that strength, and the one to noise a picture to."""
        spacing = spacing or inspect.signature(_sampler(sampler)).parameters["spacing"].default
        timesteps = make_timesteps(steps, self.schedule.timesteps, spacing)
        left = remaining_timesteps(timesteps, strength)
        ahead = timesteps[: -len(left)]
        return left, ahead[-1] if noise_ahead and ahead else left[0]

    def _put_back(self, x_t: Tensor, z: Tensor, noise: Tensor, mask: Tensor, t: Tensor) -> Float[Tensor, "b d h w"]:
        """x_t where the mask is 1, and elsewhere what is known of the picture, z, as noisy as x_t is."""
        return mask * x_t + (1 - mask) * self.q_sample(z, t, noise)

    def _guided(self, prompts: list, negative: Prompt, scale: float, c_concat: Tensor | None):
        """An eps_model for the samplers: ε of the prompts, exaggerated away from that of the negative ones."""

        def model(x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
            concat = c_concat
            if c_concat is not None:  # under guidance, each picture is asked about twice: all, then all again
                concat = _repeated(c_concat, len(prompts), "maps").to(x).repeat(len(x) // len(prompts), 1, 1, 1)
            return self._predict_noise(x, t, {"c_crossattn": context, "c_concat": concat})

        if self.cond_stage_model is None:
            if any(prompt is not None for prompt in prompts):
                raise ValueError(f"this model is told nothing: its prompt must be None, not {prompts[0]!r}")
            return lambda x, t: model(x, t, None)
        context = self.get_learned_conditioning(prompts)
        if negative is None:
            negative = self.cond_stage_model.unconditional
        if isinstance(negative, str | int):
            negatives = [negative]
        elif len(prompts) % len(negative):
            raise ValueError(f"{len(negative)} negative prompts do not fit {len(prompts)} pictures")
        else:  # one for each prompt, so for each of its pictures
            negatives = [n for n in negative for _ in range(len(prompts) // len(negative))]
        return classifier_free_guidance(model, context, self.get_learned_conditioning(negatives), scale)

    def _predict_noise(self, x: Tensor, t: Tensor, cond: Cond) -> Tensor:
        """ε, whichever of ε, v and x_0 the UNet predicts: the samplers ask for the noise."""
        prediction = self.apply_model(x, t, cond)
        if self.config.parameterization == "v":
            return self.schedule.predict_noise_from_v(x, t, prediction)
        if self.config.parameterization == "x0":
            return self.schedule.predict_noise_from_start(x, t, prediction)
        return prediction

    def _pictures(self, image, count: int, height: int | None, width: int | None) -> Float[Tensor, "b c H W"]:
        """`count` pictures in [-1, 1] on the model's device, of a size that can be encoded."""
        pictures = read_picture(image, height, width)
        self.latent_shape(*pictures.shape[-2:])
        channels = self.config.first_stage.in_channels
        if pictures.shape[1] != channels:
            raise ValueError(f"this model's pictures have {channels} channels, not {pictures.shape[1]}")
        return _repeated(pictures, count, "pictures").to(self.device)

    def _encode(self, pixels: Tensor, generators: list[torch.Generator]) -> Float[Tensor, "b d h w"]:
        """Pictures → scaled latents, each drawn with the generator of its picture."""
        posterior = self.encode_first_stage(pixels)
        if isinstance(posterior, DiagonalGaussianDistribution):
            noise = randn(posterior.mean.shape, generators).to(posterior.mean)
            posterior = posterior.mean + posterior.std * noise
        return self.get_first_stage_encoding(posterior)

    def _drawing(self, run: Iterator[Step], total: int, progress: bool) -> Drawing:
        if progress:
            from tqdm import tqdm

            run = tqdm(run, total=total, desc="drawing")
        return Drawing(Trajectory(list(run), self.decode_first_stage))


def _prompts(prompt: Prompt, num_images: int) -> list:
    """One for each picture: num_images of each prompt."""
    if num_images < 1 or (isinstance(prompt, Sequence) and not isinstance(prompt, str) and not len(prompt)):
        raise ValueError(f"there is nothing to draw: num_images is {num_images}, the prompt {prompt!r}")
    prompts = [prompt] if prompt is None or isinstance(prompt, str | int) else prompt
    return [p for p in prompts for _ in range(num_images)]


def _generators(seed: int, count: int) -> list[torch.Generator]:
    """One a picture: picture k is drawn from seed + k, however many are drawn beside it."""
    return [torch.Generator().manual_seed(seed + k) for k in range(count)]


def _repeated(x: Float[Tensor, "n ..."], count: int, what: str) -> Float[Tensor, "count ..."]:
    """As many as there are drawings: one for all, or each for as many."""
    if count % len(x):
        raise ValueError(f"{len(x)} {what} do not fit {count} drawings")
    return x.repeat_interleave(count // len(x), dim=0)


def _joined(cond: Tensor | Sequence[Tensor] | None) -> Tensor | None:
    """CompVis hands conditionings on as lists of tensors, to be joined."""
    return cond if cond is None or isinstance(cond, Tensor) else torch.cat(list(cond), dim=1)


def _sampler(name: str) -> Callable[..., Iterator[Step]]:
    if name not in SAMPLERS:
        raise ValueError(f"there is no sampler {name!r}: choose one of {', '.join(SAMPLERS)}")
    return SAMPLERS[name]
