"""Every picture that a notebook or a command draws. Takes tensors and trajectories, never a model.

    to_pil, sheet, save_sheet       pictures as files, pixel by pixel
    strip                           pictures side by side, with titles and labels
    noising_strip                   pictures dissolve into noise, under one schedule or several
    trajectory                      what a sampler did: x_t and the x_0 that it had in mind, step by step
    curves, schedule_curves         numbers against t
    histograms                      samples, against the Gaussian that they should follow
    density_over_time               a 1-D toy: the density of q(x_t), and the paths through it
    token_table, matrices           sentences in pieces; what belongs to what, in shades
    unet_diagram                    a UNet's blocks, their channels, and what is handed across
    feature_maps, attention_maps    what is inside: channels of a layer; where the pixels look, on the picture
    heatmaps                        tables of numbers as colours
    training_diagram, sampling_diagram, class_diagram    the whole model, drawn as boxes
    clouds, vector_field            a 2-D toy: its points, and an arrow at each place
    loss_by_timestep                what a model still gets wrong at each t, above the floor that none gets below
    maps, plane                     a latent's channels, each row with its scale; a latent of two numbers as a map
    captioned                       pictures with their captions under them
    walks, pursuit                  a 2-D toy and the paths to it; steps beside the curve that they should follow
    with_errors                     numbers with their error bars, over settings or groups
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

    titles: one above each column, in one line or more; labels: one left of each row.
    notes: for each row, one under each picture, or [].
    size: of a picture, in inches; at 0.96, a pixel of a 32-pixel picture is 3 of the screen's.
    """
    columns = max(len(row) for row in rows)
    heights = [row.shape[-2] / row.shape[-1] for row in rows]
    # What a label needs, in inches: matplotlib places axes in shares of the figure, and the pictures are to
    # come out at one size however long a label is.
    left = 0.075 * max((len(line) for label in labels or () for line in label.split("\n")), default=0) + 0.05
    top = 0.22 + 0.13 * max(title.count("\n") for title in titles) if titles else 0.05
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


# -- words and matrices -------------------------------------------------------------------------------------


def token_table(
    sentences: Mapping[str, Sequence[str]],
    ids: Mapping[str, Sequence[int]] | None = None,
    width: float = 10.0,
) -> "Figure":
    """How sentences are cut into tokens: a line for each {label: pieces}, its pieces in boxes.

    Blue: a piece that ends a word (it carries "</w>"). Orange: the word goes on. Grey: a token of the form <|…|>, which
    is no text. Three or more of the same in a row are drawn once, with their number.
    ids: the id of each piece, to stand under it. width: in inches; a sentence that is longer is broken.
    """
    letter, high, gap = 0.0655, 0.24, 0.05  # inches: of a letter, of a box, between boxes
    step = high + (0.24 if ids else 0.08)  # from line to line
    left = 0.075 * max(len(line) for label in sentences for line in label.split("\n")) + 0.15
    boxes, y = [], 0.06  # (x, y, width, text, id, colour), y downwards
    starts = []
    for label, pieces in sentences.items():
        x = left
        starts.append((label, y))
        for first, count in _runs(pieces):
            piece = pieces[first]
            text = f"{piece} x {count}" if count > 1 else piece
            number = "" if ids is None else str(ids[label][first])
            wide = letter * max(len(text), len(number)) + 0.1
            if x > left and x + wide > width:
                x, y = left, y + step
            special = piece.startswith("<|") and piece.endswith("|>")
            colour = "#DDDDDD" if special else "#BFDDF0" if piece.endswith("</w>") else "#F9D3A8"
            boxes.append((x, y, wide, text, number, colour))
            x += wide + gap
        y += step + 0.04

    reach = max(x + wide for x, _, wide, *_ in boxes) + 0.05
    figure = _figure(reach, y)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, reach), ylim=(y, 0))
    axes.axis("off")
    for label, y in starts:
        axes.text(left - 0.1, y + high / 2, label, ha="right", va="center", fontsize=8)
    for x, y, wide, text, number, colour in boxes:
        # Monospaced: only so does the number of letters tell how wide a box must be.
        style = {"ha": "center", "va": "center", "family": "monospace"}
        axes.add_patch(_rectangle((x, y), wide, high, colour))
        axes.text(x + wide / 2, y + high / 2, text, fontsize=7.5, parse_math=False, **style)
        axes.text(x + wide / 2, y + high + 0.085, number, fontsize=6.5, color="0.35", **style)
    return figure


