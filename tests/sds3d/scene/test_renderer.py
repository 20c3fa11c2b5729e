"""The renderer against closed forms of a sphere of constant density, and gradients of a small field."""

import pytest
import torch
from torch import Tensor, nn

from distill.runtime.errors import UserError
from sds3d.scene.cameras import ring
from sds3d.scene.compositing import RenderedRays
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import Field, FieldOptions
from sds3d.scene.occupancy import OccupancyGrid, slab
from sds3d.scene.ray_sampling import nerfacc_cuda
from sds3d.scene.renderer import RenderOptions, render

RADIUS, SIGMA = 0.6, 2.5
COLOUR = (0.9, 0.3, 0.1)
NO_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: CUDA sampling is unchecked"
)


class Sphere(nn.Module):
    """Constant density and colour within RADIUS of the origin."""

    def __init__(self, sigma: float = SIGMA) -> None:
        super().__init__()
        self.sigma = nn.Parameter(torch.tensor(sigma))
        self.colour = nn.Parameter(torch.tensor(COLOUR))

    def density(self, positions: Tensor) -> Tensor:
        return self.sigma * (positions.norm(dim=-1) < RADIUS)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(positions), self.colour.expand_as(positions)


def rays(count: int = 3, resolution: int = 20) -> tuple[Tensor, Tensor]:
    origins, directions = ring(count, resolution=resolution).rays()
    return origins.reshape(-1, 3), directions.reshape(-1, 3)


