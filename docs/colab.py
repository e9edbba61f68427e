"""The cells by which the notebooks run in Colab:   python docs/colab.py

They stand after the title of each notebook, and are made here from one line of pyproject.toml, the address of the
project, `repository` under [tool.minisd]. With an address, they lead to Colab and install minisd there. As long as it
is empty, they explain how to upload minisd. Run this script again when the line has changed; tests/test_course.py holds
the notebooks to it.
"""

import re
import tomllib
from pathlib import Path

import nbformat

ROOT = Path(__file__).parents[1]
TAG = "colab"

UPLOAD = """\
<details><summary>To run this notebook in Colab</summary>

Upload the folder of minisd as `upload.zip`, and run this in a new cell above
([more about it](../docs/install.md#colab-and-other-notebooks-in-the-cloud)):

```text
!unzip -q upload.zip && pip install -q "./minisd[data]"
%cd minisd/notebooks
```

</details>"""

INSTALL = """\
# In Colab, this installs minisd. Anywhere else it does nothing.
import sys

if "google.colab" in sys.modules:
    get_ipython().system("git clone -q --depth 1 {address} /content/minisd")
    get_ipython().system('pip install -q "/content/minisd[data]"')
    get_ipython().run_line_magic("cd", "/content/minisd/notebooks")"""


def address() -> str:
    """That of the project; "" if it is not set.

    Raises:
        ValueError: it is no address.
    """
    found = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["minisd"]["repository"]
    if found and not re.fullmatch(r"https://[\w./-]+", found):
        raise ValueError(f"repository in pyproject.toml has to be of the form https://host/owner/name, not {found!r}")
    return found.removesuffix("/").removesuffix(".git")


def cells_of(name: str, address: str) -> list[tuple[str, str]]:
    """For the notebook of that name: (kind, text) of each cell."""
    if not address:
        return [("markdown", UPLOAD)]
    install = ("code", INSTALL.format(address=address))
    if not address.startswith("https://github.com/"):  # Colab opens notebooks from there alone
        return [install]
    place = address.removeprefix("https://")
    opened = (
        f"https://colab.research.google.com/{place.replace('github.com', 'github')}/blob/main/notebooks/{name}.ipynb"
    )
    return [("markdown", f"[Open this notebook in Colab]({opened})"), install]


def put_into(source: Path, address: str) -> None:
    """Write the cells into a notebook, the .py and the .ipynb beside it, in the place of those that are there."""
    cells = cells_of(source.stem, address)

    head, title, *others = re.split(r"^(?=# %%)", source.read_text("utf-8"), flags=re.MULTILINE)
    others = [cell for cell in others if f'"{TAG}"' not in cell.splitlines()[0]]
    made = []
    for kind, text in cells:
        lines = text.splitlines() if kind == "code" else [f"# {line}".rstrip() for line in text.splitlines()]
        mark = "# %% [markdown]" if kind == "markdown" else "# %%"
        made.append("\n".join([f'{mark} tags=["{TAG}"]', *lines, "", ""]))
    source.write_text("".join([head, title, *made, *others]), "utf-8")

    pair = source.with_suffix(".ipynb")
    notebook = nbformat.read(pair, as_version=4)
    new = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    others = [cell for cell in notebook.cells if TAG not in cell.metadata.get("tags", [])]
    made = [new[kind](text, metadata={"tags": [TAG]}) for kind, text in cells]
    notebook.cells = [others[0], *made, *others[1:]]
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    nbformat.write(notebook, pair)


if __name__ == "__main__":
    for source in sorted((ROOT / "notebooks").glob("*.py")):
        put_into(source, address())
