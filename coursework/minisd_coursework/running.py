"""Run a function on the cases of an exercise and watch what it does; and: do two functions do the same?"""

import contextlib
import copy
import io
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .exercise import Exercise
from .texts import say

SECONDS = 10.0  # that one call of a student's function may take


class OtherDevice(Exception):
    """A result on another device than the arguments. It is compared with nothing: torch would refuse, or copy it."""


@dataclass
class Outcome:
    """What a function did on a case."""

    value: Any = None
    gradients: list[Tensor] | None = None  # None: asked for, but the result hangs on nothing
    error: BaseException | None = None
    printed: str = ""
    changed: list[str] = field(default_factory=list)  # arguments that are not what they were


@contextlib.contextmanager
def default_torch_state(seed: int = 0) -> Iterator[None]:
    """Inside, torch computes as in a new process and draws from this seed; afterwards it is set as it was before.

    Without it, a caller under `no_grad` would have the right outcomes computed, and kept, without gradients. And a
    student's function that calls `torch.set_grad_enabled(False)` or `torch.set_default_dtype(torch.float64)` would
    change the checks that come after it.
    """
    dtype, device = torch.get_default_dtype(), torch.get_default_device()
    generators = (torch.default_generator, *torch.cuda.default_generators)  # torch.manual_seed seeds the GPUs' as well
    states = [generator.get_state() for generator in generators]
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast("cpu", enabled=False):
        try:
            torch.set_default_dtype(torch.float32)
            _set_default_device(torch.device("cpu"))
            torch.default_generator.manual_seed(seed)  # torch.manual_seed is slow: it asks all GPUs
            yield
        finally:
            torch.set_default_dtype(dtype)
            _set_default_device(device)
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)


def _set_default_device(device: torch.device) -> None:
    if torch.get_default_device() != device:
        torch.set_default_device(None)  # this alone brings back the device of a `with torch.device(...)` around us
    if torch.get_default_device() != device:
        torch.set_default_device(device)


@cache
@default_torch_state()
def cases_of(exercise: Exercise) -> dict[str, dict[str, Any]]:
    found = [case for several in exercise.cases for case in several().items()]
    return {label: dict(zip(exercise.arguments, args, strict=True)) for label, args in found}


@cache
@default_torch_state()
def right_outcomes(exercise: Exercise) -> list[Outcome]:
    return [run(exercise, exercise.compile(), args) for args in cases_of(exercise).values()]


def run(
    exercise: Exercise, function: Callable, args: dict[str, Any], seed: int = 0, gradients: bool = True
) -> Outcome:
    """Call the function on copies of the arguments, and watch. What it changes of torch's global state is undone."""
    given = {name: copied(value) for name, value in args.items()}
    leaves = []
    for name in exercise.gradients if gradients else ():
        if isinstance(given[name], nn.Module):
            leaves += list(given[name].parameters())
        else:
            leaves.append(given[name].requires_grad_())
            given[name] = leaves[-1] * 1  # no leaf: one may change it in place
    outcome, printed = Outcome(), io.StringIO()
    try:
        with default_torch_state(seed), warnings.catch_warnings(), contextlib.redirect_stdout(printed):
            warnings.simplefilter("ignore")
            with _at_most(SECONDS):
                outcome.value = function(*given.values())
                elsewhere = [t.device for t in _tensors(outcome.value) if t.device.type != "cpu"]
                if elsewhere:
                    raise OtherDevice(say("kind.device", device=elsewhere[0]))
                outcome.value = exercise.read(outcome.value)
        # The function may have switched gradients off for good, so they are computed after torch's state is restored.
        outcome.gradients = _gradients(outcome.value, leaves) if leaves else None
    except (Exception, SystemExit) as error:
        outcome.error = error
    outcome.printed = printed.getvalue()
    if outcome.error is None:
        outcome.changed = [name for name, value in args.items() if not _unchanged(given[name], value)]
        outcome.value = _detached(outcome.value)
    return outcome


