"""What shows at the result itself, whatever the exercise: an error, None, a wrong type, dtype, shape or gradient."""

import contextlib
import inspect
import itertools
import linecache
import re
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .attempt import Attempt, arguments, changes, kind_of, listed, short
from .running import OtherDevice, as_list, multiple, same, same_outcome, watch
from .texts import read, say


def nothing_to_compare(attempt: Attempt, function: Callable) -> Iterator[str]:
    for outcome in attempt.outcomes:
        if isinstance(outcome.error, NotImplementedError) and not str(outcome.error):  # torch says what it cannot do
            yield say("unwritten.not_yet")
        elif isinstance(outcome.error, OtherDevice):
            yield str(outcome.error)
    for _, outcome, right in attempt.wrong():
        value, kind = outcome.value, kind_of(outcome.value)
        if value is None:
            yield from _returns_what_a_method_returns(function)
            always = all(o.value is None for o in attempt.outcomes)
            none = say("unwritten.none") if always else say("unwritten.none_sometimes")
            yield f"{none} {say('unwritten.printed') if outcome.printed else ''}".strip()
        elif value is Ellipsis or value is NotImplemented:
            yield say("unwritten.not_yet")
        elif inspect.isgenerator(value):
            yield say("unwritten.expression") if value.__name__ == "<genexpr>" else say("unwritten.generator")
        elif isinstance(value, Iterator):
            yield say("unwritten.iterator", kind=kind)
        elif callable(value):
            yield say("unwritten.callable", kind=kind)
        elif isinstance(right.value, Tensor) and isinstance(value, np.ndarray | np.generic):
            yield say("unwritten.numpy")
        elif attempt.exercise.gradients and isinstance(value, int | float):
            yield say("unwritten.number")


def _returns_what_a_method_returns(function: Callable) -> Iterator[str]:
    """`return ts.reverse()`, or `ts = ts.reverse()`."""
    with contextlib.suppress(OSError, TypeError):  # a function without a source that can be read
        found = re.search(r"(?:return |= ).*\.(append|extend|insert|reverse|sort)\(", inspect.getsource(function))
        if found:
            yield say("unwritten.in_place", method=found[1])


INSIDE = ("must match the size", "mat1 and mat2", "channels, but got")  # shapes that a layer does not expect


def raised(error: BaseException, args: dict[str, Any]) -> str:
    """The error, its line, and what usually is behind it. `args`: what the function was called with."""
    lines = str(error).strip().splitlines() or [say("error.no_message")]
    message = lines[-1 if "einops" in type(error).__module__ else 0].strip().rstrip(".")  # einops says why at the end
    ours = ("site-packages", "lib/python", str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in ours)]
    line = ""
    if own:
        number = own[-1].lineno
        code = (own[-1].line or linecache.getline(own[-1].filename, number)).strip()
        line = say("error.line_with_code", number=number, code=code) if code else say("error.line", number=number)
    schedule = isinstance(args.get("alphas_cumprod", args.get("betas")), Tensor)
    axes = [value.ndim for value in args.values() if isinstance(value, Tensor)]
    if own and own[-1] is not frames[-1] and any(text in message for text in INSIDE):
        hint = say("error.inside")
    elif "must match the size of tensor" in message and schedule and 4 in axes:
        hint = say("error.broadcast")
    elif re.search(r"\.T\b", line) and "size" in message and max(axes, default=0) > 2:
        hint = say("error.transposed")
    else:
        told = f"{type(error).__name__}: {message}"
        hint = next((say(f"hints.{text}") for text in read("sentences.toml")["hints"] if text in told), "")
    return f"{say('error.raised', kind=type(error).__name__, line=line, message=message)} {hint}".strip()


def is_random(args: dict[str, Any]) -> str:
    given = [name for name in ("t", "drop", "encoder_noise", "noise", "generator") if name in args]
    if "noise" in args or "generator" in args:
        # where a model is trained, t and drop are drawn, too
        return say("random.given", drawn=listed(given if "model" in args else given[-1:]))
    return say("random.seeds") if "seeds" in args else say("random.nothing")


