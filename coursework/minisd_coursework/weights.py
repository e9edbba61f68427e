"""If the right result is a weighted sum of arguments: which weight is wrong, and what stands in its place?"""

import itertools
from collections.abc import Iterator
from fractions import Fraction

import torch
from torch import Tensor

from .attempt import Attempt, as_a_whole
from .running import close
from .texts import say


def weights(attempt: Attempt, named: bool) -> Iterator[str]:
    """If the result is Σ weight · argument: which weight is wrong, and what stands in its place?"""
    names = attempt.exercise.linear
    if names and isinstance(attempt.cases[0][names[0]], list):
        yield from _of_a_list(attempt, names[0])
        return
    found, wanted, quantities = [], [], []
    for args, outcome, right in zip(attempt.cases, attempt.outcomes, attempt.rights, strict=True):
        terms = [args[name] for name in names]
        if not names or any(t.shape != right.value.shape for t in [*terms, outcome.value]):
            return
        a, b = solve(terms, outcome.value), solve(terms, right.value)
        if a is None or b is None:
            return
        found.append(a), wanted.append(b)
        known = attempt.exercise.quantities(**args) if attempt.exercise.quantities else {}
        quantities.append({k: torch.as_tensor(v).double().expand(len(a)) for k, v in known.items()})
    weights, rights = torch.cat(found), torch.cat(wanted)  # [samples of all cases, arguments]
    known = {name: torch.cat([q[name] for q in quantities]) for name in (quantities[0] if quantities else ())}
    formulas = _formulas(known)
    sentences, all_named = [], True
    for i, name in enumerate(names):
        a, b = (w[:, i].round(decimals=9) for w in (weights, rights))  # what is left of a 0 would be shown as 1e-17
        if close(a, b):
            continue
        at = int((a - b).abs().argmax())
        mine, should = _formula(a, formulas), _formula(b, formulas)
        numbers = say("weight.numbers", mine=f"{a[at]:.4g}", should=f"{b[at]:.4g}")
        if close(a, torch.zeros_like(a)):
            sentences.append(say("weight.absent", name=name, should=should or say("weight.not_0")))
        elif close(a, -b):
            sentences.append(say("weight.sign", name=name))
        elif mine and should:
            sentences.append(say("weight.both", name=name, mine=mine, should=should, numbers=numbers))
        elif mine:
            sentences.append(say("weight.named", name=name, mine=mine, numbers=numbers))
        elif times := _times(a, b, formulas):
            sentences.append(say("weight.times", name=name, times=times, numbers=numbers))
        else:
            all_named = False
            wanted = say("weight.unnamed_wanted", name=name, numbers=numbers, should=should) if should else ""
            sentences.append(wanted or say("weight.unnamed", name=name, numbers=numbers))
    if sentences and (all_named or not named):
        yield as_a_whole("; ".join(sentences))


def _of_a_list(attempt: Attempt, name: str) -> Iterator[str]:
    """The same of a list of tensors, case by case."""
    for args, outcome, right in attempt.wrong():
        terms = args[name]
        if not isinstance(outcome.value, Tensor) or outcome.value.shape != terms[0].shape:
            return
        a, b = solve(terms, outcome.value), solve(terms, right.value)
        if a is None or b is None:
            return
        mine, should = (
            ", ".join(str(Fraction(float(w)).limit_denominator(60)) for w in weights[0]) for weights in (a, b)
        )
        yield say("weight.of_a_list", count=len(terms), name=name, mine=mine, right=should)


def solve(terms: list[Tensor], value: Tensor) -> Tensor | None:
    """The weights [b terms] with which value is a weighted sum of the terms, sample by sample; None if it is none."""
    A = torch.stack([t.detach().double().reshape(len(t), -1) for t in terms], dim=-1)  # [b n terms]
    y = value.detach().double().reshape(len(value), -1, 1)
    if not y.isfinite().all() or A.shape[1] < 2 * A.shape[2]:
        return None
    weights = torch.linalg.lstsq(A, y).solution
    residual = (A @ weights - y).abs().max()
    return weights[..., 0] if residual <= 1e-4 * float(y.abs().max()) + 1e-9 else None


def _formulas(known: dict[str, Tensor]) -> tuple[list[str], Tensor]:
    """Numbers that a student may have multiplied by, by name [formulas] and value [formulas samples].

    q, √q, 1-q, √(1-q), q², ... of each quantity, their inverses, products and quotients; the simplest first.
    """
    simple: list[tuple[str, Tensor]] = []
    for name, q in known.items():
        simple += [(name, q), (f"√{name}", q.sqrt()), (f"(1-{name})", 1 - q), (f"√(1-{name})", (1 - q).sqrt())]
        simple += [(f"(1+{name})", 1 + q), (f"{name}²", q**2), (f"√(1+{name})", (1 + q).sqrt())]
    if not simple:
        return [], torch.zeros(0, 0)
    found = [("1", torch.ones_like(simple[0][1])), *simple, *((f"1/{n}", 1 / q) for n, q in simple)]
    for (n, p), (m, q) in itertools.product(simple, simple):
        found += [(f"{n}·{m}", p * q), (f"{n}/{m}", p / q)]
    found += [(f"-{n}", -q) for n, q in found]
    return [n for n, _ in found], torch.stack([q for _, q in found])


def _formula(weights: Tensor, formulas: tuple[list[str], Tensor]) -> str | None:
    """The first formula that gives these weights."""
    names, values = formulas
    if not names:
        return None
    fits = ((values - weights).abs() <= 3e-4 * values.abs() + 2e-5).all(dim=1)
    return names[int(fits.int().argmax())] if fits.any() else None


def _times(a: Tensor, b: Tensor, formulas: tuple[list[str], Tensor]) -> str | None:
    """How many times b is a? A number, or the name of one."""
    here = b.abs() > 1e-6
    if not here.any() or not close(a[~here], b[~here]):
        return None
    ratio = a[here] / b[here]
    if close(ratio, ratio[:1].expand_as(ratio)):
        return f"{float(ratio[0]):.4g}"
    names, values = formulas
    return _formula(ratio, (names, values[:, here])) if names else None
