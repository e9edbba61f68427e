"""Scenes: emoji composed into pictures with exact captions, such as "a blue fox to the left of a rocket".

Emoji show one thing each, in the middle, on white. A model that has seen only these cannot learn what "left of" or "on
a blue background" means. A scene is composed from emoji of the training split, with a caption that is true:

    a fox on a blue background                     a thing, and the colour behind it
    a blue fox                                     a thing that has one main colour, in another one
    a fox to the left of a rocket                  two things, and where they are
    a blue fox to the left of a red rocket         the same, with a colour for each

Some combinations are held out: (colour, thing), (background, thing) and (thing, relation, thing), chosen by hashes as
the pairs of the emoji corpus are. Each word of such a caption occurs in training, but never this combination.

Nothing is stored but the cut-out emoji. Scene k is composed when it is asked for, and depends only on the seed and on
k. So a longer data set begins with the scenes of a shorter one.
"""

import colorsys
import random
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image
from tqdm import tqdm

from .captioned_pictures import Corpus, read_metadata
from .emoji import picture_file, read_concepts, sources
from .folder import DOWNLOADS, corpus_folder, read_recipe, write_corpus
from .packages import STYLES, attribution
from .split import unit_hash
from .tables import read_table
from .text import with_article

_WORDS = read_table("scenes.toml")
COLOURS = {name: tuple(hsv) for name, hsv in _WORDS["colours"].items()}  # (hue in degrees, saturation, value)
RELATIONS = {phrase: tuple(step) for phrase, step in _WORDS["relations"].items()}
KINDS = _WORDS["kinds"]
HELD_OUT = 0.1  # share of the combinations
MOST_WORDS = 3  # in the name of a thing, so that a caption with two of them stays short
SMALL = 15 / 32  # side of one of two things, as a share of the picture's. A thing alone has twice this, so that its
# background can be seen even around a square sign
WIDTH = 30  # degrees: hues that are nearer are one colour


# What is drawn --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Item:
    """One thing of a scene."""

    thing: int  # which of the cut-out emoji
    concept: str
    colour: str | None  # what it is recoloured to
    left: int  # in pixels, as `top` and `side`
    top: int
    side: int

    @property
    def name(self) -> str:
        """The thing in the caption: "a blue fox"."""
        return with_article(f"{self.colour} {self.concept}" if self.colour else self.concept)


@dataclass(frozen=True)
class Scene:
    """What a picture shows. `caption` says it."""

    kind: str  # one of KINDS
    style: str
    items: tuple[Item, ...]  # one thing, or two
    relation: str | None  # where the first is, seen from the second
    background: str | None  # a colour; None: white
    names_style: bool  # whether the caption says the style

    @property
    def caption(self) -> str:
        words = [self.items[0].name]
        if self.relation:
            words += [self.relation, self.items[1].name]
        if self.background:
            words.append(f"on {with_article(f'{self.background} background')}")
        return " ".join(words) + (f", {self.style} style" if self.names_style else "")

    @property
    def combinations(self) -> list[tuple[str, ...]]:
        """What can be held out: (colour, thing), (background, thing) and (thing, relation, thing)."""
        found = [("colour", item.colour, item.concept) for item in self.items if item.colour]
        found += [("background", self.background, item.concept) for item in self.items if self.background]
        if self.relation:  # "a below b" shows the same as "b above a", so both have one name
            names, (right, down) = [item.concept for item in self.items], RELATIONS[self.relation]
            names = names[::-1] if right + down > 0 else names
            found.append(("relation", names[0], "left of" if right else "above", names[1]))
        return found

    @property
    def split(self) -> str:
        held_out = any(unit_hash("/".join(combination)) < HELD_OUT for combination in self.combinations)
        return "test_scene" if held_out else "train"


def can_be_shown(concept: str) -> bool:
    """Whether a caption can have this name: "a blue red heart" would contradict itself, as "down arrow above" would."""
    words = concept.replace("-", " ").split()
    return len(words) <= MOST_WORDS and not set(words) & {*_WORDS["left_out"]["words"], *COLOURS}


# Colours --------------------------------------------------------------------------------------------------------------


def rgb(colour: str) -> UInt8[np.ndarray, "3"]:
    hue, saturation, value = COLOURS[colour]
    return np.uint8(np.round(255 * np.array(colorsys.hsv_to_rgb(hue / 360, saturation, value))))


def apart(hue: float | Float32[np.ndarray, "h w"], other: float) -> float | Float32[np.ndarray, "h w"]:
    """The angle between two hues, in degrees."""
    return abs((hue - other + 180) % 360 - 180)


def main_hue(cut_out: UInt8[np.ndarray, "h w 4"]) -> float | None:
    """The one hue of a thing in degrees; None if it is grey, or has two colours."""
    hue, saturation, value = to_hsv(cut_out)
    opaque = cut_out[..., 3] > 127
    coloured = opaque & (saturation > 0.25) & (value > 0.2)
    if not coloured.any():
        return None
    main = float(10 * np.bincount((hue[coloured] / 10).astype(int) % 36).argmax() + 5)
    near = coloured & (apart(hue, main) < WIDTH)
    one = near.sum() > 0.4 * opaque.sum() and (coloured & ~near).sum() < 0.15 * opaque.sum()
    return main if one else None


