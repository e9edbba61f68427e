"""Drawings, or training pictures? How near each drawing comes to the training split, beside how near others come.

No distance says "copied" by itself: emoji resemble each other, and two artists' full moons may be one disc. The
yardsticks are pictures that nobody can have copied, the real held-out ones; and pictures that are copies for certain,
the training pictures themselves, encoded and decoded by the model's autoencoder.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .judges import features, find_nearest

COPY = 0.05  # what is this close to a training picture (RMS, of a range of 1, at 16x16) is called a near copy


@dataclass(frozen=True)
class Nearness:
    """Distances of pictures to the nearest of the training split: root mean square, of a range of 1, at 16x16."""

    what: str
    count: int
    near: float  # share that is nearer than COPY
    low: float  # 5% are nearer than this,
    median: float  # half,
    high: float  # 95%


def nearness(
    what: str, pictures: Float[Tensor, "n 3 h w"], training: Float[Tensor, "m 768"]
) -> tuple[Nearness, Float[Tensor, "n"], Int[Tensor, "n"]]:
    """The distances in short, in full, and the index of the nearest. training: `features` of the training split."""
    index, distance = find_nearest(features(pictures), training)
    low, median, high = distance.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    near = float((distance < COPY).float().mean())
    return Nearness(what, len(pictures), near, low, median, high), distance, torch.from_numpy(index)
