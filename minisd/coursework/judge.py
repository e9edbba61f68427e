"""Is it right? And if not, which mistake was it?

A student's function is run on the exercise's cases, and so is the solution. Where they differ, the suspects are asked
one group after the other, from those that say most to those that say least: the mistakes that the exercise knows; other
arguments in the place of the right ones; the weights, if the result is a weighted sum; the solution with one small
change; simple relations (a factor, a sign, an order); two mistakes at once. A suspect is convicted if it does on every
case what the student's function does.
"""

import contextlib
import inspect
import io
import itertools
import linecache
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from . import mutants
from .exercise import Exercise

SECONDS = 10.0  # that one call of a student's function may take
PAIRS = 800  # so many pairs of mistakes are tried: about a second


@dataclass(frozen=True)
class Verdict:
    """What the checker found.

    right: whether the function is right.
    message: what the student reads.
    mistake: the sentence that names the mistake; None if it is right, or wrong in a way that nobody knew.
    """

    right: bool
    message: str
    mistake: str | None = None

    def __bool__(self) -> bool:
        return self.right

    def expect(self) -> None:
        """For pytest, nbgrader and otter: raises AssertionError with the message unless it is right."""
        assert self.right, self.message

    def _ipython_display_(self) -> None:
        """The message was printed already."""


@dataclass
class Outcome:
    """What a function did on a case."""

    value: Any = None
    gradients: list[Tensor] | None = None  # None: asked for, but the result hangs on nothing
    error: BaseException | None = None
    printed: str = ""
    changed: list[str] = field(default_factory=list)  # arguments that are not what they were


# --- running --------------------------------------------------------------------------------------------------------


@cache
def cases_of(exercise: Exercise) -> dict[str, dict[str, Any]]:
    with _own_randomness(seed=0):
        cases = exercise.cases()
    return {label: {name: args[name] for name in exercise.arguments} for label, args in cases.items()}


@cache
def right_outcomes(exercise: Exercise) -> list[Outcome]:
    return [run(exercise, exercise.compile(), args) for args in cases_of(exercise).values()]


def run(
    exercise: Exercise, function: Callable, args: dict[str, Any], seed: int = 0, gradients: bool = True
) -> Outcome:
    """Call the function on copies of the arguments, and watch."""
    given = {name: _copy(value) for name, value in args.items()}
    leaves = []
    for name in exercise.gradients if gradients else ():
        if isinstance(given[name], nn.Module):
            leaves += list(given[name].parameters())
        else:
            leaves.append(given[name].requires_grad_())
            given[name] = leaves[-1] * 1  # no leaf: one may change it in place
    outcome, printed = Outcome(), io.StringIO()
    with _own_randomness(seed), warnings.catch_warnings(), contextlib.redirect_stdout(printed):
        warnings.simplefilter("ignore")
        try:
            with _at_most(SECONDS):
                outcome.value = function(*given.values())
                if exercise.read is not None and isinstance(outcome.value, Tensor):
                    outcome.value = exercise.read(outcome.value)
        except (Exception, SystemExit) as error:
            outcome.error = error
    outcome.printed = printed.getvalue()
    if outcome.error is None:
        outcome.changed = [name for name, value in args.items() if not _unchanged(given[name], value)]
        if leaves:
            outcome.gradients = _gradients(outcome.value, leaves)
        outcome.value = _detached(outcome.value)
    return outcome


def _detached(value: Any) -> Any:
    if type(value) in (list, tuple):
        return type(value)(map(_detached, value))
    return value.detach() if isinstance(value, Tensor) else value


