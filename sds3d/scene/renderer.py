"""Volume rendering of a field along rays: an occupancy-guided marcher, and compositing by nerfacc.

nerfacc (Li et al. 2023) composites on CPU and CUDA. Its sampler exists on CUDA only, so the CPU has a marcher
of its own, with the same samples: steps of one length from the ray's entry into the box on, shifted by one
random offset a ray.
"""

import warnings
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.scene.field import Field
from sds3d.scene.occupancy import OccupancyGrid, slab


@dataclass(frozen=True)
class RenderOptions:
    """How finely rays are sampled. Raises `UserError` for a value out of range."""

    samples: int = 64  # steps across the box's side of 2 units
    early_stop: float = 1e-3  # leave out samples behind matter that lets less through than this; 0 keeps all

    def __post_init__(self) -> None:
        if self.samples < 2 or not 0 <= self.early_stop < 1:
            raise UserError(
                f"render samples {self.samples}, early_stop {self.early_stop}: give at least 2 samples and 0 <= stop < 1"
            )

    @property
    def step(self) -> float:
        """Length of a step in world units."""
        return 2 / self.samples


@dataclass(frozen=True)
class Samples:
    """M samples on R rays: `ray` (M,) int64 ascending, `start` (M,) where its step begins, `point` (M, 3).

    `slot` (M,) is the place of each in a dense array, a row for each of K rays that meet the occupied part;
    `starts` (K, width) are that array's step beginnings. Both are None on the flat CUDA path.
    """

    ray: Tensor
    start: Tensor
    point: Tensor
    slot: Tensor | None = None
    starts: Tensor | None = None


@dataclass(frozen=True)
class Rendered:
    """What R rays saw. `weights` (M,), `points` (M, 3), `albedo` (M, 3), `rays` (M,) int64 are the samples behind
    it, for regularisers.

    depth is the mean distance along the ray of what was hit, 0 where nothing was, and spread its variance. `evaluations`
    counts field evaluations (M).
    """

    rgb: Tensor  # (R, 3) in [0, 1]
    opacity: Tensor  # (R,) in [0, 1]
    depth: Tensor  # (R,)
    spread: Tensor  # (R,)
    weights: Tensor
    points: Tensor
    albedo: Tensor
    rays: Tensor

    @property
    def evaluations(self) -> int:
        return len(self.weights)

    def gather(self, values: Tensor) -> Tensor:
        """Weighted sums (R, D) along the rays of values (M, D) at the samples."""
        return _along_rays(self.weights, values, self.rays, len(self.rgb))

    def split_gradients(self) -> tuple[Tensor, Tensor]:
        """The same colours (R, 3) twice: their gradient reaches the density only, and the albedo only."""
        colour = _along_rays(self.weights.detach(), self.albedo, self.rays, len(self.rgb))
        painted = colour - colour.detach()  # zero, with the gradient of the albedo
        return self.rgb - painted, self.rgb.detach() + painted


def render(
    field: Field,
    grid: OccupancyGrid,
    origins: Tensor,
    directions: Tensor,
    background: Tensor,
    options: RenderOptions,
    generator: torch.Generator | None = None,
) -> Rendered:
    """Render rays (R, 3) with unit directions before a background (R, 3) or (3,).

    With a generator each ray's samples are shifted by one random part of a step; without, they lie in the
    steps' middles. Differentiable with respect to the field's parameters and the background. Kajiya and Von
    Herzen 1984; Max 1995.
    """
    jitter = torch.full((len(origins),), 0.5)
    if generator is not None:
        jitter = torch.rand(len(origins), generator=generator, device=generator.device)
    jitter = jitter.to(origins)
    samples = sample(grid, origins, directions, jitter, options)
    density, albedo = field(samples.point)
    weights = _weights(samples, density, len(origins), options.step)
    opacity = _along_rays(weights, None, samples.ray, len(origins)).squeeze(-1)
    rgb = _along_rays(weights, albedo, samples.ray, len(origins)) + (1 - opacity[:, None]) * background
    distance = samples.start + jitter[samples.ray] * options.step
    hit = opacity.clamp(min=1e-6)
    depth = _along_rays(weights, distance[:, None], samples.ray, len(origins)).squeeze(-1) / hit
    off = (distance - depth.detach()[samples.ray]).square()  # about the mean: its own slope adds nothing
    spread = _along_rays(weights, off[:, None], samples.ray, len(origins)).squeeze(-1) / hit
    return Rendered(rgb, opacity, depth, spread, weights, samples.point, albedo, samples.ray)


def _along_rays(weights: Tensor, values: Tensor | None, rays: Tensor, count: int) -> Tensor:
    from nerfacc import accumulate_along_rays

    return accumulate_along_rays(weights, values, rays, count)


