"""Training the autoencoder: draw each picture again through a latent of a twelfth of the numbers.

    loss =  E |x - x̂|^p                                    each pixel as it was; the mean over all of them
          + perceptual_weight · d(x, x̂)                    both look alike (perceptual.py)
          + kl_weight · KL(q(z given x) ‖ N(0, I))         the latents stay near N(0, I); per number of the picture
            or codebook_weight · (codebook + commitment)   or, in a VQModel, near their codes (vq.py)
          + disc_weight · λ · (-E D(x̂))                    from step disc_start on: details look real
                                                           (discriminator.py)

This is CompVis's `LPIPSWithDiscriminator` (`contperceptual.py`), and for a VQModel their `VQLPIPSWithDiscriminator`
(taming-transformers, `vqperceptual.py`). Three things are written differently:

- The first of them sums over the numbers of a picture, where the second and this one take the mean. So each of its
  terms, λ included, is that many times as large. Its gradient is as well, but AdamW ignores the gradient's scale.
- It divides by exp(logvar) and adds logvar, a parameter that their optimiser never gets. It stays at 0, where both do
  nothing, so it is left out here.
- The discriminator learns from the reconstruction that it has just judged. In theirs, the autoencoder takes its step
  first and makes a new reconstruction, which costs another pass through it.

The KL term is tiny (1e-6 in Stable Diffusion, 1e-3 here), because the reconstruction is what matters; it only keeps the
latents from drifting away. At the end the latent scale factor is measured: 1 / std of the latents (0.18215 in Stable
Diffusion), so that the diffusion model sees data of variance one.

The decoder of a finished model can be trained further (`finetune_decoder`). The latents stay what they are, so the UNet
that has learned to draw them does not have to learn anything new. Stability AI made sd-vae-ft-mse in this way, which
many use instead of the decoder that came with Stable Diffusion v1.
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
    revive_every: int = 100  # after so many steps, codes of a VQModel that no vector chooses are moved
    perceptual_weight: float = 0.0  # of the distance d, which says whether both look alike; 0: pixels alone
    disc_weight: float = 0.0  # how hard the discriminator pulls, compared with the reconstruction; 0: there is none
    disc_start: int = 0  # steps before it begins to learn and to count
    disc_num_layers: int = 3  # convolutions that halve its picture: with 3 it judges patches of 70 pixels, with 2 of 34
    disc_ndf: int = 64  # its channels after the first convolution
    decoder_only: bool = False  # train the decoder of a finished autoencoder further; encoder and latents stay
    # The largest standard deviation of noise that is added to the latents before they are decoded, in their own units;
    # each picture gets a random part of it. A sampler ends near a latent, never exactly on it: the decoder learns that.
    latent_noise: float = 0.0

    def betas(self, network: str) -> tuple[float, float]:
        """The discriminator's are CompVis's."""
        return (0.5, 0.9) if network == "discriminator" else super().betas(network)


def train_vae(
    config: AutoencoderConfig | VQConfig,
    recipe: VAERecipe,
    data: CaptionedPictures,
    folder: str | Path,
    engine: Engine,
    perceptual: Perceptual | None = None,
    init: FirstStage | None = None,
    model: LatentDiffusion | None = None,
    clip: str | Path | None = None,
) -> FirstStage:
    """Train an autoencoder on pictures; leaves `vae.safetensors` and `vae.json` in the folder.

    Args:
        config: an AutoencoderConfig for latents near N(0, I), a VQConfig for latents of a codebook.
        perceptual: how far two pictures look apart, for `perceptual_weight`: a `CLIPPerceptual` or an `LPIPS`, say.
        init: a finished autoencoder of that config to go on with, in place; `decoder_only` needs one. None: a new one.
        model, clip: see `finetune_decoder`.

    Returns the autoencoder with its EMA weights. If the folder holds a checkpoint, the run goes on from there.

    Raises:
        ValueError: a perceptual_weight without a network that sees; decoder_only without a decoder; latent_noise with a
            codebook.
    """
    folder, quantised = Path(folder), isinstance(config, VQConfig)
    _check(recipe, quantised, perceptual, init)
    torch.manual_seed(recipe.seed)  # the initial weights
    vae, others = init or FIRST_STAGES[type(config)](config), {}
    # What is trained: all of it, or only what comes after the latent, so that the latents stay what they are.
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
    # λ is at most 1e4 in CompVis, for a loss that is the sum over a picture with a KL, and the mean in a VQModel.
    limit = 1e4 if quantised else 1e4 / (config.out_ch * data.size**2)
    judge, last_layer = others.get("discriminator"), vae.decoder.conv_out.weight
    loss_of = AutoencoderLoss(recipe, engine, perceptual, judge, last_layer, limit)

    for step in trainer.steps():
        # A code that no vector chooses gets no gradient and would stay where it is for ever (codebook.py).
        if quantised and not recipe.decoder_only and step % recipe.revive_every == 0:
            mean_codes = trainer.ema.weights["quantize.embedding.weight"]
            revive_dead_codes(vae, data, mean_codes, [recipe.seed, step], engine)
        for batch in trainer.batches(len(data)):
            x = data.batch(batch.indices).to(engine.device)  # [b 3 H W] in [-1, 1]
            # There and back: x → q(z given x) → a sample z of it → x̂, so that gradients reach the encoder through the
            # sample (Kingma & Welling 2014, arXiv:1312.6114, section 2.4); and what the latents cost.
            x_hat, latent_loss, figures = _reconstruct(trainer, x, batch, quantised)
            # The sum at the top of this page. The discriminator's part of it teaches the decoder to deceive.
            loss, more = loss_of(x, x_hat, latent_loss, step)
            trainer.backward(loss, **more, **figures)
            # The other side of the game: the discriminator learns to tell these reconstructions from pictures. No
            # gradient of it reaches the autoencoder (Goodfellow et al. 2014, arXiv:1406.2661, algorithm 1).
            if others and step >= recipe.disc_start:
                with engine.autocast():
                    disc_loss, figures = discriminator_loss(trainer.models["discriminator"], x, x_hat)
                trainer.backward(disc_loss, "disc", **figures)
        trainer.update()  # both networks take their step, each with an optimiser of its own
        trainer.sheet(lambda: _reconstructions(trainer.model, data, engine))

    # The finished autoencoder has the mean of the weights, not those of the last step.
    with trainer.finishing():
        vae = FIRST_STAGES[type(config)](config).to(engine.device).eval()
        vae.load_state_dict(dict(trainer.ema.items()), strict=False)
        # All processes measure. The first ones encode together, and nobody saves time by waiting for one of them.
        measured = {"scale_factor": measure_scale_factor(vae, data, engine), "psnr": psnr(vae, data, engine)}
        if quantised:
            measured |= measure_codebook(vae, data, engine)
        if engine.is_main_process:
            write_weights(vae.state_dict(), folder / "vae.safetensors")
            record = {"first_stage": part_to_json(config), **measured, "recipe": asdict(recipe)}
            write_json(record, folder / "vae.json")
        engine.wait_for_everyone()
        if model is not None:
            model.first_stage_model = vae
            save_model(model, clip, folder / "model", engine)
    return vae


def _check(recipe: VAERecipe, quantised: bool, perceptual: Perceptual | None, init: FirstStage | None) -> None:
    """Raise ValueError, in one sentence, where the recipe asks for what is not there."""
    if recipe.decoder_only and init is None:
        raise ValueError("decoder_only trains the decoder of a finished autoencoder further: give train_vae an init")
    if recipe.latent_noise and quantised:
        raise ValueError("latent_noise teaches a decoder to forgive, and a codebook forgives already: set it to 0")
    if recipe.perceptual_weight and perceptual is None:
        raise ValueError(
            f"perceptual_weight is {recipe.perceptual_weight}, and there is nothing to tell by whether pictures look "
            "alike: give train_vae a CLIPPerceptual or an LPIPS, or set it to 0"
        )


def finetune_decoder(
    sd: LatentDiffusion,
    recipe: VAERecipe,
    data: CaptionedPictures,
    folder: str | Path,
    engine: Engine,
    perceptual: Perceptual | None = None,
    clip: str | Path | None = None,
) -> LatentDiffusion:
    """Train the decoder of a finished model, such as `minisd.load()`, further: it draws the same latents better.

    Args:
        sd: trained in place. Encoder and scale factor stay as they are; so do the UNet and the condition.
        recipe: with `decoder_only`.
        folder: where the run lives. If it holds a checkpoint, the run goes on from there.
        clip: a folder that holds the rest of CLIP, which evaluation needs and which is copied; None if there is none.

    Returns the model with the decoder's EMA weights; leaves it in `folder/model`, as a minisd folder.

    Raises:
        ValueError: a recipe that would change the latents.
    """
    if not recipe.decoder_only:
        raise ValueError("the UNet knows the latents of this encoder alone: finetune_decoder takes decoder_only=True")
    sd.to(engine.device, torch.float32)
    train_vae(sd.config.first_stage, recipe, data, folder, engine, perceptual, sd.first_stage_model, sd, clip)
    return sd.eval()


def _reconstruct(trainer: Trainer, x: Tensor, batch: Batch, quantised: bool) -> tuple[Tensor, Tensor, dict]:
    """The reconstruction x̂, what its latents cost, and what there is to log of them."""
    recipe, vae = trainer.recipe, trainer.engine.unwrap_model(trainer.model)
    with trainer.engine.autocast():
        if quantised:
            # Each vector of the encoder is replaced by its nearest code; the loss pulls the two towards each other.
            x_hat, codebook_loss, indices = trainer.model(x, return_pred_indices=True)
        else:
            noise = _latent_noise(vae, x, batch, recipe.latent_noise) if recipe.latent_noise else None
            x_hat, posterior = trainer.model(x, generator=batch.generators, noise=noise)
    if quantised:
        used = (vae.quantize.usage(indices) > 0).sum()  # the codes that this batch chose: more in a larger batch
        figures = {"codebook": codebook_loss, "codes": used, "perplexity": vae.quantize.perplexity(indices)}
        return x_hat.float(), recipe.codebook_weight * codebook_loss, figures
    # KL(q ‖ N(0, I)) of a picture is a sum over its latent. It is divided by the numbers of the picture, so that it
    # weighs against the reconstruction error, which is a mean over them, as in CompVis's sum of both.
    kl_loss = posterior.kl().mean() / x[0].numel()
    return x_hat.float(), recipe.kl_weight * kl_loss, {"kl": kl_loss}


def _latent_noise(vae: nn.Module, x: Float[Tensor, "b c H W"], batch: Batch, most: float) -> Float[Tensor, "b z h w"]:
    """σ ε, with σ between 0 and `most` for each picture, ε ~ N(0, I)."""
    height, width = (side // vae.config.downsampling for side in x.shape[-2:])
    sigma = most * batch.rand().view(-1, 1, 1, 1)
    return (sigma * batch.randn(vae.config.embed_dim, height, width)).to(x.device)


@dataclass
class AutoencoderLoss:
    """What the autoencoder is to lower: the sum at the top of this page."""

    recipe: VAERecipe
    engine: Engine
    perceptual: Perceptual | None  # None if the recipe gives it no weight
    discriminator: nn.Module | None  # the same
    last_layer: nn.Parameter  # the weights of the decoder's last convolution, where λ is measured
    limit: float = 1e4  # the largest λ

    def __call__(
        self, x: Float[Tensor, "b c H W"], x_hat: Float[Tensor, "b c H W"], latent_loss: Float[Tensor, ""], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures, reconstructions, and what the latents cost → the loss, and the figures to log."""
        # |x - x̂| asks for the median of what may have been there, (x - x̂)² for the mean. Both are blurred where the
        # latent does not say, which is why the two terms below exist.
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
            # λ makes both pull equally hard at the last layer, however sure of itself the discriminator is.
            d_weight = adaptive_weight(nll_loss, g_loss, self.last_layer, self.engine, self.limit)
            d_weight = self.recipe.disc_weight * d_weight
            loss = loss + d_weight * g_loss
            figures |= {"gen": g_loss, "d_weight": d_weight}
        return loss, figures


