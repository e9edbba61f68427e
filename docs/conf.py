"""How the docs are built:   sphinx-build -W docs docs/_build/html"""

import re
import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from code_pages import anchor_lines, to_code_pages, write_code_pages
from diagram_words import with_words
from source_lines import with_lines
from sphinx.search.en import SearchEnglish
from tour_links import to_tour_links, write_tour_texts

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
nb_merge_streams = True  # what a cell prints in several pieces is one text
# What unfolds a cell tagged `hide-input` or `hide-output`. MyST-NB's {type} is "source" or "output": see finish_page.
nb_code_prompt_show = "Show the {type}"
nb_code_prompt_hide = "Hide the {type}"

html_theme = "furo"
html_title = "minisd"
html_static_path = ["_static", "play_pictures"]  # the latter, with the live page, is written below
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
        page = f"notebooks/{name.as_posix()}"
        text = to_tour_links((source / name).read_text("utf-8"), page).replace(out, out + "../")
        text = to_code_pages(text, page)
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        if not copy.exists() or copy.read_text("utf-8") != text:
            copy.write_text(text, "utf-8")


LIVE = ["index", "play"]  # the pages with a live model
LIVE_PAGE = Path(__file__).parents[1] / "minisd" / "live" / "index.html"

copy_notebooks()
write_code_pages()
# A process of its own, so that torch is gone from memory when Sphinx sets to work.
subprocess.run([sys.executable, Path(__file__).parent / "draw_play.py"], check=True)
write_tour_texts(Path(__file__).parent / "play_pictures" / "live")  # with links to these pages


def lead_to_code(app, page, source):
    if "/" not in page:  # a page of docs/
        text = to_code_pages(to_tour_links(source[0], page), page)
        source[0] = with_lines(text, named=page == "compvis")


def add_live_page(app, page, template, context, doctree):
    """The scripts and styles that minisd/live/index.html names, for the pages that hold a live model."""
    if page in LIVE:
        names = re.findall(r'(?:src|href)="(\w+\.(?:js|css))"', LIVE_PAGE.read_text("utf-8"))
        for name in names:
            (app.add_js_file if name.endswith(".js") else app.add_css_file)(f"live/{name}")


def finish_page(app, page, template, context, doctree):
    """In the HTML of a page: names that can break, figures that have words and open at their full size, and what folds.
    """
    body = re.sub(r"<td>.*?</td>", let_names_break, context.get("body", ""), flags=re.DOTALL)
    # MyST-NB takes the name of the file, a checksum, for what stands in it.
    body = re.sub(r'alt="[./]*_images/\w+\.\w+"', 'alt="What the code above draws"', body)
    figure = r'(<a [^>]*>)?<img [^>]*src="([./]*_images/[^"]+)"[^>]*>'  # Sphinx links those that it has made smaller
    body = re.sub(r"(?<=>)(Show|Hide) the source(?=</p>)", r"\1 the code", body)
    context["body"] = re.sub(figure, lambda m: m[0] if m[1] else f'<a class="figure" href="{m[2]}">{m[0]}</a>', body)


def describe_diagrams(app, page, template, context, doctree):
    files = {name: Path(app.srcdir, source) for source, name in app.builder.images.items()}
    context["body"] = with_words(context.get("body", ""), files)


def let_names_break(cell: re.Match) -> str:
    """In a narrow column a name breaks behind a dot, a slash, an underscore or before a capital, and nowhere else."""
    names = r'(?<=<span class="pre">)[^<]*'
    return re.sub(names, lambda name: re.sub(r"([._/](?=\w)|[a-z](?=[A-Z]))", r"\1<wbr>", name[0]), cell[0])


class Search(SearchEnglish):
    """Finds Chinese words, too. Sphinx takes all that stands between two signs for one word, "噪声调度" as a whole, and
    looks for parts of a word from three letters on; so each two characters that stand together are put in the index."""

    def split(self, text: str) -> list[str]:
        runs = re.findall(r"[\u4e00-\u9fff]{3,}", text)
        return super().split(text) + [run[i : i + 2] for run in runs for i in range(len(run) - 1)]


def setup(app):
    app.add_search_language(Search)  # in the place of Sphinx's own for English
    app.connect("source-read", lead_to_code)
    app.connect("doctree-read", anchor_lines)
    app.connect("html-page-context", add_live_page)
    app.connect("html-page-context", finish_page)
    app.connect("html-page-context", describe_diagrams)
