"""From samples on rays to their colours: emission and absorption (Max 1995), composited by nerfacc."""

from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from sds3d.scene.field import Field
from sds3d.scene.shading import PointLights

MIN_WEIGHT = 1e-3  # of a sample whose normal counts; the others are invisible


@dataclass(frozen=True)
class Samples:
    """M samples on R rays, one for each interval [t_start, t_end] along a ray.

    `dense` is None on the flat CUDA path. In the torch path it holds `t_starts` (K, S) of all steps of the K
    rays that intersect the occupied region, and the index (M,) of each sample in that array, flattened.
    """

    ray_indices: Tensor  # (M,) int64, ascending
    t_starts: Tensor  # (M,) world units
    t_ends: Tensor  # (M,)
    points: Tensor  # (M, 3)
    dense: tuple[Tensor, Tensor] | None = None


@dataclass(frozen=True)
class Rays:
    """R rays, and what their samples are composited with."""

    origins: Tensor  # (R, 3)
    directions: Tensor  # (R, 3) unit
    background: Tensor  # (R, 3) or (3,)
    jitter: Tensor  # (R,) in [0, 1), of a step
    lights: PointLights | None = None  # one a ray; None shows the albedo

    def __len__(self) -> int:
        return len(self.origins)

    def select(self, part: slice) -> "Rays":
        """The rays of a slice."""
        background = self.background if self.background.dim() == 1 else self.background[part]
        lights = None if self.lights is None else self.lights.select(part)
        return Rays(self.origins[part], self.directions[part], background, self.jitter[part], lights)


@dataclass(frozen=True)
class RenderedRays:
    """Renders of R rays, and their M samples, for regularizers; nothing of the samples has a gradient."""

    rgb: Tensor  # (R, 3) in [0, 1]
    albedo_rgb: Tensor  # (R, 3) `rgb` without the background, with a gradient to the albedo alone
    opacity: Tensor  # (R,) in [0, 1]
    depth: Tensor  # (R,) mean distance along the ray, weighted by the samples; 0 where nothing is hit
    depth_variance: Tensor  # (R,) of that distance
    normal: Tensor | None  # (R, 3) weighted sum over the samples
    weights: Tensor  # (M,) compositing weights
    points: Tensor  # (M, 3)
    ray_indices: Tensor  # (M,) int64

    def split_gradients(self) -> tuple[Tensor, Tensor]:
        """`rgb` (R, 3) twice, with a gradient to the density only, and to the albedo only."""
        albedo_grad = self.albedo_rgb - self.albedo_rgb.detach()  # zero, with the gradient of the albedo
        return self.rgb - albedo_grad, self.rgb.detach() + albedo_grad


def composite(field: Field, samples: Samples, rays: Rays, step: float, normals: bool = False) -> RenderedRays:
    """Composite the field at the samples of rays, whose intervals have length `step`.

    Differentiable with respect to the field's parameters and the background. Normals cost four more field
    evaluations a visible sample; lit rays need them in any case.
    """
    indices, count = samples.ray_indices, len(rays)
    density, albedo = field(samples.points)
    weights = _weights(samples, density, count, step)
    normal = None
    if normals or rays.lights is not None:
        normal = _visible_normals(field, samples.points, weights.detach())
    colour = albedo_colour = albedo
    if rays.lights is not None and normal is not None:
        colour = rays.lights.shade(albedo, samples.points, normal, indices)
        albedo_colour = rays.lights.shade(albedo, samples.points, normal.detach(), indices)

    def along_rays(values: Tensor | None) -> Tensor:
        return _accumulate(weights, values, indices, count)

    opacity = along_rays(None).squeeze(-1)
    rgb = along_rays(colour) + (1 - opacity[:, None]) * rays.background
    distance = samples.t_starts + rays.jitter[indices] * step
    total = opacity.clamp(min=1e-6)
    depth = along_rays(distance[:, None]).squeeze(-1) / total
    # The gradient through the mean is zero, so it is left out.
    deviation = (distance - depth.detach()[indices]).square()
    variance = along_rays(deviation[:, None]).squeeze(-1) / total
    return RenderedRays(
        rgb,
        _accumulate(weights.detach(), albedo_colour, indices, count),
        opacity,
        depth,
        variance,
        along_rays(normal) if normals else None,
        weights.detach(),
        samples.points,
        indices,
    )


def composite_recomputed(
    field: Field, samples: Samples, rays: Rays, step: float, normals: bool = False
) -> RenderedRays:
    """`composite`, whose activations backward computes again (Chen et al. 2016, arXiv:1604.06174)."""
    result: Any = checkpoint(
        composite, field, samples, rays, step, normals, use_reentrant=False, preserve_rng_state=False
    )
    return result


def concatenate(parts: list[RenderedRays]) -> RenderedRays:
    """The renders of consecutive groups of rays as one."""
    values: dict[str, Any] = {
        name: None if value is None else torch.cat([vars(part)[name] for part in parts])
        for name, value in vars(parts[0]).items()
    }
    first = accumulate((len(part.rgb) for part in parts[:-1]), initial=0)
    indices = [part.ray_indices + offset for part, offset in zip(parts, first, strict=True)]
    return RenderedRays(**values | {"ray_indices": torch.cat(indices)})


def _visible_normals(field: Field, points: Tensor, weights: Tensor) -> Tensor:
    """Normals (M, 3) of samples of more than `MIN_WEIGHT`; zero for the others."""
    visible = (weights > MIN_WEIGHT).nonzero().squeeze(1)
    return torch.zeros_like(points).index_copy(0, visible, field.normal(points[visible]))


def _accumulate(weights: Tensor, values: Tensor | None, ray_indices: Tensor, count: int) -> Tensor:
    from nerfacc import accumulate_along_rays

    return accumulate_along_rays(weights, values, ray_indices, count)


def _weights(samples: Samples, density: Tensor, count: int, step: float) -> Tensor:
    """Compositing weights (M,) = T (1 - exp(-density * step)), T the transmittance before the sample."""
    from nerfacc import render_weight_from_density

    if samples.dense is None:
        return render_weight_from_density(
            samples.t_starts, samples.t_ends, density, ray_indices=samples.ray_indices, n_rays=count
        )[0]
    t_starts, indices = samples.dense
    dense = density.new_zeros(t_starts.numel()).index_copy(0, indices, density).view_as(t_starts)
    weights = render_weight_from_density(t_starts, t_starts + step, dense)[0]
    return weights.flatten().index_select(0, indices)
