"""Training the autoencoder: draw each picture again through a latent of a twelfth of the numbers.

    loss =  E |x - x̂|^p                                    every number as it was; the mean over all of them
          + perceptual_weight · d(x, x̂)                    and looking alike (perceptual.py)
          + kl_weight · KL(q(z given x) ‖ N(0, I))         latents that do not drift off; per number of the picture
            or codebook_weight · (codebook + commitment)   or, in a VQModel, near their codes (vq.py)
          + disc_weight · λ · (-E D(x̂))                    from step disc_start on: details that look real
                                                           (discriminator.py)

That is CompVis' `LPIPSWithDiscriminator` (`contperceptual.py`), and for a VQModel their `VQLPIPSWithDiscriminator`
(taming-transformers, `vqperceptual.py`). Three things are written down otherwise:

- The first of them adds up over the numbers of a picture, where the second and this one take the mean: each of its
  terms is that many times ours, λ included, and so is the gradient, of whose size AdamW takes no notice.
- It divides by exp(logvar) and adds logvar, a parameter that their optimiser is not given: it stays at 0, where both
  do nothing, and is left out.
- The discriminator learns from the reconstruction that it has just judged. There, the autoencoder takes its step first
  and draws a new one, for the price of another pass through it.

The KL term is tiny (1e-6 in Stable Diffusion, 1e-3 here): it only keeps the latents from drifting off, and the
reconstruction is what matters. At the end the latent scale factor is measured: 1 / std of the latents (0.18215 for
Stable Diffusion's own), so that the diffusion model sees data of variance one.

The decoder alone can be trained further when all is done (`finetune_decoder`): the latents stay what they are, so that
the UNet that has learned to draw them needs to learn nothing anew. Stability AI's sd-vae-ft-mse, which many put in the
place of the decoder that came with Stable Diffusion v1, was made in this way.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..checkpoint import CheckpointError, part_from_json, part_to_json, read_json, write_json, write_weights
from ..data import CaptionedPictures
from ..latent_diffusion import FIRST_STAGES, LatentDiffusion
from ..vae import AutoencoderConfig, DiagonalGaussianDistribution, FirstStage
from ..viz import save_sheet
from ..vq import VQConfig, VQModel
from .codebook import measure_codebook, revive_dead_codes
from .discriminator import NLayerDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from .engine import Engine, encode_shared
from .run_folder import save_model
from .trainer import Batch, Recipe, Trainer, fingerprint

Perceptual = Callable[[Tensor, Tensor], Tensor]  # pictures and reconstructions in [-1, 1] → a distance for each pair


@dataclass(frozen=True)
class VAERecipe(Recipe):
    """How the autoencoder is trained."""

    batch_size: int = 32
    lr: float = 1e-3  # learning rate after the warm-up
    rec_power: int = 1  # p: 1 as in CompVis; 2 learns flat colours on white sooner, and forgives a blur
    kl_weight: float = 1e-3  # more than Stable Diffusion's 1e-6: smoother latents are easier for a small UNet
    codebook_weight: float = 1.0  # of the quantiser's loss; a VQModel has no KL
    revive_every: int = 100  # steps; then codes of a VQModel that are nobody's nearest are moved
    perceptual_weight: float = 0.0  # of looking alike; 0: pixels alone
    disc_weight: float = 0.0  # how hard the discriminator pulls, beside the reconstruction; 0: there is none
    disc_start: int = 0  # steps before it begins to learn and to be heard
    disc_num_layers: int = 3  # convolutions that halve its picture: 3 judge patches of 70 pixels, 2 of 34
    disc_ndf: int = 64  # its channels after the first
    decoder_only: bool = False  # go on with a finished one, whose encoder stays as it is, and with it its latents
    # Standard deviation of noise on the latents that are decoded, of each picture at random up to this, in the latents'
    # own numbers: the decoder learns to forgive. A sampler ends near a latent, never quite on it.
    latent_noise: float = 0.0

    def __post_init__(self):
        super().__post_init__()
        if self.revive_every < 1:
            raise ValueError(f"revive_every must be at least 1, not {self.revive_every}")

    def betas(self, network: str) -> tuple[float, float]:
        """The discriminator's are CompVis'."""
        return (0.5, 0.9) if network == "discriminator" else super().betas(network)


def train_vae(
    config: AutoencoderConfig | VQConfig,
    recipe: VAERecipe,
    data: CaptionedPictures,
    folder: str | Path,
    engine: Engine,
    perceptual: Perceptual | None = None,
    init: FirstStage | None = None,
) -> FirstStage:
    """Train an autoencoder on pictures; leaves `vae.safetensors` and `vae.json` in the folder.

    Args:
        config: an AutoencoderConfig for latents near N(0, I), a VQConfig for latents of a codebook.
        perceptual: whether two pictures look alike, for `perceptual_weight`: a `CLIPPerceptual` or an `LPIPS`, say.
        init: a finished one of that config to go on with, in place; `decoder_only` needs one. A random one if None.

    Returns the autoencoder with its EMA weights. A folder with a checkpoint in it is gone on with.

    Raises:
        ValueError: a perceptual_weight, and nothing to look with; decoder_only, and no decoder; latent_noise, and a
            codebook; an autoencoder that FSDP would cut up.
    """
    trainer = _fit(config, recipe, data, Path(folder), engine, perceptual, init)
    with trainer.finishing():
        return _write(trainer, config, data)


def _fit(
    config: AutoencoderConfig | VQConfig,
    recipe: VAERecipe,
    data: CaptionedPictures,
    folder: Path,
    engine: Engine,
    perceptual: Perceptual | None,
    init: FirstStage | None,
) -> Trainer:
    """The loop. Returns the trainer, which has the EMA weights and still holds the run's folder."""
    quantised = isinstance(config, VQConfig)
    if recipe.decoder_only and init is None:
        raise ValueError("decoder_only trains the decoder of a finished autoencoder further: give train_vae an init")
    if recipe.latent_noise and quantised:
        raise ValueError("latent_noise teaches a decoder to forgive, and a codebook forgives already: set it to 0")
    if recipe.perceptual_weight and perceptual is None:
        raise ValueError(
            f"perceptual_weight is {recipe.perceptual_weight}, and there is nothing to tell by whether pictures look "
            "alike: give train_vae a CLIPPerceptual or an LPIPS, or set it to 0"
        )
    torch.manual_seed(recipe.seed)  # the initial weights
    vae, others = init or FIRST_STAGES[type(config)](config), {}
    vae.train().requires_grad_(not recipe.decoder_only)
    for part in (vae.post_quant_conv, vae.decoder):
        part.requires_grad_(True)
    if recipe.disc_weight:
        others["discriminator"] = NLayerDiscriminator(config.out_ch, recipe.disc_ndf, recipe.disc_num_layers)
    given = {"data": data.fingerprint}
    if recipe.perceptual_weight:
        given["perceptual network"] = fingerprint(perceptual)
    if recipe.decoder_only:
        given["encoder"] = fingerprint(vae.encoder)
    trainer = Trainer(vae, recipe, folder, engine, others, given, data.describe)
    vae = engine.unwrap_model(trainer.model)
    if hasattr(vae.decoder.conv_out.weight, "full_tensor") and (quantised or others):
        raise ValueError("FSDP cuts up what a codebook and a discriminator need whole: train autoencoders with DDP")
    loss_of = AutoencoderLoss(
        recipe, engine, perceptual, others.get("discriminator"), vae.decoder.conv_out.weight,
        limit=1e4 if quantised else 1e4 / (config.out_ch * data.size**2),
    )  # fmt: skip
    for step in trainer.steps():
        if quantised and not recipe.decoder_only and step % recipe.revive_every == 0:
            mean_codes = trainer.ema.weights["quantize.embedding.weight"]
            revive_dead_codes(vae, data, mean_codes, [recipe.seed, step], engine)
        for batch in trainer.batches(len(data)):
            x = data.batch(batch.indices).to(engine.device)
            x_hat, latent_loss, figures = _reconstruct(trainer, x, batch, quantised)
            loss, more = loss_of(x, x_hat, latent_loss, step)
            trainer.backward(loss, **more, **figures)
            if others and step >= recipe.disc_start:
                with engine.autocast():
                    disc_loss, figures = discriminator_loss(trainer.models["discriminator"], x, x_hat)
                trainer.backward(disc_loss, "disc", **figures)
        trainer.update()
        if trainer.time_to_sample:
            with trainer.ema.applied_to(vae):
                _reconstructions(trainer.model, data, folder / f"samples/{step + 1:06d}.png", engine)
    return trainer


