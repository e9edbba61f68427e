"""Real pictures that come with the package: some 260 well-known concepts, for tests and notebooks without a network.
And one photograph, to show what a model of drawings makes of one.

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
    """The sample: `CaptionedPictures`, 64x64 unless another size is asked for, of all splits (`.rows[i]["split"]`)."""
    return CaptionedPictures(SAMPLE, size=size)


def photograph(size: int = 128) -> Float[Tensor, "1 3 size size"]:
    """A photograph in [-1, 1]: the face of Chelsea, a cat, by Stefan van der Walt (CC0). 128x128 is how it is kept."""
    pixels = torch.tensor(decode_file(SAMPLE / "photograph.webp", size))
    return pixels.permute(2, 0, 1)[None] / 127.5 - 1
