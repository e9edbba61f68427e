"""minisd's own layout: the folder of the models that ship, and of those that `minisd train` makes.

config.json          what the model is: the three networks, the schedule, the latent scale factor
model.safetensors    its weights, under the names of `sd-v1-4.ckpt`
tokenizer/           vocab.json and merges.txt, as transformers' CLIPTokenizer has them
clip.safetensors     the rest of CLIP (image tower, projections), which evaluation needs; clip.json describes it
README.md            the model card
"""

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path

import torch
from torch import Tensor

from ..clip import BPETokenizer, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from ..conditions import CONDITIONS
from ..latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from ..unet import UNetConfig
from ..vae import AutoencoderConfig, IdentityConfig
from ..vq import VQConfig
from . import files
from .files import CheckpointError

# The classes of configuration that each part may have. "kind" in config.json names one; without it, the first is meant.
KINDS = {
    "unet": (UNetConfig,),
    "first_stage": (AutoencoderConfig, VQConfig, IdentityConfig),
    "cond_stage": (),  # the Config of each condition; looked up when it is needed, because conditions can be added
}

CLIP_FILES = ("clip.json", "clip.safetensors")
TEXT_TOWER = "cond_stage_model.transformer."

# Fields of older config.json files that are ignored. This one said how a UNet saves memory, which changes no result.
NO_LONGER = {"unet": {"use_checkpoint"}}


def read_folder(path: Path, device: str | torch.device, dtype: torch.dtype) -> LatentDiffusion:
    """The model in a folder. If `path` is a file in it, its tensors are read in place of those of model.safetensors."""
    folder = path if path.is_dir() else path.parent
    config, usual = read_config(folder), folder / "model.safetensors"
    file = usual if path.is_dir() else path
    state = files.read_weights(file)
    if file.name != usual.name and usual.exists():
        # Tensors that `file` replaces are not loaded, so they are not searched for NaN either.
        others = files.read_weights(usual, lambda name: not (files.set_aside(name) or name in state))
        state = others | state
    tokenizer = files.read_tokenizer(folder / "tokenizer") if isinstance(config.cond_stage, CLIPTextConfig) else None
    sd = files.build(config, tokenizer, folder / "config.json", len(state))
    files.load_weights(sd, state, file, device, dtype)
    return sd.eval()


def write_folder(sd: LatentDiffusion, folder: Path, dtype: torch.dtype | None) -> None:
    """Write a model as a minisd folder. The rest of a CLIP that is there stays if the text tower is still its own."""
    config, weights = folder / "config.json", folder / "model.safetensors"
    foreign = b'"first_stage"' not in config.read_bytes() if config.is_file() else weights.exists()
    if foreign or (folder / "model_index.json").exists():
        raise FileExistsError(f"{folder} holds something else than a model in minisd's layout: choose another folder")
    state = files.cast(sd.state_dict(), dtype)
    with files.folder_written_whole(folder) as unfinished:
        tower = {n.removeprefix(TEXT_TOWER): t for n, t in state.items() if n.startswith(TEXT_TOWER)}
        if all((folder / name).is_file() for name in CLIP_FILES) and _equal(tower, _text_tower(folder)):
            for name in CLIP_FILES:
                files.link_or_copy(folder / name, unfinished / name)
        if isinstance(sd.config.cond_stage, CLIPTextConfig):
            sd.cond_stage_model.tokenizer.save(unfinished / "tokenizer", sd.cond_stage_model.max_length)
        parts = {part: part_to_json(getattr(sd.config, part)) for part in KINDS}
        files.write_json(asdict(sd.config) | parts, unfinished / "config.json")
        files.write_weights(state, unfinished / "model.safetensors")


def _text_tower(folder: Path) -> dict[str, Tensor]:
    """The text tower of the model in a folder, under CLIP's names. {} if it has none, or can't be read."""
    try:
        state = files.read_weights(folder / "model.safetensors", check=False)
    except (FileNotFoundError, CheckpointError):
        return {}
    return {name.removeprefix(TEXT_TOWER): t for name, t in state.items() if name.startswith(TEXT_TOWER)}


