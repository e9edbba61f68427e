"""Training from scratch: first CLIP, then the autoencoder, then the UNet.

clip.py  vae.py  unet.py    the three training loops
perceptual.py  discriminator.py  codebook.py    further parts of the autoencoder's loss and training
trainer.py     what the three loops share: order of the data, random numbers, optimiser, EMA
engine.py      the device that a loop runs on, or several with Accelerate
run_folder.py  the files of a run: checkpoints and log, written so that a crash never damages them
recipes.py     the hyperparameters of the presets, read from recipes.toml
"""

from .clip import CLIPRecipe, train_clip
from .engine import Engine, SingleDevice, make_engine
from .perceptual import LPIPS, CLIPPerceptual
from .trainer import EMA, Batch, Recipe, Trainer
from .unet import UNetRecipe, train_unet
from .vae import VAERecipe, finished_vae, train_vae