def _write(trainer: Trainer, config: AutoencoderConfig | VQConfig, data: CaptionedPictures) -> FirstStage:
    """Write the autoencoder with its EMA weights, and what is measured of it. Returns it."""
    engine, folder = trainer.engine, trainer.folder.path
    vae = FIRST_STAGES[type(config)](config).to(engine.device).eval()
    vae.load_state_dict(dict(trainer.ema.items()), strict=False)
    # by all processes: the first together, and nobody saves time by waiting for the one that writes
    measured = {"scale_factor": measure_scale_factor(vae, data, engine), "psnr": psnr(vae, data, engine)}
    if isinstance(config, VQConfig):
        measured |= measure_codebook(vae, data, engine)
    if engine.is_main_process:
        write_weights(vae.state_dict(), folder / "vae.safetensors")
        record = {"first_stage": part_to_json(config), **measured, "recipe": asdict(trainer.recipe)}
        write_json(record, folder / "vae.json")
    engine.wait_for_everyone()
    return vae


def finetune_decoder(
    sd: LatentDiffusion,
    recipe: VAERecipe,
    data: CaptionedPictures,
    folder: str | Path,
    engine: Engine,
    perceptual: Perceptual | None = None,
    clip: str | Path | None = None,
) -> LatentDiffusion:
    """Go on training the decoder of a finished model, such as `minisd.load()`: it draws the same latents better.

    Args:
        sd: trained in place. Encoder and scale factor stay as they are, UNet and text tower as well.
        recipe: with `decoder_only`.
        folder: where the run lives; a folder with a checkpoint in it is gone on with.
        clip: the model's folder, if it holds the rest of CLIP, which evaluation needs: it is then copied.

    Returns the model with the decoder's EMA weights; leaves it in `folder/model`, as a minisd folder.

    Raises:
        ValueError: a recipe that would change the latents.
    """
    if not recipe.decoder_only:
        raise ValueError("the UNet knows the latents of this encoder alone: finetune_decoder takes decoder_only=True")
    sd.to(engine.device, torch.float32)
    config, init = sd.config.first_stage, sd.first_stage_model
    trainer = _fit(config, recipe, data, Path(folder), engine, perceptual, init)
    with trainer.finishing():
        sd.first_stage_model = _write(trainer, config, data)
        save_model(sd, clip, Path(folder) / "model", engine)
    return sd.eval()


