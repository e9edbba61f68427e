"""Where a name of minisd stands, "minisd.unet.UNetModel" → "unet.py:145": found when the pages are built."""

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


def where(name: str) -> str | None:
    """File and line of a full name, in whose middle stands its module; None where there is no such module or name."""
    parts = name.split(".")[1:]
    for i in range(len(parts) - 1, 0, -1):
        module = PACKAGE.joinpath(*parts[:i])
        for file in (module.with_suffix(".py"), module / "__init__.py"):
            if file.is_file() and (line := definitions(file).get(".".join(parts[i:]))):
                return f"{file.relative_to(PACKAGE).as_posix()}:{line}"
    return None


def with_lines(text: str) -> str:
    """A page in which each `minisd.unet.UNetModel` has become `UNetModel` (`unet.py:145`)."""

    def place(match: re.Match) -> str:
        found = where(match[1])
        if not found:
            return match[0]
        file = found.split(":")[0].removesuffix(".py").removesuffix("/__init__")
        short = match[1].removeprefix(f"minisd.{file.replace('/', '.')}.")
        return f"`{short}` (`{found}`)"

    return re.sub(r"`(minisd(?:\.\w+)+)`", place, text)
