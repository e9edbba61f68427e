"""What all figures have in common: the page, its panels, a picture on it, and the colours.

Colours are those of Okabe & Ito (2008), which nearly everybody can tell apart.
"""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In the order in which lines take them. Black is left for axes and for what is known exactly.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))  # so that lines differ in grey print, too


def empty_figure(width: float, height: float, layout: str | None = None) -> "Figure":
    """An empty figure of that many inches."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), dpi=100, layout=layout)
    # Closed, it is still a figure. Left open, a notebook would draw it twice: when a cell ends, it draws what is open.
    plt.close(figure)
    return figure


def side_by_side(figure: "Figure", count: int, **options) -> "list[Axes]":
    """Axes side by side, without the frame's upper right half."""
    panels = list(figure.subplots(1, count, squeeze=False, **options)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(which="both", labelsize=7)  # "both": a logarithmic axis writes at its minor ticks, too
    return panels


def without_scale(axes: "Axes") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.8")


def show_picture(axes: "Axes", picture: Float[Tensor, "c h w"]) -> None:
    """A picture in [-1, 1] (clamped), without a scale; each pixel a square."""
    if picture.shape[0] not in (1, 3):
        shape = list(picture.shape)
        raise ValueError(f"a picture has 1 channel or 3, but this has the shape {shape}: decode a latent first.")
    pixels = (picture.detach().float().cpu().clamp(-1, 1) + 1) / 2
    pixels = rearrange(pixels.expand(3, -1, -1), "c h w -> h w c").numpy()
    axes.imshow(pixels, interpolation="nearest")  # the default would blur what is drawn a little larger than it is
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.8")


def as_array(x):
    """What matplotlib plots, from a tensor or a list."""
    return x.detach().float().cpu().numpy() if isinstance(x, Tensor) else torch.as_tensor(x).float().numpy()
