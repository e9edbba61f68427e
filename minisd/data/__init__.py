"""Captioned pictures: the class that reads them, and the corpora that this project trains on.

- `CaptionedPictures(folder)`: any folder of captioned pictures, as tensors
- `sample()`: real pictures that come with the package; `photograph()`: one photograph
- `draw_shapes(folder)`: coloured shapes with exact captions, drawn in seconds
- `build_emoji(folder)`: 1,641 concepts in nine styles, fetched and rendered in minutes
- `build_scenes(folder)`: cut-out emoji, from which `Scenes(folder)` composes pictures with exact captions
- `open_corpus(folders)`: any of these folders, or several in equal shares (`Mixture`)
- `fetch_dataset(source, folder)`: any data set of the Hugging Face hub, or of parquet files
"""

from .captioned_pictures import CaptionedPictures, Corpus
from .emoji import build_emoji
from .hub import fetch_dataset
from .mixture import Mixture, open_corpus
from .sample_pictures import photograph, sample
from .scenes import Scenes, build_scenes
from .shapes import draw_shapes, shape_corpus
