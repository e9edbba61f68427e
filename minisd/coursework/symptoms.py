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

from .running import as_list, multiple, run, same, same_outcome
from .trial import Trial, arguments, changes, short


def nothing_to_compare(trial: Trial) -> Iterator[str]:
    for outcome in trial.outcomes:
        if isinstance(outcome.error, NotImplementedError):
            yield "It is not written yet: the stub raises NotImplementedError."
    for _, outcome, right in trial.wrong():
        value = outcome.value
        if value is None:
            printed = " What it printed is lost to the caller: hand it over." if outcome.printed else ""
            yield f"It returns None: is the `return` missing?{printed}"
        elif value is Ellipsis or value is NotImplemented:
            yield "It is not written yet."
        elif inspect.isgenerator(value):
            yield "It returns a generator: write `return`, not `yield`."
        elif isinstance(value, Iterator):
            yield f"It returns a {type(value).__name__}, which can be read once only: make a list of it, `list(...)`."
        elif callable(value):
            yield f"It returns a {type(value).__name__}, which can be called, not the result: are the () missing?"
        elif isinstance(right.value, Tensor) and isinstance(value, np.ndarray | np.generic):
            yield (
                "It returns a NumPy array, where a tensor is wanted: NumPy knows neither gradients nor the GPU. The"
                " same functions are there in torch."
            )


def raised(error: BaseException, args: dict[str, Any]) -> str:
    """The error, its line, and what usually is behind it. `args`: what the function was called with."""
    lines = str(error).strip().splitlines() or ["no message"]
    message = lines[-1 if "einops" in type(error).__module__ else 0].strip().rstrip(".")  # einops says why at the end
    ours = ("site-packages", "lib/python", str(Path(__file__).parent))
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(part in f.filename for part in ours)]
    line = ""
    if own:
        code = (own[-1].line or linecache.getline(own[-1].filename, own[-1].lineno)).strip()
        line = f", in line {own[-1].lineno}: `{code}`" if code else f", in line {own[-1].lineno}"
    hint = next((h for text, h in HINTS.items() if text in f"{type(error).__name__}: {message}"), "")
    schedule = isinstance(args.get("alphas_cumprod", args.get("betas")), Tensor)
    pictures = any(isinstance(value, Tensor) and value.ndim == 4 for value in args.values())
    if own and own[-1] is not frames[-1] and any(text in message for text in INSIDE):
        hint = " The error comes from a function that you call: was it given what it expects, in the right order?"
    elif "must match the size of tensor" in message and pictures and schedule:
        hint = BROADCAST
    elif re.search(r"\.T\b", line) and "size" in message and any(_axes(value) > 2 for value in args.values()):
        hint = " `.T` turns all axes round, the batch's too: `.mT` or `.transpose(-2, -1)` exchanges the last two."
    return f"It raises {type(error).__name__}{line}. {message}.{hint}"


def _axes(value: Any) -> int:
    return value.ndim if isinstance(value, Tensor) else 0


INSIDE = ("must match the size", "mat1 and mat2", "channels, but got")  # shapes that a layer does not expect
HINTS = {
    "TimeoutError": " Is there a loop in which nothing moves on?",
    "must match the size of tensor": " Two shapes that do not fit: print both before that line.",
    "mat1 and mat2 shapes": " In a matrix product the inner sizes must be equal: is a transpose missing?",
    "NameError": " The name was never set in the function: is it misspelt, or set in another cell?",
    "object has no attribute": " Is it a Python number where a tensor is expected, or the other way round?",
    "only integer tensors": " An index has to hold integers.",
    "converted to Python scalars": " `math`, `float` and `int` take one number: torch has functions for whole tensors.",
    "min() arg is an empty": " There is nothing to choose from: that case needs a line of its own.",
    "max() arg is an empty": " There is nothing to choose from: that case needs a line of its own.",
    "tensors used as indices": " An index has to hold integers: `t.long()`.",
    "KeyError": " The dict has no such key: ask first, `key in d`, or give a value for it, `d.get(key, value)`.",
    "out of bounds": " Off by one at the end? There are T entries, counted 0 ... T-1.",
    "out of range": " Off by one at the end? The last index is the length minus 1.",
    "is invalid for input of size": (
        " A reshape needs as many numbers as there are: is one of the sizes another by then? (-1 lets torch count it.)"
    ),
    "must be Tensor, not float": " It is a Python number: its root is `x ** 0.5`, or `math.sqrt(x)`.",
    "cuda": " Let the device come from the arguments: `x.device`.",
    "math domain": " The root or the logarithm of a number that is negative or 0.",
}


BROADCAST = (
    " Two shapes that do not fit: where a coefficient for each picture, [b], multiplies pictures [b c h w], it has to"
    " become [b 1 1 1] first: `.reshape(-1, 1, 1, 1)`."
)


