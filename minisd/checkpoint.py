"""Weights in files: read them safely, check them by name and shape, write them whole.

A minisd folder holds

    config.json          what the model is: the three networks, the schedule, the latent scale factor
    model.safetensors    its weights, under the names of `sd-v1-4.ckpt`
    tokenizer/           vocab.json and merges.txt, as transformers' CLIPTokenizer has them
    clip.safetensors     the rest of CLIP (image tower, projections), which evaluation needs; clip.json describes it
    README.md            the model card
"""

import json
import os
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .clip import BPETokenizer, CLIPModel, CLIPTextConfig, CLIPVisionConfig
from .latent_diffusion import LatentDiffusion, LatentDiffusionConfig
from .unet import UNetConfig
from .vae import AutoencoderConfig

SHIPPED = Path(__file__).parent / "weights"  # the models that come with the package: "emoji" and "tiny"


class CheckpointError(ValueError):
    """A file of weights that is not what it should be; the message says what, and what to do."""


def load(path: str | Path = "emoji", device: str | torch.device | None = None) -> LatentDiffusion:
    """Read a model, ready to draw.

    Args:
        path: "emoji" (the default) or "tiny", the models that ship; a minisd folder; or a file of weights
            (.safetensors or .ckpt) in such a folder, whose tensors take the place of those of its `model.safetensors`.
        device: "cuda", "mps" or "cpu"; the best that is there where it is left out.

    Raises:
        FileNotFoundError: nothing is there. CheckpointError: what is there can't be used.
    """
    path = _find(path)
    folder, weights = (path, path / "model.safetensors") if path.is_dir() else (path.parent, path)
    state = read_weights(weights)
    config = read_config(folder)
    if weights.name != "model.safetensors" and (folder / "model.safetensors").exists():
        state = read_weights(folder / "model.safetensors") | state
    if not (folder / "tokenizer" / "vocab.json").exists():
        raise FileNotFoundError(f"{folder} has no tokenizer: expected {folder / 'tokenizer' / 'vocab.json'}")
    sd = LatentDiffusion(config, BPETokenizer.load(folder / "tokenizer"))
    load_weights(sd, state, weights)
    return sd.to(device or best_device()).eval()


def save(sd: LatentDiffusion, folder: str | Path) -> None:
    """Write a model as a minisd folder, in float16, which halves the size and changes no picture visibly."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    sd.cond_stage_model.tokenizer.save(folder / "tokenizer", sd.cond_stage_model.max_length)
    write_json(asdict(sd.config), folder / "config.json")
    write_weights(half(sd.state_dict()), folder / "model.safetensors")


def load_clip(path: str | Path = "emoji") -> tuple[CLIPModel, BPETokenizer]:
    """Both CLIP towers of a minisd folder or of a `minisd train clip` run, and their tokenizer."""
    folder = _find(path)
    config = read_json(folder / "clip.json")
    state = read_weights(folder / "clip.safetensors")
    if (folder / "model.safetensors").exists():  # the text tower is not stored twice
        prefix = "cond_stage_model.transformer."
        whole = read_weights(folder / "model.safetensors")
        state |= {name.removeprefix(prefix): tensor for name, tensor in whole.items() if name.startswith(prefix)}
    tokenizer = BPETokenizer.load(folder / "tokenizer")
    text, vision = CLIPTextConfig(**config["text"]), CLIPVisionConfig(**config["vision"])
    clip = CLIPModel(text, vision, tokenizer.end_token)
    load_weights(clip, state, folder / "clip.safetensors")
    return clip.eval(), tokenizer


def save_clip(clip: CLIPModel, tokenizer: BPETokenizer, folder: str | Path) -> None:
    """Write both CLIP towers and their tokenizer; beside a model that holds the text tower, only what it lacks."""
    folder = Path(folder)
    beside_model = (folder / "model.safetensors").exists()
    state = {k: v for k, v in clip.state_dict().items() if not (beside_model and k.startswith("text_model."))}
    tokenizer.save(folder / "tokenizer", clip.text_config.max_length)
    write_json({"text": asdict(clip.text_config), "vision": asdict(clip.vision_config)}, folder / "clip.json")
    write_weights(half(state), folder / "clip.safetensors")


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Names and tensors of a `.safetensors` file or of a PyTorch checkpoint (`.ckpt`, `.pt`, `.pth`, `.bin`).

    A PyTorch checkpoint is a pickle, and a pickle can run any program when it is read: only tensors and plain
    containers are let in (`weights_only=True`), everything else is refused.

    Raises:
        FileNotFoundError: no such file. CheckpointError: broken, truncated, or holding more than tensors.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights at {path}")
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no whole safetensors file ({error}): fetch or save it again") from None
    try:
        # only a zip can be mapped into memory; PyTorch before 1.6 wrote none
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as error:
        if "GLOBAL " not in str(error):
            raise CheckpointError(f"{path} was not read: it is broken, or no checkpoint at all") from None
        what = str(error).split("GLOBAL ")[-1].split(" ")[0]
        raise CheckpointError(
            f"{path} was not read: it holds more than tensors ({what}), and could run a program on being read; "
            "ask for it as .safetensors"
        ) from None
    except (
        RuntimeError,
        EOFError,
        OSError,
        ValueError,
        KeyError,
        IndexError,
        AttributeError,
        UnicodeDecodeError,
    ) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0].split(". ")[0][:120]
        raise CheckpointError(f"{path} is no whole checkpoint ({reason}): fetch or save it again") from None
    if isinstance(state, dict):
        state = state.get("state_dict", state)
    if not isinstance(state, dict) or not state or not all(isinstance(v, Tensor) for v in state.values()):
        raise CheckpointError(f"{path} holds no table of named tensors")
    return state


def write_weights(state: dict[str, Tensor], path: str | Path) -> None:
    """Write a `.safetensors` file whole."""
    with written_whole(Path(path)) as unfinished:
        save_file({name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}, unfinished)


@contextmanager
def written_whole(path: Path, before: str = "what was there before") -> Iterator[Path]:
    """Gives another name to write to, and renames it to `path` once that is done: no half file is left behind.

    Raises:
        OSError: it could not be written; what stood at `path`, which the message calls `before`, still stands there.
    """
    unfinished = path.with_name(path.name + ".unfinished")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield unfinished
        os.replace(unfinished, path)
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch makes a RuntimeError of a full disk
        unfinished.unlink(missing_ok=True)
        raise OSError(f"could not write {path} ({error}); {before} is untouched") from error


def half(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors in float16."""
    return {name: tensor.half() for name, tensor in state.items()}


