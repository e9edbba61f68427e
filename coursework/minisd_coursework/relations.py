"""Simple relations of a result to the right one: a factor, a square, an order, a part, a term more."""

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .attempt import Attempt, short
from .running import close, copied, multiple, same
from .texts import say

Whole = list[tuple[dict[str, Any], Tensor, Tensor]]  # (arguments, result, right result) of each case, in float64

RELATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "square": lambda b: b**2,
    "root": lambda b: b.sqrt(),
    "absolute": lambda b: b.abs(),
    "inverse": lambda b: 1 / b,
    "complement": lambda b: 1 - b,
    "exp": lambda b: b.exp(),
    "log": lambda b: b.log(),
    "relu": lambda b: b.relu(),
    "clamp_1": lambda b: b.clamp(-1, 1),
    "clamp_0": lambda b: b.clamp(0, 1),
    "tanh": lambda b: b.tanh(),
    "sigmoid": lambda b: b.sigmoid(),
    "rounded": lambda b: b.round(),
    "softmax": lambda b: b.softmax(-1) if b.ndim else b,
}
FACTORS = {"minus": -1, "twice": 2, "half": 0.5, "zero": 0}
CONSTANTS = {"√2": 2**0.5, "1/√2": 0.5**0.5, "π": math.pi, "2π": 2 * math.pi, "ln 2": math.log(2),
             "1/ln 2": 1 / math.log(2), "√(2π)": (2 * math.pi) ** 0.5}  # fmt: skip


def related(attempt: Attempt) -> Iterator[str]:
    pairs = [(args, o.value, r.value) for args, o, r in attempt.comparable()]
    if not pairs:
        return
    whole = [(args, a.detach().double(), b.detach().double()) for args, a, b in pairs]
    tolerance = attempt.exercise.tolerance
    yield from _scaled(whole)
    for name, relation in RELATIONS.items():
        if all(same(a, relation(b), tolerance) for _, a, b in whole):
            yield say(f"relation.{name}")
    offsets = torch.cat([(a - b).flatten() for _, a, b in whole])
    if close(offsets, offsets[:1].expand_as(offsets), 1e-5) and len(offsets) > 2:
        yield say("related.plus", number=f"{float(offsets[0]):.4g}")
    yield from _orders(tolerance, whole)
    finite = all(b.isfinite().all() for *_, b in whole)
    for name, relation in RELATIONS.items() if finite else ():
        factors = [multiple(a, relation(b)) for _, a, b in whole]
        equal = all(factor and abs(factor / (factors[0] or 1) - 1) < 1e-3 for factor in factors)
        if equal and sum(a.numel() for _, a, _ in whole) > 8:
            yield say("candidates.two_and_a_factor", first=say(f"relation.{name}"), factor=f"{factors[0]:.4g}")
    yield from _parts(tolerance, whole)


def _scaled(whole: Whole) -> Iterator[str]:
    """c times the right one; and what c may be."""
    factors = [multiple(a, b) for _, a, b in whole]
    if any(factor is None for factor in factors):
        if all(a.ndim > 1 and len(a) > 1 for _, a, _ in whole):
            rows = [[multiple(x, y) for x, y in zip(a, b, strict=True)] for _, a, b in whole]
            if all(f is not None and abs(f - 1) > 1e-3 for row in rows for f in row):
                yield say("related.factors", factors=", ".join(f"{f:.3g}" for f in rows[0]))
    elif close(torch.tensor(factors), torch.tensor(factors[:1]).expand(len(factors))):
        if sum(a.numel() for _, a, _ in whole) > 1:
            yield _named_factor(factors[0])
    else:
        sizes = [_sizes(args) for args, *_ in whole]
        for name in sizes[0]:
            if all(name in s for s in sizes):
                for power, kind in {1: "", -1: "inverse", 0.5: "root", -0.5: "inverse_root", 2: "square"}.items():
                    if all(abs(f / s[name] ** power - 1) < 1e-3 for f, s in zip(factors, sizes, strict=True)):
                        size = say(f"power.{kind}", size=name) if kind else name
                        one = abs(power) == 1  # as where a sum stands in the place of a mean
                        yield say("related.times_size_once", size=size) if one else say("related.times_size", size=size)


def _named_factor(factor: float) -> str:
    for name, value in FACTORS.items():
        if abs(factor - value) < 1e-3:
            return say(f"factor.{name}")
    for name, value in CONSTANTS.items():
        if abs(factor / value - 1) < 1e-3:
            return say("related.times_constant", factor=f"{factor:.4g}", name=name)
    return say("related.times", factor=f"{factor:.4g}")


