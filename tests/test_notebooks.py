"""Every notebook runs, and the figures that are read on GitHub came from the source that stands beside them.

A notebook is two files: NN_name.py, the source (jupytext's py:percent: readable diffs, an editor's tools), and
NN_name.ipynb, the same cells with their figures. One cell near the top, tagged `parameters`, sets MODE. The test adds
MODE = "smoke" after it: every line runs, on so little that the figures mean nothing. The .ipynb is made in full by

    python tests/test_notebooks.py notebooks/01_noising.py

Where only text and tags have changed, it need not run: `--keep-figures` before the name brings them into the .ipynb.
"""

import base64
import difflib
import hashlib
import importlib
import inspect
import io
import pkgutil
import re
import sys
import textwrap
from pathlib import Path

import jupytext
import nbformat
import pytest
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError
from PIL import Image, ImageChops, ImageOps, ImageStat

from minisd import viz
from minisd.data import sample

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
SOURCES = sorted(NOTEBOOKS.glob("*.py"))
TIMEOUT = 120  # seconds that one cell may take in smoke mode
FOLDED = {"hide-input": "source_hidden", "hide-output": "outputs_hidden"}  # a tag that the site knows -> Jupyter's name

each_notebook = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


def make(source: Path) -> None:
    """Run a notebook in full, in a process of its own, and write the .ipynb when the last cell is through."""
    notebook = read(source)
    folder = {"metadata": {"path": str(NOTEBOOKS)}}
    NotebookClient(notebook, kernel_name="python3", timeout=None, record_timing=False, resources=folder).execute()
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        keep_one_picture(output.get("data", {}))
    notebook.metadata["made_from"] = code_hash(notebook)
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def keep_figures(source: Path) -> None:
    """Write the .ipynb anew, with the outputs that it has. The code has to be that which made them."""
    notebook, before = read(source), nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    if code_hash(notebook) != before.metadata.get("made_from"):
        sys.exit(f"the code of {source.name} has changed. {how_to_make(source)}")
    for cell, old in zip(ran(notebook), ran(before), strict=True):
        cell.outputs, cell.execution_count = old.outputs, old.execution_count
    notebook.metadata = before.metadata
    nbformat.write(notebook, source.with_suffix(".ipynb"))


def read(source: Path):
    """The cells of a .py, as the .ipynb is to have them."""
    notebook = jupytext.read(source)
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"  # not drawn at random, so that a second run changes what changed and no more
        # Jupyter does not read the tags. This metadata makes it fold what the site folds.
        cell.metadata.pop("jupyter", None)
        if folded := {FOLDED[tag]: True for tag in cell.metadata.get("tags", []) if tag in FOLDED}:
            cell.metadata["jupyter"] = folded
    return notebook


def ran(notebook) -> list:
    """The cells whose code makes the figures. The one that installs minisd in Colab is not among them."""
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in code if "colab" not in cell.metadata.get("tags", [])]


def keep_one_picture(data: dict) -> None:
    """Of one picture in several forms, the SVG, or else a PNG that is made lighter."""
    others = ["image/png", "image/jpeg"] if "image/svg+xml" in data else ["image/jpeg"] * ("image/png" in data)
    for other in others:
        data.pop(other, None)  # the same picture again, as PIL and matplotlib offer it
    if figure := data.get("image/png"):
        data["image/png"] = lighter(figure)


def lighter(figure: str) -> str:
    """A PNG, in base64, in 256 colours: less than half the size, and git keeps every version of every figure."""
    image = Image.open(io.BytesIO(base64.b64decode(figure))).convert("RGB")
    file = io.BytesIO()
    image.quantize(256, kmeans=2, dither=Image.Dither.NONE).save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode()


def how_to_make(source: Path) -> str:
    return f"Make it anew: python tests/test_notebooks.py notebooks/{source.name}"


def code_hash(notebook) -> str:
    return hashlib.sha256("\0".join(cell.source for cell in ran(notebook)).encode()).hexdigest()


def as_lines(notebook) -> list[str]:
    """All cells as one text, each under a line that says what it is, and what of it Jupyter folds."""
    lines = []
    for cell in notebook.cells:
        folded = sorted(cell.metadata.get("jupyter", {}).items())
        lines += [" ".join([f"# %% [{cell.cell_type}]", *cell.metadata.get("tags", []), *map(str, folded)])]
        lines += cell.source.splitlines()
    return lines


def test_there_are_notebooks():
    """The tests below run once a notebook: with none found, they would pass by not being there."""
    assert SOURCES
    assert [path.stem for path in SOURCES] == [path.stem for path in sorted(NOTEBOOKS.glob("*.ipynb"))]


def test_figures_are_made_lighter():
    """Colours hardly change; what is white stays white, or a figure would stand in a grey box on the page."""
    page = viz.sheet(viz.to_pil(sample(size=32).batch(range(0, 1200, 100))), columns=6, gap=8, scale=3)
    page = ImageOps.expand(page, 20, "white")
    figure = base64.b64encode(_png(page)).decode()
    light = lighter(figure)
    back = Image.open(io.BytesIO(base64.b64decode(light))).convert("RGB")
    assert len(light) < 0.8 * len(figure)
    assert back.size == page.size and back.getpixel((0, 0)) == back.getpixel((page.width - 1, 0)) == (255, 255, 255)
    assert ImageStat.Stat(ImageChops.difference(page, back)).rms < [4, 4, 4]


