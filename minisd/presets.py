"""The presets: the sizes of a model's three networks, by name, from `presets.toml`.

`training/recipes.toml` says how they are trained.
"""

import tomllib
from dataclasses import asdict
from pathlib import Path

from .clip import CLIPTextConfig, CLIPVisionConfig
from .latent_diffusion import LatentDiffusionConfig
from .unet import UNetConfig
from .vae import AutoencoderConfig
from .vq import VQConfig

PARTS = {"unet": UNetConfig, "first_stage": AutoencoderConfig, "cond_stage": CLIPTextConfig}


def configure(kind: type, table: dict):
    """A configuration from a table of TOML, which has neither tuples nor None: lists and "none" stand for them."""
    values = {}
    for name, value in table.items():
        if name in PARTS:
            value = configure(PARTS[name], value)
        values[name] = tuple(value) if isinstance(value, list) else None if value == "none" else value
    return kind(**values)


TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))
# The models that ship, some larger ones to train, and Stable Diffusion v1.
PRESETS = {name: configure(LatentDiffusionConfig, table) for name, table in TABLES["models"].items()}
# The image towers that the text towers of the presets are trained with.
VISION = {name: CLIPVisionConfig(**table) for name, table in TABLES["vision"].items()}
# The first stages with a codebook, `--first-stage vq`: the preset's autoencoder, with n_embed codes instead of a
# variance.
VQ = {
    name: VQConfig(**asdict(PRESETS[name].first_stage) | {"double_z": False}, n_embed=n_embed)
    for name, n_embed in TABLES["codes"].items()
}
