"""Plots of numbers: curves against t, histograms, error against cost, and the timesteps that a sampler visits."""

from collections.abc import Mapping, Sequence
from math import sqrt

import numpy as np
import torch
from torch import Tensor

from .page import COLOURS, Figure, as_array, legend_below, line_style, side_by_side


def curves(
    panels: Mapping[str, Mapping[str, tuple]],
    xlabel: str = "t",
    ylabel: str = "",
    log: Sequence[str] = (),
    exact: Mapping[str, tuple] | None = None,
    exact_label: str = "the best possible",
    width: float = 3.1,
    height: float = 2.5,
) -> Figure:
    """Panels side by side: {title of the panel: {name of the line: (x, y)}}.

    log: the titles of the panels whose y axis is logarithmic.
    exact: {title: (x, y)}, in black, such as the loss of the best possible model (`minisd.ExactDenoiser`).
    """
    figure, row = side_by_side(panels, width, height, xlabel, ylabel)
    named = []  # the lines in the last legend; a panel with the same lines needs no legend
    for axes, title, lines in row:
        for i, (name, (x, y)) in enumerate(lines.items()):
            axes.plot(as_array(x), as_array(y), label=name, linewidth=1.6, **line_style(i))
        if exact and title in exact:
            axes.plot(*map(as_array, exact[title]), color="black", linewidth=1.1, label=exact_label)
        _, names = axes.get_legend_handles_labels()
        if names and names != named:
            axes.legend(frameon=False, fontsize=8, handlelength=2.6)
            named = names
        if title in log:
            axes.set_yscale("log")
    return figure


def schedule_curves(schedules: Mapping[str, object]) -> Figure:
    """β_t, ᾱ_t and the log of the signal-to-noise ratio, for each {name: NoiseSchedule}."""
    betas, alphas_cumprod, log_snr = {}, {}, {}
    for name, schedule in schedules.items():
        t = torch.arange(schedule.timesteps)
        betas[name] = t, schedule.betas
        alphas_cumprod[name] = t, schedule.alphas_cumprod
        log_snr[name] = t, schedule.log_snr(t)
    noise = r"noise added in a step:  $\beta_t$"  # on a logarithmic axis, because β covers four orders of magnitude
    signal = r"signal that is left:  $\bar\alpha_t$"
    ratio = r"log SNR:  $\log\,\bar\alpha_t / (1-\bar\alpha_t)$"
    return curves({noise: betas, signal: alphas_cumprod, ratio: log_snr}, log=[noise])


def histograms(
    panels: Mapping[str, Mapping[str, Tensor]],
    gaussians: Mapping[str, tuple[float, float]] | None = None,
    gaussian_label: str = "exact",
    bins: int = 60,
    width: float = 2.5,
    height: float = 2.1,
) -> Figure:
    """Histograms of samples: {title of the panel: {name: samples [n]}}, as densities with a common x axis.

    gaussians: {title: (mean, variance)}: the distribution that the samples should follow, in black.
    """
    figure, row = side_by_side(panels, width, height, sharex=True)
    for axes, title, samples in row:
        # Each panel has its own bins, because bins for a wide distribution are too coarse for a narrow one.
        together = torch.cat([x.detach().flatten().float().cpu() for x in samples.values()])
        edges = torch.linspace(together.min(), together.max(), bins + 1)
        for i, (name, x) in enumerate(samples.items()):
            # The first histogram is filled and the others are outlines, so that you can see both where they agree.
            style = {"histtype": "step", "lw": 1.3} if i else {"histtype": "stepfilled", "alpha": 0.35}
            style["color"] = COLOURS[i % len(COLOURS)]
            axes.hist(as_array(x).ravel(), edges.numpy(), density=True, label=name, **style)
        if gaussians and title in gaussians:
            mean, variance = gaussians[title]
            x = mean + sqrt(variance) * torch.linspace(-4, 4, 161)
            density = torch.exp(-((x - mean) ** 2) / (2 * variance)) / sqrt(2 * torch.pi * variance)
            axes.plot(x.numpy(), density.numpy(), color="black", lw=1, ls="--", label=gaussian_label)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    legend_below(figure, *figure.axes[0].get_legend_handles_labels())
    return figure


