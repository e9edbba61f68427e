"""Training from scratch: first CLIP, then the autoencoder, then the UNet.

engine.py      the devices that a loop runs on: one, or many by Accelerate
trainer.py     what the three loops share: order of the data, randomness, optimiser, EMA
run_folder.py  the files of a run, of which nothing is ever lost: checkpoints, log
clip.py  vae.py  unet.py    one loop each, one page each
perceptual.py  discriminator.py  codebook.py    what the autoencoder may be trained with beside pixels
"""

from .clip import CLIPRecipe, train_clip
from .engine import Engine, SingleDevice, make_engine
from .perceptual import LPIPS, CLIPPerceptual
from .trainer import EMA, Batch, Recipe, Trainer
from .unet import UNetRecipe, finetune_unet, train_unet
from .vae import VAERecipe, finetune_decoder, train_vae

__all__ = [
    "EMA", "LPIPS", "Batch", "CLIPPerceptual", "CLIPRecipe", "Engine", "Recipe", "SingleDevice", "Trainer",
    "UNetRecipe", "VAERecipe", "finetune_decoder", "finetune_unet", "make_engine", "train_clip", "train_unet",
    "train_vae",
]  # fmt: skip
