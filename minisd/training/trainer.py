"""What the three training loops share: everything in a step except for the loss.

A loop iterates over the trainer's steps, and over the batches of each step. It computes a loss for every batch:

    for step in trainer.steps():
        for batch in trainer.batches(len(pictures)):
            noise = batch.randn(4, 32, 32)
            loss = ...
            trainer.backward(loss)
        trainer.update()
    with trainer.finishing():
        ...  # write the finished model

All random numbers depend only on the seed, the step and the position of the sample in the batch. This has three
consequences. No state of a random generator has to be saved. A run that was interrupted continues exactly as it would
have without the interruption. Several processes draw the same numbers as one process would. (Dropout inside a network
is an exception, but no preset uses it.)
"""

import contextlib
import hashlib
import math
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..checkpoint.files import refused_as
from ..data import Corpus
from ..latent_diffusion import enough_memory
from ..noising import seeded
from ..viz import save_sheet
from .engine import Engine
from .run_folder import LOCKED, RunFolder, refuse_no_numbers


@dataclass(frozen=True)
class Recipe:
    """The hyperparameters that all three trainings have in common."""

    steps: int = 10_000  # how many updates of the weights
    batch_size: int = 64  # samples for each update, over all processes together
    accumulate: int = 1  # gradient accumulation: in how many parts a process computes its share, to save memory
    lr: float = 1e-4  # learning rate after the warm-up
    warmup: int = 100  # steps from zero to lr
    decay: bool = True  # let lr fall to zero along a cosine; off: keep it constant, as Stable Diffusion did
    weight_decay: float = 0.01  # of AdamW
    beta1: float = 0.9  # decay of AdamW's running mean of gradients; 0.5 is usual with a discriminator
    beta2: float = 0.99  # decay of AdamW's running mean of squared gradients; 0.999 adapts slowly for a short run
    clip_grad: float = 1.0  # the largest norm of the gradient; a longer gradient is scaled down to it
    ema_decay: float = 0.999  # 0.9999 in CompVis, for runs of hundreds of thousands of steps
    seed: int = 0  # the order of the data, the noise, the timesteps and the dropped captions follow from it
    log_every: int = 20  # steps between lines in log.jsonl; in between, a GPU is not waited for (see Trainer._read)
    sample_every: int = 1000  # steps between sample sheets
    save_every: int = 500  # steps between checkpoints
    keep_checkpoints: int = 2  # how many to keep; more than one, in case the newest is damaged on the disk
    compile: bool = False  # torch.compile: the first step is slow, the others are faster

    def __post_init__(self):
        # A recipe is saved in each checkpoint. Checkpoints are read with `weights_only=True`, which refuses numbers of
        # numpy, so these become Python's. (`object.__setattr__`, because the fields of a recipe are frozen.)
        # A count must be possible: a checkpoint "every 0 steps", for example, would divide by zero.
        counts = ("steps", "batch_size", "accumulate", "keep_checkpoints", "seed")
        for name, value in vars(self).items():  # also of the fields that a recipe for one network adds
            if isinstance(value, np.generic):
                object.__setattr__(self, name, value.item())
            least, most = {"batch_size": (1, 10**6), "seed": (0, 2**63)}.get(name, (1, 10**12))
            if (name in counts or name.endswith("_every")) and not least <= value <= most:
                raise ValueError(f"{name} must be at least {least} and at most {most:,}, not {value:,}")
            if name in ("ema_decay", "text_dropout") and not 0 <= value <= 1:
                raise ValueError(f"{name} is a share, from 0 to 1, not {value}")
            if name in ("clip_grad", "min_snr_gamma") and value is not None and not value > 0:
                raise ValueError(f"{name} must be more than 0, not {value}")

    def betas(self, network: str) -> tuple[float, float]:
        """AdamW's β1 and β2 for the network of that name: "model", or another one such as "discriminator"."""
        return self.beta1, self.beta2

    def lr_at(self, step: int) -> float:
        """The learning rate of a step: a linear warm-up, then constant or half a cosine."""
        # Warm-up. AdamW divides by the root of its running mean of squared gradients. In the first steps this is the
        # mean of only a few gradients, so the steps would be erratic. The learning rate therefore grows linearly to lr.
        warm = min(1.0, (step + 1) / max(1, self.warmup))
        if not self.decay:
            return self.lr * warm
        # Cosine decay, ½ (1 + cos(π · progress)): near lr at first, then down to 0. With small steps at the end, the
        # noise of the single batches averages out (Loshchilov & Hutter 2017, arXiv:1608.03983, eq. 5, no restarts).
        progress = max(0, step - self.warmup) / max(1, self.steps - self.warmup)
        return self.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


