"""What is installed: conda's environment.yml says what pyproject.toml says, and torchvision stays out."""

import importlib.util
import re
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]

CONDA = yaml.safe_load((ROOT / "environment.yml").read_text("utf-8"))
CONDA_LINES = [line for line in CONDA["dependencies"] if isinstance(line, str)]
# Where conda-forge calls a package otherwise than PyPI.
CONDA_NAMES = {"torch": "pytorch", "huggingface-hub": "huggingface_hub"}

# A line of it: a name, then ranges as pip writes them. (conda's own language, MatchSpec, allows more.)
LINE = re.compile(r"(?P<name>[a-z0-9._-]+)( (?P<ranges>(([<>]=?|[=!]=)[0-9.]+,?)+(?<!,)))?")


def conda_ranges() -> dict[str, SpecifierSet]:
    ranges = {}
    for line in CONDA_LINES:
        match = LINE.fullmatch(line)
        assert match, f"environment.yml: `{line}` is not of the form `name >=1.0,<2.0`"
        ranges[match["name"]] = SpecifierSet(match["ranges"] or "")
    return ranges


def test_conda_has_the_ranges_of_pyproject():
    wanted = {"python": SpecifierSet(PROJECT["requires-python"]), "pip": SpecifierSet()}
    for requirement in map(Requirement, PROJECT["dependencies"] + EXTRAS["notebooks"]):
        wanted[CONDA_NAMES.get(requirement.name, requirement.name)] = requirement.specifier
    assert conda_ranges() == wanted


def test_conda_can_read_each_line():
    conda_ranges()
    if importlib.util.find_spec("rattler"):  # py-rattler: conda's own parser, 80 MB, so only where it is already
        import rattler

        for line in CONDA_LINES:
            rattler.MatchSpec(line, strict=True)


def test_the_last_step_of_conda_installs_minisd():
    assert CONDA["channels"][0] == "conda-forge"
    (step,) = CONDA["dependencies"][-1]["pip"]
    extras = re.fullmatch(r"-e \.\[([a-z,]+)\]", step)
    assert extras, f"`{step}` does not install this folder"
    assert set(extras[1].split(",")) <= EXTRAS.keys()


def installed_requirements(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:  # of an extra that is not installed here, as [docs] while the tests run
        return []


def test_nothing_brings_torchvision():
    """torchvision comes in the CUDA build, and beside a CPU torch it breaks the import of transformers' CLIP and of
    diffusers (`operator torchvision::nms does not exist`). Nobody here needs it: find who asks for it.
    """
    todo = [(Requirement(line), ["minisd"]) for line in PROJECT["dependencies"] + sum(EXTRAS.values(), [])]
    seen = set()
    while todo:
        requirement, askers = todo.pop()
        assert requirement.name != "torchvision", f"torchvision comes in by {' → '.join(askers)}"
        for extra in {"", *requirement.extras} - {extra for name, extra in seen if name == requirement.name}:
            seen.add((requirement.name, extra))
            for line in installed_requirements(requirement.name):
                below = Requirement(line)
                if below.marker is None or below.marker.evaluate({"extra": extra}):
                    todo.append((below, [*askers, requirement.name]))
    assert len(seen) > 20, "the walk stopped early"
    assert importlib.util.find_spec("torchvision") is None, "torchvision is installed: pip uninstall torchvision"
