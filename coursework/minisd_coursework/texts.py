"""What is said to students, read from the TOML files of this folder, so that it can be edited and translated there.

A file for each stage holds what belongs to its exercises (minutes, difficulty, hints, mistakes), shared.toml the
mistakes that several of them have, and sentences.toml what is said whatever the exercise. A file that is wrong is
refused when it is read, in a sentence that says where.
"""

import ast
import fnmatch
import string
import textwrap
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
FIELDS = {"difficulty": int, "minutes": int, "hints": list, "mistakes": list}  # of an exercise: all are needed


@dataclass(frozen=True)
class Mistake:
    """An edit of a solution, and the sentence that teaches what is wrong with it.

    old: a piece of the solution that occurs exactly once in it; "" if `new` takes the place of the whole solution.
    """

    old: str
    new: str
    sentence: str

    def edit(self, solution: str) -> str | None:
        """The solution with the mistake in it; None if `old` does not occur exactly once."""
        if not self.old:
            return self.new
        return solution.replace(self.old, self.new) if solution.count(self.old) == 1 else None


@cache
def read(name: str) -> dict[str, Any]:
    """A TOML file of this folder.

    Raises:
        ValueError: it is no TOML.
    """
    try:
        return tomllib.loads((FOLDER / name).read_text("utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{name} is not valid TOML: {error}") from None


def of_exercise(stage: str, name: str, solution: str) -> dict[str, Any]:
    """Difficulty, minutes, hints and mistakes of an exercise, as arguments for `Exercise`.

    Raises:
        ValueError: something is missing in the stage's file, is not what it should be, or does not fit the solution.
    """
    where, table = f"{stage}.toml, {name}", read(f"{stage}.toml").get(name)
    if table is None:
        raise ValueError(f"{stage}.toml has no table [{name}], which the exercise in {stage}.py needs")
    _expect(where, table, FIELDS)
    if wrong := [hint for hint in table["hints"] if not isinstance(hint, str)]:
        raise ValueError(f"{where}: a hint has to be a text, not {wrong[0]!r}")
    mistakes = tuple(_mistakes(where, table["mistakes"], solution))
    return {**table, "hints": tuple(map(folded, table["hints"])), "mistakes": mistakes}


def _mistakes(where: str, tables: list[dict[str, str]], solution: str) -> Iterator[Mistake]:
    for number, table in enumerate(tables, 1):
        here = f"{where}, mistake {number}"
        shared = read("shared.toml").get(table["shared"]) if "shared" in table else {}
        if shared is None:
            raise ValueError(f"{here}: shared.toml has no mistake [{table['shared']}]")
        table = {"shared": "", "old": "", **shared, **table}
        _expect(here, table, dict.fromkeys(("shared", "old", "new", "sentence"), str))
        whole = table["new"] if table["old"] else textwrap.dedent(table["new"]).strip("\n")
        mistake = Mistake(table["old"], whole, folded(table["sentence"]))
        if mistake.edit(solution) is None:
            count = solution.count(mistake.old)
            raise ValueError(
                f'{here} ("{mistake.sentence}"): `old` has to occur exactly once in the solution, but {mistake.old!r}'
                f" occurs {count} times in it. Copy a piece of the solution that is longer, or the right one"
            )
        yield mistake


def _expect(where: str, table: dict[str, Any], fields: dict[str, type]) -> None:
    """Hold a table to the fields that it has to have, and no others."""
    said = f' ("{folded(table["sentence"])}")' if isinstance(table.get("sentence"), str) else ""
    for key, kind in fields.items():
        if key not in table:
            raise ValueError(f"{where}{said}: the key `{key}` is missing")
        if type(table[key]) is not kind:
            raise ValueError(f"{where}{said}: `{key}` has to be of type {kind.__name__}, not {table[key]!r}")
    if unknown := [key for key in table if key not in fields]:
        raise ValueError(f"{where}{said}: there is no key `{unknown[0]}`; the keys are {', '.join(fields)}")


def folded(text: str) -> str:
    """A text in one line: a break of a line in the file is a space."""
    return " ".join(text.split())


# --- what is said whatever the exercise -------------------------------------------------------------------------------


def say(key: str, /, **values: Any) -> str:
    """A sentence of sentences.toml, "section.name", with these values in its placeholders."""
    return sentences()[key].format(**values)


@cache
def sentences() -> dict[str, str]:
    tables = read("sentences.toml").items()
    return {f"{section}.{name}": folded(text) for section, table in tables for name, text in table.items()}


def placeholders(where: str, text: str, known: set[str]) -> None:
    """Hold a text to the placeholders that are filled in.

    Raises:
        ValueError: it has another, or a brace that is none.
    """
    try:
        names = {name for _, name, *_ in string.Formatter().parse(text) if name is not None}
    except ValueError as error:
        raise ValueError(f"{where}: {error}. Write a brace twice where it is no placeholder: {{{{ or }}}}") from None
    if unknown := sorted(names - known):
        listed = ", ".join(f"{{{name}}}" for name in sorted(known)) or "none"
        raise ValueError(f"{where}: there is no placeholder {{{unknown[0]}}} here; there are {listed}")


def check_sentences() -> None:
    """Hold sentences.toml to the calls of `say` in this package: each finds its sentence, and fills all of it in.

    Raises:
        ValueError: a sentence is missing, or has a placeholder that is not filled in.
    """
    for file in sorted(FOLDER.glob("*.py")):
        text = file.read_text("utf-8")
        for node in ast.walk(ast.parse(text)) if "say(" in text else ():
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "say":
                key = node.args[0]  # "shape.axes", or f"order.{name}", which is several sentences
                parts = key.values if isinstance(key, ast.JoinedStr) else [key]
                pattern = "".join(part.value if isinstance(part, ast.Constant) else "*" for part in parts)
                found = fnmatch.filter(sentences(), pattern)
                if not found:
                    raise ValueError(f"sentences.toml has no sentence {pattern}, which {file.name} needs")
                for name in found:
                    placeholders(f"sentences.toml, {name}", sentences()[name], {k.arg for k in node.keywords})