def recoloured(cut_out: UInt8[np.ndarray, "h w 4"], hue: float, colour: str) -> UInt8[np.ndarray, "h w 4"]:
    """A thing whose pixels of its main hue get another colour. Its shading stays."""
    h, s, v = to_hsv(cut_out)
    main = (apart(h, hue) < WIDTH) & (s > 0.15) & (v > 0.1) & (cut_out[..., 3] > 0)
    target, *levels = COLOURS[colour]
    h[main] = target
    for channel, level in zip((s, v), levels, strict=True):  # so that the median is that of the colour
        channel[main] = np.minimum(1, channel[main] * level / np.median(channel[main]))
    channels = [Image.fromarray(np.uint8(np.round(255 * channel))) for channel in (h / 360, s, v)]
    pixels = np.asarray(Image.merge("HSV", channels).convert("RGB"))
    return np.concatenate([np.where(main[..., None], pixels, cut_out[..., :3]), cut_out[..., 3:]], axis=-1)


def to_hsv(cut_out: UInt8[np.ndarray, "h w 4"]) -> Float32[np.ndarray, "3 h w"]:
    """Hue in degrees, saturation and value from 0 to 1."""
    hsv = np.asarray(Image.fromarray(cut_out[..., :3]).convert("HSV"), np.float32) / 255
    return np.moveaxis(hsv * np.float32([360, 1, 1]), -1, 0).copy()


# The data set ---------------------------------------------------------------------------------------------------------


class Scenes(Corpus):
    """Scenes as a data set.

    Args:
        folder: the folder of cut-out emoji that `build_scenes` wrote.
        split: "train", or "test_scene" for scenes with a held-out combination.
        size: of the pictures, in pixels; None: what the things were cut out for.
        count: how many scenes. seed: another seed gives other scenes.

    Raises ValueError if the things were cut out for another size.
    """

    def __init__(
        self, folder: str | Path, split: str = "train", size: int | None = None, count: int = 50_000, seed: int = 0
    ):
        self.folder = Path(folder)
        self.things = read_metadata(self.folder)[0]
        self.cut_outs = np.load(self.folder / "pictures.npy", mmap_mode="r")
        self.size = read_recipe(self.folder)["size"]
        if size not in (None, self.size):
            raise ValueError(
                f"{folder} holds things for scenes of {self.size}x{self.size}, and {size}x{size} is needed: cut them "
                f"out again, with `minisd data scenes --size {size}`."
            )
        self._drawn_in, self._with_one_hue = defaultdict(list), defaultdict(list)  # the things of each style
        for i, thing in enumerate(self.things):
            self._drawn_in[thing["style"]].append(i)
            if thing["hue"] is not None:
                self._with_one_hue[thing["style"]].append(i)
        self._drawn_by = split, count, seed

    @cached_property
    def scenes(self) -> list[Scene]:
        """What all scenes show; made when first asked for, and kept."""
        split, count, seed = self._drawn_by
        return [self._scene(split, seed, k) for k in tqdm(range(count), "scenes", disable=count < 100_000)]

    @cached_property
    def captions(self) -> list[str]:
        return [scene.caption for scene in self.scenes]

    def _scene(self, split: str, seed: int, k: int) -> Scene:
        """Scene k: drawn at random until it is in the split and can be shown."""
        rng = random.Random(f"{seed}/{split}/{k}")
        [kind] = rng.choices(list(KINDS), KINDS.values())
        while True:
            scene = self._draw(kind, rng)
            if scene is not None and scene.split == split:
                return scene

    def _draw(self, kind: str, rng: random.Random) -> Scene | None:
        """A random scene of a kind; None if its parts do not go together."""
        coloured, two = kind in ("colour", "both"), kind in ("relation", "both")
        style = rng.choice(self.things)["style"]  # a style with more things occurs more often
        things = rng.choices((self._with_one_hue if coloured else self._drawn_in)[style], k=1 + two)
        relation = rng.choice(list(RELATIONS)) if two else None
        background = rng.choice(list(COLOURS)) if kind == "background" or rng.random() < 0.2 else None
        colours = rng.sample(list(COLOURS), len(things)) if coloured else [None] * len(things)

        hues = [COLOURS[c][0] if c else self.things[i]["hue"] for i, c in zip(things, colours, strict=True)]
        if background and any(hue is not None and apart(hue, COLOURS[background][0]) < WIDTH for hue in hues):
            return None  # it would not be seen
        names = [self.things[i]["concept"] for i in things]
        if two and names[0] == names[1]:
            return None
        boxes = self._boxes(relation, rng)
        items = tuple(Item(*item) for item in zip(things, names, colours, *zip(*boxes, strict=True), strict=True))
        return Scene(kind, style, items, relation, background, names_style=rng.random() < 0.5)

    def _boxes(self, relation: str | None, rng: random.Random) -> list[tuple[int, int, int]]:
        """Left, top and side of each thing, in pixels."""
        large = self.cut_outs.shape[1]
        if relation is None:
            return [(rng.randint(0, self.size - large), rng.randint(0, self.size - large), large)]
        # Two halves, side by side or one above the other, and a thing anywhere in the middle of each.
        small, half, margin = large // 2, self.size // 2, self.size // 8
        right, down = RELATIONS[relation]
        starts = [0, half] if right + down < 0 else [half, 0]
        along = [start + rng.randint(0, half - small) for start in starts]
        across = [rng.randint(margin, self.size - small - margin) for _ in starts]
        return [(a, b, small) if right else (b, a, small) for a, b in zip(along, across, strict=True)]

    def picture(self, i: int) -> UInt8[np.ndarray, "size size 3"]:
        """Compose scene i: each thing over what is behind it."""
        scene = self.scenes[i]
        colour = rgb(scene.background) if scene.background else 255
        canvas = np.full((self.size, self.size, 3), colour, np.float32)
        for item in scene.items:
            cut_out = self.cut_outs[item.thing]
            if item.colour:
                cut_out = recoloured(cut_out, self.things[item.thing]["hue"], item.colour)
            # Premultiplied by its opacity, so that a mean of pixels does not mix in the colour of transparent ones.
            alpha = cut_out[..., 3:].astype(np.float32) / 255
            part = np.concatenate([cut_out[..., :3] * alpha, alpha], axis=-1)
            if item.side < len(part):  # a whole multiple, so the mean is that of a picture rendered at this size
                step = len(part) // item.side
                part = part.reshape(item.side, step, item.side, step, 4).mean(axis=(1, 3))
            place = canvas[item.top : item.top + item.side, item.left : item.left + item.side]
            place[:] = part[..., :3] + place * (1 - part[..., 3:])
        return np.uint8(np.round(canvas))

    def __len__(self) -> int:
        return self._drawn_by[1]

    def pixels(self, indices: np.ndarray) -> UInt8[np.ndarray, "b h w 3"]:
        return np.stack([self.picture(i) for i in indices.tolist()])

    def describe(self, i: int) -> str:
        return f"scene {i} ({self.captions[i]!r})"

    @property
    def fingerprint(self) -> str:
        return self.identified_by("scenes", [self.things, self.captions])


