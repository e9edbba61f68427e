"""Files of weights: read without running code, checked for names, shapes and NaN, and never left half written.

A `.ckpt` is a pickle, and a pickle is a program: reading it can run any code. Here, only tensors and plain containers
are unpickled (`weights_only=True`). Everything else in the file is refused, or replaced by an object that does nothing.
"""

import json
import os
import pickle
import re
import shutil
import sys
import warnings
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..clip import BPETokenizer, CLIPTextConfig
from ..latent_diffusion import NO_MEMORY, LatentDiffusion, LatentDiffusionConfig

# "mistaken": how files begin that people take for weights, and what they are. "set_aside": see `set_aside`.
# "tokenizer": the files of one. "model": further files of a model in minisd's or diffusers' layout, which a new model
# in the same folder takes the place of.
TABLES = json.loads(Path(__file__).with_suffix(".json").read_text("utf-8"))
SET_ASIDE = re.compile("|".join(TABLES["set_aside"]), re.DOTALL)


class CheckpointError(ValueError):
    """A file of weights is not what it should be. The message says what is wrong, and what to do, in one line.

    It may quote names and values from the file, which can be very long or not printable, so these are cut or left out.
    """

    def __init__(self, message: str):
        super().__init__(" ".join("".join(c if c.isprintable() else " " for c in message).split())[:1200])


# --- reading ----------------------------------------------------------------------------------------------------------


def set_aside(name: str) -> bool:
    """Whether a name is one of those that a CompVis checkpoint has in addition to the weights of the three networks.

    These are the schedule's buffers, the EMA weights, `position_ids` (0, 1, 2, …), the networks of the autoencoder's
    loss, and what programs that merge models leave behind: k-diffusion's noise levels, and the last layer of CLIP.
    """
    return SET_ASIDE.search(name) is not None


def plain_names(table: Mapping[str, Any]) -> dict[str, Any]:
    """The same table under the names that the tensors have in minisd.

    torch.compile adds `_orig_mod.` to the names of what it wraps, and DataParallel adds `module.`. Some files of 2022
    leave `text_model.` out. If two names would become the same, all of them stay as they are.
    """
    without = {re.sub(r"(?<![^.])(_orig_mod|module)\.", "", name): value for name, value in table.items()}
    of_2022 = re.compile(r"^(cond_stage_model\.transformer\.)(?=embeddings\.|encoder\.|final_layer_norm\.)")
    plain = {of_2022.sub(r"\1text_model.", name): value for name, value in without.items()}
    return plain if len(plain) == len(table) else dict(table)


def check_what_it_is(path: Path) -> None:
    """Raises CheckpointError if a file is a pointer to one or a web page, and says what to do."""
    with path.open("rb") as file:
        begin = file.read(64).lstrip().lower()
    for mark, what in TABLES["mistaken"].items():
        if begin.startswith(mark.encode()):
            raise CheckpointError(f"{path} is {what}")


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
        what = "; what is there is no ordinary file" if path.exists() else ""
        raise FileNotFoundError(f"there is no file of weights at {path}{what}")
    check_what_it_is(path)
    if _is_safetensors(path):
        with refused_as(f"{path} is no whole safetensors file: fetch or save it again"):
            state = plain_names(load_file(path))
    else:
        state = _table(_unpickle(path), path)
    if check:
        check_numbers(path, [name for name in state if check is True or check(name)], state)
    return state