def matrices(
    panels: Mapping[str, Float[Tensor, "r _"]],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    numbers: str = "",
    cell: tuple[float, float] = (0.3, 0.3),
    pictures: Float[Tensor, "r _ _ _"] | None = None,
    xlabel: str = "",
) -> "Figure":
    """Matrices side by side, {title: matrix}: white is 0, the darker the larger; red and blue where there are signs.

    rows, columns: their names, the same for all. pictures: one left of each row. NaN is grey: nothing is there.
    numbers: how to write them into the cells, such as ".2f"; a scale stands beside each matrix where they are not.
    cell: width and height of one, in inches.
    """
    from matplotlib import colormaps

    wide, high = cell
    left = 0.07 * max((len(name) for name in rows or ()), default=0) + 0.1
    if pictures is not None:
        left += high + 0.08
    long = 0.07 * max((len(name) for name in columns or ()), default=0)
    upright = long > wide + 0.05  # they would run into each other side by side
    bottom = (0.08 + (long if upright else 0.17) if columns else 0.08) + (0.22 if xlabel else 0)
    right = 0.12 if numbers else 0.62  # a scale with its numbers
    top = 0.05 + 0.17 * max(title.count("\n") + bool(title) for title in panels)
    height = top + bottom + high * max(len(m) for m in panels.values())
    width = left + sum(wide * m.shape[1] + right for m in panels.values())

    figure = _figure(width, height)
    x = left
    for i, (title, matrix) in enumerate(panels.items()):
        r, c = matrix.shape
        place = (x, height - top - high * r, wide * c, high * r)
        axes = figure.add_axes((place[0] / width, place[1] / height, place[2] / width, place[3] / height))
        signed = bool((matrix < 0).any())
        reach = matrix.nan_to_num().abs().max().item() or 1.0
        shades = colormaps["RdBu_r" if signed else "Blues"].with_extremes(bad="0.8")
        scale = {"cmap": shades, "vmin": -reach if signed else 0, "vmax": reach}
        image = axes.imshow(_array(matrix), **scale, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=9, pad=4)
        named = rows if rows and i == 0 else []
        axes.set_xticks(range(len(columns or [])), columns or [], rotation=90 if upright else 0, fontsize=8)
        axes.set_yticks(range(len(named)), named, fontsize=8)
        axes.tick_params(length=0, pad=3)
        axes.set_xlabel(xlabel, fontsize=8)
        if numbers:
            for (row, column), value in _cells(matrix):
                dark = abs(value) > 0.6 * reach
                style = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if dark else "black"}
                axes.text(column, row, f"{value:{numbers}}", **style)
        else:
            bar = figure.add_axes(((x + place[2] + 0.06) / width, place[1] / height, 0.08 / width, place[3] / height))
            figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7)
        if pictures is not None and i == 0:
            for row, picture in enumerate(pictures):
                y = height - top - high * (row + 1) + 0.02
                side = high - 0.04
                small = figure.add_axes(((x - high) / width, y / height, side / width, side / height))
                _picture(small, picture)
            for label in axes.get_yticklabels():
                label.set_x(-(high + 0.02) / place[2])  # left of the pictures
        x += place[2] + right
    return figure


