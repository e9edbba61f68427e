"""The alternative text of the diagrams, made as the docs are built.

A diagram has a <title> and a <desc> inside. But a page shows it by <img>, whose inside no screen reader reads.
"""

import html
import re
from pathlib import Path

IMAGE = re.compile(r'<img alt="[^"]*"(?= src="[./]*_images/([^"]+\.svg)")')


def with_words(body: str, files: dict[str, Path]) -> str:
    """The HTML of a page, in which each SVG with a <title> and a <desc> has them as its alternative text.

    files: where each image of the folder _images comes from.
    """

    def words(image: re.Match) -> str:
        text = files[image[1]].read_text("utf-8") if image[1] in files else ""
        found = [re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL) for tag in ("title", "desc")]
        if not all(found):  # a figure of matplotlib
            return image[0]
        return f'<img alt="{html.escape(". ".join(html.unescape(part[1]) for part in found))}"'

    return IMAGE.sub(words, body)
