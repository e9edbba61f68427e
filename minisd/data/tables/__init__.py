"""What is data rather than code: the emoji sets and their licences, names of icons, the words of the shapes."""

import tomllib
from pathlib import Path


def read_text(name: str) -> str:
    """A text file of this folder."""
    return (Path(__file__).parent / name).read_text(encoding="utf-8")


def read_table(name: str) -> dict:
    """A TOML file of this folder."""
    return tomllib.loads(read_text(name))
