"""Files of weights: read without running code, checked for names, shapes and NaN, and never left half written.

A `.ckpt` is a pickle, and a pickle is a program: reading it can run any code. Here, only tensors and plain containers
are unpickled (`weights_only=True`). Everything else in the file is refused, or replaced by an object that does nothing.
"""

import json
import os
import pickle
import re
import shutil
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..clip import BPETokenizer, CLIPTextConfig
from ..latent_diffusion import LatentDiffusion, LatentDiffusionConfig


class CheckpointError(ValueError):
    """A file of weights is not what it should be. The message says what is wrong, and what to do."""


# --- reading ----------------------------------------------------------------------------------------------------------


def set_aside(name: str) -> bool:
    """Whether a name is one of those that a CompVis checkpoint has in addition to the weights of the three networks.

    These are the schedule's buffers, the EMA weights, `position_ids` (0, 1, 2, …) and the networks of the autoencoder's
    loss.
    """
    of_ddpm = ("betas", "alphas_", "sqrt_", "log_", "posterior_", "lvlb_", "logvar", "scale_factor")
    return (
        ("." not in name and name.startswith(of_ddpm))
        or name.startswith(("model_ema.", "loss.", "first_stage_model.loss."))
        or name.endswith("position_ids")
    )


def read_weights(
    path: str | Path, check: bool | Callable[[str], bool] = lambda name: not set_aside(name)
) -> dict[str, Tensor]:
    """Names and tensors of a `.safetensors` file or of a PyTorch checkpoint (`.ckpt`, `.pt`, `.pth`, `.bin`).

    If the format allows it, the file is mapped into memory, so that a tensor takes up memory only once it is used.

    check: which names to search for NaN and infinity. By default, these are the names that are loaded and not those of
        `set_aside`, because NaN in an optimiser's state or in an EMA that is not used does no harm. The search reads
        the tensors once, and keeps none of them in memory.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: the file is broken or truncated, or it holds something else than tensors, or NaN.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file of weights at {path}")
    if _is_safetensors(path):
        try:
            state = load_file(path)
        except (safetensors.SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path} is no whole safetensors file ({error}): fetch or save it again") from None
    else:
        state = _table(_unpickle(path), path)
    if check:
        check_numbers(path, [name for name in state if check is True or check(name)], state)
    return state


def check_numbers(path: Path, names: Iterable[str], state: Mapping[str, Tensor]) -> None:
    """Search tensors of a file for NaN and infinity, piece by piece. Raises CheckpointError, which names the first."""
    for name, piece in _pieces(path, {name: state[name] for name in names}):
        if not piece.is_floating_point():
            continue
        piece = piece.float() if piece.element_size() == 1 else piece  # PyTorch can't sum 8-bit floats
        # A sum is NaN or infinite if one of its terms is, and it is fast to compute. Because it may also overflow, the
        # numbers themselves are tested only if the sum is not finite.
        if not piece.sum(dtype=torch.float32).isfinite() and not piece.isfinite().all():
            raise CheckpointError(f"{name} in {path} holds NaN or infinity: the file, or its training, was damaged")


def _is_safetensors(path: Path) -> bool:
    """Whether a file is safetensors, by its suffix or its content: eight bytes that give a length, then JSON."""
    with path.open("rb") as file:
        return path.suffix == ".safetensors" or file.read(9)[8:] == b"{"


def _table(content, path: Path) -> dict[str, Tensor]:
    """The named tensors of an unpickled checkpoint; Lightning nests them beside other things (an epoch, a step)."""
    table = content.get("state_dict", content) if isinstance(content, dict) else None
    table = table if isinstance(table, dict) else {}
    state = {name: tensor for name, tensor in table.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no table of named tensors")
    return state


PIECE = 2**22  # how many numbers of a file are in memory at a time while it is searched


def _pieces(path: Path, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All numbers of a file, piece by piece.

    They are read from the file and not from its memory map, because all of the map would then stay in memory.
    """
    places = _places(path, state) if state else {}
    if places is None:
        yield from state.items()
        return
    buffer = bytearray(8 * PIECE)
    with path.open("rb") as file:
        for name, tensor in state.items():
            if not tensor.is_contiguous():  # a view whose numbers do not lie side by side in the file
                yield name, tensor
                continue
            size = tensor.element_size()
            file.seek(places[name])
            for i in range(0, tensor.numel(), PIECE):
                count = min(PIECE, tensor.numel() - i)
                file.readinto(memoryview(buffer)[: count * size])
                yield name, torch.frombuffer(buffer, dtype=tensor.dtype, count=count)


