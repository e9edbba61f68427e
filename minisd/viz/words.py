"""Sentences as tokens, and matrices (such as similarities or attention weights) as shades of colour."""

from collections.abc import Mapping, Sequence
from itertools import groupby

import numpy as np
from jaxtyping import Float
from torch import Tensor

from .page import Figure, as_array, empty_figure, name_axes, place, shades, show_picture


def token_table(
    sentences: Mapping[str, Sequence[str]],
    ids: Mapping[str, Sequence[int]] | None = None,
    width: float = 7.4,
) -> Figure:
    """How sentences are cut into tokens: a line for each {label: pieces}, with each piece in a box.

    Blue: a piece that ends a word (it has "</w>"). Orange: the word continues. Grey: a special token of the form <|…|>.
    Three or more equal pieces in a row share one box, with their number.
    ids: the id of each piece, which is written below it. width: in inches; longer sentences are broken into lines.
    """
    from matplotlib.patches import Rectangle

    letter, high, gap = 0.0655, 0.24, 0.05  # inches: of a letter, of a box, between boxes
    step = high + (0.24 if ids else 0.08)  # from line to line
    left = 0.075 * max(len(line) for label in sentences for line in label.split("\n")) + 0.15
    figure, y, reach = empty_figure(1, 1), 0.06, 0.0  # y grows downwards
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    for label, pieces in sentences.items():
        x = left
        axes.text(left - 0.1, y + high / 2, label, ha="right", va="center", fontsize=8)
        for first, count in _runs(pieces):
            piece = pieces[first]
            text = f"{piece} x {count}" if count > 1 else piece
            number = "" if ids is None else str(ids[label][first])
            wide = letter * max(len(text), len(number)) + 0.1
            if x > left and x + wide > width:
                x, y = left, y + step
            special = piece.startswith("<|") and piece.endswith("|>")
            colour = "#DDDDDD" if special else "#BFDDF0" if piece.endswith("</w>") else "#F9D3A8"
            axes.add_patch(Rectangle((x, y), wide, high, facecolor=colour, edgecolor="0.6", linewidth=0.5))
            # Monospaced, so that the width of a box follows from the number of letters.
            style = {"ha": "center", "va": "center", "family": "monospace"}
            axes.text(x + wide / 2, y + high / 2, text, fontsize=7.5, parse_math=False, **style)
            axes.text(x + wide / 2, y + high + 0.085, number, fontsize=6.5, color="0.35", **style)
            reach = max(reach, x + wide)
            x += wide + gap
        y += step + 0.04
    figure.set_size_inches(reach + 0.05, y)
    axes.set(xlim=(0, reach + 0.05), ylim=(y, 0))
    return figure


def _runs(pieces: Sequence[str]) -> list[tuple[int, int]]:
    """For each box, the index of its first piece and the number of its pieces: one, or a run of three or more."""
    runs = []
    for _, same in groupby(range(len(pieces)), key=pieces.__getitem__):
        places = list(same)
        runs += [(places[0], len(places))] if len(places) > 2 else [(i, 1) for i in places]
    return runs


def matrices(
    panels: Mapping[str, Float[Tensor, "r _"]],
    rows: Sequence[str] | None = None,
    columns: Sequence[str] | None = None,
    numbers: str = "",
    cell: tuple[float, float] = (0.3, 0.3),
    pictures: Float[Tensor, "r _ _ _"] | None = None,
    xlabel: str = "",
    ylabel: str = "",
) -> Figure:
    """Matrices side by side, {title: matrix}: 0 is white, larger is darker; negative numbers are blue, others red.

    If no number is negative, they are all shades of blue. NaN is grey.
    rows, columns: the names of rows and columns, the same for all matrices. xlabel, ylabel: what they are, if there are
    too many to name them; then they are numbered. pictures: one left of each row.
    numbers: the format of the numbers in the cells, such as ".2f". Without it, each matrix has a colour bar.
    cell: the width and height of a cell, in inches.
    """
    from matplotlib import colormaps

    wide, high = cell
    left = 0.07 * max((len(name) for name in rows or ()), default=0) + (0.5 if ylabel else 0.1)
    if pictures is not None:
        left += high + 0.08
    long = 0.07 * max((len(name) for name in columns or ()), default=0)
    upright = long > wide + 0.05  # horizontal names would overlap
    bottom = 0.08 + (long if upright else 0.17 if columns or xlabel else 0) + (0.22 if xlabel else 0)
    right = 0.12 if numbers else 0.62  # room for a colour bar with its numbers
    top = 0.08 + 0.17 * max(title.count("\n") + bool(title) for title in panels)
    height = top + bottom + high * max(len(m) for m in panels.values())
    width = left + sum(wide * m.shape[1] + right for m in panels.values())

    figure = empty_figure(width, height)
    x = left
    for i, (title, matrix) in enumerate(panels.items()):
        r, c = matrix.shape
        y = height - top - high * r
        axes = place(figure, x, y, wide * c, high * r)
        scale = shades(matrix)
        scale["cmap"] = colormaps[scale["cmap"]].with_extremes(bad="0.8")
        image = axes.imshow(as_array(matrix), **scale, aspect="auto", interpolation="nearest")
        name_axes(axes, title, xlabel, "" if i else ylabel)
        if columns or not xlabel:
            axes.set_xticks(range(len(columns or [])), columns or [], rotation=90 if upright else 0, fontsize=8)
        if rows or not ylabel or i:
            named = rows if rows and i == 0 else []
            axes.set_yticks(range(len(named)), named, fontsize=8)
        axes.tick_params(length=0, pad=3, labelsize=8)
        if numbers:
            for (row, column), value in np.ndenumerate(as_array(matrix)):
                if np.isnan(value):
                    continue
                dark = abs(value) > 0.6 * scale["vmax"]
                style = {"ha": "center", "va": "center", "fontsize": 7, "color": "white" if dark else "black"}
                axes.text(column, row, f"{value:{numbers}}", **style)
        else:
            bar = place(figure, x + wide * c + 0.06, y, 0.08, high * r)
            figure.colorbar(image, cax=bar).ax.tick_params(labelsize=7)
        if pictures is not None and i == 0:
            for row, picture in enumerate(pictures):
                y = height - top - high * (row + 1) + 0.02
                show_picture(place(figure, x - high, y, high - 0.04, high - 0.04), picture)
            for label in axes.get_yticklabels():
                label.set_x(-(high + 0.02) / (wide * c))  # left of the pictures
        x += wide * c + right
    return figure
