"""How far drawings as a whole are from pictures as a whole, in a space of features: two distances, and their errors.

FID and KID are these distances in the features of an Inception network trained on ImageNet. Its numbers say little
about pictures of 32 pixels, so other features are used here. Distances in different features can't be compared, so
these are not called FID and KID.

    Fréchet   d² = |μ₁ - μ₂|² + tr(Σ₁ + Σ₂ - 2 (Σ₁ Σ₂)^½)                   Heusel et al. 2017 (arXiv:1706.08500)
    MMD²      E k(x,x') + E k(y,y') - 2 E k(x,y),  k(x,y) = (x·y/d + 1)³     Bińkowski et al. 2018 (arXiv:1801.01401)

The first is biased: a covariance of few pictures is too narrow in some directions and too wide in others. This adds
about c/N to d², if there are many more pictures than directions in which they differ. The estimate of the second is
unbiased, so it may even fall below zero.
"""

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

MINIMUM = 50  # of pictures on each side, for MMD; for a Fréchet distance, more than there are features


@dataclass(frozen=True)
class Distance:
    """Of one set of pictures from another, in named features."""

    what: str  # the pictures
    features: str  # in which space
    dimension: int
    count: int  # N: pictures; compared with the `reference` pictures of the training split
    reference: int
    frechet: float | None  # d² at this N; None where N is too small
    frechet_error: float | None  # one standard deviation, due to the choice of pictures
    frechet_infinity: float | None  # the straight line in 1/N through N and N/2, at 1/N = 0 (Chong & Forsyth 2020)
    mmd: float  # MMD², unbiased, the mean over subsets
    mmd_error: float  # the standard deviation over the subsets, as KID is given


def frechet_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """Fréchet distance d² between the Gaussians that have the means and covariances of two sets of features.

    Raises:
        ValueError: no more pictures than features: the covariance would have directions without any width.
    """
    for z in (x, y):
        if len(z) <= z.shape[1]:
            raise ValueError(
                f"a Fréchet distance in {z.shape[1]} features needs more than {z.shape[1]} pictures on each side, "
                f"not {len(z)}"
            )
    return _frechet(_moments(x), _moments(y))


def kernel_distance(x: Float[Tensor, "n d"], y: Float[Tensor, "m d"]) -> float:
    """MMD² under the cubic kernel of KID, unbiased: no picture is compared with itself.

    Raises:
        ValueError: fewer than MINIMUM pictures on a side.
    """
    if min(len(x), len(y)) < MINIMUM:
        raise ValueError(f"MMD needs at least {MINIMUM} pictures on each side, not {min(len(x), len(y))}")
    return _mmd(x.double(), y.double())


def measure_distance(
    what: str, features: str, x: Float[Tensor, "n d"], reference: Float[Tensor, "m d"], subsets: int = 20
) -> Distance:
    """Both distances of x from the reference, with their errors.

    The error comes from halves of the pictures, taken at random. The distance of a half differs from that of all
    pictures by as much as that differs from the truth (the delete-half jackknife: its factor (n - n/2) / (n/2) is 1).
    So the spread over halves is the error. Their mean shows the bias at N/2, which is twice the bias at N: subtracting
    the difference once more gives the value at infinity.

    MMD, as KID is: the mean over subsets of both sides, of half of x each, 1,000 at most.

    Raises:
        ValueError: fewer than 2 · MINIMUM pictures on a side.
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
    """Mean and covariance, in double precision: the distance is a small difference of large traces."""
    z = z.double()
    return z.mean(dim=0), torch.cov(z.T).reshape(z.shape[1], z.shape[1])  # of one feature, cov makes a bare number


def _frechet(first: tuple[Tensor, Tensor], second: tuple[Tensor, Tensor]) -> float:
    (mean, cov), (target_mean, target_cov) = first, second
    # tr (Σ₁ Σ₂)^½ = Σ √λ of Σ₂^½ Σ₁ Σ₂^½. This matrix is symmetric, so its eigenvalues are real, and only rounding can
    # make one negative.
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
