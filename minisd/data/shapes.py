"""Coloured shapes with exact captions: a corpus that is drawn by this module, without a download.

It is small enough for a laptop, but not trivial: a model has to bind each colour to its shape, to count the shapes, and
to put them in their places. Everything that a caption says is true, and six (colour, shape) pairs never occur in
training.

Picture k depends only on the seed and on k, so a longer corpus begins with the pictures of a shorter one.
"""

import math
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw
from tqdm import tqdm

from .folder import corpus_folder, write_corpus
from .split import unit_hash
from .tables import read_table
from .text import with_article

_WORDS = read_table("shapes.toml")
SHAPES = tuple(_WORDS["shapes"])
COLOURS = {name: tuple(rgb) for name, rgb in _WORDS["colours"].items()}
# Lengths are fractions of the picture's width, and y grows downwards.
SIZES = _WORDS["sizes"]  # half the width of a shape
PLACES = {phrase: tuple(centre) for phrase, centre in _WORDS["places"].items()}
RELATIONS = {phrase: tuple(map(tuple, centres)) for phrase, centres in _WORDS["relations"].items()}
NUMBERS = {word: tuple(map(tuple, centres)) for word, centres in _WORDS["numbers"].items()}


# What is drawn --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One shape: centre and radius as fractions of the picture's width. y grows downwards."""

    colour: str
    shape: str
    x: float
    y: float
    radius: float

    @property
    def name(self) -> str:
        return f"{self.colour} {self.shape}"


@dataclass(frozen=True)
class Scene:
    caption: str
    kind: str  # "size", "place", "count" or "relation": what the caption states besides colour and shape
    items: tuple[Item, ...]

    @property
    def split(self) -> str:
        """`test_pair` if a held-out (colour, shape) is in the picture, else `train`."""
        return "test_pair" if any(item.name in HELD_OUT for item in self.items) else "train"


def held_out_pairs() -> frozenset[str]:
    """One colour for each shape, by hash, and no colour twice, so that training shows every colour and every shape."""
    chosen: dict[str, str] = {}
    for shape in SHAPES:
        free = [colour for colour in COLOURS if colour not in chosen]
        chosen[min(free, key=lambda colour: unit_hash(f"shape/{colour} {shape}"))] = shape
    return frozenset(f"{colour} {shape}" for colour, shape in chosen.items())


HELD_OUT = held_out_pairs()


def scene(seed: int, k: int) -> Scene:
    """Picture k of the corpus with this seed, before it is drawn."""
    rng = np.random.default_rng([seed, k])

    def pick(options) -> str:
        return list(options)[rng.integers(len(options))]

    def item(thing: tuple[str, str], place: tuple[float, float], radius: float) -> Item:
        x, y = place + rng.uniform(-0.04, 0.04, 2)  # jitter, so that the place is not the same to the pixel
        return Item(*thing, float(x), float(y), radius * float(rng.uniform(0.93, 1.07)))

    thing = other = pick(COLOURS), pick(SHAPES)
    name, radius = " ".join(thing), 0.17
    kind = pick(("size", "place", "count", "relation"))
    what = pick({"size": SIZES, "place": PLACES, "count": NUMBERS, "relation": RELATIONS}[kind])
    if kind == "size":
        caption, places, radius = with_article(f"{what} {name}".strip()), [(0.5, 0.5)], SIZES[what]
    elif kind == "place":
        caption, places, radius = f"{with_article(name)} {what}", [PLACES[what]], 0.15
    elif kind == "count":
        caption, places = f"{what} {name}s", NUMBERS[what]
    else:
        while other == thing:
            other = pick(COLOURS), pick(SHAPES)
        caption, places = f"{with_article(name)} {what} {with_article(' '.join(other))}", RELATIONS[what]
    things = [thing, other] if kind == "relation" else [thing] * len(places)
    return Scene(caption, kind, tuple(item(*pair, radius) for pair in zip(things, places, strict=True)))


