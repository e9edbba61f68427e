"""Every notebook runs, and the figures that are read on GitHub came from the source that stands beside them.

A notebook is two files: NN_name.py, the source (jupytext's py:percent: readable diffs, an editor's tools), and
NN_name.ipynb, the same cells with their figures. One cell near the top, tagged `parameters`, sets MODE. The test adds
MODE = "smoke" after it: every line runs, on so little that the figures mean nothing. The .ipynb is made in full by

    python tests/test_notebooks.py notebooks/01_noising.py
"""

import base64
import difflib
import hashlib
import io
import sys
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
TIMEOUT = 120  # seconds that one cell may take in smoke mode

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def run(notebook, timeout: int | None) -> None:
    """Execute the cells in a process of their own, in the folder where a reader opens them."""
    NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=timeout,
        record_timing=False,
        resources={"metadata": {"path": str(NOTEBOOKS)}},
    ).execute()


def make(source: Path) -> None:
    """Run a notebook in full, and write the .ipynb when the last cell is through."""
    notebook = jupytext.read(source)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # not drawn at random, so that a second run changes what changed and no more
    run(notebook, timeout=None)
    shrink(notebook)
    notebook.metadata["made_from"] = code_hash(notebook)
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def shrink(notebook) -> None:
    """Give each figure a palette of 256 colours: less than half the size, and no difference to the eye."""
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            data = output.get("data", {})
            if "image/png" in data:
                small = io.BytesIO()
                picture = Image.open(io.BytesIO(base64.b64decode(data["image/png"])))
                picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
                data["image/png"] = base64.b64encode(small.getvalue()).decode()


def how_to_make(source: Path) -> str:
    return f"Make it anew: python tests/test_notebooks.py notebooks/{source.name}"


def code_hash(notebook) -> str:
    code = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    return hashlib.sha256("\0".join(code).encode()).hexdigest()


def as_lines(notebook) -> list[str]:
    """All cells as one text, each under a line that says what it is."""
    lines = []
    for cell in notebook.cells:
        lines += [" ".join([f"# %% [{cell.cell_type}]", *cell.metadata.get("tags", [])]), *cell.source.splitlines()]
    return lines


def test_there_are_notebooks():
    """The tests below run once a notebook: with none found, they would pass by not being there."""
    assert SOURCES
    assert [path.stem for path in SOURCES] == [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]


@each_notebook
def test_both_files_hold_the_same_cells(source):
    pair = source.with_suffix(".ipynb")
    assert pair.exists(), f"{pair.name} is missing. {how_to_make(source)}"
    notebook = nbformat.read(pair, as_version=4)
    difference = difflib.unified_diff(
        as_lines(notebook), as_lines(jupytext.read(source)), pair.name, source.name, lineterm=""
    )
    if difference := "\n".join(difference):
        pytest.fail(f"{pair.name} was made from another source. {how_to_make(source)}\n{difference}", pytrace=False)
    # `jupytext --sync` and `--update` bring new code in and keep the old figure under it.
    same = notebook.metadata.get("made_from") == code_hash(notebook)
    assert same, f"the code of {pair.name} has changed since its figures were drawn. {how_to_make(source)}"


@each_notebook
def test_executed_with_figures_and_without_errors(source):
    notebook = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    errors = [output.evalue for output in outputs if output.output_type == "error"]
    assert not errors, f"ended in an error: {errors}"
    printed = [output.text for output in outputs if output.output_type == "stream" and output.name == "stderr"]
    warnings = [text for text in printed if "Warning" in text]
    assert not warnings, f"a reader would see these warnings: {warnings}"
    kinds = {kind for output in outputs for kind in output.get("data", {})}
    assert any(kind.startswith("image/") for kind in kinds), f"no figure in it, only {sorted(kinds)}"


@each_notebook
def test_runs_in_smoke_mode(source):
    notebook = jupytext.read(source)
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f'{source.name} wants one cell `# %% tags=["parameters"]`, where MODE is set'
    assert "MODE = " in notebook.cells[tagged[0]].source, f"the parameters cell of {source.name} does not set MODE"
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell('MODE = "smoke"'))
    failure = None
    try:
        run(notebook, TIMEOUT)
    except CellExecutionError as error:
        failure = str(error)  # the cell and its traceback; one of ours around them would only bury them
    except CellTimeoutError as error:
        failure = f"a cell took more than {TIMEOUT} s: {error}"
    if failure:
        pytest.fail(f"{source.name} in smoke mode: {failure}", pytrace=False)


if __name__ == "__main__":
    for argument in sys.argv[1:]:
        make(Path(argument))
