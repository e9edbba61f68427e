"""The notebooks 00 to 11 as a course: short enough, in one form, and with times that are true.

docs/course_hours.py counts, and says what counts as the core of a notebook.
"""

import ast
import importlib.util
import inspect
import io
import re
import textwrap
import tokenize
from collections.abc import Iterator
from pathlib import Path

import jupytext
import nbformat
import pytest

from minisd.coursework import EXERCISES, STAGES

ROOT = Path(__file__).parents[1]
MOST_WORDS, MOST_LINES, MOST_WORDS_TOGETHER = 2_500, 250, 38_000
TAGS = {"parameters", "hide-input", "hide-output", "exercise", "colab"}
SOLUTION = "<details><summary>Solution</summary>"
PREDICT = "**Predict, then run.**"


def script(name: str):
    """A script of docs/, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


course_hours, colab = script("course_hours"), script("colab")

# What has not been rewritten yet. As long as a name is here, its test has to fail. To read what is missing:
#   pytest tests/test_course.py -k 01_noising --runxfail
NOT_YET = {
    "05_clip",
    "07_latent_diffusion",
    "08_training",
    "10_evaluation",
    "11_why_is_it_noise",
    "all words together",
}


NAMES = set()


def held(*names: str):
    """For each name a test, or one that has to fail as yet."""
    NAMES.update(names)
    yet = pytest.mark.xfail(strict=True, raises=AssertionError, reason="not rewritten yet")
    return [pytest.param(name, marks=yet if name in NOT_YET else ()) for name in names]


@pytest.fixture(scope="module")
def counted():
    return [course_hours.read(source) for source in course_hours.SOURCES]


def test_the_names_that_are_not_rewritten_are_names_of_tests():
    assert NOT_YET <= NAMES, f"no test has the name {NOT_YET - NAMES}"


# --- its length -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", held("all words together"))
def test_all_notebooks_together_are_short_enough(name, counted):
    assert sum(notebook.all_words for notebook in counted) <= MOST_WORDS_TOGETHER


@pytest.mark.parametrize("name", held("exercises together"))
def test_about_twelve_exercises_stand_in_the_text(name, counted):
    assert 10 <= sum(len(notebook.exercises) for notebook in counted) <= 16


@pytest.mark.parametrize("name", held("hours in 00_start_here.py", "hours in README.md", "hours in teaching.md"))
def test_the_hours_of_the_core_path_are_stated(name, counted):
    file = next(path for folder in ("notebooks", ".", "docs") if (path := ROOT / folder / name.split()[-1]).exists())
    text = " ".join(re.sub(r"^# ?", "", file.read_text("utf-8"), flags=re.MULTILINE).split())
    said = f"about {course_hours.hours(counted)} hours"
    found = re.search(rf"core path\b.{{0,60}} {said}", text.replace("**", ""), re.IGNORECASE)
    assert found, f'{file.name} should say that the core path takes "{said}": python docs/course_hours.py'


@pytest.mark.parametrize("name", held("table in teaching.md"))
def test_the_teachers_table_is_up_to_date(name, counted):
    page = (ROOT / "docs" / "teaching.md").read_text("utf-8")
    assert course_hours.table(counted) in page, "write it anew: python docs/course_hours.py --write"


@pytest.mark.parametrize("name", held("cells for Colab"))
def test_the_cells_for_colab_follow_the_title_of_each_notebook(name):
    others = []
    for source in course_hours.SOURCES:
        cells, wanted = jupytext.read(source).cells, colab.cells_of(source.stem, colab.address())
        found = [cell for cell in cells if colab.TAG in cell.metadata.get("tags", [])]
        if found != cells[1 : 1 + len(wanted)] or [(cell.cell_type, cell.source) for cell in found] != wanted:
            others.append(source.name)
    assert not others, f"run `python docs/colab.py`: {', '.join(others)}"


def test_what_is_folded_or_optional_or_only_measures_is_not_in_the_core(tmp_path):
    notebook = tmp_path / "00_a.py"
    notebook.write_text(
        "# %% [markdown]\n# # one two\n#\n# About 10 minutes, with two exercises; it runs in about a minute.\n"
        "#\n# <details><summary>no no</summary>\n#\n# no <details>no</details> no\n#\n# </details>\n"
        "# %%\nx = 1\n\n# a comment\ny = 2\n"
        '# %% tags=["hide-input"]\nz = 3\n'
        "# %% [markdown]\n# three\n#\n# ## Optional: no\n# no\n"
        "# %%\nz = 3\n"
        "# %% [markdown]\n# no\n#\n# ## Optional: no\n# no\n#\n# ## four five\n#\n"
        "# ### Write it yourself: `snr`\n#\n# worth it · about 5 minutes\n",
        "utf-8",
    )
    found = course_hours.read(notebook)
    heading = "# one two About 10 minutes, with two exercises; it runs in about a minute."
    exercise = "## four five ### Write it yourself: `snr` worth it · about 5 minutes"
    assert found.words == len(f"{heading} three {exercise}".split())
    assert found.all_words == found.words + 15
    assert (found.lines, found.exercises, found.run, found.stated) == (2, {"snr": 5}, 1, 10)
    assert found.minutes == 5  # 31 / 150 + 2 / 10 + 5 + 1, to five minutes


# --- its form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", held(*(path.stem for path in course_hours.SOURCES)))
def test_a_notebook_has_the_form_of_the_course(name):
    source = ROOT / "notebooks" / f"{name}.py"
    notebook, cells = course_hours.read(source), jupytext.read(source).cells
    saved = nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells
    parts = (length(notebook), times(notebook), tags(cells), predictions(cells), place(name, cells))
    faults = [fault for part in parts for fault in part] + [*exercises(notebook, cells), *given_away(notebook, saved)]
    assert not faults, f"{name}: " + "; ".join(faults)


def length(notebook) -> Iterator[str]:
    if notebook.words > MOST_WORDS:
        yield f"{notebook.words} words in the core, at most {MOST_WORDS}: fold, or put under `## Optional: …`"
    if notebook.lines > MOST_LINES:
        yield f"{notebook.lines} lines of code in the core, at most {MOST_LINES}"


def times(notebook) -> Iterator[str]:
    if notebook.stated != notebook.minutes:
        yield f'the first cell should say "About {notebook.minutes} minutes" (python docs/course_hours.py --write)'
    if notebook.run is None:
        yield 'the first cell should say "it runs in about N minutes"'
    count = len(notebook.exercises)
    said = f"with {course_hours.NUMBERS[count]} exercise{'s' * (count > 1)}"
    if count and said not in notebook.title:
        yield f'the first cell should say "{said}"'


def tags(cells) -> Iterator[str]:
    if unknown := {tag for cell in cells for tag in cell.metadata.get("tags", [])} - TAGS:
        yield f"unknown tags {sorted(unknown)}"


def predictions(cells) -> Iterator[str]:
    """A question, whose answer is the output of the next cell, which the site hides until it is asked for."""
    for before, cell in zip(cells, cells[1:], strict=False):
        asked = PREDICT in before.source and before.source.rstrip().endswith("?")
        hidden = "hide-output" in cell.metadata.get("tags", [])
        if PREDICT in before.source and not (asked and hidden):
            yield f"a prediction ends in a question, and the next cell is tagged hide-output: {before.source[-60:]!r}"
        if hidden and PREDICT not in before.source:
            yield f"no {PREDICT} before {cell.source[:60]!r}"


def place(name: str, cells) -> Iterator[str]:
    """A stage's notebook opens with the map, and ends where the next one begins."""
    if name[3:] not in STAGES:
        return
    first = "\n".join(cell.source for cell in cells[:8])
    if f'viz.pipeline("{name[3:]}")' not in first:
        yield f'viz.pipeline("{name[3:]}") is not near the beginning'
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for part in ("At the end you can", "## What you know now", "**Next**"):
        if part not in text:
            yield f'"{part}" is missing'


