"""Penalties on what a scene looks like, apart from the score: small pure functions, each a scalar (a mean), and their weighted sum.

They read what `Scene.render(..., training=True)` returns: `views.opacity`, and the samples in
`views.rendered` (`weights`, `points`, `rays`, the last an index into `views.directions`). Terms that ask the
field take it as it is.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.scene.field import Field
from sds3d.scene.nerf import RenderedViews, Scene
from sds3d.scene.renderer import Rendered


@dataclass(frozen=True)
class RegularizerOptions:
    """Weights on the summed-gradient scale of the objective; 0 leaves a term out, and unevaluated."""

    opacity: float = 0.0
    entropy: float = 0.0
    entropy_from: float = 0.5  # share of the run after which half-transparent matter is punished
    orientation: float = 0.0
    depth_variance: float = 0.0  # grows with the run, as orientation does
    sparsity: float = 0.0
    smooth_density: float = 0.0
    smooth_albedo: float = 0.0
    samples: int = 4096  # random points or samples a term looks at

    def __post_init__(self) -> None:
        if min(vars(self).values()) < 0 or self.samples < 1:
            raise UserError("regulariser weights must not be negative and samples must be positive")


def opacity_penalty(opacity: Tensor) -> Tensor:
    """mean sqrt(o^2 + 0.01) of opacities in [0, 1], any shape: against filling space. DreamFusion (Poole et
    al. 2022), appendix A.3."""
    return (opacity.square() + 0.01).sqrt().mean()


def opacity_entropy(opacity: Tensor) -> Tensor:
    """Mean binary entropy in nats of opacities in [0, 1], any shape: against half-transparent matter.
    Latent-NeRF (Metzer et al. 2022), its sparsity loss. Clamped off both ends, where the slope is
    infinite."""
    sure = opacity.clamp(1e-5, 1 - 1e-5)
    return -(sure * sure.log() + (1 - sure) * (1 - sure).log()).mean()


def depth_variance(spread: Tensor, opacity: Tensor) -> Tensor:
    """Mean variance of the depth along rays, world units squared, where opacities exceed 1/2: matter becomes a surface, not a fog
    that is only opaque in the sum. spread and opacity (R,). HiFA (Zhu and Zhuang 2023, arXiv:2305.18766), its
    z-variance."""
    return (spread * (opacity.detach() > 0.5)).mean()


def sparsity(density: Tensor, scale: float = 0.1) -> Tensor:
    """mean (1 - exp(-scale * density)) at points drawn over the box, (N,): against floaters. PlenOctrees (Yu
    et al. 2021), eq. 8."""
    return -torch.expm1(-scale * density).mean()


def orientation(weights: Tensor, normals: Tensor, directions: Tensor) -> Tensor:
    """mean of w max(0, n . d)^2 over samples: visible normals must not face away. Ref-NeRF (Verbin et al.
    2022), eq. 11.

    weights (N,), taken as constants as in DreamFusion; normals, directions (N, 3) unit, directions leaving
    the camera.
    """
    away = (normals * directions).sum(-1).clamp(min=0)
    return (weights.detach() * away.square()).mean()


def scene_orientation(
    field: Field, rendered: Rendered, directions: Tensor, count: int, generator: torch.Generator
) -> Tensor:
    """`orientation` over `count` of the rendered samples, drawn in proportion to their weights; directions
    (R, 3).

    All samples would cost four field evaluations each. Drawing by weight and weighing equally has the mean of
    the weighted sum divided by the weights' sum. 0 where nothing was rendered.
    """
    weights = rendered.weights.detach()
    if not weights.any():
        return weights.sum()
    # By inversion: torch.multinomial wants its generator on the weights' device, and at most 2^24 of them.
    cumulative = weights.double().cumsum(0)
    draws = torch.rand(count, generator=generator, dtype=torch.float64, device=generator.device)
    draws = draws.to(cumulative) * cumulative[-1]
    chosen = torch.searchsorted(cumulative, draws).clamp(max=len(weights) - 1)
    normals = field.normal(rendered.points[chosen])
    return orientation(torch.ones_like(weights[chosen]), normals, directions[rendered.rays[chosen]])


def total_variation(
    field: Field, points: Tensor, step: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Mean absolute difference of (opacity over a step, albedo) between points (N, 3) and random neighbours
    at distance `step`.

    Total variation of the field sampled at random (Rudin, Osher and Fatemi 1992; over NeRF grids: Plenoxels,
    Fridovich-Keil et al. 2022, eq. 3). Density is compared as the opacity of one step, so that hard surfaces
    do not outweigh all else. Zeros where there are no points, as in an emptied scene.
    """
    if len(points) == 0:
        return points.new_zeros(()), points.new_zeros(())
    offsets = torch.randn(points.shape, generator=generator, device=generator.device).to(points)
    neighbours = points + step * offsets / offsets.norm(dim=-1, keepdim=True).clamp(min=1e-6)
    density, albedo = field(torch.cat([points, neighbours]))
    opacity = -torch.expm1(-density * step)
    here, there = opacity.chunk(2)
    colour, other = albedo.chunk(2)
    return (here - there).abs().mean(), (colour - other).abs().mean()


def random_points(count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Points (count, 3) uniform in the box [-1, 1]^3, for `sparsity` and `total_variation`."""
    return (torch.rand(count, 3, generator=generator, device=generator.device) * 2 - 1).to(device)


def regularization(
    scene: Scene,
    views: RenderedViews,
    weights: RegularizerOptions,
    progress: float,
    generator: torch.Generator,
) -> Tensor:
    """The weighted sum of the regularisers that are switched on."""
    total = views.opacity.new_zeros(())
    if weights.opacity:
        total = total + weights.opacity * opacity_penalty(views.opacity)
    if weights.entropy and progress >= weights.entropy_from:
        total = total + weights.entropy * opacity_entropy(views.opacity)
    if weights.orientation:
        turned = scene_orientation(scene.field, views.rendered, views.directions, weights.samples, generator)
        total = total + weights.orientation * progress * turned
    if weights.depth_variance:
        variance = depth_variance(views.rendered.spread, views.rendered.opacity)
        total = total + weights.depth_variance * progress * variance
    if weights.sparsity:
        points = random_points(weights.samples, generator, scene.device)
        total = total + weights.sparsity * sparsity(scene.field.density(points))
    if weights.smooth_density or weights.smooth_albedo:
        points = surface_points(views, weights.samples, generator)
        density, albedo = total_variation(scene.field, points, 0.02, generator)
        total = total + weights.smooth_density * density + weights.smooth_albedo * albedo
    return total


def surface_points(views: RenderedViews, count: int, generator: torch.Generator) -> Tensor:
    """Up to `count` (N, 3) of the rendered samples, chosen evenly."""
    points = views.rendered.points
    chosen = torch.randint(max(len(points), 1), (min(count, len(points)),), generator=generator)
    return points[chosen.to(points.device)]
