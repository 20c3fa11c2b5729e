"""Volume rendering of a field along rays: occupancy-guided ray marching, and compositing by nerfacc.

nerfacc (Li et al. 2023) composites on CPU and CUDA. Its sampler exists on CUDA only, so the CPU has a ray
marcher in torch with the same samples: steps of one length from the ray's entry into the box, shifted by one
random offset per ray.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.scene.field import Field
from sds3d.scene.occupancy import OccupancyGrid, slab


@dataclass(frozen=True)
class RenderOptions:
    """How finely rays are sampled. Raises `UserError` for a value out of range."""

    samples: int = 64  # steps across the box's side of 2 units
    early_stop: float = 1e-3  # transmittance below which samples are skipped; 0 keeps all

    def __post_init__(self) -> None:
        if self.samples < 2 or not 0 <= self.early_stop < 1:
            raise UserError(
                f"render samples {self.samples}, early_stop {self.early_stop}: "
                "give at least 2 samples and 0 <= early_stop < 1"
            )

    @property
    def step(self) -> float:
        """Length of a step in world units."""
        return 2 / self.samples


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
class RenderedRays:
    """Renders of R rays, and their M samples, for regularizers."""

    rgb: Tensor  # (R, 3) in [0, 1]
    opacity: Tensor  # (R,) in [0, 1]
    depth: Tensor  # (R,) mean distance along the ray, weighted by the samples; 0 where nothing is hit
    depth_variance: Tensor  # (R,) of that distance
    weights: Tensor  # (M,) compositing weights
    points: Tensor  # (M, 3)
    albedo: Tensor  # (M, 3)
    ray_indices: Tensor  # (M,) int64

    def gather(self, values: Tensor) -> Tensor:
        """Weighted sums (R, D) along the rays of values (M, D) at the samples."""
        return _accumulate(self.weights, values, self.ray_indices, len(self.rgb))

    def split_gradients(self) -> tuple[Tensor, Tensor]:
        """`rgb` (R, 3) twice, with a gradient to the density only, and to the albedo only."""
        colour = _accumulate(self.weights.detach(), self.albedo, self.ray_indices, len(self.rgb))
        albedo_grad = colour - colour.detach()  # zero, with the gradient of the albedo
        return self.rgb - albedo_grad, self.rgb.detach() + albedo_grad


def render(
    field: Field,
    grid: OccupancyGrid,
    origins: Tensor,
    directions: Tensor,
    background: Tensor,
    options: RenderOptions,
    generator: torch.Generator | None = None,
) -> RenderedRays:
    """Render rays (R, 3) with unit directions over a background (R, 3) or (3,).

    With a generator the samples of each ray are shifted by one random fraction of a step; without, they are
    the steps' midpoints. Differentiable with respect to the field's parameters and the background (Kajiya and
    Von Herzen 1984; Max 1995).
    """
    jitter = torch.full((len(origins),), 0.5)
    if generator is not None:
        jitter = torch.rand(len(origins), generator=generator, device=generator.device)
    jitter = jitter.to(origins)
    samples = sample(grid, origins, directions, jitter, options)
    indices = samples.ray_indices
    density, albedo = field(samples.points)
    weights = _weights(samples, density, len(origins), options.step)

    def along_rays(values: Tensor | None) -> Tensor:
        return _accumulate(weights, values, indices, len(origins))

    opacity = along_rays(None).squeeze(-1)
    rgb = along_rays(albedo) + (1 - opacity[:, None]) * background
    distance = samples.t_starts + jitter[indices] * options.step
    total = opacity.clamp(min=1e-6)
    depth = along_rays(distance[:, None]).squeeze(-1) / total
    # The gradient through the mean is zero, so it is left out.
    deviation = (distance - depth.detach()[indices]).square()
    variance = along_rays(deviation[:, None]).squeeze(-1) / total
    return RenderedRays(rgb, opacity, depth, variance, weights, samples.points, albedo, indices)


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


@torch.no_grad()
def sample(
    grid: OccupancyGrid, origins: Tensor, directions: Tensor, jitter: Tensor, options: RenderOptions
) -> Samples:
    """Samples of rays (R, 3) in occupied cells of the grid; `jitter` (R,) in [0, 1) is relative to a step."""
    if origins.is_cuda and nerfacc_cuda():
        return _sample_nerfacc(grid, origins, directions, jitter, options)
    return _sample_rays(grid, origins, directions, jitter, options)


def _sample_rays(
    grid: OccupancyGrid, origins: Tensor, directions: Tensor, jitter: Tensor, options: RenderOptions
) -> Samples:
    """Ray marching in torch, dense over (rays that intersect the occupied region, steps)."""
    step = options.step
    entry, _ = slab(origins, directions, torch.stack([-torch.ones(3), torch.ones(3)]).to(origins))
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
    if options.early_stop > 0:
        log_transmittance = (density.clamp_(min=0) * -step).cumsum(1)
        keep[:, 1:] &= log_transmittance[:, :-1].exp_() > options.early_stop

    dense_indices = keep.flatten().nonzero().squeeze(1)
    ray_indices = rays[dense_indices.div(max(width, 1), rounding_mode="floor")]
    distance = distances.flatten()[dense_indices]
    points = torch.addcmul(origins[ray_indices], distance[:, None], directions[ray_indices])
    starts = t_starts.flatten()[dense_indices]
    return Samples(ray_indices, starts, starts + step, points, (t_starts, dense_indices))


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


def _sample_nerfacc(
    grid: OccupancyGrid, origins: Tensor, directions: Tensor, jitter: Tensor, options: RenderOptions
) -> Samples:
    """The same samples from nerfacc's CUDA traversal. Occluded ones remain: on a GPU they cost little."""
    from nerfacc import OccGridEstimator

    estimator = OccGridEstimator([-1.0] * 3 + [1.0] * 3, grid.resolution).to(origins.device)
    estimator.binaries.copy_(grid.occupied[None])
    entry, leave = slab(origins, directions, estimator.aabbs.view(2, 3))
    rays, t_starts, t_ends = estimator.sampling(
        origins, directions, t_min=entry, t_max=leave, render_step_size=options.step
    )
    points = origins[rays] + (t_starts + (t_ends - t_starts) * jitter[rays])[:, None] * directions[rays]
    return Samples(rays, t_starts, t_starts + options.step, points)


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