# How it is drawn ------------------------------------------------------------------------------------------------------


def outline(shape: str) -> list[tuple[float, float]]:
    """The corners of a shape of radius 1 around 0, y downwards."""
    if shape in _WORDS["corners"]:
        return [(x, y) for x, y in _WORDS["corners"][shape]]
    turn = [2 * math.pi * k / 60 for k in range(60)]
    if shape == "circle":
        return [(math.sin(t), math.cos(t)) for t in turn]
    if shape == "star":  # ten corners, every other one further in
        spokes = [(math.pi * k / 5, (1.08, 0.48)[k % 2]) for k in range(10)]
        return [(r * math.sin(t), -r * math.cos(t)) for t, r in spokes]
    if shape == "heart":  # a classic curve; 16 is its half width
        return [
            (math.sin(t) ** 3, -(13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)) / 16)
            for t in turn
        ]
    raise ValueError(f'"{shape}" is no shape that can be drawn; these are: {", ".join(SHAPES)}.')


def render(scene: Scene, size: int) -> UInt8[np.ndarray, "size size 3"]:
    """Draw a scene at four times the size, then average each block of 4 x 4 pixels, so that edges are smooth."""
    canvas = Image.new("RGB", (4 * size, 4 * size), "white")
    pencil = ImageDraw.Draw(canvas)
    for item in scene.items:
        centre, radius = (4 * size * item.x, 4 * size * item.y), 4 * size * item.radius
        corners = [(centre[0] + radius * x, centre[1] + radius * y) for x, y in outline(item.shape)]
        pencil.polygon(corners, fill=COLOURS[item.colour])
    return np.asarray(canvas.reduce(4))


# The corpus -----------------------------------------------------------------------------------------------------------


def shape_corpus(count: int, size: int = 32, seed: int = 0) -> tuple[UInt8[np.ndarray, "n size size 3"], list[str]]:
    """The first `count` pictures of a seed and their captions, in memory."""
    if not 1 <= count <= 10**6 or size < 8 or seed < 0:
        asked = f"{count:,} pictures of {size} pixels from the seed {seed} were asked for"
        raise ValueError(f"{asked}: 1 to 1,000,000 can be drawn, of at least 8, from a seed of at least 0.")
    scenes = [scene(seed, k) for k in range(count)]
    pictures = np.stack([render(s, size) for s in tqdm(scenes, "drawing shapes", disable=count < 5000)])
    return pictures, [s.caption for s in scenes]


def metadata(k: int, scene: Scene) -> dict:
    """The row of picture k."""
    return {
        "file_name": f"images/{k // 1000:03}/{k:06}.png",  # a thousand to a folder
        "text": scene.caption,
        "concept": scene.items[0].name,
        "kind": scene.kind,
        "split": scene.split,
        "items": [asdict(item) for item in scene.items],
    }


def draw_shapes(folder: str | Path = "data/shapes", count: int = 20_000, size: int = 32, seed: int = 0) -> Path:
    """Write shapes to a folder that `CaptionedPictures` reads, and return it; a complete corpus is left as it is.

    Each row has, beside file_name and text: kind ("size", "place", "count", "relation"), concept ("red circle",
    the first shape's), items (each shape's colour, shape, x, y and radius) and split ("train", or "test_pair" if
    the picture has a (colour, shape) pair that is never in training).
    """
    folder = Path(folder).expanduser()
    recipe = {"made_by": "draw_shapes", "count": count, "size": size, "seed": seed}
    with corpus_folder(folder, recipe, f"{count:,} shapes at {size}x{size}") as complete:
        if complete:
            return folder
        pictures, _ = shape_corpus(count, size, seed)
        rows = [metadata(k, scene(seed, k)) for k in range(count)]
        write_corpus(folder, rows, pictures, recipe)
    held_out = sum(row["split"] == "test_pair" for row in rows)
    print(f"{folder}: {count:,} shapes at {size}x{size}, {held_out:,} of them with a held-out pair (test_pair).")
    return folder
