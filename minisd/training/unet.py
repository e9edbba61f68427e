"""Training the UNet: predict the noise in a latent, given a condition: a caption, a class, or the rest of the picture.

The autoencoder is already trained and is not changed, so the latent distribution of each picture is computed once, at
the start. A text encoder that was trained before, such as CLIP's, is not changed either, so its contexts are computed
once as well. A table of class embeddings is trained along with the UNet. A training step is algorithm 1 of DDPM (Ho et
al. 2020, arXiv:2006.11239), with two additions that Stable Diffusion also uses:

    sample a latent z, a timestep t and noise ε, and mix them into z_t
    replace one caption in ten by the empty prompt                     (added, for classifier-free guidance)
    take a gradient step on ‖ε - ε_θ(z_t, t, context)‖²
    update the running mean of the weights                             (added: EMA)
"""

import contextlib
import math
import warnings
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ..checkpoint import load_clip, write_weights
from ..checkpoint.files import cast
from ..conditions import CONDITIONS, Captions, condition_of
from ..data import Corpus
from ..latent_diffusion import DiffusionWrapper, LatentDiffusion, LatentDiffusionConfig
from ..lora import Adapter
from ..loss import min_snr_weight, text_dropout
from ..unet import UNetModel
from .engine import Engine, encode_shared
from .run_folder import save_model
from .trainer import Batch, Recipe, Trainer, digest, fingerprint, one_training, refuse_another_size
from .vae import encode_all, finished_vae, posterior_of

KEPT = 4 * 2**30  # bytes: if the latents and contexts of all pictures fit, they are computed once and kept


@dataclass(frozen=True)
class UNetRecipe(Recipe):
    """How the UNet is trained."""

    lr: float = 1e-3  # learning rate after the warm-up
    text_dropout: float = 0.1  # how often the caption (or the class) is replaced by the empty one
    min_snr_gamma: float | None = 5.0  # weights by min(SNR, γ)/SNR; None for plain L_simple, as in Stable Diffusion
    gradient_checkpointing: bool = False  # recompute the blocks' activations in the backward pass, to save memory
    guidance_scale: float = 3.0  # of the sample sheets