def changes_in_place(names: list[str]) -> str:
    return say("arguments.changed", names=listed(names))


# --- another type, dtype or shape -------------------------------------------------------------------------------------


def wrong_kind(attempt: Attempt) -> Iterator[str]:
    """Another type, dtype or shape than the right one."""
    finite = all(bool(r.value.isfinite().all()) for r in attempt.rights if isinstance(r.value, Tensor))
    for _, outcome, right in attempt.wrong():
        value, wanted = outcome.value, right.value
        if isinstance(wanted, Tensor) and isinstance(value, Tensor):
            yield from _wrong_dtype(value, wanted)
            if value.shape != wanted.shape:
                yield from _wrong_shape(attempt, value, wanted)
            elif value.is_floating_point() and not value.isfinite().all() and finite:
                if value.isfinite().any():  # where all is NaN, everything that makes NaN would fit
                    yield from _matching_small_changes(attempt)
                yield say("kind.not_finite", what="NaN" if value.isnan().any() else "infinity")
        elif isinstance(wanted, Tensor):
            yield from _wrong_container(attempt, value, wanted)
        elif isinstance(wanted, list | tuple):
            yield from _wrong_list(attempt, value, list(wanted))
        elif not isinstance(value, Tensor | int | float):
            yield say("kind.no_number", kind=kind_of(value))


def _matching_small_changes(attempt: Attempt) -> Iterator[str]:
    yield from attempt.matching(arguments(attempt.exercise))
    yield from attempt.matching(changes(attempt.exercise))


def _wrong_list(attempt: Attempt, value: Any, wanted: list) -> Iterator[str]:
    """Other values, where a list is wanted; or the right ones in another order."""
    items, tolerance, count = as_list(value), attempt.exercise.tolerance, len(wanted)
    no_values = say("kind.no_values", kind=kind_of(value), count=count)
    for place, item in enumerate(items or []):
        if same(item, wanted, tolerance):
            yield say("kind.at_a_place", wants=no_values, place=place)
    if items is None:
        yield no_values
    elif len(items) == count:
        orders = itertools.islice(itertools.permutations(items), 5040)
        if any(same(list(order), wanted, tolerance) for order in orders):
            yield say("kind.reversed") if same(items[::-1], wanted, tolerance) else say("kind.reordered")
        elif same([int(i) if type(i) is float else i for i in items], wanted, 1e-4):
            yield say("kind.floats", first=items[0])
    else:
        less, more = sorted((items, wanted), key=len)
        what, extra = "too_many" if more is items else "missing", len(more) - len(less)
        ends = {"end": (more[:-extra], more[-extra:]), "beginning": (more[extra:], more[:extra])}
        for place, (part, rest) in ends.items():
            if less and same(part, less, tolerance):
                yield say(f"count.{what}_at_the_{place}", count=len(items), wanted=count, rest=short(rest))
        yield from _matching_small_changes(attempt)
        yield say("kind.other_count", count=len(items), wanted=count, values=short(items), right=short(wanted))


def _wrong_container(attempt: Attempt, value: Any, wanted: Tensor) -> Iterator[str]:
    """A tuple, a list, a dict or a number, where a tensor is wanted."""
    tolerance = attempt.exercise.tolerance
    wants = say("kind.wants", kind=kind_of(value), shape=list(wanted.shape))
    if isinstance(value, dict):
        for key, item in value.items():
            if same(item, wanted, tolerance):
                yield say("kind.under_a_key", wants=wants, key=repr(key))
    if isinstance(value, list | tuple):
        for place, item in enumerate(value):
            if same(item, wanted, tolerance):
                yield say("kind.at_a_place", wants=wants, place=place)
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            every = all(isinstance(item, Tensor) for item in value) and bool(value)
            whole = torch.stack(list(value)) if every else torch.tensor(value)
            if same(whole.double(), wanted.double(), tolerance):
                yield say("kind.to_a_tensor", wants=wants, make="torch.stack(...)" if every else "torch.tensor(...)")
    yield say("kind.no_tensor", wants=wants)


