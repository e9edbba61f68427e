"""Read models from files in any of three layouts, and write them in any of the three.

    sd = load()                                        the model that ships
    sd = load("v1-5-pruned.ckpt")                      CompVis: a file; its YAML is config= or beside it, else SD v1
    sd = load("stable-diffusion-v1-5", variant="fp16") diffusers: a folder, or "owner/name" on the Hugging Face hub
    save(sd, "folder", layout="diffusers")

`files.py` reads weights without running code, and never leaves half a file behind. `compvis.py`, `diffusers.py` and
`minisd_folder.py` each read and write one layout. minisd names its parameters as CompVis's checkpoints do, so those
load without renaming.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..clip import BPETokenizer, CLIPModel, CLIPTextConfig
from ..latent_diffusion import LatentDiffusion, LatentDiffusionConfig, enough_memory
from ..presets import PRESETS
from . import compvis, diffusers, files, minisd_folder
from .files import CheckpointError, load_weights, read_json, read_weights, write_json, write_weights
from .minisd_folder import part_from_json, part_to_json, save_clip

SHIPPED = Path(__file__).parents[1] / "weights"  # the models that come with the package: "emoji" and "tiny"
# Folders that runs and models usually lie in. A path into one of them is never looked for on the hub.
LOCAL = ("runs", "data", "models", "checkpoints", "weights", "out", "output", "outputs")
Layout = Literal["minisd", "diffusers", "compvis"]


@enough_memory("take a dtype of half the size, float16 or bfloat16, or a machine with more memory")
def load(
    path: str | Path = "emoji",
    device: str | torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    *,
    config: LatentDiffusionConfig | Mapping | str | Path | None = None,
    use_ema: bool | None = None,
    tokenizer: str | Path | None = None,
    variant: str | None = None,
    ignore: Sequence[str] = (),
) -> LatentDiffusion:
    """Read a model and return it ready to draw.

    Args:
        path: "emoji" (the default) or "tiny", which come with minisd; a minisd folder; a file of weights in such a
            folder, whose tensors replace those of its `model.safetensors`; a CompVis `.ckpt` or `.safetensors`; a
            folder in diffusers' layout; or "owner/name", such a folder on the Hugging Face hub.
        device: "cuda", "mps" or "cpu"; if left out, the fastest that this machine has.
        dtype: what the networks compute in: float32, float16 or bfloat16.
        config: describes a CompVis file: its YAML, or a LatentDiffusionConfig. If left out, the YAML beside the file
            with the same name (`.yaml` or `.yml`) is read. If there is none, the file is read as Stable Diffusion v1
            (with 4 input channels, or 9 for inpainting).
        use_ema: whether to load the EMA weights of a CompVis file that has both kinds. If left out, its YAML decides;
            without a YAML, they are not used.
        tokenizer: a folder with the vocabulary, for a CompVis file whose vocabulary is not CLIP's.
        variant: which weights of a diffusers folder to read, such as "fp16".
        ignore: names of tensors that a CompVis file has beyond those of the model. They are not read. If left out, such
            a name is an error, because it is a sign that the file belongs to another model.

    Raises:
        FileNotFoundError: there is no model at this path. CheckpointError: it can't be used; nothing has been loaded.
        ValueError: an argument that this kind of model does not have.
    """
    path, device = _find(path, variant), find_device(device)
    beside = compvis.yaml_beside(path) if config is None and path.is_file() else None
    of_folder = path.is_dir() or (config is None and beside is None and _in_minisd_folder(path))
    in_diffusers = (path / "model_index.json").is_file()
    unused = {"config": config, "use_ema": use_ema or None, "tokenizer": tokenizer, "ignore": ignore or None}
    unused = (unused if of_folder else {}) | ({} if in_diffusers else {"variant": variant})
    given = [name for name, value in unused.items() if value is not None]
    if given:
        kind = "a folder that says itself what it holds" if of_folder else "one file"
        raise ValueError(f"{path} is {kind}, so that {' and '.join(given)} would be ignored: leave it out")
    if in_diffusers:
        return diffusers.read_folder(path, device, dtype, variant)
    if path.is_dir() and not (path / "config.json").is_file():
        raise FileNotFoundError(
            f"{path} holds no model: it has no config.json (minisd's layout) and no model_index.json (diffusers')"
        )
    if of_folder:
        return minisd_folder.read_folder(path, device, dtype)
    state = {name: tensor for name, tensor in read_weights(path, check=False).items() if name not in ignore}
    try:
        sd, names = _build_compvis(state, path, beside or config, use_ema, tokenizer)
    except CheckpointError as error:
        if beside is None:
            raise
        raise CheckpointError(
            f"{error}; {beside.name} was read because it lies beside {path.name} under the same name: config= takes "
            "another configuration instead"
        ) from None
    # Only what is loaded is searched for NaN. An EMA or a discriminator that is not loaded can do no harm.
    files.check_numbers(path, [*names.values(), *(name for name in ("scale_factor",) if name in state)], state)
    if "scale_factor" in state:  # measured on the first batch of its training (scale_by_std), and kept as a buffer
        with files.refused_as(f"the scale factor in {path} can't be used"):
            sd.config = replace(sd.config, scale_factor=float(state["scale_factor"]))
            sd.scale_factor = sd.config.scale_factor
    load_weights(sd, {ours: state[theirs] for ours, theirs in names.items()}, path, device, dtype)
    return sd.eval()


def _build_compvis(
    state: Mapping[str, Tensor], path: Path, config, use_ema: bool | None, tokenizer: str | Path | None
) -> tuple[LatentDiffusion, dict[str, str]]:
    """Build the model of a CompVis file on the meta device. Return it and {name of a tensor: its name in the file}."""
    if isinstance(config, str | Path | Mapping):
        params = compvis.read_yaml(config)
        of_file = not isinstance(config, Mapping)
        name, base = (str(config), Path(config).parent) if of_file else ("the configuration", Path())
        tokenizer = tokenizer or compvis.tokenizer_folder(params, base)
        use_ema = params.get("use_ema", False) if use_ema is None else use_ema
        config = compvis.config_from_yaml(params, state, name, base)
    elif config is None:
        config = _without_yaml(state)
    names = {name: name for name in state if not files.set_aside(name)}
    if use_ema:
        names |= compvis.ema_names(state, path)
    reader = None
    if isinstance(config.cond_stage, CLIPTextConfig):
        reader = BPETokenizer.clip() if tokenizer is None else files.read_tokenizer(Path(tokenizer))
    sd = files.build(config, reader, path, len(state))
    expected = sd.state_dict()
    only_more = expected.keys() < names.keys()
    hint = "If these names do not matter, give them as ignore=" if only_more else compvis.what_it_is(state)
    files.check_names(expected, {ours: state[theirs] for ours, theirs in names.items()}, path, hint)
    compvis.check_schedule(state, config, path)
    return sd, names


def _without_yaml(state: Mapping[str, Tensor]) -> LatentDiffusionConfig:
    """The configuration of a CompVis file without a YAML: Stable Diffusion v1, or its model for inpainting."""
    first = state.get("model.diffusion_model.input_blocks.0.0.weight")
    inpainting = first is not None and first.ndim == 4 and first.shape[1] == 9  # latent, mask and masked latent
    return PRESETS["sd-v1-inpainting" if inpainting else "sd-v1"]


def _in_minisd_folder(file: Path) -> bool:
    return (file.parent / "config.json").is_file() and (file.parent / "model.safetensors").is_file()


def save(sd: nn.Module, path: str | Path, layout: Layout | None = None, dtype: torch.dtype | None = None) -> None:
    """Write a model, whole or not at all.

    Args:
        sd: a LatentDiffusion. It, or parts of it, may be wrapped by torch.compile or DataParallel.
        path: a folder; or, for CompVis's layout, a file ending in `.safetensors` or `.ckpt`. The YAML is written
            beside the file, and so is a folder with the tokenizer if that is not CLIP's own.
        layout: "minisd"; "diffusers", for `StableDiffusionPipeline.from_pretrained`; or "compvis". If left out, it is
            "compvis" for a file with such an ending, and "minisd" for any other path.
        dtype: of the numbers in the file. float16 halves its size and does not change pictures visibly. If left out,
            the numbers keep the dtype that they have.

    Raises:
        OSError: it could not be written, and what was there before is unchanged; or what is there is something else.
        ValueError: this model can't be written in that layout.
    """
    path, sd = Path(path) if Path(path).name else Path(path).resolve(), _unwrapped(sd)
    is_file = path.suffix in (".safetensors", ".ckpt")
    layout = layout or ("compvis" if is_file else "minisd")
    write = {"minisd": minisd_folder.write_folder, "diffusers": diffusers.write_folder, "compvis": compvis.write_file}
    if layout not in write:
        raise ValueError(f'layout must be "minisd", "diffusers" or "compvis", not {layout!r}')
    if layout == "compvis" and not is_file:
        raise ValueError(f"a CompVis checkpoint is a file ending in .safetensors or .ckpt, and {path} does not")
    write[layout](sd, path, dtype)


def _unwrapped(sd: nn.Module) -> LatentDiffusion:
    """The same tensors in a model without what torch.compile and DataParallel wrap around its parts."""

    def inside(module: nn.Module) -> nn.Module:
        inner = vars(module)["_modules"].get("_orig_mod", vars(module)["_modules"].get("module"))
        return module if inner is None else inside(inner)

    sd = inside(sd)
    state = files.plain_names(sd.state_dict())
    plain = files.build(sd.config, getattr(inside(sd.cond_stage_model), "tokenizer", None), "this model", len(state))
    files.check_names(plain.state_dict(), state, "this model")
    plain.load_state_dict(state, assign=True)
    return plain


def load_clip(path: str | Path = "emoji") -> tuple[CLIPModel, BPETokenizer]:
    """Both CLIP towers of a minisd folder or of a `minisd train clip` run, and their tokenizer."""
    return minisd_folder.load_clip_folder(_find(path))


def has_clip(path: str | Path) -> bool:
    """Whether `load_clip` can read this. It can't if the rest of CLIP is missing, as in diffusers' layout."""
    return files.as_written(_find(path) / "clip.json").is_file()


def describe(path: str | Path, variant: str | None = None) -> str:
    """Describe a file of weights or a model folder: parts, numbers of parameters, dtypes, configuration."""
    path = _find(path, variant)
    if (path / "model_index.json").is_file():
        parts = {part: diffusers.read_part(path / part, variant) for part in diffusers.STEMS}
        state = {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}
        config, layout = asdict(diffusers.read_config(path)), "diffusers' layout"
    else:
        beside = None if path.is_dir() else compvis.yaml_beside(path)
        path = path / "model.safetensors" if path.is_dir() else path
        state = read_weights(path, check=False)
        ours = beside is None and _in_minisd_folder(path)
        config = asdict(minisd_folder.read_config(path.parent)) if ours else None
        if path.stem in ("clip", "vae") and path.with_suffix(".json").is_file():  # of a training run
            config = read_json(path.with_suffix(".json"))
        layout = "minisd's layout" if ours else "one file"
    size = sum(file.stat().st_size for file in ([path] if path.is_file() else path.rglob("*")) if file.is_file())
    lines = [f"{path}: {len(state)} tensors, {size / 1e6:.1f} MB, {layout}"]
    parts: dict[str, list[Tensor]] = {}
    for name, tensor in state.items():
        parts.setdefault(name.split(".")[0] if "." in name else "(schedule)", []).append(tensor)
    for part, tensors in parts.items():
        kinds = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        lines.append(f"  {part:<20} {sum(map(Tensor.numel, tensors)):>13,} parameters, {', '.join(kinds)}")
    if config is None:
        lines.append(f"  {compvis.what_it_is(state) or 'These are the names of no model that minisd knows'}.")
        if beside is not None:
            lines.append(f"  Its configuration is read from {beside.name}, which lies beside it.")
    else:
        lines += [f"  {name}: {value}" for name, value in config.items()]
    return "\n".join(lines)


def _find(path: str | Path, variant: str | None = None) -> Path:
    """The file or folder that a name stands for: one that ships, one on the disk, or one on the hub."""
    written = files.as_written(Path(path))
    if written.exists():
        return written
    if (SHIPPED / str(path) / "config.json").is_file():
        return SHIPPED / str(path)
    on_hub = isinstance(path, str) and path.count("/") == 1 and not path.startswith((".", "/", "~"))
    local = Path(path).parts[:1] and (Path(Path(path).parts[0]).is_dir() or Path(path).parts[0] in LOCAL)
    if on_hub and not local and Path(path).suffix not in (".ckpt", ".safetensors", ".pt", ".pth", ".bin"):
        return diffusers.fetch(path, variant)
    raise FileNotFoundError(
        f"there is no model at {path}: give a file or a folder, 'emoji' or 'tiny', which ship with minisd, or the name "
        "of a model on the Hugging Face hub, owner/name"
    )


def find_device(device: str | torch.device | None = None) -> torch.device:
    """The device of that name, or the fastest of this machine. Raises ValueError if this machine does not have it."""
    wanted = best_device() if device is None else device
    try:
        torch.zeros(1, device=wanted).item()  # PyTorch only notices what is missing when it uses the device
    except Exception as error:  # each kind of device has its own
        reason = str(error).partition("\n")[0][:80]
        raise ValueError(f"this machine has no device {str(wanted)!r} ({reason}): take {best_device()!r}") from None
    return torch.device(wanted)


def best_device() -> str:
    """The fastest device of this machine."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
