"""Training the autoencoder: compress each picture into a small latent, and reconstruct the picture from it.

The latent has a twelfth of the picture's numbers in the preset `emoji`, and a 48th in Stable Diffusion v1.

    loss =  E |x - x̂|^p                                    reconstruction error, the mean over all pixels
          + perceptual_weight · d(x, x̂)                    both should look alike (perceptual.py)
          + kl_weight · KL(q(z|x) ‖ N(0, I))               keeps the latents near N(0, I); per number of the picture
            or codebook_weight · (codebook + commitment)   or, in a VQModel, near their codes (vq.py)
          + disc_weight · λ · (-E D(x̂))                    from step disc_start on: details should look real
                                                           (discriminator.py)

This is the loss of CompVis's `LPIPSWithDiscriminator` (`contperceptual.py`) and, for a VQModel, of their
`VQLPIPSWithDiscriminator` (taming-transformers, `vqperceptual.py`). Three things are different here:

- `LPIPSWithDiscriminator` sums the error over the numbers of a picture. `VQLPIPSWithDiscriminator` and this file take
  the mean. So every term of the former, and its λ, is larger by the number of numbers in a picture. The gradients are
  larger by the same factor, but AdamW divides a common factor out.
- `LPIPSWithDiscriminator` divides the error by exp(logvar) and adds logvar, which is meant to be learned. Their
  optimiser does not get this parameter, so it stays 0 and has no effect. It is left out here.
- Here the discriminator is trained on the same reconstruction that the autoencoder's loss used. In CompVis, the
  autoencoder is updated first and reconstructs the batch again, which costs another forward pass.

The weight of the KL term is small (1e-6 in Stable Diffusion, 1e-3 here), because the reconstruction matters most. The
term only keeps the latents from growing without bound. At the end, the scale factor of the latents is measured: 1 / std
(0.18215 in Stable Diffusion). With it, the diffusion model is trained on data of variance one.

The decoder of a finished model can be trained further (`decoder_only`). The encoder is not changed, so the latents
remain the same and the UNet does not have to be trained again. Stability AI made sd-vae-ft-mse in this way, which many
people use instead of the original decoder of Stable Diffusion v1.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from .. import checkpoint
from ..checkpoint import files
from ..data import Corpus
from ..latent_diffusion import FIRST_STAGES, LatentDiffusion, Posterior
from ..vae import AutoencoderConfig, DiagonalGaussianDistribution, FirstStage
from ..vq import VQConfig, VQModel
from .codebook import measure_codebook, revive_dead_codes
from .discriminator import NLayerDiscriminator, adaptive_weight, discriminator_loss, generator_loss
from .engine import Engine, encode_shared
from .run_folder import save_model
from .trainer import Recipe, Trainer, fingerprint, one_training

Perceptual = Callable[[Tensor, Tensor], Tensor]  # pictures and reconstructions in [-1, 1] → a distance for each pair


@dataclass(frozen=True)
class VAERecipe(Recipe):
    """How the autoencoder is trained."""

    batch_size: int = 32
    lr: float = 1e-3  # learning rate after the warm-up
    rec_power: int = 1  # p: 1 as in CompVis; 2 learns flat colours on white sooner, and penalises blur less
    kl_weight: float = 1e-3  # more than Stable Diffusion's 1e-6: smoother latents are easier for a small UNet
    codebook_weight: float = 1.0  # weight of the quantiser's loss; a VQModel has no KL term
    revive_every: int = 100  # steps between searches for codes of a VQModel that no vector chooses; these are moved
    perceptual_weight: float = 0.0  # weight of the perceptual distance d; 0 leaves it out
    disc_weight: float = 0.0  # gradient of the discriminator's term, relative to the reconstruction's; 0: none
    disc_start: int = 0  # the step at which the discriminator begins to be trained and to count in the loss
    disc_num_layers: int = 3  # its convolutions of stride 2: with 3 it sees patches of 70 pixels, with 2 of 34
    disc_ndf: int = 64  # its channels after the first convolution
    decoder_only: bool = False  # train only the decoder of a finished autoencoder, so that the latents do not change
    # The largest standard deviation of noise that is added to the latents before decoding, in their own units. For
    # each picture it is chosen at random between 0 and this. A sampler's result is never exactly a latent of the
    # encoder. This noise teaches the decoder to accept small errors.
    latent_noise: float = 0.0

    def betas(self, network: str) -> tuple[float, float]:
        """AdamW's β1 and β2; the discriminator's are those of CompVis."""
        return (0.5, 0.9) if network == "discriminator" else super().betas(network)


@one_training()
def train_vae(
    model: AutoencoderConfig | VQConfig | FirstStage | LatentDiffusion,
    recipe: VAERecipe,
    data: Corpus,
    folder: str | Path,
    engine: Engine,
    perceptual: Perceptual | None = None,
    clip: str | Path | None = None,
) -> FirstStage:
    """Train an autoencoder on pictures, and write `vae.safetensors` and `vae.json` to the folder.

    Args:
        model: the configuration of a new autoencoder: an AutoencoderConfig for latents near N(0, I), a VQConfig for
            latents from a codebook. Or a finished autoencoder, which is trained further in place. Or a finished model
            (such as `minisd.load()`), whose decoder alone is trained further, in place, so that it decodes the same
            latents better; the recipe has `decoder_only=True`, and the model is also saved to `folder/model`.
        perceptual: the perceptual distance of two pictures, for `perceptual_weight`: a `CLIPPerceptual` or an `LPIPS`.
        clip: a folder with both towers of CLIP, which are copied beside a saved model for evaluation. None to leave it
            out.

    Returns the autoencoder with its EMA weights. If the folder holds a checkpoint, the run continues from it.

    Raises:
        ValueError: the recipe asks for something that was not given, or that does not fit the model.
    """
    folder, sd = Path(folder), model if isinstance(model, LatentDiffusion) else None
    if sd is not None:
        model = sd.to(engine.device, torch.float32).first_stage_model
    finished = isinstance(model, FirstStage)
    config = model.config if finished else model
    quantised = isinstance(config, VQConfig)
    _check(recipe, quantised, perceptual, finished, whole=sd is not None)
    torch.manual_seed(recipe.seed)  # the initial weights
    vae, others = model if finished else FIRST_STAGES[type(config)](config), {}
    # Train all of it, or only the layers after the latent, so that the latents do not change.
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
    vae = trainer.network
    # CompVis limits λ to 1e4. With a KL term, their loss is a sum over the numbers of a picture and ours is the mean.
    # So the same limit is 1e4 divided by that number. With a VQModel, both are means.
    limit = 1e4 if quantised else 1e4 / (config.out_ch * data.size**2)
    judge, last_layer = others.get("discriminator"), vae.decoder.conv_out.weight
    loss_of = AutoencoderLoss(recipe, engine, perceptual, judge, last_layer, limit)

    for step in trainer.steps():
        # A code that no vector chooses gets no gradient, so it would never move and never be used (codebook.py).
        if quantised and not recipe.decoder_only and step % recipe.revive_every == 0:
            mean_codes = trainer.ema.weights["quantize.embedding.weight"]
            revive_dead_codes(vae, data, mean_codes, [recipe.seed, step], engine)
        for batch in trainer.batches(len(data)):
            x = data.batch(batch.indices).to(engine.device, non_blocking=True)  # [b 3 H W] in [-1, 1]
            # Encode and decode: x → latent → x̂ [b 3 H W]. latent_loss is the weighted term of the codebook or the KL.
            if quantised:
                # Each vector of the encoder's output is replaced by the nearest code. The loss pulls the code towards
                # the vector (codebook term) and the vector towards the code (commitment term).
                with engine.autocast():
                    x_hat, codebook_loss, indices = trainer.model(x, return_pred_indices=True)
                latent_loss = recipe.codebook_weight * codebook_loss
                used = (vae.quantize.usage(indices) > 0).sum()  # codes used in this batch; a larger batch uses more
                figures = {"codebook": codebook_loss, "codes": used, "perplexity": vae.quantize.perplexity(indices)}
            else:
                # x → q(z|x) → a sample z → x̂. The sample is z = μ + σ ε, so gradients reach the encoder through μ and
                # σ (Kingma & Welling 2014, arXiv:1312.6114, section 2.4). `noise` is added to z: see `latent_noise`.
                noise = None
                if recipe.latent_noise:
                    strength = recipe.latent_noise * batch.rand().view(-1, 1, 1, 1)
                    side = data.size // config.downsampling
                    noise = (strength * batch.randn(config.embed_dim, side, side)).to(engine.device, non_blocking=True)
                with engine.autocast():
                    x_hat, posterior = trainer.model(x, generator=batch.randn, noise=noise)
                # KL(q(z|x) ‖ N(0, I)) is a sum over the latent. CompVis adds it to a reconstruction error that is a sum
                # over the numbers of the picture. Here that error is a mean, so the KL is divided by the same number,
                # c · H · W.
                kl_loss = posterior.kl().mean() / x[0].numel()
                latent_loss, figures = recipe.kl_weight * kl_loss, {"kl": kl_loss}
            x_hat = x_hat.float()
            # The whole loss at the top of this file. Its last term is lower if the discriminator takes the
            # reconstruction for a real picture. That term gives no gradient to the discriminator's own weights.
            loss, more = loss_of(x, x_hat, latent_loss, step)
            trainer.backward(loss, **more, **figures)
            # The other half of adversarial training: the discriminator learns to distinguish pictures from these
            # reconstructions. They are detached, so no gradient of this loss reaches the autoencoder (Goodfellow et al.
            # 2014, arXiv:1406.2661, algorithm 1). It starts late, when the reconstructions are already good.
            if others and step >= recipe.disc_start:
                with engine.autocast():
                    disc_loss, figures = discriminator_loss(trainer.models["discriminator"], x, x_hat)
                trainer.backward(disc_loss, "disc", **figures)
        # Clip the gradients, take an AdamW step for each network with its own optimiser, and update the autoencoder's
        # EMA. The discriminator is not part of the result and has no EMA.
        trainer.update()
        trainer.sheet(data, lambda indices: reconstruct(trainer.model, data.batch(indices).to(engine.device), engine))

    # The finished autoencoder gets the EMA weights, not those of the last step.
    with trainer.finishing():
        vae = FIRST_STAGES[type(config)](config).to(engine.device).eval()
        vae.load_state_dict(trainer.ema.weights, strict=False)
        # Measure with the EMA weights. Every process takes part, because the processes share the encoding of the data.
        measured = {"scale_factor": measure_scale_factor(vae, data, engine), "psnr": psnr(vae, data, engine)}
        if quantised:
            measured |= measure_codebook(vae, data, engine)
        if engine.is_main_process:
            record = {"first_stage": checkpoint.part_to_json(config), **measured, "recipe": asdict(recipe)}
            with files.folder_written_whole(folder / "vae.json", into=folder) as unfinished:
                checkpoint.write_weights(vae.state_dict(), unfinished / "vae.safetensors")
                checkpoint.write_json(record, unfinished / "vae.json")
        if sd is not None:
            sd.eval().first_stage_model = vae
            save_model(sd, clip, folder / "model", engine)
    return vae


def _check(recipe: VAERecipe, quantised: bool, perceptual: Perceptual | None, finished: bool, whole: bool) -> None:
    """Raise ValueError if the recipe asks for something that was not given, or that does not fit the model."""
    if recipe.decoder_only and not finished:
        raise ValueError(
            "decoder_only trains the decoder of a finished autoencoder further, but train_vae was given the "
            "configuration of a new one: give it a finished autoencoder or model, or set decoder_only to False"
        )
    if whole and not recipe.decoder_only:
        raise ValueError(
            "train_vae was given a whole model, whose UNet would not fit the latents of a changed encoder: set "
            "decoder_only=True, or give only the model's first_stage_model"
        )
    if recipe.latent_noise and quantised:
        raise ValueError(
            f"latent_noise is {recipe.latent_noise}, but a VQModel replaces each vector by its nearest code, which "
            "removes small noise: set latent_noise to 0"
        )
    if recipe.perceptual_weight and perceptual is None:
        raise ValueError(
            f"perceptual_weight is {recipe.perceptual_weight}, but train_vae was given no perceptual distance: give it "
            "a CLIPPerceptual or an LPIPS, or set perceptual_weight to 0"
        )


@dataclass
class AutoencoderLoss:
    """The loss of the autoencoder: the sum at the top of this file."""

    recipe: VAERecipe
    engine: Engine
    perceptual: Perceptual | None  # None if the recipe gives it no weight
    discriminator: nn.Module | None  # None if the recipe gives it no weight
    last_layer: nn.Parameter  # the weights of the decoder's last convolution, where λ is measured
    limit: float = 1e4  # the largest λ

    def __call__(
        self, x: Float[Tensor, "b c H W"], x_hat: Float[Tensor, "b c H W"], latent_loss: Float[Tensor, ""], step: int
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Pictures x, reconstructions x̂ and the loss of the latents → the whole loss, and figures for the log."""
        # The best x̂ for |x - x̂| is the median of all pictures with this latent, and for (x - x̂)² their mean. Both are
        # blurred wherever the latent leaves details open, which is why the next two terms exist.
        nll_loss = (x - x_hat).abs().pow(self.recipe.rec_power).mean()
        figures = {"rec": nll_loss}
        # The distance between the activations of a network that was trained to recognise things (LPIPS).
        if self.recipe.perceptual_weight:
            with self.engine.autocast():
                figures["perceptual"] = self.perceptual(x, x_hat).mean()
            nll_loss = nll_loss + self.recipe.perceptual_weight * figures["perceptual"]
        loss = nll_loss + latent_loss
        # The adversarial term -E D(x̂). Until disc_start, the autoencoder first learns to reconstruct without it.
        if self.discriminator and step >= self.recipe.disc_start:
            with self.engine.autocast():
                g_loss = generator_loss(self.discriminator, x_hat)
            # λ scales this term so that its gradient at the decoder's last layer is as long as that of nll_loss. The
            # discriminator's logits, and so its gradient, can have any size (Esser et al. 2021, eq. 7).
            d_weight = adaptive_weight(nll_loss, g_loss, self.last_layer, self.engine, self.limit)
            d_weight = self.recipe.disc_weight * d_weight
            loss = loss + d_weight * g_loss
            figures |= {"gen": g_loss, "d_weight": d_weight}
        return loss, figures


