"""From hits to a score that corrects for chance and for the difficulty of the data set.

    score = (hits of the model - hits by chance) / (hits of real pictures - hits by chance)

The hits by chance are those of each drawing for the captions of all other drawings. With a score of 1, this judge
recognises the drawings as often as the real pictures of the same captions. A score above 1 is possible, for example
because a model draws what the artists have in common, which is easier to recognise than a single artist's picture.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool

RESAMPLES = 1000
Table = Bool[np.ndarray, "n n"]  # row i, column j: whether picture i would be a hit for caption j


@dataclass(frozen=True)
class Score:
    """How often a judge recognises in a drawing what the caption says. All shares are from 0 to 1."""

    split: str  # the group of captions
    judge: str
    question: str  # "concept", "style", or "R@1" and "R@5": is the caption the best one, or among the best five?
    count: int  # how many captions
    model: float  # share of hits for the drawings
    real: float  # for the real pictures of these captions
    decoded: float  # for the same pictures, encoded and decoded: shows the loss due to the autoencoder
    shuffled: float  # for the drawings with the captions of other drawings: hits by chance
    error: float  # standard deviation of the score over resampled concepts; NaN if there is no score

    @property
    def score(self) -> float:
        """0: as good as shuffled captions, 1: as good as real pictures. NaN if these two are too close."""
        return float("nan") if np.isnan(self.error) else (self.model - self.shuffled) / (self.real - self.shuffled)


def score(
    split: str, judge: str, question: str, model: Table, real: Table, decoded: Table, concepts: list[str]
) -> Score:
    """Compute a score from tables of hits.

    The error is estimated by bootstrap. It resamples concepts and not pictures, because the pictures of one concept
    tend to be right or wrong together. There is only a score if the real pictures are better than chance by three
    standard deviations. Otherwise the denominator would be too uncertain.
    """
    n = len(model)
    drawn, true = model.diagonal().astype(float), real.diagonal().astype(float)
    chance = (model.sum(axis=1) - drawn) / (n - 1)  # the mean over all shuffles, computed exactly

    # Sums over the pictures of each concept. A resample takes k of the k concepts at random, with replacement, and all
    # pictures of each.
    _, member = np.unique(concepts, return_inverse=True)
    sums = np.stack([np.bincount(member, weights=x) for x in (drawn, true, chance, np.ones(n))])  # [4 concepts]
    k = sums.shape[1]
    times = np.random.default_rng(0).multinomial(k, np.full(k, 1 / k), size=RESAMPLES)  # [resamples concepts]
    m, r, c, size = sums @ times.T
    scale = (r - c) / size
    clear = scale.min() > 0 and scale.mean() > 3 * scale.std()
    error = np.std((m - c) / size / scale) if clear else np.nan
    means = (float(x.mean()) for x in (drawn, true, decoded.diagonal(), chance))
    return Score(split, judge, question, n, *means, error=float(error))