@contextlib.contextmanager
def _own_randomness(seed: int) -> Iterator[None]:
    """Inside, torch.randn draws from this seed; outside, nobody notices. (torch.manual_seed is slow: it asks all GPUs.)
    """
    state = torch.default_generator.get_state()
    torch.default_generator.manual_seed(seed)
    try:
        yield
    finally:
        torch.default_generator.set_state(state)


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TimeoutError in a loop that does not end. (Where there are signals: on Unix, in the main thread.)"""
    if not hasattr(signal, "setitimer") or threading.current_thread() is not threading.main_thread():
        yield
        return

    def ring(*_):
        raise TimeoutError(f"It was still running after {seconds:.0f} seconds")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    return list(map(_copy, value)) if isinstance(value, list) else dict(value) if isinstance(value, dict) else value


def _unchanged(now: Any, before: Any) -> bool:
    if isinstance(before, Tensor):
        return now.shape == before.shape and bool(torch.equal(now.detach(), before))
    if isinstance(before, list):
        return len(now) == len(before) and all(map(_unchanged, now, before))
    return now == before if isinstance(before, dict) else True


def _gradients(value: Any, leaves: list[Tensor]) -> list[Tensor] | None:
    """Of a sum of all that was returned, in which every number has its own weight."""
    tensors = [v for v in (value if isinstance(value, tuple | list) else [value]) if isinstance(v, Tensor)]
    tensors = [t for t in tensors if t.requires_grad and t.is_floating_point()]
    if not tensors:
        return None
    total = sum((t * torch.arange(1, t.numel() + 1).cos().view(t.shape)).sum() for t in tensors)
    grads = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(grads, leaves, strict=True)]


# --- comparing ------------------------------------------------------------------------------------------------------


def same(a: Any, b: Any, tolerance: float) -> bool:
    """Whether a, a student's, is what b is, the solution's, as numbers. (float64 for float32 will do.)"""
    if isinstance(b, Tensor):
        if b.ndim == 0 and isinstance(a, int | float | np.generic) and not isinstance(a, bool):
            return same(float(a), float(b.detach()),
                        tolerance)  # a plain number will do, unless gradients are asked for
        if not isinstance(a, Tensor) or a.shape != b.shape:
            return False
        if b.is_floating_point() != a.is_floating_point() or (b.dtype == torch.bool) != (a.dtype == torch.bool):
            return False
        if not b.is_floating_point():
            return bool((a == b).all())
        if (a.dtype != b.dtype and a.element_size() < b.element_size()) or a.is_complex() or a.device != b.device:
            return False
        a, b = a.detach().double(), b.detach().double()
        finite = b[b.isfinite()]
        atol = 0.1 * tolerance * float(finite.abs().max()) if finite.numel() else 0.0
        return torch.allclose(a, b, rtol=tolerance, atol=atol + 1e-9, equal_nan=True)
    if isinstance(b, list | tuple):
        a = _as_list(a)
        return a is not None and len(a) == len(b) and all(same(x, y, tolerance) for x, y in zip(a, b, strict=True))
    if isinstance(b, int | float) and not isinstance(b, bool):
        if isinstance(a, Tensor | np.ndarray | np.generic):
            one = a.numel() == 1 if isinstance(a, Tensor) else a.size == 1
            a = a.item() if one else None
        return isinstance(a, int | float) and abs(a - b) <= tolerance * abs(b) + 1e-9
    if isinstance(b, np.ndarray):
        return isinstance(a, np.ndarray) and a.shape == b.shape and bool(np.all(a == b))
    return bool(a == b) if type(a) is type(b) else False


def _as_list(value: Any) -> list | None:
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


# --- the judgement --------------------------------------------------------------------------------------------------


def judge(exercise: Exercise, function: Any) -> Verdict:
    """Run a student's function on the exercise's cases, and say what is wrong with it."""
    if sentence := _not_a_function(exercise, function):
        return _wrong(exercise, sentence)
    cases, rights = cases_of(exercise), right_outcomes(exercise)
    outcomes = [run(exercise, function, args) for args in cases.values()]
    hits = [same_outcome(o, right, exercise.tolerance) for o, right in zip(outcomes, rights, strict=True)]
    first = next(iter(cases.values()))

    if all(hits):
        again = run(exercise, function, first, seed=1)
        changed = [name for name in outcomes[0].changed if name not in exercise.may_change]
        if not same_outcome(again, rights[0], exercise.tolerance):
            return _wrong(exercise, _is_random(first))
        if changed:
            return _wrong(exercise, _changes_in_place(changed))
        return Verdict(True, f"{exercise.name}: right.{_remark(outcomes[0].value, rights[0].value)}")

    trial = Trial(exercise, list(cases), list(cases.values()), outcomes, rights, hits)
    sentence = next(trial.suspects(function), None)
    if sentence is None:
        return Verdict(False, f"{exercise.name}: not right yet. {trial.in_numbers()}")
    changed = sorted({name for o in outcomes for name in o.changed} - set(exercise.may_change))
    also = f" Besides: {_changes_in_place(changed)}" if changed and "in place" not in sentence else ""
    return _wrong(exercise, sentence + also)


def _wrong(exercise: Exercise, sentence: str) -> Verdict:
    return Verdict(False, f"{exercise.name}: not right yet. {sentence}", sentence)


def _remark(value: Any, right: Any) -> str:
    if isinstance(right, Tensor) and isinstance(value, Tensor) and value.dtype != right.dtype:
        return (
            f" (One remark: it returns {value.dtype}, where the arguments make {right.dtype}. A network of float32"
            f" refuses"
            " float64: end with `.to(x.dtype)` if it is to run there.)"
        )
    return ""


def _is_random(args: dict[str, Any]) -> str:
    given = next((name for name in ("noise", "generator") if name in args), None)
    if given:
        return (
            f"Two calls with the same arguments return different numbers: you draw random numbers of your own, but the"
            f" `{given}` to be used is given. (The model is asked for just this noise; another one teaches it nothing.)"
        )
    return "Two calls with the same arguments return different numbers, but nothing in this function is random."


def _changes_in_place(names: list[str]) -> str:
    listed = " and ".join(f"`{name}`" for name in names)
    return (
        f"Your function changes its argument {listed} in place (`+=`, `*=`, a method that ends in `_`, or an"
        f" assignment to an"
        " index). The caller goes on with the changed values and does not know it: work on a new tensor."
    )


def _not_a_function(exercise: Exercise, function: Any) -> str | None:
    call = f"{exercise.name}({', '.join(exercise.arguments)})"
    if not callable(function):
        what = f"a {type(function).__name__}"
        return f"check.{exercise.name} wants the function itself, without calling it, and was given {what}."
    if not mutants.takes(function, exercise):
        try:
            names = list(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            names = []
        return f"Your function is called as {call}, but takes ({', '.join(names)}): keep the arguments of the stub."
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    if set(names) == set(exercise.arguments) and names != list(exercise.arguments):
        return f"Your function is called as {call}, but has its arguments in another order: ({', '.join(names)})."
    return None


@cache
def _known(exercise: Exercise) -> list[tuple[Callable, str]]:
    """The mistakes of the exercise's table."""
    return [(exercise.compile(m.edit(exercise.solution)), m.sentence) for m in exercise.mistakes]


