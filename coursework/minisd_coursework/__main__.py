"""python -m minisd.coursework list | show NAME | check FILE | export FOLDER"""

import runpy
import sys
from pathlib import Path
from typing import Annotated, Literal

import tyro

from . import EXERCISES, check, find
from . import export as exporting
from .texts import say

Positional = tyro.conf.Positional


def list_exercises() -> None:
    """All exercises, by stage, with their difficulty and the minutes that they take."""
    for e in EXERCISES.values():
        print(f"{e.number} {e.stage:17} {e.name:26} {'*' * e.difficulty:5} {e.minutes:3} min")


def show(name: Annotated[str, Positional], hints: int = 0) -> None:
    """Print the stub of an exercise.

    Args:
        name: see `list`.
        hints: how many of its hints to print.
    """
    exercise = find(name)
    print(exercise.stub)
    for number, hint in enumerate(exercise.hints[:hints], 1):
        print(f"{say('notebook.hint', number=number)}. {hint}")


def check_file(file: Annotated[Path, Positional]) -> None:
    """Check all functions of a Python file that have the name of an exercise; exits with 1 if one is wrong.

    Args:
        file: it is run, as a script would be.
    """
    if not file.is_file():
        raise ValueError(f"there is no file {file}")
    found = {name: thing for name, thing in runpy.run_path(str(file)).items() if name in EXERCISES}
    if not found:
        raise ValueError(f"{file} has no function with the name of an exercise: see `list`")
    verdicts = [check(name, function) for name, function in found.items()]
    print(f"{sum(v.right for v in verdicts)} of {len(verdicts)} are right")
    if not all(verdicts):
        sys.exit(1)


def export(
    folder: Annotated[Path, Positional],
    form: Literal["plain", "nbgrader", "otter"] = "plain",
    solutions: bool = True,
    overwrite: bool = False,
) -> None:
    """Write notebooks with the exercises, and with their solutions.

    Args:
        folder: where to.
        form: "plain" (exercises/ and solutions/), or the source for nbgrader or otter.
        solutions: in the plain form, whether to write those, too.
        overwrite: whether to replace notebooks that are there and have been changed.
    """
    for path in exporting.export(folder, form, solutions, overwrite):
        print(f"wrote {path}")


def main(arguments: list[str] | None = None) -> None:
    """Run a command; a mistake of the user's ends in one sentence."""
    commands = {"list": list_exercises, "show": show, "check": check_file, "export": export}
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="python -m minisd.coursework", args=arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"minisd: {error}")


if __name__ == "__main__":
    main()