def _runs(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """Where each box begins, and how many pieces it stands for: one, or all of a run of three or more."""
    runs, i = [], 0
    while i < len(pieces):
        count = 1
        while i + count < len(pieces) and pieces[i + count] == pieces[i]:
            count += 1
        runs += [(i, count)] if count > 2 else [(i + k, 1) for k in range(count)]
        i += count
    return runs


def _cells(matrix: Tensor) -> list[tuple[tuple[int, int], float]]:
    """((row, column), value) of all that is there."""
    cells = (((i, j), v) for i, row in enumerate(matrix.tolist()) for j, v in enumerate(row))
    return [(at, value) for at, value in cells if value == value]  # NaN is not itself


def _rectangle(corner: tuple[float, float], width: float, height: float, colour: str):
    from matplotlib.patches import Rectangle

    return Rectangle(corner, width, height, facecolor=colour, edgecolor="0.6", linewidth=0.5)


# -- inside the UNet, and the model as boxes -----------------------------------------------------------------


# What the boxes of the diagrams are filled with: pale, so that black letters stand out.
_FILLS = {"text": "#FBE3C8", "unet": "#D3E6F3", "vae": "#D5EFE6", "sampler": "#F3DDE9", "plain": "white", "": "#F0F0F0"}


def unet_diagram(blocks: Sequence, title: str = "") -> "Figure":
    """The U: down on the left, up on the right, dashed what is handed across, each at the height of its source.

    blocks: what `minisd.unet.outline` returns. A box says what is in a block, and the channels and the size of what
    comes out of it. Blue: with attention. On a dashed line: the channels that are joined to what comes from below.
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
        _box(axes, x, y, wide, tall, "", "unet" if attends else "")
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
        _arrow(axes, (left, y + tall / 2), (right, y + tall / 2), str(block.shape_out[0]), dashed=True)
        if block is not down[-1]:
            _arrow(axes, (inset + 0.3, y), (inset + 0.3, y - row + tall))
            _arrow(axes, (width - inset - 0.3, y - row + tall), (width - inset - 0.3, y))
    draw(middle, (width - wide) / 2, y - row)
    _path(axes, [(inset + 0.3, y), (inset + 0.3, y - row + tall / 2), ((width - wide) / 2, y - row + tall / 2)], "")
    end = width - inset - 0.3
    _path(axes, [((width + wide) / 2, y - row + tall / 2), (end, y - row + tall / 2), (end, y)], "")
    return figure


def feature_maps(layers: Mapping[str, Float[Tensor, "c h w"]], channels: int = 8, size: float = 0.86) -> "Figure":
    """A row for each layer: the channels that vary most over the picture, blue below zero and orange above it.

    Each channel has a scale of its own, white at zero. Under it: its number, and its largest value without the sign.
    """
    left = 0.075 * max(len(line) for name in layers for line in name.split("\n")) + 0.05
    width, height = left + channels * (size + 0.06), len(layers) * (size + 0.2)
    figure = _figure(width, height)
    for i, (name, maps) in enumerate(layers.items()):
        maps = maps.detach().float().cpu()
        for j, channel in enumerate(maps.std((1, 2)).topk(min(channels, len(maps))).indices.tolist()):
            x, y = left + j * (size + 0.06), height - (i + 1) * (size + 0.2) + 0.18
            axes = figure.add_axes((x / width, y / height, size / width, size / height))
            largest = maps[channel].abs().max().item()
            axes.imshow(maps[channel].numpy(), cmap="PuOr_r", vmin=-largest, vmax=largest, interpolation="nearest")
            _bare(axes)
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
    figure = _figure(width, height)
    for i, (row, shown) in enumerate(zip(rows, pictures, strict=True)):
        row = row.detach().float().cpu()
        y = height - top - i * (size + below) - size
        grey = (shown.detach().float().cpu().mean(0).clamp(-1, 1) + 1) / 2
        for j in range(len(row) + 1):
            x = left + j * (size + 0.05)
            axes = figure.add_axes((x / width, y / height, size / width, size / height))
            if j == 0:
                _picture(axes, shown)
                if labels:
                    axes.text(-0.06, 0.5, labels[i], transform=axes.transAxes, ha="right", va="center", fontsize=8)
                continue
            h, w = grey.shape
            axes.imshow(grey.numpy(), cmap="Greys_r", vmin=0, vmax=1, extent=(0, w, h, 0), interpolation="nearest")
            axes.imshow(row[j - 1].numpy(), cmap="viridis", vmin=0, vmax=max(row.max().item(), 1e-9), alpha=0.72,
                        extent=(0, w, h, 0), interpolation="nearest")  # fmt: skip
            _bare(axes)
            most = f"{row[j - 1].max():.2f}"
            axes.text(0.5, -0.04, most, transform=axes.transAxes, ha="center", va="top", fontsize=7)
            if titles and i == 0:
                axes.set_title(titles[j - 1], fontsize=8, pad=3)
    return figure


def heatmaps(
    panels: Mapping[str, Float[Tensor, "rows columns"]],
    xlabel: str = "",
    ylabel: str = "",
    diverging: bool = True,
    width: float = 3.4,
    height: float = 2.3,
) -> "Figure":
    """Tables of numbers as colours, side by side, each with its scale; diverging: white at zero."""
    figure = _figure(width * len(panels), height, layout="constrained")
    for i, (axes, (title, table)) in enumerate(zip(_panels(figure, len(panels)), panels.items(), strict=True)):
        table = table.detach().float().cpu()
        largest = table.abs().max().item()
        limits = {"cmap": "PuOr_r", "vmin": -largest, "vmax": largest} if diverging else {"cmap": "viridis"}
        shown = axes.imshow(table.numpy(), aspect="auto", interpolation="nearest", **limits)
        figure.colorbar(shown, ax=axes).ax.tick_params(labelsize=7)
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(xlabel, fontsize=8)
        axes.set_ylabel(ylabel if i == 0 else "", fontsize=8)
    return figure


def training_diagram() -> "Figure":
    """One training step of Stable Diffusion: three inputs, three networks of which one is trained, and the loss."""
    figure, axes = _canvas(9.0, 3.5)
    _box(axes, 0.05, 2.65, 1.2, 0.6, "caption\n“fox, noto style”", "plain")
    _box(axes, 0.05, 1.45, 1.2, 0.6, "its picture\n$x$  [3 H W]", "plain")
    _box(axes, 0.05, 0.25, 1.2, 0.6, "chance\n" r"$\epsilon\sim N(0, I)$,  $t$", "plain")
    _box(axes, 1.75, 2.55, 2.2, 0.8, "FrozenCLIPEmbedder\nget_learned_conditioning\nfrozen", "text")
    _box(axes, 1.75, 1.35, 2.2, 0.8, "AutoencoderKL or VQModel\nencode_first_stage\nfrozen", "vae")
    _box(axes, 4.55, 1.35, 1.3, 0.8, "q_sample\n" r"$\sqrt{\bar\alpha_t}z+\sqrt{1-\bar\alpha_t}\,\epsilon$", "")
    _box(axes, 6.35, 1.35, 1.2, 0.8, "UNetModel\napply_model\ntrained", "unet", heavy=True)
    _box(axes, 7.9, 0.15, 1.05, 0.8, "loss\np_losses\n" r"$|\epsilon-\epsilon_\theta|^2$", "")
    _arrow(axes, (1.25, 2.95), (1.75, 2.95))
    _arrow(axes, (1.25, 1.75), (1.75, 1.75))
    _arrow(axes, (3.95, 1.75), (4.55, 1.75), "$z$  [4 h w]")
    _arrow(axes, (5.85, 1.75), (6.35, 1.75), "$x_t$")
    _path(axes, [(3.95, 2.95), (6.95, 2.95), (6.95, 2.15)], "context $c$  [n d]")
    _path(axes, [(1.25, 0.65), (5.2, 0.65), (5.2, 1.35)], r"$\epsilon$  [4 h w] and $t$")
    _path(axes, [(5.2, 0.65), (6.95, 0.65), (6.95, 1.35)], "$t$")
    _path(axes, [(1.25, 0.35), (7.9, 0.35)], r"$\epsilon$: what the UNet should have found")
    _path(axes, [(7.55, 1.75), (8.42, 1.75), (8.42, 0.95)], r"$\epsilon_\theta$")
    return figure


def sampling_diagram() -> "Figure":
    """How Stable Diffusion draws: prompt and noise go in, the UNet is asked again and again, a picture comes out."""
    figure, axes = _canvas(9.0, 3.3)
    _box(axes, 0.05, 2.35, 1.2, 0.7, "prompt, and the\nempty prompt “”", "plain")
    _box(axes, 0.05, 0.75, 1.2, 0.7, "start_code\n$x_T\\sim N(0, I)$", "plain")
    _box(axes, 1.75, 2.3, 2.2, 0.8, "FrozenCLIPEmbedder\nget_learned_conditioning", "text")
    _box(axes, 2.3, 0.7, 1.25, 0.8, "UNetModel\napply_model\ntwice: $c_\\emptyset$, $c$", "unet")
    _box(axes, 4.15, 0.7, 1.45, 0.8, "sampler\nguidance, then\na step: p_sample_ddim", "sampler")
    _box(axes, 6.35, 0.7, 1.35, 0.8, "AutoencoderKL\ndecode_first_stage", "vae")
    _box(axes, 8.05, 0.75, 0.9, 0.7, "picture\n[3 H W]", "plain")
    _arrow(axes, (1.25, 2.7), (1.75, 2.7))
    _path(axes, [(2.925, 2.3), (2.925, 1.5)], "")
    axes.text(3.0, 1.85, r"contexts $c$, $c_\emptyset$  [n d]", fontsize=7.5, va="center")
    _arrow(axes, (1.25, 1.1), (2.3, 1.1), "$x_T$  [4 h w]")
    _arrow(axes, (3.55, 1.1), (4.15, 1.1), r"$\epsilon$, $\epsilon_\emptyset$")
    _arrow(axes, (5.6, 1.1), (6.35, 1.1), "$x_0$ = $z$")
    _arrow(axes, (7.7, 1.1), (8.05, 1.1))
    _path(axes, [(4.875, 0.7), (4.875, 0.25), (2.6, 0.25), (2.6, 0.7)], "")
    again = "$x_{t-1}$, a little less noisy: again, from T = 1000 down to 0, in 25 or 50 steps"
    axes.text(3.74, 0.2, again, fontsize=7.5, ha="center", va="top")
    return figure


def class_diagram() -> "Figure":
    """The classes by what holds what; under each name, the file of minisd and the file of CompVis's source."""
    figure, axes = _canvas(9.0, 4.15)
    w, h = 2.7, 0.5

    def box(x, y, name, here, there, fill, width=w):
        _box(axes, x, y, width, h, "", fill)
        axes.text(x + width / 2, y + 0.34, name, ha="center", va="center", fontsize=8, weight="bold")
        axes.text(x + width / 2, y + 0.14, f"{here}  |  {there}", ha="center", va="center", fontsize=6.8)

    box(2.95, 3.6, "LatentDiffusion", "latent_diffusion.py", "ddpm.py", "", 3.1)
    columns = [
        ("model.diffusion_model", "unet",
         [("UNetModel", "unet.py", "openaimodel.py"), ("ResBlock, Downsample, Upsample", "unet.py", "openaimodel.py"),
          ("SpatialTransformer", "attention.py", "attention.py"),
          ("CrossAttention, FeedForward", "attention.py", "attention.py")]),
        ("first_stage_model", "vae",
         [("AutoencoderKL or VQModel", "vae.py, vq.py", "autoencoder.py"), ("Encoder, Decoder", "vae.py", "model.py"),
          ("ResnetBlock, AttnBlock", "vae.py", "model.py"),
          ("DiagonalGaussianDistribution", "vae.py", "distributions.py")]),
        ("cond_stage_model", "text",
         [("FrozenCLIPEmbedder", "clip.py", "encoders/modules.py"), ("BPETokenizer", "clip.py", "transformers"),
          ("CLIPTextModel", "clip.py", "transformers"), ("CLIPAttention, CLIPMLP", "clip.py", "transformers")]),
    ]  # fmt: skip
    for i, (attribute, fill, classes) in enumerate(columns):
        x = 0.1 + 3.05 * i
        for j, (name, here, there) in enumerate(classes):
            y = 2.4 - 0.62 * j
            box(x, y, name, here, there, fill)
            if j:
                _arrow(axes, (x + 0.3, y + 0.62), (x + 0.3, y + h))
        _path(axes, [(3.3 + 1.2 * i, 3.6), (3.3 + 1.2 * i, 3.35), (x + w / 2, 3.35), (x + w / 2, 2.9)], "")
        axes.text(x + w / 2 + 0.06, 3.12, attribute, fontsize=7.5, va="center")
    beside = [
        "beside them:  NoiseSchedule (noising.py | ddpm.py, util.py)",
        "epsilon_loss (loss.py | ddpm.py)",
        "ddim, plms, … (sampling.py | ddim.py, plms.py)",
    ]
    axes.text(0.1, 0.22, ",  ".join(beside), fontsize=7.5, va="center")
    return figure


def _canvas(width: float, height: float) -> "tuple[Figure, Axes]":
    """A page to draw on, in inches from the lower left."""
    figure = _figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, width), ylim=(0, height))
    axes.axis("off")
    return figure, axes


