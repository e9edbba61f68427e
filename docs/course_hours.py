"""How long the course takes, counted from the notebooks' sources:   python docs/course_hours.py [--write]

    minutes = words / 150 + lines of code / 10 + the minutes of the exercises in the text + the minutes of the runs

Only the core counts: what is neither folded (inside <details>) nor below a heading "## Optional: ...", and code that is
not tagged `hide-input`. Notebooks 00 to 07 are the core path.

--write puts the minutes where they are stated: in the first cell of each notebook and in the table of docs/teaching.md.
The hours stand in notebook 00, in README.md and in docs/teaching.md, in the words of the last line that is printed.
tests/test_course.py holds all of them to this script.
"""

import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import jupytext

ROOT = Path(__file__).parents[1]
SOURCES = sorted((ROOT / "notebooks").glob("*.py"))
CORE_PATH = range(8)  # notebooks 00 to 07
NUMBERS = "no one two three four five six seven eight nine ten eleven twelve".split()

MINUTES = r"About (\d+) minutes"
RUN = r"runs in about (\w+) minutes?"
EXERCISE = r"### Write it yourself: `(\w+)`\s+(essential|worth it) · about (\d+) minutes"
TABLE = r"\| notebook \| core, minutes.*?(?=\n\n)"


@dataclass
class Notebook:
    """What is counted in one notebook."""

    name: str  # without its ending
    title: str  # the text of its first cell, in one line
    words: int = 0  # in the core
    all_words: int = 0
    lines: int = 0  # of code, in the core
    exercises: dict[str, int] = field(default_factory=dict)  # those in the text, with their minutes

    @property
    def number(self) -> int:
        return int(self.name[:2])

    @property
    def stated(self) -> int | None:
        """The minutes that its first cell states."""
        found = re.search(MINUTES, self.title)
        return found and int(found[1])

    @property
    def run(self) -> int | None:
        """The minutes that it runs, which its first cell states, too."""
        found = re.search(RUN, self.title)
        return found and as_number(found[1])

    @property
    def minutes(self) -> int:
        """What the core takes, rounded to five minutes."""
        counted = self.words / 150 + self.lines / 10 + sum(self.exercises.values()) + (self.run or 0)
        return 5 * round(counted / 5)


def read(source: Path) -> Notebook:
    cells = jupytext.read(source).cells
    notebook = Notebook(source.stem, " ".join(cells[0].source.split()))
    optional = False
    for cell in cells:
        if cell.cell_type == "markdown":
            notebook.all_words += len(cell.source.split())
            for part in re.split(r"^(?=## )", without_folded(cell.source), flags=re.MULTILINE):
                if part.startswith("## "):
                    optional = part.startswith("## Optional:")
                notebook.words += 0 if optional else len(part.split())
            for name, _, minutes in re.findall(EXERCISE, cell.source):
                notebook.exercises[name] = int(minutes)
        elif cell.cell_type == "code" and not optional and "hide-input" not in cell.metadata.get("tags", []):
            stripped = [line.strip() for line in cell.source.splitlines()]
            notebook.lines += sum(line != "" and not line.startswith("#") for line in stripped)
    return notebook


def without_folded(text: str) -> str:
    """A text without what is inside <details>, the innermost first."""
    while (shorter := re.sub(r"<details>(?:(?!<details>).)*?</details>", "", text, flags=re.DOTALL)) != text:
        text = shorter
    return text


def as_number(word: str) -> int | None:
    """The number of "2", of "two" and of "a" (minute)."""
    if word.isdecimal():
        return int(word)
    return 1 if word in ("a", "an") else NUMBERS.index(word) if word in NUMBERS else None


def hours(notebooks: list[Notebook]) -> str:
    """The hours of the core path in words, to half an hour."""
    halves = round(2 * sum(n.minutes for n in notebooks if n.number in CORE_PATH) / 60)
    return NUMBERS[halves // 2] + " and a half" * (halves % 2)


# --- where they are stated --------------------------------------------------------------------------------------------


def table(notebooks: list[Notebook]) -> str:
    """The table of docs/teaching.md."""
    from minisd.coursework import EXERCISES, STAGES

    lines = [
        "| notebook | core, minutes | of these, runs | exercises in its text | all of the stage | their minutes |",
        "|---|---|---|---|---|---|",
    ]
    for notebook in notebooks:
        stage = notebook.name[3:]
        theirs = [e.minutes for e in EXERCISES.values() if e.stage == stage] if stage in STAGES else []
        link = f"[{notebook.number} {stage.replace('_', ' ')}](notebooks/{notebook.name}.ipynb)"
        names = ", ".join(f"`{name}`" for name in notebook.exercises)
        cells = [link, notebook.minutes, notebook.run or "", names, len(theirs) or "", sum(theirs) or ""]
        lines.append("|" + "".join(f" {cell} |" if cell != "" else " |" for cell in cells))
    return "\n".join(lines)


def write(notebooks: list[Notebook]) -> None:
    """Put the minutes where they are stated."""
    for notebook in notebooks:
        for ending in (".py", ".ipynb"):  # the first time, which is in the first cell
            minutes = f"About {notebook.minutes} minutes"
            replace(ROOT / "notebooks" / (notebook.name + ending), MINUTES, minutes)
    replace(ROOT / "docs" / "teaching.md", TABLE, table(notebooks))


def replace(file: Path, pattern: str, text: str) -> None:
    before = file.read_text("utf-8")
    after = re.sub(pattern, lambda _: text, before, count=1, flags=re.DOTALL)
    if after != before:
        file.write_text(after, "utf-8")
        print(f"wrote {file.relative_to(ROOT)}")


def report(notebooks: list[Notebook]) -> None:
    """Print a row for each notebook."""
    columns = ("core words", "all words", "core lines", "exercises, min", "run, min", "all, min", "stated, min")
    rows = {
        n.name: (n.words, n.all_words, n.lines, sum(n.exercises.values()), n.run, n.minutes, n.stated)
        for n in notebooks
    }
    rows["together"] = tuple(sum(number or 0 for number in column) for column in zip(*rows.values(), strict=True))
    print(f"{'':24}", *columns, sep="  ")
    for name, numbers in rows.items():
        cells = zip(numbers, columns, strict=True)
        print(f"{name:24}", *(str("?" if n is None else n).rjust(len(column)) for n, column in cells), sep="  ")
    print(f'\n"The core path, notebooks 00 to 07, takes about {hours(notebooks)} hours"')


if __name__ == "__main__":
    counted = [read(source) for source in SOURCES]
    if "--write" in sys.argv[1:]:
        write(counted)
    report(counted)