def _places(path: Path, state: Mapping[str, Tensor]) -> dict[str, int] | None:
    """Where in the file each tensor begins, in bytes; None where that can't be known (see `_can_be_mapped`)."""
    if _is_safetensors(path):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        return {name: 8 + length + header[name]["data_offsets"][0] for name in state}
    if not _can_be_mapped(path):
        return None
    outline = _table(_unpickle(path, "meta"), path)  # on "meta": their shapes and places, without numbers
    outline = {name: outline[name] for name in state}
    storages = {name: tensor.untyped_storage()._checkpoint_offset for name, tensor in outline.items()}
    # PyTorch computes these places from the way in which it packs a zip itself. If another program has packed the file
    # again, they are wrong.
    reader = torch._C.PyTorchFileReader(str(path))
    if not {reader.get_record_offset(record) for record in reader.get_all_records()}.issuperset(storages.values()):
        return None
    return {name: storages[name] + tensor.storage_offset() * tensor.element_size() for name, tensor in outline.items()}


def _can_be_mapped(path: Path) -> bool:
    """Whether a file is an uncompressed zip, so that its tensors can be mapped. PyTorch before 1.6 wrote no zips."""
    try:
        with zipfile.ZipFile(path) as archive:
            return all(record.compress_type == zipfile.ZIP_STORED for record in archive.infolist())
    except zipfile.BadZipFile:
        return False


class Inert:
    """Takes the place of a class of Lightning's while a file is unpickled, and makes a plain mapping that runs no code.

    The official v1 checkpoints hold the state of Lightning's callbacks beside the weights, under the names of their
    classes. It has to be a mapping, because PyTorch's restricted unpickler only lets a file fill plain containers.
    """

    def __new__(cls, *args, **kwargs):
        return OrderedDict()


class InertNumber:
    """Takes the place of a numpy number and of its dtype while a file is unpickled. It accepts and ignores everything.

    CompVis computes its learning rate with `np.cumsum` (`ldm/lr_scheduler.py`), so the official v1 checkpoints hold
    numpy numbers in `lr_schedulers`, beside the weights. minisd does not need them, so it does not let a file call
    numpy: `numpy.dtype` can make any type, and its `__setstate__` trusts the sizes and flags that the file gives it.
    """

    def __new__(cls, *args):
        return super().__new__(cls)

    def __setstate__(self, state):
        pass


# The names in a pickled number, as numpy 1 and 2 write it. (PyTorch itself allows `_codecs.encode`, for its bytes.)
NUMPY_NUMBER = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar", "numpy.dtype")


