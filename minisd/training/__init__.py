"""Training from scratch: first CLIP, then the autoencoder, then the UNet.

engine.py    the device that a loop runs on; an `accelerate.Accelerator` fits the same place
trainer.py   what the three loops share: order of the data, optimiser, EMA, checkpoints, log
clip.py  vae.py  unet.py    one loop each, one page each
"""

from .clip import CLIPRecipe, train_clip
from .engine import SingleDevice
from .trainer import EMA, Recipe, Trainer
from .unet import UNetRecipe, finetune_unet, train_unet
from .vae import VAERecipe, train_vae

__all__ = [
    "EMA", "CLIPRecipe", "Recipe", "SingleDevice", "Trainer", "UNetRecipe", "VAERecipe",
    "finetune_unet", "train_clip", "train_unet", "train_vae",
]  # fmt: skip
