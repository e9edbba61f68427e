"""Stage 7: the three networks as one model.

    training   picture ─ encode_first_stage ─► z ─ q_sample(t, noise) ─► z_t ┐
               caption ─ get_learned_conditioning ─► context ────────────────┴ apply_model ─► eps ─► p_losses
    drawing    prompt ─ get_learned_conditioning ─► context ─► sample: x_T … x_0 ─ decode_first_stage ─► picture
    img2img    picture ─ encode_first_stage ─► z ─ q_sample ─► z_t, and from there as in drawing
    inpaint    the same, and at every step the unmasked part of the picture is put back

Training and drawing use the same methods. Their names are those of CompVis `ldm/models/diffusion/ddpm.py:
LatentDiffusion`. Rombach et al. 2022 (arXiv:2112.10752).
"""

import contextlib
import difflib
import functools
import inspect
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from . import sampling
from .clip import CLIPTextConfig, Tokenizer
from .conditions import condition_of
from .loss import loss_target, squared_error
from .noising import Generators, NoiseSchedule, Seed, Times, randn, seeded
from .pictures import Drawing, Picture, Trajectory, read_mask, read_picture
from .unet import UNetConfig, UNetModel
from .vae import AutoencoderConfig, AutoencoderKL, DiagonalGaussianDistribution, IdentityConfig, IdentityFirstStage
from .vq import VQConfig, VQModelInterface


@dataclass(frozen=True)
class LatentDiffusionConfig:
    """The configuration of a whole model. The defaults are those of Stable Diffusion v1.

    Raises:
        ValueError: an unknown word, or a number that no model can have.
    """

    unet: UNetConfig = field(default_factory=UNetConfig)
    first_stage: AutoencoderConfig | VQConfig | IdentityConfig = field(default_factory=AutoencoderConfig)
    cond_stage: Any = field(default_factory=CLIPTextConfig)  # the Config of a condition: prompts, classes …; None: none
    image_size: int = 512  # width and height of the training pictures, in pixels
    scale_factor: float = 0.18215  # scales the latents to variance 1; measured on the training pictures
    beta_schedule: str = "scaled_linear"  # how β grows: the name of a constructor of NoiseSchedule
    linear_start: float = 0.00085  # β of the first timestep; √β grows linearly …
    linear_end: float = 0.012  # … to that of the last ("cosine" reads neither)
    timesteps: int = 1000
    parameterization: str = "eps"  # what the UNet predicts: "eps" (SD v1), "v" or "x0"

    def __post_init__(self):
        words = {"beta_schedule": ("scaled_linear", "linear", "cosine"), "parameterization": ("eps", "v", "x0")}
        for name, known in words.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name} must be one of {', '.join(known)}, not {getattr(self, name)!r}")
        for name, most in {"image_size": 100_000, "timesteps": 100_000, "scale_factor": 1e6}.items():
            if not 0 < getattr(self, name) <= most:  # NaN is not, either
                raise ValueError(f"{name} must be a number above 0 and at most {most:,.0f}, not {getattr(self, name)}")

    @property
    def concat_channels(self) -> int:
        """Input channels of the UNet beside the noisy latent: 5 in Stable Diffusion v1 for inpainting, otherwise 0."""
        return self.unet.in_channels - self.first_stage.embed_dim

    def schedule(self) -> NoiseSchedule:
        """The noise schedule that these fields describe."""
        if self.beta_schedule == "cosine":
            return NoiseSchedule.cosine(self.timesteps)
        return getattr(NoiseSchedule, self.beta_schedule)(self.linear_start, self.linear_end, self.timesteps)


Latents = Float[Tensor, "b d h w"]  # scaled, and noisy in between
Context = Float[Tensor, "b n e"]  # a sequence of n vectors for each picture, which cross-attention reads
Posterior = DiagonalGaussianDistribution | Tensor  # what an encoder returns: a Gaussian over latents, or one latent
Reduction = Literal["mean", "none"]  # of the losses of a batch: to their mean, or none, which leaves one for each


