"""check.q_sample(my_q_sample): one function for each exercise."""

from collections.abc import Callable
from functools import partial
from itertools import cycle
from typing import Any

from .exercise import EXERCISES, find
from .judge import Verdict, judge
from .texts import say


class Check:
    """`check.NAME(function)` runs a student's function, says what it found, and returns the `Verdict`.

        check.q_sample(q_sample)               # in a notebook
        check.q_sample(q_sample).expect()      # in a test: raises AssertionError unless it is right
        check("q_sample", q_sample)            # by name
        check.q_sample.hint()                  # prints the first hint; called again, the next one
    """

    def __call__(self, name: str, function: Any) -> Verdict:
        verdict = judge(find(name), function)
        if verdict.printed:
            print(f"--- printed on the first case:\n{verdict.printed.rstrip()}\n---")
        print(verdict.message)
        return verdict

    def __getattr__(self, name: str) -> Callable[[Any], Verdict]:
        if name not in EXERCISES:
            raise AttributeError(f"there is no exercise {name!r}: choose one of {', '.join(EXERCISES)}")

        check, hints = partial(self, name), EXERCISES[name].hints
        said = cycle([say("notebook.hint_of", number=i, count=len(hints), hint=h) for i, h in enumerate(hints, 1)])
        check.hint = lambda: print(next(said))
        check.__doc__ = EXERCISES[name].task
        setattr(self, name, check)  # the same one at the next call, which knows the hints that were shown
        return check

    def __dir__(self) -> list[str]:
        return list(EXERCISES)


check = Check()
