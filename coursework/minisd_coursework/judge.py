"""Is it right? And if not, which mistake was it?

A student's function is run on the exercise's cases, and so is the solution. Where they differ, explanations are tried
one group after the other, from those that say most to those that say least: the mistakes that the exercise knows; other
arguments in the place of the right ones; the weights, if the result is a weighted sum; the solution with one small
change; simple relations (a factor, a sign, an order); two mistakes at once. The first that fits on every case is it.
"""

import copy
import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from html import escape
from typing import Any

import torch
from torch import Tensor

from . import symptoms
from .attempt import Attempt, arguments, changes, kind_of, known, listed, pairs, short
from .exercise import Exercise
from .relations import more_or_less, related
from .running import as_list, cases_of, default_torch_state, right_outcomes, run, same, same_outcome, watch
from .texts import say
from .weights import solve, weights

PAIRS = 800  # so many pairs of mistakes are tried: about a second


@dataclass(frozen=True)
class Verdict:
    """What the checker found.

    right: whether the function is right.
    message: what the student reads.
    mistake: the sentence that names the mistake; None if it is right, or wrong in a way that nobody knew.
    printed: what the function printed on the first case.
    solution: minisd's own solution; "" unless the function is right.
    """

    right: bool
    message: str
    mistake: str | None = None
    printed: str = ""
    solution: str = ""

    def __bool__(self) -> bool:
        return self.right

    def expect(self) -> None:
        """For pytest, nbgrader and otter: raises AssertionError with the message unless it is right."""
        assert self.right, self.message

    def _ipython_display_(self) -> None:
        """In a notebook, minisd's own solution is shown below the message, which was printed already."""
        if self.solution:
            from IPython.display import display

            folded = say("verdict.solution", code=escape(self.solution))
            display({"text/html": folded, "text/plain": self.solution}, raw=True)


@default_torch_state()
def judge(exercise: Exercise, function: Any) -> Verdict:
    """Run a student's function on the exercise's cases, and say what is wrong with it.

    The verdict does not depend on the caller's gradient mode, default dtype or device, and none of them is changed.
    """
    if sentence := _not_a_function(exercise, function):
        return _wrong(exercise, sentence)
    outcomes = []
    for label, args in cases_of(exercise).items():
        outcomes.append(watch(exercise, function, args))
        if isinstance(outcomes[-1].error, TimeoutError):  # on the other cases one would wait as long again
            sentence = f"{symptoms.raised(outcomes[-1].error, args)} {say('verdict.timed_out', label=label)}"
            return replace(_wrong(exercise, sentence), printed=outcomes[0].printed)
    return replace(_of_the_outcomes(exercise, function, outcomes), printed=outcomes[0].printed)


def _of_the_outcomes(exercise: Exercise, function: Callable, outcomes: list) -> Verdict:
    cases, rights = cases_of(exercise), right_outcomes(exercise)
    hits = [same_outcome(o, right, exercise.tolerance) for o, right in zip(outcomes, rights, strict=True)]
    if all(hits):
        first = copy.deepcopy(next(iter(cases.values())))
        again = run(exercise, function, first, seed=1)
        changed = [name for name in outcomes[0].changed if name not in exercise.may_change]
        if not same_outcome(again, rights[0], exercise.tolerance):
            return _wrong(exercise, symptoms.is_random(first))
        if changed:
            return _wrong(exercise, symptoms.changes_in_place(changed))
        remarks = [*_remarks(outcomes[0].value, rights[0].value), exercise.remark(**first)]
        message = " ".join([say("verdict.right", name=exercise.name), *remarks]).strip()
        return Verdict(True, message, solution=exercise.written())

    attempt = Attempt(exercise, list(cases), list(cases.values()), outcomes, rights, hits)
    sentence = next(explanations(attempt, function), None)
    if sentence is None:
        return replace(_wrong(exercise, in_numbers(attempt)), mistake=None)
    changed = sorted({name for o in outcomes for name in o.changed} - set(exercise.may_change))
    if changed and "in place" not in sentence:
        sentence = say("verdict.besides", sentence=sentence, changes=symptoms.changes_in_place(changed))
    return _wrong(exercise, sentence)


def _wrong(exercise: Exercise, sentence: str) -> Verdict:
    if sentence == say("unwritten.not_yet"):
        return Verdict(False, say("verdict.unwritten", name=exercise.name), sentence)
    return Verdict(False, say("verdict.wrong", name=exercise.name, sentence=sentence), sentence)


def _remarks(value: Any, right: Any) -> Iterator[str]:
    if isinstance(right, list) and not isinstance(value, list):
        yield say("verdict.no_list", kind=kind_of(value))
    if getattr(value, "dtype", None) == torch.float64 and getattr(right, "dtype", None) == torch.float32:
        yield say("verdict.other_dtype")


def _not_a_function(exercise: Exercise, function: Any) -> str | None:
    """What is wrong with it, if it cannot be called as the stub is."""
    call = f"{exercise.name}({', '.join(exercise.arguments)})"
    if inspect.isclass(function):
        return say("verdict.a_class", name=exercise.name, given=function.__name__)
    if not callable(function):
        return say("verdict.not_a_function", name=exercise.name, given=kind_of(function))
    try:
        signature = inspect.signature(function)
        names = list(signature.parameters)
    except (TypeError, ValueError):  # a built-in that does not say
        return None
    try:
        signature.bind(*exercise.arguments)
    except TypeError:
        return say("verdict.other_arguments", call=call, names=", ".join(names))
    if set(names) == set(exercise.arguments) and names != list(exercise.arguments):
        return say("verdict.other_order", call=call, names=", ".join(names))
    return None


