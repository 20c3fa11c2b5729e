"""The project's CUDA branches, on nerfacc's own traversal and tinycudann's grid, against its torch twins."""

import pytest
import torch
from simulated_cuda.tinycudann import Encoding
from torch import Tensor

from sds3d.scene.cameras import ring
from sds3d.scene.compositing import Samples
from sds3d.scene.encoding import HashEncoding, HashEncodingOptions, TinyCudaEncoding, make_encoding
from sds3d.scene.occupancy import OccupancyGrid
from sds3d.scene.ray_sampling import nerfacc_cuda, sample

# dense levels of 4 and 8 nodes a side, hashed ones of 15 and 28
MIXED = HashEncodingOptions(
    n_levels=4, n_features_per_level=2, log2_hashmap_size=9, base_resolution=4, per_level_scale=1.9
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def random_grid(resolution: int = 16, fraction: float = 0.3) -> OccupancyGrid:
    grid = OccupancyGrid(resolution)
    density = torch.rand(resolution, resolution, resolution, generator=generator())
    grid.set_densities((density < fraction) * 10.0, torch.full_like(density, 4.0))
    return grid


def rays(views: int = 4) -> tuple[Tensor, Tensor]:
    origins, directions = ring(views, resolution=24).rays()
    return origins.reshape(-1, 3), directions.reshape(-1, 3)


@pytest.mark.parametrize("early_stop", [0.0, 1e-2])
@pytest.mark.parametrize("jitter", ["midpoints", "random"])
def test_nerfacc_samples_equal_the_torch_marchers(jitter: str, early_stop: float) -> None:
    """Sample for sample: intervals and points."""
    assert nerfacc_cuda()
    origins, directions = rays()
    offsets = torch.full((len(origins),), 0.5)
    if jitter == "random":
        offsets = torch.rand(len(origins), generator=generator())
    inputs, grid = (origins, directions, offsets), random_grid()
    expected = sample(grid, *inputs, 1 / 48, early_stop)
    theirs = sample(random_grid().cuda(), *(value.cuda() for value in inputs), 1 / 48, early_stop)
    assert theirs.dense is None and expected.dense is not None and len(expected.ray_indices) > 10_000
    # a sample on a cell's border may be rounded into either cell
    ours, other = by_ray(expected, len(origins)), by_ray(theirs, len(origins))
    equal = [ray for ray in range(len(origins)) if ours[ray].shape == other[ray].shape]
    assert len(equal) > len(origins) - 10
    for ray in equal:
        torch.testing.assert_close(other[ray], ours[ray], rtol=0, atol=2e-6)


def by_ray(samples: Samples, count: int) -> tuple[Tensor, ...]:
    """Start, end and point (N, 5) of the samples on each ray."""
    values = torch.cat([samples.t_starts[:, None], samples.t_ends[:, None], samples.points], 1).cpu()
    return values.split(samples.ray_indices.cpu().bincount(minlength=count).tolist())


def positions_to_the_border() -> Tensor:
    """Random positions, many near the border, and the corners, of the region that all nodes of a level span.

    Beyond it, in the outermost half cell, tinycudann wraps around and the torch grid repeats the border.
    """
    inner = torch.rand(500, 3, generator=generator(1))
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * 3)
    outer = 1 - torch.rand(500, 3, generator=generator(2)) * 0.02
    points = torch.cat([inner, corners, outer, 1 - outer, torch.where(inner < 0.5, outer, inner)])
    return points * MIXED.border


def test_the_torch_grid_equals_tinycudanns_up_to_the_border() -> None:
    assert isinstance(make_encoding(MIXED, "cuda"), TinyCudaEncoding)
    twin, theirs = HashEncoding(MIXED).cuda(), TinyCudaEncoding(MIXED)
    twin.table.data.copy_(torch.randn(twin.table.shape, generator=generator()))
    theirs.load_state_dict(twin.state_dict())
    positions = positions_to_the_border().cuda()
    ours, other = twin(positions), theirs(positions)
    torch.testing.assert_close(other, ours, rtol=0, atol=1e-5)
    weights = torch.randn(ours.shape, generator=generator(3)).cuda()
    (ours * weights).sum().backward()
    (other * weights).sum().backward()
    torch.testing.assert_close(theirs.table.grad, twin.table.grad, rtol=1e-5, atol=1e-4)


def test_the_stand_in_wraps_at_the_border() -> None:
    """A dense level of 4 nodes: beyond the last node of x follows the first of the next row."""
    config = {"n_levels": 1, "n_features_per_level": 1, "log2_hashmap_size": 9, "base_resolution": 4}
    grid = Encoding(3, {**config, "otype": "HashGrid", "per_level_scale": 2.0}, dtype=torch.float32)
    grid.params.data.copy_(torch.arange(64.0))
    at_the_end = grid(torch.tensor([[1.0, 0.0, 0.0]]).cuda()).item()  # x = 3.5, y = z = 0.5
    mean = sum(0.5**3 * (3 + x + 4 * y + 16 * z) for x in (0, 1) for y in (0, 1) for z in (0, 1))
    assert at_the_end == pytest.approx(mean)
