"""The rules of the house: what `import minisd` may cost, who may import whom, and how large the tree may grow."""

import ast
import io
import re
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minisd"
COURSEWORK = ROOT / "coursework" / "minisd_coursework"
# Lines of code that one person can hold in the head: blank lines, comments and docstrings do not count.
# The aim for the package is 8,100, with everything that is still planned: lower its number whenever a line goes.
MOST_LINES = {PACKAGE: 8_399, COURSEWORK: 3_000}
# Comment lines for each line in the body of a function. A stage is read by students, line by line.
LEAST_COMMENTS = 0.12

# Who may import whom. A module imports what is named here and what those import in turn: downwards only, so
# that each can be read, copied or taught without what is above it.
STANDS_ON = {
    "attention": [],
    "noising": [],
    "data": ["pictures"],
    "pictures": [],
    "viz": ["pictures"],  # takes tensors and trajectories, never a model
    "unet": ["attention"],
    "vae": ["attention", "noising"],  # the noise of a sample is drawn as all noise is, by noising.randn
    "vq": ["vae"],
    "tokenizer": [],
    "clip": ["attention", "tokenizer"],
    "sampling": ["noising"],
    "loss": ["noising"],
    "conditions": ["clip"],
    "latent_diffusion": ["unet", "vae", "vq", "clip", "sampling", "loss", "pictures", "conditions"],
    "presets": ["latent_diffusion"],
    "flow": ["loss"],
    "editing": ["latent_diffusion"],
    "lora": ["checkpoint"],  # the names and files of other layouts
    "instruments": ["checkpoint"],  # verify reads a file of weights
    "checkpoint": ["presets"],
    "evaluation": ["checkpoint", "data", "viz"],
    "training": ["lora", "data", "viz"],
    "__init__": ["training", "evaluation", "instruments", "flow", "editing"],  # `import minisd` as a whole
    "live": ["instruments"],  # the page in JavaScript: its one module copies files, and records drawings
    "coursework": [],  # another name of minisd_coursework
    "cli": ["__init__", "live"],
    "__main__": ["cli"],
}
# The stages, and all that they need before anything is called. (Inside a function they may import more.)
STAGES = [
    "attention", "noising", "unet", "vae", "vq", "tokenizer", "clip", "sampling", "loss", "latent_diffusion", "editing",
    "lora", "flow",
]  # fmt: skip
STAGE_NEEDS = {"torch", "numpy", "einops", "jaxtyping"} | sys.stdlib_module_names
STAGE_NEEDS_TOO = {"latent_diffusion": {"PIL"}, "lora": {"safetensors"}}  # its drawings are PIL images; its files

# Seconds each to import: they wait until somebody needs them.
SLOW = {"transformers", "matplotlib", "accelerate", "diffusers", "datasets", "torchmetrics"}


@cache
def may_import(module: str) -> set[str]:
    return {module}.union(*(may_import(below) for below in STANDS_ON[module]))


def imports(file: Path, inside_functions: bool) -> set[str]:
    """Absolute names of the modules that a file imports, `minisd.unet` or `torch.nn`; those of annotations left out."""
    found = set()

    def visit(node):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = file.relative_to(ROOT).parts[: -node.level] if node.level else ()
            base = ".".join([*package, *([node.module] if node.module else [])])
            # `from minisd import unet` names a module behind the import, `from torch import Tensor` need not be read so
            found.update(f"{base}.{alias.name}" if base == "minisd" else base for alias in node.names)
        elif isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) and not inside_functions:
            return
        for child in ast.iter_child_nodes(node):
            visit(child)

    visit(ast.parse(file.read_text("utf-8")))
    return found


def own_files() -> list[Path]:
    return [file for file in sorted(PACKAGE.rglob("*.py")) if file != PACKAGE / "__init__.py"]


