"""Several folders of pictures as one data set.

Emoji teach a model what things look like, scenes how they are put together. A training that takes both has to see both
equally often, although one folder may hold ten times as many pictures as the other.
"""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from .captioned_pictures import CaptionedPictures, Corpus
from .folder import read_recipe
from .scenes import Scenes


class Mixture(Corpus):
    """Data sets in equal shares. Sample i is from part i % k of k; a small part is repeated until the largest is seen.

    Raises ValueError if the pictures of the parts have several sizes.
    """

    def __init__(self, parts: Sequence[CaptionedPictures | Scenes]):
        self.parts, self.size = list(parts), parts[0].size
        if any(part.size != self.size for part in parts):
            sizes = ", ".join(f"{part.folder}: {part.size}x{part.size}" for part in parts)
            raise ValueError(f"a training's pictures have one size, and these have several ({sizes}): give a size.")
        # Where each sample is: a part, and the index in it.
        self._places = [(part, k % len(part)) for k in range(max(map(len, parts))) for part in parts]
        self.templates = tuple(part.templates for part in parts)

    @cached_property
    def captions(self) -> list[str]:
        return [part.captions[k] for part, k in self._places]

    @cached_property
    def wordings(self) -> list[list[str]]:
        """The forms of each caption. Each has the same number of them, because training draws one at random."""
        wordings = {part: part.wordings for part in self.parts}
        most = max(len(forms[0]) for forms in wordings.values())
        filled = {part: [(forms * most)[:most] for forms in every] for part, every in wordings.items()}
        return [filled[part][k] for part, k in self._places]

    def __len__(self) -> int:
        return len(self._places)

    def pixels(self, indices: np.ndarray) -> UInt8[np.ndarray, "b h w 3"]:
        places = [self._places[i] for i in indices]
        return np.stack([part.pixels(np.array([k]))[0] for part, k in places])

    def column(self, name: str) -> list:
        """One entry of each row, as in `CaptionedPictures`."""
        columns = {part: part.column(name) for part in self.parts}
        return [columns[part][k] for part, k in self._places]

    def describe(self, i: int) -> str:
        part, k = self._places[i]
        return part.describe(k)

    @property
    def fingerprint(self) -> str:
        return " and ".join(part.fingerprint for part in self.parts)


def open_corpus(
    folders: Sequence[str | Path], size: int | None = None, split: str | None = "train", captions: bool = True
) -> Corpus:
    """The pictures in one folder, or in several in equal shares. A folder may also hold the things of scenes.

    The arguments and errors are those of `CaptionedPictures`.
    """
    if not folders:
        raise ValueError("no folder of pictures was given: name one, or several.")
    parts = []
    for folder in map(Path, folders):
        if read_recipe(folder).get("made_by") == "build_scenes":
            parts.append(Scenes(folder, split or "train", size))
        else:
            parts.append(CaptionedPictures(folder, size, split, captions))
    return parts[0] if len(parts) == 1 else Mixture(parts)
