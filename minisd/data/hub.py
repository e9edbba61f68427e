"""Fetch a Hugging Face data set, from the hub or from parquet files on the disk, as a folder of captioned pictures.

The data set is streamed: only the rows that are asked for are fetched, and each picture is cropped and resized as it
arrives.
"""

from collections.abc import Iterator
from contextlib import suppress
from itertools import islice
from pathlib import Path

import numpy as np
from tqdm import tqdm

from .captioned_pictures import decode_file
from .folder import corpus_folder, write_corpus


def fetch_dataset(
    source: str | Path,
    folder: str | Path,
    split: str = "train",
    image: str = "image",
    text: str = "text",
    size: int = 64,
    count: int | None = None,
) -> Path:
    """Fetch a data set and write it as a folder, which `CaptionedPictures` and every `--data` option read.

    Args:
        source: "owner/name" on the hub, a folder of parquet files, or anything else that `datasets.load_dataset` takes.
        folder: where to write it. If it holds this data set already, nothing is done.
        split: which split of the data set to read.
        image, text: its columns of pictures and of captions. If a picture has several captions, the first is used.
        size: width of the square pictures that are written, in pixels.
        count: how many rows to read; None reads all. The pictures are held in memory until they are written.

    Returns the folder. Rows without a caption, or whose picture can't be read, are left out and counted.

    Raises:
        ValueError: there is no such data set, split or column, nothing in it can be used, or the folder holds
            something that this function has not made.
    """
    folder = Path(folder)
    recipe = {"source": str(source), "split": split, "image": image, "text": text, "size": size, "count": count}
    with corpus_folder(folder, recipe, f"the pictures of {source} at {size}x{size}") as complete:
        if complete:
            return folder
        rows, pictures, read = [], [], 0
        stream = tqdm(islice(_stream(source, split, image, text), count and max(0, count)), str(source), total=count)
        for read, (data, caption) in enumerate(stream, 1):
            if caption:
                with suppress(OSError):  # raised if the picture can't be read
                    pictures.append(decode_file(data, size))
                    rows.append({"file_name": f"images/{read - 1:08d}.png", "text": caption})
        if not rows:
            raise ValueError(f'none of {read} rows of {source} has a picture in "{image}" and a caption in "{text}".')
        write_corpus(folder, rows, np.stack(pictures), recipe)
    print(f"{folder}: {len(rows):,} pictures at {size}x{size}; {read - len(rows):,} rows left out.")
    return folder


def _stream(source: str | Path, split: str, image: str, text: str) -> Iterator[tuple[bytes | str, str]]:
    """The bytes of each picture, or the path of its file, and its caption; each is empty if there is none."""
    try:
        from datasets import Image, load_dataset
    except ImportError:
        raise ImportError('data sets of the hub need the package datasets: pip install "minisd[train]"') from None

    try:
        stream = load_dataset(str(source), split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(f"there is no data set at {source}, or it has no split {split}: {error}") from None
    columns = stream.column_names or []
    for column in (image, text):
        if column not in columns:
            raise ValueError(f"{source} has no column {column}, but {', '.join(columns)}: name the one that is meant.")
    if not isinstance(stream.features[image], Image):
        raise ValueError(f"the column {image} of {source} holds no pictures: name the one that does.")
    # The pictures are taken as bytes. If `datasets` decoded them, one broken picture would end the whole run.
    for row in stream.cast_column(image, Image(decode=False)):
        captions, picture = row[text], row[image] or {}
        caption = captions[0] if isinstance(captions, list) and captions else captions
        data = picture.get("path") if picture.get("bytes") is None else picture["bytes"]
        yield data or b"", " ".join(caption.split()) if isinstance(caption, str) else ""
