"""Captioned pictures from any folder, as tensors.

One class reads every folder: one with a `metadata.jsonl` or `metadata.csv` (the Hugging Face imagefolder convention;
`build_emoji` and `draw_shapes` write the former) and one where NAME.txt holds the caption of NAME.png. Files of any
mode, size and quality come out as square RGB pictures of one size. A file that can't be used is left out and listed in
`skipped`.
"""

import hashlib
import json
import os
import posixpath
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float, Int64, UInt8
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..pictures import open_picture
from .text import printable, read_rows, read_text

SUFFIXES = (".png", ".jpg", ".jpeg", ".gif", ".bmp", ".tif", ".tiff", ".webp")
METADATA = ("metadata.jsonl", "metadata.csv")
IN_MEMORY = 2**30  # bytes: if all pictures fit, they are decoded once and kept; if not, they are read when asked for
SHEET_COLUMNS = 32  # pictures in a row of `pictures.webp`

Skipped = list[tuple[str, str]]  # what was left out, and why


# One picture ----------------------------------------------------------------------------------------------------------


def resized(pictures: UInt8[np.ndarray, "n h h 3"], size: int) -> UInt8[np.ndarray, "n size size 3"]:
    """Resize square pictures: average blocks of whole pixels if the new size divides the old one, else use Lanczos."""
    old = pictures.shape[1]
    if old == size:
        return pictures
    if old % size == 0:
        step = old // size
        blocks = pictures.reshape(-1, size, step, size, step, 3)
        total = blocks.sum((2, 4), dtype=np.uint32)
        return ((total + step**2 // 2) // step**2).astype(np.uint8)
    lanczos = Image.Resampling.LANCZOS  # antialiased: it widens with the step
    return np.stack([np.asarray(Image.fromarray(p).resize((size, size), lanczos)) for p in pictures])


def decode_file(source: str | Path | bytes, size: int | None = None) -> UInt8[np.ndarray, "side side 3"]:
    """The picture in a file, or in a file's bytes: its central square, resized (None: not resized).

    Raises OSError, with the reason in plain words, if there is no picture that can be read.
    """
    picture = open_picture(source)
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    pixels = np.asarray(picture.crop((left, top, left + side, top + side)))
    return resized(pixels[None], size)[0] if size else pixels


# One folder -----------------------------------------------------------------------------------------------------------


def metadata_files(folder: Path) -> list[Path]:
    """The metadata.jsonl and metadata.csv in a folder and its subfolders, the deepest first, except hidden ones."""
    found = [path for path in folder.rglob("metadata.*") if path.name in METADATA and not hidden(path, folder)]
    return sorted(found, key=lambda path: (-len(path.parts), path.parent, METADATA.index(path.name)))


def read_metadata(folder: Path, captions: bool = True) -> tuple[list[dict], Skipped]:
    """The valid rows of all metadata, and what is wrong with the others. captions: whether a row needs a caption.

    Each file names pictures relative to its own folder; the rows that come back, relative to `folder`. A picture that
    two files name has the row of the one that is nearer to it, or of metadata.jsonl.
    """
    rows, skipped, named_in = [], [], {}
    needed = "a file_name and a text" if captions else "a file_name"
    for path in metadata_files(folder):
        place = path.parent.relative_to(folder)
        for number, row in read_rows(path):
            reason = f"no {'JSON object' if path.suffix == '.jsonl' else 'row'} with {needed}"
            try:
                row = json.loads(row) if isinstance(row, str) else row
                name, text = place / row["file_name"], row.get("text") or ""
                inside, said = posixpath.normpath(name.as_posix()), text.strip().encode()  # refuses half a character
                if name.anchor or inside.split("/")[0] == "..":
                    reason = "the file_name leads out of the folder"
                elif named_in.setdefault(inside, path) != path:
                    reason = f"{inside} is in {named_in[inside].relative_to(folder)}, too"
                elif said or not captions:
                    rows.append(row | {"file_name": inside})
                    continue
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                pass
            skipped.append((f"{(place / path.name).as_posix()}:{number}", reason))
    return rows, skipped


def hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def picture_files(folder: Path) -> list[str]:
    """The names of all pictures in a folder and its subfolders, except hidden ones."""
    paths = (path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and not hidden(path, folder))
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def read_files(folder: Path, captions: bool = True) -> tuple[list[dict], Skipped]:
    """A row for each picture, with the caption from NAME.txt beside NAME.png, and the pictures without one.

    A picture in a subfolder also has a "folder": the subfolder's name. captions: whether a picture needs one.
    """
    rows, skipped, guessed = [], [], []
    for name in picture_files(folder):
        path = folder / name
        beside = path.with_suffix(".txt")
        try:
            caption = " ".join(read_text(beside, guessed).split()) if beside.exists() else ""
            if captions and not caption:
                raise ValueError("no caption")
        except ValueError as error:
            skipped.append((name, str(error)))
            continue
        rows.append({"file_name": name, "text": caption})
        if path.parent != folder:
            rows[-1]["folder"] = path.parent.name
    if guessed:
        others = f", nor are {len(guessed) - 1} others" if guessed[1:] else ""
        said = printable(f"{guessed[0]}{others}: read as Windows-1252, save as UTF-8 if that is wrong")
        warnings.warn(said, stacklevel=4)
    return rows, skipped


def read_templates(folder: Path) -> tuple[str, ...]:
    """The forms in which captions are trained on: the lines of templates.txt, or the bare caption without that file."""
    path = folder / "templates.txt"
    if not path.is_file():
        return ("{}",)
    lines = [line.strip() for line in read_text(path).split("\n")]
    templates = tuple(line for line in lines if line)
    wrong = [line for line in templates if not re.fullmatch(r"[^{}]*\{}[^{}]*", line)]
    if wrong or not templates:
        found = f'"{wrong[0]}"' if wrong else "nothing"
        raise ValueError(
            f"{path} holds {found}: write one form of a caption a line, in which {{}} stands for the caption, such as "
            f'"a picture of {{}}", or remove the file to train on the captions as they are.'
        )
    return templates


def file_marks(folder: Path, rows: list[dict]) -> Int64[np.ndarray, "n 2"]:
    """The size of each row's file, and the time of its last change. Raises OSError or ValueError if one is missing."""
    found = (os.stat(f"{folder}/{row['file_name']}") for row in rows)
    return np.array([(file.st_size, file.st_mtime_ns) for file in found], np.int64)


def times_of_files(packed: Path, count: int) -> Int64[np.ndarray, "n"]:
    """The times that `write_corpus` gives to the files: a microsecond apart, the last one before pictures.npy's own.

    So a picture that is changed, replaced or moved has another time, and yet the same corpus has the same bytes.
    """
    return packed.stat().st_mtime_ns - 1000 * np.arange(count, 0, -1)


def read_packed(folder: Path, rows: list[dict]) -> UInt8[np.ndarray, "n h w 3"] | None:
    """`pictures.npy` (memory-mapped) or the smaller `pictures.webp`, if one of them is there and equals the files.

    `write_corpus` records the sizes of all files behind the pictures in pictures.npy, and sets their times. A file with
    another size or another time may have changed, so its picture is compared. (All are, if they come from an earlier
    version of minisd, which recorded nothing, or were copied without their times.)
    """
    path, compared = folder / "pictures.npy", range(len(rows))
    try:
        if path.is_file():
            packed, marks = np.load(path, mmap_mode="r"), file_marks(folder, rows)
            with path.open("rb") as file, suppress(ValueError, EOFError):
                file.seek(packed.offset + packed.nbytes)
                written = np.stack([np.load(file), times_of_files(path, len(rows))], 1)
                compared = np.flatnonzero((marks != written).any(1))
        elif (folder / "pictures.webp").is_file():
            packed = read_sheet(folder / "pictures.webp", len(rows))
            compared = [i for i in compared if (folder / rows[i]["file_name"]).exists()]  # the sample has no such files
        else:
            return None
        size = packed.shape[1] if packed.ndim == 4 else 0
        if packed.dtype != np.uint8 or packed.shape != (len(rows), size, size, 3):
            return None
        for i in tqdm(compared, "comparing pictures", disable=len(compared) < 2000):
            if not np.array_equal(decode_file(folder / rows[i]["file_name"], size), packed[i]):
                return None
    except Exception:  # it is broken, in one of many ways: the files are read instead, and errors name them
        return None
    return packed


def read_sheet(path: Path, count: int) -> UInt8[np.ndarray, "n h w 3"]:
    """The pictures of a contact sheet: SHEET_COLUMNS in a row, in the order of metadata.jsonl."""
    page = np.asarray(open_picture(path))
    size = page.shape[1] // SHEET_COLUMNS
    return rearrange(page, "(row h) (column w) c -> (row column) h w c", h=size, w=size)[:count]


# The classes ----------------------------------------------------------------------------------------------------------


class Corpus(Dataset):
    """What a training takes: captioned pictures of one size. The rest follows from `pixels`, `captions`, `templates`.

    A class of your own, of pictures that are computed, say, has these three and `size`, `__len__`, `describe(i)` and
    `fingerprint`: see `CaptionedPictures`. For `--condition classes` it also has `column(name)`.

    Attributes: `size` (of the square pictures), `captions` (list of str), `templates` (tuple of str: the forms in which
    a caption is trained on, where "{}" stands for it).
    """

    templates: tuple[str, ...] = ("{}",)

    def pixels(self, indices: Sequence[int]) -> UInt8[np.ndarray, "b h w 3"]:
        """The pictures at these indices, as they are stored."""
        raise NotImplementedError

    def __getitem__(self, i: int) -> tuple[Float[Tensor, "3 h w"], str]:
        """Picture i, float32 in [-1, 1], and its caption."""
        return self.batch([range(len(self))[i]])[0], self.captions[i]  # range checks i, and takes -1 as the last

    def batch(self, indices: Sequence[int] | np.ndarray | Tensor) -> Float[Tensor, "b 3 h w"]:
        """The pictures at these indices: float32 in [-1, 1]."""
        pixels = torch.from_numpy(self.pixels(np.asarray(indices)))
        return pixels.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1

    @property
    def wordings(self) -> list[list[str]]:
        """Each caption in the form of every template."""
        return [[template.format(caption) for template in self.templates] for caption in self.captions]

    def identified_by(self, what: str, content: list) -> str:
        """A fingerprint: how many pictures, or scenes, of which size, and a hash of what they are made from."""
        digest = hashlib.sha256(json.dumps(content).encode()).hexdigest()
        return f"{len(self)} {what} of {self.size}x{self.size} ({digest[:12]})"


class CaptionedPictures(Corpus):
    """The pictures of a folder and their captions.

    folder: with `metadata.jsonl` (a JSON object a line: file_name, text, and whatever else is known) or `metadata.csv`,
        or with captions in NAME.txt beside NAME.png, .jpg, .webp, .gif, .bmp or .tif; subfolders are read too.
    size: of the square pictures that come out; None: the packed size, or the smallest shorter side among the files,
        so that none is enlarged.
    split: only the rows whose "split" says so ("train", "test_pair", "test_concept" in our corpora); a row without
        one is in "train". None: all rows.
    captions: whether a picture needs a caption. If False, a picture without one is used too, with the caption "".

    Attributes: `rows` (list of dicts, at least file_name), `captions` (list of str), `templates` (tuple of str: the
    forms in which a caption is trained on, where "{}" stands for it), `images` (uint8 [n h w 3], all at `size`),
    `size`, `skipped` (list of (path, reason); a warning sums them up). `column("concept")` is one entry of each row.

    Raises FileNotFoundError if there is no such folder, ValueError if nothing in it can be used.
    """

    def __init__(self, folder: str | Path, size: int | None = None, split: str | None = None, captions: bool = True):
        self.folder = folder = Path(folder).expanduser()
        if size is not None and size < 1:
            raise ValueError(f"size is {size}; it is the width of the pictures in pixels, so at least 1.")
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder} is no folder: give one that holds captioned pictures.")
        self.templates = read_templates(folder)
        packed = None
        if metadata := metadata_files(folder):
            rows, self.skipped = read_metadata(folder, captions)
            packed = read_packed(folder, rows) if rows and not self.skipped else None
            if packed is None:
                named, where = {row["file_name"] for row in rows}, metadata[-1].name
                self.skipped += [(n, f"no line in {where}") for n in picture_files(folder) if n not in named]
        else:
            rows, self.skipped = read_files(folder, captions)

        chosen = [i for i, row in enumerate(rows) if split in (None, row.get("split") or "train")]
        if rows and not chosen:
            have = sorted({str(row.get("split") or "train") for row in rows})
            raise ValueError(f'{folder} has no pictures in the split "{split}"; it has {", ".join(have)}.')
        self.rows = [rows[i] for i in chosen]
        self._packed, self._index = packed, np.array(chosen, int)
        if packed is not None:
            self.size = size or packed.shape[1]
        else:
            # Read every file once, to find those that can't be read; or twice, if their size has to be found first.
            # Keep all pixels if there is memory for them.
            self.size = size or min((len(picture) for picture in self._readable(None)), default=1)
            keep = self._fits_in_memory()
            pictures = [picture if keep else None for picture in self._readable(self.size)]
            if keep and pictures:
                self.images = np.stack(pictures)
        self.captions = [row.get("text") or "" for row in self.rows]
        self._report(captions)

    def _fits_in_memory(self) -> bool:
        return len(self.rows) * self.size**2 * 3 <= IN_MEMORY

    def _readable(self, size: int | None) -> Iterator[UInt8[np.ndarray, "side side 3"]]:
        """The picture of each row. A row whose file can't be read leaves `rows`, and goes to `skipped`."""
        rows, self.rows = self.rows, []
        for row in tqdm(rows, "reading pictures", disable=len(rows) < 2000):
            path = self.folder / row["file_name"]
            try:
                picture = decode_file(path, size)
            except OSError as error:
                self.skipped.append((row["file_name"], str(error).removeprefix(f"{path}: ")))
            else:
                self.rows.append(row)
                yield picture

    def _report(self, captions: bool) -> None:
        """Warn in one sentence of what was left out, or raise ValueError if nothing is left."""
        named = [printable(f"{name} ({reason})") for name, reason in self.skipped[:5]]
        if len(self.skipped) > 5:
            named.append(f"and {len(self.skipped) - 5} more (all are in CaptionedPictures.skipped)")
        if not self.rows:
            why = f"; left out: {', '.join(named)}" if named else ""
            kind, columns, beside = "picture", "file_name", ""
            if captions:
                kind, columns, beside = "captioned picture", "file_name, text", " with their captions in .txt files"
            raise ValueError(
                f"{self.folder} holds no {kind} that can be used: it takes a metadata.jsonl ({columns}), or pictures "
                f"({', '.join(SUFFIXES)}){beside}{why}."
            )
        if self.skipped:
            total = len(self.skipped) + len(self.rows)
            warnings.warn(f"{self.folder}: {len(self.skipped)} of {total} left out: {', '.join(named)}.", stacklevel=3)

    def __len__(self) -> int:
        return len(self.rows)

    def pixels(self, indices: np.ndarray) -> UInt8[np.ndarray, "b h w 3"]:
        return self.images[indices] if self._fits_in_memory() else self._read(indices)

    def column(self, name: str) -> list:
        """One entry of each row, such as "concept", or "folder" if the pictures are in subfolders.

        Raises ValueError, in one sentence, if a row has no such entry.
        """
        lacking = [row["file_name"] for row in self.rows if row.get(name) is None]
        if not lacking:
            return [row[name] for row in self.rows]
        advice = "write one into each line of metadata.jsonl, or name another column"
        if not metadata_files(self.folder):
            advice = 'sort all pictures into subfolders and name the column "folder", or write a metadata.jsonl'
        raise ValueError(
            f'{len(lacking)} of {len(self)} pictures in {self.folder} have no "{name}", such as {lacking[0]}: {advice}.'
        )

    def describe(self, i: int) -> str:
        """Picture i in words, for a message: its index, file and caption."""
        return f"{i} ({self.rows[i]['file_name']}: {self.captions[i]!r})"

    @property
    def fingerprint(self) -> str:
        """A short text that differs between corpora: how many pictures, their size, a hash of file names and captions.

        The pixels are not hashed, because that would take too long for a large corpus.
        """
        named = [(row["file_name"], caption) for row, caption in zip(self.rows, self.captions, strict=True)]
        return self.identified_by("pictures", named)

    @cached_property
    def images(self) -> UInt8[np.ndarray, "n h w 3"]:
        """All pictures as one array at `size`; made when first asked for, and kept."""
        parts = np.array_split(np.arange(len(self)), len(self) // 4096 + 1)
        return np.concatenate([self._read(part) for part in parts])

    def _read(self, indices: np.ndarray) -> UInt8[np.ndarray, "b h w 3"]:
        if self._packed is not None:
            return resized(self._packed[self._index[indices]], self.size)
        return np.stack([decode_file(self.folder / self.rows[i]["file_name"], self.size) for i in indices])
