"""What the three training loops share: everything in a step except for the loss.

A loop asks the trainer for steps, and for the batches of each step. It hands back a loss for every batch:

    for step in trainer.steps():
        for batch in trainer.batches(len(pictures)):
            noise = batch.randn(4, 32, 32)
            loss = ...
            trainer.backward(loss)
        trainer.update()
    with trainer.finishing():
        ...  # write the finished model

All randomness is a function of the seed, the step and the place of the sample in the batch. So no state of a random
generator has to be saved, a run that was interrupted goes on exactly as if it had not been, and several processes draw
what one process would have drawn. (Dropout inside a network is the exception, and no preset has it.)
"""

import contextlib
import hashlib
import math
import signal
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..sampling import randn
from ..viz import save_sheet
from .engine import Engine
from .run_folder import RunFolder


@dataclass(frozen=True)
class Recipe:
    """How a network is trained: what all three have in common."""

    steps: int = 10_000  # updates in all
    batch_size: int = 64  # samples in an update, over all processes
    accumulate: int = 1  # parts into which each process cuts its share of a batch, where memory is short
    lr: float = 1e-4  # learning rate after the warm-up
    warmup: int = 100  # steps from zero to lr
    decay: bool = True  # let lr fall to zero along a cosine; off: keep it constant, as Stable Diffusion did
    weight_decay: float = 0.01  # AdamW's
    beta1: float = 0.9  # AdamW's memory of gradients; 0.5 is usual where a discriminator is the judge
    beta2: float = 0.99  # AdamW's memory of squared gradients; 0.999 is slow to learn in a short run
    clip_grad: float = 1.0  # a gradient with a larger norm is scaled down to this one
    ema_decay: float = 0.999  # 0.9999 in CompVis, for runs of hundreds of thousands of steps
    seed: int = 0  # the order of the data, the noise, the timesteps and the dropped captions follow from it
    log_every: int = 20  # steps between lines in log.jsonl
    sample_every: int = 1000  # steps between sample sheets
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # the newest, and those before it in case the disk damages the newest
    compile: bool = False  # torch.compile: the first step is slow, the others are faster
    on_nan: Literal["stop", "skip"] = "stop"  # what to do with a loss, or a gradient, that is no number
    tensorboard: bool = False  # write the figures of log.jsonl for TensorBoard, too

    def __post_init__(self):
        every = [name for name in vars(self) if name.endswith("_every")]
        for name in ("steps", "batch_size", "accumulate", "keep_checkpoints", *every):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")
        self._check_share("ema_decay")
        if not self.clip_grad > 0:
            raise ValueError(f"clip_grad must be more than 0, not {self.clip_grad}")
        if self.on_nan not in ("stop", "skip"):
            raise ValueError(f"on_nan is 'stop' or 'skip', not {self.on_nan!r}")

    def _check_share(self, name: str) -> None:
        if not 0 <= getattr(self, name) <= 1:
            raise ValueError(f"{name} is a share, from 0 to 1, not {getattr(self, name)}")

    def betas(self, network: str) -> tuple[float, float]:
        """AdamW's β1 and β2 for the network of that name: "model", or one that is trained beside it."""
        return self.beta1, self.beta2

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then constant or half a cosine."""
        # In the first steps AdamW has seen few gradients and divides by a poor estimate of their size, so that a full
        # step could throw the weights anywhere. The rate therefore grows from 0 to lr.
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if not self.decay:
            return self.lr * warm
        # ½ (1 + cos(π · progress)): near lr for a while, then down to 0, so that the noise of the last steps averages
        # out (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, without restarts).
        progress = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class EMA:
    """A running mean of the weights, which draws better pictures than the weights themselves.

    Each step moves the weights by the noise of its batch; in the mean over many steps that noise cancels. The decay
    warms up as min(decay, (1 + n) / (10 + n)), so that the random start is soon forgotten. CompVis `ema.py`.
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

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside, the model has the mean weights; afterwards its own again. CompVis calls it `ema_scope`."""
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Names and mean weights, in the CPU's memory."""
        for name, weight in self.weights.items():
            yield name, weight.cpu()


@dataclass(frozen=True)
class Batch:
    """Samples that go through the network at once, and their randomness: a generator for each."""

    indices: Tensor  # of the samples, in the data
    generators: list[torch.Generator]

    def randint(self, high: int) -> Tensor:
        """A number of 0, …, high - 1 for each sample."""
        return torch.stack([torch.randint(high, (), generator=g) for g in self.generators])

    def rand(self) -> Tensor:
        """A number in [0, 1) for each sample."""
        return torch.stack([torch.rand((), generator=g) for g in self.generators])

    def randn(self, *shape: int) -> Tensor:
        """Noise of N(0, I) for each sample [b *shape]; on the CPU, so that it is the same on every device."""
        return randn((len(self.generators), *shape), self.generators)