def _wrong_dtype(value: Tensor, wanted: Tensor) -> Iterator[str]:
    a, b = (str(t.dtype).removeprefix("torch.") for t in (value, wanted))
    kinds = {"int32", "int64", "int16"}
    if a == b or {a, b} <= kinds or {a, b} == {"float32", "float64"}:
        return
    said = [say("kind.dtype", dtype=a, wanted=b)]
    if a in kinds:
        said.append(say("kind.dtype_lost"))
    if a in ("float16", "bfloat16"):
        said.append(say("kind.dtype_rounded"))
    if value.shape == wanted.shape and same(value.to(wanted.dtype), wanted, 2e-2):
        said.append(say("kind.dtype_equal"))
    yield " ".join(said)


def _wrong_shape(attempt: Attempt, value: Tensor, wanted: Tensor) -> Iterator[str]:
    tolerance = attempt.exercise.tolerance
    shapes = say("shape.shapes", shape=list(value.shape), wanted=list(wanted.shape))
    a, b = value.detach().double(), wanted.detach().double()
    if sorted(a.shape) == sorted(b.shape) and a.ndim <= 5:
        if any(same(a.permute(order), b, tolerance) for order in itertools.permutations(range(a.ndim))):
            yield say("shape.axes", shapes=shapes)
    if a.numel() == b.numel() and same(a.reshape(b.shape), b, tolerance):
        yield say("shape.numbers", shapes=shapes)
    if b.numel() == 1 and a.numel() > 1:
        for name in ("mean", "sum"):
            if same(getattr(a, name)().reshape(b.shape), b, tolerance):
                yield say("shape.reduction_missing", name=name, shapes=shapes)
    reductions = ("mean", "sum", "amax", "amin") if b.isfinite().all() else ()
    for dims, name, keepdim in itertools.product(_axes(b), reductions, (False, True)):
        if same(a, getattr(b, name)(dim=dims, keepdim=keepdim), tolerance):
            axes = " and ".join(map(str, dims))
            yield say("shape.reduced", name=name.removeprefix("a"), axes=axes, shapes=shapes)
    for dims, name in itertools.product(_axes(a), ("mean", "sum")):
        if same(getattr(a, name)(dim=dims), b, tolerance):
            yield say("shape.not_reduced", name=name, axes=" and ".join(map(str, dims)), shapes=shapes)
    yield from _too_much(attempt, a, b, shapes)
    yield from attempt.matching(changes(attempt.exercise))
    timed = isinstance(attempt.cases[0].get("t"), Tensor)
    grown = a.ndim > b.ndim >= 1 or (a.ndim == b.ndim > 1 and a.numel() > b.numel() and len(a) > len(b))
    broadcast = say("shape.broadcast", ones=" 1" * (b.ndim - 1), count=b.ndim) if timed and grown else ""
    yield f"{say('shape.shape', shapes=shapes)} {broadcast}".strip()


def _axes(x: Tensor) -> list[tuple[int, ...]]:
    """Each axis, each two of them, ..., all of them."""
    return [dims for n in range(1, x.ndim + 1) for dims in itertools.combinations(range(x.ndim), n)]


def _too_much(attempt: Attempt, a: Tensor, b: Tensor, shapes: str) -> Iterator[str]:
    """The right result and more, or a part of it. (a is the student's)"""
    tolerance, args = attempt.exercise.tolerance, attempt.cases[0]
    for name, index in args.items():
        if isinstance(index, Tensor) and index.ndim == 1 and not index.is_floating_point() and a.ndim == b.ndim:
            if index.dtype != torch.bool and len(a) > int(index.max()) and same(a[index], b, tolerance):
                yield say("shape.table", name=name, shapes=shapes)
    if a.ndim == b.ndim + 1 >= 2 and a.shape[0] == a.shape[1] == b.shape[0]:
        if same(torch.stack([a[i, i] for i in range(len(a))]), b, tolerance):
            yield say("shape.diagonal", shapes=shapes)
    for more, less, what in ((a, b, "too_long"), (b, a, "too_short")):
        for dim in range(a.ndim if a.ndim == b.ndim else 0):
            count = more.shape[dim] - less.shape[dim]
            if count > 0 and less.shape[dim] and more.narrow(dim, 0, less.shape[dim]).shape == less.shape:
                for start, place in ((0, "end"), (count, "beginning")):
                    if same(more.narrow(dim, start, less.shape[dim]), less, tolerance):
                        yield say(f"axis.{what}_at_its_{place}", count=count, axis=dim, shapes=shapes)
    if a.ndim <= b.ndim and a.numel() < b.numel():
        for dim, (place, at) in itertools.product(range(b.ndim), (("first", 0), ("last", -1))):
            if b.shape[dim] > 1 and same(a.squeeze(), b.select(dim, at).squeeze(), tolerance):
                yield say(f"axis.only_the_{place}", axis=dim, shapes=shapes)


