"""How far are drawings from real pictures? As distributions, and each drawing from the nearest training picture.

The distance between their distributions in a feature space, of two kinds, with their errors:

    Fréchet   d² = |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)                   Heusel et al. 2017 (arXiv:1706.08500)
    MMD²      E k(x,x') + E k(y,y') - 2 E k(x,y),  k(x,y) = (x·y/d + 1)³     Bińkowski et al. 2018 (arXiv:1801.01401)

FID and KID are these distances in the features of an Inception network trained on ImageNet. Its features say little
about pictures of 32 pixels, so other features are used here. Distances in different features cannot be compared, so
they are not called FID and KID here.

The Fréchet distance is biased, because the covariance of a few pictures is too narrow in some directions and too wide
in others. If there are many more pictures than features, this adds about c/N to d². The estimate of MMD² is unbiased,
so it can even be negative.

Are the drawings copies of training pictures? For this, the distance of each to the nearest picture of the training
split is measured, pixel by pixel. A small distance alone does not prove a copy, because emoji resemble each other: the
full moons of two artists may be the same disc. So the same distance is measured for two other sets, for comparison. The
real held-out pictures are certainly not copies. The training pictures themselves, encoded and decoded by the model's
autoencoder, certainly are.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from .judges import features, find_nearest

MINIMUM = 50  # pictures in each set, for MMD; a Fréchet distance needs more pictures than features
COPY = 0.05  # below this distance to a training picture (RMS, values from 0 to 1, at 16x16), we call it a near copy


# Distributions --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Distance:
    """The distances of a set of pictures from the training split, in one feature space."""

    what: str  # the name of the set
    features: str  # the name of the feature space
    dimension: int  # how many features
    count: int  # N: how many pictures
    reference: int  # how many pictures of the training split they are compared with
    frechet: float | None  # d² at this N; None if N is too small
    frechet_error: float | None  # one standard deviation, due to the choice of pictures
    frechet_infinity: float | None  # extrapolated to 1/N = 0, linearly in 1/N from N and N/2 (Chong & Forsyth 2020)
    mmd: float  # MMD², unbiased, the mean over subsets
    mmd_error: float  # the standard deviation over the subsets, as is usual for KID


def frechet_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Fréchet distance d² between the Gaussians that have the means and covariances of two sets of features.

    Raises:
        ValueError: there are not more pictures than features, so the covariance would be singular.
    """
    n, d = min(len(x), len(y)), x.shape[1]
    if n <= d:
        raise ValueError(f"a Fréchet distance in {d} features needs more than {d} pictures on each side, not {n}")
    return _frechet(_moments(x), _moments(y))


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """MMD² with the cubic kernel of KID. It is unbiased because no picture is compared with itself.

    Raises:
        ValueError: one of the sets has fewer than MINIMUM pictures.
    """
    if min(len(x), len(y)) < MINIMUM:
        raise ValueError(f"MMD needs at least {MINIMUM} pictures on each side, not {min(len(x), len(y))}")
    return _mmd(x.double(), y.double())


def measure_distance(
    what: str, features: str, x: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], subsets: int = 20
) -> Distance:
    """Both distances of x from the reference, with their errors.

    The error of the Fréchet distance is estimated from random halves of the pictures. The distance of a half varies
    around that of all pictures as much as that varies around the true one (the delete-half jackknife: its factor
    (n - n/2) / (n/2) is 1). So the standard deviation over halves is the error. The mean over halves has the bias of
    N/2, which is twice the bias of N. So subtracting the difference once more gives the value for N = ∞.

    MMD is computed as in KID: the mean over random subsets of both sets, half the size of x, but at most 1,000.

    Raises:
        ValueError: one of the sets has fewer than 2 · MINIMUM pictures.
    """
    n, m, d = len(x), len(reference), x.shape[1]
    if min(n, m) < 2 * MINIMUM:
        raise ValueError(f"distances need at least {2 * MINIMUM} pictures on each side, not {min(n, m)}")
    generator = torch.Generator().manual_seed(0)
    x, reference = x.double(), reference.double()

    def some(z: Tensor, count: int) -> Tensor:
        return z[torch.randperm(len(z), generator=generator)[:count]]

    size = min(1000, n // 2, m)
    mmd = torch.tensor([_mmd(some(x, size), some(reference, size)) for _ in range(subsets)])
    frechet = error = infinity = None
    if min(n, m) > d:
        target = _moments(reference)
        frechet = _frechet(_moments(x), target)
        halves = torch.tensor([_frechet(_moments(some(x, n // 2)), target) for _ in range(subsets)])
        error = float(halves.std())
        infinity = 2 * frechet - float(halves.mean())
    return Distance(what, features, d, n, m, frechet, error, infinity, float(mmd.mean()), float(mmd.std()))


def _moments(z: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and covariance, in double precision because the distance is a small difference of large traces."""
    z = z.double()
    return z.mean(dim=0), torch.cov(z.T).reshape(z.shape[1], z.shape[1])  # for a single feature, cov returns a scalar


def _frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    (mean, cov), (target_mean, target_cov) = first, second
    # tr (Σ₁ Σ₂)^½ is the sum of √λ over the eigenvalues λ of Σ₂^½ Σ₁ Σ₂^½. This matrix is symmetric and positive
    # semidefinite, so its eigenvalues are real, and negative only by rounding.
    values, vectors = torch.linalg.eigh(target_cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    crossed = torch.linalg.eigvalsh(root @ cov @ root).clamp(min=0).sqrt().sum()
    return float((mean - target_mean).square().sum() + cov.trace() + target_cov.trace() - 2 * crossed)


def _mmd(x: Tensor, y: Tensor) -> float:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    k_xx, k_yy, k_xy = kernel(x, x), kernel(y, y), kernel(x, y)
    within = (k_xx.sum() - k_xx.trace()) / (n * (n - 1)) + (k_yy.sum() - k_yy.trace()) / (m * (m - 1))
    return float(within - 2 * k_xy.mean())


# Copies ---------------------------------------------------------------------------------------------------------------


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
