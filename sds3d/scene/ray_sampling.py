"""Samples along rays where the occupancy grid is not empty: steps of one length from the ray's entry into the
box, shifted by one offset per ray.

nerfacc's sampler (Li et al. 2023, arXiv:2305.04966) exists on CUDA only, so a ray marcher in torch provides
the same samples elsewhere.
"""

import warnings
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sds3d.scene.compositing import Samples
from sds3d.scene.occupancy import OccupancyGrid, slab


@torch.no_grad()
def sample(
    grid: OccupancyGrid,
    origins: Tensor,
    directions: Tensor,
    jitter: Tensor,
    step: float,
    early_stop: float = 0.0,
) -> Samples:
    """Samples of rays (R, 3) with unit directions, at `step` world units, in occupied cells of the grid.

    Each lies at a fraction `jitter` (R,) in [0, 1) of its step. Samples that the grid's lower bound of the
    density occludes to a transmittance of `early_stop` or less are left out; 0 keeps all.
    """
    if origins.is_cuda and nerfacc_cuda():
        return sample_nerfacc(grid, origins, directions, jitter, step, early_stop)
    return sample_torch(grid, origins, directions, jitter, step, early_stop)


def sample_torch(
    grid: OccupancyGrid, origins: Tensor, directions: Tensor, jitter: Tensor, step: float, early_stop: float
) -> Samples:
    """`sample` in torch, dense over (rays that intersect the occupied region, steps)."""
    entry, _ = slab(origins, directions, grid.box)
    near, far = slab(origins, directions, grid.bounds)
    rays = (far > near).nonzero().squeeze(1)
    entry, near, far = entry[rays], near[rays], far[rays]

    # Counted from the entry into the whole box, so that samples do not depend on which cells are occupied.
    first = ((near - entry) / step).floor()
    width = int((((far - entry) / step).ceil() - first).amax().item()) if len(rays) else 0
    t_starts = entry[:, None] + (first[:, None] + torch.arange(width, device=rays.device)) * step
    distances = t_starts + step * jitter[rays, None]

    density = _occlusion_lower_bound(grid, origins[rays], directions[rays], distances)
    keep = (density >= 0) & (distances >= near[:, None]) & (distances <= far[:, None])
    if early_stop > 0:
        log_transmittance = (density.clamp_(min=0) * -step).cumsum(1)
        keep[:, 1:] &= log_transmittance[:, :-1].exp_() > early_stop

    dense_indices = keep.flatten().nonzero().squeeze(1)
    ray_indices = rays[dense_indices.div(max(width, 1), rounding_mode="floor")]
    distance = distances.flatten()[dense_indices]
    points = torch.addcmul(origins[ray_indices], distance[:, None], directions[ray_indices])
    starts = t_starts.flatten()[dense_indices]
    return Samples(ray_indices, starts, starts + step, points, (t_starts, dense_indices))


def sample_nerfacc(
    grid: OccupancyGrid, origins: Tensor, directions: Tensor, jitter: Tensor, step: float, early_stop: float
) -> Samples:
    """`sample` by nerfacc's traversal of the grid, on CUDA. The host waits once, twice with an early stop."""
    from nerfacc import cuda, exclusive_sum

    entry, leave = slab(origins, directions, grid.box)
    # The traversal looks up the cell at the middle of a step, so the steps are shifted for the jitter.
    near = entry + (jitter - 0.5) * step
    crossings = torch.stack([entry, leave], dim=1)
    kinds = torch.arange(2, device=entry.device).repeat(len(entry), 1)  # 0 enters, 1 leaves
    hits = (leave > entry)[:, None]
    limits = (near, leave, step, 0.0)  # of distances; the steps' length and growth
    outputs = (False, True, False)  # neither intervals nor the planes where rays end, only samples
    cells, box = grid.occupied[None], grid.box.view(1, 6)
    _, traversed, _ = cuda.traverse_grids(
        origins.contiguous(),
        directions.contiguous(),
        hits,
        cells,
        box,
        crossings,
        kinds,
        hits,
        *limits,
        *outputs,
        -1,
        False,
    )

    rays = traversed.ray_indices
    # The traversal adds up steps; counting them gives distances without its rounding errors.
    number = ((traversed.vals - near[rays]) / step - 0.5).round()
    t_starts = entry[rays] + number * step
    distance = t_starts + step * jitter[rays]
    if early_stop > 0:
        density = _occlusion_lower_bound(grid, origins[rays], directions[rays], distance[:, None])
        chunks = torch.stack([traversed.chunk_starts, traversed.chunk_cnts], dim=-1)
        depth = exclusive_sum(density.squeeze(1).clamp_(min=0) * step, chunks)
        visible = ((-depth).exp_() > early_stop).nonzero().squeeze(1)
        rays, t_starts, distance = rays[visible], t_starts[visible], distance[visible]
    points = torch.addcmul(origins[rays], distance[:, None], directions[rays])
    return Samples(rays, t_starts, t_starts + step, points)


def _occlusion_lower_bound(
    grid: OccupancyGrid, origins: Tensor, directions: Tensor, distances: Tensor
) -> Tensor:
    """The grid's `occlusion_lower_bound` (R, S) at `distances` (R, S) along rays (R, 3)."""
    side = grid.resolution
    index = torch.zeros_like(distances)
    for axis in range(3):
        start, slope = (origins[:, axis, None] + 1) * (side / 2), directions[:, axis, None] * (side / 2)
        cell = torch.addcmul(start, slope, distances).floor_().clamp_(0, side - 1)
        index.mul_(side).add_(cell)  # whole numbers below 2^24 are exact in float32
    return grid.occlusion_lower_bound.flatten().index_select(0, index.flatten().int()).view_as(distances)


@lru_cache
def nerfacc_cuda() -> bool:
    """Whether nerfacc's CUDA kernels are usable; the first call builds them (one or two minutes, cached).

    nerfacc 0.5.3 does not build as shipped on CUDA 13: torch requires C++20, where its `lerp` collides with
    `std::lerp`. Here the installed sources are built as C++17 and registered with nerfacc. Warns once, and
    returns False, if that fails.
    """
    import nerfacc

    if not torch.cuda.is_available():
        return False
    try:
        from nerfacc import csrc  # noqa: F401  (built by its own setup.py)

        return True
    except ImportError:
        pass
    try:
        nerfacc.csrc = _build(Path(nerfacc.__file__).parent / "cuda" / "csrc")
    except (OSError, RuntimeError, ImportError) as error:
        reason = str(error).strip().splitlines()[0]
        warnings.warn(
            f"nerfacc's CUDA kernels did not build ({reason}): rays are sampled in torch instead",
            stacklevel=2,
        )
        return False
    return True


def _build(sources: Path) -> ModuleType:
    from torch.utils.cpp_extension import load

    files = [str(path) for pattern in ("*.cu", "*.cpp") for path in sorted(sources.glob(pattern))]
    return load("nerfacc_cuda", files, extra_cflags=["-O3"], extra_cuda_cflags=["-O3", "-std=c++17"])
