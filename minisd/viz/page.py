"""What all figures have in common: an empty figure, its panels, a picture in a panel, and the colours.

The colours are those of Okabe & Ito (2008), which people with colour blindness can also distinguish.
"""

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
else:
    Axes = Figure = Any  # the names alone, because matplotlib takes long to import

# In the order in which lines use them. Black is reserved for axes and for exact results.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))  # so that lines also differ in a grey print


def empty_figure(width: float, height: float, layout: str | None = None) -> Figure:
    """An empty figure; width and height are in inches."""
    import matplotlib.pyplot as plt

    plt.rcParams["svg.hashsalt"] = "minisd"  # so that the same figure is the same SVG, and not one with other ids
    figure = plt.figure(figsize=(width, height), dpi=100, layout=layout)
    # A closed figure can still be changed. A notebook would show an open one twice, because it shows all open figures
    # at the end of a cell.
    plt.close(figure)
    # Where a notebook would show figures as PNG, let it show them by `sharp`.
    shell = sys.modules["IPython"].get_ipython() if "IPython" in sys.modules else None
    if shell and shell.display_formatter.formatters["image/png"].pop(type(figure), None):
        shell.display_formatter.mimebundle_formatter.for_type(type(figure), sharp)
    return figure


def sharp(figure: Figure) -> tuple[dict, dict]:
    """What a notebook shows, with its metadata: lines and text as SVG, and a figure with pictures as PNG.

    The PNG has twice the resolution of the page. So does one of very many points, of which an SVG would be large.
    """
    from IPython.core.pylabtools import print_figure, retina_figure

    svg = print_figure(figure, "svg", metadata={"Date": None})
    if "<image" not in svg and len(svg) < 100_000:
        return {"image/svg+xml": svg}, {}
    png, size = retina_figure(figure)
    return {"image/png": png}, {"image/png": {"width": size["width"]}}  # no height: a phone shows it narrower


def place(figure: Figure, x: float, y: float, width: float, height: float) -> Axes:
    """Axes at a position in inches from the lower left. So the size of a picture does not depend on its labels."""
    whole_width, whole_height = figure.get_size_inches()
    return figure.add_axes((x / whole_width, y / whole_height, width / whole_width, height / whole_height))


def side_by_side(
    panels: Mapping, width: float, height: float, xlabel: str = "", ylabel: str = "", **options
) -> tuple[Figure, list[tuple[Axes, str, object]]]:
    """A figure with a row of panels, and for each panel: its axes, title and content.

    Each panel is `width` inches wide, or less if the row would be wider than a page.

    The panels have no upper and right frame lines. xlabel: below each panel; ylabel: left of the first.
    """
    # A page is about 7.4 inches wide. What is wider would be shown smaller, with letters too small to read.
    figure = empty_figure(min(width * len(panels), 7.4), height, layout="constrained")
    row = list(figure.subplots(1, len(panels), squeeze=False, **options)[0])
    for axes, title in zip(row, panels, strict=True):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=8)  # "both": a logarithmic axis also has labels at minor ticks
        name_axes(axes, title, xlabel, ylabel if axes is row[0] else "")
    return figure, list(zip(row, panels.keys(), panels.values(), strict=True))


def without_scale(axes: Axes) -> None:
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_color("0.8")


def grid(
    counts: Sequence[int],
    size: float,
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    heights: Sequence[float] | None = None,
    below: Sequence[float] | float = 0.05,
    scales: bool = False,
) -> tuple[Figure, list[list[Axes]]]:
    """A figure with rows of axes. `counts` gives the number of axes in each row; each is `size` inches wide.

    titles: one above each column; labels: one left of each row; heights: of the rows, if the axes are not square;
    below: the space below each row.
    scales: add narrow axes at the end of each row, for a colour bar.
    """
    heights = heights or [size] * len(counts)
    below = [below] * len(counts) if isinstance(below, float) else below
    gap = 0.05  # between columns
    top = 0.22 + 0.13 * max(title.count("\n") for title in titles) if titles else 0.05
    left = 0.075 * max((len(line) for label in labels or () for line in label.split("\n")), default=0) + 0.05
    figure = empty_figure(left + max(counts) * (size + gap) + 0.55 * scales, top + sum(heights) + sum(below))
    rows, y = [], figure.get_size_inches()[1] - top
    for i, count in enumerate(counts):
        y -= heights[i]
        rows.append([place(figure, left + j * (size + gap), y, size, heights[i]) for j in range(count)])
        if scales:
            rows[i].append(place(figure, left + count * (size + gap) + 0.03, y, 0.08, heights[i]))
        y -= below[i]
        if labels:
            rows[i][0].text(-0.06, 0.5, labels[i], transform=rows[i][0].transAxes, ha="right", va="center", fontsize=8)
    for axes, title in zip(rows[0], titles or (), strict=False):
        axes.set_title(title, fontsize=8, pad=3)
    return figure, rows


def line_style(i: int) -> dict:
    """The colour and dash pattern of the i-th line in a panel."""
    return {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)]}


def label_below(axes: Axes, text: str, fontsize: float = 7, gap: float = 0.04) -> None:
    axes.text(0.5, -gap, text, transform=axes.transAxes, ha="center", va="top", fontsize=fontsize)


def name_axes(axes: Axes, title: str, xlabel: str = "", ylabel: str = "", upright: bool = False) -> None:
    """Set the title and the labels of the axes. upright: do not rotate the ylabel (for a symbol)."""
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.set_ylabel(ylabel, fontsize=9, rotation=0 if upright else 90)


def legend_below(figure: Figure, handles: Sequence, labels: Sequence[str], **options) -> None:
    """One legend for all panels, below them."""
    style = {"loc": "outside lower center", "ncols": 4, "frameon": False, "fontsize": 8}
    figure.legend(handles, labels, **style, **options)


def show_picture(axes: Axes, picture: Float[Tensor, "c h w"]) -> None:
    """Show a picture in [-1, 1] (clamped), without ticks; each pixel is a square."""
    if picture.shape[0] not in (1, 3):
        shape = list(picture.shape)
        raise ValueError(f"a picture has 1 channel or 3, but this has the shape {shape}: decode a latent first.")
    pixels = rearrange(from_0_to_1(picture).expand(3, -1, -1), "c h w -> h w c").numpy()
    axes.imshow(pixels, interpolation="nearest")  # the default would blur a slightly enlarged picture
    without_scale(axes)


def from_0_to_1(pictures: Float[Tensor, "..."]) -> Float[Tensor, "..."]:
    """Convert pictures in [-1, 1] (clamped) to [0, 1], as matplotlib needs them."""
    return (pictures.detach().float().cpu().clamp(-1, 1) + 1) / 2


def as_array(x):
    """Convert a tensor or a list to an array that matplotlib can plot."""
    return x.detach().float().cpu().numpy() if isinstance(x, Tensor) else torch.as_tensor(x).float().numpy()


def shades(values: Float[Tensor, "..."]) -> dict:
    """Options of `imshow`: blue below 0, white at 0, red above. Without negative numbers, from white to blue."""
    reach, signed = values.nan_to_num().abs().max().item() or 1.0, bool((values < 0).any())
    return {"cmap": "RdBu_r" if signed else "Blues", "vmin": -reach if signed else 0, "vmax": reach}
