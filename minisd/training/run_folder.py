"""The folder that a run lives in, and how nothing in it is ever lost.

    checkpoint_000500.pt     all that the run needs to go on; the newest `keep` of them
    log.jsonl                a line of figures for each `log_every` steps
    tensorboard/             the same figures, if asked for
    model/                   the finished model

A process may be killed at any moment, and a disk may be full. What counts is the newest whole checkpoint and the lines
of the log up to it. Whatever came later is made again.
"""

import importlib.util
import json
import os
import warnings
import zipfile
from pathlib import Path

import torch

from ..checkpoint import load_clip, on_disk, remove_unfinished, save, save_clip, written_whole
from ..data.folder import lock
from ..latent_diffusion import LatentDiffusion
from .engine import Engine

_locks: dict[Path, int | None] = {}  # the runs that this process holds


class RunFolder:
    """The files of one run. All processes read them; only the main one writes."""

    def __init__(self, path: str | Path, keep: int = 1, tensorboard: bool = False):
        if tensorboard and not importlib.util.find_spec("tensorboard"):
            raise ImportError('curves for TensorBoard need a package: pip install "minisd[train]"')
        self.path, self.keep, self.tensorboard = Path(path), keep, tensorboard
        self.log = self.path / "log.jsonl"
        self._curves = None  # TensorBoard's writer

    def open(self) -> None:
        """Make the folder and hold it, so that another process can't train in it at the same time.

        Raises ValueError where another process holds it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        if self.path.resolve() not in _locks:
            try:
                _locks[self.path.resolve()] = lock(self.path)
            except BlockingIOError:
                raise ValueError(f"another process trains in {self.path}: end it, or choose another folder") from None
        # A process that was killed leaves the file that it was writing, or the folder of the finished model.
        for left_over in self.path.glob("*.unfinished"):
            remove_unfinished(left_over)

    def close(self) -> None:
        """Let other processes have the folder."""
        handle = _locks.pop(self.path.resolve(), None)
        if handle is not None:
            os.close(handle)

    # --- checkpoints ------------------------------------------------------------------------------------------------

    def checkpoints(self) -> list[Path]:
        """Oldest first."""
        return sorted(self.path.glob("checkpoint_*.pt"), key=lambda path: int(path.stem.removeprefix("checkpoint_")))

    def save(self, step: int, state: dict) -> None:
        """Write a checkpoint, and only then delete the oldest. Raises OSError, which says what still stands."""
        before = self.checkpoints()
        if self.log.exists():
            on_disk(self.log)  # a checkpoint means that the lines up to it are there, even after a power cut
        standing = before[-1].name if before else "there was no checkpoint before, and what else is in the folder"
        with written_whole(self.path / f"checkpoint_{step:06d}.pt", before=standing) as unfinished:
            torch.save(state, unfinished)
        for path in self.checkpoints()[: -self.keep]:  # only now, when the new one is whole
            path.unlink()

    def load(self, is_main_process: bool = True) -> dict | None:
        """The newest checkpoint that is whole; None where there is none at all. One that is broken is put aside.

        Raises ValueError where there are checkpoints and none is whole.
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
        """Add a line to the log. Raises OSError, in a sentence."""
        try:
            with self.log.open("a", encoding="utf-8") as log:
                log.write(json.dumps(line) + "\n")
        except OSError as error:
            raise OSError(f"could not write {self.log} ({error}); the run stands at its last checkpoint") from error
        if self.tensorboard:
            self._draw(line)

    def _draw(self, line: dict) -> None:
        if self._curves is None:
            from torch.utils.tensorboard import SummaryWriter

            # A run that was killed may have drawn steps that will be made again: TensorBoard forgets those.
            self._curves = SummaryWriter(self.path / "tensorboard", purge_step=line["step"])
        for name, value in line.items():
            if value is not None:
                self._curves.add_scalar(name, value, line["step"])
        self._curves.flush()

    def forget_lines_after(self, step: int) -> None:
        """Delete the lines of later steps, which will be made again, and a line that was cut off."""
        if not self.log.exists():
            return
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        kept = [line for line in lines if 0 < _step_of(line) <= step]
        if kept != lines:
            with written_whole(self.log) as unfinished:
                unfinished.write_text("".join(kept), encoding="utf-8")


def _read(path: Path) -> dict:
    """Read a checkpoint. Raises an error where it is damaged."""
    # torch.load would not notice that a number has changed on the disk, but the checksums of the zip file show it.
    with zipfile.ZipFile(path) as archive:
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, weights_only=True, map_location="cpu", mmap=True)


def _step_of(line: str) -> int:
    """The step that a line of the log is about; 0 if it is no whole line."""
    try:
        return json.loads(line)["step"] if line.endswith("\n") else 0
    except (ValueError, KeyError, TypeError):
        return 0


def save_model(sd: LatentDiffusion, clip: str | Path | None, folder: Path, engine: Engine) -> None:
    """Write a finished model, and beside it the rest of CLIP, which evaluation needs."""
    if engine.is_main_process:
        save(sd, folder, dtype=torch.float16)  # half the size, and no picture changes visibly
        if clip is not None:
            save_clip(*load_clip(clip), folder)
    engine.wait_for_everyone()
