"""Samples on rays against the grid's cells, and nerfacc's traversal against the torch marcher."""

import pytest
import torch
from torch import Tensor

from sds3d.scene.cameras import ring
from sds3d.scene.compositing import Samples
from sds3d.scene.occupancy import OccupancyGrid, slab
from sds3d.scene.ray_sampling import nerfacc_cuda, sample_nerfacc, sample_torch

STEP = 2 / 48
NO_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: nerfacc's sampler is unchecked"
)


def scattered_grid(density: float = 20.0, resolution: int = 16) -> OccupancyGrid:
    """A third of the cells are occupied, at random; a block of 6 cells a side is dense throughout."""
    cells = torch.rand((resolution,) * 3, generator=torch.Generator().manual_seed(0)) < 1 / 3
    cells[5:11, 5:11, 5:11] = True
    grid = OccupancyGrid(resolution)
    grid.set_densities(density * cells, density * cells)
    return grid


def rays(seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """Origins and directions of three cameras, and the jitter; without a seed that of the midpoints."""
    origins, directions = ring(3, resolution=24).rays()
    origins, directions = origins.reshape(-1, 3), directions.reshape(-1, 3)
    jitter = torch.full((len(origins),), 0.5)
    if seed is not None:
        jitter = torch.rand(len(origins), generator=torch.Generator().manual_seed(seed))
    return origins, directions, jitter


def cells_of(grid: OccupancyGrid, points: Tensor) -> Tensor:
    index = ((points + 1) * (grid.resolution / 2)).floor().long().clamp(0, grid.resolution - 1)
    return grid.occupied[index[:, 0], index[:, 1], index[:, 2]]


def numbers(samples: Samples, grid: OccupancyGrid, origins: Tensor, directions: Tensor) -> Tensor:
    """One integer a sample, of its ray and of its step after the entry into the box."""
    entry, _ = slab(origins, directions, grid.box)
    steps = ((samples.t_starts - entry[samples.ray_indices]) / STEP).round().long()
    return samples.ray_indices * 1000 + steps


@pytest.mark.parametrize("seed", [None, 0], ids=["midpoints", "jittered"])
def test_all_steps_in_occupied_cells_are_sampled(seed: int | None) -> None:
    grid, (origins, directions, jitter) = scattered_grid(), rays(seed)
    samples = sample_torch(grid, origins, directions, jitter, STEP, 0.0)
    entry, leave = slab(origins, directions, grid.box)
    distances = entry[:, None] + (torch.arange(100) + jitter[:, None]) * STEP
    points = origins[:, None] + distances[..., None] * directions[:, None]
    expected = cells_of(grid, points.view(-1, 3)).view(distances.shape) & (distances <= leave[:, None])
    assert abs(len(samples.points) - int(expected.sum())) <= 2  # rounding at the faces of cells
    assert cells_of(grid, samples.points).float().mean() > 0.9999


def test_early_stop_drops_what_the_dense_block_hides() -> None:
    grid, arguments = scattered_grid(200.0), rays(0)
    whole, stopped = (sample_torch(grid, *arguments, STEP, stop) for stop in (0.0, 1e-3))
    assert 0.5 * len(whole.points) < len(stopped.points) < 0.95 * len(whole.points)
    assert torch.isin(stopped.points.sum(1), whole.points.sum(1)).all()


@pytest.mark.gpu
@NO_CUDA
@pytest.mark.parametrize("early_stop", [0.0, 1e-3], ids=["all", "early stop"])
@pytest.mark.parametrize("seed", [None, 0], ids=["midpoints", "jittered"])
def test_nerfacc_samples_equal_the_torch_marchers(seed: int | None, early_stop: float) -> None:
    if not nerfacc_cuda():
        pytest.skip("nerfacc's CUDA kernels did not build: its sampler is unchecked")
    grid, arguments = scattered_grid(200.0).cuda(), [value.cuda() for value in rays(seed)]
    ours, theirs = (sampler(grid, *arguments, STEP, early_stop) for sampler in (sample_torch, sample_nerfacc))
    ids = [numbers(samples, grid, *arguments[:2]) for samples in (ours, theirs)]
    common = [torch.isin(ids[0], ids[1]), torch.isin(ids[1], ids[0])]
    different = int((~common[0]).sum() + (~common[1]).sum())
    assert different <= 1e-4 * len(ids[0])  # rounding at the faces of cells
    for name in ("ray_indices", "t_starts", "t_ends", "points"):
        torch.testing.assert_close(
            vars(theirs)[name][common[1]], vars(ours)[name][common[0]], rtol=0, atol=1e-6
        )
    assert cells_of(grid, theirs.points).float().mean() > 0.9999


@pytest.mark.gpu
@NO_CUDA
def test_nerfacc_sampler_of_rays_that_miss() -> None:
    if not nerfacc_cuda():
        pytest.skip("nerfacc's CUDA kernels did not build: its sampler is unchecked")
    origins, directions, jitter = (value.cuda() for value in rays(0))
    samples = sample_nerfacc(scattered_grid().cuda(), origins, -directions, jitter, STEP, 1e-3)
    assert len(samples.points) == 0
