"""Penalties on a scene beside the score: pure functions, each a scalar (a mean), and their weighted sums.

`opacity_regularization` applies to any representation, `ray_regularization` to a field with rendered samples.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.objectives.options import LinearSchedule, resolve
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload
from sds3d.scene.compositing import RenderedRays
from sds3d.scene.field import Field


@dataclass(frozen=True)
class RegularizerOptions:
    """Weights on the summed-gradient scale of the objective; a term of weight 0 is not evaluated.

    A weight is a number, or a schedule over the progress of the stage: {start: 10, end: 1000, until: 0.5}.
    Raises `UserError` for a negative weight, or no samples.
    """

    opacity: float | LinearSchedule = 80.0  # against floaters
    entropy: float | LinearSchedule = 20.0
    entropy_start: float = 0.5  # fraction of the run from which entropy is penalised
    orientation: float | LinearSchedule = 0.0
    # without it large objects remain fog
    depth_variance: float | LinearSchedule = LinearSchedule(0.0, 1000.0)
    sparsity: float | LinearSchedule = 0.0
    smooth_density: float | LinearSchedule = 20.0
    smooth_albedo: float | LinearSchedule = 60.0
    samples: int = 4096  # random points, or rendered samples, that a term is evaluated at

    def __post_init__(self) -> None:
        ends = [min(resolve(value, 0), resolve(value, 1)) for value in vars(self).values()]
        if min(ends) < 0 or self.samples < 1:
            raise UserError("regulariser weights must not be negative and samples must be positive")


def opacity_penalty(opacity: Tensor) -> Tensor:
    """mean sqrt(o^2 + 0.01) of opacities in [0, 1], any shape: against floaters.

    DreamFusion (Poole et al. 2022), appendix A.3.
    """
    return (opacity.square() + 0.01).sqrt().mean()


def opacity_entropy(opacity: Tensor) -> Tensor:
    """Mean binary entropy in nats of opacities in [0, 1], any shape: against semi-transparency.

    The sparsity loss of Latent-NeRF (Metzer et al. 2022). Opacities are clamped to (0, 1), as the gradient is
    infinite at both ends.
    """
    clamped = opacity.clamp(1e-5, 1 - 1e-5)
    return -(clamped * clamped.log() + (1 - clamped) * (1 - clamped).log()).mean()


def depth_variance(variance: Tensor, opacity: Tensor) -> Tensor:
    """Mean variance (R,) of the depth along rays, world units squared, where opacity (R,) exceeds 1/2.

    Against fog: density concentrates at a surface. The z-variance of HiFA (Zhu and Zhuang 2023,
    arXiv:2305.18766).
    """
    return (variance * (opacity.detach() > 0.5)).mean()


def sparsity(density: Tensor, scale: float = 0.1) -> Tensor:
    """mean (1 - exp(-scale * density)) of density (N,) at random points of the box: against floaters.

    PlenOctrees (Yu et al. 2021), eq. 8.
    """
    return -torch.expm1(-scale * density).mean()


def orientation(weights: Tensor, normals: Tensor, directions: Tensor) -> Tensor:
    """mean of w max(0, n . d)^2 over samples: visible normals must not face away.

    Ref-NeRF (Verbin et al. 2022), eq. 11. weights (N,) are constants, as in DreamFusion; normals and
    directions (N, 3) are unit vectors, directions pointing away from the camera.
    """
    cosine = (normals * directions).sum(-1).clamp(min=0)
    return (weights.detach() * cosine.square()).mean()


def scene_orientation(
    field: Field, rays: RenderedRays, directions: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """`orientation` over `count` samples drawn in proportion to their weights; directions (R, 3) of the rays.

    All samples would cost four field evaluations each. The expectation of this importance-sampled mean is the
    weighted sum divided by the sum of weights. 0 where nothing was rendered.
    """
    weights = rays.weights.detach()
    if len(weights) == 0:
        return weights.sum()
    # Inverse transform sampling: torch.multinomial takes at most 2^24 weights, on its generator's device.
    cumulative = weights.double().cumsum(0)
    draws = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
    draws = upload(draws, weights.device) * cumulative[-1]
    chosen = torch.searchsorted(cumulative, draws).clamp(max=len(weights) - 1)
    normals = field.normal(rays.points[chosen])
    # 0 where all weights are: not asked of the device before, lest the host wait for it.
    equal = (cumulative[-1] > 0).to(weights).expand(count)
    return orientation(equal, normals, directions[rays.ray_indices[chosen]])


def total_variation(
    field: Field, points: Tensor, step: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean absolute differences of (opacity of a step, albedo) between points (N, 3) and random neighbours.

    Neighbours are at distance `step`. Total variation estimated at random points (Rudin, Osher and Fatemi
    1992; over NeRF grids: Plenoxels, Fridovich-Keil et al. 2022, eq. 3). Density is compared as the opacity
    of one step, so that hard surfaces do not dominate. Zeros where there are no points (an empty scene).
    """
    if len(points) == 0:
        return points.new_zeros(()), points.new_zeros(())
    offsets = torch.randn(points.shape, generator=generator, device=generator.device)
    offsets = upload(offsets, points.device).to(points)
    neighbours = points + step * offsets / offsets.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    density, albedo = field(torch.cat([points, neighbours]))
    opacity = -torch.expm1(-density * step)
    return _mean_difference(opacity), _mean_difference(albedo)


def _mean_difference(values: Tensor) -> Tensor:
    first, second = values.chunk(2)
    return (first - second).abs().mean()


def random_points(count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Points (count, 3) uniform in the box [-1, 1]^3, for `sparsity` and `total_variation`."""
    return upload(torch.rand(count, 3, generator=generator, device=generator.device) * 2 - 1, device)


def opacity_regularization(opacity: Tensor, options: RegularizerOptions, progress: float) -> Tensor:
    """The weighted sum of the terms on opacities in [0, 1], any shape."""
    total = opacity.new_zeros(())
    if weight := resolve(options.opacity, progress):
        total = total + weight * opacity_penalty(opacity)
    if (weight := resolve(options.entropy, progress)) and progress >= options.entropy_start:
        total = total + weight * opacity_entropy(opacity)
    return total


def ray_regularization(
    field: Field,
    rays: RenderedRays,
    directions: Tensor,
    options: RegularizerOptions,
    progress: float,
    generator: torch.Generator,
) -> Iterator[Tensor]:
    """The weighted terms on a field and its samples along rays with unit directions (R, 3)."""
    if weight := resolve(options.orientation, progress):
        yield weight * scene_orientation(field, rays, directions, options.samples, generator)
    if weight := resolve(options.depth_variance, progress):
        yield weight * depth_variance(rays.depth_variance, rays.opacity)
    if weight := resolve(options.sparsity, progress):
        points = random_points(options.samples, generator, rays.rgb.device)
        yield weight * sparsity(field.density(points))
    smooth_density = resolve(options.smooth_density, progress)
    smooth_albedo = resolve(options.smooth_albedo, progress)
    if smooth_density or smooth_albedo:
        points = surface_points(rays, options.samples, generator)
        density, albedo = total_variation(field, points, 0.02, generator)
        yield smooth_density * density
        yield smooth_albedo * albedo


def surface_points(rays: RenderedRays, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` (N, 3) of the rendered samples, chosen uniformly with repetition."""
    points = rays.points
    indices = torch.randint(max(len(points), 1), (min(count, len(points)),), generator=generator)
    return points[upload(indices, points.device)]
