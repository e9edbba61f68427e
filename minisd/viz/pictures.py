"""Pictures side by side: in rows with titles, with more and more noise, along a sampler's steps, with captions."""

from collections.abc import Callable, Mapping, Sequence
from textwrap import fill

import torch
from jaxtyping import Float
from torch import Tensor

from . import page
from .page import Figure


def strip(
    rows: Sequence[Float[Tensor, "_ c _ _"]] | Float[Tensor, "r n c h w"],
    titles: Sequence[str] | None = None,
    labels: Sequence[str] | None = None,
    notes: Sequence[Sequence[str]] | None = None,
    size: float = 0.96,
) -> Figure:
    """Rows of pictures in [-1, 1], each row [n c h w]; rows may differ in length and in size.

    titles: one above each column, in one line or more; labels: one left of each row.
    notes: for each row, a text below each picture, or [].
    size: of a picture, in inches; at 0.96, a pixel of a 32-pixel picture is 3 screen pixels wide.
    """
    heights = [size * row.shape[-2] / row.shape[-1] for row in rows]
    lines = [max((1 + note.count("\n") for note in row), default=0) for row in notes or [[]] * len(rows)]
    below = [0.08 + 0.12 * n if n else 0.05 for n in lines]
    figure, cells = page.grid([len(row) for row in rows], size, titles, labels, heights, below)
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            page.show_picture(cells[i][j], picture)
            if notes and j < len(notes[i]):
                page.label_below(cells[i][j], notes[i][j], gap=0.03)
    return figure


def noising_strip(
    pictures: Float[Tensor, "b c h w"],
    schedule,
    timesteps: Sequence[int] | None = None,
    labels: Sequence[str] | None = None,
    seed: int = 0,
) -> Figure:
    """The forward process: a row for each picture and schedule, from the clean picture to x_T.

    schedule: a `NoiseSchedule`, or {name: schedule} to compare several.
    timesteps: the columns after the clean picture; by default eight, evenly spaced.
    labels: one for each picture.

    The same noise is used in the whole figure. Along a row and between rows, only its amount changes.
    """
    schedules = schedule if isinstance(schedule, Mapping) else {"": schedule}
    if timesteps is None:
        last = min(s.timesteps for s in schedules.values()) - 1
        timesteps = torch.linspace(0, last, 9).long()[1:].unique().tolist()
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
) -> Figure:
    """The steps of a sampler, from left to right.

    steps: all steps that it yielded (a list of `Step`, or a `Trajectory`).
    decode: latents → pictures; leave it out if the steps contain pictures.
    rows: which fields of a Step to show. x_t is the input of the step; x0 is the model's estimate of the picture.
    every: show every `every`-th step, and the last. By default, about eight steps are shown.
    pictures: which pictures of the batch; labels: a name for each of them.
    """
    steps = list(steps)
    every = every or max(1, -(-len(steps) // 8))
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


def captioned(
    pictures: Float[Tensor, "n c h w"], captions: Sequence[str], columns: int = 8, size: float = 0.96
) -> Figure:
    """Pictures in [-1, 1], row by row, each with its caption below it. Long captions are broken into lines."""
    if len(pictures) != len(captions):
        raise ValueError(f"there are {len(pictures)} pictures and {len(captions)} captions: give one for each")
    broken = [fill(caption, int(16 * size)) for caption in captions]  # about 16 letters of this size fit in an inch
    notes = [broken[i : i + columns] for i in range(0, len(broken), columns)]
    return strip(pictures.split(columns), notes=notes, size=size)