def _unpickle(path: Path, device: str = "cpu"):
    """torch.load, restricted to tensors and plain containers.

    Lightning's classes are replaced by `Inert`, and numpy's numbers by `InertNumber`. Any other name is refused.
    """
    stand_ins = [(InertNumber, name) for name in NUMPY_NUMBER]
    while True:
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location=device, weights_only=True, mmap=_can_be_mapped(path))
        except pickle.UnpicklingError as error:
            what = re.search(r"GLOBAL ([\w.]+)", str(error))
            if what is None:
                raise CheckpointError(f"{path} was not read: it is broken, or no checkpoint at all") from None
            known = [name for _, name in stand_ins]
            if what[1].split(".")[0] not in ("pytorch_lightning", "lightning") or what[1] in known:
                raise CheckpointError(
                    f"{path} was not read: it holds more than tensors ({what[1]}), and could run a program on being "
                    "read; ask for it as .safetensors"
                ) from None
            stand_ins.append((Inert, what[1]))
        except (RuntimeError, EOFError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            reason = str(error).split("\n")[0].split(". ")[0][:120]
            reason = f" ({reason})" if " " in reason else ""  # a single word is an internal code, of no help
            raise CheckpointError(f"{path} is no whole checkpoint{reason}: fetch or save it again") from None


def read_json(path: Path) -> dict:
    """Read a JSON object from a file. Raises FileNotFoundError, or CheckpointError if it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is no JSON ({error})") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold an object, {{…}}, not a {type(content).__name__}")
    return content


@contextmanager
def refused_as(sentence: str) -> Iterator[None]:
    """Turn whatever a malformed configuration raises inside the `with` into a CheckpointError with the reason."""
    try:
        yield
    except CheckpointError:
        raise
    except (LookupError, ArithmeticError, TypeError, ValueError, AttributeError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:160]
        raise CheckpointError(f"{sentence} ({reason})") from None


def read_tokenizer(folder: Path) -> BPETokenizer:
    """The tokenizer in a folder of transformers' layout. Raises FileNotFoundError, CheckpointError."""
    try:
        return BPETokenizer.load(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def build(config: LatentDiffusionConfig, tokenizer: BPETokenizer | None, source: str | Path) -> LatentDiffusion:
    """Build the model of a configuration on PyTorch's "meta" device, so that it takes up no memory yet.

    Raises:
        CheckpointError: such a model can't be built, or the vocabulary is larger than the text encoder's.
    """
    if isinstance(config.cond_stage, CLIPTextConfig) and len(tokenizer.vocab) > config.cond_stage.vocab_size:
        raise CheckpointError(
            f"the text encoder in {source} knows {config.cond_stage.vocab_size:,} tokens, and the vocabulary has "
            f"{len(tokenizer.vocab):,}: it is that of another model (tokenizer= takes the folder of the right one)"
        )
    try:
        with torch.device("meta"):
            return LatentDiffusion(config, tokenizer)
    except (RuntimeError, ValueError, TypeError, ArithmeticError, LookupError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{source} describes a model that can't be built ({reason})") from None


# --- from a table of tensors into a model -----------------------------------------------------------------------------


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Put weights into a model if, and only if, every name and shape is right.

    The tensors replace the model's own and are not copied, unless `device` or `dtype` differs from theirs. A model that
    was built on PyTorch's "meta" device, where tensors have a shape and no memory, is therefore never in memory twice.

    The names of `set_aside` are ignored. Any other name that the model does not have is an error.

    Raises:
        CheckpointError: names the first few that are missing, superfluous or of another shape.
    """
    own = model.state_dict()
    given = {name: tensor for name, tensor in state.items() if not set_aside(name)}
    check_names({n: t.shape for n, t in own.items()}, {n: t.shape for n, t in given.items()}, source)
    if device is None and own:
        devices = {tensor.device for tensor in own.values()} - {torch.device("meta")}
        device = devices.pop() if len(devices) == 1 else "cpu"
    filled = {}
    for name, meant in own.items():
        kind = (dtype or meant.dtype) if meant.is_floating_point() else meant.dtype
        filled[name] = given[name].to(device, kind)
    model.load_state_dict(filled, assign=True)


def check_names(
    expected: Mapping[str, Iterable], given: Mapping[str, Iterable], source: str | Path, hint: str = ""
) -> None:
    """Compare names and shapes. Raises CheckpointError, which names the first few that differ, and adds the hint."""
    expected, given = ({name: list(shape) for name, shape in table.items()} for table in (expected, given))
    problems = {
        "missing": [name for name in expected if name not in given],
        "superfluous": [name for name in given if name not in expected],
        "of another shape": [
            f"{name} is {given[name]} instead of {shape}"
            for name, shape in expected.items()
            if name in given and given[name] != shape
        ],
    }
    found = [
        f"{len(names)} {kind} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for kind, names in problems.items()
        if names
    ]
    if found:
        raise CheckpointError(f"the weights in {source} do not fit the model: {'; '.join(found)}{hint and '. ' + hint}")


# --- writing ----------------------------------------------------------------------------------------------------------


@contextmanager
def written_whole(path: Path, before: str = "what was there before") -> Iterator[Path]:
    """Yield another name to write a file to, and rename the file to `path` at the end: no half file is left behind.

    Raises:
        OSError: it could not be written. What was at `path`, which the message calls `before`, is still there.
    """
    with _unfinished(path, before) as unfinished:
        yield unfinished
        unfinished.chmod(0o666 & ~_umask())  # some libraries write files that only their owner may read
        on_disk(unfinished)  # otherwise a crash of the machine may leave an empty file under the new name
        os.replace(unfinished, path)
        on_disk(path.parent)


@contextmanager
def folder_written_whole(folder: Path) -> Iterator[Path]:
    """The same for a folder. If there is a folder of that name already, the files are moved into it one by one."""
    with _unfinished(folder) as unfinished:
        unfinished.mkdir()
        yield unfinished
        files = sorted(path for path in unfinished.rglob("*") if path.is_file())
        for file in files:
            on_disk(file)
        if not os.path.lexists(folder):
            os.replace(unfinished, folder)
            return
        for file in files:
            target = folder / file.relative_to(unfinished)
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(file, target)


@contextmanager
def _unfinished(path: Path, before: str = "what was there before") -> Iterator[Path]:
    """Yield the name that a file or folder has until it is complete, and delete what is left under that name."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        remove_unfinished(unfinished)  # left by a process that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch raises RuntimeError on a full disk
        raise OSError(f"could not write {path} ({error}); {before} is untouched") from error
    finally:
        remove_unfinished(unfinished)


def remove_unfinished(path: Path) -> None:
    """Delete an unfinished file, or an unfinished folder with all that is in it, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    elif os.path.lexists(path):
        path.unlink()


def on_disk(path: Path) -> None:
    """Wait until the system has written a file, or a folder's list of names, from its memory to the disk."""
    windows = os.name == "nt"
    if windows and path.is_dir():
        return  # Windows can't open a folder
    handle = os.open(path, os.O_RDWR if windows else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _umask() -> int:
    """The permissions that this user's new files do not get. The system only returns the mask when one is set."""
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


def write_weights(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a `.safetensors` file whole."""
    with written_whole(Path(path)) as unfinished:
        # transformers only reads a file whose metadata say "pt": that it holds PyTorch's weights
        save_file({name: _plain(tensor) for name, tensor in state.items()}, unfinished, {"format": "pt"})


def write_ckpt(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a `.ckpt` file whole: a pickle of {"state_dict": …}, as CompVis has it."""
    with written_whole(Path(path)) as unfinished:
        torch.save({"state_dict": {name: _plain(tensor) for name, tensor in state.items()}}, unfinished)


def _plain(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous()


def cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same tensors, the floating-point ones in another dtype; None leaves them unchanged."""
    return {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in state.items()}


def write_json(content: dict, path: Path) -> None:
    """Write a JSON file whole."""
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
