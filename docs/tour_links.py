"""Links to the stops of the guided tour, and from the tour to the lines of the code, made as the docs are built."""

import json
import re
from pathlib import Path

from source_lines import PACKAGE, where

LINK = re.compile(r"\[([^\[\]]+)\]\((?:\.\./)*(?:docs/)?play\.md(#tour=\w+)\)")


def to_tour_links(text: str, page: str) -> str:
    """The text of a page ("index", "notebooks/03_unet.ipynb") whose links to `play.md#tour=unet` open that stop.

    As Markdown, Sphinx would look for a heading of that name. (Single quotes, because notebooks are JSON.)
    """
    up = "../" * page.count("/")
    return LINK.sub(lambda match: f"<a href='{up}play.html{match[2]}'>{match[1]}</a>", text)


def tour_texts() -> dict:
    """tour.json, with the way from the page `play` to the docs, and the line of each stop's code, for each sampler."""
    texts = json.loads((PACKAGE / "live" / "tour.json").read_text("utf-8"))
    rules = [rule for stop in texts["stops"] for rule in (stop, *stop.get("by_sampler", {}).values())]
    for code in (rule["code"] for rule in rules if "code" in rule):
        file, start = where(code["name"]).split(":")
        lines = (PACKAGE / file).read_text("utf-8").splitlines()
        number = next(i for i in range(int(start), len(lines)) if lines[i].split("  #")[0].strip() == code["line"]) + 1
        code["page"] = f"code/minisd/{file.removesuffix('.py')}.html#L-{number}"
    return texts | {"docs": ""}


def write_tour_texts(folder: Path) -> None:
    """A script, because a page that was opened as a file may not fetch JSON."""
    texts = json.dumps(tour_texts(), ensure_ascii=False)
    (folder / "tour_texts.js").write_text(f"globalThis.minisdTour = {texts};\n", "utf-8")
