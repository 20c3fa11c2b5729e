"""What keeps a NeRF in shape while a teacher pulls at it: pure functions, each a scalar to be added to the loss.

They read what `Scene.render(..., training=True)` returns: `views.opacity`, and in `views.rendered` the samples (`weights`, `points`,
`rays`, the last an index into `views.directions`). Means are over rays or points, so weights hold across resolutions.
"""

import torch
from torch import Tensor

from distill.errors import UserError
from sds3d.field import Field
from sds3d.renderer import Rendered


def opacity_penalty(opacity: Tensor) -> Tensor:
    """mean sqrt(o^2 + 0.01) of opacity (any shape) in [0, 1]: empties what need not be there (DreamFusion, Poole et al. 2022, A.2)."""
    return (opacity**2 + 0.01).sqrt().mean()


def opacity_entropy(opacity: Tensor, margin: float = 1e-3) -> Tensor:
    """Mean binary entropy, in bits, of opacity (any shape) in [0, 1]: each pixel is object or background (as in Stable-Dreamfusion).

    Opacity is clamped `margin` off both ends, where the slope of the entropy is infinite.
    """
    p = opacity.clamp(margin, 1 - margin)
    return -(p * p.log2() + (1 - p) * (1 - p).log2()).mean()


def orientation(weights: Tensor, normals: Tensor, directions: Tensor, count: int) -> Tensor:
    """Sum of weight * max(0, normal . direction)^2 over M samples, by ray (Ref-NeRF, Verbin et al. 2022, eq. 11).

    weights (M,), not differentiated (as in DreamFusion, else matter is thinned instead of turned); unit outward normals (M, 3);
    unit directions (M, 3) of the samples' rays, away from the camera; `count` rays.
    """
    away = (normals * directions).sum(-1).clamp(min=0)
    return (weights.detach() * away**2).sum() / max(count, 1)


def sampled_orientation(
    field: Field, rendered: Rendered, directions: Tensor, generator: torch.Generator | None = None, samples: int = 4096
) -> Tensor:
    """`orientation` of rays `directions` (R, 3), estimated without bias from `samples` samples drawn in proportion to their weight.

    A normal takes four evaluations of the field: all samples of a step would cost more than the step. Zero for empty renders.
    """
    weights = rendered.weights.detach()
    total = weights.sum()
    if len(weights) == 0 or not total > 0:
        return directions.new_zeros(())
    # By inversion: torch.multinomial needs a generator on the weights' device, and at most 2^24 weights.
    draws = torch.rand(samples, generator=generator, device="cpu" if generator is None else generator.device)
    steps = weights.double().cumsum(0)
    chosen = torch.searchsorted(steps, draws.to(steps) * steps[-1]).clamp(max=len(weights) - 1)
    normals = field.normal(rendered.points[chosen])
    share = (total / samples).expand(samples)
    return orientation(share, normals, directions[rendered.rays[chosen]], len(directions))


def smoothness(field: Field, points: Tensor, step: float = 0.02, generator: torch.Generator | None = None) -> Tensor:
    """Total variation at points (N, 3): mean |difference| to a neighbour `step` away, of log(1 + density) and of albedo's channels.

    The neighbour lies in a random direction (RegNeRF and Plenoxels difference along fixed axes). Density counts by its logarithm, as
    a surface's jump from nothing to hundreds is what is wanted. Raises `UserError` for a step that is not positive.
    """
    if step <= 0:
        raise UserError(f"smoothness step is {step}: give a positive length in world units")
    offset = torch.randn(points.shape, generator=generator, device="cpu" if generator is None else generator.device)
    offset = torch.nn.functional.normalize(offset, dim=-1).to(points)
    density, albedo = field(torch.cat([points, points + step * offset]))
    near, far = torch.log1p(density).chunk(2)
    colour, other = albedo.chunk(2)
    return (near - far).abs().mean() + (colour - other).abs().mean()


def sparsity(density: Tensor) -> Tensor:
    """mean log(1 + 2 density^2) of densities (any shape) at random points: a Cauchy prior on empty space (SNeRG, Hedman et al. 2021)."""
    return torch.log1p(2 * density**2).mean()


def random_points(count: int, generator: torch.Generator, device: torch.device | str = "cpu") -> Tensor:
    """Points (count, 3), uniform in the scene's box [-1, 1]^3: where `sparsity` and `smoothness` look when nothing better is known."""
    return (torch.rand(count, 3, generator=generator, device=generator.device) * 2 - 1).to(device)
