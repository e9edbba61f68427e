"""What an exercise is: one function with its task, its solution, and the mistakes that are made in it.

The stage modules beside this file are the one source of everything. There, an exercise is a function under the
decorator `@exercise(...)`, and under an `@case(...)` for each set of arguments that it is tried on. Its signature and
docstring are the task, and what stands between the two fences is the solution.

    # BEGIN SOLUTION
    signal, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    ...
    # END SOLUTION

What is said about it, and the mistakes that are made in it, stand in the TOML file of the same name (see `texts`). A
mistake is an edit of the solution. So it can be run: the checker compares what a student's function returns with what
each edited solution returns, and two edits can be made at once.
"""

import ast
import inspect
import textwrap
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

from . import texts
from .texts import Mistake

BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
STAGES = ("noising", "loss", "unet", "vae", "clip", "sampling", "latent_diffusion")  # in their order: 1 to 7

EXERCISES: dict[str, "Exercise"] = {}  # all of them, by name; filled when minisd.coursework is imported


@dataclass(frozen=True, eq=False)
class Exercise:
    """A function to be written.

    reference: the function, with its task and its solution.
    cases: what the function is tried on: see `cases`.
    swap: student's function -> where it goes: (object, attribute or key of a dict, what to put there). Or, where
        minisd has no place for it, a sentence that says why.
    gradients: arguments through which gradients must flow (tensors, or modules: then their parameters).
    linear: arguments of which the result is a weighted sum. The checker finds the weights, and ...
    quantities: ... (arguments) -> numbers or [b] tensors by their symbol, to name those that are wrong.
    may_change: arguments that a right solution may change in place.
    read: result -> what counts of it, if not every form of it is to be told apart.
    remark: (arguments, after a right function was called with them) -> a remark on how it did it, or "".
    tolerance: relative.

    From the stage's TOML file:

    difficulty: from 1, one line to copy from an equation, to 5.
    minutes: what a student needs who has read the stage's notebook.
    hints: shown one at a time, from a nudge to nearly everything.
    mistakes: in the order in which they are tried.
    """

    reference: Callable
    cases: list[Callable[[], dict[str, tuple]]]
    swap: Callable[[Callable], list[tuple[Any, str, Any]]] | str
    gradients: tuple[str, ...] = ()
    linear: tuple[str, ...] = ()
    quantities: Callable[..., dict[str, Any]] | None = None
    may_change: tuple[str, ...] = ()
    read: Callable[[Any], Any] = lambda value: value
    remark: Callable[..., str] = lambda **_: ""
    tolerance: float = 1e-4
    difficulty: int = field(init=False)
    minutes: int = field(init=False)
    hints: tuple[str, ...] = field(init=False)
    mistakes: tuple[Mistake, ...] = field(init=False)

    def __post_init__(self):
        vars(self).update(texts.of_exercise(self.stage, self.name, self.solution))

    @property
    def name(self) -> str:
        return self.reference.__name__

    @property
    def stage(self) -> str:
        """The stage's name, which is that of its module."""
        return self.reference.__module__.rsplit(".", 1)[-1]

    @property
    def number(self) -> int:
        return STAGES.index(self.stage) + 1

    @property
    def task(self) -> str:
        return inspect.cleandoc(self.reference.__doc__)

    @property
    def arguments(self) -> tuple[str, ...]:
        return tuple(inspect.signature(self.reference).parameters)

    @cached_property
    def source(self) -> str:
        """The function as it stands in the stage's module, from `def` on, with its fences."""
        return _functions(inspect.getsourcefile(inspect.unwrap(self.reference)))[self.name]

    @property
    def head(self) -> str:
        """Signature and docstring."""
        return self.source[: self.source.index("    " + BEGIN)]

    @property
    def solution(self) -> str:
        """What stands between the fences, at the left margin."""
        body = self.source[self.source.index(BEGIN) + len(BEGIN) : self.source.index("    " + END)]
        return textwrap.dedent(body).strip("\n")

    @property
    def stub(self) -> str:
        """What the student is given."""
        return self.head + "    raise NotImplementedError  # your code here\n"

    @property
    def answer(self) -> str:
        """What the teacher is given: the stub with the solution in it."""
        return self.head + textwrap.indent(self.solution, "    ") + "\n"

    def written(self, solution: str | None = None) -> str:
        """The function with this solution in it, or with its own, and without its docstring."""
        signature = self.source[: self.source.index('    """')]
        return signature + textwrap.indent(self.solution if solution is None else solution, "    ") + "\n"

    def compile(self, solution: str | None = None) -> Callable:
        """The same, to be called."""
        namespace, code = dict(inspect.unwrap(self.reference).__globals__), self.written(solution)
        exec(compile(code, f"<{self.name}>", "exec"), namespace)  # our own text, from the module beside this one
        return namespace[self.name]


@cache
def _functions(file: str) -> dict[str, str]:
    """The functions of a module that have fences, up to the second one."""
    text = Path(file).read_text("utf-8")
    found, lines = {}, text.splitlines()
    for node in ast.parse(text).body:
        if isinstance(node, ast.FunctionDef):
            body = lines[node.lineno - 1 : node.end_lineno + 1]  # the fence is a comment behind its last statement
            ends = [i for i, line in enumerate(body) if line.strip() == END]
            found[node.name] = "\n".join(body[: ends[0] + 1]) + "\n" if ends else ""
    return found


def exercise(**options: Any) -> Callable[[Callable], Callable]:
    """Make an exercise of a function, which stays what it is. The options are the fields of `Exercise`."""

    def register(function: Callable) -> Callable:
        EXERCISES[function.__name__] = Exercise(function, vars(function)["cases"], **options)
        return function

    return register


def cases(several: Callable[[], dict[str, tuple]]) -> Callable[[Callable], Callable]:
    """What an exercise is tried on: the name of each case -> its arguments, in the order of the signature.

    They are made by a call, so that they can be random: the same random numbers each time.
    """

    def add(function: Callable) -> Callable:
        function.cases = [several, *getattr(function, "cases", [])]  # decorators are called from the last to the first
        return function

    return add


def case(label: str, arguments: Callable[[], tuple]) -> Callable[[Callable], Callable]:
    """One case. See `cases`."""
    return cases(lambda: {label: arguments()})


@contextmanager
def swap(name: str, function: Callable) -> Iterator[None]:
    """Inside, minisd itself runs with the student's function in the place of its own.

        with swap("q_sample", my_q_sample):
            minisd.load("tiny").txt2img("a red circle")

    Raises:
        ValueError: there is no such exercise, or it has no place in the pipeline.
    """
    exercise = find(name)
    if isinstance(exercise.swap, str):
        raise ValueError(f"{name} cannot be swapped in. {exercise.swap}")
    with ExitStack() as stack:
        for target, key, value in exercise.swap(function):
            in_a_dict = isinstance(target, dict)
            stack.enter_context(patch.dict(target, {key: value}) if in_a_dict else patch.object(target, key, value))
        yield


def find(name: str) -> Exercise:
    """The exercise of that name.

    Raises:
        ValueError: there is none.
    """
    if name not in EXERCISES:
        raise ValueError(f"there is no exercise {name!r}: choose one of {', '.join(EXERCISES)}")
    return EXERCISES[name]