def is_random(args: dict[str, Any]) -> str:
    given = [f"`{name}`" for name in ("t", "drop", "encoder_noise", "noise", "generator") if name in args]
    if "noise" in args or "generator" in args:
        drawn = given if "model" in args else given[-1:]  # where a model is trained, t and drop are drawn, too
        return (
            "Two calls with the same arguments return different numbers: you draw random numbers of your own, but those"
            f" to be used are given: {' and '.join(drawn)}."
        )
    if "seeds" in args:
        return (
            "Two calls with the same arguments return different numbers: the seeds that are given are not used, or not"
            " for all. Each picture is drawn by a torch.Generator of its own, seeded with its seed."
        )
    return (
        "Two calls with the same arguments return different numbers, but nothing in this function is random: you draw"
        " numbers of your own, where all that is needed comes with the arguments."
    )


def changes_in_place(names: list[str]) -> str:
    listed = " and ".join(f"`{name}`" for name in names)
    return (
        f"Your function changes its argument {listed} in place (`+=`, `*=`, a method that ends in `_`, or an assignment"
        " to an index). The caller goes on with the changed values and does not know it: work on a new tensor."
    )


def wrong_kind(trial: Trial) -> Iterator[str]:
    """Another type, dtype or shape than the right one."""
    finite = all(bool(r.value.isfinite().all()) for r in trial.rights if isinstance(r.value, Tensor))
    for _, outcome, right in trial.wrong():
        value, wanted = outcome.value, right.value
        if isinstance(wanted, Tensor) and isinstance(value, Tensor):
            yield from _wrong_dtype(value, wanted)
            if value.shape != wanted.shape:
                yield from _wrong_shape(trial, value, wanted)
            elif value.is_floating_point() and not value.isfinite().all() and finite:
                if value.isfinite().any():  # where all is NaN, everything that makes NaN would fit
                    yield from trial.convict(arguments(trial.exercise))
                    yield from trial.convict(changes(trial.exercise))
                kind = "NaN" if value.isnan().any() else "infinity"
                yield (
                    f"There is {kind} in your result: somewhere you divide by zero, take the root or the logarithm of"
                    " something that is not positive, or multiply infinity by 0."
                )
        elif isinstance(wanted, Tensor):
            yield from _wrong_container(trial, value, wanted)
        elif isinstance(wanted, list | tuple):
            items = as_list(value)
            if items is None:
                yield f"It returns a {type(value).__name__}, where {len(wanted)} values are wanted."
            elif len(items) == len(wanted) and any(
                all(same(items[i], w, trial.exercise.tolerance) for i, w in zip(order, wanted, strict=True))
                for order in itertools.islice(itertools.permutations(range(len(wanted))), 5040)
            ):
                backwards = same(items[::-1], wanted, trial.exercise.tolerance)
                yield f"The right values, but in {'the reverse' if backwards else 'another'} order."
            elif len(items) == len(wanted) and same([int(i) if type(i) is float else i for i in items], wanted, 1e-4):
                yield f"It holds floats, {items[0]}, where integers are wanted: `//` divides integers, or `int(...)`."
            elif len(items) != len(wanted):
                less, more = sorted((items, wanted), key=len)
                what = "too many" if more is items else "missing"
                count = len(more) - len(less)
                ends = ((more[:-count], more[-count:], "end"), (more[count:], more[:count], "beginning"))
                for part, rest, place in ends:
                    if less and same(list(part), list(less), trial.exercise.tolerance):
                        number = f"{len(items)} values where {len(wanted)} are wanted"
                        yield f"It returns {number}: {short(rest)} is {what} at the {place}."
                yield from trial.convict(arguments(trial.exercise))
                yield from trial.convict(changes(trial.exercise))
                yield (
                    f"It returns {len(items)} values, where {len(wanted)} are wanted: {short(items)} in place of"
                    f" {short(wanted)}."
                )


def _wrong_container(trial: Trial, value: Any, wanted: Tensor) -> Iterator[str]:
    """A tuple, a list, a dict or a number, where a tensor is wanted."""
    kind, tolerance = type(value).__name__, trial.exercise.tolerance
    wants = f"It returns a {kind}, where a tensor of shape {list(wanted.shape)} is wanted"
    if isinstance(value, dict):
        right = [key for key, item in value.items() if same(item, wanted, tolerance)]
        if right:
            yield f"{wants}: the one under {right[0]!r} is right, return that alone."
    if isinstance(value, list | tuple):
        places = [i for i, item in enumerate(value) if same(item, wanted, tolerance)]
        if places:
            yield f"{wants}: the one at place {places[0]} is right, return that alone."
        with contextlib.suppress(TypeError, ValueError, RuntimeError):
            every = all(isinstance(item, Tensor) for item in value) and bool(value)
            whole = torch.stack(list(value)) if every else torch.tensor(value)
            if same(whole.double(), wanted.double(), tolerance):
                make = "torch.stack(...)" if every else "torch.tensor(...)"
                yield f"{wants}. Its values are right: {make} makes a tensor of it."
    yield f"{wants}."


