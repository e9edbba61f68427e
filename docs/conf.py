"""How the docs are built:   sphinx-build -W docs docs/_build/html"""

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from source_lines import with_lines

project = "minisd"
author = "minisd contributors"
copyright = "2026, minisd contributors"

extensions = ["myst_nb", "sphinx.ext.mathjax", "sphinx-mathjax-offline", "sphinx_copybutton"]
exclude_patterns = ["_build"]

myst_enable_extensions = ["dollarmath", "amsmath", "colon_fence"]
myst_heading_anchors = 3  # so that a link may say page.md#a-heading

# The notebooks are shown as they were run. Running them is the business of tests/test_notebooks.py.
nb_execution_mode = "off"
nb_output_stderr = "remove"  # progress bars

html_theme = "furo"
html_title = "minisd"
html_static_path = ["_static", "play_pictures"]  # the latter is drawn below
html_css_files = ["site.css"]
copybutton_exclude = ".linenos, .gp, .go"  # copy the command, not the prompt before it


def copy_notebooks() -> None:
    """Sphinx reads only what lies beside this file, and the notebooks lie one folder up: copy them in.

    A link that leaves their folder (`../minisd/unet.py`) works on GitHub; one folder deeper it takes one `../` more.
    A copy that is already right is left alone, so that the next build reads only what changed.
    """
    here = Path(__file__).parent
    source, target = here.parent / "notebooks", here / "notebooks"
    names = {path.relative_to(source) for path in source.rglob("*.ipynb") if ".ipynb_checkpoints" not in path.parts}
    for stale in {path.relative_to(target) for path in target.rglob("*.ipynb")} - names:
        (target / stale).unlink()
    for name in names:
        out = "](" + "../" * len(name.parts)
        text = (source / name).read_text("utf-8").replace(out, out + "../")
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text("utf-8") != text:
            copy.write_text(text, "utf-8")


copy_notebooks()
# A process of its own, so that torch is gone from memory when Sphinx sets to work.
subprocess.run([sys.executable, Path(__file__).parent / "draw_play.py"], check=True)


def setup(app):
    def add_lines(app, page, source):
        if page == "compvis":
            source[0] = with_lines(source[0])

    app.connect("source-read", add_lines)