def _weights(samples: Samples, density: Tensor, count: int, step: float) -> Tensor:
    """Compositing weights (M,) = T (1 - exp(-density * step)), T the transmittance before the sample."""
    from nerfacc import render_weight_from_density

    if samples.slot is None:
        ends = samples.start + step
        return render_weight_from_density(
            samples.start, ends, density, ray_indices=samples.ray, n_rays=count
        )[0]
    starts = samples.starts
    dense = density.new_zeros(starts.numel()).index_copy(0, samples.slot, density).view_as(starts)
    weights = render_weight_from_density(starts, starts + step, dense)[0]
    return weights.flatten().index_select(0, samples.slot)


@torch.no_grad()
def sample(
    grid: OccupancyGrid, origins: Tensor, directions: Tensor, jitter: Tensor, options: RenderOptions
) -> Samples:
    """Samples of rays (R, 3) in cells of the grid that are not empty; `jitter` (R,) in [0, 1) is the point
    within the step."""
    if origins.is_cuda and nerfacc_cuda():
        return _sample_nerfacc(grid, origins, directions, jitter, options)
    return _march(grid, origins, directions, jitter, options)


def _march(
    grid: OccupancyGrid, origins: Tensor, directions: Tensor, jitter: Tensor, options: RenderOptions
) -> Samples:
    """The marcher in plain torch, dense over (rays that meet the occupied part, steps)."""
    step = options.step
    entry, _ = slab(origins, directions, torch.stack([-torch.ones(3), torch.ones(3)]).to(origins))
    near, far = slab(origins, directions, grid.bounds)
    rays = (far > near).nonzero().squeeze(1)
    entry, near, far = entry[rays], near[rays], far[rays]
    # Counted from the entry into the whole box: the samples do not depend on what the grid leaves out.
    first = ((near - entry) / step).floor()
    width = int((((far - entry) / step).ceil() - first).amax().item()) if len(rays) else 0
    starts = entry[:, None] + (first[:, None] + torch.arange(width, device=rays.device)) * step
    middles = starts + step * jitter[rays, None]
    guide = _look_up(grid, origins[rays], directions[rays], middles)
    keep = (guide >= 0) & (middles >= near[:, None]) & (middles <= far[:, None])
    if options.early_stop > 0:
        passed = (guide.clamp_(min=0) * -step).cumsum(1)
        keep[:, 1:] &= passed[:, :-1].exp_() > options.early_stop
    slot = keep.flatten().nonzero().squeeze(1)
    ray = rays[slot.div(max(width, 1), rounding_mode="floor")]
    distance = middles.flatten()[slot]
    point = torch.addcmul(origins[ray], distance[:, None], directions[ray])
    return Samples(ray, starts.flatten()[slot], point, slot, starts)


def _look_up(grid: OccupancyGrid, origins: Tensor, directions: Tensor, distances: Tensor) -> Tensor:
    """The grid's guide (R, S) at `distances` (R, S) along rays (R, 3)."""
    side = grid.resolution
    index = torch.zeros_like(distances)
    for axis in range(3):
        start, slope = (origins[:, axis, None] + 1) * (side / 2), directions[:, axis, None] * (side / 2)
        cell = torch.addcmul(start, slope, distances).floor_().clamp_(0, side - 1)
        index.mul_(side).add_(cell)  # whole numbers below 2^24 are exact in float32
    return grid.guide.flatten().index_select(0, index.flatten().int()).view_as(distances)


def _sample_nerfacc(
    grid: OccupancyGrid, origins: Tensor, directions: Tensor, jitter: Tensor, options: RenderOptions
) -> Samples:
    """The same samples from nerfacc's CUDA traversal. Hidden samples are kept: on a GPU they cost little."""
    from nerfacc import OccGridEstimator

    estimator = OccGridEstimator([-1.0] * 3 + [1.0] * 3, grid.resolution).to(origins.device)
    estimator.binaries.copy_(grid.occupied[None])
    entry, leave = slab(origins, directions, estimator.aabbs.view(2, 3))
    ray, start, end = estimator.sampling(
        origins, directions, t_min=entry, t_max=leave, render_step_size=options.step
    )
    point = origins[ray] + (start + (end - start) * jitter[ray])[:, None] * directions[ray]
    return Samples(ray, start, point)


@lru_cache
def nerfacc_cuda() -> bool:
    """Whether nerfacc's CUDA kernels are usable, building them on the first call (a minute or two, cached by
    torch).

    nerfacc 0.5.3 does not build as shipped on CUDA 13: torch asks for C++20, where its `lerp` collides with
    `std::lerp`. Here the installed sources are built as C++17 and handed to nerfacc. Warns once, and returns
    False, if that fails.
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
            f"nerfacc's CUDA kernels did not build ({reason}): rays are marched by the torch path instead",
            stacklevel=2,
        )
        return False
    return True


def _build(sources: Path):
    from torch.utils.cpp_extension import load

    files = [str(path) for pattern in ("*.cu", "*.cpp") for path in sorted(sources.glob(pattern))]
    return load("nerfacc_cuda", files, extra_cflags=["-O3"], extra_cuda_cflags=["-O3", "-std=c++17"])
