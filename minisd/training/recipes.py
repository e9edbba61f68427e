"""The default hyperparameters of each preset: `minisd train … --preset NAME` starts from these.

The values of `emoji` and `emoji-64` are meant for a CPU, and `docs/lab_log.md` describes the runs. Those of `sd-v1` are
taken from the papers and have not been run.
"""

from ..presets import VISION, VQ
from .clip import CLIPRecipe
from .unet import UNetRecipe
from .vae import VAERecipe

__all__ = ["CLIP", "FINETUNE", "FINETUNE_DECODER", "UNET", "VAE", "VISION", "VQ"]

CLIP = {
    "tiny": CLIPRecipe(steps=300, batch_size=64),
    "emoji": CLIPRecipe(steps=600, save_every=200),
    "emoji-64": CLIPRecipe(steps=800, save_every=100),
    "sd-v1": CLIPRecipe(steps=400_000, batch_size=32_768, lr=5e-4, warmup=2000, weight_decay=0.2),  # Radford et al.
}

VAE = {
    "tiny": VAERecipe(steps=1500, batch_size=16, lr=2e-3, ema_decay=0.99, rec_power=2),  # colours first: notebook 07
    "emoji": VAERecipe(steps=2000),
    "emoji-64": VAERecipe(steps=4000, batch_size=16, lr=8e-4, ema_decay=0.995, rec_power=2),
    # The KL-f8 of Rombach et al.: CompVis `models/first_stage_models/kl-f8/config.yaml`, `autoencoder.py`. The learning
    # rate is 4.5e-6 times the batch size (`main.py`). No weight decay, no EMA and no gradient clipping.
    "sd-v1": VAERecipe(
        steps=246_803, batch_size=12, lr=12 * 4.5e-6, warmup=0, decay=False, beta1=0.5, beta2=0.9, weight_decay=0.0,
        clip_grad=1e9, ema_decay=0.0, kl_weight=1e-6, perceptual_weight=1.0, disc_start=50_001, disc_weight=0.5,
    ),
}

UNET = {
    "tiny": UNetRecipe(steps=5000, batch_size=32, lr=2e-3, ema_decay=0.99),
    "emoji": UNetRecipe(steps=11_000, sample_every=1000),
    "emoji-64": UNetRecipe(steps=60_000, batch_size=32, lr=7e-4, ema_decay=0.9995, sample_every=2000),
    # the model card of v1: 225,000 steps at 512x512 of batch 2048, after a warm-up of 10,000
    "sd-v1": UNetRecipe(
        steps=225_000, batch_size=2048, lr=1e-4, warmup=10_000, decay=False, min_snr_gamma=None, ema_decay=0.9999
    ),
}

# For training a finished decoder further. The squared error penalises large errors more, the perceptual distance is
# that of CLIP's image tower, and noise on the latents makes the decoder robust to a sampler's small errors.
FINETUNE_DECODER = VAERecipe(
    steps=1000, lr=5e-4, rec_power=2, perceptual_weight=0.1, decoder_only=True, latent_noise=0.6, sample_every=200,
    save_every=200,
)

# For training a finished model on new pictures: a few hundred steps, at a fifth of the learning rate.
FINETUNE = UNetRecipe(steps=400, batch_size=32, lr=2e-4, warmup=50, ema_decay=0.99, sample_every=100, save_every=100)
