"""Every picture that a notebook or a command draws. Takes tensors and trajectories, never a model.

    to_pil, sheet, save_sheet       pictures as files, pixel by pixel
    strip                           pictures side by side, with titles and labels
    noising_strip                   pictures dissolve into noise, under one schedule or several
    trajectory                      what a sampler did: x_t and the x_0 that it had in mind, step by step
    curves, schedule_curves         numbers against t
    histograms                      samples, against the Gaussian that they should follow
    density_over_time               a 1-D toy: the density of q(x_t), and the paths through it
    plane, pursuit                  a 2-D toy and the paths to it; steps beside the curve that they should follow
    convergence, ruler              the error of samplers over what they cost; the timesteps that they visit

Those from `strip` on return a matplotlib Figure. A notebook shows it if it stands in a cell's last line; a script
says `figure.savefig("figure.png")`. Pictures are [c h w] in [-1, 1], RGB or (c = 1) grey; what lies outside is clamped.

Colours are those of Okabe & Ito (2008), which nearly everybody can tell apart.
"""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from einops import rearrange
from jaxtyping import Float
from PIL import Image
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# In the order in which lines take them. Black is left for axes and for what is known exactly.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))  # so that lines differ in grey print, too


# -- pictures as files, pixel by pixel ----------------------------------------------------------------------


def to_pil(x: Float[Tensor, "b 3 h w"]) -> list[Image.Image]:
    """Pictures in [-1, 1] (clamped) → PIL images."""
    pixels = ((x.detach().float().cpu().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)
    return [Image.fromarray(p) for p in rearrange(pixels, "b c h w -> b h w c").numpy()]


def sheet(images: list[Image.Image], columns: int | None = None, gap: int = 2, scale: int = 1) -> Image.Image:
    """Images of one size side by side, on white, row by row. `scale` enlarges each pixel to a square."""
    columns = columns or len(images)
    width, height = (scale * n for n in images[0].size)
    rows = -(-len(images) // columns)
    page = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + gap) - gap), "white")
    for i, image in enumerate(images):
        row, column = divmod(i, columns)
        page.paste(image.resize((width, height), Image.NEAREST), (column * (width + gap), row * (height + gap)))
    return page


