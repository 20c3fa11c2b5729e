"""Where the scene is: a coarse grid of densities that lets the renderer leave out empty and hidden
samples."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.runtime.errors import UserError
from sds3d.scene.field import Field

EMPTY = -1.0


class OccupancyGrid(nn.Module):
    """Cells over [-1, 1]^3 with a decaying maximum of the density seen in each (Mueller et al. 2022, appendix
    C).

    `levels` (G, G, G), indexed x, y, z, holds that maximum; `guide` is what the marcher reads: `EMPTY` in an
    empty cell, else a lower bound of the density there, from which samples behind opaque matter are told.
    Both are saved with the scene.
    """

    def __init__(self, resolution: int = 48, decay: float = 0.9, threshold: float = 0.01) -> None:
        """A cell is empty when its density times its side is below `threshold`, or below the mean where that
        is less."""
        super().__init__()
        if not 4 <= resolution <= 256:
            raise UserError(f"occupancy grid resolution is {resolution}: give a number from 4 to 256")
        self.resolution, self.decay, self.threshold = resolution, decay, threshold
        shape = (resolution,) * 3
        self.register_buffer("levels", torch.zeros(shape))
        self.register_buffer("guide", torch.zeros(shape))
        self.register_buffer("bounds", torch.tensor([[-1.0] * 3, [1.0] * 3]))

    @property
    def occupied(self) -> Tensor:
        """Which cells are not empty, (G, G, G) bool. All, before the first update."""
        return self.guide >= 0

    @torch.no_grad()
    def update(self, field: Field, generator: torch.Generator | None = None) -> None:
        """Look at one random point of every cell (its centre without a generator) and re-draw the map of
        empty cells."""
        count = self.resolution**3
        jitter = (
            torch.full((count, 3), 0.5) if generator is None else torch.rand(count, 3, generator=generator)
        )
        points = (self._corners() + jitter.to(self.levels.device)) * (2 / self.resolution) - 1
        density = torch.cat([field.density(part) for part in points.split(2**16)]).view_as(self.levels)
        self.set_densities(torch.maximum(self.levels * self.decay, density), density)

    @torch.no_grad()
    def set_densities(self, upper: Tensor, lower: Tensor) -> None:
        """Take densities (G, G, G): `upper` decides what is empty, `lower` what hides the cells behind."""
        self.levels.copy_(upper)
        least = min(self.threshold * self.resolution / 2, upper.mean().item())
        occupied = upper >= max(least, 1e-6)
        # Only matter on all sides hides what is behind it: a surface anywhere in its cell stays visible.
        core = -functional.max_pool3d(-lower[None, None], 3, stride=1, padding=1)[0, 0]
        self.guide.copy_(torch.where(occupied, core.clamp(min=0), EMPTY))
        self._bound()

    @torch.no_grad()
    def turn_by(self, quarters: int) -> None:
        """Turn with the field, about the vertical, by 90 degrees each."""
        for cells in (self.levels, self.guide):
            cells.copy_(cells.rot90(quarters, (0, 1)))
        self._bound()

    def _bound(self) -> None:
        cells = self.occupied.nonzero()
        low, high = (
            (cells.amin(0), cells.amax(0) + 1) if len(cells) else (cells.new_zeros(3), cells.new_zeros(3))
        )
        self.bounds.copy_(torch.stack([low, high]) * (2 / self.resolution) - 1)

    def _corners(self) -> Tensor:
        steps = torch.arange(self.resolution, device=self.levels.device, dtype=torch.float32)
        return torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=-1).view(-1, 3)


def slab(origins: Tensor, directions: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (R,) at which rays (R, 3) enter and leave the box `bounds` (2, 3); entry > exit where they
    miss it.

    The slab test of Kay and Kajiya (1986). Entry is at least 0.
    """
    safe = torch.where(directions.abs() < 1e-9, math.copysign(1e-9, 1.0), directions)
    crossings = (bounds[:, None] - origins) / safe
    return crossings.amin(0).amax(-1).clamp(min=0), crossings.amax(0).amin(-1)