def read_first_stage(folder: str | Path) -> tuple[AutoencoderConfig | VQConfig, float]:
    """The configuration of a finished run's autoencoder, and the scale factor of its latents."""
    path = Path(folder) / "vae.json"
    record = read_json(path)
    try:
        return part_from_json("first_stage", record["first_stage"]), float(record["scale_factor"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} does not describe an autoencoder of minisd ({error})") from None


@torch.no_grad()
def encode_all(vae: FirstStage, data: CaptionedPictures, engine: Engine, batch_size: int = 64) -> Tensor:
    """Moments (mean and log variance) of the latents of all pictures [n 2c h w], on the CPU: computed once, by all
    processes together.

    The latents of a VQModel have no variance: its logarithm is -inf.
    """

    def moments(indices: Int[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
        latent = vae.encode(data.batch(indices).to(engine.device))
        if not isinstance(latent, DiagonalGaussianDistribution):
            return torch.cat([latent, torch.full_like(latent, -torch.inf)], dim=1).float()
        return torch.cat([latent.mean, latent.logvar], dim=1).float()

    return encode_shared(moments, len(data), batch_size, engine)


def posterior_of(moments: Float[Tensor, "b two_c h w"]) -> DiagonalGaussianDistribution | Float[Tensor, "b c h w"]:
    """The answer of `encode_first_stage` to which these moments belong: a distribution, or a VQModel's latent."""
    mean, logvar = moments.chunk(2, dim=1)
    return mean if logvar.isneginf().all() else DiagonalGaussianDistribution(moments)


def measure_scale_factor(vae: FirstStage, data: CaptionedPictures, engine: Engine) -> float:
    """1 / std of sampled latents, over all pictures, channels and places (Rombach et al. 2022, appendix G)."""
    mean, logvar = encode_all(vae, data, engine).chunk(2, dim=1)
    # The variance of a sample is the variance of the means plus the mean of the variances, so no noise has to be drawn.
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


def _reconstructions(vae: nn.Module, data: CaptionedPictures, engine: Engine) -> Float[Tensor, "n c H W"]:
    """For a sheet: pictures, and below each what became of it."""
    x = data.batch(torch.linspace(0, len(data) - 1, 12).long()).to(engine.device)
    return torch.cat([x, reconstruct(vae, x, engine)])


@torch.no_grad()
def reconstruct(vae: nn.Module, x: Float[Tensor, "b c H W"], engine: Engine) -> Float[Tensor, "b c H W"]:
    """Pictures through the most likely latent and back, by an autoencoder as the engine has prepared it."""
    certain = isinstance(engine.unwrap_model(vae), VQModel)
    return (vae(x) if certain else vae(x, sample_posterior=False))[0].float()
