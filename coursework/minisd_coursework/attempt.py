"""A student's attempt that is wrong, and the functions that it is compared with to find out what is wrong with it.

A candidate is a function whose mistake is known, with the sentence that names it. It matches if it does on every case
what the student's function does.
"""

import itertools
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from torch import Tensor

from . import mutants
from .exercise import Exercise
from .running import Outcome, cases_of, run, same, same_outcome
from .texts import say

Candidate = tuple[Callable, str]  # a function with a mistake, and the sentence that names it


@dataclass
class Attempt:
    """A function that is wrong, and all that is known about it."""

    exercise: Exercise
    labels: list[str]  # of the cases
    cases: list[dict[str, Any]]  # arguments by name
    outcomes: list[Outcome]  # of the student's function
    rights: list[Outcome]  # of the solution
    hits: list[bool]  # whether the two agree

    def matching(self, candidates: Iterable[Candidate]) -> Iterator[str]:
        """The sentences of the candidates that do on every case what the student's function does."""
        # The cases that went wrong come first: they tell the candidates apart, while most of them get the others right.
        order = sorted(range(len(self.cases)), key=lambda i: (self.hits[i], self.outcomes[i].error is not None))
        seen = any(not self.hits[i] and self.outcomes[i].error is None for i in order)
        for function, sentence in candidates:
            if all(self.does_the_same(function, i, any_error=seen) for i in order):
                yield sentence

    def does_the_same(self, function: Callable, i: int, any_error: bool = False) -> bool:
        """Whether a candidate does on case i what the student's function did. Gradients cost time, and come last.

        any_error: whether two errors need not be the same, since wrong results of other cases are there to compare.
        """
        mine, tolerance = self.outcomes[i], self.exercise.tolerance
        outcome = run(self.exercise, function, self.cases[i], gradients=False)
        if any_error and mine.error is not None and outcome.error is not None:
            return True
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

    def comparable(self) -> list[tuple[dict[str, Any], Outcome, Outcome]]:
        """The same, if numbers can be compared with numbers in all of them: tensors of the right shape."""

        def numbers(a: Any, b: Any) -> bool:
            return isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape and a.is_floating_point()

        found = list(self.wrong())
        return found if all(numbers(outcome.value, right.value) for _, outcome, right in found) else []

    def labels_of(self, hit: bool) -> str:
        """The names of the cases that went right, or wrong."""
        return "; ".join(label for label, right in zip(self.labels, self.hits, strict=True) if right is hit)


# --- the candidates ---------------------------------------------------------------------------------------------------


@cache
def known(exercise: Exercise) -> list[Candidate]:
    """The mistakes of the exercise's table."""
    return list(_compiled(exercise, ((m.edit(exercise.solution), m.sentence) for m in exercise.mistakes)))


@cache
def arguments(exercise: Exercise) -> list[Candidate]:
    """The solution, called with other arguments."""
    args = next(iter(cases_of(exercise).values()))
    return [(f, as_a_whole(said)) for f, said in _compiled(exercise, mutants.of_the_arguments(exercise.solution, args))]


@cache
def changes(exercise: Exercise) -> list[Candidate]:
    """The solution with one small change."""
    found = _compiled(exercise, mutants.of_the_solution(exercise.solution, exercise.arguments))
    return [(function, say("candidates.in_the_solution", sentence=sentence)) for function, sentence in found]


def pairs(exercise: Exercise) -> Iterator[Candidate]:
    """Two mistakes of the table, or one and a wrong argument, or one and a small change."""
    return _compiled(exercise, _pairs(exercise))


def _pairs(exercise: Exercise) -> Iterator[tuple[str, str]]:
    for a, b in itertools.permutations(exercise.mistakes, 2):
        once = a.edit(exercise.solution) if a.old and b.old else None
        if once and (twice := b.edit(once)):
            yield twice, say("candidates.two", first=a.sentence, second=b.sentence)
    args = next(iter(cases_of(exercise).values()))
    for mistake in exercise.mistakes:
        for solution, other in mutants.of_the_arguments(mistake.edit(exercise.solution), args):
            yield solution, say("candidates.two", first=mistake.sentence, second=as_a_whole(other))
    for mistake in exercise.mistakes:
        for solution, other in mutants.of_the_solution(mistake.edit(exercise.solution), exercise.arguments):
            yield solution, say("candidates.two_in_the_solution", first=mistake.sentence, second=other)


def _compiled(exercise: Exercise, solutions: Iterable[tuple[str, str]]) -> Iterator[Candidate]:
    """Solutions as functions; those of which an edit has made nonsense are left out."""
    for solution, sentence in solutions:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                function = exercise.compile(solution)
            except SyntaxError:
                continue
        yield function, sentence


# --- words ------------------------------------------------------------------------------------------------------------


def kind_of(value: Any) -> str:
    """The type of a value, with its article: "a list", "an int"."""
    name = "tuple" if isinstance(value, tuple) else type(value).__name__  # torch has tuples with names of their own
    return f"{'an' if name[0] in 'aeiouAEIOU' or name == 'ndarray' else 'a'} {name}"


def as_a_whole(sentence: str) -> str:
    return f"{sentence[0].upper()}{sentence[1:]}."


def listed(names: Iterable[str]) -> str:
    return " and ".join(f"`{name}`" for name in names)


def short(values: Any) -> str:
    if not isinstance(values, list | tuple):
        return str(values)[:80]
    shown = ", ".join(f"{v:.4g}" if isinstance(v, float) else str(v)[:20] for v in values[:8])
    return f"[{shown}{', ...' if len(values) > 8 else ''}]"
