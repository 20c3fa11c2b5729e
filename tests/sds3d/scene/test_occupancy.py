"""Which cells of the occupancy grid count as empty, and the bounds of those that do not."""

import pytest
import torch
from torch import Tensor

from sds3d.scene.occupancy import OccupancyGrid


def densities(scale: float) -> Tensor:
    return scale * torch.rand((8, 8, 8), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("scale", [1e-7, 0.02, 5.0], ids=["vanishing", "below the threshold", "dense"])
def test_cells_below_the_mean_and_the_threshold_are_empty(scale: float) -> None:
    grid, upper = OccupancyGrid(8, threshold=0.01), densities(scale)
    grid.set_densities(upper, torch.zeros_like(upper))
    limit = max(min(0.01 * 8 / 2, float(upper.mean())), 1e-6)
    assert torch.equal(grid.occupied, upper >= limit)


@pytest.mark.parametrize("corners", [((2, 0, 5), (6, 3, 5)), ((0, 0, 0), (7, 7, 7)), ((4, 4, 4), (4, 4, 4))])
def test_bounds_enclose_the_occupied_cells(corners: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    grid, upper = OccupancyGrid(8), torch.zeros(8, 8, 8)
    for corner in corners:
        upper[corner] = 1.0
    grid.set_densities(upper, torch.zeros_like(upper))
    low, high = torch.tensor(corners).float()
    assert torch.equal(grid.bounds, torch.stack([low, high + 1]) / 4 - 1)
    assert "box" not in grid.state_dict()


def test_bounds_of_an_empty_grid_have_no_extent() -> None:
    grid = OccupancyGrid(8)
    grid.set_densities(torch.zeros(8, 8, 8), torch.zeros(8, 8, 8))
    assert torch.equal(grid.bounds, torch.full((2, 3), -1.0))