def save_sheet(x: Float[Tensor, "b 3 h w"], path: str | Path, columns: int, scale: int = 2) -> None:
    """Write a sheet of pictures in [-1, 1] as PNG, making the folder if need be."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    sheet(to_pil(x), columns, scale=scale).save(path)


# -- pictures side by side ----------------------------------------------------------------------------------


def strip(
    rows: Sequence[Float[Tensor, "_ c _ _"]] | Float[Tensor, "r n c h w"],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
    size: float = 0.96,
) -> "Figure":
    """Rows of pictures in [-1, 1], each row [n c h w]; rows may differ in length and in size.

    titles: one above each column; labels: one left of each row; notes: for each row, one under each picture, or [].
    size: of a picture, in inches; at 0.96, a pixel of a 32-pixel picture is 3 of the screen's.
    """
    columns = max(len(row) for row in rows)
    heights = [row.shape[-2] / row.shape[-1] for row in rows]
    # What a label needs, in inches: matplotlib places axes in shares of the figure, and the pictures are to
    # come out at one size however long a label is.
    left = 0.075 * max((len(line) for label in labels or () for line in label.split("\n")), default=0) + 0.05
    top = 0.22 if titles else 0.05
    below = [0.2 if notes and notes[i] else 0.05 for i in range(len(rows))]
    width = left + columns * (size + 0.05)
    height = top + size * sum(heights) + sum(below)

    figure = _figure(width, height)
    y = height - top
    for i, row in enumerate(rows):
        y -= heights[i] * size
        for j, picture in enumerate(row):
            x = left + j * (size + 0.05)
            axes = figure.add_axes((x / width, y / height, size / width, heights[i] * size / height))
            _picture(axes, picture)
            if titles and i == 0 and j < len(titles):
                axes.set_title(titles[j], fontsize=8, pad=3)
            if labels and j == 0:
                axes.text(-0.06, 0.5, labels[i], transform=axes.transAxes, ha="right", va="center", fontsize=8)
            if notes and j < len(notes[i]):
                axes.text(0.5, -0.03, notes[i][j], transform=axes.transAxes, ha="center", va="top", fontsize=7)
        y -= below[i]
    return figure


def noising_strip(
    pictures: Float[Tensor, "b c h w"],
    schedule,
    timesteps: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> "Figure":
    """How pictures dissolve: a row for each picture and schedule, from the clean picture to x_T.

    schedule: a `NoiseSchedule`, or {name: schedule} to compare some.
    timesteps: the columns after the clean picture; eight of them, evenly spread, if left out.
    labels: one for each picture.

    One noise serves the whole figure. What changes along a row and between rows is how much of it there is.
    """
    schedules = schedule if isinstance(schedule, Mapping) else {"": schedule}
    if timesteps is None:
        T = min(s.timesteps for s in schedules.values())
        timesteps = [(i + 1) * T // 8 - 1 for i in range(8)] if T >= 8 else list(range(T))
    noise = torch.randn(pictures.shape[1:], generator=torch.Generator().manual_seed(seed)).to(pictures)  # [c h w]
    noise = noise.expand(len(timesteps), *noise.shape)  # [steps c h w]
    t = torch.tensor(timesteps)

    rows, names = [], []
    for i, x_0 in enumerate(pictures):
        for name, schedule_i in schedules.items():
            x_t = schedule_i.q_sample(x_0.expand_as(noise), t, noise)
            rows.append(torch.cat([x_0[None], x_t]))
            names.append("\n".join(part for part in (labels[i] if labels else "", name) if part))
    titles = ["$x_0$", *(f"t = {t}" for t in timesteps)]
    return strip(rows, titles, names if any(names) else None)


# The fields of a Step that a row of `trajectory` can show.
_SHOWN = {"x_t": "$x_t$", "x0": r"$\hat x_0$", "eps": r"$\epsilon$", "x": "$x$", "eps_cond": r"$\epsilon$ cond",
          "eps_uncond": r"$\epsilon$ uncond"}  # fmt: skip


def trajectory(
    steps,
    decode: Callable[[Tensor], Tensor] | None = None,
    rows: Sequence[str] = ("x_t", "x0"),
    every: int | None = None,
    pictures: Sequence[int] = (0,),
    labels: Sequence[str] | None = None,
) -> "Figure":
    """What a sampler did, from left to right.

    steps: all that it yielded (a list of `Step`, or a `Trajectory`).
    decode: latents → pictures; left out where the steps hold pictures already.
    rows: which fields of a Step to show. x_t went in; x0 is the picture that the model had in mind.
    every: show each `every`-th step, and the last; such that there are about nine, if left out.
    pictures: which of the batch; labels: a name for each of them.
    """
    steps = list(steps)
    every = every or max(1, -(-len(steps) // 9))
    chosen = steps[::every]
    if (len(steps) - 1) % every:
        chosen.append(steps[-1])

    shown, names = [], []
    for i, picture in enumerate(pictures):
        for row in rows:
            x = torch.stack([getattr(step, row)[picture] for step in chosen])  # [steps c h w]
            shown.append(decode(x) if decode else x)
            names.append("\n".join([*([labels[i]] if labels else []), _SHOWN.get(row, row)]))
    return strip(shown, [f"t = {step.t}" for step in chosen], names)


# -- numbers against t --------------------------------------------------------------------------------------


def curves(
    panels: Mapping[str, Mapping[str, tuple]],
    xlabel: str = "t",
    ylabel: str = "",
    log: Sequence[str] = (),
    width: float = 3.1,
    height: float = 2.5,
) -> "Figure":
    """Panels side by side: {title of the panel: {name of the line: (x, y)}}.

    log: the titles of the panels whose y axis is logarithmic.
    """
    figure = _figure(width * len(panels), height, layout="constrained")
    named = []  # the lines that the last legend told: the next panel has one only if it shows others
    for axes, (title, lines) in zip(_panels(figure, len(panels)), panels.items(), strict=True):
        for i, (name, (x, y)) in enumerate(lines.items()):
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)], "linewidth": 1.6}
            axes.plot(_array(x), _array(y), label=name, **style)
        if any(lines) and list(lines) != named:
            axes.legend(frameon=False, fontsize=8, handlelength=2.6)
            named = list(lines)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.set_ylabel(ylabel if axes is figure.axes[0] else "", fontsize=8)
        if title in log:
            axes.set_yscale("log")
    return figure


def schedule_curves(schedules: Mapping[str, object]) -> "Figure":
    """β_t, ᾱ_t and the log of the signal-to-noise ratio, for each {name: NoiseSchedule}."""
    panels = {
        r"noise added in a step:  $\beta_t$": lambda s, t: s.betas,
        r"signal that is left:  $\bar\alpha_t$": lambda s, t: s.alphas_cumprod,
        r"log SNR:  $\log\,\bar\alpha_t / (1-\bar\alpha_t)$": lambda s, t: s.log_snr(t),
    }
    times = {name: torch.arange(s.timesteps) for name, s in schedules.items()}
    return curves(
        {
            title: {name: (times[name], value(s, times[name])) for name, s in schedules.items()}
            for title, value in panels.items()
        },
        log=[next(iter(panels))],  # β covers four powers of ten
    )


def histograms(
    panels: Mapping[str, Mapping[str, Tensor]],
    gaussians: Mapping[str, tuple[float, float]] | None = None,
    gaussian_label: str = "exact",
    bins: int = 60,
    width: float = 2.5,
    height: float = 2.1,
) -> "Figure":
    """Panels of samples: {title of the panel: {name: samples [n]}}, as densities, all over one x axis.

    gaussians: {title: (mean, variance)}, drawn in black over its panel: what the samples should follow.
    """
    figure = _figure(width * len(panels), height, layout="constrained")
    axes_of = dict(zip(panels, _panels(figure, len(panels), sharex=True), strict=True))
    for title, samples in panels.items():
        axes = axes_of[title]
        # Each panel has bins of its own: those that suit a wide bell would show a needle as a block.
        together = torch.cat([x.detach().flatten().float().cpu() for x in samples.values()])
        edges = torch.linspace(together.min(), together.max(), bins + 1)
        for i, (name, x) in enumerate(samples.items()):
            # The first is filled, the others are outlines, so that two that agree can both be seen.
            style = {"histtype": "step", "lw": 1.3} if i else {"histtype": "stepfilled", "alpha": 0.35}
            style["color"] = COLOURS[i % len(COLOURS)]
            axes.hist(_array(x).ravel(), edges.numpy(), density=True, label=name, **style)
        if gaussians and title in gaussians:
            mean, variance = gaussians[title]
            x = mean + sqrt(variance) * torch.linspace(-4, 4, 161)
            density = torch.exp(-((x - mean) ** 2) / (2 * variance)) / sqrt(2 * torch.pi * variance)
            axes.plot(x.numpy(), density.numpy(), color="black", lw=1, ls="--", label=gaussian_label)
        axes.set_title(title, fontsize=9)
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


# -- a toy in one dimension ---------------------------------------------------------------------------------


def density_over_time(
    x_0: Float[Tensor, "n"],
    schedule,
    paths: Mapping[str, tuple[Sequence[int], Float[Tensor, "s k"]]] | None = None,
    width: float = 4.4,
    height: float = 2.9,
) -> "Figure":
    """The density of q(x_t) for data on a line, at all t: the darker, the more probable.

    x_0: the data, each number as likely as the next. schedule: a `NoiseSchedule`.
    paths: a panel for each {title: (timesteps, values)}, where values [s k] are k paths at those s timesteps. The
        colour of a path tells which of the data it belongs to: the one that is nearest at its smallest t.
    """
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    reach = 1.15 * max(2.8, x_0.abs().max().item())
    y = torch.linspace(-reach, reach, 301)
    # q(x_t) = 1/n Σ_i N(√ᾱ_t x_i, (1-ᾱ_t) I): around each of the data, one Gaussian
    mean = schedule.sqrt_alphas_cumprod[:, None] * x_0.float()  # [T n]
    sigma = schedule.sqrt_one_minus_alphas_cumprod[:, None, None]  # [T 1 1]
    gaussian = torch.exp(-(((y[None, :, None] - mean[:, None]) / sigma) ** 2) / 2) / (sigma * sqrt(2 * torch.pi))
    density = gaussian.mean(-1)  # [T y]

    paths = paths or {"": ((), torch.zeros(0, 0))}
    colour_of = {value: COLOURS[i % len(COLOURS)] for i, value in enumerate(x_0.unique().tolist())}
    figure = _figure(width * len(paths), height, layout="constrained")
    for axes, (title, (timesteps, values)) in zip(_panels(figure, len(paths)), paths.items(), strict=True):
        # Near t = 0 the density is a few high needles; a scale up to their tips would leave all else white.
        axes.imshow(
            density.T.numpy(),
            cmap=colormaps["Greys"].resampled(24),  # in steps: one sees where two tones meet, as on a map
            norm=PowerNorm(0.6, vmin=0, vmax=1.2),
            extent=(0, schedule.timesteps, -reach, reach),
            origin="lower",
            aspect="auto",
        )
        for path in values.T:
            end = path[int(_array(timesteps).argmin())].item()
            nearest = min(colour_of, key=lambda value: abs(value - end))
            every = max(1, len(path) // 250)  # more points than pixels would only make it fuzzy
            axes.plot(_array(timesteps)[::every], _array(path)[::every], color=colour_of[nearest], lw=0.8)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("t", fontsize=8)
        axes.set_ylabel("$x_t$", fontsize=8, rotation=0)
    return figure


# -- how samplers walk, and how well ------------------------------------------------------------------------


def plane(
    x_0: Float[Tensor, "n 2"],
    panels: Mapping[str, Float[Tensor, "s k 2"]],
    width: float = 2.6,
    reach: float = 2.6,
) -> "Figure":
    """A toy in the plane: the data as grey points, and a panel for each {title: k paths of s points each}.

    A path begins at its small ring and ends at its disc. Its colour tells which path it is, in all panels.
    """
    figure = _figure(width * len(panels), width + 0.1, layout="constrained")
    data = _array(x_0)
    for axes, (title, paths) in zip(_panels(figure, len(panels)), panels.items(), strict=True):
        axes.scatter(data[:, 0], data[:, 1], s=9, color="0.72", linewidths=0, zorder=1)
        for k, path in enumerate(_array(paths).swapaxes(0, 1)):
            colour = COLOURS[k % len(COLOURS)]
            markers = {"marker": ".", "markersize": 3} if len(path) <= 30 else {}  # as far as they can be told apart
            axes.plot(path[:, 0], path[:, 1], color=colour, lw=0.7, zorder=2, **markers)
            axes.plot(*path[0], "o", color=colour, markersize=4, markerfacecolor="white", zorder=3)
            axes.plot(*path[-1], "o", color=colour, markersize=4.5, zorder=4)
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
        axes.set_title(title, fontsize=9)
    return figure


def pursuit(
    exact: tuple,
    panels: Mapping[str, tuple],
    xlabel: str = r"$\sigma$",
    ylabel: str = r"$\bar x$",
    width: float = 2.5,
    height: float = 2.3,
) -> "Figure":
    """A curve (x, y) in grey, and in each panel {title: (x, y)} the straight steps of somebody who pursues it.

    Time runs to the right, so that x falls: x is an amount of noise.
    """
    figure = _figure(width * len(panels), height, layout="constrained")
    for axes, (i, (title, (x, y))) in zip(
        _panels(figure, len(panels), sharey=True), enumerate(panels.items()), strict=True
    ):
        axes.plot(_array(exact[0]), _array(exact[1]), color="0.65", lw=3.5, solid_capstyle="round", label="exact")
        axes.plot(_array(x), _array(y), color=COLOURS[i % len(COLOURS)], lw=1.3, marker="o", markersize=4)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.invert_xaxis()
        if i == 0:
            axes.set_ylabel(ylabel, fontsize=8, rotation=0)
            axes.legend(frameon=False, fontsize=8)
    return figure


def convergence(
    panels: Mapping[str, Mapping[str, tuple]],
    slopes: Sequence[int] = (1, 2),
    xlabel: str = "calls of the model",
    ylabel: str = "error",
    width: float = 3.8,
    height: float = 3.1,
) -> "Figure":
    """Error over cost, both axes logarithmic: {title of the panel: {name of the line: (calls, errors)}}.

    slopes: grey lines for comparison; along that of slope p, twice the calls leave 1/2^p of the error.
    """
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = _figure(width * len(panels), height, layout="constrained")
    for axes, (title, lines) in zip(_panels(figure, len(panels)), panels.items(), strict=True):
        xs = [_array(x) for x, _ in lines.values()]
        ys = [_array(y) for _, y in lines.values()]
        x = torch.tensor([min(map(min, xs)), max(map(max, xs))]).double()
        for p in slopes:
            # from the upper left corner of what is drawn, and no further down than that is
            guide = max(map(max, ys)) * (x / x[0]) ** -p
            bottom = min(map(min, ys))
            end = x[1] if guide[1] >= bottom else x[0] * (guide[0] / bottom) ** (1 / p)
            guide[1] = max(guide[1].item(), bottom)
            axes.plot([x[0], end], guide, color="0.75", lw=1)
            axes.text(end, guide[1], f" slope {p}", color="0.45", fontsize=7, va="center")
        for i, (name, calls, errors) in enumerate(zip(lines, xs, ys, strict=True)):
            colour, marker = COLOURS[i % len(COLOURS)], "os^Dv*"[i % 6]
            style = {"linestyle": DASHES[i % len(DASHES)], "linewidth": 1.2, "markersize": 4}
            axes.plot(calls, errors, color=colour, marker=marker, label=name, **style)
        axes.set_xscale("log")
        axes.set_yscale("log")
        ticks = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if x[0] <= n <= x[1]]
        axes.set_xticks(ticks)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.set_ylabel(ylabel if axes is figure.axes[0] else "", fontsize=8)
        if axes is figure.axes[0]:
            axes.legend(frameon=False, fontsize=8, loc="lower left")
    return figure


def ruler(rows: Mapping[str, tuple[Sequence[int], str]], T: int = 1000, width: float = 8.0) -> "Figure":
    """Which timesteps are visited, from T - 1 down to 0: {label: (timesteps, what stands at the end of the line)}."""
    figure = _figure(width, 0.62 * len(rows) + 0.45, layout="constrained")
    (axes,) = _panels(figure, 1)
    for i, (timesteps, end) in enumerate(rows.values()):
        y = len(rows) - 1 - i
        axes.plot([T - 1, 0], [y, y], color="0.8", lw=1, zorder=1)
        axes.scatter(list(timesteps), [y] * len(timesteps), s=22, color=COLOURS[i % len(COLOURS)], zorder=2)
        for t in timesteps if len(timesteps) <= 12 else (timesteps[0], timesteps[-1]):
            axes.annotate(str(t), (t, y), (0, 5), textcoords="offset points", ha="center", fontsize=7)
        axes.text(-0.03 * T, y, end, va="center", fontsize=8)
    axes.set_xlim(1.03 * T, -0.16 * T)
    axes.set_ylim(-0.4, len(rows) - 0.4)
    axes.set_yticks(range(len(rows)), list(rows)[::-1], fontsize=8)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.set_xticks([t for t in range(0, T, T // 5)] + [T - 1])
    axes.set_xlabel("t", fontsize=8)
    return figure


# -- what the figures have in common ------------------------------------------------------------------------


def _figure(width: float, height: float, layout: str | None = None) -> "Figure":
    """An empty figure of that many inches."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(width, height), dpi=100, layout=layout)
    # Closed, it is still a figure. Left open, a notebook would draw it twice: when a cell ends, it draws what is open.
    plt.close(figure)
    return figure


def _panels(figure: "Figure", count: int, **options) -> "list[Axes]":
    """Axes side by side, without the frame's upper right half."""
    panels = list(figure.subplots(1, count, squeeze=False, **options)[0])
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(labelsize=7)
    return panels


def _picture(axes: "Axes", picture: Float[Tensor, "c h w"]) -> None:
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


def _array(x):
    """What matplotlib plots, from a tensor or a list."""
    return x.detach().float().cpu().numpy() if isinstance(x, Tensor) else torch.as_tensor(x).float().numpy()
