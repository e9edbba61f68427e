"""Training the UNet: guess the noise in the latent, given the caption.

CLIP and the autoencoder are done and stay as they are, so that the latent of each picture and the context of each
caption are computed once, at the start. A step is then algorithm 1 of DDPM (Ho et al. 2020) and three lines more:

    draw a picture z, a time t and noise ε; mix them into z_t
    one time in ten, forget the caption                           (for classifier-free guidance)
    take a step down the gradient of ‖ε - ε_θ(z_t, t, context)‖²
    let the mean of the weights follow                            (EMA)
"""

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from ..checkpoint import cast, load_clip, load_weights, read_weights, write_weights
from ..clip import CLIPTextConfig
from ..data import CaptionedPictures
from ..latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from ..loss import LOSSES, min_snr_weight, text_dropout
from ..unet import UNetModel
from ..viz import save_sheet
from .clip import tokenize_templates
from .engine import Engine, encode_shared
from .run_folder import save_model
from .trainer import Recipe, Trainer, fingerprint
from .vae import encode_all, read_first_stage


@dataclass(frozen=True)
class UNetRecipe(Recipe):
    """How the UNet is trained."""

    lr: float = 1e-3  # learning rate after the warm-up
    text_dropout: float = 0.1  # how often the caption is forgotten
    min_snr_gamma: float | None = 5.0  # weights by min(SNR, γ)/SNR; None for plain L_simple, as in Stable Diffusion
    gradient_checkpointing: bool = False  # forget what is inside the blocks, and compute it again for the gradients
    guidance_scale: float = 3.0  # of the sample sheets

    def __post_init__(self):
        super().__post_init__()
        self._check_share("text_dropout")
        if self.min_snr_gamma is not None:
            self._check_positive("min_snr_gamma")


def train_unet(
    config: LatentDiffusionConfig,
    recipe: UNetRecipe,
    data: CaptionedPictures,
    folder: str | Path,
    engine: Engine,
    clip: str | Path,
    vae: str | Path,
    keep_at: tuple[int, ...] = (),
) -> LatentDiffusion:
    """Train a UNet from scratch on top of finished runs of CLIP and of the autoencoder.

    Args:
        clip, vae: the folders of those runs.
        folder: where the run lives; a folder with a checkpoint in it is gone on with.
        keep_at: steps after which the UNet as it is then is kept beside the finished model.

    Returns the whole model with the UNet's EMA weights; leaves it in `folder/model`, as a minisd folder.

    Raises:
        ValueError: networks, pictures or steps that do not fit together.
    """
    late = [step for step in keep_at if not 1 <= step <= recipe.steps]
    if late:
        raise ValueError(f"there is no step {late[0]} in a run of {recipe.steps}: keep_at names others")
    torch.manual_seed(recipe.seed)  # the initial weights
    sd = assemble(config, clip, vae).to(engine.device)
    _fit(sd, recipe, data, Path(folder), engine, clip, keep_at)
    return sd.eval()


def finetune_unet(
    sd: LatentDiffusion,
    recipe: UNetRecipe,
    data: CaptionedPictures,
    folder: str | Path,
    engine: Engine,
    clip: str | Path | None = None,
) -> LatentDiffusion:
    """Go on training the UNet of a finished model, such as `minisd.load()`, on pictures that it has not seen.

    Text tower, tokenizer, autoencoder and scale factor stay as they are. So what the autoencoder can't draw, the model
    won't learn; and a word that the text tower never read is to it the sum of its pieces.

    Args:
        sd: trained in place.
        folder: where the run lives; a folder with a checkpoint in it is gone on with.
        clip: the model's folder, if it holds the rest of CLIP, which evaluation needs: it is then copied.

    Returns the model with the UNet's EMA weights; leaves it in `folder/model`, as a minisd folder.

    Raises:
        ValueError: the model does not draw from captions, or not from captions alone; the pictures are of another size.
    """
    if not isinstance(sd.config.cond_stage, CLIPTextConfig):
        raise ValueError("this model does not read captions, so pictures with captions can't teach it")
    if sd.config.concat_channels:
        raise ValueError(
            f"this model takes {sd.config.concat_channels} channels beside the noisy latent, such as a mask, which the "
            "loop does not make: train one that draws from captions alone"
        )
    sd.to(engine.device, torch.float32).model.train()
    _fit(sd, recipe, data, Path(folder), engine, clip)
    return sd.eval()


