"""Is it right? And if not, which mistake was it?

A student's function is run on the exercise's cases, and so is the solution. Where they differ, the suspects are asked
one group after the other, from those that say most to those that say least: the mistakes that the exercise knows; other
arguments in the place of the right ones; the weights, if the result is a weighted sum; the solution with one small
change; simple relations (a factor, a sign, an order); two mistakes at once. A suspect is convicted if it does on every
case what the student's function does.
"""

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from . import mutants
from .exercise import Exercise
from .relations import more_or_less, related
from .running import as_list, cases_of, default_torch_state, right_outcomes, run, same, same_outcome
from .symptoms import (
    at_the_ends,
    changes_in_place,
    gradient_only,
    is_random,
    nothing_to_compare,
    raised,
    same_as_an_argument,
    without_time,
    wrong_kind,
)
from .trial import Trial, arguments, changes, known, pairs, short
from .weights import solve, weights

PAIRS = 800  # so many pairs of mistakes are tried: about a second


@dataclass(frozen=True)
class Verdict:
    """What the checker found.

    right: whether the function is right.
    message: what the student reads.
    mistake: the sentence that names the mistake; None if it is right, or wrong in a way that nobody knew.
    printed: what the function printed on the first case.
    """

    right: bool
    message: str
    mistake: str | None = None
    printed: str = ""

    def __bool__(self) -> bool:
        return self.right

    def expect(self) -> None:
        """For pytest, nbgrader and otter: raises AssertionError with the message unless it is right."""
        assert self.right, self.message

    def _ipython_display_(self) -> None:
        """The message was printed already."""


@default_torch_state()
def judge(exercise: Exercise, function: Any) -> Verdict:
    """Run a student's function on the exercise's cases, and say what is wrong with it.

    The verdict does not depend on the caller's gradient mode, default dtype or device, and none of them is changed.
    """
    if sentence := _not_a_function(exercise, function):
        return _wrong(exercise, sentence)
    outcomes = []
    for label, args in cases_of(exercise).items():
        outcomes.append(run(exercise, function, args))
        if isinstance(outcomes[-1].error, TimeoutError):  # on the other cases one would wait as long again
            sentence = f"{raised(outcomes[-1].error, args)} The check stopped there, on this case: {label}."
            return replace(_wrong(exercise, sentence), printed=outcomes[0].printed)
    return replace(_of_the_outcomes(exercise, function, outcomes), printed=outcomes[0].printed)


def _of_the_outcomes(exercise: Exercise, function: Callable, outcomes: list) -> Verdict:
    cases, rights = cases_of(exercise), right_outcomes(exercise)
    hits = [same_outcome(o, right, exercise.tolerance) for o, right in zip(outcomes, rights, strict=True)]
    first = next(iter(cases.values()))

    if all(hits):
        again = run(exercise, function, first, seed=1)
        changed = [name for name in outcomes[0].changed if name not in exercise.may_change]
        if not same_outcome(again, rights[0], exercise.tolerance):
            return _wrong(exercise, is_random(first))
        if changed:
            return _wrong(exercise, changes_in_place(changed))
        return Verdict(True, f"{exercise.name}: right.{_remark(outcomes[0].value, rights[0].value)}")

    trial = Trial(exercise, list(cases), list(cases.values()), outcomes, rights, hits)
    sentence = next(suspects(trial, function), None)
    if sentence is None:
        return Verdict(False, f"{exercise.name}: not right yet. {in_numbers(trial)}")
    changed = sorted({name for o in outcomes for name in o.changed} - set(exercise.may_change))
    also = f" Besides: {changes_in_place(changed)}" if changed and "in place" not in sentence else ""
    return _wrong(exercise, sentence + also)


def _wrong(exercise: Exercise, sentence: str) -> Verdict:
    return Verdict(False, f"{exercise.name}: not right yet. {sentence}", sentence)


def _remark(value: Any, right: Any) -> str:
    if isinstance(right, list) and not isinstance(value, list):
        kind = type(value).__name__
        return f" (One remark: it returns a {kind}, where the stub says a list: `list(...)` or `.tolist()` makes one.)"
    if isinstance(right, Tensor) and isinstance(value, Tensor) and value.dtype != right.dtype:
        return (
            f" (One remark: it returns {value.dtype}, where the arguments make {right.dtype}. A network of float32"
            " refuses float64: end with `.to(x.dtype)` if it is to run there.)"
        )
    return ""


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
        if inspect.isclass(function):
            return f"{function.__name__} is a class: give an object of it, {function.__name__}(), or a function."
        return f"Your function is called as {call}, but takes ({', '.join(names)}): keep the arguments of the stub."
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return None
    if set(names) == set(exercise.arguments) and names != list(exercise.arguments):
        return f"Your function is called as {call}, but has its arguments in another order: ({', '.join(names)})."
    return None


def suspects(trial: Trial, function: Callable) -> Iterator[str]:
    """Sentences that fit, the best first."""
    yield from nothing_to_compare(trial)
    yield from trial.convict(known(trial.exercise))
    broken = [o for o in trial.outcomes if o.error is not None]
    if len(broken) == len(trial.outcomes):
        yield raised(broken[0].error, trial.cases[0])
    if not broken:
        again = run(trial.exercise, function, trial.cases[0], seed=1)
        if not same_outcome(again, trial.outcomes[0], trial.exercise.tolerance):
            yield is_random(trial.cases[0])
        yield from wrong_kind(trial)
        yield from gradient_only(trial)
        yield from same_as_an_argument(trial)
        yield from trial.convict(arguments(trial.exercise))
        yield from at_the_ends(trial)
        yield from without_time(trial, function)
        yield from weights(trial, named=True)
    elif len(broken) < len(trial.outcomes):
        yield from trial.convict(arguments(trial.exercise))
    yield from trial.convict(changes(trial.exercise))
    if broken:
        right, wrong = trial.labels_of(True), trial.labels_of(False)
        where = f" (Right for: {'; '.join(right)}. Not for: {'; '.join(wrong)}.)" if right else ""
        yield raised(broken[0].error, trial.cases[0]) + where
    yield from related(trial)
    yield from more_or_less(trial)
    yield from trial.convict(itertools.islice(pairs(trial.exercise), PAIRS))
    yield from weights(trial, named=False)
    yield from first_difference(trial)
    yield from right_somewhere(trial)
    yield from probe(trial, function)


