"""How two functions are compared: in turns, on a quiet machine, each with its peak memory.

Time. A machine does not stay equally fast: it heats up, and others use it. So ours and theirs run in turns, and each
pair gives one ratio; its median is what counts, and the smallest and the largest ratio say how sure it is. Which of the
two goes first alternates. Beside each pair, the kernel's own count (/proc/stat) tells how many cores others kept busy
meanwhile. A pair that was disturbed is run again; where there is no quiet, there is no verdict.

Memory. A fresh process imports both libraries, notes its resident memory, builds one of the two and calls it twice. The
peak during the calls (the kernel's own high-water mark, VmHWM, set back before) minus what was noted is what that
peer needs: weights, activations, and the scratch space of the kernels, which no count of tensors would show. On a GPU
it is the allocator's own peak.
"""

import ctypes
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

BLOCK = 0.5  # seconds: what is quicker is repeated until it takes that long, or the clocks would be too coarse
BUSY = 0.15  # cores that others may keep busy before a pair counts as disturbed
M_MMAP_THRESHOLD = -3  # its number in glibc's malloc.h
ATTEMPTS = 3  # times as many pairs as asked for are run at most, in search of quiet ones

Call = Callable[[], Any]  # does the work once, and returns what came out of it
Build = Callable[[], Call]  # makes the networks; a function of a module, or a `partial` of one, so that it can be sent


class Unavailable(Exception):
    """This minisd can't do what the case asks for; the message says what."""


@dataclass(frozen=True)
class Case:
    """Two ways to do one thing, and how they should compare."""

    group: str  # what `--only` chooses by
    setting: str
    ours: Build
    theirs: Build
    goal: str  # in words
    max_time: float | None = None  # ours / theirs at most, rounded to two decimals; None: only reported
    max_memory: float | None = None
    tolerance: float | None = None  # how far the outputs may differ, as a part of the largest number in them
    per: tuple[int, int] = (1, 1)  # a time is divided by that many, ours and theirs: steps in a drawing
    measures_memory: bool = True


@dataclass(frozen=True)
class Timing:
    """Seconds a call of either, pair by pair, and how many cores others kept busy during each pair."""

    ours: list[float]
    theirs: list[float]
    others: list[float]
    quiet: bool  # whether all pairs were undisturbed

    @property
    def ratios(self) -> list[float]:
        return [a / b for a, b in zip(self.ours, self.theirs, strict=True)]

    @property
    def ratio(self) -> float:
        return statistics.median(self.ratios)


def compare(ours: Call, theirs: Call, pairs: int, per: tuple[int, int] = (1, 1), device: str = "cpu") -> Timing:
    """Run both in turns until there are as many undisturbed pairs as asked for, or it has to be given up."""
    repeats = [_repeats(call, device) for call in (ours, theirs)]  # this is the warm-up, too
    quiet, disturbed = [], []
    for attempt in range(ATTEMPTS * pairs):
        before = busy_seconds()
        start = time.perf_counter()
        order = ((0, ours), (1, theirs)) if attempt % 2 == 0 else ((1, theirs), (0, ours))
        seconds = [0.0, 0.0]
        for which, call in order:
            seconds[which] = _block(call, repeats[which], device) / repeats[which] / per[which]
        others = _others_since(before, time.perf_counter() - start)
        (quiet if others <= allowance() else disturbed).append((*seconds, others))
        if len(quiet) == pairs:
            break
    enough = len(quiet) == pairs
    kept = quiet if enough else sorted(quiet + disturbed, key=lambda pair: pair[2])[:pairs]
    return Timing(*map(list, zip(*kept, strict=True)), quiet=enough)


def _repeats(call: Call, device: str) -> int:
    """How often a call must be repeated to fill a block, after a first one that warms it up."""
    if _block(call, 1, device) >= 4 * BLOCK:
        return 1
    return max(1, round(BLOCK / _block(call, 1, device)))


def _block(call: Call, repeats: int, device: str) -> float:
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def difference(ours: Any, theirs: Any) -> float:
    """The largest difference between two outputs, as a part of the largest number in them."""
    ours, theirs = (torch.as_tensor(a).detach().float().cpu() for a in (ours, theirs))
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# -- is anybody else using this machine? --------------------------------------------------------------------------


def busy_seconds() -> tuple[float, float] | None:
    """CPU seconds since the start: of the whole machine, and of this process with those it has waited for.

    None where there is no /proc/stat: there, nobody watches.
    """
    try:
        first = Path("/proc/stat").read_text().split("\n", 1)[0]
    except OSError:
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, first.split()[1:9])
    ticks = user + nice + system + irq + softirq + steal  # stolen by other guests of the same host: as bad as used
    return ticks / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


def _others_since(before: tuple[float, float] | None, seconds: float) -> float:
    """How many cores others kept busy since then."""
    if before is None:
        return 0.0
    machine, own = (b - a for a, b in zip(before, busy_seconds(), strict=True))
    return max(0.0, machine - own) / seconds


def allowance() -> float:
    """Cores that others may use: hardly any, and half of those that we leave idle."""
    return BUSY + max(0, (os.cpu_count() or 1) - torch.get_num_threads()) / 2


def others_now(seconds: float = 1.0) -> float:
    """How many cores others keep busy, looking on for a moment."""
    before = busy_seconds()
    time.sleep(seconds)
    return _others_since(before, seconds)


# -- memory -------------------------------------------------------------------------------------------------------


def peak_memory(build: Build, threads: int = 1, device: str = "cpu") -> int | None:
    """Bytes that one peer needs at most, measured in a process of its own; None where the kernel doesn't tell."""
    if device == "cpu" and not Path("/proc/self/clear_refs").exists():
        return None
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_peak_memory, args=(build, threads, device, sender))
    process.start()
    sender.close()
    try:
        return receiver.recv()
    except EOFError:
        return None  # it died, perhaps for want of memory, and has said so itself
    finally:
        process.join()


def _peak_memory(build: Build, threads: int, device: str, sender) -> None:
    torch.set_num_threads(threads)
    # What is freed goes back at once, if it is larger than 64 KB. By default C's allocator decides as it goes along
    # what to keep, and the peak of one and the same program differs by several percent from run to run.
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 2**16)
    before = _resident()
    call = build()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        _resident()
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again from here (man 5 proc)
    for _ in range(2):
        call()
    sender.send(torch.cuda.max_memory_allocated() if device == "cuda" else _status("VmHWM") - before)


def _resident() -> int:
    """Bytes in memory, once Python and the allocator have handed back what they only keep."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _status("VmRSS")


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


# -- why ----------------------------------------------------------------------------------------------------------


def profile(call: Call, device: str = "cpu", rows: int = 12) -> str:
    """The operations on which a call spends its time."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    with torch.profiler.profile(activities=activities) as profiler:
        call()
    return profiler.key_averages().table(
        sort_by=f"self_{device}_time_total", row_limit=rows, max_name_column_width=50
    )
