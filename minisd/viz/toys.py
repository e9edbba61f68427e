"""One- and two-dimensional data, where a figure can show the whole distribution and every path through it."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .page import COLOURS, Axes, Figure, as_array, empty_figure, legend_below, name_axes, side_by_side, without_scale


def density_over_time(
    x_0: Float[Tensor, "n"],
    schedule,
    paths: Mapping[str, tuple[Sequence[int], Float[Tensor, "s k"]]] | None = None,
    width: float = 4.4,
    height: float = 2.9,
) -> Figure:
    """The density of q(x_t) for one-dimensional data, at all t. Darker means more probable.

    x_0: the data, all equally likely. schedule: a `NoiseSchedule`.
    paths: a panel for each {title: (timesteps, values)}, where values [s k] are k paths at those s timesteps. A path
        has the colour of the data point that is nearest to it at its smallest t.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    reach = 1.15 * max(2.8, x_0.abs().max().item())
    y = torch.linspace(-reach, reach, 301)
    # q(x_t) = 1/n Σ_i N(√ᾱ_t x_i, (1-ᾱ_t) I): a mixture with one Gaussian for each data point.
    mean = schedule.sqrt_alphas_cumprod[:, None, None] * x_0.float()  # [T 1 n]
    sigma = schedule.sqrt_one_minus_alphas_cumprod[:, None, None]  # [T 1 1]
    density = torch.distributions.Normal(mean, sigma).log_prob(y[:, None]).exp().mean(-1)  # [T y]

    paths = paths or {"": ((), torch.zeros(0, 0))}
    colour_of = {value: COLOURS[i % len(COLOURS)] for i, value in enumerate(x_0.unique().tolist())}
    figure, row = side_by_side(paths, width, height)
    for axes, title, (timesteps, values) in row:
        # Near t = 0 the density is a few narrow, high peaks. With them in the colour scale, the rest would be white.
        axes.imshow(
            density.T.numpy(),
            cmap=colormaps["Greys"].resampled(24),  # few tones, whose borders look like contour lines
            norm=PowerNorm(0.6, vmin=0, vmax=1.2),
            extent=(0, schedule.timesteps, -reach, reach),
            origin="lower",
            aspect="auto",
        )
        for path in values.T:
            end = path[int(as_array(timesteps).argmin())].item()
            nearest = min(colour_of, key=lambda value: abs(value - end))
            every = max(1, len(path) // 250)  # more points than pixels would only blur the line
            axes.plot(as_array(timesteps)[::every], as_array(path)[::every], color=colour_of[nearest], lw=0.8)
        name_axes(axes, title, "t", "$x_t$", upright=True)
    return figure


def clouds(
    panels: Mapping[str, Mapping[str, Float[Tensor, "_ 2"]]],
    behind: Float[Tensor, "n 2"] | None = None,
    columns: int | None = None,
    reach: float = 2.8,
    size: float = 1.45,
) -> Figure:
    """Scatter plots of two-dimensional points: {title of the panel: {name: points [n 2]}}.

    behind: the data, in grey in every panel. columns: panels in a row; by default all of them.
    reach: both axes go from -reach to reach; points outside are not visible. size: of a panel, in inches.
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for named in panels.values() for name in named))
    figure = empty_figure(columns * size, rows * (size + 0.22) + 0.28 * (len(names) > 1), layout="constrained")
    for axes, (title, named) in zip(_planes(figure, rows, columns, reach), panels.items(), strict=False):
        if behind is not None:
            axes.scatter(*as_array(behind).T, s=2, color="0.8", linewidths=0, antialiased=False)
        for name, points in named.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axes.scatter(*as_array(points).T, s=3, color=colour, linewidths=0, antialiased=False, label=name)
        axes.set_title(title, fontsize=8, pad=3)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    if len(names) > 1:
        # A panel may not have all names, so take the legend entry of each name from any panel that has it.
        handles = {label: h for a in figure.axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        legend_below(figure, [handles[name] for name in names], names, markerscale=3)
    return figure


def vector_field(
    panels: Mapping[str, tuple[Float[Tensor, "k 2"], Mapping[str, Float[Tensor, "k 2"]]]],
    behind: Mapping[str, Float[Tensor, "n 2"]] | None = None,
    longest: float = 2.0,
    spacing: float = 0.6,
) -> Figure:
    """Vector fields in the plane: {title of the panel: (places [k 2], {name: vectors [k 2]})}.

    The arrows of the first name are broad and pale, so that those of the second are visible on top where they agree.
    behind: {title: points [n 2]}, in grey. longest: a vector of this length is drawn as long as `spacing`. Longer
    vectors are drawn with the same length.
    """
    figure = empty_figure(len(panels) * 1.8, 2.3, layout="constrained")
    styles = [
        {"color": "#9ecae9", "width": 0.022, "headwidth": 2, "headlength": 1.5, "headaxislength": 1.5},
        {"color": COLOURS[1], "width": 0.008, "headwidth": 4, "headlength": 4, "headaxislength": 4},
    ]
    for axes, (title, (places, fields)) in zip(_planes(figure, 1, len(panels)), panels.items(), strict=True):
        if behind and title in behind:
            axes.scatter(*as_array(behind[title]).T, s=2, color="0.75", linewidths=0, antialiased=False)
        for (name, vectors), style in zip(fields.items(), styles, strict=False):
            length = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
            arrows = vectors / length * length.clamp(max=longest) * (spacing / longest)
            # These options draw a vector in the units of the axes.
            style = style | {"angles": "xy", "scale_units": "xy", "scale": 1, "minlength": 0.1, "label": name}
            axes.quiver(*as_array(places).T, *as_array(arrows).T, **style)
        axes.set_title(title, fontsize=9, pad=3)
    legend_below(figure, *figure.axes[0].get_legend_handles_labels())
    return figure


def _planes(figure: Figure, rows: int, columns: int, reach: float = 2.8) -> list[Axes]:
    """Square panels with both axes from -reach to reach, row by row, without ticks."""
    options = {"xlim": (-reach, reach), "ylim": (-reach, reach), "aspect": "equal"}
    panels = list(figure.subplots(rows, columns, squeeze=False, subplot_kw=options).ravel())
    for axes in panels:
        without_scale(axes)
    return panels


def walks(x_0: Float[Tensor, "n 2"], panels: Mapping[str, Float[Tensor, "s k 2"]]) -> Figure:
    """Paths in the plane: the data as grey points, and a panel for each {title: k paths of s points each}.

    A path begins at a small ring and ends at a disc. It has the same colour in all panels.
    """
    reach = 1.08 * max(points.abs().max().item() for points in (x_0, *panels.values()))  # the same in all panels
    figure, row = side_by_side(panels, width=2.6, height=2.7)
    data = as_array(x_0)
    for axes, _, paths in row:
        axes.scatter(data[:, 0], data[:, 1], s=9, color="0.72", linewidths=0, zorder=1)
        for k, path in enumerate(as_array(paths).swapaxes(0, 1)):
            colour = COLOURS[k % len(COLOURS)]
            markers = {"marker": ".", "markersize": 3} if len(path) <= 30 else {}  # more would run together
            axes.plot(path[:, 0], path[:, 1], color=colour, lw=0.7, zorder=2, **markers)
            axes.plot(*path[0], "o", color=colour, markersize=4, markerfacecolor="white", zorder=3)
            axes.plot(*path[-1], "o", color=colour, markersize=4.5, zorder=4)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    return figure
