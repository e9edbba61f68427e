"""The hyperparameters of each preset, from `recipes.toml`: recipes.UNET["tiny"], and those for a finished model."""

import tomllib
from pathlib import Path

from ..presets import VISION, VQ
from .clip import CLIPRecipe
from .unet import UNetRecipe
from .vae import VAERecipe

__all__ = ["CLIP", "FINETUNE", "FINETUNE_DECODER", "LORA", "TOKEN", "UNET", "VAE", "VISION", "VQ"]

TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
CLIP, VAE, UNET = (
    {name: kind(**{k: None if v == "none" else v for k, v in given.items()}) for name, given in TABLES[part].items()}
    for part, kind in {"clip": CLIPRecipe, "vae": VAERecipe, "unet": UNetRecipe}.items()
)
FINETUNE_DECODER = VAE.pop("finetune")
FINETUNE, LORA, TOKEN = UNET.pop("finetune"), UNET.pop("lora"), UNET.pop("token")
