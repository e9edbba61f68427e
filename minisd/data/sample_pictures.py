"""Real pictures that come with the package: some 260 well-known concepts, for tests and notebooks without a network.
There is also one photograph, to show how a model that was trained on drawings handles it.

All pictures are in one lossless contact sheet, `pictures.webp`, which `CaptionedPictures` reads as it reads any other
packed folder. `docs/cut_sample.py` cuts it out of the emoji corpus.
"""

from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from .captioned_pictures import CaptionedPictures, decode_file

SAMPLE = Path(__file__).parent / "sample"


def sample(size: int | None = None) -> CaptionedPictures:
    """The sample as `CaptionedPictures`, 64x64 unless you give a size. It has all splits (`.rows[i]["split"]`)."""
    return CaptionedPictures(SAMPLE, size=size)


def photograph(size: int = 128) -> Float[Tensor, "1 3 size size"]:
    """A photograph in [-1, 1]: the face of Chelsea, a cat, by Stefan van der Walt (CC0). It is stored at 128x128."""
    pixels = torch.tensor(decode_file(SAMPLE / "photograph.webp", size))
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1
