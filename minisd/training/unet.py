"""Training the UNet: guess the noise in the latent, given a condition: a caption, a class, or the rest of the picture.

The autoencoder is finished and stays as it is, so the latent of each picture is computed once, at the start. So does a
condition that was trained before, such as CLIP's text encoder; a table of classes is trained along with the UNet. A
step is then algorithm 1 of DDPM (Ho et al. 2020, arXiv:2006.11239) and three lines more:

    draw a picture z, a time t and noise ε; mix them into z_t
    one time in ten, forget the caption                           (for classifier-free guidance)
    take a step down the gradient of ‖ε - ε_θ(z_t, t, context)‖²
    let the mean of the weights follow                            (EMA)
"""

import contextlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..checkpoint import cast, load_clip, load_weights, read_weights, write_weights
from ..conditions import CONDITIONS, Captions, condition_of
from ..data import CaptionedPictures
from ..latent_diffusion import DiffusionWrapper, LatentDiffusion, LatentDiffusionConfig
from ..loss import min_snr_weight, text_dropout
from ..unet import UNetModel
from .engine import Engine, encode_shared
from .run_folder import save_model
from .trainer import Batch, Recipe, Trainer, digest, fingerprint
from .vae import encode_all, posterior_of, read_first_stage


@dataclass(frozen=True)
class UNetRecipe(Recipe):
    """How the UNet is trained."""

    lr: float = 1e-3  # learning rate after the warm-up
    text_dropout: float = 0.1  # how often the caption, or the class, is forgotten
    min_snr_gamma: float | None = 5.0  # weights by min(SNR, γ)/SNR; None for plain L_simple, as in Stable Diffusion
    gradient_checkpointing: bool = False  # forget what is inside the blocks, and compute it again for the gradients
    guidance_scale: float = 3.0  # of the sample sheets

    def __post_init__(self):
        super().__post_init__()
        self._check_share("text_dropout")
        if self.min_snr_gamma is not None and not self.min_snr_gamma > 0:
            raise ValueError(f"min_snr_gamma must be more than 0, not {self.min_snr_gamma}")


def train_unet(
    config: LatentDiffusionConfig,
    recipe: UNetRecipe,
    data: CaptionedPictures,
    folder: str | Path,
    engine: Engine,
    clip: str | Path | None,
    vae: str | Path,
    keep_at: tuple[int, ...] = (),
    condition: str = "captions",
    column: str | None = None,
) -> LatentDiffusion:
    """Train a UNet from scratch on top of finished runs of the autoencoder and, if it reads captions, of CLIP.

    Args:
        clip, vae: the folders of those runs.
        condition: what the UNet is conditioned on, a name in `CONDITIONS`.
        column: for classes, the column of the data's rows that says them; the names of the folders if left out.
        The others, what is returned and what is raised: as in `finetune_unet`.
    """
    torch.manual_seed(recipe.seed)  # the initial weights
    sd = assemble(config, clip, vae, data, condition, column)
    return finetune_unet(sd, recipe, data, folder, engine, clip, keep_at)