def chord(origins: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Where rays enter the sphere, and the length within it (0 where they miss)."""
    middle = -(origins * directions).sum(-1)
    half = (RADIUS**2 - (origins**2).sum(-1) + middle**2).clamp(min=0).sqrt()
    return middle - half, 2 * half


def exact_grid(sigma: float = SIGMA, resolution: int = 24) -> OccupancyGrid:
    """Occupied are exactly the cells that the sphere touches."""
    grid = OccupancyGrid(resolution)
    edges = torch.linspace(-1, 1, resolution + 1)
    nearest = torch.maximum(edges[:-1], -edges[1:]).clamp(min=0)
    x, y, z = torch.meshgrid(nearest, nearest, nearest, indexing="ij")
    inside = x**2 + y**2 + z**2 <= (RADIUS + 1e-4) ** 2
    grid.set_densities(sigma * inside, torch.zeros_like(x))
    return grid


def render_sphere(
    field: nn.Module, grid: OccupancyGrid, samples: int = 256, stop: float = 0.0, seed: int | None = None
) -> RenderedRays:
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return render(
        field, grid, *rays(), torch.tensor([0.0, 0.0, 1.0]), RenderOptions(samples, stop), generator
    )


@pytest.mark.parametrize("seed", [None, 0], ids=["midpoints", "jittered"])
def test_sphere_opacity_is_that_of_its_chord(seed: int | None) -> None:
    rendered = render_sphere(Sphere(), OccupancyGrid(), seed=seed)
    _, length = chord(*rays())
    exact = 1 - torch.exp(-SIGMA * length)
    error = (rendered.opacity - exact).abs()
    assert error.max() < 1.01 * SIGMA * 2 / 256  # a chord is counted in whole steps
    assert error.mean() < 2e-3 and exact.max() > 0.9
    assert rendered.opacity[length == 0].abs().max() == 0


def test_error_shrinks_with_the_step() -> None:
    exact = 1 - torch.exp(-SIGMA * chord(*rays())[1])
    coarse, fine = (
        (render_sphere(Sphere(), OccupancyGrid(), n).opacity - exact).abs().mean() for n in (64, 512)
    )
    assert fine < coarse / 4


def test_sphere_depth_is_the_weighted_mean_distance() -> None:
    rendered = render_sphere(Sphere(), OccupancyGrid())
    near, length = chord(*rays())
    hit = length > 0.3  # grazing rays have few steps
    through = torch.exp(-SIGMA * length)
    exact = near + 1 / SIGMA - length * through / (1 - through)
    torch.testing.assert_close(rendered.depth[hit], exact[hit], rtol=0, atol=2 / 256)
    assert (rendered.depth - exact)[hit].mean().abs() < 0.5e-3  # no offset by half a step
    assert rendered.depth[length == 0].abs().max() == 0


def test_sphere_depth_variance_is_the_weighted_variance() -> None:
    """Of an exponential distribution truncated at the chord's end."""
    rendered = render_sphere(Sphere(), OccupancyGrid())
    _, length = chord(*rays())
    hit = length > 0.3
    through = torch.exp(-SIGMA * length)
    mean = 1 / SIGMA - length * through / (1 - through)
    square = 2 / SIGMA * mean - length**2 * through / (1 - through)
    torch.testing.assert_close(rendered.depth_variance[hit], (square - mean**2)[hit], rtol=0.03, atol=1e-4)
    assert rendered.depth_variance[length == 0].abs().max() == 0


def test_colour_is_composited_over_the_background() -> None:
    rendered = render_sphere(Sphere(), OccupancyGrid())
    opacity = rendered.opacity[:, None]
    exact = opacity * torch.tensor(COLOUR) + (1 - opacity) * torch.tensor([0.0, 0.0, 1.0])
    torch.testing.assert_close(rendered.rgb, exact)


def test_gradient_to_density_is_analytic() -> None:
    sphere = Sphere()
    _, length = chord(*rays())
    render_sphere(sphere, OccupancyGrid(), 512).opacity.sum().backward()
    exact = (length * torch.exp(-SIGMA * length)).sum()
    torch.testing.assert_close(sphere.sigma.grad, exact, rtol=5e-3, atol=0)


@pytest.mark.parametrize("seed", [None, 3], ids=["midpoints", "jittered"])
def test_exact_grid_does_not_change_the_image(seed: int | None) -> None:
    dense, guided = (
        render_sphere(Sphere(), OccupancyGrid(), seed=seed),
        render_sphere(Sphere(), exact_grid(), seed=seed),
    )
    assert len(guided.weights) < len(dense.weights) / 3
    for name in ("rgb", "opacity", "depth"):
        torch.testing.assert_close(vars(guided)[name], vars(dense)[name], rtol=0, atol=2e-6)


def test_grid_without_occupied_cells_changes_the_image() -> None:
    grid = exact_grid()
    half = grid.density_ema * (torch.arange(24) < 12)[:, None, None]
    grid.set_densities(half, torch.zeros_like(half))
    assert (
        render_sphere(Sphere(), grid).opacity.sum()
        < 0.9 * render_sphere(Sphere(), exact_grid()).opacity.sum()
    )


def test_occluded_samples_are_skipped() -> None:
    sphere, grid = Sphere(80.0), OccupancyGrid()
    grid.update(sphere)
    stopped, whole = render_sphere(sphere, grid, stop=1e-3), render_sphere(sphere, grid)
    assert len(stopped.weights) < 0.7 * len(whole.weights)
    torch.testing.assert_close(stopped.opacity, whole.opacity, rtol=0, atol=1e-3)


def test_update_detects_the_sphere() -> None:
    grid = OccupancyGrid(24)
    assert grid.occupied.all()  # before the first update
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        grid.update(Sphere(), generator)
    exact = exact_grid().occupied
    assert not (grid.occupied & ~exact).any()
    centres = (grid._corners() + 0.5) / 12 - 1
    within = (centres.norm(dim=-1) < RADIUS - 2 / 24).view(24, 24, 24)
    assert grid.occupied[within].all() and within.sum() > 900  # except cells with a sliver of it
    assert grid.bounds.abs().max() < RADIUS + 2 / 24
    for _ in range(80):
        grid.update(Sphere(0.0), generator)
    assert not (grid.density_ema > 1e-3).any()  # decayed


def test_empty_grid_renders_the_background_with_zero_gradients() -> None:
    grid, field = OccupancyGrid(), Field(FieldOptions())
    grid.set_densities(torch.zeros(48, 48, 48), torch.zeros(48, 48, 48))
    rendered = render_sphere(field, grid)
    assert len(rendered.weights) == 0
    assert torch.equal(rendered.rgb, torch.tensor([0.0, 0.0, 1.0]).expand(1200, 3))
    rendered.rgb.sum().backward()
    assert not field.encoding.table.grad.any()


def test_jitter_depends_on_the_generator() -> None:
    first, again, other = (render_sphere(Sphere(), OccupancyGrid(), 64, seed=seed).rgb for seed in (1, 1, 2))
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_weights_sum_along_the_rays() -> None:
    rendered = render_sphere(Sphere(), exact_grid(), 64)
    sums = torch.zeros(1200).index_add(0, rendered.ray_indices, rendered.weights)
    torch.testing.assert_close(sums, rendered.opacity)
    origins, directions = rays()
    indices = rendered.ray_indices
    cross = torch.linalg.cross(rendered.points - origins[indices], directions[indices])
    assert cross.abs().max() < 1e-5  # each sample is on its ray


def test_split_gradients_have_equal_values_and_sum_to_the_gradient() -> None:
    """One image has a gradient to the density only, the other to the albedo only."""
    field = Sphere()
    rendered = render_sphere(field, exact_grid(), 64)
    leaves = (field.sigma, field.colour)
    target = torch.rand(rendered.rgb.shape, generator=torch.Generator().manual_seed(0))
    whole = torch.autograd.grad((rendered.rgb * target).sum(), leaves, retain_graph=True)
    rgb_density_grad, rgb_albedo_grad = rendered.split_gradients()
    torch.testing.assert_close(rgb_density_grad, rendered.rgb, atol=0, rtol=0)
    torch.testing.assert_close(rgb_albedo_grad, rendered.rgb, atol=0, rtol=0)
    geometry = torch.autograd.grad((rgb_density_grad * target).sum(), leaves, retain_graph=True)
    albedo = torch.autograd.grad((rgb_albedo_grad * target).sum(), leaves, allow_unused=True)
    torch.testing.assert_close(geometry[0], whole[0])
    torch.testing.assert_close(geometry[1], torch.zeros(3), atol=1e-3, rtol=0)  # of a gradient of hundreds
    assert albedo[0] is None and float(whole[1].min()) > 10
    torch.testing.assert_close(albedo[1], whole[1])


def test_gradients_match_finite_differences() -> None:
    torch.manual_seed(0)
    encoding = HashEncodingOptions(2, 2, 5, 3, 1.7)
    field = Field(FieldOptions(encoding, 5, blob_density=3.0, blob_radius=0.8)).double()
    field.encoding.table.data.normal_()
    names = [name for name, _ in field.named_parameters()]
    origins, directions = (value.double()[::67] for value in rays())
    background = torch.rand(3, dtype=torch.float64)

    def image(background: Tensor, *values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        def evaluate(positions: Tensor) -> tuple[Tensor, Tensor]:
            return torch.func.functional_call(field, dict(zip(names, values)), positions)

        rendered = render(evaluate, OccupancyGrid(), origins, directions, background, RenderOptions(16, 0.0))
        return rendered.rgb, rendered.opacity, rendered.depth

    inputs = [value.detach().clone().requires_grad_() for value in (background, *field.parameters())]
    assert torch.autograd.gradcheck(image, inputs)


def test_slab_distances() -> None:
    box = torch.tensor([[-1.0, -1, -1], [1, 1, 1]])
    origins = torch.tensor([[3.0, 0, 0], [0, 0, 0], [3, 2, 0]])
    directions = torch.tensor([[-1.0, 0, 0], [0, 0, 1], [-1, 0, 0]])
    near, far = slab(origins, directions, box)
    assert near.tolist()[:2] == [2, 0] and far.tolist()[:2] == [4, 1] and near[2] > far[2]


@pytest.mark.parametrize("values", [(1, 0.0), (64, 1.0), (64, -0.1)])
def test_options_out_of_range_raise(values: tuple[int, float]) -> None:
    with pytest.raises(UserError, match="give at least 2 samples"):
        RenderOptions(*values)
    with pytest.raises(UserError, match="resolution is 2"):
        OccupancyGrid(2)


@pytest.mark.gpu
@NO_CUDA
def test_cuda_sampler_renders_the_sphere() -> None:
    if not nerfacc_cuda():
        pytest.skip("nerfacc's CUDA kernels did not build: its sampler is unchecked")
    ours = render_sphere(Sphere(), exact_grid())
    origins, directions = (value.cuda() for value in rays())
    background = torch.tensor([0.0, 0.0, 1.0]).cuda()
    theirs = render(
        Sphere().cuda(), exact_grid().cuda(), origins, directions, background, RenderOptions(256, 0.0)
    )
    torch.testing.assert_close(theirs.opacity.cpu(), ours.opacity, rtol=0, atol=SIGMA * 2 / 256)
    torch.testing.assert_close(theirs.rgb.cpu(), ours.rgb, rtol=0, atol=SIGMA * 2 / 256)


@pytest.mark.gpu
@NO_CUDA
def test_torch_sampling_runs_on_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sds3d.scene.ray_sampling.nerfacc_cuda", lambda: False)
    origins, directions = (value.cuda() for value in rays())
    background = torch.tensor([0.0, 0.0, 1.0]).cuda()
    theirs = render(
        Sphere().cuda(), exact_grid().cuda(), origins, directions, background, RenderOptions(256, 0.0)
    )
    difference = theirs.rgb.cpu() - render_sphere(Sphere(), exact_grid()).rgb
    assert difference.abs().mean() < 1e-3  # steps at the rim may round differently
