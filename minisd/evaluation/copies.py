"""Are the drawings copies of training pictures? The distance of each to the nearest picture of the training split.

A small distance alone does not prove a copy, because emoji resemble each other: the full moons of two artists may be
the same disc. So the same distance is measured for two other sets, for comparison. The real held-out pictures are
certainly not copies. The training pictures themselves, encoded and decoded by the model's autoencoder, certainly are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .judges import features, find_nearest

COPY = 0.05  # below this distance to a training picture (RMS, values from 0 to 1, at 16x16), we call it a near copy


@dataclass(frozen=True)
class Nearness:
    """Distances of pictures to the nearest training picture: root mean square, values from 0 to 1, at 16x16."""

    what: str  # which pictures
    count: int  # how many
    near: float  # the share whose distance is less than COPY
    low: float  # the 5% quantile of the distances
    median: float
    high: float  # the 95% quantile


def nearness(
    what: str, pictures: Float[Tensor, "n 3 h w"], training: Float[Tensor, "m 768"]
) -> tuple[Nearness, Float[Tensor, "n"], Int[Tensor, "n"]]:
    """A summary of the distances, the distances themselves, and the index of the nearest training picture of each.

    training: the `features` of the training split.
    """
    index, distance = find_nearest(features(pictures), training)
    low, median, high = distance.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    near = float((distance < COPY).float().mean())
    return Nearness(what, len(pictures), near, low, median, high), distance, torch.from_numpy(index)