def module_of(file: Path) -> str:
    """`unet` for minisd/unet.py, `training` for all of minisd/training/."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


@pytest.mark.parametrize("file", own_files(), ids=lambda file: str(file.relative_to(PACKAGE)))
def test_imports_go_downwards(file):
    module = module_of(file)
    assert module in STANDS_ON, f"a new module: say in this test's table what {module} stands on"

    own = {name for name in imports(file, inside_functions=True) if name.split(".")[0] == "minisd"}
    own = {name.split(".")[1] if name.count(".") and name.split(".")[1] in STANDS_ON else "__init__" for name in own}
    upwards = own - may_import(module)
    assert not upwards, f"{module} reaches up to, or across to, {sorted(upwards)}; it stands on {STANDS_ON[module]}"

    if module in STAGES:
        outside = {name.split(".")[0] for name in imports(file, inside_functions=False)} - {"minisd"}
        others = outside - STAGE_NEEDS - STAGE_NEEDS_TOO.get(module, set())
        assert not others, f"the stage {module} imports {sorted(others)} before anybody asks for it"


def test_no_file_imports_itself_by_way_of_others():
    """Inside functions neither: what needs that is in the wrong file."""
    roots = [(ROOT, PACKAGE), (ROOT / "coursework", ROOT / "coursework/minisd_coursework")]
    files = {
        ".".join(file.relative_to(root).with_suffix("").parts): file
        for root, package in roots
        for file in sorted(package.rglob("*.py"))
        if file.name != "__init__.py"
    }
    below = {name: {below for below in imported_files(name, file) if below in files} for name, file in files.items()}
    knows_exercises = [name for name in below if name.startswith("minisd.") and "minisd_coursework" in str(below[name])]
    assert knows_exercises == ["minisd.coursework"]

    def reached(name: str) -> set[str]:
        found, left = set(), list(below[name])
        while left:
            other = left.pop()
            if other not in found:
                found.add(other)
                left += below[other]
        return found

    assert not [name for name in files if name in reached(name)]


def imported_files(name: str, file: Path) -> set[str]:
    """`minisd.unet` for `from minisd import unet`, for `from .unet import UNetModel` and for `import minisd.unet`."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".")[: -node.level] if node.level else []
            base = ".".join([*package, *([node.module] if node.module else [])])
            found |= {base} | {f"{base}.{alias.name}" for alias in node.names}
    return found


def lines_of(file: Path) -> tuple[set[int], set[int], int]:
    """Lines of code, those of them in the body of a function, and how many comments stand in such bodies."""
    text = file.read_text("utf-8")
    docstrings, bodies = set(), set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body:
            first = node.body[0]
            if isinstance(first, ast.Expr) and isinstance(getattr(first.value, "value", None), str):
                docstrings |= set(range(first.lineno, first.end_lineno + 1))
            if isinstance(node, ast.FunctionDef):
                bodies |= set(range(first.lineno, node.end_lineno + 1))
    lines = enumerate(text.splitlines(), 1)
    code = {i for i, line in lines if line.strip() and not line.strip().startswith("#") and i not in docstrings}
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    comments = [t for t in tokens if t.type == tokenize.COMMENT and t.start[0] in bodies and "fmt:" not in t.string]
    return code, code & bodies, len(comments)


@pytest.mark.parametrize("package", MOST_LINES, ids=lambda package: package.name)
def test_the_code_keeps_to_its_budget(package):
    assert sum(len(lines_of(file)[0]) for file in package.rglob("*.py")) <= MOST_LINES[package]


@pytest.mark.parametrize("part", [*STAGES, "training"])
def test_the_code_is_commented(part):
    files = [PACKAGE / f"{part}.py"] if part in STAGES else sorted((PACKAGE / part).glob("*.py"))
    counted = [lines_of(file) for file in files]
    bodies, comments = sum(len(body) for _, body, _ in counted), sum(count for *_, count in counted)
    assert comments >= LEAST_COMMENTS * bodies


def test_no_module_has_the_name_of_a_public_function():
    """Else `minisd.trace` would be a module or a function, depending on what was imported last."""
    import minisd

    functions = {name for name in minisd.__all__ if not isinstance(getattr(minisd, name), type | type(sys))}
    assert functions >= {"trace", "compare", "record_attention", "load"}
    modules = {file.stem if file.stem != "__init__" else file.parent.name for file in own_files()}
    assert not functions & modules


def test_import_is_about_as_quick_as_torch():
    code = "import sys, minisd; print(*sorted({name.split('.')[0] for name in sys.modules}))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "torch" in run.stdout.split()
    assert not SLOW & set(run.stdout.split()), "import it inside the function that uses it"


@cache
def tree() -> list[Path]:
    """The files that git tracks, and those that it would track next."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"not a git checkout, or no git: {error}")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def megabytes(files) -> float:
    return sum(file.stat().st_size for file in files) / 1e6


def test_what_ships_stays_small():
    weights = [file for file in PACKAGE.rglob("*") if file.suffix in {".safetensors", ".pt", ".ckpt", ".bin"}]
    assert megabytes(weights) <= 36
    assert megabytes(tree()) <= 56


def test_no_file_names_a_place_on_somebodys_machine():
    """As a traceback or a warning in a notebook's output does."""
    somewhere = re.compile(rf"(?<!\w)/(?:home|Users|root)/|[/]site-packages/|{re.escape(str(ROOT))}/")
    texts = {".py", ".md", ".ipynb", ".toml", ".yml", ".yaml", ".json", ".jsonl", ".txt", ".csv", ".sh", ""}
    found = [
        f"{file.relative_to(ROOT)}:{number}: {match[0]}"
        for file in tree()
        if file.suffix in texts
        for number, line in enumerate(file.read_text("utf-8", errors="ignore").splitlines(), 1)
        if (match := somewhere.search(line))
    ]
    assert not found, "\n".join(found)