@cache
def _arguments(exercise: Exercise) -> list[tuple[Callable, str]]:
    args = next(iter(cases_of(exercise).values()))
    found = mutants.of_the_arguments(exercise, exercise.compile(), args)
    return [(function, _as_a_whole(sentence)) for function, sentence in found]


@cache
def _changes(exercise: Exercise) -> list[tuple[Callable, str]]:
    """The solution with one small change."""
    found = [(_compile(exercise, solution), sentence) for solution, sentence in mutants.of_the_solution(exercise)]
    return [(function, f"In the terms of the solution: {sentence}.") for function, sentence in found if function]


def _compile(exercise: Exercise, solution: str) -> Callable | None:
    """The function with that solution; None if an edit has made nonsense of it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return exercise.compile(solution)
        except SyntaxError:
            return None


def _pairs(exercise: Exercise) -> Iterator[tuple[Callable, str]]:
    """Two mistakes of the table, or one and a wrong argument, or one and a small change."""
    for a, b in itertools.permutations(exercise.mistakes, 2):
        once = a.edit(exercise.solution) if a.old and b.old else None
        twice = b.edit(once) if once else None
        if twice and (function := _compile(exercise, twice)):
            yield function, f"Two things at once. {a.sentence} And: {b.sentence}"
    args = next(iter(cases_of(exercise).values()))
    for function, sentence in _known(exercise):
        for both, other in mutants.of_the_arguments(exercise, function, args):
            yield both, f"Two things at once. {sentence} And: {_as_a_whole(other)}"
    for mistake in exercise.mistakes:
        for solution, sentence in mutants.of_the_solution(exercise, mistake.edit(exercise.solution)):
            if function := _compile(exercise, solution):
                yield function, f"Two things at once. {mistake.sentence} And, in the terms of the solution: {sentence}."


def _as_a_whole(sentence: str) -> str:
    return f"{sentence[0].upper()}{sentence[1:]}."


@dataclass
class Trial:
    """A function that is wrong, and all that is known about it."""

    exercise: Exercise
    labels: list[str]
    cases: list[dict[str, Any]]
    outcomes: list[Outcome]
    rights: list[Outcome]
    hits: list[bool]

    def suspects(self, function: Callable) -> Iterator[str]:
        """Sentences that fit, the best first."""
        yield from self.nothing_to_compare()
        yield from self.convict(_known(self.exercise))
        broken = [o for o in self.outcomes if o.error is not None]
        if len(broken) == len(self.outcomes):
            yield self.raised(broken[0].error)
        if not broken:
            again = run(self.exercise, function, self.cases[0], seed=1)
            if not same_outcome(again, self.outcomes[0], self.exercise.tolerance):
                yield _is_random(self.cases[0])
            yield from self.wrong_kind()
            yield from self.gradient_only()
            yield from self.same_as_an_argument()
            yield from self.convict(_arguments(self.exercise))
            yield from self.at_the_ends()
            yield from self.weights(named=True)
        yield from self.convict(_changes(self.exercise))
        if broken:
            yield self.raised(broken[0].error) + self.where()
        yield from self.related()
        yield from self.more_or_less()
        yield from self.convict(itertools.islice(_pairs(self.exercise), PAIRS))
        yield from self.weights(named=False)
        yield from self.right_somewhere()
        yield from self.probe(function)

    def convict(self, suspects: Iterable[tuple[Callable, str]]) -> Iterator[str]:
        """Who does on every case what the student's function does?"""
        # where the student is wrong tells suspects apart; where the student is right, most are acquitted
        order = sorted(range(len(self.cases)), key=lambda i: self.hits[i])
        for function, sentence in suspects:
            if all(self.does_the_same(function, i) for i in order):
                yield sentence

    def does_the_same(self, function: Callable, i: int) -> bool:
        """Whether a suspect does on case i what the student's function did. Gradients cost time, and come last."""
        mine, tolerance = self.outcomes[i], self.exercise.tolerance
        outcome = run(self.exercise, function, self.cases[i], gradients=False)
        if self.exercise.gradients and outcome.error is None:
            if not same(mine.value, outcome.value, tolerance):
                return False
            outcome = run(self.exercise, function, self.cases[i])
        return same_outcome(mine, outcome, tolerance)

    def wrong(self) -> Iterator[tuple[dict[str, Any], Outcome, Outcome]]:
        """The cases that went wrong, without an error: (arguments, outcome, right outcome)."""
        for args, outcome, right, hit in zip(self.cases, self.outcomes, self.rights, self.hits, strict=True):
            if not hit and outcome.error is None:
                yield args, outcome, right

    # --- what comes back is not even comparable -----------------------------------------------------------------

    def nothing_to_compare(self) -> Iterator[str]:
        for outcome in self.outcomes:
            if isinstance(outcome.error, NotImplementedError):
                yield "It is not written yet: the stub raises NotImplementedError."
        for _, outcome, right in self.wrong():
            value = outcome.value
            if value is None:
                printed = " What it printed is lost to the caller: hand it over." if outcome.printed else ""
                yield f"It returns None: is the `return` missing?{printed}"
            elif value is Ellipsis or value is NotImplemented:
                yield "It is not written yet."
            elif inspect.isgenerator(value):
                yield "It returns a generator: write `return`, not `yield`."
            elif callable(value):
                yield f"It returns a {type(value).__name__}, which can be called, not the result: are the () missing?"
            elif isinstance(right.value, Tensor) and isinstance(value, np.ndarray | np.generic):
                yield (
                    "It returns a NumPy array, where a tensor is wanted: NumPy knows neither gradients nor the GPU."
                    " The same"
                    " functions are there in torch."
                )

    def wrong_kind(self) -> Iterator[str]:
        """Another type, dtype or shape than the right one."""
        for _, outcome, right in self.wrong():
            value, wanted = outcome.value, right.value
            if isinstance(wanted, Tensor) and isinstance(value, Tensor):
                yield from self.wrong_dtype(value, wanted)
                if value.shape != wanted.shape:
                    yield from self.wrong_shape(value, wanted)
                elif value.is_floating_point() and not value.isfinite().all() and wanted.isfinite().all():
                    if value.isfinite().any():  # where all is NaN, everything that makes NaN would fit
                        yield from self.convict(_arguments(self.exercise))
                        yield from self.convict(_changes(self.exercise))
                    kind = "NaN" if value.isnan().any() else "infinity"
                    yield (
                        f"There is {kind} in your result: somewhere you divide by zero, or take the root or the"
                        f" logarithm of"
                        " something that is not positive."
                    )
            elif isinstance(wanted, Tensor):
                yield f"It returns a {type(value).__name__}, where a tensor of shape {list(wanted.shape)} is wanted."
            elif isinstance(wanted, list | tuple):
                items = _as_list(value)
                if items is None:
                    yield f"It returns a {type(value).__name__}, where {len(wanted)} values are wanted."
                elif len(items) == len(wanted) and any(
                    all(same(items[i], w, self.exercise.tolerance) for i, w in zip(order, wanted, strict=True))
                    for order in itertools.islice(itertools.permutations(range(len(wanted))), 5040)
                ):
                    backwards = same(items[::-1], wanted, self.exercise.tolerance)
                    yield f"The right values, but in {'the reverse' if backwards else 'another'} order."
                elif len(items) != len(wanted):
                    yield from self.convict(_arguments(self.exercise))
                    yield from self.convict(_changes(self.exercise))
                    yield (
                        f"It returns {len(items)} values, where {len(wanted)} are wanted: {_short(items)} in place of"
                        f" {_short(wanted)}."
                    )

    def wrong_dtype(self, value: Tensor, wanted: Tensor) -> Iterator[str]:
        if value.device != wanted.device:
            yield f"Your result is on {value.device}, but the arguments are on {wanted.device}: make it there."
        if value.dtype == wanted.dtype or {value.dtype, wanted.dtype} == {torch.float32, torch.float64}:
            return
        kinds = {"int32", "int64", "int16", "uint8"}
        a, b = (str(t.dtype).removeprefix("torch.") for t in (value, wanted))
        if a in kinds and b in kinds:
            return
        lost = " Everything behind the point is lost." if a in kinds else ""
        rounded = " It has three digits only." if a in ("float16", "bfloat16") else ""
        equal = value.shape == wanted.shape and same(value.to(wanted.dtype), wanted, 2e-2)
        yield f"It returns {a}, where {b} is wanted.{lost}{rounded}" + (" The values are right." if equal else "")

    def wrong_shape(self, value: Tensor, wanted: Tensor) -> Iterator[str]:
        tolerance, shapes = self.exercise.tolerance, f"{list(value.shape)}, where {list(wanted.shape)} is wanted"
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
            for name in ("mean", "sum"):
                for keepdim in (False, True):
                    reduced = getattr(b, name)(dim=dims, keepdim=keepdim)
                    if same(a, reduced, tolerance):
                        over = " and ".join(str(d) for d in dims)
                        yield f"You took a {name} over axis {over} as well: the shape is {shapes}."
        for n in range(1, a.ndim + 1):
            for dims in itertools.combinations(range(a.ndim), n):
                for name in ("mean", "sum"):
                    if same(getattr(a, name)(dim=dims), b, tolerance):
                        yield f"A {name} over axis {' and '.join(map(str, dims))} is missing: the shape is {shapes}."
        yield from self.convict(_changes(self.exercise))
        grown = a.ndim > b.ndim >= 1 or (a.ndim == b.ndim > 1 and a.numel() > b.numel() and len(a) > len(b))
        broadcast = (
            " Two shapes were broadcast against each other: a coefficient for each entry of a batch, [b], must become"
            " [b 1 1 1]"
            " before it multiplies [b c h w]."
            if grown
            else ""
        )
        yield f"The shape is {shapes}.{broadcast}"

    def gradient_only(self) -> Iterator[str]:
        """The values are right, and what flows back is not."""
        values = [same(o.value, r.value, self.exercise.tolerance) for o,
                  r in zip(self.outcomes, self.rights, strict=True)]
        through = " and ".join(f"`{name}`" for name in self.exercise.gradients)
        if not all(values) or not self.exercise.gradients:
            return
        if all(o.gradients is None for o in self.outcomes):
            yield (
                f"The values are right, but no gradient flows back to {through}: somewhere the result is cut off from"
                f" it by"
                " `.detach()`, `.item()`, `torch.no_grad()`, `.data`, NumPy, or a new `torch.tensor(...)`. Nothing"
                " would be"
                " learned."
            )
            return
        yield from self.convict(_changes(self.exercise))
        if all(not o.gradients or not any(g.any() for g in o.gradients) for o in self.outcomes):
            yield (
                f"The values are right, but the gradient to {through} is 0: the result was cut off from it, by"
                f" `.item()`,"
                " `.detach()` or a new `torch.tensor(...)`. Nothing would be learned."
            )
        for _, outcome, right in self.wrong():
            factors = [_factor(a, b) for a, b in zip(outcome.gradients or [], right.gradients, strict=False)]
            if outcome.gradients and all(factor is not None for factor in factors):
                times = ", ".join(f"{factor:.4g}" for factor in factors)
                yield f"The values are right, but the gradient to {through} is {times} times what it should be."
        yield f"The values are right, but the gradient to {through} is not: what is detached, and what is not?"

    def same_as_an_argument(self) -> Iterator[str]:
        for name in self.exercise.arguments:
            pairs = [(args[name], o.value) for args, o in zip(self.cases, self.outcomes, strict=True)]
            if all(isinstance(a, Tensor) and isinstance(v, Tensor) and same(v, a, 1e-6) for a, v in pairs):
                yield f"Your function returns `{name}` as it came in."

    def at_the_ends(self) -> Iterator[str]:
        """Right for every t but the first, or the last."""
        name = next((n for n in ("t", "timesteps") if isinstance(self.cases[0].get(n), Tensor)), None)
        found = []  # (t, is it the last one, whether it is right)
        for args, outcome, right in zip(self.cases, self.outcomes, self.rights, strict=True):
            t = args.get(name)
            schedule = args.get("alphas_cumprod", args.get("betas"))
            a, b = outcome.value, right.value
            if t is None or not isinstance(a, Tensor) or a.shape != b.shape or a.shape[:1] != t.shape:
                return
            last = -1 if schedule is None else len(schedule) - 1
            found += [
                (int(k), int(k) == last, same(x, y, self.exercise.tolerance)) for k, x, y in zip(t, a, b, strict=True)
            ]
        wrong = [f for f in found if not f[2]]
        if wrong and all(t == 0 for t, *_ in wrong) and len(wrong) < len(found):
            yield (
                "Right for every t but t = 0: what comes before the first step? (An index of -1 reads the last entry"
                " of a table;"
                " before the first step nothing is lost, ᾱ = 1.)"
            )
        if wrong and all(last for _, last, _ in wrong) and len(wrong) < len(found):
            yield "Right for every t but the last, T-1: what do you read behind the end of the table?"

    # --- the weights of a weighted sum --------------------------------------------------------------------------

    def weights(self, named: bool) -> Iterator[str]:
        """If the result is Σ weight · argument: which weight is wrong, and what stands in its place?"""
        names = self.exercise.linear
        mine, rights, quantities = [], [], []
        for args, outcome, right in zip(self.cases, self.outcomes, self.rights, strict=True):
            terms = [args[name] for name in names]
            if not names or any(t.shape != right.value.shape for t in [*terms, outcome.value]):
                return
            a, b = _solve(terms, outcome.value), _solve(terms, right.value)
            if a is None or b is None:
                return
            mine.append(a), rights.append(b)
            known = self.exercise.quantities(**args) if self.exercise.quantities else {}
            quantities.append({k: torch.as_tensor(v).double().expand(len(a)) for k, v in known.items()})
        mine, rights = torch.cat(mine), torch.cat(rights)  # [samples of all cases, arguments]
        known = {name: torch.cat([q[name] for q in quantities]) for name in (quantities[0] if quantities else ())}
        formulas = _formulas(known)
        sentences, all_named = [], True
        for i, name in enumerate(names):
            a, b = mine[:, i], rights[:, i]
            if _close(a, b):
                continue
            at = int((a - b).abs().argmax())
            is_, should = _formula(a, formulas), _formula(b, formulas)
            numbers = f"{a[at]:.4g} where it should be {b[at]:.4g}"
            if _close(a, torch.zeros_like(a)):
                sentences.append(f"`{name}` does not come in at all; its factor is {should or 'not 0'}")
            elif _close(a, -b):
                sentences.append(f"`{name}` comes in with the wrong sign")
            elif is_ and should:
                sentences.append(f"the factor of `{name}` is {is_}, but should be {should} ({numbers})")
            elif is_:
                sentences.append(f"the factor of `{name}` is {is_}, which is {numbers}")
            elif times := _times(a, b, formulas):
                sentences.append(f"the factor of `{name}` is {times} times what it should be ({numbers})")
            else:
                all_named = False
                wanted = f", which is {should}" if should else ""
                sentences.append(f"the factor of `{name}` is {numbers}{wanted}")
        if sentences and (all_named or not named):
            yield _as_a_whole("; ".join(sentences))

    # --- a simple relation to the right result --------------------------------------------------------------------

    def related(self) -> Iterator[str]:
        pairs = [(args, o.value, r.value) for args, o, r in self._comparable()]
        if not pairs:
            return
        whole = [(args, a.detach().double(), b.detach().double()) for args, a, b in pairs]
        yield from self._factor(whole)
        for sentence, relation in RELATIONS.items():
            if all(same(a, relation(b), self.exercise.tolerance) for _, a, b in whole):
                yield sentence
        offsets = [(a - b).flatten() for _, a, b in whole]
        if all(_close(d, d[:1].expand_as(d), 1e-5) for d in offsets) and sum(d.numel() for d in offsets) > 2:
            if _close(torch.stack([d[0] for d in offsets]), offsets[0][:1].expand(len(offsets))):
                yield f"Your result is the right one plus {float(offsets[0][0]):.4g}, everywhere."
        yield from self._orders(whole)
        yield from self._parts(whole)

    def _comparable(self):
        found = list(self.wrong())
        if all(
            isinstance(o.value, Tensor)
            and isinstance(r.value, Tensor)
            and o.value.shape == r.value.shape
            and o.value.is_floating_point()
            for _, o, r in found
        ):
            return found
        return []

    def _factor(self, whole) -> Iterator[str]:
        factors = [_factor(a, b) for _, a, b in whole]
        if any(factor is None for factor in factors):
            if all(a.ndim and len(a) > 1 for _, a, _ in whole):
                rows = [[_factor(x, y) for x, y in zip(a, b, strict=True)] for _, a, b in whole]
                known = all(f is not None and abs(f - 1) > 1e-3 for row in rows for f in row)
                if known and all(a.ndim > 1 for _, a, _ in whole):
                    shown = ", ".join(f"{f:.3g}" for f in rows[0])
                    yield f"Right up to a factor for each entry of the batch ({shown}, ...): a coefficient is wrong."
            return
        if _close(torch.tensor(factors), torch.tensor(factors[:1]).expand(len(factors))):
            scalars = sum(a.numel() for _, a, _ in whole)
            if scalars < 2:
                return
            known = {-1: "The sign is wrong: your result is minus the right one.",
                     2: "Your result is twice the right one.",
                     0.5: "Your result is half of the right one.", 0: "Your result is 0 everywhere."}  # fmt: skip
            near = next((k for k in known if abs(factors[0] - k) < 1e-3), None)
            yield known[near] if near is not None else f"Your result is exactly {factors[0]:.4g} times the right one."
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

    def _orders(self, whole) -> Iterator[str]:
        """The same numbers in another order."""
        tolerance = self.exercise.tolerance
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

    def _parts(self, whole) -> Iterator[str]:
        """Right in some places only, and in each case that went wrong."""
        for dim in range(min(b.ndim for *_, b in whole)):
            found = []
            for _, a, b in whole:
                scale = float(b[b.isfinite()].abs().max()) if b.isfinite().any() else 1.0
                close = ((a - b).abs() <= self.exercise.tolerance * (b.abs() + 0.1 * scale)) | (a == b)
                right = close.movedim(dim, 0).flatten(1).all(1).tolist() if b.ndim > 1 else close.tolist()
                if len(right) > 1:
                    found.append([i for i, good in enumerate(right) if good])
                if len(right) > 1 and len(found[-1]) in (0, len(right)):
                    found = []
                    break
            if not found:
                continue
            if dim == 0 and all(places == [0] for places in found) and all(b.ndim > 1 for *_, b in whole):
                yield "Right for the first entry of a batch only: the others are treated as if they were it."
            size = max(b.shape[dim] for *_, b in whole)
            wrong = [i for i in range(size) if i not in found[0]]
            yield f"Along axis {dim} it is right at {_short(found[0])} and wrong at {_short(wrong)}."

    def more_or_less(self) -> Iterator[str]:
        """The right result and a term more; or a step of the solution, returned in its place."""
        found: dict[str, list[bool]] = {}
        pairs = self._comparable()
        solution = self.exercise.compile()
        for args, outcome, right in pairs:
            a, b, tolerance = outcome.value.double(), right.value.double(), self.exercise.tolerance
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

    def probe(self, function: Callable) -> Iterator[str]:
        """Nothing fits. What does the result hang on, and what not?"""
        exercise, args = self.exercise, self.cases[0]
        mine, right = self.outcomes[0], self.rights[0]
        values = (mine.value, right.value)
        if mine.error is not None or not all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
            return
        good, bad = [], []  # arguments, by whether a change of them changes the result as it should
        for name, value in args.items():
            if type(value) is float or (isinstance(value, Tensor) and value.is_floating_point()):
                changed = {**args, name: value * 0.7 + (0.05 if type(value) is float else 0.05 * value.flip(0))}
                a, b = run(exercise, function, changed), run(exercise, exercise.compile(), changed)
                if a.error is not None or not isinstance(a.value, Tensor) or a.value.shape != mine.value.shape:
                    continue
                if same(b.value, right.value, 1e-4):
                    continue  # it does not matter here
                if same(a.value, mine.value, 1e-7):
                    yield f"`{name}` has no influence on your result."
                if mine.value.shape == right.value.shape:
                    equal = same(a.value - mine.value, b.value - right.value, 10 * exercise.tolerance)
                    (good if equal else bad).append(f"`{name}`")
        if good and bad:
            yield (
                f"What {' and '.join(good)} does to your result is right, but what {' and '.join(bad)} does is not:"
                " look at the terms in which it stands."
            )
        b = len(right.value) if right.value.ndim else 0
        batched = [n for n, v in args.items() if isinstance(v, Tensor) and v.ndim and len(v) == b]
        if b > 1 and batched and mine.value.shape[:1] == right.value.shape[:1]:
            alone = {**args, **{name: args[name][:1] for name in batched}}
            a, r = run(exercise, function, alone), run(exercise, exercise.compile(), alone)
            own = r.error is None and same(r.value, right.value[:1], exercise.tolerance)
            if own and a.error is None and not same(a.value, mine.value[:1], 1e-3):
                yield (
                    "What you return for one sample of a batch depends on the others that are in it: a mean, a sum, a"
                    " norm or"
                    " a softmax runs over the batch."
                )
        names = exercise.linear
        if names and all(args[n].shape == mine.value.shape for n in names):
            if _solve([args[n] for n in names], mine.value) is None:
                listed = " and ".join(f"`{n}`" for n in names)
                yield (
                    f"The right result is a weighted sum of {listed}, with one weight for each sample. Yours is none:"
                    f" there is a"
                    " mean, a product, a clamp or another shape in it."
                )

    # --- when nothing else is known -------------------------------------------------------------------------------

    def where(self) -> str:
        wrong = [label for label, hit in zip(self.labels, self.hits, strict=True) if not hit]
        right = [label for label, hit in zip(self.labels, self.hits, strict=True) if hit]
        return f" (Right for: {'; '.join(right)}. Not for: {'; '.join(wrong)}.)" if right else ""

    def right_somewhere(self) -> Iterator[str]:
        if any(self.hits):
            wrong = [label for label, hit in zip(self.labels, self.hits, strict=True) if not hit]
            right = [label for label, hit in zip(self.labels, self.hits, strict=True) if hit]
            yield (
                f"It is right for {'; '.join(right)}, but not for {'; '.join(wrong)}: something in it holds for the"
                f" first kind"
                " only. Is a number, a shape or a special case written down that should come from the arguments?"
            )

    def raised(self, error: BaseException) -> str:
        message = (str(error).strip().splitlines() or ["no message"])[0].rstrip(".")
        ours = ("site-packages", "lib/python", str(Path(__file__).parent))
        own = [f for f in traceback.extract_tb(error.__traceback__) if not any(part in f.filename for part in ours)]
        line = ""
        if own:
            code = (own[-1].line or linecache.getline(own[-1].filename, own[-1].lineno)).strip()
            line = f", in line {own[-1].lineno}: `{code}`" if code else f", in line {own[-1].lineno}"
        hint = next((h for text, h in HINTS.items() if text in f"{type(error).__name__}: {message}"), "")
        return f"It raises {type(error).__name__}{line}. {message}.{hint}"

    def in_numbers(self) -> str:
        """No name for it: where, and by how much."""
        for i, (label, hit) in enumerate(zip(self.labels, self.hits, strict=True)):
            if not hit:
                mine, right = self.outcomes[i].value, self.rights[i].value
                if isinstance(mine, Tensor) and isinstance(right, Tensor) and mine.shape == right.shape:
                    far = f", by up to {float((mine.double() - right.double()).abs().max()):.3g}"
                else:
                    far = ""
                return (
                    f"On the case \"{label}\" it differs{far}. It begins {_short(_numbers(mine))}, and should begin"
                    f" {_short(_numbers(right))}."
                )
        return ""


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