def _sizes(args: dict[str, Any]) -> dict[str, float]:
    """What a factor may be, by its name."""
    found = {}
    for name, value in args.items():
        if isinstance(value, Tensor):
            found |= {say("size.axis", axis=i, name=name): n for i, n in enumerate(value.shape)}
            found[say("size.entries", name=name)] = value.numel()
            if value.ndim > 1:
                found[say("size.entries_each", name=name)] = value[0].numel()
            if value.ndim == 4:
                found[say("size.pixels", name=name)] = value[0, 0].numel()
        elif isinstance(value, int | float) and value > 0:
            found[f"`{name}`"] = value
    return found


def _orders(tolerance: float, whole: Whole) -> Iterator[str]:
    """The same numbers in another order."""
    axes = range(min(b.ndim for *_, b in whole))
    for dim in axes:
        for name, order in (
            ("reversed", lambda x, d=dim: x.flip(d)),
            ("shifted", lambda x, d=dim: x.roll(1, d)),
            ("shifted", lambda x, d=dim: x.roll(-1, d)),
            ("halves", lambda x, d=dim: x.roll(x.shape[d] // 2, d)),
        ):
            if all(same(a, order(b), tolerance) for _, a, b in whole):
                yield say(f"order.{name}", axis=dim)
    for i, j in itertools.combinations(axes, 2):
        if all(b.shape[i] == b.shape[j] and same(a, b.transpose(i, j), tolerance) for _, a, b in whole):
            yield say("related.exchanged", first=i, second=j)
    if all(a.numel() > 3 and same(a.flatten().sort()[0], b.flatten().sort()[0], tolerance) for _, a, b in whole):
        yield say("related.reordered")


def _parts(tolerance: float, whole: Whole) -> Iterator[str]:
    """Right in some places only, and in each case that went wrong."""
    for dim in range(min(b.ndim for *_, b in whole)):
        found = []  # the right places of each case
        for _, a, b in whole:
            scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
            near = ((a - b).abs() <= tolerance * (b.abs() + 0.1 * scale)) | (a == b)
            right = near.movedim(dim, 0).flatten(1).all(1).tolist() if b.ndim > 1 else near.tolist()
            if len(right) > 1:
                found.append([i for i, good in enumerate(right) if good])
                if len(found[-1]) in (0, len(right)):
                    found = []
                    break
        if not found:
            continue
        batched = all(any(isinstance(v, Tensor) and len(v) == len(b) for v in args.values()) for args, _, b in whole)
        if dim == 0 and all(places == [0] for places in found) and all(b.ndim > 1 for *_, b in whole) and batched:
            empty = all(not a[1:].any() for _, a, _ in whole)
            yield say("related.first_only_0") if empty else say("related.first_only")
        size = max(b.shape[dim] for *_, b in whole)
        wrong = [i for i in range(size) if i not in found[0]]
        yield say("related.places", axis=dim, right=short(found[0]), wrong=short(wrong))


def more_or_less(attempt: Attempt) -> Iterator[str]:
    """The right result and a term more; or a step of the solution, returned in its place."""
    found: dict[str, list[bool]] = {}
    pairs = attempt.comparable()
    solution, tolerance = attempt.exercise.compile(), attempt.exercise.tolerance
    for args, outcome, right in pairs:
        a, b = outcome.value.double(), right.value.double()
        scale = max(float(a.abs().max()), 1.0)
        for name, value in (args | _steps(solution, args)).items():
            if not isinstance(value, Tensor) or value.shape != b.shape or not value.is_floating_point():
                continue
            if same(value, b, tolerance):
                continue
            value = value.detach().double()
            others = {"only": value, "plus": b + value, "minus": b - value, "times": b * value, "mean": (b + value) / 2}
            for kind, other in others.items():
                near = bool(((a - other).abs() <= 10 * tolerance * scale).all()) and not same(other, b, tolerance)
                found.setdefault(say(f"step.{kind}", name=name), []).append(near)
    yield from (sentence for sentence, fits in found.items() if len(fits) == len(pairs) and all(fits))


def _steps(function: Callable, args: dict[str, Any]) -> dict[str, Any]:
    """What a function has in its local variables when it returns."""
    found: dict[str, Any] = {}

    def keep(frame, event, _):
        if event == "return" and frame.f_code is function.__code__:
            found.update(frame.f_locals)

    before = sys.getprofile()
    sys.setprofile(keep)
    try:
        function(*(copied(value) for value in args.values()))
    finally:
        sys.setprofile(before)
    return found
