"""The one format in which a corpus is written: a Hugging Face "imagefolder", with a packed copy for speed.

    FOLDER/images/.../NAME.png     the pictures, for people and other programs
    FOLDER/pictures.npy            the same pictures, uint8 [n h w 3], memory-mappable: all of them open at once
    FOLDER/recipe.json             what it was made from
    FOLDER/metadata.jsonl          a line per picture, in the same order: file_name, text and what else is known

metadata.jsonl is written last: where it stands, the corpus is complete.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def already_there(folder: Path, recipe: dict) -> bool:
    """Whether the folder holds a complete corpus of this recipe; one of another recipe will be replaced.

    Raises ValueError where the folder holds captioned pictures that are none of ours to replace.
    """
    if not (folder / "metadata.jsonl").exists():
        return False
    if not (folder / "recipe.json").exists():
        raise ValueError(f"{folder} holds other captioned pictures: give another folder, or remove its metadata.jsonl.")
    return json.loads((folder / "recipe.json").read_text(encoding="utf-8")) == recipe


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Say in one sentence that the disk is full, if it is that."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"The disk is full: free some space for {folder} and run again.") from error
        raise


def write_text(path: Path, text: str) -> None:
    """The whole text or nothing: written under another name, then renamed."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)


def write_corpus(
    folder: Path,
    rows: list[dict],
    pictures: UInt8[np.ndarray, "n h w 3"],
    recipe: dict,
    texts: Mapping[str, str] | None = None,
) -> None:
    """Write a corpus: whoever looks sees the old one, none, or the new one, never half of one.

    rows: one dict per picture, with at least file_name (images/...) and text. recipe: for `already_there`.
    texts: further files, {name: content}.
    """
    if len(rows) != len(pictures):
        raise ValueError(f"{len(rows)} rows cannot describe {len(pictures)} pictures.")
    scratch = folder / ".partial"
    shutil.rmtree(scratch, ignore_errors=True)  # of a run that was killed
    with disk_errors(folder):
        try:
            for row, picture in zip(rows, pictures, strict=True):
                path = scratch / row["file_name"]
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(picture).save(path)
            np.save(scratch / "pictures.npy", pictures)
            (folder / "metadata.jsonl").unlink(missing_ok=True)  # until its successor stands there is no corpus
            shutil.rmtree(folder / "images", ignore_errors=True)
            os.replace(scratch / "images", folder / "images")
            os.replace(scratch / "pictures.npy", folder / "pictures.npy")
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
        for name, text in (texts or {}).items():
            write_text(folder / name, text)
        write_text(folder / "recipe.json", json.dumps(recipe, indent=2) + "\n")
        write_text(folder / "metadata.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
