"""The one format in which a corpus is written: a Hugging Face "imagefolder", with a packed copy for speed.

    FOLDER/images/.../NAME.png     the pictures, for people and other programs
    FOLDER/pictures.npy            the same pictures, uint8 [n h w 3] or, with transparency, [n h w 4], memory-mappable:
                                    all of them open at once; and behind them the size of each file, to see whether it
                                    has changed
    FOLDER/recipe.json             what it was made from
    FOLDER/metadata.jsonl          a line per picture, in the same order: file_name, text and what else is known

metadata.jsonl is written last, so a folder that has one is complete. Until then there is also a folder
FOLDER/.unfinished-FUNCTION, named after the function that makes the corpus. It shows which command made the rest,
because a command may only continue or replace what it has made itself.
"""

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from .captioned_pictures import file_marks, read_metadata, times_of_files
from .text import read_text

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# The functions that write a corpus, by the name that their recipes have as "made_by", and the commands that call them.
# A function without a command is known by its own name.
COMMANDS = {
    "draw_shapes": "minisd data shapes",
    "build_emoji": "minisd data emoji",
    "build_scenes": "minisd data scenes",
    "fetch_dataset": "minisd data hub",
}
DOWNLOADS = "packages"  # where build_emoji keeps what it has downloaded


# Whose folder it is ---------------------------------------------------------------------------------------------------


@contextmanager
def corpus_folder(folder: Path, recipe: dict, what: str = "its corpus") -> Iterator[bool]:
    """Make the folder and lock it, so that no other process writes a corpus into it at the same time.

    Yields whether it holds a complete corpus of this recipe, and says so. If not, the caller makes one, inside the
    `with`. what: the corpus in words.

    Raises ValueError if the folder holds something that the command of this recipe has not made, or if another process
    writes into it; OSError if it cannot be made or written to. In all these cases, nothing in it has been changed. Also
    raises OSError, in one clear sentence, if the disk is full.
    """
    new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = lock(folder)
    except FileExistsError:
        raise ValueError(f"{folder} is not a folder: give a new or an empty one.") from None
    except BlockingIOError:
        raise ValueError(f"another process writes into {folder}: wait for it to end, or give another folder.") from None
    except OSError as error:
        raise OSError(f"the folder {folder} cannot be made ({error.strerror}): give another one.") from None
    try:
        complete = already_there(folder, recipe)
        if complete:  # scratch is still there if the process was killed just before it would have removed it
            shutil.rmtree(folder / unfinished_by(made_by(recipe)), ignore_errors=True)
            print(f"{folder} is complete already: {what}.")
        else:
            refuse_what_others_made(folder, recipe)
            if not os.access(folder, os.W_OK):
                raise PermissionError(f"{folder} cannot be written to: give another folder, or change its permissions.")
        yield complete
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise OSError(f"The disk is full: free some space for {folder} and run again.") from error
        raise
    finally:
        if new:
            with suppress(OSError):  # it stays if anything is in it
                folder.rmdir()
        if handle is not None:
            os.close(handle)


def lock(folder: Path) -> int | None:
    """A handle that keeps other processes out of a folder until it is closed, or until this process is gone.

    None on a system without locks. Raises BlockingIOError if another process holds the folder.
    """
    if not fcntl:
        return None
    handle = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(handle)
        raise
    except OSError:
        pass  # a file system without locks
    return handle


def refuse_what_others_made(folder: Path, recipe: dict) -> None:
    """Raise ValueError if the folder holds anything that the function of this recipe has not made.

    What may be there: nothing, a corpus by the same function, or what that function left when it was interrupted.
    """
    maker, found = made_by(recipe), sorted(os.listdir(folder))
    advice = f"`{COMMANDS.get(maker, maker)}` replaces only what it has made itself: give a new or an empty folder."
    if "metadata.jsonl" in found:
        other = made_by(read_recipe(folder))
        if other != maker:
            what = f"a corpus of `{COMMANDS[other]}`" if other in COMMANDS else "other captioned pictures"
            raise ValueError(f"{folder} holds {what}, and {advice}")
        if added := pictures_added(folder):
            more = f" and {len(added) - 1} more" if added[1:] else ""
            raise ValueError(
                f"{folder} holds a corpus that would be replaced, but {added[0]}{more} in it is not in its "
                f"metadata.jsonl: move that elsewhere, or give a new or an empty folder."
            )
    elif unfinished_by(maker) not in found:
        for other, command in COMMANDS.items():
            if unfinished_by(other) in found:
                raise ValueError(f"{folder} holds an unfinished corpus of `{command}`, and {advice}")
        if found and not (maker == "build_emoji" and only_downloads(folder)):
            more = f" and {len(found) - 1} more" if found[1:] else ""
            raise ValueError(f"{folder} is not empty (it holds {found[0]}{more}), and {advice}")


