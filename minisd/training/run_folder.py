"""The folder of a run, and how its files survive a crash.

    checkpoint_000500.pt     everything that is needed to continue the run; the newest `keep` of them
    log.jsonl                a line of figures for every `log_every` steps
    model/                   the finished model

A process may be killed at any moment, and a disk may be full. A run continues from the newest checkpoint that is
complete, and from the lines of the log up to it. All later steps are computed again.
"""

import json
import os
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..checkpoint import load_clip, save, save_clip
from ..checkpoint.files import on_disk, remove_unfinished, written_whole
from ..data.folder import lock
from ..latent_diffusion import LatentDiffusion
from .engine import Engine

LOCKED: dict[Path, int | None] = {}  # the folders that this process has locked


class RunFolder:
    """The files of one run. All processes read them; only the main one writes."""

    def __init__(self, path: str | Path, keep: int = 1):
        self.path, self.keep = Path(path), keep
        self.log = self.path / "log.jsonl"

    def open(self) -> None:
        """Create the folder and lock it, so that no other process can train in it at the same time.

        Raises ValueError if another process has locked it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.path.resolve() not in LOCKED:
            try:
                LOCKED[self.path.resolve()] = lock(self.path)
            except BlockingIOError:
                raise ValueError(f"another process trains in {self.path}: end it, or choose another folder") from None
        # A process that was killed may have left a half-written file, or a half-written folder of the finished model.
        for left_over in self.path.glob("*.unfinished"):
            remove_unfinished(left_over)

    def close(self) -> None:
        """Unlock the folder for other processes."""
        handle = LOCKED.pop(self.path.resolve(), None)
        if handle is not None:
            os.close(handle)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """The paths of all checkpoints, the oldest first. A pipe, or a name without a number, is none."""
        named = {path: path.stem.removeprefix("checkpoint_") for path in self.path.glob("checkpoint_*.pt")}
        numbers = {path: int(number) for path, number in named.items() if number.isdecimal() and path.is_file()}
        return sorted(numbers, key=numbers.get)

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint, and only then delete the oldest. Raises OSError, which says what is still complete."""
        before = self.checkpoints()
        if self.log.exists():
            on_disk(self.log)  # write the log to the disk first: its lines must be there if the checkpoint is
        standing = before[-1].name if before else "there was no checkpoint before, and what else is in the folder"
        with written_whole(self.path / f"checkpoint_{step:06d}.pt", before=standing) as unfinished:
            torch.save(state, unfinished)
        for path in self.checkpoints()[: -self.keep]:  # only now that the new one is complete
            path.unlink()

    def load(self, is_main_process: bool = True) -> dict | None:
        """The newest checkpoint that can be read, or None if there is no checkpoint. Broken ones are renamed.

        Raises ValueError if there are checkpoints but none can be read.
        """
        broken = {}
        for path in reversed(self.checkpoints()):  # the newest first
            try:
                state = _read(path)
            except Exception as error:
                broken[path] = f"{path.name} is broken ({str(error).splitlines()[0]})"
                continue
            for other in broken if is_main_process else ():
                warnings.warn(f"in {self.path}, {broken[other]}: going on from {path.name}", stacklevel=4)
                other.rename(other.with_suffix(".broken"))
            return state
        if broken:
            raise ValueError(f"in {self.path}, {'; '.join(broken.values())}: delete what is broken to start again")
        return None

    # --- the log ----------------------------------------------------------------------------------------------------

    def append(self, line: dict) -> None:
        """Add a line to the log. Raises OSError if it cannot be written."""
        try:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self.log} ({error}); the run stands at its last checkpoint") from error

    def forget_lines_after(self, step: int) -> None:
        """Delete the lines of later steps, which will be computed again, and incomplete lines."""
        if not self.log.exists():
            return
        if not self.log.is_file():  # a pipe, which would be waited for
            raise OSError(f"{self.log} is not a file: remove it, or choose another folder")
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if 0 < _step_of(line) <= step]
        if kept != lines:
            with written_whole(self.log) as unfinished:
                unfinished.write_text("".join(kept), encoding="utf-8")


def _read(path: Path) -> dict:
    """Read a checkpoint. Raises an error if it is damaged."""
    # torch.load would not notice a changed number, but the checksums of the zip file reveal it.
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
    state = torch.load(path, weights_only=True, map_location="cpu", mmap=True)
    if not state.keys() >= {"step", "recipe", "networks", "ema", "num_updates", "since_log", "seconds"}:
        raise ValueError("it is another kind of file")
    refuse_no_numbers(state["ema"], "its EMA")
    return state


def refuse_no_numbers(weights: Mapping[str, Tensor], of: str) -> None:
    """Raise FloatingPointError if any of the weights is NaN or infinite."""
    bad = [name for name, weight in weights.items() if not weight.isfinite().all()]
    if bad:
        raise FloatingPointError(f"{bad[0]} of {of} is NaN or infinite")


def _step_of(line: str) -> int:
    """The step of a line of the log; 0 if the line is incomplete."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else 0
    except (ValueError, KeyError, TypeError, OverflowError):
        return 0


def save_model(sd: LatentDiffusion, clip: str | Path | None, folder: Path, engine: Engine) -> None:
    """Write a finished model and, if given, both towers of its CLIP, which evaluation needs."""
    if engine.is_main_process:
        save(sd, folder, dtype=torch.float16)  # half the size, without a visible change in the pictures
        if clip is not None:
            save_clip(*load_clip(clip), folder)