@one_training()
def train_unet(
    model: LatentDiffusionConfig | LatentDiffusion,
    recipe: UNetRecipe,
    data: Corpus,
    folder: str | Path,
    engine: Engine,
    clip: str | Path | None = None,
    vae: str | Path | None = None,
    keep_at: tuple[int, ...] = (),
    condition: str = "captions",
    column: str | None = None,
    adapter: Adapter | None = None,
) -> LatentDiffusion:
    """Train the UNet of a new model, or that of a finished model further, on new pictures.

    The autoencoder, the scale factor and CLIP are not changed. So the model cannot learn to draw what the autoencoder
    cannot reconstruct. The text encoder reads a new word only as the pieces that the tokenizer cuts it into.

    Args:
        model: the configuration of a new model, whose autoencoder and (if it reads captions) CLIP are trained already;
            or a finished model (such as `minisd.load()`), which is trained in place.
        folder: where the run is stored. If it holds a checkpoint, the run continues from it.
        clip: a folder with both towers of CLIP, which are copied beside the model for evaluation. None to leave it out.
            A new model that reads captions takes its text encoder from it.
        vae: for a new model, the folder of the run that trained its autoencoder.
        keep_at: the numbers of steps after which the EMA weights are also written to a file of their own.
        condition: what a new model is conditioned on, a name in `CONDITIONS`.
        column: for classes, the column of the data's rows that names the class. Left out, the folders name it.
        adapter: a LoRA or a new word of this model (`lora.py`). Then only this is trained, and saved to `folder`.

    Returns the model with the EMA weights, which is also saved to `folder/model`, as a minisd folder.

    Raises:
        ValueError: the model, the pictures and the steps do not fit together.
    """
    torch.manual_seed(recipe.seed)  # the initial weights of a new UNet
    sd = model if isinstance(model, LatentDiffusion) else assemble(model, clip, vae, data, condition, column)
    folder, condition = Path(folder), sd.cond_stage_model
    if late := [step for step in keep_at if not 1 <= step <= recipe.steps]:
        raise ValueError(f"keep_at names step {late[0]}, but this run has steps 1 to {recipe.steps}")
    if sd.config.concat_channels != condition_of(sd.config).concat_channels(sd.config):
        raise ValueError(
            f"this model takes {sd.config.concat_channels} channels beside the noisy latent, such as a mask, but "
            "no condition of minisd makes these: train a model without them, or one for inpainting"
        )
    refuse_another_size(data, sd.config.image_size, "this model draws")

    # Only the UNet is trained, and the condition's encoder if it is not frozen (a table of class embeddings). Nothing
    # else gets gradients. The weights are kept in float32: AdamW's small updates would be rounded away in 16 bits.
    sd.to(engine.device, torch.float32).model.train()
    condition.requires_grad_(not condition.frozen)
    sd.model.diffusion_model.use_checkpoint(recipe.gradient_checkpointing)
    network = sd.model.diffusion_model if condition.frozen else UNetAndCondition(sd)
    prompts = condition.prompts(data)  # for each picture, one wording of its prompt or more
    # What the run depends on beside its recipe: the data, the frozen networks, and the model's settings. The prompts
    # depend on more than the captions: also on the templates, or on the column that holds the classes.
    given = {"data": data.fingerprint, "autoencoder": fingerprint(sd.first_stage_model)}
    given["prompts"] = f"{len(prompts[0])} for each picture ({digest(prompts)})"
    if condition.frozen:
        given["text tower"] = fingerprint(condition)
    else:  # its weights change during training, but its configuration does not (such as the names of the classes)
        given["condition"] = f"{type(condition).__name__} ({digest(sd.config.cond_stage)})"
    given |= {name: value for name, value in vars(sd.config).items() if isinstance(value, str | int | float)}
    if adapter is not None:  # it holds the only parameters that are trained, and calls the UNet
        network = adapter
        given |= {"model": fingerprint(sd), "adapter": repr(adapter)}
        sd.requires_grad_(False)
        adapter.requires_grad_(True)
    trainer = Trainer(network, recipe, folder, engine, given=given, describe=data.describe)

    # Training does not change the autoencoder or a frozen text encoder, so they run once, before the first step. For
    # each picture, store the mean and log variance of q(z|x) and not one sample, so that each step can sample a new z.
    # After that, a step costs one forward and one backward pass through the UNet. If there are too many pictures to
    # keep all this, each step encodes its own, which takes longer.
    nothing = sd.get_learned_conditioning([condition.unconditional])
    # Each text is encoded once, because a mixture of data repeats them. rows [n forms] has the row of each prompt.
    row_of = {form: row for row, form in enumerate(dict.fromkeys(form for forms in prompts for form in forms))}
    rows = torch.tensor([[row_of[form] for form in forms] for forms in prompts])
    latent = 2 * 4 * math.prod(sd.latent_shape())  # bytes: mean and log variance in float32
    context = 0 if nothing is None else 2 * nothing.numel()  # float16
    kept = len(data) * latent + len(row_of) * context <= KEPT
    moments = encode_all(sd.first_stage_model, data, engine) if kept else None
    # An encoder that is trained runs again in each step. It runs here all the same, so that an unknown class is refused
    # now, and not in the step in which it first turns up.
    contexts = encode_prompts(sd, list(row_of), engine) if kept or not condition.frozen else None

    def drawings(indices: Int[Tensor, "n"]) -> Float[Tensor, "n c H W"]:
        """For a sample sheet: a drawing for the prompt of each of these pictures, from the same noise at every step."""
        maps = condition.maps(sd, data, Batch(indices, (0, 0), range(len(indices))))
        with engine.autocast():
            shown = [prompts[i][0] for i in indices]
            return sd.txt2img(shown, steps=20, guidance_scale=recipe.guidance_scale, seed=0, c_concat=maps).pictures

    with contextlib.ExitStack() as undo:
        # In the loop, the model calls the UNet through the engine's wrapper, which averages gradients (DDP). So a step
        # uses the same methods as drawing does, `apply_model` and `p_losses`, as in CompVis.
        undo.callback(setattr, sd.model, "diffusion_model", sd.model.diffusion_model)
        sd.model.diffusion_model = trainer.model
        for step in trainer.steps():
            for batch in trainer.batches(len(data)):
                # For each picture of the batch, choose at random one wording of its prompt, a timestep t from
                # {0, …, T-1}, and whether to drop the prompt. All are [b]. The model has to learn to predict the noise
                # without a prompt too, because classifier-free guidance subtracts that prediction (Ho & Salimans 2022,
                # arXiv:2207.12598, algorithm 1).
                form, t = batch.randint(len(prompts[0])), batch.randint(sd.schedule.timesteps)
                t = t.to(engine.device, non_blocking=True)  # queued, like all that follows: see Trainer._read
                forget = batch.rand() < recipe.text_dropout

                # The noise ε ~ N(0, I) [b d h w], which the UNet has to predict.
                noise = batch.randn(*sd.latent_shape()).to(engine.device, non_blocking=True)
                # z [b d h w]: a sample from q(z|x), times the scale factor. The factor brings z to about variance 1,
                # that of the noise; the noise schedule assumes this.
                if moments is not None:
                    posterior = posterior_of(moments[batch.indices], engine.device)
                else:
                    with engine.autocast():
                        posterior = sd.encode_first_stage(data.batch(batch.indices).to(engine.device))
                z = sd.get_first_stage_encoding(posterior, batch.randn)
                # For inpainting, the mask and the latent of the masked picture, as further input channels; else None.
                maps = condition.maps(sd, data, batch)

                # If the engine uses mixed precision, `autocast` computes convolutions and matrix products in bfloat16.
                # The norms and the loss stay in float32, because bfloat16 has only two to three decimal digits.
                with engine.autocast():
                    # The context that cross-attention reads, [b n d]. A dropped prompt becomes the empty prompt (or,
                    # for classes, the extra class "no class").
                    if condition.frozen and contexts is not None:
                        # looked up: computed before step 0
                        context = contexts[rows[batch.indices, form]].to(engine.device, non_blocking=True)
                        context = text_dropout(context, nothing, forget.to(engine.device, non_blocking=True))
                    else:  # computed in each step: the encoder is being trained, or there are too many prompts
                        choices = zip(batch.indices.tolist(), form.tolist(), forget.tolist(), strict=True)
                        asked = [condition.unconditional if forgot else prompts[i][k] for i, k, forgot in choices]
                        context = sd.get_learned_conditioning(asked)
                    # Mix z_t = √ᾱ_t z + √(1-ᾱ_t) ε, predict the noise, and take the mean squared error of the
                    # prediction, ‖ε - ε_θ(z_t, t, cond)‖², for each picture: [b] (DDPM, eq. 14). If the UNet predicts v
                    # or x_0, it is the error in that.
                    losses = sd.p_losses(z, {"c_crossattn": context, "c_concat": maps}, t, noise, reduction="none")

                # An error in ε is √SNR times the error in ẑ_0 that it causes, so the plain squared error in ε weights
                # the squared error in ẑ_0 by the SNR: 1175 at t = 0 of SD v1, and less than 0.005 at t = 999. The
                # timesteps with little noise then dominate the gradient, although they decide only fine details. The
                # factor min(SNR, γ)/SNR limits the weight of the error in ẑ_0 to γ (Hang et al. 2023, arXiv:2303.09556,
                # section 3.4).
                weight = 1.0
                if recipe.min_snr_gamma is not None:
                    weight = min_snr_weight(sd.schedule.snr(t), recipe.min_snr_gamma, sd.config.parameterization)
                # Backpropagate the weighted mean over the batch. The log also gets the unweighted losses by timestep,
                # because a mean over all timesteps hides which of them still improve.
                trainer.backward((weight * losses).mean(), **by_time(losses.detach(), t, sd.schedule.timesteps))

            # The gradient is now the mean over all batches and processes. Clip it, take the AdamW step, update the EMA.
            trainer.update()
            # From time to time, draw a sample sheet with the EMA weights: the loss says little about the pictures.
            trainer.sheet(data, drawings)
            # Keep the EMA weights of some steps in float16, so that you can compare how the model drew at those steps.
            if step + 1 in keep_at and engine.is_main_process:
                prefix = "model.diffusion_model." if condition.frozen else ""
                weights = {prefix + name: weight for name, weight in trainer.ema.weights.items()}
                write_weights(cast(weights, torch.float16), folder / f"model/after_{step + 1:06d}_steps.safetensors")

    with trainer.finishing():
        if adapter is not None:
            adapter.load_state_dict(trainer.ema.weights)
            if engine.is_main_process:
                adapter.save(folder / adapter.file_name)
            return sd.eval()
        # The finished model gets the EMA weights, not those of the last step. They are loaded into a new UNet, because
        # the trained one is still wrapped by the engine (for DDP) and by torch.compile.
        sd.model.diffusion_model = UNetModel(sd.config.unet).to(engine.device)
        trained = sd.model.diffusion_model if condition.frozen else sd
        trained.load_state_dict(trainer.ema.weights, strict=condition.frozen)
        condition.requires_grad_(False)
        save_model(sd, clip, folder / "model", engine)
    return sd.eval()