# Cutting out ----------------------------------------------------------------------------------------------------------


def cut_out(source: str | bytes, side: int, master: int) -> UInt8[np.ndarray, "side side 4"]:
    """An SVG or a picture as pixels with an alpha channel, averaged down as `emoji.render` does."""
    with Image.open(BytesIO(picture_file(source, side, master))) as picture:
        premultiplied = picture.convert("RGBA").convert("RGBa")
    return np.asarray(premultiplied.resize((side, side), Image.Resampling.BOX).convert("RGBA"))


def build_scenes(folder: str | Path = "data/scenes", emoji: str | Path = "data/emoji", size: int = 64) -> Path:
    """Cut out the emoji of the training split, and write them to a folder, which `Scenes` reads.

    emoji: the folder that `build_emoji` wrote, whose packages are read again. size: of a scene, in pixels.

    Raises ValueError or OSError, in one sentence, if `emoji` is no such folder or `folder` can't be written to.
    """
    folder, emoji = Path(folder).expanduser(), Path(emoji).expanduser()
    made = read_recipe(emoji)
    if made.get("made_by") != "build_emoji" or made.get("source") != "npm":
        raise ValueError(f"{emoji} is no corpus of `minisd data emoji`: make one first, or name its folder by --emoji.")
    recipe, corpus = {"made_by": "build_scenes", "size": size, "emoji": made}, read_metadata(emoji)[0]
    with corpus_folder(folder, recipe, f"cut-outs for scenes of {size}x{size}") as complete:
        if complete:
            return folder
        everything = read_concepts(emoji / DOWNLOADS, made["tones"], made["flags"])
        trained = {(row["codepoint"], row["style"]): row for row in corpus if row["split"] == "train"}
        rows, pictures, chosen = [], [], [STYLES[name] for name in made["styles"]]
        for style in chosen:
            found = sources(style, everything, emoji / DOWNLOADS)
            for i, source in tqdm(found.items(), style.name, unit=" things"):
                row = trained.get((everything[i].codepoint, style.name))
                if row and can_be_shown(row["concept"]):
                    pictures.append(cut_out(source, 2 * round(size * SMALL), style.master))
                    known = {key: row[key] for key in ("file_name", "concept", "style")}
                    hue = None if row["group"] == "people-body" else main_hue(pictures[-1])  # people keep their colour
                    rows.append(known | {"text": row["concept"], "hue": hue})
        write_corpus(folder, rows, np.stack(pictures), recipe, {"ATTRIBUTION.md": attribution(chosen)})
    print(f"{folder}: {len(rows):,} things to compose scenes of {size}x{size} from.")
    return folder
