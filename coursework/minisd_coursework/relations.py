"""Simple relations of a result to the right one: a factor, a square, an order, a part, a term more."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .running import close, copied, multiple, same
from .trial import Trial, short

Whole = list[tuple[dict[str, Any], Tensor, Tensor]]  # (arguments, result, right result) of each case, in float64

RELATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "Your result is the square of the right one: a square too many, or a root that is missing.": lambda b: b**2,
    "Your result is the root of the right one: a root too many, or a square that is missing.": lambda b: b.sqrt(),
    "Your result is the absolute value of the right one.": lambda b: b.abs(),
    "Your result is 1 / the right one: a quotient is the wrong way round.": lambda b: 1 / b,
    "Your result is 1 - the right one.": lambda b: 1 - b,
    "Your result is exp of the right one: a logarithm is missing, or an exponential too many.": lambda b: b.exp(),
    "Your result is the logarithm of the right one.": lambda b: b.log(),
    "Your result is the right one without its negative numbers: a ReLU or a clamp too many.": lambda b: b.relu(),
    "Your result is clamped to [-1, 1], and should not be.": lambda b: b.clamp(-1, 1),
    "Your result is clamped to [0, 1], and should not be.": lambda b: b.clamp(0, 1),
    "Your result is the tanh of the right one.": lambda b: b.tanh(),
    "Your result is the sigmoid of the right one.": lambda b: b.sigmoid(),
    "Your result is rounded.": lambda b: b.round(),
    "Your result is the softmax of the right one, along the last axis.": lambda b: b.softmax(-1) if b.ndim else b,
}


CONSTANTS = {"√2": 2**0.5, "1/√2": 0.5**0.5, "π": math.pi, "2π": 2 * math.pi, "ln 2": math.log(2),
             "1/ln 2, from nats to bits": 1 / math.log(2), "√(2π)": (2 * math.pi) ** 0.5}  # fmt: skip


def related(trial: Trial) -> Iterator[str]:
    pairs = [(args, o.value, r.value) for args, o, r in trial.comparable()]
    if not pairs:
        return
    whole = [(args, a.detach().double(), b.detach().double()) for args, a, b in pairs]
    tolerance = trial.exercise.tolerance
    yield from _scaled(whole)
    for sentence, relation in RELATIONS.items():
        if all(same(a, relation(b), tolerance) for _, a, b in whole):
            yield sentence
    offsets = [(a - b).flatten() for _, a, b in whole]
    if all(close(d, d[:1].expand_as(d), 1e-5) for d in offsets) and sum(d.numel() for d in offsets) > 2:
        if close(torch.stack([d[0] for d in offsets]), offsets[0][:1].expand(len(offsets))):
            yield f"Your result is the right one plus {float(offsets[0][0]):.4g}, everywhere."
    yield from _orders(tolerance, whole)
    finite = all(b.isfinite().all() for *_, b in whole)
    for sentence, relation in RELATIONS.items() if finite else ():
        factors = [multiple(a, relation(b)) for _, a, b in whole]
        equal = all(factor and abs(factor / (factors[0] or 1) - 1) < 1e-3 for factor in factors)
        if equal and sum(a.numel() for _, a, _ in whole) > 8:
            yield f"Two things at once. {sentence} And all of it is multiplied by {factors[0]:.4g}."
    yield from _parts(tolerance, whole)


def _scaled(whole: Whole) -> Iterator[str]:
    """c times the right one; and what c may be."""
    factors = [multiple(a, b) for _, a, b in whole]
    if any(factor is None for factor in factors):
        if all(a.ndim and len(a) > 1 for _, a, _ in whole):
            rows = [[multiple(x, y) for x, y in zip(a, b, strict=True)] for _, a, b in whole]
            known = all(f is not None and abs(f - 1) > 1e-3 for row in rows for f in row)
            if known and all(a.ndim > 1 for _, a, _ in whole):
                shown = ", ".join(f"{f:.3g}" for f in rows[0])
                yield f"Right up to a factor for each entry of the batch ({shown}, ...): a coefficient is wrong."
        return
    if close(torch.tensor(factors), torch.tensor(factors[:1]).expand(len(factors))):
        scalars = sum(a.numel() for _, a, _ in whole)
        if scalars < 2:
            return
        known = {-1: "The sign is wrong: your result is minus the right one.",
                 2: "Your result is twice the right one.",
                 0.5: "Your result is half of the right one.", 0: "Your result is 0 everywhere."}  # fmt: skip
        near = next((k for k in known if abs(factors[0] - k) < 1e-3), None)
        name = next((n for n, value in CONSTANTS.items() if abs(factors[0] / value - 1) < 1e-3), "")
        times = f"{factors[0]:.4g} times the right one" + (f", and that number is {name}" if name else "")
        yield known[near] if near is not None else f"Your result is exactly {times}."
        return
    sizes: list[dict[str, float]] = []  # what the factor may be, by name, for each case
    for args, _, _ in whole:
        found = {}
        for name, value in args.items():
            if isinstance(value, Tensor):
                found |= {f"the size of axis {i} of `{name}`": n for i, n in enumerate(value.shape)}
                found[f"the number of entries of `{name}`"] = value.numel()
                if value.ndim > 1:
                    found[f"the number of entries of `{name}` in each sample"] = value[0].numel()
                if value.ndim == 4:
                    found[f"the number of pixels of `{name}`"] = value[0, 0].numel()
            elif isinstance(value, int | float) and value > 0:
                found[f"`{name}`"] = value
        sizes.append(found)
    powers = {1: "{}", -1: "1 / {}", 0.5: "the root of {}", -0.5: "1 / the root of {}", 2: "the square of {}"}
    for name in sizes[0]:
        if all(name in s for s in sizes):
            for power, text in powers.items():
                if all(abs(f / s[name] ** power - 1) < 1e-3 for f, s in zip(factors, sizes, strict=True)):
                    hint = " (a sum for a mean, or a mean for a sum?)" if abs(power) == 1 else ""
                    yield f"Your result is the right one times {text.format(name)}{hint}."


def _orders(tolerance: float, whole: Whole) -> Iterator[str]:
    """The same numbers in another order."""
    for dim in range(min(b.ndim for *_, b in whole)):
        for name, order in (
            ("reversed", lambda x, d=dim: x.flip(d)),
            ("shifted by one", lambda x, d=dim: x.roll(1, d)),
            ("shifted by one", lambda x, d=dim: x.roll(-1, d)),
            ("with its halves exchanged", lambda x, d=dim: x.roll(x.shape[d] // 2, d)),
        ):
            if all(same(a, order(b), tolerance) for _, a, b in whole):
                yield f"The right numbers, but {name} along axis {dim}."
    for i, j in itertools.combinations(range(min(b.ndim for *_, b in whole)), 2):
        if all(b.shape[i] == b.shape[j] and same(a, b.transpose(i, j), tolerance) for _, a, b in whole):
            yield f"The right numbers, but the axes {i} and {j} are exchanged."
    if all(a.numel() > 3 and same(a.flatten().sort()[0], b.flatten().sort()[0], tolerance) for _, a, b in whole):
        yield "The right numbers, but in another order: which axis is split, merged or reshaped, and how?"


def _parts(tolerance: float, whole: Whole) -> Iterator[str]:
    """Right in some places only, and in each case that went wrong."""
    for dim in range(min(b.ndim for *_, b in whole)):
        found = []
        for _, a, b in whole:
            scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
            near = ((a - b).abs() <= tolerance * (b.abs() + 0.1 * scale)) | (a == b)
            right = near.movedim(dim, 0).flatten(1).all(1).tolist() if b.ndim > 1 else near.tolist()
            if len(right) > 1:
                found.append([i for i, good in enumerate(right) if good])
            if len(right) > 1 and len(found[-1]) in (0, len(right)):
                found = []
                break
        if not found:
            continue
        batched = all(any(isinstance(v, Tensor) and len(v) == len(b) for v in args.values()) for args, _, b in whole)
        if dim == 0 and all(places == [0] for places in found) and all(b.ndim > 1 for *_, b in whole) and batched:
            empty = all(not a[1:].any() for _, a, _ in whole)
            yield "Right for the first entry of a batch only: the others are " + (
                "0. Is there a `return` inside of a loop?" if empty else "treated as if they were it."
            )
        size = max(b.shape[dim] for *_, b in whole)
        wrong = [i for i in range(size) if i not in found[0]]
        yield f"Along axis {dim} it is right at {short(found[0])} and wrong at {short(wrong)}."


def more_or_less(trial: Trial) -> Iterator[str]:
    """The right result and a term more; or a step of the solution, returned in its place."""
    found: dict[str, list[bool]] = {}
    pairs = trial.comparable()
    solution = trial.exercise.compile()
    for args, outcome, right in pairs:
        a, b, tolerance = outcome.value.double(), right.value.double(), trial.exercise.tolerance
        known = {name: v for name, v in (args | _steps(solution, args)).items() if isinstance(v, Tensor)}
        for name, value in known.items():
            if value.shape != b.shape or not value.is_floating_point() or same(value, b, tolerance):
                continue
            value = value.detach().double()
            scale = max(float(a.abs().max()), 1.0)
            for sentence, other in (
                (f"Your result is the step `{name}` of the solution: something is missing after it.", value),
                (f"Your result is the right one plus `{name}`: a term too many.", b + value),
                (f"Your result is the right one minus `{name}`.", b - value),
                (f"Your result is the right one times `{name}`: a factor too many.", b * value),
                (f"Your result is the mean of the right one and of `{name}`.", (b + value) / 2),
            ):
                found.setdefault(sentence, []).append(
                    bool(((a - other).abs() <= 10 * tolerance * scale).all()) and not same(other, b, tolerance)
                )
    yield from (sentence for sentence, fits in found.items() if len(fits) == len(pairs) and all(fits))


def _steps(function: Callable, args: dict[str, Any]) -> dict[str, Any]:
    """What a function has in its local variables when it returns."""
    found: dict[str, Any] = {}

    def call(frame, event, _):
        return inside if frame.f_code is function.__code__ else None

    def inside(frame, event, _):
        if event == "return":
            found.update(frame.f_locals)
        return inside

    before = sys.gettrace()
    sys.settrace(call)
    try:
        function(*(copied(value) for value in args.values()))
    finally:
        sys.settrace(before)
    return found