def finished_vae(path: str | Path) -> tuple[FirstStage, float]:
    """The autoencoder of a finished run or of a model that `load` can read, and the scale factor of its latents."""
    file = files.as_written(Path(path) / "vae.json")
    weights = file.with_name("vae.safetensors")
    if not file.exists():
        sd = checkpoint.load(path, "cpu")
        return sd.first_stage_model, sd.scale_factor
    record, state = checkpoint.read_json(file), checkpoint.read_weights(weights)
    # On "meta", it gets no random weights, which would be overwritten.
    with files.refused_as(f"{file} does not describe an autoencoder of minisd"), torch.device("meta"):
        config = checkpoint.part_from_json("first_stage", record["first_stage"])
        scale_factor = float(record["scale_factor"])
        files.check_blocks(len(state), config)
        vae = FIRST_STAGES[type(config)](config)
    checkpoint.load_weights(vae, state, weights)
    return vae.eval().requires_grad_(False), scale_factor


@torch.no_grad()
def encode_all(vae: FirstStage, data: Corpus, engine: Engine, batch_size: int = 64, most: int | None = None) -> Tensor:
    """Mean and log variance of the latents of all pictures [n 2c h w], on the CPU. All processes share the work.

    most: how many pictures are encoded at most. If there are more, they are chosen at random.

    The latents of a VQModel have variance zero, so their log variance is -inf.
    """

    def moments(indices: Int[Tensor, "b"]) -> Float[Tensor, "b c h w"]:
        latent = vae.encode(data.batch(chosen[indices]).to(engine.device))
        if not isinstance(latent, DiagonalGaussianDistribution):
            return torch.cat([latent, torch.full_like(latent, -torch.inf)], dim=1).float()
        return torch.cat([latent.mean, latent.logvar], dim=1).float()

    chosen = torch.arange(len(data))
    if most is not None and most < len(data):
        chosen = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))[:most]
    return encode_shared(moments, len(chosen), batch_size, engine)