def _wrong_dtype(value: Tensor, wanted: Tensor) -> Iterator[str]:
    if value.device != wanted.device:
        yield f"Your result is on {value.device}, but the arguments are on {wanted.device}: make it there."
    if value.dtype == wanted.dtype or {value.dtype, wanted.dtype} == {torch.float32, torch.float64}:
        return
    kinds = {"int32", "int64", "int16"}
    a, b = (str(t.dtype).removeprefix("torch.") for t in (value, wanted))
    if a in kinds and b in kinds:
        return
    lost = " Everything behind the point is lost." if a in kinds else ""
    rounded = " It has three digits only." if a in ("float16", "bfloat16") else ""
    equal = value.shape == wanted.shape and same(value.to(wanted.dtype), wanted, 2e-2)
    yield f"It returns {a}, where {b} is wanted.{lost}{rounded}" + (" The values are right." if equal else "")


def _wrong_shape(trial: Trial, value: Tensor, wanted: Tensor) -> Iterator[str]:
    tolerance, shapes = trial.exercise.tolerance, f"{list(value.shape)}, where {list(wanted.shape)} is wanted"
    a, b = value.detach().double(), wanted.detach().double()
    if sorted(a.shape) == sorted(b.shape) and a.ndim <= 5:
        for order in itertools.permutations(range(a.ndim)):
            if same(a.permute(order), b, tolerance):
                yield f"The right numbers, but their axes are in the wrong order: the shape is {shapes}."
    if a.numel() == b.numel() and same(a.reshape(b.shape), b, tolerance):
        yield f"The right numbers, but the shape is {shapes}."
    if b.numel() == 1 and a.numel() > 1:
        for name, reduced in (("mean", a.mean()), ("sum", a.sum())):
            if same(reduced.reshape(b.shape), b, tolerance):
                yield f"The {name} at the end is missing: the shape is {shapes}."
    for dims in (d for n in range(1, b.ndim + 1) for d in itertools.combinations(range(b.ndim), n)):
        for name in ("mean", "sum", "amax", "amin") if b.isfinite().all() else ():
            for keepdim in (False, True):
                reduced = getattr(b, name)(dim=dims, keepdim=keepdim)
                if same(a, reduced, tolerance):
                    over = " and ".join(str(d) for d in dims)
                    yield f"You took a {name.removeprefix('a')} over axis {over} as well: the shape is {shapes}."
    for n in range(1, a.ndim + 1):
        for dims in itertools.combinations(range(a.ndim), n):
            for name in ("mean", "sum"):
                if same(getattr(a, name)(dim=dims), b, tolerance):
                    yield f"A {name} over axis {' and '.join(map(str, dims))} is missing: the shape is {shapes}."
    yield from _too_much(trial, a, b, shapes)
    yield from trial.convict(changes(trial.exercise))
    timed = isinstance(trial.cases[0].get("t"), Tensor)
    grown = a.ndim > b.ndim >= 1 or (a.ndim == b.ndim > 1 and a.numel() > b.numel() and len(a) > len(b))
    broadcast = (
        " Two shapes were broadcast against each other: a coefficient for each entry of a batch, [b], must become"
        f" [b{' 1' * (b.ndim - 1)}] before it multiplies what has {b.ndim} axes."
        if timed and grown
        else ""
    )
    yield f"The shape is {shapes}.{broadcast}"


def _too_much(trial: Trial, a: Tensor, b: Tensor, shapes: str) -> Iterator[str]:
    """The right result and more, or a part of it. (a is the student's)"""
    tolerance, args = trial.exercise.tolerance, trial.cases[0]
    for name, index in args.items():
        if isinstance(index, Tensor) and index.ndim == 1 and not index.is_floating_point() and a.ndim == b.ndim:
            if index.dtype != torch.bool and len(a) > int(index.max()) and same(a[index], b, tolerance):
                yield f"You returned the whole table: its entries at `{name}` are wanted. The shape is {shapes}."
    if a.ndim == b.ndim + 1 >= 2 and a.shape[0] == a.shape[1] == b.shape[0]:
        if same(torch.stack([a[i, i] for i in range(len(a))]), b, tolerance):
            yield (
                "You combined each entry of the batch with each other one: what is wanted stands on the diagonal, entry"
                f" i with entry i. The shape is {shapes}."
            )
    for more, less, what in ((a, b, "too many"), (b, a, "missing")):
        for dim in range(a.ndim if a.ndim == b.ndim else 0):
            count = more.shape[dim] - less.shape[dim]
            if count > 0 and less.shape[dim] and more.narrow(dim, 0, less.shape[dim]).shape == less.shape:
                said = f"{count} {'is' if count == 1 else 'are'} {what}"
                for start, place in ((0, "end"), (count, "beginning")):
                    if same(more.narrow(dim, start, less.shape[dim]), less, tolerance):
                        yield f"{said} at the {place} of axis {dim}: the shape is {shapes}."
    if a.ndim <= b.ndim and a.numel() < b.numel():
        for dim in range(b.ndim):
            for place, at in (("first", 0), ("last", -1)):
                if b.shape[dim] > 1 and same(a.squeeze(), b.select(dim, at).squeeze(), tolerance):
                    lost = " Do the others get lost in a loop?"
                    yield f"Only the {place} along axis {dim} is there: the shape is {shapes}.{lost}"


