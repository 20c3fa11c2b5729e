"""Volume rendering of a field along rays: occupancy-guided ray marching, and compositing by nerfacc.

See `ray_sampling.py` and `compositing.py`.
"""

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from distill.runtime.errors import UserError
from distill.runtime.processes import draw_rows
from distill.runtime.transfer import upload
from sds3d.scene.compositing import Rays, RenderedRays, composite, composite_recomputed, concatenate
from sds3d.scene.field import Field
from sds3d.scene.occupancy import OccupancyGrid
from sds3d.scene.ray_sampling import sample
from sds3d.scene.shading import PointLights


@dataclass(frozen=True)
class RenderOptions:
    """How finely rays are sampled, and how many at once. Raises `UserError` for a value out of range."""

    samples: int = 64  # steps across the box's side of 2 units
    early_stop: float = 1e-3  # transmittance below which samples are skipped; 0 keeps all
    rays_per_chunk: int | None = (
        None  # training renders so many rays at a time, again in backward: less memory; null: all at once
    )

    def __post_init__(self) -> None:
        if self.rays_per_chunk is not None and self.rays_per_chunk < 1:
            raise UserError(f"rays_per_chunk is {self.rays_per_chunk}: at least 1, or null, is expected")
        if self.samples < 2 or not 0 <= self.early_stop < 1:
            raise UserError(
                f"render samples {self.samples}, early_stop {self.early_stop}: "
                "give at least 2 samples and 0 <= early_stop < 1"
            )

    @property
    def step(self) -> float:
        """Length of a step in world units."""
        return 2 / self.samples


def render(
    field: Field,
    grid: OccupancyGrid,
    origins: Tensor,
    directions: Tensor,
    background: Tensor,
    options: RenderOptions,
    generator: torch.Generator | None = None,
    lights: PointLights | None = None,
    normals: bool = False,
) -> RenderedRays:
    """Render rays (R, 3) with unit directions over a background (R, 3) or (3,).

    With a generator the samples of each ray are shifted by one random fraction of a step; without, they are
    the steps' midpoints. Differentiable with respect to the field's parameters and the background (Kajiya and
    Von Herzen 1984; Max 1995). `lights`, one a ray, shade the albedo.
    """
    jitter = torch.full((len(origins),), 0.5)
    if generator is not None:
        jitter = draw_rows(partial(torch.rand, generator=generator, device=generator.device), len(origins))
    rays = Rays(origins, directions, background, upload(jitter, origins.device).to(origins), lights)
    chunk = options.rays_per_chunk
    if chunk is None or chunk >= len(rays) or not torch.is_grad_enabled():
        samples = sample(grid, origins, directions, rays.jitter, options.step, options.early_stop)
        return composite(field, samples, rays, options.step, normals)

    parts = []
    for first in range(0, len(rays), chunk):
        part = rays.select(slice(first, first + chunk))
        samples = sample(grid, part.origins, part.directions, part.jitter, options.step, options.early_stop)
        parts.append(composite_recomputed(field, samples, part, options.step, normals))
    return concatenate(parts)
