"""How many drawings of shapes show what their prompts say:   python docs/judge_shapes.py tiny

A judge who has not seen the prompt looks for the scene that a picture is nearest to, pixel by pixel, among all that
`minisd data shapes` can draw. It is then compared with the prompt's. Scenes that look alike ("two red hearts", "a red
heart to the left of a red heart"; "above", "below") count as the same.
"""

import argparse
import functools
from collections import defaultdict

import numpy as np
import torch
from torch import Tensor

import minisd
from minisd.data import shapes
from minisd.data.shapes import COLOURS, NUMBERS, PLACES, RELATIONS, SHAPES, SIZES, Item, Scene

JITTER = (-0.04, -0.02, 0.0, 0.02, 0.04)  # `shapes.scene` moves a shape by up to 0.04 of the width
NAMES = [(colour, shape) for colour in COLOURS for shape in SHAPES]

# A picture's layout: the centres of its shapes, and their radius.
LAYOUTS = {
    **{size or "medium": (((0.5, 0.5),), radius) for size, radius in SIZES.items()},
    **{place: ((centre,), 0.15) for place, centre in PLACES.items()},
    **{number: (centres, 0.17) for number, centres in NUMBERS.items()},
    "above": (RELATIONS["above"], 0.17),
}


def layout_of(scene: Scene) -> tuple[str, tuple[tuple[str, str], ...]]:
    """What the judge would have to find: a layout, and (colour, shape) at each of its centres."""
    names = tuple((item.colour, item.shape) for item in scene.items)
    if scene.kind == "relation":
        relation = next(r for r in RELATIONS if f" {r} " in scene.caption)
        layout = "above" if relation in ("above", "below") else "two"
        return layout, names if relation in ("above", "to the left of") else names[::-1]
    words = f" {scene.caption} "
    found = [layout for layout in LAYOUTS if f" {layout} " in words]
    return max(found, key=len, default="medium"), names


@functools.cache
def templates(centre: tuple[float, float], radius: float, size: int) -> Tensor:
    """Each shape in each colour at each place near a centre, less the white paper: [48 25 3·size·size]."""
    drawn = [
        shapes.render(Scene("", "", (Item(colour, shape, centre[0] + dx, centre[1] + dy, radius),)), size)
        for colour, shape in NAMES for dx in JITTER for dy in JITTER
    ]  # fmt: skip
    return (torch.from_numpy(np.stack(drawn)).flatten(1) / 127.5 - 2).unflatten(0, (len(NAMES), -1))


def judge(pictures: Tensor) -> list[tuple[str, tuple[tuple[str, str], ...]]]:
    """What each picture shows [n 3 size size]: the layout and the names with the least squared error.

    Shapes do not overlap. So the error of a scene is that of white paper and, for each shape T on it, the change
    ‖T‖² - 2 T·x: each shape is found on its own.
    """
    size = pictures.shape[-1]
    x = (pictures.clamp(-1, 1) - 1).permute(0, 2, 3, 1).flatten(1)  # white is 0
    errors, names = [], []
    for centres, radius in LAYOUTS.values():
        changes = []
        for centre in centres:
            t = templates(centre, radius, size)
            change = (t.square().sum(-1) - 2 * (x @ t.flatten(0, 1).T).unflatten(1, t.shape[:2])).amin(2)  # [n 48]
            changes.append(change.min(1))
        errors.append(sum(change.values for change in changes))
        names.append(torch.stack([change.indices for change in changes], 1).tolist())
    best = torch.stack(errors).argmin(0).tolist()
    return [(list(LAYOUTS)[k], tuple(NAMES[i] for i in names[k][n])) for n, k in enumerate(best)]


def right(asked, shown) -> tuple[bool, bool, bool, bool]:
    """Whether the layout, all colours, all shapes, and all of it is right. With another layout, in any order."""
    (layout, names), (other, others) = asked, shown
    colours, forms = ([sorted(set(n[k] for n in side)) for side in (names, others)] for k in (0, 1))
    if layout == other:
        colours, forms = ([[n[k] for n in side] for side in (names, others)] for k in (0, 1))
    return layout == other, colours[0] == colours[1], forms[0] == forms[1], asked == shown


def prompts(count: int, split: str, seed: int = 1) -> list[Scene]:
    """`count` scenes with different captions, as many of each kind as they come; not those of the training's seed."""
    found, k = {}, 0
    while len(found) < count:
        scene = shapes.scene(seed, k)
        if scene.split == split:
            found.setdefault(scene.caption, scene)
        k += 1
    return list(found.values())


def report(name: str, scenes: list[Scene], pictures: Tensor) -> None:
    kinds = defaultdict(list)
    for scene, shown in zip(scenes, judge(pictures), strict=True):
        for kind in (scene.kind, "all"):
            kinds[kind].append(right(layout_of(scene), shown))
    for kind in ("size", "place", "count", "relation", "all"):
        shares = torch.tensor(kinds[kind]).float().mean(0)
        print(f"{name:40}{kind:9}{len(kinds[kind]):5}" + "".join(f"{share:9.1%}" for share in shares))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--count", type=int, default=200, help="prompts of each split")
    parser.add_argument("--guidance-scale", type=float, default=3.0)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    print(f"{'':40}{'':9}{'asked':>5}   layout  colours   shapes      all")
    for split in ("train", "test_pair"):
        scenes = prompts(arguments.count, split)
        pixels = np.stack([shapes.render(scene, 32) for scene in scenes])
        real = torch.from_numpy(pixels).permute(0, 3, 1, 2) / 127.5 - 1
        report(f"real pictures, {split}", scenes, real)
        for path in arguments.models:
            sd = minisd.load(path, "cpu")
            decoded = sd.decode_first_stage(sd.get_first_stage_encoding(sd.encode_first_stage(real).mode()))
            report(f"{path} decoded, {split}", scenes, decoded)
            drawn = sd.txt2img(
                [scene.caption for scene in scenes], steps=arguments.steps, guidance_scale=arguments.guidance_scale,
                sampler="dpmpp_2m", seed=0,
            ).pictures  # fmt: skip
            report(f"{path} drawn, {split}", scenes, drawn)