def without_time(trial: Trial, function: Callable) -> Iterator[str]:
    """Is the result the same at every t?"""
    args, mine = trial.cases[0], trial.outcomes[0]
    if isinstance(args.get("t"), Tensor) and isinstance(mine.value, Tensor):
        others = (run(trial.exercise, function, {**args, "t": args["t"] * 0 + k}) for k in (0, 1))
        if all(same_outcome(other, mine, 1e-7) for other in others):
            yield "`t` has no influence on your result: each sample of a batch has its own."


def gradient_only(trial: Trial) -> Iterator[str]:
    """The values are right, and what flows back is not."""
    tolerance, results = trial.exercise.tolerance, zip(trial.outcomes, trial.rights, strict=True)
    values = [same(outcome.value, right.value, tolerance) for outcome, right in results]
    through = " and ".join(f"`{name}`" for name in trial.exercise.gradients)
    if not all(values) or not trial.exercise.gradients:
        return
    if all(o.gradients is None for o in trial.outcomes):
        yield (
            f"The values are right, but no gradient flows back to {through}: somewhere the result is cut off from it by"
            " `.detach()`, `.item()`, `torch.no_grad()`, `.data`, NumPy, or a new `torch.tensor(...)`. Nothing would be"
            " learned."
        )
        return
    yield from trial.convict(changes(trial.exercise))
    if all(not o.gradients or not any(g.any() for g in o.gradients) for o in trial.outcomes):
        yield (
            f"The values are right, but the gradient to {through} is 0: the result was cut off from it, by `.item()`,"
            " `.detach()` or a new `torch.tensor(...)`. Nothing would be learned."
        )
    for _, outcome, right in trial.wrong():
        pairs = list(zip(outcome.gradients or [], right.gradients, strict=False))
        factors = [1.0 if not a.any() and not b.any() else multiple(a, b) for a, b in pairs]
        if factors and all(factor is not None for factor in factors):
            times = " and ".join(f"{factor:.4g}" for factor in factors)
            yield f"The values are right, but the gradient to {through} is {times} times what it should be."
    yield f"The values are right, but the gradient to {through} is not: what is detached, and what is not?"


def same_as_an_argument(trial: Trial) -> Iterator[str]:
    for name in trial.exercise.arguments:
        pairs = [(args[name], o.value) for args, o in zip(trial.cases, trial.outcomes, strict=True)]
        if all(isinstance(a, Tensor) and isinstance(v, Tensor) and same(v, a, 1e-6) for a, v in pairs):
            yield f"Your function returns `{name}` as it came in."


def at_the_ends(trial: Trial) -> Iterator[str]:
    """Right for every t but the first, or the last."""
    name = next((n for n in ("t", "timesteps") if isinstance(trial.cases[0].get(n), Tensor)), None)
    found = []  # (t, is it the last one, whether it is right)
    for args, outcome, right in zip(trial.cases, trial.outcomes, trial.rights, strict=True):
        t = args.get(name)
        schedule = args.get("alphas_cumprod", args.get("betas"))
        a, b = outcome.value, right.value
        if t is None or not isinstance(a, Tensor) or a.shape != b.shape or a.shape[:1] != t.shape:
            return
        last = -1 if schedule is None else len(schedule) - 1
        found += [
            (int(k), int(k) == last, same(x, y, trial.exercise.tolerance)) for k, x, y in zip(t, a, b, strict=True)
        ]
    wrong = [f for f in found if not f[2]]
    if wrong and all(t == 0 for t, *_ in wrong) and len(wrong) < len(found):
        yield (
            "Right for every t but t = 0: what comes before the first step? (An index of -1 reads the last entry of a"
            " table; before the first step nothing is lost, ᾱ = 1.)"
        )
    if wrong and all(last for _, last, _ in wrong) and len(wrong) < len(found):
        yield "Right for every t but the last, T-1: what do you read behind the end of the table?"