# --- when nothing else is known ---------------------------------------------------------------------------------------


def first_difference(trial: Trial) -> Iterator[str]:
    """Of lists: where do they part?"""
    for _, outcome, right in trial.wrong():
        mine, wanted = as_list(outcome.value), right.value
        if isinstance(wanted, list) and mine is not None and len(mine) == len(wanted) > 1:
            at = next(i for i, (a, b) in enumerate(zip(mine, wanted, strict=True)) if not same(a, b, 1e-4))
            if at:
                here = f"{mine[at]!r} where {wanted[at]!r} is wanted"
                yield f"The first {at} of {len(wanted)} are right; then comes {here}."


def right_somewhere(trial: Trial) -> Iterator[str]:
    if any(trial.hits):
        right, wrong = trial.labels_of(True), trial.labels_of(False)
        yield (
            f"It is right for {'; '.join(right)}, but not for {'; '.join(wrong)}: something in it holds for the first"
            " kind only. Is a number, a shape or a special case written down that should come from the arguments?"
        )


def probe(trial: Trial, function: Callable) -> Iterator[str]:
    """Nothing fits. What does the result hang on, and what not?"""
    exercise, args = trial.exercise, trial.cases[0]
    mine, right = trial.outcomes[0], trial.rights[0]
    values = (mine.value, right.value)
    if mine.error is not None or not all(isinstance(v, Tensor) and v.is_floating_point() for v in values):
        return
    unused = []
    good, bad = [], []  # arguments, by whether a change of them changes the result as it should
    for name, value in args.items():
        if type(value) is float or (isinstance(value, Tensor) and value.is_floating_point()):
            changed = {**args, name: value * 0.7 + (0.05 if type(value) is float else 0.05 * value.flip(0))}
            a, b = run(exercise, function, changed), run(exercise, exercise.compile(), changed)
            if isinstance(a.error, TimeoutError):
                return
            if a.error is not None or not isinstance(a.value, Tensor) or a.value.shape != mine.value.shape:
                continue
            if same(b.value, right.value, 1e-4):
                continue  # it does not matter here
            if same(a.value, mine.value, 1e-7):
                unused.append(name)
            if mine.value.shape == right.value.shape:
                equal = same(a.value - mine.value, b.value - right.value, 10 * exercise.tolerance)
                (good if equal else bad).append(f"`{name}`")
    if unused:
        own = " Do you draw noise of your own, from a fixed seed?" if unused == ["noise"] else ""
        have = "has" if len(unused) == 1 else "have"
        yield f"{' and '.join(f'`{name}`' for name in unused)} {have} no influence on your result.{own}"
    if good and bad:
        yield (
            f"What {' and '.join(good)} {'does' if len(good) == 1 else 'do'} to your result is right, but what"
            f" {' and '.join(bad)} {'does is' if len(bad) == 1 else 'do is'} not: look at the terms in which"
            f" {'it stands' if len(bad) == 1 else 'they stand'}."
        )
    b = len(right.value) if right.value.ndim else 0
    batched = [n for n, v in args.items() if isinstance(v, Tensor) and v.ndim and len(v) == b]
    if b > 1 and batched and mine.value.shape[:1] == right.value.shape[:1]:
        alone = {**args, **{name: args[name][:1] for name in batched}}
        a, r = run(exercise, function, alone), run(exercise, exercise.compile(), alone)
        own = r.error is None and same(r.value, right.value[:1], exercise.tolerance)
        if own and a.error is None and not same(a.value, mine.value[:1], 1e-3):
            yield (
                "What you return for one sample of a batch depends on the others that are in it: a mean, a sum, a norm"
                " or a softmax runs over the batch."
            )
    names = exercise.linear
    if names and all(getattr(args[n], "shape", None) == mine.value.shape for n in names):
        if solve([args[n] for n in names], mine.value) is None:
            listed = " and ".join(f"`{n}`" for n in names)
            yield (
                f"The right result is a weighted sum of {listed}, with one weight for each sample. Yours is none: there"
                " is a mean, a product, a clamp or another shape in it."
            )


def in_numbers(trial: Trial) -> str:
    """No name for it: where, and by how much."""
    for i, (label, hit) in enumerate(zip(trial.labels, trial.hits, strict=True)):
        if not hit:
            mine, right = trial.outcomes[i].value, trial.rights[i].value
            if isinstance(mine, Tensor) and isinstance(right, Tensor) and mine.shape == right.shape:
                far = f", by up to {float((mine.double() - right.double()).abs().max()):.3g}"
            else:
                far = ""
            begin, should = short(_numbers(mine)), short(_numbers(right))
            return f'On the case "{label}" it differs{far}. It begins {begin}, and should begin {should}.'
    return ""


def _numbers(value: Any) -> Any:
    if isinstance(value, Tensor):
        return [round(v, 4) if isinstance(v, float) else v for v in value.detach().flatten()[:4].tolist()]
    return value