def check_numbers(path: Path, names: Iterable[str], state: Mapping[str, Tensor]) -> None:
    """Search tensors of a file for NaN and infinity, piece by piece. Raises CheckpointError, which names the first.

    The checksums of a `.ckpt`, which is a zip archive, are compared too: PyTorch does not look at those of tensors.
    """
    if zipfile.is_zipfile(path):
        with refused_as(f"{path} is a damaged archive: fetch or save it again"), zipfile.ZipFile(path) as archive:
            written = any(record.CRC for record in archive.infolist())  # PyTorch can be told to leave them out
            if written and (record := archive.testzip()):
                raise CheckpointError(f"{path} is damaged: the checksum of {record} is wrong; fetch or save it again")
    for name, piece in _pieces(path, {name: state[name] for name in names if state[name].is_floating_point()}):
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
    content = content if isinstance(content, dict) else {}
    # The weights are under "state_dict"; in a textual inversion, and in a checkpoint of our trainer, elsewhere.
    table = next((content[key] for key in ("state_dict", "string_to_param", "ema") if key in content), content)
    table = table if isinstance(table, dict) else {}
    state = {name: tensor for name, tensor in table.items() if isinstance(name, str) and isinstance(tensor, Tensor)}
    if not state:
        raise CheckpointError(f"{path} holds no table of named tensors")
    for name, tensor in state.items():
        # A view can repeat its numbers (`expand`): a file of 1 kB could then ask for more memory than there is.
        repeats = tensor.layout != torch.strided or tensor.numel() > 100 + 100 * tensor.untyped_storage().nbytes()
        if repeats or tensor.is_quantized or tensor.is_complex():
            raise CheckpointError(f"{name} in {path} is no plain tensor of numbers: save its values as one")
    return plain_names(state)


PIECE = 2**24  # how many bytes of a file are in memory at a time while it is searched