class Trainer:
    """Optimiser, EMA, checkpoints and log of one run, which lives in `folder`.

    If the folder holds a checkpoint, the run goes on from there.

    Args:
        model: what is trained. `trainer.model` is what the engine made of it: call that one, because it averages the
            gradients over the processes.
        others: networks that are trained beside it, by name, such as a discriminator. Each has an optimiser of its own
            and is in the checkpoints, but has no EMA. Call `trainer.models[name]` for its own loss. Where it only
            passes gradients on to the model, freeze it and call `engine.unwrap_model(trainer.models[name])`.
        given: what the run is given beside its recipe, by name: the fingerprint of its data, of a network that stays as
            it is, a setting. A run is only continued with the same.
        describe: turns the index of a sample into words; used where a loss is no number.

    Raises:
        ValueError: the batch can't be shared out evenly; the folder holds another run; another process trains in it.
    """

    def __init__(
        self,
        model: nn.Module,
        recipe: Recipe,
        folder: str | Path,
        engine: Engine,
        others: Mapping[str, nn.Module] | None = None,
        given: Mapping[str, str | int | float] | None = None,
        describe: Callable[[int], str] = str,
    ):
        self.recipe, self.engine, self.given, self.describe = recipe, engine, dict(given or {}), describe
        self._parts = engine.num_processes * recipe.accumulate  # of a batch
        if recipe.batch_size % self._parts:
            raise ValueError(
                f"a batch of {recipe.batch_size} can't be shared out evenly to {engine.num_processes} processes with "
                f"{recipe.accumulate} parts each: take a multiple of {self._parts}"
            )
        self.folder = RunFolder(folder, recipe.keep_checkpoints, recipe.tensorboard)
        if engine.is_main_process:
            self.folder.open()
        self.models, self.optimizers = {}, {}
        for name, network in {"model": model, **(others or {})}.items():
            # To the device; and with several processes, into a wrapper that averages the gradients over them (DDP).
            self.models[name], self.optimizers[name] = engine.prepare(network, _adamw(network, recipe, name))
            if recipe.compile:
                self.models[name].compile()
        self.model = self.models["model"]
        self.ema = EMA(engine.unwrap_model(self.model), recipe.ema_decay)
        self.step, self._since_log = 0, []
        self._seconds, self._logged_at = 0.0, 0.0  # of training: so far, and when the last line was logged
        self._figures: list[dict[str, Tensor | float]] = []  # of the batches of this step
        self._asked_to_stop, self._stopping = threading.Event(), False
        self._resume()

    # --- steps ----------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """Count from where the run stands to its last step; save on the way, at the end, and when asked to stop.

        The finished model is then written inside `finishing`; until that is done, no other process may train here.
        """
        first, last, name = self.step, self.recipe.steps, self.folder.path.name
        bar = tqdm(initial=first, total=last, desc=name, disable=not self.engine.is_main_process)
        self._bar, self._clock = bar, time.perf_counter()
        self._asked_to_stop.clear()
        with bar, _signals_only_ask(self._asked_to_stop):
            while self.step < self.recipe.steps:
                yield self.step  # here the loop takes its batches, hands back a loss for each, and calls `update`
                self.step += 1
                bar.update()
                if self.step % self.recipe.save_every == 0 or self.step == self.recipe.steps or self._stopping:
                    self.save()
                if self._stopping:
                    self.folder.close()
                    raise KeyboardInterrupt(f"stopped after step {self.step}; the same command goes on from there")

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Inside, the finished model is written; afterwards other processes may have the folder.

        Raises KeyboardInterrupt once the model is written, if this process was asked to stop meanwhile.
        """
        try:
            with _signals_only_ask(self._asked_to_stop):
                yield
        finally:
            self.folder.close()
        if self._asked_to_stop.is_set():
            raise KeyboardInterrupt(f"stopped; the run in {self.folder.path} is finished, and its model is written")

    def batches(self, n: int) -> Iterator[Batch]:
        """This process's share of the next update, out of data of n samples. Call `backward` once for each batch.

        Every epoch visits the samples in another order.
        """
        self._figures, self._n = [], n
        # An update is over batch_size samples. They are cut into (processes x accumulate) parts of equal size, and this
        # process takes `accumulate` of them, one after the other. Since the gradient of a mean is the mean of the
        # gradients, all parts together give the gradient of the whole batch.
        for k in range(self.recipe.accumulate):
            part = self.engine.process_index * self.recipe.accumulate + k
            # A random generator for each sample, seeded by (seed, step, place in the batch). It makes no difference to
            # what is drawn for a sample which process it is on, nor what has happened before.
            seeds = _seeds(self.recipe.seed, self.step, self.recipe.batch_size)[self._places(part)]
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            self._figures.append({})
            with contextlib.ExitStack() as stack:
                # Averaging gradients over processes is slow, so it is done once, together with the last part.
                if k + 1 < self.recipe.accumulate:
                    for model in self.models.values():
                        stack.enter_context(self.engine.no_sync(model))
                yield Batch(torch.tensor(self._indices(part, n)), generators)

    def backward(self, loss: Tensor, name: str = "loss", **figures: Tensor | float) -> None:
        """Add the gradient of a batch's loss. The loss is logged under its name, and the figures beside it."""
        self._figures[-1] |= {name: loss, **figures}
        # Gradients of several batches add up, and what is wanted is their mean. (DDP takes that over the processes.)
        self.engine.backward(loss / self.recipe.accumulate)

    def update(self) -> None:
        """One step down the gradient, for each network that got one.

        Raises:
            FloatingPointError: a loss or gradient is no number, on whichever process, and the recipe says "stop".
                Nothing of this step has touched the weights.
        """
        # One bad batch can have a gradient a hundred times as long as usual. It is scaled down to clip_grad, so that it
        # changes the direction of this step and does not throw the weights far away.
        norms = {}
        for name, model in self.models.items():
            norm = self.engine.clip_grad_norm_(model.parameters(), self.recipe.clip_grad)
            norms["grad_norm" if name == "model" else f"grad_norm_{name}"] = norm
        # Before anything is changed, all processes agree whether every loss and gradient is a number.
        figures, suspects = self._agree(norms)
        if suspects:
            self._refuse(figures, suspects)
        else:
            for optimizer in self.optimizers.values():
                for group in optimizer.param_groups:
                    group["lr"] = self.recipe.lr_at(self.step)
                optimizer.step()  # AdamW: weight ← weight - lr (m̂ / (√v̂ + 1e-8) + weight_decay · weight)
            self.ema.update(self.engine.unwrap_model(self.model))
        for optimizer in self.optimizers.values():
            optimizer.zero_grad(set_to_none=True)  # None takes no memory, and lets AdamW pass over a network at rest
        self._log(figures)

    def _agree(self, norms: dict[str, Tensor]) -> tuple[dict[str, float], list[int]]:
        """The mean of all figures over batches and processes; and the samples whose figures are no numbers, if any.

        The same on every process. It takes one exchange between them, and one wait for the device, a step.
        """
        # All that this process has to say goes into one row: the figures of its batches, the norms, and whether it was
        # asked to stop, since all processes have to stop after the same step.
        names, device = list(self._figures[0]), self.engine.device
        mine = [torch.as_tensor(f[name], device=device).detach().float() for f in self._figures for name in names]
        stop = torch.tensor(float(self._asked_to_stop.is_set()), device=device)
        row = torch.stack([*mine, *(norm.to(device).float() for norm in norms.values()), stop])
        rows = self.engine.gather(row[None]).cpu().double().numpy()
        self._stopping = bool(rows[:, -1].any())
        table = rows[:, : len(mine)].reshape(self._parts, len(names))  # a line for each part of the batch
        figures = dict(zip(names, table.mean(axis=0).tolist(), strict=True))
        figures |= dict(zip(norms, rows[0, len(mine) : -1].tolist(), strict=True))
        if all(map(math.isfinite, figures.values())):
            return figures, []
        # Suspect are the samples of the parts that are no numbers; if it is a gradient alone, those of all parts.
        bad = np.flatnonzero(~np.isfinite(table).all(axis=1)).tolist() or range(self._parts)
        return figures, [i for part in bad for i in self._indices(part, self._n)]

    def _refuse(self, figures: dict[str, float], suspects: list[int]) -> None:
        """Stop, or say what is left out, as the recipe says (`on_nan`)."""
        name, value = next(item for item in figures.items() if not math.isfinite(item[1]))
        described = [self.describe(i) for i in suspects]
        where = "; ".join(described[:FEW])
        if len(suspects) > FEW:
            where += f" and {len(suspects) - FEW} others, named in {NAMED.format(self.step + 1)}"
            if self.engine.is_main_process:
                path = self.folder.path / NAMED.format(self.step + 1)
                path.write_text("\n".join(described) + "\n", encoding="utf-8")
        trouble = f"the {name} of step {self.step + 1} is {value}, over the samples {where}"
        if self.recipe.on_nan == "stop":
            raise FloatingPointError(
                f"{trouble}. The run in {self.folder.path} stands at its last checkpoint: go on with a smaller lr (now "
                f"{self.recipe.lr:g}) in another folder, without those samples, or here with on_nan = skip"
            )
        if self.engine.is_main_process:
            warnings.warn(f"{trouble}: this step was skipped", stacklevel=3)

    def sheet(self, draw: Callable[[], Tensor]) -> None:
        """Write what `draw` makes with the mean weights into samples/, after each `sample_every` steps and the last.

        All processes draw it, because they have to wait for it anyway, and one writes it.
        """
        if (self.step + 1) % self.recipe.sample_every == 0 or self.step + 1 == self.recipe.steps:
            with self.ema.applied_to(self.engine.unwrap_model(self.model)):
                pictures = draw()
            if self.engine.is_main_process:
                save_sheet(pictures, self.folder.path / f"samples/{self.step + 1:06d}.png", columns=12)

    # --- which samples --------------------------------------------------------------------------------------------

    def _places(self, part: int) -> slice:
        """Where in the batch a part of it lies."""
        size = self.recipe.batch_size // self._parts
        return slice(part * size, (part + 1) * size)

    def _indices(self, part: int, n: int) -> list[int]:
        """The samples in a part of this step's batch."""
        # Sample number p of the whole run is number p % n of epoch p // n, in the order of that epoch.
        first = self.step * self.recipe.batch_size
        places = range(first, first + self.recipe.batch_size)[self._places(part)]
        return [_order(n, self.recipe.seed, p // n)[p % n] for p in places]

    # --- log and checkpoints --------------------------------------------------------------------------------------

    def _log(self, figures: dict[str, float]) -> None:
        now = time.perf_counter()
        self._seconds, self._clock = self._seconds + now - self._clock, now
        self._since_log.append(figures)
        if (self.step + 1) % self.recipe.log_every:
            return
        good = [f for f in self._since_log if all(map(math.isfinite, f.values()))]  # skipped steps don't count
        line = {"step": self.step + 1, "lr": self.recipe.lr_at(self.step)}
        for name in dict.fromkeys(name for f in self._since_log for name in f):
            values = [f[name] for f in good if name in f]
            line[name] = float(np.mean(values)) if values else None
        if self.recipe.on_nan == "skip":
            line["skipped"] = len(self._since_log) - len(good)
        samples = len(self._since_log) * self.recipe.batch_size
        line |= {"samples_per_s": samples / (self._seconds - self._logged_at), "seconds": self._seconds}
        self._since_log, self._logged_at = [], self._seconds
        if self.engine.is_main_process:
            self.folder.append({name: _rounded(value) for name, value in line.items()})
            self._bar.set_postfix(loss=line["loss"], refresh=False)

    def save(self) -> None:
        """Write a checkpoint. The one before it stays until this one is whole."""
        if not self.engine.is_main_process:
            return
        # The state of an optimiser is AdamW's two running means for each weight, and how many steps it has made. Of
        # the random generators there is nothing to save.
        networks = {
            name: (self.engine.unwrap_model(model).state_dict(), self.optimizers[name].state_dict())
            for name, model in self.models.items()
        }
        state = {
            "step": self.step,
            "recipe": asdict(self.recipe),
            "given": self.given,
            "networks": networks,
            "ema": dict(self.ema.items()),
            "num_updates": self.ema.num_updates,
            "since_log": self._since_log,
            "seconds": (self._seconds, self._logged_at),
        }
        self.folder.save(self.step, state)

    def _resume(self) -> None:
        state = self.folder.load(self.engine.is_main_process)
        # Several machines may not see the same disk. Then each would begin at another step, and nobody would notice.
        steps = self.engine.gather(torch.tensor([-1 if state is None else state["step"]], device=self.engine.device))
        if len(set(steps.tolist())) > 1:
            raise ValueError(
                f"the processes see different checkpoints in {self.folder.path}: it must be on a disk that all share"
            )
        if state is not None:
            self._refuse_another_run(state["recipe"], state.get("given", {}))
            self._restore(state)
        if self.engine.is_main_process:
            self.folder.forget_lines_after(self.step)

    def _refuse_another_run(self, recipe: dict, given: dict) -> None:
        ours = asdict(self.recipe) | self.given
        # A run of an older version does not name the newer fields of a recipe: they were as they are by default. Of
        # what it was given and does not name, nothing is known, so that it passes.
        theirs = asdict(type(self.recipe)()) | self.given | recipe | given
        changed = [f"{k} was {theirs[k]}, now {v}" for k, v in ours.items() if theirs[k] != v and k not in _MAY_CHANGE]
        if changed:
            raise ValueError(
                f"{self.folder.path} holds another run ({'; '.join(changed)}): give it what it was begun with, or "
                "choose another folder"
            )

    def _restore(self, state: dict) -> None:
        try:
            for name, model in self.models.items():
                weights, optimizer = state["networks"][name]
                self.engine.unwrap_model(model).load_state_dict(weights)
                self.optimizers[name].load_state_dict(_numbered(optimizer))
            for name, mean in self.ema.weights.items():
                mean.copy_(state["ema"][name])
        except (RuntimeError, KeyError, ValueError) as error:
            reason = " ".join(str(error).split())[:160]
            raise ValueError(
                f"{self.folder.path} holds a run of other networks ({reason}): choose another folder, or delete it"
            ) from error
        self.ema.num_updates, self.step, self._since_log = state["num_updates"], state["step"], state["since_log"]
        self._seconds, self._logged_at = state["seconds"]


# What may differ between a run and its continuation.
_MAY_CHANGE = {
    "accumulate", "compile", "gradient_checkpointing", "log_every", "sample_every", "save_every", "keep_checkpoints",
    "on_nan", "tensorboard",
}  # fmt: skip
FEW = 8  # samples that a sentence may name; a file takes the rest
NAMED = "no_number_{:06d}.txt"


def _adamw(network: nn.Module, recipe: Recipe, name: str) -> torch.optim.AdamW:
    """AdamW, with weight decay for matrices and convolutions alone.

    To shrink a bias or the gain of a norm does no good (nanoGPT, and He et al. 2019, arXiv:1812.01187, section 3.1).
    """
    matrices = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in network.parameters() if p.requires_grad and p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.lr, betas=recipe.betas(name), fused=True,
    )  # fmt: skip


def _numbered(state: dict) -> dict:
    """The state of an optimiser with numbers for the parameters, as PyTorch has it. minisd 0.1 wrote their names."""
    groups = state["param_groups"]
    number = {p: n for n, p in enumerate(p for group in groups for p in group["params"])}
    groups = [group | {"params": [number[p] for p in group["params"]]} for group in groups]
    return {"state": {number[p]: means for p, means in state["state"].items()}, "param_groups": groups}


def _rounded(value: float | None) -> float | None:
    return value if value is None or isinstance(value, int) else float(f"{value:.8g}")  # float32 has no more digits


def _seeds(seed: int, step: int, batch_size: int) -> list[int]:
    """A seed for each sample of a batch: unrelated to each other, and a larger batch begins with the same ones."""
    words = np.random.SeedSequence((seed, step, 1)).generate_state(batch_size, np.uint64)
    return (words >> np.uint64(1)).tolist()


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    """The order in which an epoch visits the n samples."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def digest(content) -> str:
    """A hash of what can be written down: texts, numbers, tuples and lists of them, configurations."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def fingerprint(network: Callable) -> str:
    """What tells two networks apart: the class, and a hash over the weights. Of a function, only the name."""
    if not isinstance(network, nn.Module):
        return getattr(network, "__name__", type(network).__name__)
    known_as = getattr(network, "recorded_as", type(network).__name__)
    weights = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        weights.update(name.encode())
        weights.update(tensor.cpu().flatten().view(torch.uint8).numpy())
    return f"{known_as} ({weights.hexdigest()[:12]})"


@contextlib.contextmanager
def _signals_only_ask(asked_to_stop: threading.Event) -> Iterator[None]:
    """Inside, a signal that asks the process to stop only sets the event; a second Ctrl-C interrupts at once.

    Such signals are Ctrl-C (SIGINT), SIGTERM, which clusters send before they stop a job, and SIGHUP, which comes when
    the terminal is closed. A second Ctrl-C within one second counts as the first, because torchrun sends its own to
    processes that have had it already.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread alone
        return
    first = math.inf

    def handler(signum, frame):
        nonlocal first
        if signum == signal.SIGINT and time.monotonic() > first + 1:
            raise KeyboardInterrupt("stopped at once; the run stands at its last checkpoint")
        asked_to_stop.set()
        first = min(first, time.monotonic())

    asking = [signal.SIGINT, signal.SIGTERM]
    # Windows has no SIGHUP; and under nohup it is ignored, so that the run outlives its terminal.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        asking.append(signal.SIGHUP)
    before = {which: signal.signal(which, handler) for which in asking}
    try:
        yield
    finally:
        for which, old in before.items():
            signal.signal(which, old or signal.SIG_DFL)  # None: it was not set in Python
