"""Captioned pictures: the class that reads them, and the corpora that this project trains on.

- `CaptionedPictures(folder)`: any folder of captioned pictures, as tensors
- `sample()`: real pictures that come with the package; `photograph()`: one photograph
- `draw_shapes(folder)`: coloured shapes with exact captions, drawn in seconds
- `build_emoji(folder)`: 1,641 concepts in seven styles, fetched and rendered in minutes
- `fetch_dataset(source, folder)`: any data set of the Hugging Face hub, or of parquet files
"""

from .captioned_pictures import CaptionedPictures
from .emoji import build_emoji
from .hub import fetch_dataset
from .sample_pictures import photograph, sample
from .shapes import draw_shapes, shape_corpus

__all__ = [
    "CaptionedPictures", "build_emoji", "draw_shapes", "fetch_dataset", "photograph", "sample", "shape_corpus",
]  # fmt: skip