class DiffusionWrapper(nn.Module):
    """Holds the UNet under its name in the checkpoint, `model.diffusion_model`, and passes the conditions to it.

    There are two kinds of conditions. `c_crossattn` [b n d] is a sequence that every pixel can attend to, such as words
    or a class. `c_concat` [b c h w] is a map of the same size as the noisy latent, such as a mask or a sketch, which
    becomes further input channels. CompVis calls both together "hybrid". With neither, the model is unconditional.
    CompVis `ddpm.py: DiffusionWrapper`.
    """

    def __init__(self, diffusion_model: nn.Module):
        super().__init__()
        self.diffusion_model = diffusion_model

    def forward(
        self, x: Latents, t: Times, c_crossattn: Context | None = None, c_concat: Float[Tensor, "b c h w"] | None = None
    ) -> Float[Tensor, "b d2 h w"]:
        # A map has a value for every pixel. It becomes further input channels of the UNet's first convolution, after
        # those of the noisy latent. [b d h w] and [b c h w] -> [b d+c h w]
        if c_concat is not None:
            x = torch.cat([x, c_concat], dim=1)
        # A sequence has no position in the picture. Cross-attention lets each pixel choose which words to attend to.
        return self.diffusion_model(x, t, c_crossattn)


# What a model is asked to draw: a prompt or a class, or several of them. None for an unconditional model.
Prompt = str | int | None | Sequence[str | int | None]
# The context alone, or both kinds of conditions under their names in CompVis: {"c_crossattn": …, "c_concat": …}.
Cond = Tensor | Mapping[str, Tensor | Sequence[Tensor] | None] | None
FIRST_STAGES = {AutoencoderConfig: AutoencoderKL, VQConfig: VQModelInterface, IdentityConfig: IdentityFirstStage}


NO_MEMORY = "out of memory|n.t allocate|not enough memory|MemoryError"  # what errors about memory say


@contextlib.contextmanager
def enough_memory(advice: str) -> Iterator[None]:
    """Inside the `with`, or in a function that has this as a decorator, an error about memory says what to lower."""
    try:
        yield
    except (RuntimeError, MemoryError, OverflowError) as error:
        # On a GPU, PyTorch raises OutOfMemoryError. On a CPU it is a RuntimeError, as for many other reasons.
        said = " ".join(f"{type(error).__name__}: {error}".split())
        too_little = re.search(f"{NO_MEMORY}|calculation overflow|OverflowError", said)
        if not too_little or "there is not enough memory" in said:  # an inner one has given its advice
            raise
        raise torch.OutOfMemoryError(f"there is not enough memory: {advice} ({said[:120]})") from error


MOST = 100_000  # pictures at a time, and pixels along a side: there is no memory for more
DRAW_LESS = enough_memory("draw fewer pictures at a time (num_images), or smaller ones (height, width)")


def _draws(method: Callable) -> Callable:
    """A method whose errors say which argument was probably meant, or what to lower if there is too little memory."""
    names = [name for name in inspect.signature(method).parameters if name != "self"]

    @functools.wraps(method)
    @DRAW_LESS
    def checked(self, *args, **options):
        for name in options:
            if name not in names:
                meant = ELSEWHERE.get(name) or next(iter(difflib.get_close_matches(name, names, 1)), None)
                hint = f"did you mean {meant}?" if meant in names else f"it takes {', '.join(names)}"
                raise TypeError(f"{method.__name__} has no argument {name!r}: {hint}")
        return method(self, *args, **options)

    return checked


# Names of arguments in diffusers and CompVis's scripts that are too different from ours to be found by similarity.
ELSEWHERE = {
    "num_inference_steps": "steps", "ddim_steps": "steps", "cfg": "guidance_scale", "cfg_scale": "guidance_scale",
    "scale": "guidance_scale", "num_images_per_prompt": "num_images", "n_samples": "num_images",
    "latents": "start_code", "x_T": "start_code", "ddim_eta": "eta", "scheduler": "sampler", "init_img": "image",
    "mask_image": "mask",
}  # fmt: skip