def convergence(
    panels: Mapping[str, Mapping[str, tuple]],
    slopes: Sequence[int] = (1, 2),
    ylabel: str = "error",
) -> Figure:
    """Error against cost, both axes logarithmic: {title of the panel: {name of the line: (calls, errors)}}.

    slopes: orders p for comparison, as grey lines. Along such a line, twice the calls reduce the error to 1/2^p.
    """
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = curves(panels, "calls of the model", ylabel, log=list(panels), width=3.8, height=3.1)
    for axes in figure.axes:
        for line, marker in zip(axes.lines, "os^Dv*", strict=False):
            line.set(marker=marker, markersize=4, linewidth=1.2)
        points = np.concatenate([line.get_xydata() for line in axes.lines]).astype(float)
        (fewest, bottom), (most, top) = points.min(axis=0), points.max(axis=0)
        for p in slopes:
            # Start each line at the upper left corner of the data, and do not let it go below the data.
            end = min(most, fewest * (top / bottom) ** (1 / p))
            low = top * (end / fewest) ** -p
            axes.plot([fewest, end], [top, low], color="0.75", lw=1, zorder=1)
            axes.text(end, low, f" slope {p}", color="0.45", fontsize=7, va="center")
        axes.set_xscale("log")
        axes.set_xticks([n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if fewest <= n <= most])
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
    figure.axes[0].legend(frameon=False, fontsize=8, loc="lower left")  # again, now that the lines have markers
    return figure


def ruler(rows: Mapping[str, tuple[Sequence[int], str]], T: int = 1000, width: float = 8.0) -> Figure:
    """Which timesteps are visited, from T - 1 down to 0: {label: (timesteps, text at the end of the line)}."""
    figure, [(axes, *_)] = side_by_side({"": rows}, width, 0.62 * len(rows) + 0.45, "t")
    for i, (timesteps, end) in enumerate(rows.values()):
        y = len(rows) - 1 - i
        axes.plot([T - 1, 0], [y, y], color="0.8", lw=1, zorder=1)
        axes.scatter(list(timesteps), [y] * len(timesteps), s=22, color=COLOURS[i % len(COLOURS)], zorder=2)
        for t in timesteps if len(timesteps) <= 12 else (timesteps[0], timesteps[-1]):
            axes.annotate(str(t), (t, y), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        axes.text(-0.03 * T, y, end, va="center", fontsize=8)
    axes.set(xlim=(1.03 * T, -0.16 * T), ylim=(-0.4, len(rows) - 0.4))
    axes.set_yticks(range(len(rows)), list(rows)[::-1], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xticks([*range(0, T, T // 5), T - 1])
    return figure


def with_errors(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    values: Sequence[str],
    xlabel: str = "",
    ylabel: str = "",
    lines: bool = True,
    marks: Sequence[float] = (),
) -> Figure:
    """Numbers with error bars: {title of the panel: {name: (number, error) for each of the values}}.

    values: the labels of the x axis, evenly spaced. lines: whether to connect the points; only useful if the values
    have an order. marks: the heights of grey lines across all panels.
    """
    width = 0.8 / len(panels) + max(1.9, 0.55 * len(values))  # of a panel, including its share of the ylabel
    figure, row = side_by_side(panels, width, 2.9, xlabel, ylabel)
    for axes, _, named in row:
        for i, (name, numbers) in enumerate(named.items()):
            x = torch.arange(len(values)) + 0.12 * (i - (len(named) - 1) / 2)  # so that error bars don't overlap
            y, error = torch.tensor(numbers, dtype=torch.float).T
            style = line_style(i) | {"marker": "o", "markersize": 3.5, "linewidth": 1.2, "capsize": 2}
            style |= {} if lines else {"linestyle": "none"}
            axes.errorbar(as_array(x), as_array(y), as_array(error), label=name, **style)
        for height in marks:
            axes.axhline(height, color="0.8", lw=0.8, zorder=0)
        axes.set_xticks(range(len(values)), values, rotation=30, ha="right")
        if any(named):
            axes.legend(frameon=False, fontsize=7)
    return figure