def made_by(recipe: dict) -> str:
    """The name of the function that makes a corpus of this recipe; "" if the recipe names none."""
    if recipe.keys() >= {"source", "split", "image", "text"}:
        return "fetch_dataset"  # its recipes do not name it
    return str(recipe.get("made_by", ""))


def unfinished_by(maker: str) -> str:
    """The name of the folder in which a function prepares a corpus, and which stays until the corpus is complete."""
    return f".unfinished-{maker}"


def read_recipe(folder: Path) -> dict:
    """recipe.json; an empty dict if there is none, or if it is not a JSON object."""
    try:
        recipe = json.loads(read_text(folder / "recipe.json"))
    except (OSError, ValueError, RecursionError):
        return {}
    return recipe if isinstance(recipe, dict) else {}


def pictures_added(folder: Path) -> list[str]:
    """The files in images/ that metadata.jsonl does not name, so somebody else has put them there."""
    images = folder / "images"
    if images.is_symlink():
        return ["images"]
    named = {row["file_name"] for row in read_metadata(folder)[0]}
    files = (path.relative_to(folder).as_posix() for path in images.rglob("*") if not path.is_dir())
    return sorted(name for name in files if name not in named)


def only_downloads(folder: Path) -> bool:
    """Whether the folder holds only what build_emoji leaves if it is stopped before all pictures are rendered."""
    if os.listdir(folder) != [DOWNLOADS] or not (folder / DOWNLOADS).is_dir():
        return False
    names = os.listdir(folder / DOWNLOADS)  # tmp: the folder in which npm works; .npz: of an older version
    return all(name.endswith((".tgz", ".npz")) or name.startswith("tmp") for name in names)


def already_there(folder: Path, recipe: dict) -> bool:
    """Whether the folder holds a complete corpus of this recipe."""
    return (folder / "metadata.jsonl").exists() and read_recipe(folder) == recipe


# How it is written ----------------------------------------------------------------------------------------------------


def write_corpus(
    folder: Path, rows: list[dict], pictures: UInt8[np.ndarray, "n h w _"], recipe: dict, texts: Mapping[str, str] = {}
) -> None:
    """Write a corpus. At every moment the folder holds the old one, none, or the new one, never half of one.

    rows: one dict per picture, with at least file_name (images/...) and text. recipe: what the corpus is made
    from, which distinguishes it from others. texts: further files, {name: content}. If there is an images/ folder, it
    is replaced: call this inside `corpus_folder`, which checks that it may be.
    """
    if len(rows) != len(pictures):
        raise ValueError(f"{len(rows)} rows cannot describe {len(pictures)} pictures.")
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    files = {**texts, "recipe.json": json.dumps(recipe, indent=2) + "\n", "metadata.jsonl": lines}
    scratch = folder / unfinished_by(made_by(recipe))
    # The scratch folder must stay for as long as there is half a corpus: without it, the same command would be refused
    # when it is run again.
    half = scratch.exists() and not (folder / "metadata.jsonl").exists()
    try:
        # Everything is written to the scratch folder first, so that the old corpus stays as long as possible.
        scratch.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(scratch / "images", ignore_errors=True)  # left by a run that was killed
        for row, picture in zip(rows, pictures, strict=True):
            path = scratch / row["file_name"]
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)
        with (scratch / "pictures.npy").open("wb") as packed:
            np.save(packed, pictures)
            np.save(packed, file_marks(scratch, rows)[:, 0])
        for row, time in zip(rows, times_of_files(scratch / "pictures.npy", len(rows)).tolist(), strict=True):
            os.utime(scratch / row["file_name"], ns=(time, time))
        for name, text in files.items():
            (scratch / name).write_text(text, encoding="utf-8")
        half = True
        (folder / "metadata.jsonl").unlink(missing_ok=True)  # from here to the end, there is no corpus
        shutil.rmtree(folder / "images", ignore_errors=True)
        for name in ("images", "pictures.npy", *files):  # metadata.jsonl last
            os.replace(scratch / name, folder / name)
        half = False
    finally:
        if not half:
            shutil.rmtree(scratch, ignore_errors=True)