def _equal(ours: Mapping[str, Tensor], stored: Mapping[str, Tensor]) -> bool:
    """Whether two text towers are the same, in the dtype in which the second is stored."""
    return ours.keys() == stored.keys() and all(torch.equal(ours[n].cpu().to(t.dtype), t) for n, t in stored.items())


def read_config(folder: Path) -> LatentDiffusionConfig:
    """`config.json` of a minisd folder."""
    config = files.read_json(folder / "config.json")
    with files.refused_as(f"{folder / 'config.json'} does not describe a model of minisd"):
        built = {part: part_from_json(part, config.pop(part)) for part in KINDS}
        return LatentDiffusionConfig(**built, **config)


def part_from_json(part: str, values: dict | None):
    """Build the configuration of a part, of the class that "kind" names. JSON's lists become tuples.

    Raises:
        KeyError, TypeError, ValueError: there is no such kind, or it does not take these fields or values.
    """
    if values is None:
        return None
    kinds = KINDS[part] or [condition.Config for condition in CONDITIONS.values()]
    named = {kind.__qualname__: kind for kind in kinds}
    kind = named[values.get("kind", next(iter(named)))]
    given = {name: value for name, value in values.items() if name not in {"kind"} | NO_LONGER.get(part, set())}
    unknown = set(given) - {field.name for field in fields(kind)}
    if unknown:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in given.items()})


def part_to_json(config) -> dict | None:
    """The inverse of `part_from_json`."""
    return None if config is None else {"kind": type(config).__qualname__, **asdict(config)}


def load_clip_folder(folder: Path) -> tuple[CLIPModel, BPETokenizer]:
    """Both CLIP towers of a minisd folder or of a `minisd train clip` run, and their tokenizer."""
    here = files.as_written(folder / "clip.json").parent  # the folder, unless `save_clip` was killed in between
    config = files.read_json(here / "clip.json")
    state = files.read_weights(here / "clip.safetensors")
    if (folder / "model.safetensors").exists():  # the text tower is not stored twice
        whole = files.read_weights(folder / "model.safetensors", check=lambda name: name.startswith(TEXT_TOWER))
        state |= {n.removeprefix(TEXT_TOWER): t for n, t in whole.items() if n.startswith(TEXT_TOWER)}
    tokenizer = files.read_tokenizer(here / "tokenizer")
    with files.refused_as(f"{here / 'clip.json'} does not describe a CLIP"), torch.device("meta"):
        text, vision = CLIPTextConfig(**config["text"]), CLIPVisionConfig(**config["vision"])
        files.check_blocks(len(state), text, vision)
        clip = CLIPModel(text, vision, tokenizer.end_token)
    files.load_weights(clip, state, here / "clip.safetensors", "cpu")
    return clip.eval(), tokenizer


def save_clip(clip: CLIPModel, tokenizer: BPETokenizer, folder: str | Path) -> None:
    """Write both CLIP towers and their tokenizer, without the text tower if a model in the folder holds it already.

    Raises:
        OSError: they could not be written; or the model in the folder has another text tower.
    """
    folder, state = Path(folder), clip.state_dict()
    stored = _text_tower(folder)
    if stored and not _equal({name: t for name, t in state.items() if name.startswith("text_model.")}, stored):
        raise FileExistsError(f"the model in {folder} has another text tower than this CLIP: choose another folder")
    state = {name: tensor for name, tensor in state.items() if name not in stored}
    with files.folder_written_whole(folder / "clip.json", into=folder) as unfinished:
        tokenizer.save(unfinished / "tokenizer", clip.text_config.max_length)
        files.write_weights(files.cast(state, torch.float16), unfinished / "clip.safetensors")
        text, vision = asdict(clip.text_config), asdict(clip.vision_config)
        files.write_json({"text": text, "vision": vision}, unfinished / "clip.json")
