"""A coarse grid of densities with which the renderer skips empty and occluded samples."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from distill.runtime.errors import UserError
from distill.runtime.transfer import upload
from sds3d.scene.field import Field

EMPTY = -1.0


def _rename_buffers(grid: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Names of buffers in scenes of format sds3d-scene-1."""
    for old, new in (("levels", "density_ema"), ("guide", "occlusion_lower_bound")):
        if prefix + old in state:
            state[prefix + new] = state.pop(prefix + old)


class OccupancyGrid(nn.Module):
    """Cells over [-1, 1]^3 with a decaying maximum of sampled densities (Mueller et al. 2022, appendix C).

    `density_ema` (G, G, G), indexed x, y, z, holds that maximum. `occlusion_lower_bound` (G, G, G), which ray
    marching reads, is `EMPTY` in an empty cell, else a lower bound of the density in it. `bounds` (2, 3) are
    the corners of the occupied region. All are saved with the scene.
    """

    def __init__(self, resolution: int = 48, decay: float = 0.9, threshold: float = 0.01) -> None:
        """A cell is empty if its density is below the mean and, times its side, below `threshold`.

        Raises `UserError` for a resolution out of range.
        """
        super().__init__()
        if not 4 <= resolution <= 256:
            raise UserError(f"occupancy grid resolution is {resolution}: give a number from 4 to 256")
        self.resolution, self.decay, self.threshold = resolution, decay, threshold
        shape = (resolution,) * 3
        self.density_ema: Tensor
        self.register_buffer("density_ema", torch.zeros(shape))
        self.occlusion_lower_bound: Tensor
        self.register_buffer("occlusion_lower_bound", torch.zeros(shape))
        self.bounds: Tensor
        self.register_buffer("bounds", torch.tensor([[-1.0] * 3, [1.0] * 3]))
        self.box: Tensor  # (2, 3) the corners of the whole grid
        self.register_buffer("box", torch.tensor([[-1.0] * 3, [1.0] * 3]), persistent=False)
        self.register_load_state_dict_pre_hook(_rename_buffers)

    @property
    def occupied(self) -> Tensor:
        """Which cells are not empty, (G, G, G) bool. All, before the first update."""
        return self.occlusion_lower_bound >= 0

    @torch.no_grad()
    def update(self, field: Field, generator: torch.Generator | None = None) -> None:
        """Evaluate one random point of every cell (its centre without a generator) and update all buffers."""
        count = self.resolution**3
        jitter = (
            torch.full((count, 3), 0.5) if generator is None else torch.rand(count, 3, generator=generator)
        )
        jitter = upload(jitter, self.density_ema.device)
        points = (self._corners() + jitter) * (2 / self.resolution) - 1
        density = torch.cat([field.density(part) for part in points.split(2**16)]).view_as(self.density_ema)
        self.set_densities(torch.maximum(self.density_ema * self.decay, density), density)

    @torch.no_grad()
    def set_densities(self, upper: Tensor, lower: Tensor) -> None:
        """Set densities (G, G, G): `upper` decides which cells are empty, `lower` which ones occlude."""
        self.density_ema.copy_(upper)
        occupied = upper >= upper.mean().clamp(max=self.threshold * self.resolution / 2).clamp(min=1e-6)
        # Only cells that are dense on all sides occlude: a surface anywhere within its cell stays visible.
        core = -functional.max_pool3d(-lower[None, None], 3, stride=1, padding=1)[0, 0]
        self.occlusion_lower_bound.copy_(torch.where(occupied, core.clamp(min=0), EMPTY))
        self._update_bounds()

    @torch.no_grad()
    def rotate(self, quarter_turns: int) -> None:
        """Rotate about the vertical by 90 degrees a quarter turn, as the field."""
        for cells in (self.density_ema, self.occlusion_lower_bound):
            cells.copy_(cells.rot90(quarter_turns, (0, 1)))
        self._update_bounds()

    def _update_bounds(self) -> None:
        occupied, side = self.occupied, self.resolution
        slices = torch.stack([occupied.any(2).any(1), occupied.any(2).any(0), occupied.any(1).any(0)])
        index = torch.arange(side, device=occupied.device).expand(3, side)
        low = torch.where(slices, index, side).amin(1)
        high = torch.where(slices, index + 1, 0).amax(1)
        low = torch.minimum(low, high)  # both are 0 where no cell is occupied
        self.bounds.copy_(torch.stack([low, high]) * (2 / side) - 1)

    def _corners(self) -> Tensor:
        steps = torch.arange(self.resolution, device=self.density_ema.device, dtype=torch.float32)
        return torch.stack(torch.meshgrid(steps, steps, steps, indexing="ij"), dim=-1).view(-1, 3)


def slab(origins: Tensor, directions: Tensor, bounds: Tensor) -> tuple[Tensor, Tensor]:
    """Distances (R,) at which rays (R, 3) enter and leave the box `bounds` (2, 3); entry > exit for a miss.

    The slab test of Kay and Kajiya (1986). Entry is at least 0.
    """
    safe = torch.where(directions.abs() < 1e-9, math.copysign(1e-9, 1.0), directions)
    crossings = (bounds[:, None] - origins) / safe
    return crossings.amin(0).amax(-1).clamp(min=0), crossings.amax(0).amin(-1)
