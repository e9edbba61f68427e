"""Does a drawing show what the caption of a scene says: which things, where, in which colours?

As GenEval does for large models (Ghosh et al. 2023, arXiv:2310.11513), each question is answered from crops. GenEval
finds things with a detector. Here the caption says in which half of the picture a thing should be, and a judge that was
trained apart, on crops of real scenes, says what is there. Each question is asked about drawings and about real
scenes, and every drawing is also held against the captions of all others, so that the judge's own mistakes cancel in
the score (scores.py).

    thing         the one thing of the scene is recognised
    background    the frame of the picture has the colour that the caption says, or is white
    colour        the one thing has the colour that the caption says
    two things    both are recognised, side by side or one above the other, in any order
    position      both are recognised where the caption puts them
    two colours   in both places there is the colour that the caption says
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from ..data import Scenes
from ..data.scenes import COLOURS, KINDS, RELATIONS, Scene, rgb
from ..latent_diffusion import LatentDiffusion
from .judges import Hits, PatchJudge
from .run import FEWEST, Evaluation, Setting, autoencode, draw
from .scores import score

CROP = 32  # pixels along each side of what the judge sees
FAINT = 0.25  # of the range from -1 to 1: a pixel this near to the background's colour is background
HALVES = {"left": (0, -1), "right": (0, 1), "top": (-1, 0), "bottom": (1, 0), "whole": (0, 0)}
PALETTE = {name: rgb(name) for name in COLOURS}
NEUTRAL = {"white": (255, 255, 255), "grey": (128, 128, 128), "black": (30, 30, 30)}


# What a picture shows -------------------------------------------------------------------------------------------------


def background(pictures: Float[Tensor, "n 3 h w"]) -> Float[Tensor, "n 3 1 1"]:
    """The median colour of the outermost pixels."""
    frame = torch.cat([pictures[..., 0, :], pictures[..., -1, :], pictures[..., 0], pictures[..., -1]], dim=-1)
    return frame.median(dim=-1).values[..., None, None]


def crop(picture: Float[Tensor, "3 h w"], half: str) -> Float[Tensor, "3 CROP CROP"]:
    """What stands out from the background in one half of a picture: a square around it, on white."""
    behind, (down, right) = background(picture[None])[0], HALVES[half]
    height, width = picture.shape[1] // 2, picture.shape[2] // 2
    rows = slice(height if down > 0 else 0, height if down < 0 else None)
    columns = slice(width if right > 0 else 0, width if right < 0 else None)
    part = picture[:, rows, columns]
    seen = (part - behind).abs().amax(dim=0) > FAINT
    if not seen.any():
        return torch.ones(3, CROP, CROP)
    (top, bottom), (left, right) = ((where.min(), where.max() + 1) for where in seen.nonzero().unbind(dim=1))
    part = torch.where(seen, part, 1.0)[:, top:bottom, left:right]
    height, width = part.shape[1:]
    side = max(height, width)
    above, before = (side - height) // 2, (side - width) // 2
    part = F.pad(part, (before, side - width - before, above, side - height - above), value=1.0)
    return F.interpolate(part[None], (CROP, CROP), mode="bilinear", antialias=True)[0]


def nearest_colour(pixels: Float[Tensor, "n 3"], colours: dict) -> np.ndarray:
    """The name of the colour that is nearest to each pixel."""
    values = torch.tensor(np.array(list(colours.values())), dtype=torch.float32) / 127.5 - 1
    return np.array(list(colours))[torch.cdist(pixels, values).argmin(dim=1).numpy()]


def main_colour(thing: Float[Tensor, "3 h w"]) -> str:
    """The colour of the palette that most pixels of a crop have; "" if all are white, grey or black."""
    names = nearest_colour(thing.flatten(1).T, PALETTE | NEUTRAL)
    found, times = np.unique(names[~np.isin(names, list(NEUTRAL))], return_counts=True)
    return str(found[times.argmax()]) if len(found) else ""


# The judge ------------------------------------------------------------------------------------------------------------


def place(scene: Scene, item: int) -> str:
    """The half of the picture in which an item of a scene is."""
    right, down = RELATIONS.get(scene.relation, (0, 0))  # the way from the second thing to the first
    wanted = (down, right) if item == 0 else (-down, -right)
    return next(half for half, way in HALVES.items() if way == wanted)


def real_crops(scenes: Scenes) -> tuple[list[dict], Float[Tensor, "n 3 CROP CROP"]]:
    """What `PatchJudge` learns from: the rows (concept, style) and crops of each thing in real scenes."""
    rows, crops = [], []
    for i, scene in enumerate(tqdm(scenes.scenes, "real scenes")):
        picture, _ = scenes[i]
        crops += [crop(picture, place(scene, k)) for k in range(len(scene.items))]
        rows += [{"concept": item.concept, "style": scene.style} for item in scene.items]
    return rows, torch.stack(crops)


def answers(pictures: Float[Tensor, "n 3 h w"], scenes: list[Scene], judge: PatchJudge) -> Hits:
    """For each question: whether picture i would be a hit for the caption of scene j, if that scene asks it (ASKED)."""
    views = {half: torch.stack([crop(picture, half) for picture in pictures]) for half in HALVES}
    colours = {half: np.array([main_colour(part) for part in crops]) for half, crops in views.items()}
    thing, colour = {}, {}
    for k in (0, 1):  # a scene with one thing has it as items[-1], too, so that every scene has a row
        items = [scene.items[-k] for scene in scenes]
        rows = [{"concept": item.concept, "style": scene.style} for item, scene in zip(items, scenes, strict=True)]
        asked = np.array([item.colour or "none" for item in items])
        for half, crops in views.items():
            thing[half, k] = judge(crops, rows)["concept"]
            colour[half, k] = colours[half][:, None] == asked

    def where_it_should_be(found: dict, k: int) -> Bool[np.ndarray, "n n"]:
        return np.stack([found[place(scene, k), k][:, j] for j, scene in enumerate(scenes)], axis=1)

    ways = [("left", "right"), ("right", "left"), ("top", "bottom"), ("bottom", "top")]
    behind = nearest_colour(background(pictures).flatten(1), PALETTE | {"white": (255, 255, 255)})
    return {
        "thing": thing["whole", 0],
        "background": behind[:, None] == np.array([scene.background or "white" for scene in scenes]),
        "colour": colour["whole", 0],
        "two things": np.any([thing[a, 0] & thing[b, 1] for a, b in ways], axis=0),
        "position": where_it_should_be(thing, 0) & where_it_should_be(thing, 1),
        "two colours": where_it_should_be(colour, 0) & where_it_should_be(colour, 1),
    }


# Which questions a scene of each kind asks. Beside these, a scene of any kind may have a coloured background.
ASKED = {"background": ["thing"], "colour": ["colour"], "relation": ["two things", "position"], "both": ["two colours"]}


# The evaluation -------------------------------------------------------------------------------------------------------


def evaluate_composition(sd: LatentDiffusion, folder: str | Path, setting: Setting, count: int = 400) -> Evaluation:
    """Scores and drawings for scenes of combinations that training shows ("seen") and of held-out ones.

    Args:
        folder: the things of scenes (`minisd data scenes`).
        count: how many captions of each. The judge learns from other scenes, of which there are many more.
    """
    size = sd.config.image_size
    judge = PatchJudge(*real_crops(Scenes(folder, "train", size, min(15_000, 15 * count), seed=2)))
    found = Evaluation(scores=[], drawings={})
    for split, name in {"train": "seen", "test_scene": "held out"}.items():
        data = Scenes(folder, split, size, count, seed=1)
        real = data.batch(range(count))
        drawn = draw(sd, data.captions, setting, name)
        shown = {"model": drawn, "real": real, "decoded": autoencode(sd, real)}
        hits = {what: answers(pictures, data.scenes, judge) for what, pictures in shown.items()}
        of_kind = {kind: [i for i, scene in enumerate(data.scenes) if scene.kind == kind] for kind in KINDS}
        asking = {question: of_kind[kind] for kind, questions in ASKED.items() for question in questions}
        asking["background"] = [i for i, scene in enumerate(data.scenes) if scene.background]
        for question, chosen in asking.items():
            if len(chosen) >= FEWEST:
                some = {what: table[question][np.ix_(chosen, chosen)] for what, table in hits.items()}
                names = [data.scenes[i].items[0].concept for i in chosen]
                found.scores.append(score(name, "crops", question, **some, concepts=names))
        for kind, chosen in of_kind.items():
            found.drawings[f"{name}_{kind}".replace(" ", "_")] = drawn[chosen], real[chosen]
    return found