HINTS = {
    "TimeoutError": " Is there a loop in which nothing moves on?",
    "must match the size of tensor": (
        " Two shapes that do not fit: where a coefficient for each picture, [b], multiplies pictures [b c h w], it"
        " has to become"
        " [b 1 1 1] first: `.reshape(-1, 1, 1, 1)`."
    ),
    "mat1 and mat2 shapes": " In a matrix product the inner sizes must be equal: is a transpose missing?",
    "NameError": " The name was never set in the function: is it misspelt, or set in another cell?",
    "object has no attribute": " Is it a Python number where a tensor is expected, or the other way round?",
    "only integer tensors": " An index has to hold integers.",
    "tensors used as indices": " An index has to hold integers: `t.long()`.",
    "out of bounds": " Off by one at the end? There are T entries, counted 0 ... T-1.",
    "out of range": " Off by one at the end? The last index is the length minus 1.",
    "cuda": " Let the device come from the arguments: `x.device`.",
    "math domain": " The root or the logarithm of a number that is negative or 0.",
}


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
        function(*(_copy(value) for value in args.values()))
    finally:
        sys.settrace(before)
    return found


def _solve(terms: list[Tensor], value: Tensor) -> Tensor | None:
    """The weights [b terms] with which value is a weighted sum of the terms, sample by sample; None if it is none."""
    A = torch.stack([t.detach().double().reshape(len(t), -1) for t in terms], dim=-1)  # [b n terms]
    y = value.detach().double().reshape(len(value), -1, 1)
    if not y.isfinite().all() or A.shape[1] < 2 * A.shape[2]:
        return None
    weights = torch.linalg.lstsq(A, y).solution
    residual = (A @ weights - y).abs().max()
    return weights[..., 0] if residual <= 1e-4 * float(y.abs().max()) + 1e-9 else None