class UNetAndCondition(nn.Module):
    """The UNet and a condition that is trained with it, as one module for the optimiser, the EMA and the engine.

    Its parameters have the same names as in the checkpoint of the whole model. (CompVis: cond_stage_trainable.)
    """

    def __init__(self, sd: LatentDiffusion):
        super().__init__()
        self.model, self.cond_stage_model = DiffusionWrapper(sd.model.diffusion_model), sd.cond_stage_model

    def forward(self, x: Tensor, t: Tensor, context: Tensor | None) -> Tensor:
        return self.model(x, t, context)


def by_time(losses: Float[Tensor, "b"], t: Int[Tensor, "b"], timesteps: int, bins: int = 4) -> dict[str, Tensor]:
    """The mean loss in each of `bins` ranges of timesteps, before any weighting: {"loss_t000": …, "loss_t250": …}.

    The sum of the losses in a range is divided by the number of samples that is expected there, because the number in
    this batch may be zero. On average over many steps, which is what the log shows, this is the mean loss of the range.
    """
    which = t * bins // timesteps
    return {f"loss_t{timesteps * k // bins:03d}": bins * (losses * (which == k)).mean() for k in range(bins)}


def assemble(
    config: LatentDiffusionConfig,
    clip_folder: str | Path | None,
    vae_folder: str | Path,
    data: Corpus | None = None,
    condition: str = "captions",
    column: str | None = None,
) -> LatentDiffusion:
    """A model with a newly initialised UNet, the autoencoder of a finished run and, for captions, its text encoder."""
    vae, scale_factor = finished_vae(vae_folder)
    if config.unet.in_channels != vae.config.embed_dim:
        raise ValueError(
            f"the latents of the autoencoder in {vae_folder} have {vae.config.embed_dim} channels, and the UNet takes "
            f"{config.unet.in_channels}: train both with the same preset"
        )
    if column is not None and not CONDITIONS[condition].reads_column:
        raise ValueError(f"{condition} are not read from a column: leave column out (it is {column!r})")
    # The autoencoder's run decides which latents there are, and by which factor they get about unit variance.
    config = replace(config, first_stage=vae.config, scale_factor=scale_factor)
    # For captions, CLIP's run brings the text encoder and the tokenizer that it was trained with.
    clip, tokenizer = None, None
    if issubclass(CONDITIONS[condition], Captions):
        clip, tokenizer = load_clip(clip_folder)
        config = replace(config, cond_stage=clip.text_config)
    # The condition sets how the UNet takes it in: the context's width, or five more input channels for inpainting.
    sd = LatentDiffusion(CONDITIONS[condition].configure(config, data, column), tokenizer)
    # Only the UNet, and a table of classes, keep their random weights. The rest was trained before.
    if clip is not None:
        sd.cond_stage_model.transformer.text_model.load_state_dict(clip.text_model.state_dict())
    sd.first_stage_model = vae
    return sd


@torch.no_grad()
def encode_prompts(sd: LatentDiffusion, prompts: list, engine: Engine, batch_size: int = 512) -> Tensor | None:
    """The contexts of all prompts, [n l d]; None for an unconditional model.

    They are float16 on the CPU to save memory, and all processes share the work.
    """

    def contexts(indices: Int[Tensor, "b"]) -> Float[Tensor, "b l d"]:
        return sd.get_learned_conditioning([prompts[i] for i in indices.tolist()]).half()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the tokenizer would warn about every caption that is too long
        if sd.get_learned_conditioning(prompts[:1]) is None:
            return None
        return encode_shared(contexts, len(prompts), batch_size, engine)
