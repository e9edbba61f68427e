"""Notebooks of the exercises: for students, for teachers, and for nbgrader and otter. All from the stages' modules."""

import json
from pathlib import Path

from minisd.checkpoint.files import written_whole

from .exercise import BEGIN, END, EXERCISES, STAGES, Exercise
from .picture import caption
from .texts import FOLDER, placeholders, say

FORMS = ("plain", "nbgrader", "otter")


def export(folder: str | Path, form: str = "plain", solutions: bool = True, overwrite: bool = False) -> list[Path]:
    """Write a notebook for each stage, and return the paths.

    Args:
        folder: it is made if it is not there.
        form: "plain": `exercises/` for students, and `solutions/` apart from them.
            "nbgrader": `source/STAGE/STAGE.ipynb`, of which `nbgrader generate_assignment` makes the students' version.
            "otter": `STAGE/STAGE.ipynb`, of which `otter assign` makes both.
        solutions: False leaves `solutions/` out of the plain form.
        overwrite: whether notebooks of the same names are replaced even if they are different, because somebody has
            worked in them.

    Raises:
        ValueError: there is no such form; or a notebook would be overwritten. Then nothing has been written.
    """
    if form not in FORMS:
        raise ValueError(f"the forms are {', '.join(FORMS)}, not {form!r}")
    files = {}
    for number, stage in enumerate(STAGES, 1):
        name = f"{number:02}_{stage}"
        if form == "nbgrader":
            notebooks = {f"source/{name}/{name}": nbgrader(stage)}
        elif form == "otter":
            notebooks = {f"{name}/{name}": otter(stage)}
        else:
            notebooks = {f"exercises/{name}": plain(stage)}
            notebooks |= {f"solutions/{name}": plain(stage, solved=True)} if solutions else {}
        files |= {Path(folder) / f"{place}.ipynb": as_notebook(cells) for place, cells in notebooks.items()}
    for path, text in files.items():
        if not overwrite and path.exists() and path.read_text("utf-8", errors="replace") != text:
            raise ValueError(f"{path} has been changed: give another folder, or replace it by --overwrite")
    for path, text in files.items():
        with written_whole(path) as unfinished:
            unfinished.write_text(text, "utf-8")
    return list(files)


def of_stage(stage: str) -> list[Exercise]:
    return [exercise for exercise in EXERCISES.values() if exercise.stage == stage]


# --- the three forms --------------------------------------------------------------------------------------------------


def plain(stage: str, solved: bool = False) -> list[dict]:
    cells = opening(stage)
    for exercise in of_stage(stage):
        cells += [heading(exercise), code(exercise.answer if solved else exercise.stub), hints(exercise)]
        cells += [code(f"check.{exercise.name}({exercise.name})"), drawing(exercise)]
    return cells


def nbgrader(stage: str) -> list[dict]:
    """With nbgrader's fences and metadata: a cell to be written, and one that is graded and locked, for each exercise.
    """
    cells = opening(stage)
    for exercise in of_stage(stage):
        fenced = exercise.source.replace(BEGIN, "### BEGIN SOLUTION").replace(END, "### END SOLUTION")
        own = {"grade": False, "solution": True, "locked": False}
        test = {"grade": True, "solution": False, "locked": True, "points": exercise.difficulty}
        cells += [heading(exercise), code(fenced, _graded(exercise.name, own)), hints(exercise)]
        cells.append(code(f"check.{exercise.name}({exercise.name}).expect()", _graded(f"check_{exercise.name}", test)))
    return cells


def _graded(grade_id: str, flags: dict) -> dict:
    return {"nbgrader": {"grade_id": grade_id, "schema_version": 3, "task": False, **flags}}


def otter(stage: str) -> list[dict]:
    """With the raw cells that `otter assign` reads. Its tests are functions that raise an exception."""
    cells = [raw("# ASSIGNMENT CONFIG\nexport_cell: false\ntests:\n  ok_format: false"), *opening(stage)]
    for exercise in of_stage(stage):
        name = exercise.name
        cells += [raw(f"# BEGIN QUESTION\nname: {name}\npoints: {exercise.difficulty}"), heading(exercise)]
        cells += [raw("# BEGIN SOLUTION"), code(exercise.source), raw("# END SOLUTION"), raw("# BEGIN TESTS")]
        test = f"def test_{name}({name}):\n    from minisd.coursework import check\n\n    check.{name}({name}).expect()"
        cells += [code(f"{test}\n\ntest_{name}({name})"), raw("# END TESTS"), raw("# END QUESTION"), hints(exercise)]
    return cells


# --- the cells --------------------------------------------------------------------------------------------------------


def opening(stage: str) -> list[dict]:
    """What the exercises are about, and the imports."""
    exercises = of_stage(stage)
    minutes = sum(exercise.minutes for exercise in exercises)
    filled = {"number": STAGES.index(stage) + 1, "stage": stage, "count": len(exercises), "minutes": minutes}
    text = (FOLDER / "opening.md").read_text("utf-8").strip()
    placeholders("opening.md", text, set(filled))
    return [markdown(text.format(**filled)), code((FOLDER / "imports.txt").read_text("utf-8"))]


def heading(exercise: Exercise) -> dict:
    stars = "★" * exercise.difficulty + "☆" * (5 - exercise.difficulty)
    return markdown(f"## {exercise.name}\n\n{stars} · {say('notebook.minutes', minutes=exercise.minutes)}")


def hints(exercise: Exercise) -> dict:
    """Folded, one in the other, so that nobody sees the last before the first."""
    text = ""
    for number, hint in reversed(list(enumerate(exercise.hints, 1))):
        text = f"<details><summary>{say('notebook.hint', number=number)}</summary>\n\n{hint}\n\n{text}</details>\n"
    return markdown(text.strip())


def drawing(exercise: Exercise) -> dict:
    says_why = f"# {exercise.swap}\n" if isinstance(exercise.swap, str) else ""
    return code(f'{says_why}# {caption(exercise.name)}\ndraw("{exercise.name}", {exercise.name})')


def markdown(text: str) -> dict:
    return {"cell_type": "markdown", "metadata": {}, "source": text}


def raw(text: str) -> dict:
    return {"cell_type": "raw", "metadata": {}, "source": text}


def code(text: str, metadata: dict | None = None) -> dict:
    source = text.strip()
    return {"cell_type": "code", "execution_count": None, "metadata": metadata or {}, "outputs": [], "source": source}


def as_notebook(cells: list[dict]) -> str:
    """The JSON of a notebook; cells are numbered, so that the same exercises make the same file."""
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}
    numbered = [{"id": f"cell-{i}", **cell} for i, cell in enumerate(cells)]
    notebook = {"cells": numbered, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps(notebook, ensure_ascii=False, indent=1, sort_keys=True) + "\n"


# --- for the teachers' page -------------------------------------------------------------------------------------------


def table() -> str:
    """All exercises in a table of Markdown: docs/coursework.md has it, and a test holds it to the code."""
    rows = ["| stage | exercise | difficulty | minutes | mistakes known | swap |", "|---|---|---|---|---|---|"]
    for e in EXERCISES.values():
        swapped = "yes" if callable(e.swap) else ""
        cells = (f"{e.number} {e.stage}", f"`{e.name}`", "★" * e.difficulty, e.minutes, len(e.mistakes), swapped)
        rows.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(rows)