def exercises(notebook, cells) -> Iterator[str]:
    """Heading, stub and check, folded solution, in three cells, and all of it as in the package."""
    if notebook.name[3:] in STAGES and not notebook.exercises:
        yield "no exercise in the text"
    tagged = [i for i, cell in enumerate(cells) if "exercise" in cell.metadata.get("tags", [])]
    if len(tagged) != len(notebook.exercises):
        yield f"{len(tagged)} cells tagged exercise, but {len(notebook.exercises)} headings with minutes"
    for i in tagged:
        stub, _, call = cells[i].source.rpartition("\n")
        found = re.fullmatch(r"check\.(\w+)\(\1\)", call)
        if not found or found[1] not in EXERCISES:
            yield f"the cell of an exercise ends in check.NAME(NAME), not {call!r}"
            continue
        name = found[1]
        exercise, heading = EXERCISES[name], f"### Write it yourself: `{name}`"
        if notebook.exercises.get(name) != exercise.minutes or heading not in cells[i - 1].source:
            yield f"no {heading}, with about {exercise.minutes} minutes, before its cell"
        if not same_code(stub, exercise.stub):
            yield f"the stub of {name} is not that of the package"
        after = cells[i + 1].source
        block = re.search(r"```python\n(.*?)```", after, re.DOTALL)
        if not after.startswith(SOLUTION) or not block:
            yield f"no folded solution in the cell after {name}: it begins with {SOLUTION}, and has a block of python"
        elif not any(same_code(block[1], text) for text in (exercise.answer, exercise.written(), exercise.solution)):
            yield f"the solution of {name} is not that of the package"


