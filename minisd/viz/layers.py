"""The inside of a network: channels of a latent or layer, attention maps, a two-dimensional latent space as a map."""

from collections.abc import Mapping, Sequence

from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from . import page
from .page import Figure


def maps(
    rows: Sequence[Float[Tensor, "_ h w"]] | Float[Tensor, "r n h w"],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    pictures: Sequence[Float[Tensor, "c _ _"]] | Float[Tensor, "r c _ _"] | None = None,
) -> Figure:
    """Numbers as colours: rows of maps [n h w], such as the channels of a latent. Each row has a colour bar.

    titles: one above each column; labels: one left of each row; pictures: for each row, the picture of its maps.
    If a row has negative numbers, it is blue below 0, white at 0 and red above. If not, larger numbers are darker.
    """
    before = 0 if pictures is None else 1  # a row's picture takes its first place
    titles = titles and [*[""] * before, *titles]
    figure, cells = page.grid([len(row) + before for row in rows], 0.96, titles, labels, scales=True)
    for i, row in enumerate(rows):
        if pictures is not None:
            page.show_picture(cells[i][0], pictures[i])
        *places, scale = cells[i][before:]
        for axes, values in zip(places, row, strict=True):
            image = axes.imshow(page.as_array(values), **page.shades(row), interpolation="nearest")
            axes.set(xticks=[], yticks=[])
        figure.colorbar(image, cax=scale).ax.tick_params(labelsize=6, length=2, pad=2)
    return figure


def feature_maps(layers: Mapping[str, Float[Tensor, "c h w"]], channels: int = 8, size: float = 0.86) -> Figure:
    """A row for each layer: the channels that vary most over the picture, blue below zero and red above.

    Each channel has its own colour scale, with white at zero. Its number and largest absolute value are below it.
    """
    counts = [min(channels, len(maps)) for maps in layers.values()]
    figure, cells = page.grid(counts, size, None, list(layers), below=0.2)
    for row, maps in zip(cells, layers.values(), strict=True):
        maps = maps.detach().float().cpu()
        for axes, channel in zip(row, maps.std((1, 2)).topk(len(row)).indices.tolist(), strict=True):
            largest = maps[channel].abs().max().item()
            axes.imshow(maps[channel].numpy(), cmap="RdBu_r", vmin=-largest, vmax=largest, interpolation="nearest")
            page.without_scale(axes)
            page.label_below(axes, f"#{channel}: {largest:.1f}", fontsize=6.5)
    return figure


def attention_maps(
    rows: Sequence[Float[Tensor, "n h w"]] | Float[Tensor, "r n h w"],
    picture: Float[Tensor, "c H W"] | Sequence[Float[Tensor, "c H W"]],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    size: float = 0.96,
) -> Figure:
    """Attention weights as colours over the grey picture: a column for each token, a row for each layer or step.

    rows: weights in [0, 1]. picture: one for all rows, or one for each, shown at its left.

    Each row has its own scale, from 0 (dark) to its largest weight (yellow). Below each map is its largest weight.
    """
    pictures = [picture] * len(rows) if isinstance(picture, Tensor) and picture.ndim == 3 else list(picture)
    titles = titles and ["", *titles]
    figure, cells = page.grid([1 + len(row) for row in rows], size, titles, labels, below=0.2)
    for (first, *others), row, shown in zip(cells, rows, pictures, strict=True):
        page.show_picture(first, shown)
        row = row.detach().float().cpu()
        grey = page.from_0_to_1(shown.detach().float().cpu().mean(0))
        h, w = grey.shape
        place = {"extent": (0, w, h, 0), "interpolation": "nearest"}
        for axes, weights in zip(others, row, strict=True):
            axes.imshow(grey.numpy(), cmap="Greys_r", vmin=0, vmax=1, **place)
            axes.imshow(weights.numpy(), cmap="viridis", vmin=0, vmax=max(row.max().item(), 1e-9), alpha=0.72, **place)
            page.without_scale(axes)
            page.label_below(axes, f"{weights.max():.2f}")
    return figure


def plane(
    panels: Mapping[str, tuple[Float[Tensor, "ny nx c h w"], tuple[float, float, float, float], Float[Tensor, "n 2"]]],
    width: float = 3.52,
) -> Figure:
    """A two-dimensional latent space as a map: {title: (pictures, (left, right, bottom, top), points)}.

    pictures: the decoded pictures at the points of a grid, row by row from the top. The four numbers are the positions
    of the grid's outermost points. points: the latents of the data, as dots; those outside the grid are left out.
    width: of a panel in inches; at 3.52, a pixel of 11 pictures of 16 pixels is 2 screen pixels wide.
    """
    left, top, below = 0.55, 0.25, 0.45  # inches, for the axes' numbers and the title
    height = max(width * p.shape[0] * p.shape[-2] / (p.shape[1] * p.shape[-1]) for p, _, _ in panels.values())
    figure = page.empty_figure(len(panels) * (left + width + 0.15), top + height + below)
    for i, (title, (pictures, (x0, x1, y0, y1), points)) in enumerate(panels.items()):
        axes = page.place(figure, i * (left + width + 0.15) + left, below, width, height)
        axes.tick_params(labelsize=7)
        ny, nx = pictures.shape[:2]
        half_x, half_y = (x1 - x0) / (nx - 1) / 2, (y1 - y0) / (ny - 1) / 2  # half the size of a picture
        mosaic = rearrange(page.from_0_to_1(pictures), "y x c h w -> (y h) (x w) c")
        extent = (x0 - half_x, x1 + half_x, y0 - half_y, y1 + half_y)
        axes.imshow(mosaic.numpy(), extent=extent, aspect="auto", interpolation="nearest")
        xs, ys = page.as_array(points).T
        axes.plot(xs, ys, "o", color=page.COLOURS[0], markersize=4, markeredgecolor="white", markeredgewidth=0.8)
        axes.set(xlim=extent[:2], ylim=extent[2:])
        page.name_axes(axes, title, "$z_1$", "$z_2$", upright=True)
    return figure