def posterior_of(moments: Float[Tensor, "b two_c h w"], device: torch.device) -> Posterior:
    """What `encode_first_stage` returned for these moments: a distribution, or the latent itself for a VQModel."""
    certain = moments.chunk(2, dim=1)[1].isneginf().all()  # on the CPU, so that no GPU is waited for
    moments = moments.to(device, non_blocking=True)
    return moments.chunk(2, dim=1)[0] if certain else DiagonalGaussianDistribution(moments)


def measure_scale_factor(vae: FirstStage, data: Corpus, engine: Engine) -> float:
    """1 / std of sampled latents, over all pictures, channels and pixels (Rombach et al. 2022, appendix G).

    20,000 pictures are enough: they have millions of numbers.
    """
    mean, logvar = encode_all(vae, data, engine, most=20_000).chunk(2, dim=1)
    # The law of total variance: the variance of samples is the variance of the means plus the mean of the variances. So
    # no samples have to be drawn.
    return float((mean.var() + logvar.exp().mean()) ** -0.5)


def psnr(vae: FirstStage, data: Corpus, engine: Engine, count: int = 512) -> float:
    """Peak signal-to-noise ratio of the reconstructions in dB, for `count` pictures spread evenly over the data."""
    indices = torch.linspace(0, len(data) - 1, min(count, len(data))).long()
    errors = []
    for part in indices.split(64):
        x = data.batch(part).to(engine.device)
        x_hat = reconstruct(vae, x, engine).clamp(-1, 1)
        errors.append(((x - x_hat) / 2).square().mean(dim=(1, 2, 3)))  # [-1, 1] has a range of 2; PSNR is for range 1
    return float(-10 * torch.cat(errors).mean().log10())


@torch.no_grad()
def reconstruct(vae: nn.Module, x: Float[Tensor, "b c H W"], engine: Engine) -> Float[Tensor, "b c H W"]:
    """Encode pictures and decode the mode of q(z|x), instead of a sample. `vae` may be wrapped by the engine."""
    certain = isinstance(engine.unwrap_model(vae), VQModel)
    return (vae(x) if certain else vae(x, sample_posterior=False))[0].float()
