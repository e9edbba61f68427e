"""The rules of the house: what `import minisd` may cost, who may import whom, and how large the tree may grow."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "minisd"

# Who stands on whom. A module imports what is named here and what stands under that in turn: downwards only, so
# that each can be read, copied or taught without what is above it.
STANDS_ON = {
    "attention": [],
    "compare": [],  # takes any two networks
    "noising": [],
    "data": [],
    "viz": [],  # takes tensors and trajectories, never a model
    "unet": ["attention"],
    "vae": ["attention"],
    "vq": ["vae"],
    "clip": ["attention"],
    "sampling": ["noising"],
    "loss": ["noising"],
    "drawing": ["sampling", "viz"],
    "latent_diffusion": ["unet", "vae", "vq", "clip", "sampling", "loss", "drawing"],
    "attention_maps": ["latent_diffusion"],
    "trace": ["latent_diffusion"],
    "checkpoint": ["latent_diffusion"],
    "evaluation": ["checkpoint", "data", "viz"],
    "training": ["checkpoint", "data", "viz"],
    "__init__": ["training", "evaluation", "trace", "attention_maps", "compare"],  # `import minisd` as a whole
    "coursework": [],  # another name of minisd_coursework
    "cli": ["__init__"],
    "__main__": ["cli"],
}
# The stages, and all that they need before anything is called. (Inside a function they may import more.)
STAGES = ["attention", "noising", "unet", "vae", "vq", "clip", "sampling", "loss", "latent_diffusion"]
STAGE_NEEDS = {"torch", "numpy", "einops", "jaxtyping"} | sys.stdlib_module_names
STAGE_NEEDS_TOO = {"latent_diffusion": {"PIL"}}  # its drawings are PIL images

# Seconds each to import: they wait until somebody needs them.
SLOW = {"transformers", "matplotlib", "accelerate", "tensorboard", "diffusers", "datasets", "torchmetrics"}


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
    assert megabytes(weights) <= 32
    assert megabytes(tree()) <= 48


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
