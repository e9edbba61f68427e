"""From hits to a score, which takes out chance and the difficulty of the corpus.

    score = (hits of the model - hits by chance) / (hits of real pictures - hits by chance)

By chance: each drawing compared with the captions of all the others. A score of 1 is as good as the real pictures of
the same captions, for this judge. More than 1 is possible where artists differ and the model draws what they have in
common.
"""

from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool


@dataclass(frozen=True)
class Score:
    """How often a judge finds in a drawing what was asked for. Shares are of 1."""

    split: str  # whose captions were asked for
    judge: str
    question: str  # "concept", "style", or whether the caption is among the best 1 or 5
    count: int  # how many captions
    model: float  # hits of the drawings
    real: float  # hits of the real pictures of these captions
    decoded: float  # of the same pictures, encoded and decoded: what the autoencoder costs
    shuffled: float  # hits of the drawings, each compared with another's caption
    error: float  # of the score: one standard deviation, over resampled concepts; NaN where there is no score

    @property
    def score(self) -> float:
        """0: as good as shuffled captions, 1: as good as real pictures. NaN if they are too close."""
        return float("nan") if np.isnan(self.error) else (self.model - self.shuffled) / (self.real - self.shuffled)


def score(
    split: str,
    judge: str,
    question: str,
    model: Bool[np.ndarray, "n n"],
    real: Bool[np.ndarray, "n n"],
    decoded: Bool[np.ndarray, "n n"],
    concepts: list[str],
    resamples: int = 1000,
) -> Score:
    """Row i, column j: would picture i be a hit for caption j?

    The error is a bootstrap's, by concept and not by picture: pictures of one concept tend to succeed or fail together.
    There is a score only where the real pictures are better than chance by three standard deviations: else, there is no
    scale to measure on.
    """
    n = len(model)
    drawn, true = model.diagonal().astype(float), real.diagonal().astype(float)
    chance = (model.sum(axis=1) - drawn) / (n - 1)  # the mean over all shuffles, computed exactly

    # Sums over each concept; a resample draws as many concepts as there are, and takes all pictures of each.
    _, member = np.unique(concepts, return_inverse=True)
    sums = np.stack([np.bincount(member, weights=x) for x in (drawn, true, chance, np.ones(n))])  # [4 concepts]
    k = sums.shape[1]
    times = np.random.default_rng(0).multinomial(k, np.full(k, 1 / k), size=resamples)  # [resamples concepts]
    m, r, c, size = sums @ times.T
    scale = (r - c) / size
    clear = scale.min() > 0 and scale.mean() > 3 * scale.std()
    error = np.std((m - c) / size / scale) if clear else np.nan
    means = (float(x.mean()) for x in (drawn, true, decoded.diagonal(), chance))
    return Score(split, judge, question, n, *means, error=float(error))
