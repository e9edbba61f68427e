"""What is inside: channels of a latent or of a layer, where the pixels look, a latent of two numbers as a map."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .page import COLOURS, as_array, empty_figure, show_picture, without_scale

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def maps(
    rows: Sequence[Float[Tensor, "_ h w"]] | Float[Tensor, "r n h w"],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    pictures: Sequence[Float[Tensor, "c _ _"]] | Float[Tensor, "r c _ _"] | None = None,
    size: float = 0.96,
) -> "Figure":
    """Numbers as colours: rows of maps [n h w], such as the channels of a latent. Each row has a scale, at its right.

    titles: one above each column; labels: one left of each row; pictures: one before each row, what its maps are of.
    A row with negative numbers is blue below 0, white at 0 and red above it; one without is the darker, the larger.
    """
    columns = max(len(row) for row in rows) + (pictures is not None)
    left = 0.075 * max((len(line) for label in labels or () for line in label.split("\n")), default=0) + 0.05
    top, right = 0.22 if titles else 0.05, 0.55
    width = left + columns * (size + 0.05) + right
    height = top + len(rows) * (size + 0.05)

    figure = empty_figure(width, height)
    for i, row in enumerate(rows):
        y = height - top - (i + 1) * (size + 0.05) + 0.05

        def place(x: float, w: float = size, y: float = y):
            return figure.add_axes((x / width, y / height, w / width, size / height))

        x = left
        first = None
        if pictures is not None:
            first = place(x)
            show_picture(first, pictures[i])
            x += size + 0.05
        reach, signed = row.abs().max().item() or 1.0, bool((row < 0).any())
        for j, values in enumerate(row):
            axes = place(x)
            image = axes.imshow(
                as_array(values), cmap="RdBu_r" if signed else "Blues", vmin=-reach if signed else 0, vmax=reach,
                interpolation="nearest",
            )  # fmt: skip
            axes.set_xticks([])
            axes.set_yticks([])
            if titles and i == 0:
                axes.set_title(titles[j], fontsize=8, pad=3)
            first = first or axes
            x += size + 0.05
        scale = place(x + 0.03, 0.08)
        figure.colorbar(image, cax=scale).ax.tick_params(labelsize=6, length=2, pad=2)
        if labels:
            first.text(-0.06, 0.5, labels[i], transform=first.transAxes, ha="right", va="center", fontsize=8)
    return figure


def feature_maps(layers: Mapping[str, Float[Tensor, "c h w"]], channels: int = 8, size: float = 0.86) -> "Figure":
    """A row for each layer: the channels that vary most over the picture, blue below zero and red above it.

    Each channel has a scale of its own, white at zero. Under it: its number, and its largest value without the sign.
    """
    left = 0.075 * max(len(line) for name in layers for line in name.split("\n")) + 0.05
    width, height = left + channels * (size + 0.06), len(layers) * (size + 0.2)
    figure = empty_figure(width, height)
    for i, (name, maps) in enumerate(layers.items()):
        maps = maps.detach().float().cpu()
        for j, channel in enumerate(maps.std((1, 2)).topk(min(channels, len(maps))).indices.tolist()):
            x, y = left + j * (size + 0.06), height - (i + 1) * (size + 0.2) + 0.18
            axes = figure.add_axes((x / width, y / height, size / width, size / height))
            largest = maps[channel].abs().max().item()
            axes.imshow(maps[channel].numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
            without_scale(axes)
            axes.text(0.5, -0.04, f"#{channel}: {largest:.1f}", transform=axes.transAxes, ha="center", va="top",
                      fontsize=6.5)  # fmt: skip
            if j == 0:
                axes.text(-0.06, 0.5, name, transform=axes.transAxes, ha="right", va="center", fontsize=8)
    return figure


def attention_maps(
    rows: Sequence[Float[Tensor, "n h w"]] | Float[Tensor, "r n h w"],
    picture: Float[Tensor, "c H W"] | Sequence[Float[Tensor, "c H W"]],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    size: float = 0.96,
) -> "Figure":
    """Where the pixels look, as colours over the picture in grey: a column for each token, a row for a layer or step.

    rows: weights in [0, 1]. picture: one for all rows, or one for each, shown in front of it.

    The scale is a row's own, from 0 (dark) to the row's largest weight (yellow), and under each map stands its largest.
    """
    pictures = [picture] * len(rows) if isinstance(picture, Tensor) and picture.ndim == 3 else list(picture)
    columns = 1 + max(len(row) for row in rows)
    left = 0.075 * max((len(line) for label in labels or () for line in label.split("\n")), default=0) + 0.05
    top, below = 0.22 if titles else 0.05, 0.2
    width, height = left + columns * (size + 0.05), top + len(rows) * (size + below)
    figure = empty_figure(width, height)
    for i, (row, shown) in enumerate(zip(rows, pictures, strict=True)):
        row = row.detach().float().cpu()
        y = height - top - i * (size + below) - size
        grey = (shown.detach().float().cpu().mean(0).clamp(-1, 1) + 1) / 2
        for j in range(len(row) + 1):
            x = left + j * (size + 0.05)
            axes = figure.add_axes((x / width, y / height, size / width, size / height))
            if j == 0:
                show_picture(axes, shown)
                if labels:
                    axes.text(-0.06, 0.5, labels[i], transform=axes.transAxes, ha="right", va="center", fontsize=8)
                continue
            h, w = grey.shape
            axes.imshow(grey.numpy(), cmap="Greys_r", vmin=0, vmax=1, extent=(0, w, h, 0), interpolation="nearest")
            axes.imshow(row[j - 1].numpy(), cmap="viridis", vmin=0, vmax=max(row.max().item(), 1e-9), alpha=0.72,
                        extent=(0, w, h, 0), interpolation="nearest")  # fmt: skip
            without_scale(axes)
            most = f"{row[j - 1].max():.2f}"
            axes.text(0.5, -0.04, most, transform=axes.transAxes, ha="center", va="top", fontsize=7)
            if titles and i == 0:
                axes.set_title(titles[j - 1], fontsize=8, pad=3)
    return figure


def plane(
    panels: Mapping[str, tuple[Float[Tensor, "ny nx c h w"], tuple[float, float, float, float], Float[Tensor, "n 2"]]],
    width: float = 3.52,
) -> "Figure":
    """A latent of two numbers, as a map: {title: (pictures, (left, right, bottom, top), points)}.

    pictures: what is drawn at the places of a grid, row by row from the top; the grid's outermost places are the four
    numbers. points: where the data lie, as dots; those beyond the grid are left out.
    width: of a panel in inches; at 3.52, a pixel of 11 pictures of 16 pixels is 2 of the screen's.
    """
    left, top, below = 0.55, 0.25, 0.45  # inches, for the axes' numbers and the title
    height = max(width * p.shape[0] * p.shape[-2] / (p.shape[1] * p.shape[-1]) for p, _, _ in panels.values())
    figure = empty_figure(len(panels) * (left + width + 0.15), top + height + below)
    for i, (title, (pictures, (x0, x1, y0, y1), points)) in enumerate(panels.items()):
        place = (i * (left + width + 0.15) + left, below, width, height)
        size = (*figure.get_size_inches(), *figure.get_size_inches())
        axes = figure.add_axes(tuple(a / b for a, b in zip(place, size, strict=True)))
        axes.tick_params(labelsize=7)
        ny, nx = pictures.shape[:2]
        half_x, half_y = (x1 - x0) / (nx - 1) / 2, (y1 - y0) / (ny - 1) / 2  # of what one picture covers
        mosaic = rearrange((pictures.detach().float().cpu().clamp(-1, 1) + 1) / 2, "y x c h w -> (y h) (x w) c")
        extent = (x0 - half_x, x1 + half_x, y0 - half_y, y1 + half_y)
        axes.imshow(mosaic.numpy(), extent=extent, aspect="auto", interpolation="nearest")
        xs, ys = as_array(points).T
        axes.plot(xs, ys, "o", color=COLOURS[0], markersize=4, markeredgecolor="white", markeredgewidth=0.8)
        axes.set_xlim(extent[:2])
        axes.set_ylim(extent[2:])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("$z_1$", fontsize=8)
        axes.set_ylabel("$z_2$", fontsize=8, rotation=0)
    return figure
