"""The modules as pages, docs/code/minisd/noising.md: written as the docs are built, so that a link to one opens it.

On GitHub a link to `../minisd/noising.py` shows the file. Sphinx would offer it as a download instead.
"""

import ast
import os
import re
from pathlib import Path

DOCS = Path(__file__).parent
ROOT = DOCS.parent
STAGES = "noising loss unet attention vae vq clip sampling latent_diffusion".split()
LINK = re.compile(r"\]\((?:\.\./)+((?:minisd|tests|benchmarks)/[\w/]+)\.py\)")


def to_code_pages(text: str, page: str) -> str:
    """The text of a page ("unet", "notebooks/03_unet") whose links to files of Python lead to their pages."""
    return LINK.sub(lambda match: f"]({'../' * page.count('/')}code/{match[1]}.md)", text)


def linked_files() -> set[Path]:
    """The files of Python that pages and notebooks link to."""
    pages = [*DOCS.glob("*.md"), *(ROOT / "notebooks").rglob("*.ipynb")]
    return {ROOT / f"{name}.py" for page in pages for name in LINK.findall(page.read_text("utf-8"))}


def write_code_pages() -> None:
    """A page for each module of minisd, and one that lists them. (The exercises have none: it would show solutions.)"""
    modules = list((ROOT / "minisd").rglob("*.py"))
    pages = {file.relative_to(ROOT).with_suffix("").as_posix(): file for file in {*modules, *linked_files()}}
    for old in (DOCS / "code").rglob("*.md"):
        if old.relative_to(DOCS / "code").with_suffix("").as_posix() not in {*pages, "index"}:
            old.unlink()
    for name, file in pages.items():
        source = os.path.relpath(file, (DOCS / "code" / name).parent)
        head = f"---\norphan: true\nnosearch: true\n---\n\n# `{name}.py`\n"
        write(name, f"{head}\n```{{literalinclude}} {source}\n:language: python\n:linenos:\n```\n")

    stages = [f"minisd/{stage}" for stage in STAGES]
    rest = sorted(name for name in pages if name.startswith("minisd/") and name not in stages)
    rows = "".join(row(name, pages[name]) for name in [*stages, *rest])
    intro = "Every module, as these pages were built from it: first the stages, in the order in which to read them."
    write("index", f"# The code\n\n{intro}\n\n| module | lines | |\n|---|---|---|\n{rows}")


def row(name: str, file: Path) -> str:
    text = file.read_text("utf-8")
    said = (ast.get_docstring(ast.parse(text)) or "").partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")
    return f"| [`{name}.py`]({name}.md) | {text.count(chr(10))} | {said} |\n"


def write(name: str, text: str) -> None:
    """What is already right is left alone, so that the next build reads only what changed."""
    file = DOCS / "code" / f"{name}.md"
    if not file.exists() or file.read_text("utf-8") != text:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, "utf-8")


def anchor_lines(app, doctree) -> None:
    """Line 42 of a code page can be linked to: #L-42."""
    if app.env.docname.startswith("code/"):
        for block in doctree.findall(lambda node: node.tagname == "literal_block"):
            block.setdefault("highlight_args", {}).update(lineanchors="L", anchorlinenos=True)