def _box(axes: "Axes", x: float, y: float, w: float, h: float, text: str, fill: str, heavy: bool = False) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = {"boxstyle": "round,pad=0,rounding_size=0.06", "facecolor": _FILLS[fill], "edgecolor": "0.3"}
    axes.add_patch(FancyBboxPatch((x, y), w, h, linewidth=1.8 if heavy else 0.8, **style))
    axes.text(x + w / 2, y + h / 2, text, ha="center", va="center", fontsize=8, linespacing=1.35)


def _arrow(axes: "Axes", start: tuple, end: tuple, label: str = "", dashed: bool = False) -> None:
    style = {"arrowstyle": "-|>", "mutation_scale": 8, "color": "0.25", "linewidth": 0.9, "shrinkA": 0, "shrinkB": 0}
    axes.annotate("", end, start, arrowprops=style | {"linestyle": "--" if dashed else "-"})
    x, y = (start[0] + end[0]) / 2, (start[1] + end[1]) / 2
    axes.text(x, y + 0.03, label, ha="center", va="bottom", fontsize=7.5)


def _path(axes: "Axes", points: Sequence[tuple], label: str) -> None:
    """An arrow round corners; the label over its first stretch."""
    for a, b in zip(points[:-2], points[1:-1], strict=True):
        axes.plot(*zip(a, b, strict=True), color="0.25", linewidth=0.9, solid_capstyle="butt")
    _arrow(axes, points[-2], points[-1])
    (x0, y0), (x1, y1) = points[:2]
    axes.text((x0 + x1) / 2, (y0 + y1) / 2 + 0.05, label, ha="center", va="bottom", fontsize=7.5)