def _close(a: Tensor, b: Tensor, tolerance: float = 3e-4) -> bool:
    return bool(((a - b).abs() <= tolerance * b.abs() + 2e-5).all())


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
    if not here.any() or not _close(a[~here], b[~here]):
        return None
    ratio = a[here] / b[here]
    if _close(ratio, ratio[:1].expand_as(ratio)):
        return f"{float(ratio[0]):.4g}"
    names, values = formulas
    return _formula(ratio, (names, values[:, here])) if names else None


def _factor(a: Tensor, b: Tensor) -> float | None:
    """c, if a = c b."""
    if a.shape != b.shape or not a.is_floating_point() or not (a.isfinite().all() and b.isfinite().all()):
        return None
    a, b = a.detach().double().flatten(), b.detach().double().flatten()
    squared = float(b @ b)
    if squared == 0:
        return None
    c = float(a @ b) / squared
    return c if torch.allclose(a, c * b, rtol=3e-4, atol=1e-5 * float(a.abs().max()) + 1e-12) else None


def _numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [round(v, 4) if isinstance(v, float) else v for v in value.detach().flatten()[:4].tolist()]
    return value


def _short(values: Any) -> str:
    if not isinstance(values, list | tuple):
        return str(values)[:80]
    shown = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v) for v in values[:8])
    return f"[{shown}{', ...' if len(values) > 8 else ''}]"