class EMA:
    """An exponential moving average of the weights. A model with these weights draws better pictures.

    The gradient of a batch is noisy, and each step adds some of that noise to the weights. In the average over many
    steps the noise mostly cancels. In the first n steps the decay is smaller, min(decay, (1 + n) / (10 + n)), so that
    the random initial weights soon stop counting. CompVis `ema.py: LitEma`.
    """

    def __init__(self, model: nn.Module, decay: float):
        self.decay, self.num_updates = decay, 0
        self.weights = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """ema ← decay · ema + (1 - decay) · weight, after each step of the optimiser."""
        self.num_updates += 1
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        parameters = dict(model.named_parameters())
        torch._foreach_lerp_(list(self.weights.values()), [parameters[n].detach() for n in self.weights], 1 - decay)

    @contextlib.contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Inside the `with`, the model has the EMA weights; afterwards its own again. CompVis calls it `ema_scope`."""
        # load_state_dict writes into the model's tensors, so its own weights have to be copied first.
        own = {name: p.detach().clone() for name, p in model.named_parameters()}
        model.load_state_dict(self.weights, strict=False)
        try:
            yield
        finally:
            model.load_state_dict(own, strict=False)


BLOCK = 64  # how many samples share a random generator


def drawn(seed: tuple[int, int], places: range, number: int, how: Callable, *arguments) -> Tensor:
    """Random numbers for some places of a step's batch: how(*options, [places *shape]), where shape comes last.

    Places 0 to 63 of the batch share a generator, places 64 to 127 the next, and so on. One for each place would be
    several times as slow. With one for all, each process would have to draw the numbers of all processes.

    Args:
        seed: that of the run, and the step.
        places: which places of the step's batch.
        number: how often the loop has drawn in this batch before.
        how: torch.randn, torch.rand or torch.randint.
        arguments: those of `how`, with the shape of one sample's numbers at the end: (high, shape) for randint.
    """
    *options, shape = arguments
    dtype = torch.int64 if how is torch.randint else torch.float32
    # Which blocks of 64 places do these places lie in? The seed of a block is a hash of the run's seed, the step, the
    # number of the draw and the block, so that no two of them have the same random numbers. (Where this has a 2, the
    # seeds of `Batch.generators` have a 1.) The hash comes as two words of 32 bits, which are joined to 63 bits.
    first, last = places.start // BLOCK, (places.stop - 1) // BLOCK
    words = [np.random.SeedSequence((*seed, 2, number, block)).generate_state(2) for block in range(first, last + 1)]
    generators = [seeded(int(high) << 31 ^ int(low)) for high, low in words]
    # Draw all numbers of these blocks, [64 *shape] each, and keep those of the places.
    blocks = [how(*options, (BLOCK, *shape), generator=g, dtype=dtype, device="cpu") for g in generators]
    return torch.cat(blocks)[places.start - first * BLOCK :][: len(places)]


@dataclass
class Batch:
    """Samples that go through the network together, and random numbers for each of them.

    The numbers for a sample depend on the seed, the step, the place of the sample in the step's batch, and on how often
    the loop has drawn in this batch before. They are drawn on the CPU, so that they are the same for every device.
    """

    indices: Tensor  # which samples of the data, [b]
    seed: tuple[int, int]  # that of the run, and the step
    places: range  # the places of the samples in the step's batch
    ahead: dict[tuple, Future] = field(default_factory=dict)  # what has been drawn for it in advance
    draws: list[tuple] = field(default_factory=list)  # what the loop has asked for

    def randint(self, high: int) -> Tensor:
        """A random number from {0, …, high - 1} for each sample [b]."""
        return self._draw(torch.randint, high, ())

    def rand(self) -> Tensor:
        """A random number from [0, 1) for each sample [b]."""
        return self._draw(torch.rand, ())

    def randn(self, *shape: int) -> Tensor:
        """Noise from N(0, I) for each sample [b *shape]."""
        return self._draw(torch.randn, shape)

    def _draw(self, how: Callable, *arguments) -> Tensor:
        self.draws.append((len(self.draws), how, *arguments))
        asked = (self.seed, self.places, *self.draws[-1])
        return self.ahead[asked].result() if asked in self.ahead else drawn(*asked)

    @cached_property
    def generators(self) -> list[torch.Generator]:
        """A generator for each sample, for numbers of which each sample needs another amount. This is slow."""
        seeds = np.random.SeedSequence((*self.seed, 1)).generate_state(self.places.stop, np.uint64) >> np.uint64(1)
        return [seeded(seed) for seed in seeds[self.places.start :]]


@contextlib.contextmanager
def one_training() -> Iterator[None]:
    """A decorator for the functions that train. It prepares a training, and cleans up after it, however it ends.

    During the training, PyTorch's defaults are float32 and the CPU, because the initial weights are random numbers, and
    these should not depend on what was set before. Afterwards the defaults are as before, and the folder of the run is
    unlocked. If there is not enough memory, the error says what to lower.
    """
    dtype, device, locked = torch.get_default_dtype(), torch.get_default_device(), set(LOCKED)
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)
    try:
        with enough_memory("take a smaller batch_size, a larger accumulate, or smaller pictures"):
            yield
    finally:
        torch.set_default_dtype(dtype)
        torch.set_default_device(None if device.type == "cpu" else device)
        for path in LOCKED.keys() - locked:
            RunFolder(path).close()


class Trainer:
    """Optimiser, EMA, checkpoints and log of one run, which is stored in `folder`.

    If the folder holds a checkpoint, the run continues from it.

    Args:
        model: the network to train. Call it as `trainer.model`: this may be wrapped by the engine (DDP), and only the
            wrapper averages the gradients over the processes.
        others: further networks to train, by name, such as a discriminator. Each has its own optimiser and is saved in
            the checkpoints, but has no EMA. Call `trainer.models[name]` for its own loss. In the loss of the model,
            where it only passes gradients on, freeze it and call `trainer.networks[name]`.
        given: what the run depends on beside its recipe, by name: fingerprints of the data and of frozen networks, and
            settings. A checkpoint is only continued if these are the same.
        describe: describes a sample, given its index, for the error message about a loss that is NaN or infinite.

    Raises:
        ValueError: the batch cannot be divided evenly; the folder holds another run; another process trains in it.
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
        self.recipe, self.engine, self.describe = recipe, engine, describe
        # A checkpoint is continued only if it was made from the same.
        self.given = {"random numbers": RANDOM_NUMBERS} | dict(given or {})
        # A step's batch is cut into equal parts. Each process takes `accumulate` of them, one after the other.
        self._parts = engine.num_processes * recipe.accumulate
        if recipe.batch_size % self._parts:
            raise ValueError(
                f"a batch of {recipe.batch_size} can't be shared out evenly to {engine.num_processes} processes with "
                f"{recipe.accumulate} parts each: take a multiple of {self._parts}"
            )
        # Only the main process writes into the folder. It locks it against other trainings.
        self.folder = RunFolder(folder, recipe.keep_checkpoints)
        if engine.is_main_process:
            self.folder.open()
        # Each network has an optimiser of its own, because a discriminator is trained for another loss.
        self.models, self.networks, self.optimizers = {}, {}, {}
        for name, network in {"model": model, **(others or {})}.items():
            # Move it to the device. With several processes, also wrap it in DDP, which averages gradients over them.
            self.optimizers[name] = _adamw(network, recipe, name)
            self.models[name] = engine.prepare(network)
            self.networks[name] = engine.unwrap_model(self.models[name])  # the same without the wrapper
            if recipe.compile:
                self.models[name].compile()
        self.model, self.network = self.models["model"], self.networks["model"]
        # The running mean of the weights, which becomes the finished model.
        self.ema = EMA(self.network, recipe.ema_decay)
        # How far the run is, and what it has to log. `_resume` replaces these by those of a checkpoint.
        self.step, self._since_log = 0, []
        self._seconds, self._logged_at = 0.0, 0.0  # of training: so far, and when the last line was logged
        self._unread: list[tuple[int, list[str], Tensor]] = []  # the figures of all steps since the last reading
        self._second_thread, self._draws, self._ahead = ThreadPoolExecutor(1), [], {}  # see `batches`
        # On a GPU, reading a number makes the program wait, so figures are read rarely: see `_read`.
        self._reads_each_step = engine.device.type == "cpu"
        self._asked_to_stop, self._stopping = threading.Event(), False
        self._resume()

    # --- steps ----------------------------------------------------------------------------------------------------

    def steps(self) -> Iterable[int]:
        """The steps that are left of the run. Saves checkpoints between them, and stops after a signal.

        Write the finished model inside `finishing` afterwards. Until then, no other process can train in this folder.
        If you leave the loop before the last step, other processes can, and signals have their usual effect again. (If
        you keep an iterator in a variable, `iter(trainer.steps())`, this happens when the variable is deleted.)
        """
        # This is not an iterator, but the trainer, of which each `for` loop makes an iterator of its own. Python closes
        # an iterator when nothing refers to it any more, and only the loop refers to this one. So it is closed as soon
        # as the loop is left, by `break` or by an error, even if a notebook keeps `trainer.steps()` in a variable.
        return self

    def __iter__(self) -> Iterator[int]:
        first, last, name = self.step, self.recipe.steps, self.folder.path.name
        bar = tqdm(initial=first, total=last, desc=name, disable=not self.engine.is_main_process)
        self._bar, self._clock = bar, time.perf_counter()
        # This may be a second loop over the same trainer, after a signal has stopped the first.
        self._asked_to_stop.clear()
        self._stopping = False
        if self.engine.is_main_process:
            self.folder.open()  # again, if the loop was left before
        try:
            with bar, _signals_only_ask(self._asked_to_stop):
                while self.step < last:
                    yield self.step  # the loop's body runs here: batches, a `backward` for each, and `update`
                    self.step += 1
                    bar.update()
                    if self.step % self.recipe.save_every == 0 or self.step == last or self._stopping:
                        self.save()
                    if self._stopping:
                        raise KeyboardInterrupt(f"stopped after step {self.step}; the same command goes on from there")
        except BaseException:
            self.folder.close()  # the loop was left: an error, a signal, or `break` (which is GeneratorExit here)
            raise

    @contextlib.contextmanager
    def finishing(self) -> Iterator[None]:
        """Write the finished model inside this `with`. Afterwards other processes can use the folder.

        A signal to stop does not interrupt the writing: KeyboardInterrupt is raised after it.
        """
        try:
            with _signals_only_ask(self._asked_to_stop):
                yield
                self.engine.wait_for_everyone()  # until the main process has written it
        finally:
            self.folder.close()  # after an error, too, so that the command can be run again
        if self._asked_to_stop.is_set():
            raise KeyboardInterrupt(f"stopped; the run in {self.folder.path} is finished, and its model is written")

    def batches(self, n: int) -> Iterator[Batch]:
        """This process's share of the next update, out of data of n samples. Call `backward` once for each batch.

        Every epoch visits the samples in another order.
        """
        self._figures, self._n = [], n
        # Gradient accumulation. The batch_size samples of an update are divided into (processes x accumulate) parts of
        # equal size, and this process takes `accumulate` of them, one after the other. The gradient of a mean is the
        # mean of the gradients, so together the parts give the gradient of the whole batch.
        for k in range(self.recipe.accumulate):
            part = self.engine.process_index * self.recipe.accumulate + k
            # What is drawn for a sample follows from the seed, the step and its place in the step's batch. So it does
            # not depend on the number of processes, nor on whether the run was interrupted.
            indices = torch.tensor(self._indices(self.step, part, n), device="cpu")
            batch = Batch(indices, (self.recipe.seed, self.step), self._places(part), self._ahead)
            # While the network works on this batch, a second thread draws the random numbers of the next one: of the
            # next part of this step or, after the last part, of the first part of the next step. It draws what the loop
            # asked for in the batch before. If the loop now asks for something else, that is drawn when it asks.
            last = k + 1 == self.recipe.accumulate
            following = (self.recipe.seed, self.step + last), self._places(part + 1 - last * self.recipe.accumulate)
            asked = [(*following, *draw) for draw in self._draws]
            self._ahead = {ask: self._second_thread.submit(drawn, *ask) for ask in asked}
            self._figures.append({})
            with contextlib.ExitStack() as stack:
                # DDP would average the gradients over the processes after every backward pass, which is slow. Once is
                # enough, after the last part.
                for model in [] if last else self.models.values():
                    stack.enter_context(self.engine.no_sync(model))
                yield batch
            self._draws = batch.draws

    def backward(self, loss: Tensor, name: str = "loss", **figures: Tensor | float) -> None:
        """Add the gradient of a batch's loss to that of the step. `name` and `figures` go into the log."""
        self._figures[-1] |= {key: self._number(x) for key, x in {name: loss, **figures}.items()}
        # PyTorch adds up the gradients of several backward passes. Dividing each loss by their number makes this the
        # mean. (The mean over the processes is taken by DDP.)
        (loss / self.recipe.accumulate).backward()

    def _number(self, x: Tensor | float) -> Tensor:
        """A figure as a tensor on the device, where it stays until it is read."""
        return torch.as_tensor(x).detach().to(self.engine.device, torch.float32, non_blocking=True)

    def update(self) -> None:
        """Take one optimiser step for each network that has a gradient, and update the EMA.

        Raises:
            FloatingPointError: a loss or gradient is NaN or infinite on any process. The weights have not been changed
                by that step. On a GPU, it may be an earlier one: see `_read`.
        """
        # A single bad batch can have a gradient a hundred times as long as usual. Unclipped, it would dominate AdamW's
        # running means for many steps. So the gradient of all weights together is scaled down to a norm of clip_grad.
        shared = {}
        for name, model in self.models.items():
            norm = nn.utils.clip_grad_norm_(model.parameters(), self.recipe.clip_grad)
            shared["grad_norm" if name == "model" else f"grad_norm_{name}"] = self._number(norm)
        # Before the weights are changed, all processes exchange their figures: a row for each batch, with its losses,
        # the gradient norms, and whether this process got a signal to stop. So all of them take the step, or none, and
        # all stop after the same step, because their weights must stay equal. The table stays on the device, to be
        # read by `_read`.
        asked_to_stop = self._asked_to_stop.is_set()
        shared["asked to stop"] = self._number(asked_to_stop)
        rows = [figures | shared for figures in self._figures]
        table = self.engine.gather(torch.stack([torch.stack(list(row.values())) for row in rows]))
        self._unread.append((self.step, list(rows[0]), table))
        alone = self.engine.num_processes == 1
        if self._reads_each_step or (self.step + 1) % self.recipe.log_every == 0 or (asked_to_stop and alone):
            self._read()
        for optimizer in self.optimizers.values():
            for group in optimizer.param_groups:
                group["lr"] = self.recipe.lr_at(self.step)
            # If the figures are not read now, the device itself decides: it leaves the weights as they are if any
            # figure is not finite. (PyTorch's GradScaler skips a step in the same way.)
            optimizer.found_inf = (~table.isfinite().all()).float()
            optimizer.step()  # AdamW: weight ← weight - lr (m̂ / (√v̂ + 1e-8) + weight_decay · weight)
            # None instead of zeros saves memory. AdamW also skips weights whose gradient is None, such as those of a
            # discriminator that is not trained yet; with zeros it would still apply weight decay to them.
            optimizer.zero_grad(set_to_none=True)
        # Now that the weights have changed, move their running mean towards them.
        self.ema.update(self.network)

    def _read(self) -> None:
        """Read and log the figures of all steps since the last reading. Raises FloatingPointError if one is not finite.

        The work for a GPU waits in a queue. To read a number of this step, the program has to wait until the queue is
        empty, and then the GPU has nothing to do until the next step fills it again. So the figures are only read with
        every line of the log, and before weights are saved. On a CPU, which has no queue, they are read in each step.
        Every process reads the same.
        """
        unread, self._unread = self._unread, []
        for step, names, table in unread:
            table = table.cpu().double().numpy()  # [batches figures]: the batches of all processes, in their order
            figures = dict(zip(names, table.mean(axis=0).tolist(), strict=True))  # means over batches and processes
            self._stopping |= figures.pop("asked to stop") > 0
            if not all(map(math.isfinite, figures.values())):
                # Report the samples of the batches whose own figures are not finite. If only a gradient norm is not, it
                # may have come from any batch, so report all samples.
                own = table[:, : names.index("grad_norm")]
                bad = np.flatnonzero(~np.isfinite(own).all(axis=1)).tolist() or range(self._parts)
                self._refuse(step, figures, [i for part in bad for i in self._indices(step, part, self._n)])
            self._log(step, figures)

    def _refuse(self, step: int, figures: dict[str, float], suspects: list[int]) -> None:
        """Raise the error about a figure that is not finite. It names the samples that may be the cause."""
        name, value = next(item for item in figures.items() if not math.isfinite(item[1]))
        described = [self.describe(i) for i in suspects]
        where = "; ".join(described[:FEW])
        if len(suspects) > FEW:
            path = self.folder.path / f"no_number_{step + 1:06d}.txt"
            where += f" and {len(suspects) - FEW} others, named in {path.name}"
            if self.engine.is_main_process:
                path.write_text("\n".join(described) + "\n", encoding="utf-8")
        raise FloatingPointError(
            f"the {name} of step {step + 1} is {value}, over the samples {where}. The run in {self.folder.path} stands "
            f"at its last checkpoint: start again in another folder, with a smaller lr (now {self.recipe.lr:g}) or "
            "without those samples"
        )

    def sheet(self, data: Corpus, draw: Callable[[Tensor], Tensor]) -> None:
        """Every `sample_every` steps and after the last, save twelve pictures, and below each what the model makes.

        draw: makes the pictures [12 c H W] for these indices of the data; it is called with the EMA weights. All
        processes draw, because they would have to wait anyway, and the main process saves the sheet in samples/.
        """
        if (self.step + 1) % self.recipe.sample_every == 0 or self.step + 1 == self.recipe.steps:
            indices = torch.linspace(0, len(data) - 1, 12).long()
            with self.ema.applied_to(self.network):
                pictures = torch.cat([data.batch(indices), draw(indices).cpu()])
            if self.engine.is_main_process:
                save_sheet(pictures, self.folder.path / f"samples/{self.step + 1:06d}.png", columns=12)

    # --- which samples --------------------------------------------------------------------------------------------

    def _places(self, part: int) -> range:
        """The places in a step's batch that belong to a part: 0 to 31 to the first half of a batch of 64, say."""
        size = self.recipe.batch_size // self._parts
        return range(part * size, (part + 1) * size)

    def _indices(self, step: int, part: int, n: int) -> list[int]:
        """The samples in a part of a step's batch."""
        # Count the samples of the whole run: sample p is number p % n of epoch p // n, in the order of that epoch.
        first = step * self.recipe.batch_size
        return [_order(n, self.recipe.seed, p // n)[p % n] for p in (first + place for place in self._places(part))]

    # --- log and checkpoints --------------------------------------------------------------------------------------

    def _log(self, step: int, figures: dict[str, float]) -> None:
        """Collect the figures of a step. Every `log_every` steps, write their means to the log."""
        # The clock also runs while samples are drawn and checkpoints are written.
        now = time.perf_counter()
        self._seconds, self._clock = self._seconds + now - self._clock, now
        self._since_log.append(figures)
        if (step + 1) % self.recipe.log_every:
            return
        line = {"step": step + 1, "lr": self.recipe.lr_at(step)}
        # Not every step has every figure: those of a discriminator begin at disc_start.
        for name in dict.fromkeys(name for f in self._since_log for name in f):
            line[name] = float(np.mean([f[name] for f in self._since_log if name in f]))
        samples = len(self._since_log) * self.recipe.batch_size
        line |= {"samples_per_s": samples / (self._seconds - self._logged_at), "seconds": self._seconds}
        self._since_log, self._logged_at = [], self._seconds
        if self.engine.is_main_process:
            # Eight digits, because float32 has no more. Whole numbers stay as they are.
            self.folder.append({k: float(f"{v:.8g}") if isinstance(v, float) else v for k, v in line.items()})
            self._bar.set_postfix(loss=line["loss"], refresh=False)

    def save(self) -> None:
        """Write a checkpoint. Older ones are deleted only after it has been written completely."""
        self._read()  # a figure that is NaN or infinite raises an error here, before its effects are saved
        weights = {name: network.state_dict() for name, network in self.networks.items()}
        for name, numbers in [*weights.items(), ("EMA", self.ema.weights)]:
            refuse_no_numbers(numbers, f"the {name} after step {self.step}, which is not saved,")
        if not self.engine.is_main_process:
            return
        # The state of an optimiser is AdamW's two running means for each weight, and how many steps it has made. The
        # random generators have no state to save, because each step seeds its own.
        state = {
            "step": self.step,
            "recipe": asdict(self.recipe),
            "given": self.given,
            "networks": {name: (weights[name], self.optimizers[name].state_dict()) for name in weights},
            "ema": self.ema.weights,
            "num_updates": self.ema.num_updates,
            "since_log": self._since_log,
            "seconds": (self._seconds, self._logged_at),
        }
        self.folder.save(self.step, state)

    def _resume(self) -> None:
        state = self.folder.load(self.engine.is_main_process)
        # If several machines do not share a disk, each may find another checkpoint and start at another step. Without
        # this check, nothing would show it.
        steps = self.engine.gather(torch.tensor([-1 if state is None else state["step"]], device=self.engine.device))
        if len(set(steps.tolist())) > 1:
            raise ValueError(f"processes see different checkpoints in {self.folder.path}: use a disk that all share")
        if state is not None:
            self._refuse_another_run(state["recipe"], state["given"])
            with refused_as(f"{self.folder.path} holds a run of other networks: choose another folder, or delete it"):
                for name, network in self.networks.items():
                    weights, optimizer = state["networks"][name]
                    network.load_state_dict(weights)
                    self.optimizers[name].load_state_dict(optimizer)
                for name, mean in self.ema.weights.items():
                    mean.copy_(state["ema"][name])
            self.ema.num_updates, self.step, self._since_log = state["num_updates"], state["step"], state["since_log"]
            self._seconds, self._logged_at = state["seconds"]
        if self.engine.is_main_process:
            self.folder.forget_lines_after(self.step)

    def _refuse_another_run(self, recipe: dict, given: dict) -> None:
        ours = asdict(self.recipe) | self.given
        # A checkpoint of an older version of minisd lacks the newer fields of the recipe. That version behaved as their
        # defaults do, so these are taken. A `given` entry that it lacks cannot be compared, and is accepted.
        # But a run that an older version began would not go on as it began, because its random numbers were others.
        numbers = {"random numbers": "those of an older minisd, with which it can be finished"}
        theirs = asdict(type(self.recipe)()) | self.given | recipe | numbers | given
        changed = [f"{k} was {theirs[k]}, now {v}" for k, v in ours.items() if theirs[k] != v and k not in _MAY_CHANGE]
        if changed:
            raise ValueError(
                f"{self.folder.path} holds another run ({'; '.join(changed)}): give it what it was begun with, or "
                "choose another folder"
            )


# Fields of the recipe that may change when a run is continued.
_MAY_CHANGE = {
    "accumulate", "compile", "gradient_checkpointing", "log_every", "sample_every", "save_every", "keep_checkpoints",
}  # fmt: skip
RANDOM_NUMBERS = "those of minisd 0.2"  # see `drawn`; before, each sample had a generator of its own
FEW = 8  # how many samples an error message names; all of them are written to a file


def _adamw(network: nn.Module, recipe: Recipe, name: str) -> torch.optim.AdamW:
    """AdamW, with weight decay only for the weights of linear layers, convolutions and embeddings.

    Biases and the gains of norms are not decayed (He et al. 2019, arXiv:1812.01187, section 3.1; nanoGPT).
    """
    matrices = [p for p in network.parameters() if p.requires_grad and p.ndim >= 2]
    vectors = [p for p in network.parameters() if p.requires_grad and p.ndim < 2]
    return torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay}, {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.lr, betas=recipe.betas(name), fused=True,
    )  # fmt: skip


@lru_cache(maxsize=4)
def _order(n: int, seed: int, epoch: int) -> list[int]:
    """The order of the n samples in an epoch: a random permutation."""
    return np.random.default_rng([seed, epoch]).permutation(n).tolist()


def refuse_another_size(data: Corpus, size: int, what: str) -> None:
    """Raise ValueError unless the pictures have this size. what: "this model draws", say, before the size."""
    if data.size != size:
        given = f"{data.size}x{data.size}"
        raise ValueError(f"{what} {size}x{size} pixels, and the pictures are {given}: open them with size={size}")


def digest(content) -> str:
    """A short hash of strings, numbers, configurations, or tuples and lists of these."""
    return hashlib.sha256(repr(content).encode()).hexdigest()[:12]


def fingerprint(network: Callable) -> str:
    """Identifies a network by its class and a hash of its weights. For a function it is only the name."""
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
    """Inside the `with`, a signal to stop only sets the event. A second Ctrl-C interrupts at once.

    The signals are Ctrl-C (SIGINT), SIGTERM, which clusters send before they stop a job, and SIGHUP, which is sent when
    the terminal is closed. A second Ctrl-C within one second is ignored, because torchrun sends one to processes that
    already got it from the terminal.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # Python handles signals only in the main thread
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