def watch(exercise: Exercise, function: Callable, args: dict[str, Any], seed: int = 0) -> Outcome:
    """Call a student's function, on copies of the models as well: it may move them to a GPU, or train them."""
    return run(exercise, function, copy.deepcopy(args), seed)


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in what was returned: itself, or those in lists, tuples and dicts."""
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [value] if isinstance(value, Tensor) else [tensor for part in parts for tensor in _tensors(part)]


def _detached(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    return value.detach() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a loop that does not end. (Where there are signals: on Unix, in the main thread.)"""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise TimeoutError(say("error.still_running", seconds=f"{seconds:.0f}"))

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(map(copied, value)) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value


def _unchanged(now: Any, before: Any) -> bool:
    if isinstance(before, Tensor):
        return now.shape == before.shape and now.device == before.device and torch.equal(now.detach(), before)
    if isinstance(before, list):
        return len(now) == len(before) and all(map(_unchanged, now, before))
    return now == before if isinstance(before, dict) else True


def _gradients(value: Any, leaves: list[Tensor]) -> list[Tensor] | None:
    """Of a sum of all that was returned, in which every number has its own weight."""
    tensors = [t for t in _tensors(value) if t.requires_grad and t.is_floating_point()]
    if not tensors:
        return None
    total = sum((t * torch.arange(1, t.numel() + 1).cos().view(t.shape)).sum() for t in tensors)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]


# --- comparing --------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Whether a, a student's, is what b is, the solution's, as numbers. (float64 for float32 will do.)"""
    if isinstance(b, Tensor):
        if b.ndim == 0 and isinstance(a, int | float | np.generic) and not isinstance(a, bool):
            return same(float(a), float(b.detach()), tolerance)  # a plain number will do, unless gradients are wanted
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return False
        if b.is_floating_point() != a.is_floating_point() or (b.dtype == torch.bool) != (a.dtype == torch.bool):
            return False
        if torch.uint8 in (a.dtype, b.dtype) and a.dtype != b.dtype:
            return False  # a byte is asked for as a byte; other integers may be of any size
        if not b.is_floating_point():
            return bool((a == b).all())
        if (a.dtype != b.dtype and a.element_size() < b.element_size()) or a.is_complex():
            return False
        a, b = a.detach().double(), b.detach().double()
        finite = b[b.isfinite()]
        atol = 0.1 * tolerance * float(finite.abs().max()) if finite.numel() else 0.0
        return torch.allclose(a, b, rtol=tolerance, atol=atol + 1e-9, equal_nan=True)
    if isinstance(b, list | tuple):
        a = as_list(a)
        return a is not None and len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(b, int | float) and not isinstance(b, bool):
        if isinstance(a, Tensor | np.ndarray | np.generic):
            a = a.item() if len(a.flatten()) == 1 else None
        if isinstance(b, int) and isinstance(a, float):
            return False  # 3.0 is no index
        return isinstance(a, int | float) and (a == b or abs(a - b) <= tolerance * abs(b) + 1e-9)
    return a is b or (type(a) is type(b) and isinstance(a, str | bool) and a == b)


def as_list(value: Any) -> list | None:
    if isinstance(value, Tensor | np.ndarray):
        return value.tolist() if value.ndim else None
    return list(value) if isinstance(value, list | tuple | range) else None


def same_outcome(a: Outcome, b: Outcome, tolerance: float) -> bool:
    if a.error is not None or b.error is not None:
        return type(a.error) is type(b.error) and str(a.error) == str(b.error)
    if not same(a.value, b.value, tolerance):
        return False
    if a.gradients is None or b.gradients is None:
        return a.gradients is b.gradients
    return all(same(x, y, 10 * tolerance) for x, y in zip(a.gradients, b.gradients, strict=True))


def close(a: Tensor, b: Tensor, tolerance: float = 3e-4) -> bool:
    return bool(((a - b).abs() <= tolerance * b.abs() + 2e-5).all())


def multiple(a: Tensor, b: Tensor) -> float | None:
    """c, if a = c b."""
    if a.shape != b.shape or not a.is_floating_point() or not (a.isfinite().all() and b.isfinite().all()):
        return None
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    squared = float(b @ b)
    if squared == 0:
        return None
    c = float(a @ b) / squared
    return c if torch.allclose(a, c * b, rtol=3e-4, atol=1e-5 * float(a.abs().max()) + 1e-12) else None