def finetune_unet(
    sd: LatentDiffusion,
    recipe: UNetRecipe,
    data: CaptionedPictures,
    folder: str | Path,
    engine: Engine,
    clip: str | Path | None = None,
    keep_at: tuple[int, ...] = (),
) -> LatentDiffusion:
    """Train the UNet of a model: one with a fresh UNet, or a finished one, such as `minisd.load()`, on new pictures.

    Text encoder, tokenizer, autoencoder and scale factor stay as they are. So the model won't learn what the
    autoencoder can't draw, and a word that the text encoder never read is the sum of its pieces to it.

    Args:
        sd: trained in place.
        folder: where the run lives. If it holds a checkpoint, the run goes on from there.
        clip: a folder that holds the rest of CLIP, which evaluation needs and which is copied; None if there is none.
        keep_at: steps after which the weights as they are then are kept beside the finished model.

    Returns the model with the EMA weights; leaves it in `folder/model`, as a minisd folder.

    Raises:
        ValueError: a model, pictures or steps that do not fit together.
    """
    folder, condition = Path(folder), sd.cond_stage_model
    _check(sd, recipe, data, keep_at)

    # What is trained: the UNet, and with it the condition unless that was trained before. Only these get gradients.
    sd.to(engine.device, torch.float32).model.train()
    condition.requires_grad_(not condition.frozen)
    sd.model.diffusion_model.use_checkpoint(recipe.gradient_checkpointing)
    network = sd.model.diffusion_model if condition.frozen else UNetAndCondition(sd)
    prompts = condition.prompts(data)  # for each picture, one or several forms of its prompt
    trainer = Trainer(network, recipe, folder, engine, given=_given(sd, data, prompts), describe=data.describe)

    # What no step changes is computed once, before the first: the moments of q(z given x) of all pictures, and the
    # contexts of all prompts if their encoder is frozen. A step then costs one pass through the UNet and back.
    moments = encode_all(sd.first_stage_model, data, engine)
    contexts = encode_prompts(sd, prompts, engine)
    nothing = sd.get_learned_conditioning([condition.unconditional])

    with _called_through(sd, trainer.model):
        for step in trainer.steps():
            for batch in trainer.batches(len(data)):
                # For each picture of the batch: a form of its prompt, a time t of 0, …, T-1, and whether to forget the
                # prompt, so that the model learns to draw without one (Ho & Salimans 2022, arXiv:2207.12598, alg. 1).
                form, t = batch.randint(len(prompts[0])), batch.randint(sd.schedule.timesteps).to(engine.device)
                forget = batch.rand() < recipe.text_dropout

                # The noise ε ~ N(0, I) that the UNet is to find; and z [b d h w], a sample of the picture's latent,
                # times the scale factor, so that its variance is about that of the noise.
                noise = batch.randn(*sd.latent_shape()).to(engine.device)
                posterior = posterior_of(moments[batch.indices].to(engine.device))
                z = sd.get_first_stage_encoding(posterior, batch.generators)
                maps = condition.maps(sd, data, batch)  # for inpainting, a mask and what it leaves of the picture

                # `autocast` computes convolutions and matrix products in bfloat16, if the engine was asked for it. The
                # sums in norms and in the loss stay in float32, where bfloat16's three digits would not be enough.
                with engine.autocast():
                    if condition.frozen:
                        context = contexts[batch.indices, form].to(engine.device)  # [b n d]
                        context = text_dropout(context, nothing, forget.to(engine.device))
                    else:  # its encoder has changed since the last step, and is to get gradients
                        choices = zip(batch.indices.tolist(), form.tolist(), forget.tolist(), strict=True)
                        kept = [condition.unconditional if forgotten else prompts[i][k] for i, k, forgotten in choices]
                        context = sd.get_learned_conditioning(kept)
                    # z_t = √ᾱ_t z + √(1-ᾱ_t) ε, then ‖ε - ε_θ(z_t, t, cond)‖² of each picture [b] (DDPM, eq. 14)
                    losses = sd.p_losses(z, {"c_crossattn": context, "c_concat": maps}, t, noise, reduction="none")

                # Late times are easy (nearly all is noise), early ones hard. Without weights the gradient mixes tasks
                # that pull in different directions; min(SNR, γ)/SNR keeps the nearly clean times from deciding alone
                # (Hang et al. 2023, arXiv:2303.09556, section 3.4).
                weight = 1.0
                if recipe.min_snr_gamma is not None:
                    weight = min_snr_weight(sd.schedule.snr(t), recipe.min_snr_gamma, sd.config.parameterization)
                trainer.backward((weight * losses).mean(), **by_time(losses.detach(), t, sd.schedule.timesteps))

            # The gradients of all batches and processes are there: clip them, take the step, let the EMA follow.
            trainer.update()
            trainer.sheet(lambda: _drawings(sd, data, prompts, engine, recipe.guidance_scale))
            if step + 1 in keep_at and engine.is_main_process:
                prefix = "model.diffusion_model." if condition.frozen else ""
                weights = {prefix + name: weight for name, weight in trainer.ema.items()}
                write_weights(cast(weights, torch.float16), folder / f"model/after_{step + 1:06d}_steps.safetensors")

    # The finished model has the mean of the weights, not those of the last step; and a UNet of its own, without what
    # the engine and torch.compile have put around the one that was trained.
    with trainer.finishing():
        sd.model.diffusion_model = UNetModel(sd.config.unet).to(engine.device)
        trained = sd.model.diffusion_model if condition.frozen else sd
        trained.load_state_dict(dict(trainer.ema.items()), strict=condition.frozen)
        condition.requires_grad_(False)
        save_model(sd, clip, folder / "model", engine)
    return sd.eval()


@contextlib.contextmanager
def _called_through(sd: LatentDiffusion, prepared: nn.Module) -> Iterator[None]:
    """Inside, the model calls what the engine made of its UNet, which averages the gradients over several processes.

    So a training step goes through the methods that drawing goes through, and that CompVis's `p_losses` goes through.
    """
    unet, sd.model.diffusion_model = sd.model.diffusion_model, prepared
    try:
        yield
    finally:
        sd.model.diffusion_model = unet


class UNetAndCondition(nn.Module):
    """The UNet and the condition that is trained along with it: one network to the optimiser, the EMA and the engine.

    Its parameters have the names that they have in the checkpoint of the whole model. (CompVis: cond_stage_trainable.)
    """

    def __init__(self, sd: LatentDiffusion):
        super().__init__()
        self.model, self.cond_stage_model = DiffusionWrapper(sd.model.diffusion_model), sd.cond_stage_model

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return self.model(x, t, context)


