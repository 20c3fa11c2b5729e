"""Distances between sets of images in the features of a network; saturation and diversity of images."""

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
    features = _checked(features)
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
        raise UserError(f"the features have {sizes} dimensions; expected both sets from one network")
    # tr (A B)^(1/2) is the nuclear norm of A^(1/2) B^(1/2): this avoids the root of a product that is not
    # symmetric, whose small eigenvalues rounding can make negative
    trace = torch.linalg.svdvals(_root(a.covariance) @ _root(b.covariance)).sum()
    distance = (a.mean - b.mean).square().sum() + a.covariance.trace() + b.covariance.trace() - 2 * trace
    return max(float(distance), 0.0)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric root of a positive semi-definite matrix; eigenvalues rounded below 0 count as 0."""
    values, vectors = torch.linalg.eigh(covariance)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.T


def kernel_distance(
    a: Tensor, b: Tensor, subsets: int = 100, size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Kernel inception distance (Binkowski et al. 2018, arXiv:1801.01401, section 4).

    The mean and standard deviation, over random subsets of `size` points or all, of the unbiased squared
    maximum mean discrepancy of features (N, D) under the kernel (x . y / D + 1)^3.
    """
    a, b = _checked(a), _checked(b)
    count = min(size, len(a), len(b))
    generator = torch.Generator().manual_seed(seed)
    distances = []
    for _ in range(subsets):
        x, y = (v[torch.randperm(len(v), generator=generator)[:count]] for v in (a, b))
        within = [
            (k.sum() - k.diagonal().sum()) / (count * (count - 1)) for k in (_cubic(x, x), _cubic(y, y))
        ]
        distances.append(within[0] + within[1] - 2 * _cubic(x, y).mean())
    values = torch.stack(distances)
    return float(values.mean()), float(values.std()) if subsets > 1 else 0.0


def _cubic(a: Tensor, b: Tensor) -> Tensor:
    return (a @ b.T / a.shape[1] + 1) ** 3


def inception_score(probabilities: Tensor) -> float:
    """exp of the mean KL(p(y | x) || p(y)) of class probabilities (N, K): from 1 to K.

    Salimans et al. 2016 (arXiv:1606.03498), section 4; high where images are clear and their classes many.
    """
    conditional = probabilities.double().clamp_min(1e-12)
    divergence = conditional * (conditional.log() - conditional.mean(0).log())
    return float(divergence.sum(1).mean().exp())


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall (Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 2).

    Of features (N, D) and (M, D). Precision: the fraction of generated points within the k-nearest-neighbour
    radius of some real point; recall: the reverse. Raises `UserError` for k points or fewer.
    """
    real, generated = _checked(real), _checked(generated)
    if min(len(real), len(generated)) <= k:
        raise UserError(
            f"precision with k = {k} needs more than {k} points: {len(real)} and {len(generated)} given"
        )
    return _covered_fraction(generated, real, k), _covered_fraction(real, generated, k)


def _covered_fraction(points: Tensor, support: Tensor, k: int) -> float:
    radius = torch.cdist(support, support).kthvalue(k + 1, dim=1).values  # the nearest is the point itself
    return float((torch.cdist(points, support) <= radius).any(1).double().mean())


def sample_diversity(features: Tensor, per_caption: int) -> float:
    """Root-mean-square deviation of one caption's samples from their mean, in features (N, D).

    The `per_caption` samples of one caption are consecutive rows.
    """
    groups = features.reshape(-1, per_caption, features.shape[1])
    return float((groups - groups.mean(1, keepdim=True)).square().sum(2).mean().sqrt())


def pixel_diversity(images: Tensor) -> float:
    """Mean root-mean-square distance between pairs of images (N, 3, H, W); 0 for a single image."""
    flat = images.flatten(1)
    return float(torch.pdist(flat).mean() / flat.shape[1] ** 0.5) if len(flat) > 1 else 0.0


def saturation(images: Tensor) -> Tensor:
    """Mean HSV saturation (N,) of images (N, 3, H, W): (max - min) / max of a pixel."""
    high, low = images.amax(1), images.amin(1)
    return ((high - low) / high.clamp_min(1e-6)).mean((1, 2))


def _checked(features: Tensor) -> Tensor:
    """Features (N, D) in float64 on the CPU. Raises `UserError` for another shape or values not finite."""
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
    """The exact 2-Wasserstein distance of two sets of points (N, D), by optimal assignment.

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
    """An estimate of KL(q | p) in nats from points (N, D) of q and log p (N,) at them.

    Minus the entropy by nearest neighbours (Kozachenko & Leonenko 1987), minus the mean of log p; infinite
    where points coincide.
    """
    count, dimension = points.shape
    distance = torch.cdist(points.double(), points.double()).fill_diagonal_(torch.inf).amin(1)
    ball = dimension / 2 * torch.log(torch.tensor(torch.pi)) - torch.lgamma(torch.tensor(dimension / 2 + 1))
    entropy = (
        dimension * distance.log().mean() + ball + torch.log(torch.tensor(count - 1.0)) + 0.5772156649015329
    )
    return float(-entropy - log_density.double().mean())