class LatentDiffusion(nn.Module):
    """A diffusion model in the latent space of an autoencoder, conditioned on the output of a text encoder.

    Its `state_dict()` has the names of `sd-v1-4.ckpt`. The autoencoder and the text encoder are each trained before the
    UNet, and are frozen while it is trained. CompVis `ddpm.py: LatentDiffusion`.
    """

    def __init__(self, config: LatentDiffusionConfig, tokenizer: Tokenizer | None = None):
        super().__init__()
        self.config = config
        # The three networks, under their names in the checkpoint. Only the UNet gets gradients, unless training
        # unfreezes the condition (a table of class embeddings).
        self.model = DiffusionWrapper(UNetModel(config.unet))
        first_stage = FIRST_STAGES[type(config.first_stage)]
        self.first_stage_model = first_stage(config.first_stage).eval().requires_grad_(False)
        # The condition encodes a prompt or a class as the context for cross-attention. In SD v1 it is CLIP's text
        # encoder.
        condition = condition_of(config).build(config.cond_stage, tokenizer)
        self.cond_stage_model = condition.eval().requires_grad_(False)
        # The schedule has numbers but no weights. It is on the CPU even inside `torch.device("meta")`, which is used to
        # build the networks without allocating memory.
        with torch.device("cpu"):
            self.schedule = config.schedule()
        # 1 / std of the autoencoder's latents. It is measured once and saved with the model.
        self.scale_factor = config.scale_factor

    @property
    def device(self) -> torch.device:
        return next(self.parameters(), torch.empty(0)).device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the networks. The latents and all computations of the samplers are in float32."""
        return next(self.parameters(), torch.empty(0)).dtype

    # --- the stages, under their names in CompVis ------------------------------------------------------------------

    def get_learned_conditioning(self, c: Sequence[str | int | None]) -> Context | None:
        """Prompts (or classes) → context, a sequence of n vectors for each; None for an unconditional model."""
        return self.cond_stage_model.encode(c)

    @torch.no_grad()
    def encode_first_stage(self, x: Float[Tensor, "b c H W"]) -> Posterior:
        """Pictures in [-1, 1] → unscaled latents: a distribution, or a tensor [b d h w] (VQ, or no autoencoder)."""
        # The autoencoder may have another dtype than the UNet: in float16, that of SD v1 overflows for some pictures.
        return self.first_stage_model.encode(x.to(next(self.first_stage_model.parameters(), x)))

    def get_first_stage_encoding(self, encoder_posterior: Posterior, generator: Generators | None = None) -> Latents:
        """z = scale_factor · sample: a latent, scaled for the UNet.

        The encoder's latents have a standard deviation of about 5.5 in SD v1. Noise of standard deviation 1 would
        hardly change them, so they are divided by it: scale_factor = 1/5.49 = 0.18215 (Rombach et al., appendix G).
        """
        # AutoencoderKL returns a Gaussian over latents, from which one sample is drawn. VQModel returns one latent.
        if isinstance(encoder_posterior, DiagonalGaussianDistribution):
            encoder_posterior = encoder_posterior.sample(generator)
        return self.scale_factor * encoder_posterior.float()

    @DRAW_LESS
    @torch.no_grad()
    def decode_first_stage(self, z: Latents) -> Float[Tensor, "b c H W"]:
        """Scaled latents → pictures in about [-1, 1]."""
        # The decoder was trained on unscaled latents, so z is first divided by the scale factor.
        z = z / self.scale_factor
        return self.first_stage_model.decode(z.to(next(self.first_stage_model.parameters(), z))).float()

    def apply_model(self, x_noisy: Latents, t: Times, cond: Cond = None) -> Latents:
        """The UNet's prediction for noisy latents: the noise in them (or v or x_0, if it was trained for that).

        cond: a context [b n d]; or, as in CompVis, {"c_crossattn": context, "c_concat": map [b c h w]}, each a tensor
        or a list of tensors. The UNet computes in its own dtype. The result has the dtype of x_noisy.
        """
        if not isinstance(cond, Mapping):
            cond = {"c_crossattn": cond}
        # CompVis passes lists of tensors, so that there can be several conditions of one kind. Sequences are
        # concatenated along their length n, maps along their channels.
        context, concat = (
            part if part is None or isinstance(part, Tensor) else torch.cat(list(part), dim=1)
            for part in (cond.get("c_crossattn"), cond.get("c_concat"))
        )
        channels = 0 if concat is None else concat.shape[1]
        if channels != self.config.concat_channels:
            raise ValueError(
                f"this model takes {self.config.concat_channels} channels beside the noisy latent, and {channels} were "
                "given: c_concat of apply_model and sample"
            )
        # The UNet may compute in half precision, but x_t and ε are float32: a sampler adds up many small steps, and
        # float16's 11 bits would round them away.
        inputs = (part if part is None else part.to(self.dtype) for part in (context, concat))
        return self.model(x_noisy.to(self.dtype), t, *inputs).to(x_noisy.dtype)

    def q_sample(self, x_start: Latents, t: Times, noise: Latents | None = None) -> Latents:
        """x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε: the latents with the noise of the timesteps t (DDPM, eq. 4)."""
        return self.schedule.q_sample(x_start, t, torch.randn_like(x_start) if noise is None else noise)

    def p_losses(
        self, x_start: Latents, cond: Cond, t: Times, noise: Latents | None = None, reduction: Reduction = "mean"
    ) -> Float[Tensor, "*b"]:
        """The training loss at the timesteps t: add noise, predict it, take the squared error (DDPM, Algorithm 1).

        reduction: "mean" over the batch; "none" for the loss of each picture [b].
        """
        noise = torch.randn_like(x_start) if noise is None else noise
        # Each latent gets the noise of its own timestep, and the UNet has to predict what was added.
        x_noisy = self.q_sample(x_start, t, noise)
        prediction = self.apply_model(x_noisy, t, cond)
        # The correct prediction: ε in Stable Diffusion v1, v in the 768-pixel version of Stable Diffusion 2.
        target = loss_target(self.config.parameterization, self.schedule, x_start, noise, t)
        # ‖ε - ε_θ(z_t, t, c)‖²                                                              (Rombach et al., eq. 3)
        return squared_error(prediction, target, reduction)

    # --- drawing ---------------------------------------------------------------------------------------------------

    @_draws
    def sample(
        self,
        prompt: Prompt,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | sampling.Sampler = "ddim",
        seed: Seed = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: Prompt = None,
        *,
        eta: float | None = None,
        spacing: str | None = None,
        timesteps: sampling.Timesteps | None = None,
        set_alpha_to_one: bool | None = None,
        lower_order_final: bool | None = None,
        clip_denoised: bool | None = None,
        before_step: sampling.BeforeStep | None = None,
        c_concat: Float[Tensor, "#b c h w"] | None = None,
        start_code: Float[Tensor, "#b d h w"] | None = None,
        generator: Generators | None = None,
    ) -> Iterator[sampling.Step]:
        """Yield the steps from noise to latent, one at a time. `txt2img` uses this, and explains the arguments.

        generator: a random generator for each picture, instead of those made from the seed; or a function that is
            called for the noise of each step, with the latent's shape (`editing.py` plays recorded noise back).
        """
        prompts, draw = _prompts(prompt, num_images), _sampler(sampler)
        generators = _generators(seed, len(prompts)) if generator is None else generator
        # The start is pure noise, x_T [b d h w]. It depends on the seed, and largely determines the picture's layout.
        shape = self.latent_shape(height, width)
        if start_code is None:
            start_code = randn((len(prompts), *shape), generators)
        elif (height, width) != (None, None) and start_code.shape[1:] != shape:
            raise ValueError(
                f"start_code is {list(start_code.shape)}, and height and width ask for {[len(prompts), *shape]}"
            )
        x_T = _repeated(start_code, len(prompts), "start codes").to(self.device)
        # The sampler does not know about prompts or guidance. It gets one function, which returns ε for x and t.
        eps_model = self._eps_model(prompts, negative_prompt, guidance_scale, c_concat)
        options = {
            "eta": eta, "spacing": spacing, "timesteps": timesteps, "set_alpha_to_one": set_alpha_to_one,
            "lower_order_final": lower_order_final, "clip_denoised": clip_denoised, "before_step": before_step,
        }  # fmt: skip
        # For an option that is left out, the sampler uses its own default.
        options = {name: value for name, value in options.items() if value is not None}
        if unknown := options.keys() - inspect.signature(draw).parameters.keys():
            raise ValueError(f"the sampler {sampler!r} has no {', '.join(sorted(unknown))}: leave it out")
        return draw(eps_model, x_T, self.schedule, steps, generator=generators, **options)

    @_draws
    def txt2img(
        self,
        prompt: Prompt,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | sampling.Sampler = "ddim",
        seed: Seed = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: Prompt = None,
        *,
        eta: float | None = None,
        spacing: str | None = None,
        timesteps: sampling.Timesteps | None = None,
        set_alpha_to_one: bool | None = None,
        lower_order_final: bool | None = None,
        clip_denoised: bool | None = None,
        before_step: sampling.BeforeStep | None = None,
        c_concat: Float[Tensor, "#b c h w"] | None = None,
        start_code: Float[Tensor, "#b d h w"] | None = None,
        progress: bool = False,
    ) -> Drawing:
        """Draw pictures from prompts.

        Args:
            prompt: what to draw, or several prompts. With the empty prompt, the model draws anything. (For a model of
                classes, a class or several; for an unconditional model, None.)
            steps: between 1 and the number of the schedule's timesteps, 1000.
            guidance_scale: 1 is no guidance; a larger number amplifies the effect of the prompt.
            sampler: a name in `minisd.sampling.SAMPLERS`, or a sampler.
            seed: picture k is drawn from seed + k.
            num_images: how many pictures to draw for each prompt.
            height, width: in pixels; by default the size of the training pictures. They must be divisible by the
                autoencoder's downsampling factor (8 in Stable Diffusion v1).
            negative_prompt: what not to draw. It is used instead of the empty prompt in guidance. One for all prompts,
                or one for each.
            eta: how much of the noise is drawn afresh at each step, from 0 to 1 (ddim, euler_ancestral).
            spacing: which timesteps are visited: "leading", "linspace" or "trailing" (`make_timesteps`).
            timesteps: the timesteps themselves, in falling order, instead of `steps`.
            set_alpha_to_one, lower_order_final, clip_denoised: see the samplers that take them.
            before_step: (x, t) -> x, called before each step.
            c_concat: further input channels of the UNet, of the latent's size, for a model that has them.
            start_code: x_T itself, drawn from N(0, I), instead of the one that the seed gives.
            progress: show a progress bar.
            If eta, spacing or another option of the sampler is left out, the sampler uses its own default.

        Returns:
            A `Drawing`, with the `.images` and the `.trajectory` that led to them.

        Raises:
            ValueError: an argument has a value that does not fit. TypeError: an argument does not exist.
        """
        run = self.sample(
            prompt, steps, guidance_scale, sampler, seed, num_images, height, width, negative_prompt, eta=eta,
            spacing=spacing, timesteps=timesteps, set_alpha_to_one=set_alpha_to_one,
            lower_order_final=lower_order_final, clip_denoised=clip_denoised, before_step=before_step,
            c_concat=c_concat, start_code=start_code,
        )  # fmt: skip
        # Nothing has been computed yet, because a sampler is a generator. `list` runs its steps.
        count = steps if timesteps is None else len(timesteps)
        return Drawing(Trajectory(list(_shown(run, count, progress)), self.decode_first_stage))

    @_draws
    def img2img(
        self,
        prompt: Prompt,
        image: Picture,
        strength: float = 0.75,
        noise_ahead: bool = False,
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | sampling.Sampler = "ddim",
        seed: Seed = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: Prompt = None,
        *,
        eta: float | None = None,
        spacing: str | None = None,
        set_alpha_to_one: bool | None = None,
        lower_order_final: bool | None = None,
        clip_denoised: bool | None = None,
        before_step: sampling.BeforeStep | None = None,
        c_concat: Float[Tensor, "#b c h w"] | None = None,
        progress: bool = False,
    ) -> Drawing:
        """Draw over a picture: add noise to its latent up to some timestep, and denoise it with a prompt.

        Args:
            image: a PIL image, the path of one or an array [H W c] (uint8, or floats in [0, 1]), which is resized to
                `height` and `width` if they are given; or pictures as tensors, [c H W] or [b c H W] in [-1, 1].
            strength: how much noise is added, from just above 0 (the picture hardly changes) to 1 (nothing of it
                remains). Of `steps` steps, the last int(strength · steps) are made.
            noise_ahead: if False, the latent gets the noise of the timestep of the first step (as in diffusers). If
                True, it gets that of the next larger timestep, as in CompVis's img2img.py: 741 where the first of 37
                steps of 50 expects 721. Then a little of the noise is left in the result.
            The others are as in `txt2img`.

        (SDEdit, Meng et al. 2022; CompVis `scripts/img2img.py`, `ddim.py: DDIMSampler.stochastic_encode, decode`.)
        """
        count = len(_prompts(prompt, num_images))
        generators = _generators(seed, count)
        # Picture → latent, [b c H W] -> [b d h w].
        pictures = self._pictures(image, count, height, width)
        z = self.get_first_stage_encoding(self.encode_first_stage(pictures), generators)
        # Noise hides the details first and the layout last. At a middle timestep the layout is still visible, so the
        # remaining steps keep it and draw new details.
        left, start = self._remaining(sampler, steps, strength, spacing, noise_ahead)
        noise = randn(z.shape, generators).to(z)
        x = self.q_sample(z, torch.full((count,), start, device=z.device), noise)
        run = self.sample(
            prompt, steps, guidance_scale, sampler, num_images=num_images, negative_prompt=negative_prompt, eta=eta,
            timesteps=left, set_alpha_to_one=set_alpha_to_one, lower_order_final=lower_order_final,
            clip_denoised=clip_denoised, before_step=before_step, c_concat=c_concat, start_code=x, generator=generators,
        )  # fmt: skip
        return Drawing(Trajectory(list(_shown(run, len(left), progress)), self.decode_first_stage))

    @_draws
    def inpaint(
        self,
        prompt: Prompt,
        image: Picture,
        mask: Picture,
        strength: float = 1.0,
        blend: str = "after",
        steps: int = 50,
        guidance_scale: float = 7.5,
        sampler: str | sampling.Sampler = "ddim",
        seed: Seed = 0,
        num_images: int = 1,
        height: int | None = None,
        width: int | None = None,
        negative_prompt: Prompt = None,
        *,
        eta: float | None = None,
        spacing: str | None = None,
        set_alpha_to_one: bool | None = None,
        lower_order_final: bool | None = None,
        clip_denoised: bool | None = None,
        progress: bool = False,
    ) -> Drawing:
        """Draw a part of a picture anew.

        A model with 9 input channels was trained for this: it gets the mask and the masked picture at each step. Any
        other model draws the whole picture. At each step, the unmasked part is replaced by that of the given picture,
        with the noise of the timestep (RePaint, Lugmayr et al. 2022, without its resampling).

        Args:
            image: as in `img2img`.
            mask: white (1) where something new is drawn, black (0) where the picture is kept: a PIL image or the path
                of one, or [H W] in [0, 1]. So do diffusers and CompVis's scripts; CompVis's samplers do the opposite.
                What is transparent is black. A stroke that is thinner than a pixel of the latent is widened to one.
            strength: as in `img2img`; at 1, the masked part starts from pure noise.
            blend: when the unmasked part is put back, for a model without further channels. "after" each step, always
                with the noise of x_T, and without noise after the last step (as in diffusers). Or "before" each step,
                with fresh noise, and not after the last (as in CompVis's DDIMSampler). Then the seams are softer, but
                the unmasked part changes a little.
            The others are as in `txt2img`.
        """
        nine = self.config.concat_channels > 0
        if blend not in (("after",) if nine else ("after", "before")):
            only = ', and for a model with further channels "after"' if nine else ""
            raise ValueError(f'blend must be "after" or "before" each step{only}, but it is {blend!r}')
        count = len(_prompts(prompt, num_images))
        generators = _generators(seed, count)
        pictures = self._pictures(image, count, height, width)
        mask = _repeated(read_mask(mask, *pictures.shape[-2:]).to(pictures), count, "masks")
        latent_mask = self._latent_mask(mask)
        left, start = self._remaining(sampler, steps, strength, spacing)

        # Random numbers are drawn in the same order as in diffusers: for the latent, the noise, and the latent of the
        # masked picture.
        needs_latent = not nine or strength < 1  # to put parts of the picture back, or to start from it
        z = self.get_first_stage_encoding(self.encode_first_stage(pictures), generators) if needs_latent else None
        noise = randn((count, *self.latent_shape(*pictures.shape[-2:])), generators).to(pictures)
        at = functools.partial(torch.full, (count,), device=noise.device)
        x = noise if strength == 1 else self.q_sample(z, at(start), noise)
        concat = self.masked_picture(pictures, mask, generators) if nine else None

        def put_back(x: Tensor, t: int) -> Tensor:
            # This is called before each step, that is, after the previous one. Before the first step there is none.
            if blend == "after" and t == start:
                return x
            fresh = noise if blend == "after" else randn(z.shape, generators).to(z)
            return self._put_back(x, z, fresh, latent_mask, at(t))

        run = self.sample(
            prompt, steps, guidance_scale, sampler, num_images=num_images, negative_prompt=negative_prompt, eta=eta,
            timesteps=left, set_alpha_to_one=set_alpha_to_one, lower_order_final=lower_order_final,
            clip_denoised=clip_denoised, before_step=None if nine else put_back, c_concat=concat, start_code=x,
            generator=generators,
        )  # fmt: skip
        drawn = list(_shown(run, len(left), progress))
        # After the last step the unmasked part is put back once more, this time without noise.
        if not nine and blend == "after":
            drawn[-1] = replace(drawn[-1], x=latent_mask * drawn[-1].x + (1 - latent_mask) * z)
        return Drawing(Trajectory(drawn, self.decode_first_stage))

    def latent_shape(self, height: int | None = None, width: int | None = None) -> tuple[int, int, int]:
        """Shape [d h w] of the latent of a picture of that size; by default the size of the training pictures.

        Raises:
            ValueError: the size is not a multiple of the autoencoder's downsampling factor. MemoryError: it is absurd.
        """
        height, width = (self.config.image_size if side is None else side for side in (height, width))
        f = self.config.first_stage.downsampling
        if height < 1 or width < 1 or height % f or width % f:
            raise ValueError(
                f"height and width must be positive multiples of {f} for this model, not {height}x{width}: try "
                f"{max(f, round(height / f) * f)}x{max(f, round(width / f) * f)}"
            )
        if max(height, width) > MOST:
            raise MemoryError(f"a side of {max(height, width):,} pixels")
        return self.config.first_stage.embed_dim, height // f, width // f

    def masked_picture(
        self, pictures: Float[Tensor, "b c H W"], mask: Float[Tensor, "b 1 H W"], generator: Generators | None = None
    ) -> Float[Tensor, "b d1 h w"]:
        """c_concat of a model that was trained for inpainting: the mask, and the latent of the masked picture.

        The mask [b 1 h w] comes first, then the latent [b d h w] of the picture, whose masked part is grey (0).
        """
        # Pictures have values in [-1, 1], so multiplying by 0 makes the masked part grey. The autoencoder encodes it
        # like any other part of a picture.
        hole = self.get_first_stage_encoding(self.encode_first_stage(pictures * (1 - mask)), generator)
        return torch.cat([self._latent_mask(mask), hole], dim=1)

    # --- what the methods above share ------------------------------------------------------------------------------

    def _eps_model(self, prompts: list, negative: Prompt, scale: float, c_concat: Tensor | None):
        """An eps_model for the samplers, with classifier-free guidance between the prompts and the negative prompts."""
        # The samplers need ε. If the UNet predicts v or x_0, ε is computed from that.
        model = self.apply_model if self.config.parameterization == "eps" else self.predict_noise
        maps = {} if c_concat is None else {"c_concat": _repeated(c_concat, len(prompts), "maps").to(self.device)}
        context = self.get_learned_conditioning(prompts)
        if context is None:  # an unconditional model has no guidance, and encoding refuses a negative prompt
            self.get_learned_conditioning(_prompts(negative, 1))
            return lambda x, t: model(x, t, maps)
        if negative is None:
            negative = self.cond_stage_model.unconditional
        negatives = _prompts(negative, 1)
        if len(prompts) % len(negatives):
            raise ValueError(f"{len(negatives)} negative prompts do not fit {len(prompts)} pictures")
        if len(negatives) > 1:  # one for each prompt: repeat it for each of the prompt's pictures
            negatives = _prompts(negatives, len(prompts) // len(negatives))
        both = (context, self.get_learned_conditioning(negatives))
        if maps:
            both = ({"c_crossattn": c} | maps for c in both)
        return sampling.classifier_free_guidance(model, *both, scale)

    def predict_noise(self, x: Tensor, t: Tensor, cond: Cond = None) -> Tensor:
        """The noise ε in x, computed from what the UNet predicts: ε, v or x_0."""
        prediction = self.apply_model(x, t, cond)
        # ε = √(1-ᾱ_t) x_t + √ᾱ_t v, or ε = (x_t - √ᾱ_t x_0) / √(1-ᾱ_t): both follow from the definitions of x_t and v.
        if self.config.parameterization == "v":
            return self.schedule.predict_noise_from_v(x, t, prediction)
        if self.config.parameterization == "x0":
            return self.schedule.predict_noise_from_start(x, t, prediction)
        return prediction

    def _remaining(
        self, sampler: str | Callable, steps: int, strength: float, spacing: str | None, noise_ahead: bool = False
    ) -> tuple[list[int], int]:
        """The timesteps that remain at this strength, and the timestep whose noise the picture gets."""
        spacing = spacing or inspect.signature(_sampler(sampler)).parameters["spacing"].default
        timesteps = sampling.make_timesteps(steps, self.schedule.timesteps, spacing)
        left = sampling.remaining_timesteps(timesteps, strength)
        ahead = timesteps[: -len(left)]
        return left, ahead[-1] if noise_ahead and ahead else left[0]

    def _latent_mask(self, mask: Float[Tensor, "b 1 H W"]) -> Float[Tensor, "b 1 h w"]:
        """The mask for each pixel of the latent, which covers a cell of f x f pixels of the picture."""
        f = self.config.first_stage.downsampling
        # A cell gets the mask's value at its upper left corner, as in diffusers and CompVis.
        corners = mask[..., ::f, ::f]
        # Strokes thinner than a cell can pass between the corners. So a cell also counts if such a stroke touches it: a
        # part of the mask that is further than f pixels from all blocks of f x f pixels that are full (1 everywhere).
        full = -F.max_pool2d(-mask, f, stride=1)
        near_full = F.max_pool2d(F.pad(full, [2 * f - 1] * 4), 3 * f, stride=1)
        return torch.maximum(corners, F.max_pool2d(mask * (1 - near_full), f))

    def _put_back(self, x_t: Tensor, z: Tensor, noise: Tensor, mask: Tensor, t: Tensor) -> Latents:
        """x_t where the mask is 1; elsewhere the latent z of the known picture, with the noise of timestep t."""
        return mask * x_t + (1 - mask) * self.q_sample(z, t, noise)

    def _pictures(self, image, count: int, height: int | None, width: int | None) -> Float[Tensor, "b c H W"]:
        """`count` pictures in [-1, 1] on the model's device. Raises ValueError if their size cannot be encoded."""
        # The size is checked twice: as it is asked for, before a file is read; and as the picture has it.
        self.latent_shape(height, width)
        pictures = read_picture(image, height, width)
        self.latent_shape(*pictures.shape[-2:])
        for side, asked_for in zip(pictures.shape[-2:], (height, width), strict=True):
            if asked_for not in (None, side):
                raise ValueError(f"a tensor is not resized: it has {side} pixels where {asked_for} are asked for")
        channels = self.config.first_stage.in_channels
        if pictures.shape[1] != channels:
            raise ValueError(f"this model's pictures have {channels} channels, not {pictures.shape[1]}")
        return _repeated(pictures, count, "pictures").to(self.device)


def _prompts(prompt: Prompt, num_images: int) -> list:
    """A prompt for each picture: every prompt is repeated num_images times."""
    if num_images < 1 or (isinstance(prompt, Sequence) and not isinstance(prompt, str) and not len(prompt)):
        raise ValueError(f"there is nothing to draw: num_images is {num_images}, the prompt {prompt!r}")
    prompts = [prompt] if prompt is None or isinstance(prompt, str | int) else list(prompt)
    if num_images * len(prompts) > MOST:
        raise ValueError(f"num_images is {num_images:,}: at most {MOST:,} pictures can be drawn at a time")
    return [p for p in prompts for _ in range(num_images)]


def _generators(seed: Seed, count: int) -> list[torch.Generator]:
    """A random generator for each picture. Picture k uses seed + k, whatever the size of the batch."""
    # `index` makes an int of numpy's integers, whose own sums could overflow: np.uint8(255) + 1 is 0.
    return [seeded(operator.index(seed) + k) for k in range(count)]


def _repeated(x: Float[Tensor, "n ..."], count: int, what: str) -> Float[Tensor, "count ..."]:
    """Repeat the n rows to `count` rows, each for an equal share of the drawings."""
    if not len(x) or count % len(x):
        raise ValueError(f"{len(x)} {what} do not fit {count} drawings")
    return x.repeat_interleave(count // len(x), dim=0)


def _sampler(sampler: str | sampling.Sampler) -> sampling.Sampler:
    if callable(sampler):
        return sampler
    if sampler not in sampling.SAMPLERS:
        raise ValueError(f"there is no sampler {sampler!r}: choose one of {', '.join(sampling.SAMPLERS)}")
    return sampling.SAMPLERS[sampler]


def _shown(run: Iterator[sampling.Step], count: int, progress: bool) -> Iterator[sampling.Step]:
    """The same steps, with a progress bar if `progress` is set."""
    from tqdm import tqdm

    shape = "{desc}: step {n_fmt} of {total_fmt} |{bar}| {remaining} left"
    return iter(tqdm(run, total=count, desc="drawing", disable=not progress, bar_format=shape))