def _check(sd: LatentDiffusion, recipe: UNetRecipe, data: CaptionedPictures, keep_at: tuple[int, ...]) -> None:
    """Raise ValueError, in one sentence, where the model can't be trained on these pictures in this way."""
    if late := [step for step in keep_at if not 1 <= step <= recipe.steps]:
        raise ValueError(f"there is no step {late[0]} in a run of {recipe.steps}: keep_at names others")
    if sd.config.concat_channels != condition_of(sd.config).concat_channels(sd.config):
        raise ValueError(
            f"this model takes {sd.config.concat_channels} channels beside the noisy latent, such as a mask, which the "
            "loop does not make: train one that draws from captions alone, or for inpainting"
        )
    if data.size != sd.config.image_size:
        raise ValueError(
            f"this model draws {sd.config.image_size}x{sd.config.image_size} pixels, and the pictures are {data.size}x"
            f"{data.size}: open them with size={sd.config.image_size}"
        )


def _given(sd: LatentDiffusion, data: CaptionedPictures, prompts: list[list]) -> dict[str, str | int | float]:
    """What a run is given beside its recipe, and is only continued with: data, networks, and the model's settings."""
    condition = sd.cond_stage_model
    given = {"data": data.fingerprint, "autoencoder": fingerprint(sd.first_stage_model)}
    # The prompts depend on more than the data's captions: on their templates, or on the column that has the classes.
    given["prompts"] = f"{len(prompts[0])} for each picture ({digest(prompts)})"
    if condition.frozen:
        given["text tower"] = fingerprint(condition)
    else:  # its weights change, but not what it is, such as the names of the classes
        given["condition"] = f"{type(condition).__name__} ({digest(sd.config.cond_stage)})"
    return given | {name: value for name, value in vars(sd.config).items() if isinstance(value, str | int | float)}


def by_time(losses: Float[Tensor, "b"], t: Int[Tensor, "b"], timesteps: int, bins: int = 4) -> dict[str, Tensor]:
    """The losses in each part of the times: {"loss_t000": …, "loss_t250": …}, before any weighting.

    The sum in a bin is divided by the number of samples that fall into it on average, not in this batch, where it may
    be none. The mean over many steps, which the log takes, is the same.
    """
    which = t * bins // timesteps
    return {f"loss_t{timesteps * k // bins:03d}": bins * (losses * (which == k)).mean() for k in range(bins)}


def assemble(
    config: LatentDiffusionConfig,
    clip_folder: str | Path | None,
    vae_folder: str | Path,
    data: CaptionedPictures | None = None,
    condition: str = "captions",
    column: str | None = None,
) -> LatentDiffusion:
    """A model with a fresh UNet on top of the autoencoder, and for captions the text encoder, of finished runs."""
    first_stage, scale_factor = read_first_stage(vae_folder)
    if config.unet.in_channels != first_stage.embed_dim:
        raise ValueError(
            f"the latents of the autoencoder in {vae_folder} have {first_stage.embed_dim} channels, and the UNet takes "
            f"{config.unet.in_channels}: train both with the same preset"
        )
    if column is not None and not CONDITIONS[condition].reads_column:
        raise ValueError(f"{condition} are not read from a column, so name none (not {column!r})")
    config = replace(config, first_stage=first_stage, scale_factor=scale_factor)
    clip, tokenizer = None, None
    if issubclass(CONDITIONS[condition], Captions):
        clip, tokenizer = load_clip(clip_folder)
        config = replace(config, cond_stage=clip.text_config)
    sd = LatentDiffusion(CONDITIONS[condition].configure(config, data, column), tokenizer)
    if clip is not None:
        sd.cond_stage_model.transformer.text_model.load_state_dict(clip.text_model.state_dict())
    weights = Path(vae_folder) / "vae.safetensors"
    load_weights(sd.first_stage_model, read_weights(weights), weights)
    return sd


@torch.no_grad()
def encode_prompts(sd: LatentDiffusion, prompts: list[list], engine: Engine, batch_size: int = 512) -> Tensor | None:
    """Contexts of the prompts of all pictures in all their forms [n forms l d]; None for a model without contexts.

    In float16, on the CPU, computed by all processes together.
    """
    flat = [form for forms in prompts for form in forms]

    def contexts(indices: Int[Tensor, "b"]) -> Float[Tensor, "b l d"]:
        return sd.get_learned_conditioning([flat[i] for i in indices.tolist()]).half()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # on captions that are too long for the text encoder, once for each
        if sd.get_learned_conditioning(flat[:1]) is None:
            return None
        return encode_shared(contexts, len(flat), batch_size, engine).unflatten(0, (len(prompts), -1))


def _drawings(
    sd: LatentDiffusion, data: CaptionedPictures, prompts: list[list], engine: Engine, guidance_scale: float
) -> Float[Tensor, "n c H W"]:
    """For a sheet: pictures, and below each what the model draws for its prompt, always from the same noise."""
    indices = torch.linspace(0, len(data) - 1, 12).long()
    batch = Batch(indices, [torch.Generator().manual_seed(seed) for seed in range(len(indices))])
    maps = sd.cond_stage_model.maps(sd, data, batch)
    with engine.autocast():
        shown = [prompts[i][0] for i in indices]
        out = sd.txt2img(shown, steps=20, guidance_scale=guidance_scale, seed=0, c_concat=maps)
    return torch.cat([data.batch(indices), out.pictures.cpu()])
