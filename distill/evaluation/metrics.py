"""Distances between sets of images, taken in the features of a network (of `distill.judge`, here)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.runtime.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """The moments of features (N, D), the covariance unbiased.

    Raises `UserError` for another shape, N < 2 and values that are not finite.
    """
    features = _features(features)
    mean = features.mean(0)
    centred = features - mean
    return Moments(mean, centred.T @ centred / (len(features) - 1))


def frechet_distance(a: Moments, b: Moments) -> float:
    """The squared Frechet distance of two Gaussians (Dowson & Landau 1982; Heusel et al. 2017).

    d^2 = |mean_a - mean_b|^2 + tr(A + B - 2 (A B)^(1/2)), never below 0: FID, arXiv:1706.08500.
    Raises `UserError` for features of unequal size.
    """
    if a.mean.shape != b.mean.shape:
        sizes = f"{len(a.mean)} and {len(b.mean)}"
        raise UserError(f"the features have {sizes} numbers; expected both sets from one network")
    # tr (A B)^(1/2) is the nuclear norm of A^(1/2) B^(1/2): no root of a product that is not symmetric,
    # and none of its rounded small eigenvalues
    shared = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * shared
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix; eigenvalues rounded below 0 count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018, arXiv:1801.01401, section 4): mean and standard deviation over random subsets.

    The unbiased squared maximum mean discrepancy of features (N, D), kernel (x . y / D + 1)^3; subsets have `size` points, or all.
    """
    a, b = _features(a), _features(b)
    count = min(size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        x, y = (v[torch.randperm(len(v), generator=generator)[:count]] for v in (a, b))
        within = [
            (k.sum() - k.diagonal().sum()) / (count * (count - 1)) for k in (_cubic(x, x), _cubic(y, y))
        ]
        found.append(within[0] + within[1] - 2 * _cubic(x, y).mean())
    values = torch.stack(found)
    return float(values.mean()), float(values.std()) if subsets > 1 else 0.0


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def precision_recall(real: Tensor, made: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 2) of features (N, D) and (M, D).

    Precision: the share of made points that lie nearer to some real point than its k-th neighbour among the real; recall: reversed.
    """
    real, made = _features(real), _features(made)
    if min(len(real), len(made)) <= k:
        raise UserError(
            f"precision and recall with k = {k} need more than {k} points of each; given are {len(real)} and {len(made)}"
        )
    return _covered(made, real, k), _covered(real, made, k)


def _covered(points: Tensor, support: Tensor, k: int) -> float:
    radius = torch.cdist(support, support).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    return float((torch.cdist(points, support) <= radius).any(1).double().mean())


def _features(features: Tensor) -> Tensor:
    if features.ndim != 2 or len(features) < 2:
        raise UserError(
            f"features have the shape {tuple(features.shape)}; expected (N, D) with N of at least 2"
        )
    if not features.isfinite().all():
        raise UserError(
            "features hold NaN or infinity; expected finite numbers, check the images they come from"
        )
    return features.detach().double().cpu()


def wasserstein_2(a: Tensor, b: Tensor) -> float:
    """The 2-Wasserstein distance of two sets of N points (N, D) each, exact, by optimal assignment; N of a few thousand at most.

    Raises `UserError` for sets of unequal shape.
    """
    from scipy.optimize import linear_sum_assignment

    if a.shape != b.shape or a.ndim != 2:
        raise UserError(
            f"points have the shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (N, D) twice"
        )
    cost = torch.cdist(a.double(), b.double()).square()
    rows, columns = linear_sum_assignment(cost.numpy())
    return float(cost[rows, columns].mean().sqrt())


def divergence_from(points: Tensor, log_density: Tensor) -> float:
    """An estimate of KL(q | p), nats, from N points (N, D) of q and log p at them (N,).

    Minus the entropy by nearest neighbours (Kozachenko & Leonenko 1987) minus the mean of log p; minus infinity where points coincide.
    """
    count, dimension = points.shape
    distance = torch.cdist(points.double(), points.double()).fill_diagonal_(torch.inf).amin(1)
    ball = dimension / 2 * torch.log(torch.tensor(torch.pi)) - torch.lgamma(torch.tensor(dimension / 2 + 1))
    entropy = (
        dimension * distance.log().mean() + ball + torch.log(torch.tensor(count - 1.0)) + 0.5772156649015329
    )
    return float(-entropy - log_density.double().mean())
