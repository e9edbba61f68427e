"""The emoji packages: what they are, who drew them, and how they are fetched and verified.

Every package is pinned to one version and one SHA-512 (the `integrity` that npm publishes). A corpus that is built next
year is therefore, byte for byte, the one that the weights in this repository were trained on. If a package has changed,
building stops with an error.
"""

import base64
import hashlib
import json
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .tables import read_table, read_text


@dataclass(frozen=True)
class Package:
    """One npm package, pinned."""

    npm: str  # its name on npm
    version: str
    sha512: str  # base64, as npm writes it after "sha512-"

    @property
    def tarball(self) -> str:
        """The file name that `npm pack` gives it."""
        return f"{self.npm.lstrip('@').replace('/', '-')}-{self.version}.tgz"


@dataclass(frozen=True)
class Style:
    """One set of emoji: one group of artists drawing every concept in one manner."""

    name: str  # as it is written in captions: "red apple, NAME style"
    package: Package
    licence: str  # SPDX identifier
    licence_url: str
    title: str  # what its makers call it
    credit: str  # who made it
    source: str  # where it comes from
    master: int = 128  # pixels along each side of an icon as it is rendered, before it is averaged down
    codepoints_of: str | None = None  # the style whose package lists the code points of the icons; None: its own
    picture_files: str | None = None  # if the package holds pictures instead of an icons.json: "FOLDER/*.webp", where *
    # is the code point
    twin_of: str | None = None  # a style by the same artists: a model that has seen one has nearly seen the other
    joined_later: bool = False  # joined the corpus when the split of the other styles had been fixed (split.py)
    on_request: bool = False  # not in the corpus unless it is asked for


_SETS = read_table("emoji_sets.toml")
NAMES = Package(**_SETS["names"])
STYLES = {row["name"]: Style(**row | {"package": Package(**row["package"])}) for row in _SETS["styles"]}
DEFAULT_STYLES = tuple(style.name for style in STYLES.values() if not style.on_request)
FIRST_STYLES = tuple(name for name in DEFAULT_STYLES if not STYLES[name].joined_later)


def attribution(styles: Sequence[Style]) -> str:
    """The Markdown that says for each style who made it, under which licence, and how it was changed."""
    texts = read_table("attribution.toml")
    entries = "\n".join(texts["style"].format(style=style) for style in styles)
    parts = [texts["intro"], entries]
    if any("SA" in style.licence for style in styles):
        parts.append(texts["share_alike"])
    parts += [texts["names"].format(names=NAMES), read_text("LICENSE-UNICODE.txt").strip()]
    if any(style.licence == "MIT" for style in styles):
        parts += [texts["mit"], read_text("LICENSE-MIT.txt").strip()]
    return "\n\n".join(parts) + "\n"


def verify(package: Package, tarball: Path) -> None:
    """Raise ValueError unless the tarball is the pinned one."""
    found = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise ValueError(
            f"{tarball} is not {package.npm} {package.version}: its SHA-512 starts with {found[:12]}, expected "
            f"{package.sha512[:12]}; delete it and run again."
        )


def fetch(package: Package, cache: Path) -> Path:
    """The package's tarball in `cache`, downloaded with `npm pack` if it is not there, and verified in both cases."""
    target = cache / package.tarball
    if target.exists():
        verify(package, target)
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(f"npm, which brings {package.npm}, is not installed: install Node.js.")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:  # in the cache, so the rename stays on one disk
        command = [npm, "pack", f"{package.npm}@{package.version}", "--silent"]
        done = subprocess.run(command, cwd=scratch, capture_output=True, text=True)
        packed = Path(scratch) / package.tarball
        if done.returncode != 0 or not packed.exists():
            said = next((line for line in done.stderr.splitlines() if line.strip()), "no reason given")
            raise ConnectionError(
                f"npm could not bring {package.npm} {package.version} ({said.strip()}): check the network and run "
                f"again; what has been downloaded is kept."
            )
        verify(package, packed)
        packed.replace(target)
    return target


def read_json(tarball: Path, name: str) -> dict | list:
    """One JSON file of an npm tarball; an empty dict if the package has no such file."""
    return json.loads(read_files(tarball, name).get("", "{}"))


def read_files(tarball: Path, pattern: str) -> dict[str, bytes]:
    """The files of an npm tarball whose names match "FOLDER/*.SUFFIX", by what stands for the *; or one file."""
    before, _, after = f"package/{pattern}".partition("*")
    with tarfile.open(tarball) as tar:
        files = (member for member in tar if member.name.startswith(before) and member.name.endswith(after))
        return {file.name.removeprefix(before).removesuffix(after): tar.extractfile(file).read() for file in files}
