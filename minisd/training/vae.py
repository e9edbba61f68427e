"""Training the autoencoder: draw each picture again through a latent of a twelfth of the numbers.

    loss = Σ |x - x̂|^p + kl_weight · KL(q(z given x) ‖ N(0, I))        (divided by the numbers in a picture)

The KL term is tiny (1e-6 in Stable Diffusion, 1e-3 here): it only keeps the latents from drifting off, and the
reconstruction is what matters. At the end the latent scale factor is measured: 1 / std of the latents (0.18215 for
Stable Diffusion's own), so that the diffusion model sees data of variance one.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..checkpoint import write_json, write_weights
from ..data import CaptionedPictures
from ..vae import AutoencoderConfig, AutoencoderKL
from ..viz import save_sheet
from .engine import Engine
from .trainer import Recipe, Trainer


@dataclass(frozen=True)
class VAERecipe(Recipe):
    """How the autoencoder is trained."""

    batch_size: int = 32
    lr: float = 1e-3  # learning rate after the warm-up
    rec_power: int = 1  # p: 1 as in CompVis; 2 learns flat colours on white sooner, and forgives a blur
    kl_weight: float = 1e-3  # more than Stable Diffusion's 1e-6: smoother latents are easier for a small UNet


def train_vae(
    config: AutoencoderConfig, recipe: VAERecipe, data: CaptionedPictures, folder: str | Path, engine: Engine
) -> AutoencoderKL:
    """Train an autoencoder on pictures; leaves `vae.safetensors` and `vae.json` in the folder.

    Returns the autoencoder with its EMA weights. A folder with a checkpoint in it is gone on with.
    """
    folder = Path(folder)
    torch.manual_seed(recipe.seed)  # the initial weights
    trainer = Trainer(AutoencoderKL(config), recipe, folder, engine, describe=data.describe)
    for step in trainer.steps():
        for batch in trainer.batches(len(data)):
            x = data.batch(batch.indices).to(engine.device)
            with engine.autocast():
                reconstruction, posterior = trainer.model(x, generator=batch.generators)
            rec_loss = (x - reconstruction.float()).abs().pow(recipe.rec_power).mean()
            kl_loss = posterior.kl().mean() / x[0].numel()
            trainer.backward(rec_loss + recipe.kl_weight * kl_loss, rec=rec_loss, kl=kl_loss)
        trainer.update()
        if trainer.time_to_sample:
            with trainer.ema.applied_to(engine.unwrap_model(trainer.model)):
                _reconstructions(trainer.model, data, folder / f"samples/{step + 1:06d}.png", engine)

    vae = AutoencoderKL(config).to(engine.device).eval()
    vae.load_state_dict(dict(trainer.ema.items()), strict=False)
    # by all processes: nobody saves time by waiting for the one that writes
    measured = {"scale_factor": measure_scale_factor(vae, data, engine), "psnr": psnr(vae, data, engine)}
    if engine.is_main_process:
        write_weights(vae.state_dict(), folder / "vae.safetensors")
        record = {"first_stage": asdict(config), **measured, "recipe": asdict(recipe)}
        write_json(record, folder / "vae.json")
    engine.wait_for_everyone()
    return vae


@torch.no_grad()
def encode_all(vae: AutoencoderKL, data: CaptionedPictures, engine: Engine, batch_size: int = 64) -> Tensor:
    """Moments (mean and log variance) of the latents of all pictures [n 2c h w] on the CPU: computed once."""
    batches = torch.arange(len(data)).split(batch_size)
    moments = []
    for indices in batches:
        posterior = vae.encode(data.batch(indices).to(engine.device))
        moments.append(torch.cat([posterior.mean, posterior.logvar], dim=1).float().cpu())
    return torch.cat(moments)


def measure_scale_factor(vae: AutoencoderKL, data: CaptionedPictures, engine: Engine) -> float:
    """1 / std of sampled latents, over all pictures, channels and places (Rombach et al. 2022, appendix G)."""
    mean, logvar = encode_all(vae, data, engine).chunk(2, dim=1)
    # The variance of a sample is the variance of the means plus the mean of the variances: no noise need be drawn.
    return float((mean.var() + logvar.exp().mean()) ** -0.5)


@torch.no_grad()
def psnr(vae: AutoencoderKL, data: CaptionedPictures, engine: Engine, count: int = 512) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB, over `count` pictures evenly spread through the data."""
    indices = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    errors = []
    for part in indices.split(64):
        x = data.batch(part).to(engine.device)
        x_hat = vae.decode(vae.encode(x).mode()).clamp(-1, 1)
        errors.append(((x - x_hat) / 2).square().mean(dim=(1, 2, 3)))  # values in [-1, 1] span 2
    return float(-10 * torch.cat(errors).mean().log10())


@torch.no_grad()
def _reconstructions(vae: nn.Module, data: CaptionedPictures, path: Path, engine: Engine) -> None:
    """A sheet of pairs: a picture, and below it what became of it. All processes draw it, and one writes it."""
    x = data.batch(torch.linspace(0, len(data) - 1, 12).long()).to(engine.device)
    reconstruction, _ = vae(x, sample_posterior=False)
    if engine.is_main_process:
        save_sheet(torch.cat([x, reconstruction.float()]), path, columns=12)