def load_weights(model: nn.Module, state: dict[str, Tensor], source: str | Path) -> None:
    """Copy weights into a model if, and only if, every name and shape is right.

    Names that a checkpoint may have beyond the model's are the schedule's buffers, `model_ema.…` and `position_ids`.

    Raises:
        CheckpointError: names the first few that are missing, superfluous or of another shape.
    """
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    given = {name: tuple(tensor.shape) for name, tensor in state.items() if not _ignored(name)}
    missing = [name for name in expected if name not in given]
    superfluous = [name for name in given if name not in expected]
    misshapen = [
        f"{name} is {list(given[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in given and given[name] != shape
    ]
    problems = {"missing": missing, "superfluous": superfluous, "of another shape": misshapen}
    found = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(f"the weights in {source} do not fit the model: {'; '.join(found)}")
    model.load_state_dict({name: state[name] for name in expected})


def _ignored(name: str) -> bool:
    schedule = "." not in name and name.startswith(("betas", "alphas_", "sqrt_", "log_", "posterior_", "lvlb_"))
    return schedule or name.startswith("model_ema.") or name.endswith("position_ids")


def read_config(folder: Path) -> LatentDiffusionConfig:
    """`config.json` of a minisd folder."""
    config = read_json(folder / "config.json")
    parts = {"unet": UNetConfig, "first_stage": AutoencoderConfig, "cond_stage": CLIPTextConfig}
    try:
        built = {name: _dataclass(kind, config.pop(name)) for name, kind in parts.items()}
        return LatentDiffusionConfig(**built, **config)
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{folder / 'config.json'} does not describe a model of minisd ({error})") from None


def _dataclass(kind: type, values: dict):
    """JSON has lists where the configs have tuples."""
    unknown = set(values) - {field.name for field in fields(kind)}
    if unknown:
        raise TypeError(f"{kind.__name__} has no {', '.join(sorted(unknown))}")
    return kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def read_json(path: Path) -> dict:
    """A JSON object from a file, or one sentence on what is wrong with it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} is no folder of minisd: it has no {path.name}")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error})") from None


def write_json(content: dict, path: Path) -> None:
    """Write a JSON file whole."""
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def describe(path: str | Path) -> str:
    """What is in a file of weights or a model folder: parts, numbers of parameters, kind of numbers, configuration."""
    path = _find(path)
    file = path / "model.safetensors" if path.is_dir() else path
    state = read_weights(file)
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        parts.setdefault(name.split(".")[0] if "." in name else "(schedule)", []).append(tensor)
    lines = [f"{file}: {len(state)} tensors, {file.stat().st_size / 1e6:.1f} MB"]
    for part, tensors in parts.items():
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        lines.append(f"  {part:<20} {sum(map(Tensor.numel, tensors)):>13,} parameters, {', '.join(kinds)}")
    if (file.parent / "config.json").exists():
        for name, value in asdict(read_config(file.parent)).items():
            lines.append(f"  {name}: {value}")
    return "\n".join(lines)


def _find(path: str | Path) -> Path:
    if (SHIPPED / str(path)).is_dir() and not Path(path).exists():
        return SHIPPED / str(path)
    if not Path(path).exists():
        raise FileNotFoundError(
            f"there is no model at {path}: give a folder, or 'emoji' or 'tiny', which ship with minisd"
        )
    return Path(path)


def best_device() -> str:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