def given_away(notebook, saved) -> Iterator[str]:
    """In the saved notebook no solution can be seen, neither in the text nor below a cell."""
    text = course_hours.without_folded("\n".join(c.source for c in saved if c.cell_type == "markdown"))
    for name in notebook.exercises:
        if textwrap.indent(EXERCISES[name].solution, "    ") in text or EXERCISES[name].solution in text:
            yield f"the solution of {name} is in the text, not folded"
    for cell in saved:
        if "exercise" in cell.metadata.get("tags", []):
            shown = "".join(output.get("text", "") + str(output.get("data", "")) for output in cell.outputs)
            if "is not written yet" not in shown or "This is how minisd does it" in shown:
                yield f"the output below an exercise is not that of its stub: {shown[:80]!r}"


def same_code(one: str, other: str) -> bool:
    """Whether two pieces of code say the same, comments and docstrings included, however their lines are broken."""

    def of(text: str) -> tuple:
        text = textwrap.dedent(text).strip() + "\n"
        try:
            tree = ast.parse(text)
        except SyntaxError:  # a body that ends in `return`
            text = "def body():\n" + textwrap.indent(text, "    ")
            tree = ast.parse(text)
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                node.value = inspect.cleandoc(node.value)
        found = tokenize.generate_tokens(io.StringIO(text).readline)
        return ast.dump(tree), [token.string for token in found if token.type == tokenize.COMMENT]

    return of(one) == of(other)


@pytest.mark.parametrize(
    ("address", "kinds"),
    [
        ("", ["markdown"]),
        ("https://github.com/a/minisd", ["markdown", "code"]),
        ("https://codeberg.org/a/minisd", ["code"]),
    ],
)
def test_the_cells_for_colab_come_from_one_address(tmp_path, address, kinds):
    source = tmp_path / "00_a.py"
    cells = ["# %% [markdown]\n# # Title\n\n", '# %% tags=["parameters"]\nMODE = "full"\n\n', "# %%\nMODE\n"]
    source.write_text("".join(cells), "utf-8")
    first = jupytext.read(source)
    first.cells[2].outputs = [nbformat.v4.new_output("stream", text="full")]
    nbformat.write(first, source.with_suffix(".ipynb"))
    for _ in range(2):  # the second time, they are replaced
        colab.put_into(source, "https://github.com/b/other")
        colab.put_into(source, address)
    ours, saved = jupytext.read(source).cells, nbformat.read(source.with_suffix(".ipynb"), as_version=4).cells
    for found in (ours, saved):
        assert [(cell.cell_type, cell.source) for cell in found[1:-2]] == colab.cells_of("00_a", address)
        assert [cell.cell_type for cell in found] == ["markdown", *kinds, "code", "code"]
        assert found[0].source == "# Title" and found[-1].source == "MODE"
    assert saved[-1].outputs == first.cells[2].outputs
    for cell in saved:
        if cell.cell_type == "code":
            exec(cell.source, {"MODE": ""})  # here, which is not Colab, it does nothing
            assert address in cell.source or cell in saved[-2:]
    if "github" in address:
        assert "colab.research.google.com/github/a/minisd/blob/main/notebooks/00_a.ipynb" in saved[1].source


def test_code_that_differs_is_told_from_code_that_is_broken_elsewhere():
    stub = EXERCISES["q_sample"].stub
    assert same_code(stub, stub.replace("(\n    x_0", "(x_0").replace("        x_t", "    x_t"))
    assert same_code("return x", "    return x\n")
    assert not same_code(stub, stub.replace("N(0, I)", "N(0, 1)")), "the docstring"
    assert not same_code(stub, stub.replace("# your code here", "# here")), "a comment"
    assert not same_code("return x", "return y")