def _bare(axes: "Axes") -> None:
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_color("0.8")


# -- a toy in two dimensions, and the loss at each t --------------------------------------------------------


def clouds(
    panels: Mapping[str, Mapping[str, Float[Tensor, "_ 2"]]],
    behind: Float[Tensor, "n 2"] | None = None,
    columns: int | None = None,
    reach: float = 2.8,
    size: float = 1.45,
) -> "Figure":
    """Panels of points in the plane: {title of the panel: {name: points [n 2]}}.

    behind: the data, in grey in every panel. columns: panels in a row; all of them, if left out.
    reach: both axes go from -reach to reach; what lies outside is not seen. size: of a panel, in inches.
    """
    columns = columns or len(panels)
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for named in panels.values() for name in named))
    figure = _figure(columns * size, rows * (size + 0.22) + 0.28 * (len(names) > 1), layout="constrained")
    for axes, (title, named) in zip(_planes(figure, rows, columns, reach), panels.items(), strict=False):
        if behind is not None:
            axes.scatter(*_array(behind).T, s=2, color="0.8", linewidths=0, antialiased=False)
        for name, points in named.items():
            colour = COLOURS[names.index(name) % len(COLOURS)]
            axes.scatter(*_array(points).T, s=3, color=colour, linewidths=0, antialiased=False, label=name)
        axes.set_title(title, fontsize=8, pad=3)
    for axes in figure.axes[len(panels) :]:
        axes.remove()
    if len(names) > 1:
        # A panel may lack some of the names: take each from the first that has it.
        handles = {label: h for a in figure.axes for h, label in zip(*a.get_legend_handles_labels(), strict=True)}
        figure.legend(
            [handles[name] for name in names], names, loc="outside lower center", ncols=4, frameon=False, fontsize=8,
            markerscale=3,
        )  # fmt: skip
    return figure


