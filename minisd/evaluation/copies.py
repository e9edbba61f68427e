"""Are the drawings copies of training pictures? The distance of each to the nearest picture of the training split.

A distance alone does not prove a copy, because emoji resemble each other: two artists' full moons may be the same disc.
So the same distance is measured for two other sets. The real held-out pictures are certainly no copies. The training
pictures themselves, encoded and decoded by the model's autoencoder, certainly are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .judges import features, find_nearest

COPY = 0.05  # a picture this close to a training picture (RMS, of a range of 1, at 16x16) is called a near copy


@dataclass(frozen=True)
class Nearness:
    """Distances of pictures to the nearest of the training split: root mean square, of a range of 1, at 16x16."""

    what: str
    count: int
    near: float  # share that is nearer than COPY
    low: float  # 5% are nearer than this
    median: float  # half are nearer than this
    high: float  # 95% are nearer than this


def nearness(
    what: str, pictures: Float[Tensor, "n 3 h w"], training: Float[Tensor, "m 768"]
) -> tuple[Nearness, Float[Tensor, "n"], Int[Tensor, "n"]]:
    """A summary of the distances, all of them, and the index of each nearest picture.

    training: `features` of the training split.
    """
    index, distance = find_nearest(features(pictures), training)
    low, median, high = distance.quantile(torch.tensor([0.05, 0.5, 0.95])).tolist()
    near = float((distance < COPY).float().mean())
    return Nearness(what, len(pictures), near, low, median, high), distance, torch.from_numpy(index)