def explanations(attempt: Attempt, function: Callable) -> Iterator[str]:
    """Sentences that fit, the best first."""
    yield from symptoms.nothing_to_compare(attempt, function)
    yield from attempt.matching(known(attempt.exercise))
    broken = [o for o in attempt.outcomes if o.error is not None]
    if broken:
        both = say("verdict.right_and_wrong", right=attempt.labels_of(True), wrong=attempt.labels_of(False))
        where = both if any(attempt.hits) else ""
        raised = f"{symptoms.raised(broken[0].error, attempt.cases[0])} {where}".strip()
        # Torch's errors name sizes, so that one may know a change of the solution by them, but Python's say too little.
        telling = any(attempt.wrong()) or isinstance(broken[0].error, RuntimeError | IndexError)
        if len(broken) == len(attempt.outcomes) or not telling:
            yield raised
    else:
        yield from symptoms.wrong_kind(attempt)
        again = watch(attempt.exercise, function, attempt.cases[0], seed=1)
        if not same_outcome(again, attempt.outcomes[0], attempt.exercise.tolerance):
            yield symptoms.is_random(attempt.cases[0])
        yield from symptoms.gradient_only(attempt)
        yield from symptoms.same_as_an_argument(attempt)
    yield from attempt.matching(arguments(attempt.exercise))
    if not broken:
        yield from symptoms.at_the_ends(attempt)
        yield from symptoms.without_time(attempt, function)
        yield from weights(attempt, named=True)
    yield from attempt.matching(changes(attempt.exercise))
    if broken:
        yield raised
    yield from related(attempt)
    yield from more_or_less(attempt)
    yield from attempt.matching(itertools.islice(pairs(attempt.exercise), PAIRS))
    yield from weights(attempt, named=False)
    yield from first_difference(attempt)
    if any(attempt.hits):
        yield say("last.somewhere", right=attempt.labels_of(True), wrong=attempt.labels_of(False))
    yield from probe(attempt, function)


# --- when nothing else is known ---------------------------------------------------------------------------------------


def first_difference(attempt: Attempt) -> Iterator[str]:
    """Of lists: where do they part?"""
    for _, outcome, right in attempt.wrong():
        mine, wanted = as_list(outcome.value), right.value
        if isinstance(wanted, list) and mine is not None and len(mine) == len(wanted) > 1:
            at = next(i for i, (a, b) in enumerate(zip(mine, wanted, strict=True)) if not same(a, b, 1e-4))
            if at:
                yield say("last.first_difference", count=at, total=len(wanted), mine=mine[at], wanted=wanted[at])


def probe(attempt: Attempt, function: Callable) -> Iterator[str]:
    """Nothing fits. What does the result hang on, and what not?"""
    exercise, args, tolerance = attempt.exercise, attempt.cases[0], attempt.exercise.tolerance
    mine, right = attempt.outcomes[0], attempt.rights[0]
    if not all(isinstance(o.value, Tensor) and o.value.is_floating_point() for o in (mine, right)):
        return
    unused, good, bad = [], [], []  # good and bad: by whether a change of the argument changes the result as it should
    for name, value in args.items():
        if type(value) is float or (isinstance(value, Tensor) and value.is_floating_point()):
            changed = {**args, name: value * 0.7 + (0.05 if type(value) is float else 0.05 * value.flip(0))}
            a, b = watch(exercise, function, changed), run(exercise, exercise.compile(), changed)
            if isinstance(a.error, TimeoutError):
                return
            if a.error is not None or not isinstance(a.value, Tensor) or a.value.shape != mine.value.shape:
                continue
            if same(b.value, right.value, 1e-4):
                continue  # it does not matter here
            if same(a.value, mine.value, 1e-7):
                unused.append(name)
            if mine.value.shape == right.value.shape:
                equal = same(a.value - mine.value, b.value - right.value, 10 * tolerance)
                (good if equal else bad).append(name)
    if unused:
        own = say("last.own_noise") if unused == ["noise"] else ""
        yield f"{say('last.unused', names=listed(unused))} {own}".strip()
    if good and bad:
        yield say("last.good_and_bad", good=listed(good), bad=listed(bad))
    b = len(right.value) if right.value.ndim else 0
    batched = [n for n, v in args.items() if isinstance(v, Tensor) and v.ndim and len(v) == b]
    if b > 1 and batched and mine.value.shape[:1] == right.value.shape[:1]:
        alone = {**args, **{name: args[name][:1] for name in batched}}
        a, r = watch(exercise, function, alone), run(exercise, exercise.compile(), alone)
        own = r.error is None and same(r.value, right.value[:1], tolerance)
        if own and a.error is None and not same(a.value, mine.value[:1], 1e-3):
            yield say("last.batch")
    names = exercise.linear
    if names and all(getattr(args[n], "shape", None) == mine.value.shape for n in names):
        if solve([args[n] for n in names], mine.value) is None:
            yield say("last.no_sum", names=listed(names))


def in_numbers(attempt: Attempt) -> str:
    """No name for it: where, and by how much."""
    at = attempt.hits.index(False)
    mine, right = attempt.outcomes[at].value, attempt.rights[at].value
    far = ""
    if isinstance(mine, Tensor) and isinstance(right, Tensor) and mine.shape == right.shape:
        far = say("verdict.by_up_to", far=f"{float((mine.double() - right.double()).abs().max()):.3g}")
    begin, should = (short(v.flatten()[:4].tolist() if isinstance(v, Tensor) else v) for v in (mine, right))
    return say("verdict.in_numbers", label=attempt.labels[at], far=far, begin=begin, should=should).strip()
