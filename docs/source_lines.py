"""Where a name of minisd stands, "minisd.unet.UNetModel" → "unet.py:145": found and linked to as the docs are built."""

import ast
import re
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "minisd"


@cache
def definitions(file: Path) -> dict[str, int]:
    """Classes, functions, methods and fields of a file by their names, "UNetConfig.heads", and the lines of them."""
    found = {}

    def visit(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, ast.ClassDef | ast.FunctionDef):
                found[prefix + node.name] = node.lineno
                if isinstance(node, ast.ClassDef):
                    visit(node.body, f"{prefix}{node.name}.")
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                for target in [node.target] if isinstance(node, ast.AnnAssign) else node.targets:
                    if isinstance(target, ast.Name):
                        found[prefix + target.id] = node.lineno

    visit(ast.parse(file.read_text("utf-8")).body, "")
    return found


@cache
def imports(package: Path) -> dict[str, str]:
    """What an __init__.py takes from its modules: {"UNetModel": "unet.UNetModel"}."""
    nodes = [node for node in ast.parse(package.read_text("utf-8")).body if isinstance(node, ast.ImportFrom)]
    return {alias.name: f"{node.module}.{alias.name}" for node in nodes if node.module for alias in node.names}


def where(name: str) -> str | None:
    """File and line of a full name, in whose middle stands its module; None where there is no such module or name."""
    parts = name.split(".")[1:]
    for i in range(len(parts) - 1, -1, -1):
        module = PACKAGE.joinpath(*parts[:i])
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if not file.is_file():
                continue
            if line := definitions(file).get(".".join(parts[i:])):
                return f"{file.relative_to(PACKAGE).as_posix()}:{line}"
            if file.name == "__init__.py" and (there := imports(file).get(parts[i])):
                return where(".".join(["minisd", *parts[:i], there, *parts[i + 1 :]]))
    return None


def with_lines(text: str, named: bool = False) -> str:
    """A page in which each `minisd.unet.UNetModel` leads to its line; if `named`, as `UNetModel` (`unet.py:145`)."""

    def place(match: re.Match) -> str:
        found = where(match[1])
        if not found:
            return match[0]
        file, line = found.replace(".py", "").split(":")
        href = f"code/minisd/{file}.html#L-{line}"
        if not named:
            return link(href, match[1])
        short = match[1].removeprefix(f"minisd.{file.removesuffix('/__init__').replace('/', '.')}.")
        return f"`{short}` ({link(href, found)})"

    # Not in a heading, and not in the text of another link.
    lines = text.split("\n")
    return "\n".join(s if s.startswith("#") else re.sub(r"(?<!\[)`(minisd(?:\.\w+)+)`", place, s) for s in lines)


def link(href: str, code: str) -> str:
    """As Sphinx writes it. In Markdown it would look for a heading that is called L-145, and set __init__ in bold."""
    code = code.replace("__", "&#95;&#95;")
    literal = f'<code class="docutils literal notranslate"><span class="pre">{code}</span></code>'
    return f'<a class="reference internal" href="{href}">{literal}</a>'