# --- gradients, and what the result does not depend on ----------------------------------------------------------------


def without_time(attempt: Attempt, function: Callable) -> Iterator[str]:
    """Is the result the same at every t?"""
    args, mine = attempt.cases[0], attempt.outcomes[0]
    if isinstance(args.get("t"), Tensor) and isinstance(mine.value, Tensor):
        others = (watch(attempt.exercise, function, {**args, "t": args["t"] * 0 + k}) for k in (0, 1))
        if all(same_outcome(other, mine, 1e-7) for other in others):
            yield say("arguments.time_unused")


def gradient_only(attempt: Attempt) -> Iterator[str]:
    """The values are right, and what flows back is not."""
    tolerance, results = attempt.exercise.tolerance, zip(attempt.outcomes, attempt.rights, strict=True)
    values = [same(outcome.value, right.value, tolerance) for outcome, right in results]
    through = listed(attempt.exercise.gradients)
    if not all(values) or not through:
        return
    if all(o.gradients is None for o in attempt.outcomes):
        yield say("gradient.none", through=through)
    yield from attempt.matching(changes(attempt.exercise))
    if all(not o.gradients or not any(g.any() for g in o.gradients) for o in attempt.outcomes):
        yield say("gradient.zero", through=through)
    for _, outcome, right in attempt.wrong():
        pairs = list(zip(outcome.gradients or [], right.gradients, strict=False))
        factors = [1.0 if not a.any() and not b.any() else multiple(a, b) for a, b in pairs]
        if factors and all(factor is not None for factor in factors):
            times = " and ".join(f"{factor:.4g}" for factor in factors)
            yield say("gradient.times", through=through, times=times)
    yield say("gradient.wrong", through=through)


def same_as_an_argument(attempt: Attempt) -> Iterator[str]:
    for name in attempt.exercise.arguments:
        pairs = [(args[name], o.value) for args, o in zip(attempt.cases, attempt.outcomes, strict=True)]
        if all(isinstance(a, Tensor) and isinstance(v, Tensor) and same(v, a, 1e-6) for a, v in pairs):
            yield say("arguments.returned", name=name)


def at_the_ends(attempt: Attempt) -> Iterator[str]:
    """Right for every t but the first, or the last."""
    name = next((n for n in ("t", "timesteps") if isinstance(attempt.cases[0].get(n), Tensor)), None)
    samples = []  # of each: (is it right, is its t the first one, is it the last one)
    for args, outcome, right in zip(attempt.cases, attempt.outcomes, attempt.rights, strict=True):
        t, schedule = args.get(name), args.get("alphas_cumprod", args.get("betas"))
        a, b = outcome.value, right.value
        if t is None or not isinstance(a, Tensor) or a.shape != b.shape or a.shape[:1] != t.shape:
            return
        last = -1 if schedule is None else len(schedule) - 1
        for k, x, y in zip(t.tolist(), a, b, strict=True):
            samples.append((same(x, y, attempt.exercise.tolerance), k == 0, k == last))
    wrong = [sample for sample in samples if not sample[0]]
    if 0 < len(wrong) < len(samples) and all(first for _, first, _ in wrong):
        yield say("arguments.first_time")
    if 0 < len(wrong) < len(samples) and all(last for *_, last in wrong):
        yield say("arguments.last_time")
