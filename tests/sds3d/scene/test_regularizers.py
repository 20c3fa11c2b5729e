"""The regularizers on cases computed by hand, and on the views of a NeRF."""

import pytest
import torch
from torch import Tensor

from distill.objectives.options import LinearSchedule
from distill.runtime.config import build
from distill.runtime.errors import UserError
from sds3d.scene import regularizers
from sds3d.scene.cameras import ring
from sds3d.scene.compositing import RenderedRays
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import FieldOptions
from sds3d.scene.nerf import GridOptions, NeRF, NerfOptions
from sds3d.scene.renderer import RenderOptions


class LinearField:
    """The opacity of a step of 0.02 has slope 0.3 along x; albedo's red has slope 0.5 along y."""

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        albedo = torch.zeros_like(positions)
        albedo[:, 0] = 0.5 * positions[:, 1]
        return -torch.log(1 - (0.5 + 0.3 * (positions[:, 0] - 0.5))) / 0.02, albedo

    def normal(self, positions: Tensor) -> Tensor:
        """As of a density that falls along x."""
        return torch.tensor([1.0, 0, 0]).expand_as(positions)


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def rendered(weights: list[float], ray_indices: list[int], count: int) -> RenderedRays:
    points, zero = torch.zeros(len(weights), 3), torch.zeros(count)
    indices = torch.tensor(ray_indices, dtype=torch.long)
    rgb = torch.zeros(count, 3)
    return RenderedRays(rgb, rgb, zero, zero, zero, None, torch.tensor(weights), points, indices)


def test_opacity_penalty() -> None:
    opacity = torch.tensor([[0.0, 1.0]])
    torch.testing.assert_close(regularizers.opacity_penalty(opacity), torch.tensor((0.1 + 1.01**0.5) / 2))


def test_entropy_is_largest_at_half_and_decreases_to_both_sides() -> None:
    opacity = torch.tensor([0.5, 0.11, 0.0, 1.0], requires_grad=True)
    torch.testing.assert_close(regularizers.opacity_entropy(opacity[:1]), torch.tensor(2.0).log())
    torch.testing.assert_close(
        regularizers.opacity_entropy(opacity[1:2]), torch.tensor(0.3466), atol=1e-3, rtol=0
    )
    assert regularizers.opacity_entropy(opacity[2:]) < 1e-3
    regularizers.opacity_entropy(opacity).backward()
    assert opacity.grad.isfinite().all() and opacity.grad[1] > 0  # descending empties a faint pixel


def test_orientation_counts_normals_that_face_away() -> None:
    weights = torch.tensor([0.5, 0.25, 0.2], requires_grad=True)
    normals = torch.tensor([[1.0, 0, 0], [-1, 0, 0], [0.6, 0.8, 0]], requires_grad=True)
    directions = torch.tensor([[1.0, 0, 0]] * 3)
    loss = regularizers.orientation(weights, normals, directions)
    torch.testing.assert_close(loss, torch.tensor((0.5 + 0.2 * 0.36) / 3))
    loss.backward()
    assert weights.grad is None and normals.grad[1].abs().sum() == 0 and normals.grad[2, 0] > 0


def test_scene_orientation_estimates_the_weighted_mean() -> None:
    directions = torch.nn.functional.normalize(torch.randn(5, 3, generator=generator()), dim=-1)
    whole = rendered([0.3, 0.2, 0.9, 0.05, 0.0, 0.6, 0.4], [0, 0, 1, 2, 3, 3, 4], 5)
    normals = LinearField().normal(whole.points)
    mean = (
        regularizers.orientation(whole.weights, normals, directions[whole.ray_indices]) / whole.weights.mean()
    )
    estimate = regularizers.scene_orientation(LinearField(), whole, directions, 20000, generator())
    torch.testing.assert_close(estimate, mean, rtol=0.05, atol=0)
    for empty in (rendered([], [], 5), rendered([0.0], [1], 5)):
        assert regularizers.scene_orientation(LinearField(), empty, directions, 10, generator()) == 0


