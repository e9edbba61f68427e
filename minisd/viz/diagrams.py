"""The model as boxes: the UNet's blocks, drawn from its outline, and diagrams that are SVG files of this folder."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from .page import Axes, Figure, empty_figure

STAGES = ["noising", "loss", "unet", "vae", "clip", "sampling", "latent_diffusion"]  # modules, as they are taught


@dataclass(frozen=True)
class Diagram:
    """An SVG file of this folder. A notebook shows it as a picture."""

    name: str
    lit: str = ""  # the stage that is not pale, in a file whose parts are

    def _repr_svg_(self) -> str:
        svg = Path(__file__).with_name(f"{self.name}.svg").read_text("utf-8")
        # A part is a group of the form <g opacity="0.4" class="unet sampling">, with all stages that it belongs to.
        return re.sub(rf'opacity="0.4" (?=class="[^"]*\b{self.lit}\b)', 'stroke-width="2.5" ', svg)


def pipeline(stage: str) -> Diagram:
    """The whole pipeline, for training and for drawing, in which all parts are pale except for those of one stage.

    stage: the name of its module, such as "unet". With "latent_diffusion", which joins all stages, nothing is pale.
    """
    return Diagram("pipeline", _known(stage, STAGES, "stage"))


def diagram(name: str) -> Diagram:
    """One idea as a drawing.

    name: "chain", "res_block", "spatial_transformer", "heads", "autoencoder", "ddim_step" or "guidance".
    """
    return Diagram(_known(name, sorted(file.stem for file in Path(__file__).parent.glob("*.svg")), "diagram"))


def _known(name: str, names: Sequence[str], kind: str) -> str:
    if name not in names:
        raise ValueError(f"there is no {kind} {name!r}: choose one of {', '.join(names)}")
    return name


def training_diagram() -> Diagram:
    """One training step of Stable Diffusion: three inputs, three networks (only the UNet is trained), and the loss."""
    return Diagram("training")


def sampling_diagram() -> Diagram:
    """How Stable Diffusion draws: from a prompt and noise, through many calls of the UNet, to a picture."""
    return Diagram("sampling")


def class_diagram() -> Diagram:
    """Which class contains which, with the file of each in minisd and in CompVis's source."""
    return Diagram("classes")


def unet_diagram(blocks: Sequence, title: str = "") -> Figure:
    """The U: the way down on the left, the way up on the right, and the skip connections as dashed lines between them.

    blocks: what `minisd.instruments.unet_outline.outline` returns. A box names the layers of a block, and the channels
    and size of its output. Blocks with attention are blue. The number on a dashed line says how many channels are
    concatenated to those from below.
    """
    from matplotlib.patches import FancyBboxPatch

    down = [block for block in blocks if block.name.startswith("input_blocks")]
    up = {block.skip: block for block in blocks if block.skip}
    middle, out = ([b for b in blocks if b.name == name][0] for name in ("middle_block", "out"))
    sides = sorted({block.shape_out[-1] for block in down}, reverse=True)  # of the maps, the largest first
    row, tall, wide, step = 0.34, 0.27, 2.85, 0.14  # inches; each level stands a step further in
    width, head = 2 * wide + 1.7, 0.5 if title else 0.3
    height = head + row * (len(down) + 1)
    figure = empty_figure(width, height)
    # The axes fill the figure, in inches from the lower left corner, and are invisible.
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height), frame_on=False, xticks=[], yticks=[])
    axes.text(width / 2, height - 0.15, title, ha="center", va="center", fontsize=9)
    short = {"Conv2d": "conv", "ResBlock": "Res", "SpatialTransformer": "Transformer", "AttentionBlock": "Attention",
             "Downsample": "Down", "Upsample": "Up"}  # fmt: skip

    def box(block, x: float, y: float) -> None:
        attends = {"SpatialTransformer", "AttentionBlock"} & set(block.layers)
        # Pale colours, so that black letters are easy to read.
        style = {"facecolor": "#D3E6F3" if attends else "#F0F0F0", "edgecolor": "0.3", "linewidth": 0.8}
        axes.add_patch(FancyBboxPatch((x, y), wide, tall, "round,pad=0,rounding_size=0.06", **style))
        place = block.name.split(".")[1] if "." in block.name else "middle"
        style = {"va": "center", "fontsize": 8}
        axes.text(x + 0.06, y + tall / 2, place, color="0.35", **style)
        axes.text(x + wide / 2 - 0.15, y + tall / 2, " + ".join(short[la] for la in block.layers), ha="center", **style)
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
        box(block, inset, y)
        box(up[block.name], right, y)
        _arrow(axes, (left, y + tall / 2), (right, y + tall / 2), dashed=True)
        axes.text((left + right) / 2, y + tall / 2 + 0.03, block.shape_out[0], ha="center", va="bottom", fontsize=8)
        if block is not down[-1]:
            _arrow(axes, (inset + 0.3, y), (inset + 0.3, y - row + tall))
            _arrow(axes, (width - inset - 0.3, y - row + tall), (width - inset - 0.3, y))
    box(middle, (width - wide) / 2, y - row)
    _arrow(axes, (inset + 0.3, y), (inset + 0.3, y - row + tall / 2), ((width - wide) / 2, y - row + tall / 2))
    end = width - inset - 0.3
    _arrow(axes, ((width + wide) / 2, y - row + tall / 2), (end, y - row + tall / 2), (end, y))
    return figure


def _arrow(axes: Axes, *points: Sequence[float], dashed: bool = False) -> None:
    """An arrow through the points."""
    axes.plot(*zip(*points[:-1], strict=True), color="0.25", linewidth=0.9, solid_capstyle="butt")
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "color": "0.25", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", points[-1], points[-2], arrowprops=style | {"linestyle": "--" if dashed else "-"})
