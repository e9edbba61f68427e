"""What the three training loops share.

A loop asks the trainer for steps, computes a loss, and hands it back:

    for step in trainer.steps():
        indices = trainer.batch(len(pictures))
        loss = ...
        trainer.update(loss)

All randomness is a function of (seed, step): no state of a random generator has to be saved, a run that was
interrupted goes on exactly as if it had not been, and several processes draw what one would have drawn.
"""

import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint import written_whole
from .engine import SingleDevice


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: what all three have in common."""

    steps: int = 10_000  # updates in all
    batch_size: int = 64  # samples in an update, over all processes
    lr: float = 1e-4  # learning rate after the warm-up
    warmup: int = 100  # steps from zero to lr
    decay: bool = True  # let lr fall to zero along a cosine; off: keep it constant, as Stable Diffusion did
    weight_decay: float = 0.01  # AdamW's
    beta2: float = 0.99  # AdamW's memory of squared gradients; 0.999 is slow to learn in a short run
    clip_grad: float = 1.0  # gradients are scaled down to this norm
    ema_decay: float = 0.999  # 0.9999 in CompVis, for runs of hundreds of thousands of steps
    seed: int = 0  # order of the data, noise, timesteps, dropped captions: all follow from it
    log_every: int = 20  # steps between lines in log.jsonl
    sample_every: int = 1000  # steps between sample sheets
    save_every: int = 500  # steps between checkpoints

    def __post_init__(self):
        for name in ("steps", "batch_size", "log_every", "sample_every", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")

    def lr_at(self, step: int) -> float:
        """Linear warm-up, then constant or half a cosine."""
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if not self.decay:
            return self.lr * warm
        progress = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class EMA:
    """A running mean of the weights, which draws better pictures than the weights themselves.

    The decay warms up as min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten. CompVis `ema.py`.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.num_updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """ema ← ema - (1 - decay) (ema - weight), after each step of the optimiser."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.weights.values()), [parameters[n].detach() for n in self.weights], 1 - decay)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the mean weights; afterwards its own again. CompVis calls it `ema_scope`."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


class Trainer:
    """Optimiser, EMA, checkpoints and log of one run, which lives in `folder`.

    If the folder holds a checkpoint, the run goes on from there.
    """

    def __init__(self, model: nn.Module, recipe: Recipe, folder: str | Path, engine: SingleDevice):
        self.recipe, self.engine, self.folder = recipe, engine, Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.model = engine.prepare(model)
        # Weight decay is for matrices: to shrink a bias or the gain of a norm does no good.
        matrices = [p for p in self.model.parameters() if p.requires_grad and p.ndim >= 2]
        vectors = [p for p in self.model.parameters() if p.requires_grad and p.ndim < 2]
        self.optimizer = torch.optim.AdamW(
            [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
            lr=recipe.lr, betas=(0.9, recipe.beta2), fused=True,
        )  # fmt: skip
        self.ema = EMA(engine.unwrap_model(self.model), recipe.ema_decay)
        self.step = 0
        self._since_log: list[dict[str, float]] = []
        if self.checkpoint.exists():
            self._resume()

    # --- steps ----------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Count from where the run stands to its last step; save on the way, at the end, and on Ctrl-C."""
        bar = tqdm(
            initial=self.step, total=self.recipe.steps, desc=self.folder.name, disable=not self.engine.is_main_process
        )
        self._bar, self._log_time = bar, time.perf_counter()
        with bar, _finish_the_step_on_ctrl_c() as stop:
            while self.step < self.recipe.steps:
                yield self.step
                self.step += 1
                bar.update()
                if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps or stop.is_set():
                    self.save()
                if stop.is_set():
                    raise KeyboardInterrupt(f"stopped after step {self.step}; the same command goes on from there")

    def update(self, loss: Tensor, **figures: Tensor | float) -> None:
        """One step down the gradient. `figures` are logged beside the loss.

        Raises:
            FloatingPointError: the loss is no number; nothing of this step has touched the weights.
        """
        recipe = self.recipe
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.step} is {loss.item()}, and the run in {self.folder} stands at its last "
                f"checkpoint: start again with a smaller lr (now {recipe.lr:g})"
            )
        for group in self.optimizer.param_groups:
            group["lr"] = recipe.lr_at(self.step)
        self.engine.backward(loss)
        norm = self.engine.clip_grad_norm_(self.model.parameters(), recipe.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.engine.unwrap_model(self.model))
        self._log({"loss": self.engine.reduce(loss.detach()), "grad_norm": norm, **figures})

    @property
    def time_to_sample(self) -> bool:
        """Is this step one that ends with a sample sheet?"""
        due = (self.step + 1) % self.recipe.sample_every == 0 or self.step + 1 == self.recipe.steps
        return due and self.engine.is_main_process

    # --- randomness -----------------------------------------------------------------------------------------------

    def batch(self, n: int) -> Tensor:
        """Indices of this process's share of the next batch: epoch after epoch, each in an order of its own."""
        first = self.step * self.recipe.batch_size
        positions = range(first, first + self.recipe.batch_size)
        return self.shard(torch.tensor([_order(n, self.recipe.seed, p // n)[p % n] for p in positions]))

    def generator(self) -> torch.Generator:
        """A generator that depends on seed and step alone. Draw for the whole batch, then take your `shard`."""
        return torch.Generator().manual_seed(_mix(self.recipe.seed, self.step))

    def shard(self, whole: Tensor) -> Tensor:
        """Of something that was drawn for the whole batch, the part of this process."""
        return whole.chunk(self.engine.num_processes)[self.engine.process_index]

    # --- log and checkpoints --------------------------------------------------------------------------------------

    def _log(self, figures: dict[str, Tensor | float]) -> None:
        self._since_log.append({name: float(value) for name, value in figures.items()})
        if (self.step + 1) % self.recipe.log_every or not self.engine.is_main_process:
            return
        now = time.perf_counter()
        line = {"step": self.step + 1, "lr": self.recipe.lr_at(self.step)}
        line |= {name: float(np.mean([f[name] for f in self._since_log])) for name in figures}
        line["samples_per_s"] = len(self._since_log) * self.recipe.batch_size / (now - self._log_time)
        self._since_log, self._log_time = [], now
        with (self.folder / "log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps({k: round(v, 6) for k, v in line.items()}) + "\n")
        self._bar.set_postfix(loss=f"{line['loss']:.4f}", refresh=False)

    @property
    def checkpoint(self) -> Path:
        return self.folder / "checkpoint.pt"

    def save(self) -> None:
        """Write the checkpoint: the one that was there stays good until this one is whole."""
        if not self.engine.is_main_process:
            return
        state = {
            "step": self.step,
            "recipe": asdict(self.recipe),
            "model": self.engine.unwrap_model(self.model).state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.weights,
            "num_updates": self.ema.num_updates,
            "since_log": self._since_log,
        }
        with written_whole(self.checkpoint, before="the checkpoint before it") as unfinished:
            torch.save(state, unfinished)

    def _resume(self) -> None:
        try:
            state = torch.load(self.checkpoint, weights_only=True, map_location="cpu")
        except Exception as error:
            raise ValueError(f"{self.checkpoint} can't be read ({error}); delete it to start again") from error
        theirs, ours = state["recipe"], asdict(self.recipe)
        changed = [
            f"{k} was {theirs.get(k)}, now {v}" for k, v in ours.items() if theirs.get(k) != v and k not in _MAY_CHANGE
        ]
        if changed:
            raise ValueError(
                f"{self.folder} holds another run ({'; '.join(changed)}): choose another folder, or delete it"
            )
        self.engine.unwrap_model(self.model).load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name, weight in state["ema"].items():
            self.ema.weights[name].copy_(weight)
        self.ema.num_updates, self.step, self._since_log = state["num_updates"], state["step"], state["since_log"]
        self._forget_later_lines()

    def _forget_later_lines(self) -> None:
        """Steps after the checkpoint will be made, and logged, again."""
        log = self.folder / "log.jsonl"
        if log.exists() and self.engine.is_main_process:
            lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= self.step]
            log.write_text("".join(kept), encoding="utf-8")


_MAY_CHANGE = {"log_every", "sample_every", "save_every"}  # what may differ between a run and its continuation


def _mix(*numbers: int) -> int:
    """Several numbers → one seed, such that neighbours get unrelated ones."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the n samples."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


@contextmanager
def _finish_the_step_on_ctrl_c() -> Iterator[threading.Event]:
    """Inside, the first Ctrl-C only sets the event, and the second interrupts at once."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop  # signals reach the main thread alone
        return

    def handler(signum, frame):
        if stop.is_set():
            raise KeyboardInterrupt("stopped at once; the run stands at its last checkpoint")
        stop.set()

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)