def _reconstruct(trainer: Trainer, x: Tensor, batch: Batch, quantised: bool) -> tuple[Tensor, Tensor, dict]:
    """The reconstruction, what its latents cost, and what there is to log of them."""
    recipe, vae = trainer.recipe, trainer.engine.unwrap_model(trainer.model)
    with trainer.engine.autocast():
        if quantised:
            x_hat, codebook_loss, indices = trainer.model(x, return_pred_indices=True)
        else:
            noise = _latent_noise(vae, x, batch, recipe.latent_noise) if recipe.latent_noise else None
            x_hat, posterior = trainer.model(x, generator=batch.generators, noise=noise)
    if quantised:
        used = (vae.quantize.usage(indices) > 0).sum()  # of the codes; by this batch, so it grows with it
        figures = {"codebook": codebook_loss, "codes": used, "perplexity": vae.quantize.perplexity(indices)}
        return x_hat.float(), recipe.codebook_weight * codebook_loss, figures
    kl_loss = posterior.kl().mean() / x[0].numel()
    return x_hat.float(), recipe.kl_weight * kl_loss, {"kl": kl_loss}


def _latent_noise(vae: nn.Module, x: Float[Tensor, "b c H W"], batch: Batch, most: float) -> Float[Tensor, "b z h w"]:
    """σ ε, with σ between 0 and `most` for each picture, ε ~ N(0, I)."""
    height, width = (side // vae.config.downsampling for side in x.shape[-2:])
    sigma = most * batch.rand().view(-1, 1, 1, 1)
    return (sigma * batch.randn(vae.config.embed_dim, height, width)).to(x.device)


class AutoencoderLoss:
    """What the autoencoder is to lower: the sum at the top of this page.

    Args:
        perceptual, discriminator: None where the recipe gives them no weight.
        last_layer: the weights of the decoder's last convolution, where λ is measured.
        limit: of λ. CompVis' 1e4 is for the sum over the numbers of a picture with a KL, and for their mean in a VQ.
    """

    def __init__(
        self,
        recipe: VAERecipe,
        engine: Engine,
        perceptual: Perceptual | None,
        discriminator: nn.Module | None,
        last_layer: nn.Parameter,
        limit: float = 1e4,
    ):
        self.recipe, self.engine, self.perceptual, self.discriminator = recipe, engine, perceptual, discriminator
        self.last_layer, self.limit = last_layer, limit

    def __call__(
        self, x: Float[Tensor, "b c H W"], x_hat: Float[Tensor, "b c H W"], latent_loss: Float[Tensor, ""], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures, reconstructions, and what the latents cost → the loss, and the figures to log."""
        nll_loss = (x - x_hat).abs().pow(self.recipe.rec_power).mean()
        figures = {"rec": nll_loss}
        if self.recipe.perceptual_weight:
            with self.engine.autocast():
                figures["perceptual"] = self.perceptual(x, x_hat).mean()
            nll_loss = nll_loss + self.recipe.perceptual_weight * figures["perceptual"]
        loss = nll_loss + latent_loss
        if self.discriminator and step >= self.recipe.disc_start:
            with self.engine.autocast():
                g_loss = generator_loss(self.discriminator, x_hat)
            d_weight = adaptive_weight(nll_loss, g_loss, self.last_layer, self.engine, self.limit)
            d_weight = self.recipe.disc_weight * d_weight
            loss = loss + d_weight * g_loss
            figures |= {"gen": g_loss, "d_weight": d_weight}
        return loss, figures


def read_first_stage(folder: str | Path) -> tuple[AutoencoderConfig | VQConfig, float]:
    """What the autoencoder of a finished run is, and the scale factor of its latents."""
    path = Path(folder) / "vae.json"
    record = read_json(path)
    try:
        return part_from_json("first_stage", record["first_stage"]), float(record["scale_factor"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe an autoencoder of minisd ({error})") from None


@torch.no_grad()
def encode_all(vae: FirstStage, data: CaptionedPictures, engine: Engine, batch_size: int = 64) -> Tensor:
    """Moments (mean and log variance) of the latents of all pictures [n 2c h w] on the CPU: computed once, by all
    processes together.

    What a VQModel says has no variance: its logarithm is -inf, and a sample is the mean.
    """

    def moments(indices: Int[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
        latent = vae.encode(data.batch(indices).to(engine.device))
        if isinstance(latent, DiagonalGaussianDistribution):
            mean, logvar = latent.mean, latent.logvar
        else:
            mean, logvar = latent, torch.full_like(latent, -torch.inf)
        return torch.cat([mean, logvar], dim=1).float()

    return encode_shared(moments, len(data), batch_size, engine)


def measure_scale_factor(vae: FirstStage, data: CaptionedPictures, engine: Engine) -> float:
    """1 / std of sampled latents, over all pictures, channels and places (Rombach et al. 2022, appendix G)."""
    mean, logvar = encode_all(vae, data, engine).chunk(2, dim=1)
    # The variance of a sample is the variance of the means plus the mean of the variances: no noise need be drawn.
    return float((mean.var() + logvar.exp().mean()) ** -0.5)


def psnr(vae: FirstStage, data: CaptionedPictures, engine: Engine, count: int = 512) -> float:
    """Peak signal-to-noise ratio of reconstructions, in dB, over `count` pictures evenly spread through the data."""
    indices = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    errors = []
    for part in indices.split(64):
        x = data.batch(part).to(engine.device)
        x_hat = reconstruct(vae, x, engine).clamp(-1, 1)
        errors.append(((x - x_hat) / 2).square().mean(dim=(1, 2, 3)))  # values in [-1, 1] span 2
    return float(-10 * torch.cat(errors).mean().log10())


def _reconstructions(vae: nn.Module, data: CaptionedPictures, path: Path, engine: Engine) -> None:
    """A sheet of pairs: a picture, and below it what became of it. All processes draw it, and one writes it."""
    x = data.batch(torch.linspace(0, len(data) - 1, 12).long()).to(engine.device)
    x_hat = reconstruct(vae, x, engine)
    if engine.is_main_process:
        save_sheet(torch.cat([x, x_hat]), path, columns=12)


@torch.no_grad()
def reconstruct(vae: nn.Module, x: Float[Tensor, "b c H W"], engine: Engine) -> Float[Tensor, "b c H W"]:
    """Pictures through the likeliest latent and back, by an autoencoder as the engine has prepared it."""
    certain = isinstance(engine.unwrap_model(vae), VQModel)
    return (vae(x) if certain else vae(x, sample_posterior=False))[0].float()