def _fit(
    sd: LatentDiffusion,
    recipe: UNetRecipe,
    data: CaptionedPictures,
    folder: Path,
    engine: Engine,
    clip: str | Path | None,
    keep_at: tuple[int, ...] = (),
) -> None:
    """The loop: train `sd.model.diffusion_model`, leave its EMA weights in it, and write the finished model."""
    if data.size != sd.config.image_size:
        raise ValueError(
            f"this model draws {sd.config.image_size}x{sd.config.image_size} pixels, and the pictures are {data.size}x"
            f"{data.size}: open them with size={sd.config.image_size}"
        )
    for module in sd.model.diffusion_model.modules():
        if hasattr(module, "use_checkpoint"):
            module.use_checkpoint = recipe.gradient_checkpointing
    given = {"data": data.fingerprint, "text tower": fingerprint(sd.cond_stage_model)}
    given |= {"autoencoder": fingerprint(sd.first_stage_model), **_settings(sd)}
    trainer = Trainer(sd.model.diffusion_model, recipe, folder, engine, given=given, describe=data.describe)
    moments = encode_all(sd.first_stage_model, data, engine)
    contexts = encode_captions(sd, data.captions, engine)
    empty = sd.get_learned_conditioning([""])
    loss_of, gamma = LOSSES[sd.config.parameterization], recipe.min_snr_gamma
    for step in trainer.steps():
        for batch in trainer.batches(len(data)):
            form, t = batch.randint(contexts.shape[1]), batch.randint(sd.schedule.timesteps).to(engine.device)
            forget = (batch.rand() < recipe.text_dropout).to(engine.device)
            # z = scale · sample of q(z given x): get_first_stage_encoding, from moments that are already there
            mean, logvar = moments[batch.indices].to(engine.device).chunk(2, dim=1)
            noise, encoder_noise = (batch.randn(*mean.shape[1:]).to(engine.device) for _ in range(2))
            z = sd.scale_factor * (mean + torch.exp(0.5 * logvar) * encoder_noise)
            context = text_dropout(contexts[batch.indices, form].to(engine.device), empty, forget)
            with engine.autocast():
                losses = loss_of(trainer.model, sd.schedule, z, context, t, noise, reduction="none")  # [b]
            weight = 1.0 if gamma is None else min_snr_weight(sd.schedule.snr(t), gamma, sd.config.parameterization)
            trainer.backward((weight * losses).mean(), **by_time(losses.detach(), t, sd.schedule.timesteps))
        trainer.update()
        if trainer.time_to_sample:
            with trainer.ema.applied_to(sd.model.diffusion_model), engine.autocast():
                _sample_sheet(sd, recipe, data, folder / f"samples/{step + 1:06d}.png", engine)
        if step + 1 in keep_at:
            unet = {f"model.diffusion_model.{name}": weight for name, weight in trainer.ema.items()}
            if engine.is_main_process:
                write_weights(cast(unet, torch.float16), folder / f"model/after_{step + 1:06d}_steps.safetensors")

    with trainer.finishing():
        sd.model.diffusion_model = UNetModel(sd.config.unet).to(engine.device)
        sd.model.diffusion_model.load_state_dict(dict(trainer.ema.items()))
        save_model(sd, clip, folder / "model", engine)


def _settings(sd: LatentDiffusion) -> dict[str, str | int | float]:
    """What its configuration says beside the networks: the noise schedule, the scale factor, what is predicted."""
    return {name: value for name, value in vars(sd.config).items() if isinstance(value, str | int | float)}


def by_time(losses: Float[Tensor, "b"], t: Int[Tensor, "b"], timesteps: int, bins: int = 4) -> dict[str, Tensor]:
    """The losses in each part of the times: {"loss_t000": …, "loss_t250": …}, before any weighting.

    The sum in a bin is divided by how many samples it would have on average, not by how many it has, which may be none:
    over the steps that the log takes the mean of, that comes to the same.
    """
    which = t * bins // timesteps
    return {f"loss_t{timesteps * k // bins:03d}": bins * (losses * (which == k)).mean() for k in range(bins)}


def assemble(config: LatentDiffusionConfig, clip_folder: str | Path, vae_folder: str | Path) -> LatentDiffusion:
    """A model with a fresh UNet between the text tower and the autoencoder of two finished runs."""
    clip, tokenizer = load_clip(clip_folder)
    first_stage, scale_factor = read_first_stage(vae_folder)
    if config.unet.in_channels != first_stage.embed_dim:
        raise ValueError(
            f"the latents of the autoencoder in {vae_folder} have {first_stage.embed_dim} channels, and the UNet takes "
            f"{config.unet.in_channels}: train both with the same preset"
        )
    config = replace(config, cond_stage=clip.text_config, first_stage=first_stage, scale_factor=scale_factor)
    sd = LatentDiffusion(config, tokenizer)
    sd.cond_stage_model.transformer.text_model.load_state_dict(clip.text_model.state_dict())
    weights = Path(vae_folder) / "vae.safetensors"
    load_weights(sd.first_stage_model, read_weights(weights), weights)
    return sd


@torch.no_grad()
def encode_captions(sd: LatentDiffusion, captions: list[str], engine: Engine, batch_size: int = 512) -> Tensor:
    """Contexts of all captions in all forms [n forms length width], float16 on the CPU: computed once, as `encode_all`.
    """
    embedder = sd.cond_stage_model
    tokens = tokenize_templates(embedder.tokenizer, captions, embedder.max_length)
    flat = tokens.flatten(0, 1)

    def contexts(indices: Int[Tensor, "b"]) -> Float[Tensor, "b n d"]:
        return embedder.transformer(flat[indices].to(sd.device)).half()

    return encode_shared(contexts, len(flat), batch_size, engine).unflatten(0, tokens.shape[:2])


def _sample_sheet(
    sd: LatentDiffusion, recipe: UNetRecipe, data: CaptionedPictures, path: Path, engine: Engine
) -> None:
    """Above, pictures of the corpus; below, what the model draws for their captions, always from the same noise.

    All processes draw it, since with FSDP each has but a part of the UNet, and one writes it.
    """
    indices = torch.linspace(0, len(data) - 1, 12).long()
    out = sd.txt2img([data.captions[i] for i in indices], steps=20, guidance_scale=recipe.guidance_scale, seed=0)
    if engine.is_main_process:
        save_sheet(torch.cat([data.batch(indices), out.pictures.cpu()]), path, columns=12)