def test_a_figure_is_kept_once():
    png = base64.b64encode(_png(Image.new("RGB", (8, 8), "white"))).decode()
    several = {"image/svg+xml": "<svg/>", "image/png": png, "image/jpeg": "", "text/plain": "a figure"}
    keep_one_picture(several)
    assert several == {"image/svg+xml": "<svg/>", "text/plain": "a figure"}
    pictures = {"image/png": png, "image/jpeg": "", "text/plain": "a picture"}
    keep_one_picture(pictures)
    assert pictures == {"image/png": lighter(png), "text/plain": "a picture"}
    text = {"text/plain": "no picture"}
    keep_one_picture(text)
    assert text == {"text/plain": "no picture"}


def test_what_the_site_folds_is_folded_in_jupyter_and_figures_stay_if_only_text_changes(tmp_path):
    source = tmp_path / "a.py"
    cells = [
        '# %% tags=["hide-input"]\nx = 1',
        '# %% tags=["hide-output"] jupyter={"source_hidden": true}\nx = 2',
        "# %%\nx",
    ]
    source.write_text("\n\n".join(cells), "utf-8")
    first = read(source)
    assert [cell.metadata.get("jupyter") for cell in first.cells] == [
        {"source_hidden": True}, {"outputs_hidden": True}, None
    ]  # fmt: skip
    first.cells[2].outputs = [nbformat.v4.new_output("stream", text="2")]
    first.metadata["made_from"] = code_hash(first)
    nbformat.write(first, source.with_suffix(".ipynb"))

    text = ["# %% [markdown]\n# A word.", '# %% tags=["colab"]\nx = 3', *cells]  # the latter makes no figure
    source.write_text("\n\n".join(text), "utf-8")
    keep_figures(source)
    kept = nbformat.read(source.with_suffix(".ipynb"), as_version=4)
    assert as_lines(kept) == as_lines(read(source)) and kept.cells[0].source == "A word."
    assert kept.cells[-1].outputs == first.cells[2].outputs
    assert kept.metadata["made_from"] == code_hash(kept)

    source.write_text("\n\n".join(text[:-1] + ["# %%\nx + 1"]), "utf-8")
    with pytest.raises(SystemExit, match="the code of a.py has changed. Make it anew"):
        keep_figures(source)


def _png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


@each_notebook
def test_both_files_hold_the_same_cells(source):
    pair = source.with_suffix(".ipynb")
    assert pair.exists(), f"{pair.name} is missing. {how_to_make(source)}"
    notebook = nbformat.read(pair, as_version=4)
    difference = difflib.unified_diff(as_lines(notebook), as_lines(read(source)), pair.name, source.name, lineterm="")
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
def test_names_of_minisd_in_the_text_exist(source):
    """Code that goes by an old name fails when it runs; a sentence would go on naming what is not there any more."""
    text = "\n".join(cell.source for cell in jupytext.read(source).cells if cell.cell_type == "markdown")
    for name in set(re.findall(r"`(minisd(?:\.\w+)+)\b", text)):
        pkgutil.resolve_name(name)


def test_every_line_that_the_reading_of_compvis_names_is_there():
    """The tables of notebook 09 set a line of ours beside one of theirs; each is looked up by what is in it."""
    lines = []
    names = {"importlib": importlib, "inspect": inspect, "textwrap": textwrap, "print": lines.append}
    for cell in jupytext.read(NOTEBOOKS / "09_stable_diffusion_v1.py").cells:
        if "reading(" in cell.source:  # the function, then the tables
            exec(cell.source, names)
    assert len(lines) > 2 * 100


@each_notebook
def test_runs_in_smoke_mode(source, run_notebook):
    notebook = jupytext.read(source)
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    assert len(tagged) == 1, f'{source.name} wants one cell `# %% tags=["parameters"]`, where MODE is set'
    assert "MODE = " in notebook.cells[tagged[0]].source, f"the parameters cell of {source.name} does not set MODE"
    notebook.cells.insert(tagged[0] + 1, nbformat.v4.new_code_cell('MODE = "smoke"'))
    failure = None
    try:
        run_notebook(notebook, NOTEBOOKS, TIMEOUT)
    except CellExecutionError as error:
        failure = str(error)  # the cell and its traceback; one of ours around them would only bury them
    except CellTimeoutError as error:
        failure = f"a cell took more than {TIMEOUT} s: {error}"
    if failure:
        pytest.fail(f"{source.name} in smoke mode: {failure}", pytrace=False)


if __name__ == "__main__":
    what = keep_figures if "--keep-figures" in sys.argv else make
    for argument in sys.argv[1:]:
        if argument != "--keep-figures":
            what(Path(argument))