def _pieces(path: Path, state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All numbers of a file, piece by piece.

    They are read from the file and not from its memory map, because all of the map would then stay in memory.
    """
    places = _places(path, state)
    with path.open("rb") as file:
        for name, tensor in state.items():
            # The numbers of a view may not lie side by side in the file.
            if name not in places or not tensor.is_contiguous():
                yield name, tensor
                continue
            file.seek(places[name])
            for i in range(0, tensor.nbytes, PIECE):
                content = np.fromfile(file, np.uint8, min(PIECE, tensor.nbytes - i))
                yield name, torch.from_numpy(content).view(tensor.dtype)


def _places(path: Path, state: Mapping[str, Tensor]) -> dict[str, int]:
    """Where in the file each tensor begins, in bytes; {} if that can't be known (see `_can_be_mapped`)."""
    if _is_safetensors(path):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = plain_names(json.loads(file.read(length)))
        return {name: 8 + length + header[name]["data_offsets"][0] for name in state}
    if not state or not _can_be_mapped(path):
        return {}
    outline = _table(_unpickle(path, "meta"), path)  # on "meta": their shapes and places, without numbers
    storages = {name: outline[name].untyped_storage()._checkpoint_offset for name in state}
    # PyTorch computes these places from the way in which it packs a zip itself. If another program has packed the file
    # again, they are wrong.
    reader = torch._C.PyTorchFileReader(str(path))
    if not {reader.get_record_offset(record) for record in reader.get_all_records()}.issuperset(storages.values()):
        return {}
    return {n: begin + outline[n].storage_offset() * outline[n].element_size() for n, begin in storages.items()}


def _can_be_mapped(path: Path) -> bool:
    """Whether a file is an uncompressed zip, so that its tensors can be mapped. PyTorch before 1.6 wrote no zips.

    Numbers in the byte order of another machine have to be turned in memory: in a map, PyTorch would crash.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        records = archive.infolist()
    if sum(record.file_size for record in records) > 2**30 + 20 * path.stat().st_size:
        raise CheckpointError(f"{path} would take up far more memory than its size, so it was not read")
    reader = torch._C.PyTorchFileReader(str(path))
    order = reader.get_record("byteorder").decode() if reader.has_record("byteorder") else sys.byteorder
    return order == sys.byteorder and all(record.compress_type == zipfile.ZIP_STORED for record in records)


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
    with refused_as(f"{path} is no whole checkpoint: fetch or save it again"):
        mapped = _can_be_mapped(path)
        stand_ins = [(InertNumber, name) for name in NUMPY_NUMBER] + [(Inert, name) for name in _lightning_names(path)]
        try:
            with torch.serialization.safe_globals(stand_ins):
                return torch.load(path, map_location=device, weights_only=True, mmap=mapped)
        except pickle.UnpicklingError as error:
            what = re.search(r"GLOBAL ([\w.]+)", str(error))
            if what is None:
                raise CheckpointError(f"{path} was not read: it is broken, or no checkpoint at all") from None
            raise CheckpointError(
                f"{path} was not read: it holds more than tensors ({what[1]}), and could run a program on being "
                "read; ask for it as .safetensors"
            ) from None


def _lightning_names(path: Path) -> list[str]:
    """The classes of Lightning that a pickle names. The instruction is a "c", the module, and the class, in lines."""
    if zipfile.is_zipfile(path):
        program = torch._C.PyTorchFileReader(str(path)).get_record("data.pkl")
    else:
        with path.open("rb") as file:
            program = file.read(2**26)  # the numbers come after it
    found = re.findall(rb"c((?:pytorch_)?lightning(?:\.[\w.]+)?)\n([\w.]+)\n", program)
    return sorted({f"{module.decode()}.{name.decode()}" for module, name in found})


def read_text(path: Path, most: int = 2**26) -> str:
    """A text file in UTF-8. Raises CheckpointError if it is something else, or larger than any file of its kind."""
    check_what_it_is(path)
    if path.stat().st_size > most:
        raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes, far too many for such a file")
    with refused_as(f"{path} is no text in UTF-8"):
        return path.read_text(encoding="utf-8-sig")  # some editors on Windows put a mark before the text


def read_json(path: Path) -> dict:
    """Read a JSON object from a file. Raises FileNotFoundError, or CheckpointError if it is not one."""
    if not path.is_file():
        raise FileNotFoundError(f"{path.parent} has no {path.name}")
    with refused_as(f"{path} is no JSON"):
        content = json.loads(read_text(path))
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} should hold an object, {{…}}, not a {type(content).__name__}")
    return content


@contextmanager
def refused_as(sentence: str) -> Iterator[None]:
    """Turn whatever a damaged file raises inside the `with` into a CheckpointError with the reason.

    The libraries that read files raise errors of many kinds, and a damaged file may cause any of them.
    """
    try:
        yield
    except (CheckpointError, FileNotFoundError, PermissionError):
        raise
    except Exception as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        if re.search(NO_MEMORY, reason):
            sentence = f"there is not enough memory: end other programs; or, if there should be enough, {sentence}"
        raise CheckpointError(f"{sentence} ({reason[:160]})") from None


def read_tokenizer(folder: Path) -> BPETokenizer:
    """The tokenizer in a folder of transformers' layout. Raises FileNotFoundError, CheckpointError."""
    for name in TABLES["tokenizer"]:
        if (folder / name).is_file():
            read_text(folder / name)
    try:
        return BPETokenizer.load(folder)
    except ValueError as error:
        raise CheckpointError(str(error)) from None


def build(
    config: LatentDiffusionConfig, tokenizer: BPETokenizer | None, source: str | Path, tensors: int
) -> LatentDiffusion:
    """Build the model of a configuration on PyTorch's "meta" device, so that it takes up no memory yet.

    tensors: how many the file has. A configuration that asks for more blocks than that is refused before they are made.

    Raises:
        CheckpointError: such a model can't be built, or the vocabulary is larger than the text encoder's.
    """
    text = config.cond_stage if isinstance(config.cond_stage, CLIPTextConfig) else None
    with refused_as(f"{source} describes a model that can't be built"), torch.device("meta"):
        check_blocks(tensors, *(part for part in (config.unet, config.first_stage, config.cond_stage) if part))
        largest = max(tokenizer.vocab.values()) if text and isinstance(tokenizer, BPETokenizer) else 0
        if text and largest >= text.vocab_size:
            raise CheckpointError(
                f"the text encoder in {source} knows {text.vocab_size:,} tokens, and the vocabulary has "
                f"{largest + 1:,}: it is that of another model (tokenizer= takes the folder of the right one)"
            )
        return LatentDiffusion(config, tokenizer)


def check_blocks(tensors: int, *parts) -> None:
    """Raises ValueError if these configurations ask for more blocks than a file has tensors: every block has some."""
    for part in parts:
        sizes = vars(part)
        levels = sizes.get("channel_mult") or sizes.get("ch_mult") or (1,)
        blocks = len(levels) * max(1, sizes.get("num_res_blocks", 1)) * max(1, sizes.get("transformer_depth", 1))
        blocks = max(blocks, sizes.get("layers", 0))
        if blocks > max(500, tensors):  # that many are built in a second
            raise ValueError(f"{type(part).__name__} has {blocks:,} blocks, and there are {tensors:,} tensors")


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
    check_dtype(dtype)
    own = model.state_dict()
    check_names(own, {name: tensor for name, tensor in state.items() if not set_aside(name)}, source)
    devices = {tensor.device for tensor in own.values()} - {torch.device("meta")}
    device = device or (devices.pop() if len(devices) == 1 else "cpu")
    filled = {}
    for name, meant in own.items():
        kind = (dtype or meant.dtype) if meant.is_floating_point() else meant.dtype
        filled[name] = state[name].to(device, kind)
    model.load_state_dict(filled, assign=True)


def check_names(
    expected: Mapping[str, Tensor], given: Mapping[str, Tensor], source: str | Path, hint: str = ""
) -> None:
    """Compare names and shapes. Raises CheckpointError, which names the first few that differ, and adds the hint."""
    both = [(name, list(given[name].shape), list(expected[name].shape)) for name in expected if name in given]
    problems = {
        "missing": [name for name in expected if name not in given],
        "superfluous": [name for name in given if name not in expected],
        "of another shape": [f"{name} is {has} instead of {shape}" for name, has, shape in both if has != shape],
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
        os.umask(mask := os.umask(0o22))  # what new files of this user may not get; only setting it returns it
        unfinished.chmod(0o666 & ~mask)  # some libraries write files that only their owner may read
        on_disk(unfinished)  # otherwise a crash of the machine may leave an empty file under the new name
        os.replace(unfinished, path)
        on_disk(path.parent)


@contextmanager
def folder_written_whole(folder: Path, into: Path | None = None) -> Iterator[Path]:
    """The same for files that belong together: yield a folder to write them in, and put them into `into` at the end.

    `into` is `folder` itself if left out. If it does not exist, one renaming is enough. If it does, it may hold other
    files, which stay. Whenever the process is killed, a reader that asks `as_written` finds old files or new ones:

        FOLDER.unfinished is being written              the old ones
        it is renamed to FOLDER.to_be_moved             from now on the new ones, which are there
        they get their places in `into` one by one      as before, because FOLDER.to_be_moved keeps all of them
        FOLDER.to_be_moved is renamed and deleted       the new ones, in their places

    Raises:
        OSError: they could not be written, and the old ones are untouched; or one could not get its place, and the new
            ones are read from FOLDER.to_be_moved until the next save, which begins by moving them.
    """
    into, to_be_moved = into or folder, folder.with_name(folder.name + ".to_be_moved")
    if to_be_moved.is_dir():
        _move(to_be_moved, into)
    with _unfinished(folder) as unfinished:
        if into.exists() and not into.is_dir():
            raise NotADirectoryError(f"{into} is a file, not a folder")
        unfinished.mkdir()
        yield unfinished
        for file in unfinished.rglob("*"):
            if file.is_file():
                on_disk(file)
        if not os.path.lexists(into):
            os.replace(unfinished, into)
            return
        os.replace(unfinished, to_be_moved)
        on_disk(folder.parent)
    _move(to_be_moved, into)


def _move(to_be_moved: Path, into: Path) -> None:
    """Put the files of a folder into their places, and delete the older files there whose place they take."""
    try:
        files = [file.relative_to(to_be_moved) for file in sorted(to_be_moved.rglob("*")) if file.is_file()]
        for file in files:
            with written_whole(into / file) as new:
                link_or_copy(to_be_moved / file, new)
        # Other forms of the same: weights in several files or of a variant, another CLIP, a tokenizer's added words.
        whole = to_be_moved.with_suffix("") == into
        others = [into / file.parent / name for file in files if file.parent.name for name in TABLES["tokenizer"]]
        others += [file for pattern in TABLES["model"] if whole for file in into.glob(pattern)]
        for file in (other.relative_to(into) for other in others if other.is_file()):
            if file not in files and file.parent in {new.parent for new in files}:
                (into / file).unlink()
        on_disk(into)
        unfinished = to_be_moved.with_suffix(".unfinished")
        remove_unfinished(unfinished)
        os.replace(to_be_moved, unfinished)
        remove_unfinished(unfinished)
    except OSError as error:
        raise OSError(
            f"all is written, but {into} could not take it ({error}): it is read from {to_be_moved} as long as that is "
            "there; save again to complete it"
        ) from error


def link_or_copy(file: Path, target: Path) -> None:
    """Give a file a second name, without a copy of its contents where the disk can do that."""
    try:
        os.link(file, target)
    except OSError:
        shutil.copy2(file, target)


def as_written(path: Path) -> Path:
    """Where to read what was written last as `path`: see `folder_written_whole`."""
    beside, above = Path(f"{path.absolute()}.to_be_moved"), Path(f"{path.absolute().parent}.to_be_moved")
    for place in (beside / path.name, beside, above / path.name):  # a file of weights; a folder; a file in a folder
        if path.name and place.exists():
            warnings.warn(f"a save of {path} was interrupted: reading it from {place}", stacklevel=4)
            return place
    return path


@contextmanager
def _unfinished(path: Path, before: str = "what was there before") -> Iterator[Path]:
    """Yield the name that a file or folder has until it is complete, and delete what is left under that name."""
    unfinished = path.with_name(path.name + ".unfinished")
    try:
        if os.path.lexists(path) and not (path.is_file() or path.is_dir()):
            # A device or a pipe, which renaming would remove, or a link to something that is not there.
            raise OSError(f"{path} is neither a file nor a folder")
        remove_unfinished(unfinished)  # left by a process that was killed
        path.parent.mkdir(parents=True, exist_ok=True)
        yield unfinished
    except (OSError, RuntimeError, safetensors.SafetensorError) as error:  # torch raises RuntimeError on a full disk
        reason = error.__cause__ or error  # a file in an unfinished folder has said it before
        hint = "" if isinstance(reason, OSError) else "is the disk full? "
        raise OSError(f"could not write {path} ({hint}{reason}); {before} is untouched") from reason
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
    if os.name == "nt" and path.is_dir():
        return  # Windows can't open a folder
    handle = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_weights(state: Mapping[str, Tensor], path: str | Path) -> None:
    """Write a file of weights whole: a `.ckpt` as CompVis has it, a pickle of {"state_dict": …}; else safetensors."""
    state = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    with written_whole(Path(path)) as unfinished:
        if Path(path).suffix == ".ckpt":
            torch.save({"state_dict": state}, unfinished)
        else:  # transformers only reads a file whose metadata say "pt": that it holds PyTorch's weights
            save_file(state, unfinished, {"format": "pt"})


def cast(state: Mapping[str, Tensor], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The same tensors, the floating-point ones in another dtype; None leaves them unchanged."""
    check_dtype(dtype)
    return {n: t.to(dtype) if dtype is not None and t.is_floating_point() else t for n, t in state.items()}


def check_dtype(dtype: torch.dtype | None) -> None:
    """Raises ValueError if a network can't compute with weights of this dtype. As integers, they would be lost."""
    if dtype not in (None, torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"dtype must be float16, bfloat16, float32 or float64, not {dtype}")


def write_json(content: dict, path: Path) -> None:
    """Write a JSON file whole."""
    with written_whole(path) as unfinished:
        unfinished.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
