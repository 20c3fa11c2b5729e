"""Distances between sets of images, taken in the features of a network (of `distill.judge`, here)."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.errors import UserError


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, float64."""

    mean: Tensor
    covariance: Tensor


def moments(features: Tensor) -> Moments:
    """The moments of features (N, D), the covariance unbiased.

    Raises `UserError` for another shape, N < 2 and values that are not finite.
    """
    if features.ndim != 2 or len(features) < 2:
        raise UserError(f"features have the shape {tuple(features.shape)}; expected (N, D) with N of at least 2")
    if not features.isfinite().all():
        raise UserError("features hold NaN or infinity; expected finite numbers, check the images they come from")
    features = features.detach().double().cpu()
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


def wasserstein_2(a: Tensor, b: Tensor) -> float:
    """The 2-Wasserstein distance of two sets of N points (N, D) each, exact, by optimal assignment; N of a few thousand at most.

    Raises `UserError` for sets of unequal shape.
    """
    from scipy.optimize import linear_sum_assignment

    if a.shape != b.shape or a.ndim != 2:
        raise UserError(f"points have the shapes {tuple(a.shape)} and {tuple(b.shape)}; expected (N, D) twice")
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
    entropy = dimension * distance.log().mean() + ball + torch.log(torch.tensor(count - 1.0)) + 0.5772156649015329
    return float(-entropy - log_density.double().mean())