def test_total_variation_is_the_mean_slope_times_the_step() -> None:
    points = torch.rand(20000, 3, generator=generator())
    density, albedo = regularizers.total_variation(LinearField(), points, 0.02, generator())
    # |one coordinate| of a random direction is 1/2 on average; albedo's mean is over three channels.
    torch.testing.assert_close(density, torch.tensor(0.02 * 0.5 * 0.3), rtol=0.02, atol=0)
    torch.testing.assert_close(albedo, torch.tensor(0.02 * 0.5 * 0.5 / 3), rtol=0.02, atol=0)
    assert regularizers.total_variation(LinearField(), points[:0], 0.02, generator()) == (0, 0)


def test_depth_variance_counts_rays_that_are_opaque() -> None:
    variance, opacity = (torch.tensor(v, requires_grad=True) for v in ([0.3, 0.1, 0.2], [0.9, 0.2, 0.6]))
    loss = regularizers.depth_variance(variance, opacity)
    torch.testing.assert_close(loss, torch.tensor(0.5 / 3))
    loss.backward()
    assert opacity.grad is None and torch.allclose(variance.grad, torch.tensor([1 / 3, 0, 1 / 3]))


def test_sparsity() -> None:
    density = torch.tensor([0.0, 1.0, 100.0])
    expected = (2 - torch.exp(torch.tensor([-0.1, -10.0])).sum()) / 3
    torch.testing.assert_close(regularizers.sparsity(density), expected)


def test_random_points_fill_the_box() -> None:
    points = regularizers.random_points(4000, generator())
    assert points.abs().max() <= 1 and points.mean(0).abs().max() < 0.05 and points.std(0).min() > 0.55


def test_every_term_has_gradients_of_a_nerf() -> None:
    torch.manual_seed(0)
    encoding = HashEncodingOptions(
        n_levels=2, n_features_per_level=2, log2_hashmap_size=10, base_resolution=4
    )
    scene = NeRF(
        NerfOptions(FieldOptions(encoding, 8), GridOptions(resolution=16), RenderOptions(samples=32))
    )
    scene.field.encoding.table.data.normal_()
    views = scene.render(ring(2, resolution=12), None, generator(), training=True)
    points = regularizers.random_points(200, generator())
    terms = [
        regularizers.opacity_penalty(views.opacity),
        regularizers.opacity_entropy(views.opacity),
        regularizers.depth_variance(views.rays.depth_variance, torch.ones_like(views.rays.opacity)),
        regularizers.scene_orientation(scene.field, views.rays, views.directions, 2000, generator()),
        *regularizers.total_variation(scene.field, views.rays.points, 0.02, generator()),
        regularizers.sparsity(scene.field.density(points)),
    ]
    for term in terms:
        scene.zero_grad()
        term.backward(retain_graph=True)  # some share the render
        grad = scene.field.encoding.table.grad
        assert term.shape == () and term > 0 and grad.isfinite().all() and grad.abs().sum() > 0


def test_weights_are_numbers_or_schedules() -> None:
    """DreamFusion's orientation loss in threestudio: 10 to 1000 over the first half."""
    options = build(
        regularizers.RegularizerOptions,
        {"opacity": {"start": 1.0, "end": 3.0}, "entropy": 0, "depth_variance": {"end": 500.0}},
    )
    opacity = torch.tensor([1.0])
    for progress, weight in ((0.0, 1.0), (0.5, 2.0), (1.0, 3.0)):
        total = regularizers.opacity_regularization(opacity, options, progress)
        torch.testing.assert_close(total, torch.tensor(weight * 1.01**0.5))
    assert options.depth_variance == LinearSchedule(0.0, 500.0)
    with pytest.raises(UserError, match="must not be negative"):
        regularizers.RegularizerOptions(orientation=LinearSchedule(10.0, -1.0, until=0.5))