def vector_field(
    panels: Mapping[str, tuple[Float[Tensor, "k 2"], Mapping[str, Float[Tensor, "k 2"]]]],
    behind: Mapping[str, Float[Tensor, "n 2"]] | None = None,
    longest: float = 2.0,
    spacing: float = 0.6,
    reach: float = 2.8,
    size: float = 1.8,
) -> "Figure":
    """Arrows at places of the plane: {title of the panel: (places [k 2], {name: vectors [k 2]})}.

    The first name's arrows are broad and pale, so that those of the second can be seen on them where the two agree.
    behind: {title: points [n 2]}, in grey. longest: a vector of this length makes an arrow of one `spacing`; any that
    is longer is drawn just so long.
    """
    figure = _figure(len(panels) * size, size + 0.5, layout="constrained")
    styles = [
        {"color": "#9ecae9", "width": 0.022, "headwidth": 2, "headlength": 1.5, "headaxislength": 1.5},
        {"color": COLOURS[1], "width": 0.008, "headwidth": 4, "headlength": 4, "headaxislength": 4},
    ]
    for axes, (title, (places, fields)) in zip(_planes(figure, 1, len(panels), reach), panels.items(), strict=True):
        if behind and title in behind:
            axes.scatter(*_array(behind[title]).T, s=2, color="0.75", linewidths=0, antialiased=False)
        for (name, vectors), style in zip(fields.items(), styles, strict=False):
            length = vectors.norm(dim=1, keepdim=True).clamp(min=1e-12)
            arrows = vectors / length * length.clamp(max=longest) * (spacing / longest)
            axes.quiver(
                *_array(places).T, *_array(arrows).T, angles="xy", scale_units="xy", scale=1, label=name, minlength=0.1,
                **style,
            )  # fmt: skip
        axes.set_title(title, fontsize=9, pad=3)
    handles = figure.axes[0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    return figure


def loss_by_timestep(
    panels: Mapping[str, Mapping[str, tuple]],
    floors: Mapping[str, tuple] | None = None,
    floor_label: str = "the best possible",
    log: Sequence[str] = (),
    xlabel: str = "t",
    width: float = 3.4,
    height: float = 2.4,
) -> "Figure":
    """Panels of losses against t: {title of the panel: {name of the model: (t, loss)}}.

    floors: {title: (t, loss)}, in black: what the best possible model would get (`minisd.ExactDenoiser`).
    log: the titles of the panels whose y axis is logarithmic. xlabel: "step", for the losses of a training.
    """
    figure = curves(panels, xlabel, "loss", log, width, height)
    for axes, title in zip(figure.axes, panels, strict=True):
        if floors and title in floors:
            t, loss = floors[title]
            axes.plot(_array(t), _array(loss), color="black", lw=1.1, label=floor_label)
        axes.legend(frameon=False, fontsize=7.5, handlelength=2.6)
    return figure


def _planes(figure: "Figure", rows: int, columns: int, reach: float) -> "list[Axes]":
    """Square panels of the plane, row by row, without a scale."""
    panels = list(figure.subplots(rows, columns, squeeze=False).ravel())
    for axes in panels:
        axes.set(xlim=(-reach, reach), ylim=(-reach, reach), aspect="equal", xticks=[], yticks=[])
        for spine in axes.spines.values():
            spine.set_color("0.8")
    return panels


# -- latents ------------------------------------------------------------------------------------------------


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

    figure = _figure(width, height)
    for i, row in enumerate(rows):
        y = height - top - (i + 1) * (size + 0.05) + 0.05

        def place(x: float, w: float = size, y: float = y):
            return figure.add_axes((x / width, y / height, w / width, size / height))

        x = left
        first = None
        if pictures is not None:
            first = place(x)
            _picture(first, pictures[i])
            x += size + 0.05
        reach, signed = row.abs().max().item() or 1.0, bool((row < 0).any())
        for j, values in enumerate(row):
            axes = place(x)
            image = axes.imshow(
                _array(values), cmap="RdBu_r" if signed else "Blues", vmin=-reach if signed else 0, vmax=reach,
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
    figure = _figure(len(panels) * (left + width + 0.15), top + height + below)
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
        xs, ys = _array(points).T
        axes.plot(xs, ys, "o", color=COLOURS[0], markersize=4, markeredgecolor="white", markeredgewidth=0.8)
        axes.set_xlim(extent[:2])
        axes.set_ylim(extent[2:])
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("$z_1$", fontsize=8)
        axes.set_ylabel("$z_2$", fontsize=8, rotation=0)
    return figure


# -- pictures with their captions ---------------------------------------------------------------------------


def captioned(
    pictures: Float[Tensor, "n c h w"], captions: Sequence[str], columns: int = 8, size: float = 0.96
) -> "Figure":
    """Pictures in [-1, 1], row by row, each with its caption under it, broken into lines where it is long."""
    from textwrap import fill

    if len(pictures) != len(captions):
        raise ValueError(f"there are {len(pictures)} pictures and {len(captions)} captions: give one for each")
    columns = min(columns, len(pictures))
    broken = [fill(caption, int(16 * size)) for caption in captions]  # so many letters of this size are as wide
    rows = -(-len(pictures) // columns)
    height = size * pictures.shape[-2] / pictures.shape[-1]
    below = 0.1 + 0.12 * max(1 + text.count("\n") for text in broken)  # the captions, in inches
    page = columns * (size + 0.1), rows * (height + below) + 0.05

    figure = _figure(*page)
    for i, (picture, text) in enumerate(zip(pictures, broken, strict=True)):
        row, column = divmod(i, columns)
        x, y = column * (size + 0.1) + 0.05, page[1] - 0.05 - row * (height + below) - height
        axes = figure.add_axes((x / page[0], y / page[1], size / page[0], height / page[1]))
        _picture(axes, picture)
        axes.text(0.5, -0.04, text, transform=axes.transAxes, ha="center", va="top", fontsize=7)
    return figure


# -- how samplers walk, and how well ------------------------------------------------------------------------


def walks(
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
            top, bottom = float(max(map(max, ys))), float(min(map(min, ys)))
            guide = top * (x / x[0]) ** -p
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


# -- numbers with their errors ------------------------------------------------------------------------------


def with_errors(
    panels: Mapping[str, Mapping[str, Sequence[tuple[float, float]]]],
    values: Sequence[str],
    xlabel: str = "",
    ylabel: str = "",
    lines: bool = True,
    marks: Sequence[float] = (),
) -> "Figure":
    """Panels side by side: {title of the panel: {name: a (number, its error) for each of the values}}.

    values: what stands below the x axis, evenly spaced. lines: whether to join them, as those that have an order.
    marks: heights of grey lines across all panels.
    """
    figure = _figure(0.8 + max(1.9, 0.55 * len(values)) * len(panels), 2.9, layout="constrained")
    for axes, (title, named) in zip(_panels(figure, len(panels)), panels.items(), strict=True):
        for i, (name, numbers) in enumerate(named.items()):
            x = torch.arange(len(values)) + 0.12 * (i - (len(named) - 1) / 2)  # side by side, so that bars don't cover
            y, error = torch.tensor(numbers, dtype=torch.float).T
            style = {"color": COLOURS[i % len(COLOURS)], "linestyle": DASHES[i % len(DASHES)] if lines else "none"}
            style |= {"marker": "o", "markersize": 3.5, "linewidth": 1.2, "capsize": 2}
            axes.errorbar(_array(x), _array(y), _array(error), label=name, **style)
        for height in marks:
            axes.axhline(height, color="0.8", lw=0.8, zorder=0)
        axes.set_xticks(range(len(values)), values, rotation=30, ha="right")
        axes.set_title(title, fontsize=9)
        axes.set_xlabel(xlabel, fontsize=8)
        if any(named):
            axes.legend(frameon=False, fontsize=7)
    figure.axes[0].set_ylabel(ylabel, fontsize=8)
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
