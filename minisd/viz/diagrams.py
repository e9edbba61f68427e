"""The model as boxes: the UNet's blocks, a step of training, how a picture is drawn, and the classes."""

import tomllib
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from .page import empty_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of the boxes: pale, so that black letters are easy to read.
_FILLS = {"text": "#FBE3C8", "unet": "#D3E6F3", "trained": "#D3E6F3", "vae": "#D5EFE6", "sampler": "#F3DDE9",
          "plain": "white", "": "#F0F0F0"}  # fmt: skip


def unet_diagram(blocks: Sequence, title: str = "") -> "Figure":
    """The U: the way down on the left, the way up on the right, and the skip connections as dashed lines between them.

    blocks: what `minisd.instruments.unet_outline.outline` returns. A box names the layers of a block, and the channels
    and size of its output. Blocks with attention are blue. The number on a dashed line says how many channels are
    concatenated to those from below.
    """
    down = [block for block in blocks if block.name.startswith("input_blocks")]
    up = {block.skip: block for block in blocks if block.skip}
    middle, out = ([b for b in blocks if b.name == name][0] for name in ("middle_block", "out"))
    sides = sorted({block.shape_out[-1] for block in down}, reverse=True)  # of the maps, the largest first
    row, tall, wide, step = 0.34, 0.27, 2.75, 0.16  # inches; each level stands a step further in
    width, head = 2 * wide + 2.7, 0.5 if title else 0.3
    height = head + row * (len(down) + 1)
    figure, axes = _canvas(width, height)
    axes.text(width / 2, height - 0.15, title, ha="center", va="center", fontsize=9)
    short = {"Conv2d": "conv", "ResBlock": "Res", "SpatialTransformer": "Transformer", "AttentionBlock": "Attention",
             "Downsample": "Down", "Upsample": "Up"}  # fmt: skip

    def draw(block, x: float, y: float) -> None:
        attends = {"SpatialTransformer", "AttentionBlock"} & set(block.layers)
        _box(axes, x, y, wide, tall, "unet" if attends else "", "")
        place = block.name.split(".")[1] if "." in block.name else "middle"
        style = {"va": "center", "fontsize": 7.5}
        axes.text(x + 0.06, y + tall / 2, place, color="0.35", **style)
        axes.text(x + wide / 2 - 0.1, y + tall / 2, " + ".join(short[la] for la in block.layers), ha="center", **style)
        channels, h, w = block.shape_out
        axes.text(x + wide - 0.06, y + tall / 2, f"{channels}, {h}×{w}", ha="right", **style)

    y = height - head
    for x, ha, name, (channels, h, w) in ((0, "left", "x → input_blocks", down[0].shape_in),
                                          (width, "right", "output_blocks → out", out.shape_out)):  # fmt: skip
        axes.text(x, y + 0.12, f"{name}   ({channels}, {h}×{w})", ha=ha, va="center", fontsize=8, color="0.35")
    for block in down:
        y -= row
        inset = step * sides.index(block.shape_out[-1])
        left, right = inset + wide, width - inset - wide  # where the line across begins and ends
        draw(block, inset, y)
        draw(up[block.name], right, y)
        _path(axes, [(left, y + tall / 2), (right, y + tall / 2)], str(block.shape_out[0]), dashed=True)
        if block is not down[-1]:
            _arrow(axes, (inset + 0.3, y), (inset + 0.3, y - row + tall))
            _arrow(axes, (width - inset - 0.3, y - row + tall), (width - inset - 0.3, y))
    draw(middle, (width - wide) / 2, y - row)
    _path(axes, [(inset + 0.3, y), (inset + 0.3, y - row + tall / 2), ((width - wide) / 2, y - row + tall / 2)])
    end = width - inset - 0.3
    _path(axes, [((width + wide) / 2, y - row + tall / 2), (end, y - row + tall / 2), (end, y)])
    return figure


def training_diagram() -> "Figure":
    """One training step of Stable Diffusion: three inputs, three networks (only the UNet is trained), and the loss."""
    return _static("training")[0]


def sampling_diagram() -> "Figure":
    """How Stable Diffusion draws: from a prompt and noise, through many calls of the UNet, to a picture."""
    return _static("sampling")[0]


def class_diagram() -> "Figure":
    """Which class contains which; under each name are its file in minisd and its file in CompVis's source."""
    figure, axes = _static("classes")
    w, h = 2.7, 0.5

    def box(x, y, name, here, there, fill, width=w):
        _box(axes, x, y, width, h, fill, "")
        axes.text(x + width / 2, y + 0.34, name, ha="center", va="center", fontsize=8, weight="bold")
        axes.text(x + width / 2, y + 0.14, f"{here}  |  {there}", ha="center", va="center", fontsize=6.8)

    box(2.95, 3.6, "LatentDiffusion", "latent_diffusion.py", "ddpm.py", "", 3.1)
    for i, column in enumerate(_read()["classes"]["columns"]):
        x = 0.1 + 3.05 * i
        for j, (name, here, there) in enumerate(column["classes"]):
            y = 2.4 - 0.62 * j
            box(x, y, name, here, there, column["fill"])
            if j:
                _arrow(axes, (x + 0.3, y + 0.62), (x + 0.3, y + h))
        _path(axes, [(3.3 + 1.2 * i, 3.6), (3.3 + 1.2 * i, 3.35), (x + w / 2, 3.35), (x + w / 2, 2.9)])
        axes.text(x + w / 2 + 0.06, 3.12, column["attribute"], fontsize=7.5, va="center")
    return figure


def _read() -> dict:
    return tomllib.loads(Path(__file__).with_suffix(".toml").read_text("utf-8"))


def _static(name: str) -> "tuple[Figure, Axes]":
    """A diagram of `diagrams.toml`."""
    diagram = _read()[name]
    figure, axes = _canvas(*diagram["size"])
    for box in diagram["boxes"]:
        _box(axes, *box)
    for line in diagram["lines"]:
        _path(axes, line["points"], line.get("label", ""))
    for x, y, place, text in diagram["texts"]:
        ha, va = place.split()
        axes.text(x, y, text, ha=ha, va=va, fontsize=7.5)
    return figure, axes


def _canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """A figure to draw on. Coordinates are inches from the lower left corner."""
    figure = empty_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: "Axes", x: float, y: float, w: float, h: float, fill: str, text: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": _FILLS[fill], "edgecolor": "0.3"}
    axes.add_patch(FancyBboxPatch((x, y), w, h, linewidth=1.8 if fill == "trained" else 0.8, **style))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8, linespacing=1.35)


def _arrow(axes: "Axes", start: Sequence[float], end: Sequence[float], dashed: bool = False) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "color": "0.25", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style | {"linestyle": "--" if dashed else "-"})


def _path(axes: "Axes", points: Sequence[Sequence[float]], label: str = "", dashed: bool = False) -> None:
    """An arrow through the points, with the label above its first segment."""
    for a, b in pairwise(points[:-1]):
        axes.plot(*zip(a, b, strict=True), color="0.25", linewidth=0.9, solid_capstyle="butt")
    _arrow(axes, points[-2], points[-1], dashed)
    (x0, y0), (x1, y1) = points[:2]
    rise = 0.05 if len(points) > 2 else 0.03
    axes.text((x0 + x1) / 2, (y0 + y1) / 2 + rise, label, ha="center", va="bottom", fontsize=7.5)
