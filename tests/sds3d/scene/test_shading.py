"""Shading: the formula by hand, when and where lights are drawn, gradients of lit views."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.runtime.errors import UserError
from sds3d.scene.cameras import CameraOptions, orbit, ring, sample_cameras
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import FieldOptions
from sds3d.scene.nerf import GridOptions, NeRF, NerfOptions
from sds3d.scene.renderer import RenderOptions
from sds3d.scene.shading import PointLights, ShadingOptions

CENTRE = torch.tensor([0.0, 0.0, 0.2])
ALBEDO = torch.tensor([0.8, 0.5, 0.25])


class Ball(torch.nn.Module):
    """An opaque ball of radius 0.5 at CENTRE, with exact normals."""

    def density(self, positions: Tensor) -> Tensor:
        return 500.0 * ((positions - CENTRE).norm(dim=-1) < 0.5)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(positions), ALBEDO.expand_as(positions)

    def normal(self, positions: Tensor) -> Tensor:
        return F.normalize(positions - CENTRE, dim=-1)


def scene() -> NeRF:
    torch.manual_seed(0)
    encoding = HashEncodingOptions(
        n_levels=2, n_features_per_level=2, log2_hashmap_size=10, base_resolution=4
    )
    result = NeRF(
        NerfOptions(FieldOptions(encoding, 8), GridOptions(resolution=16), RenderOptions(samples=64))
    )
    result.field.encoding.table.data.normal_()
    return result


def light(position: list[float], textureless: bool = False) -> PointLights:
    return PointLights(torch.tensor([position]), 0.1, 0.9, textureless)


def test_a_ball_has_the_lambertian_colours_of_its_normals() -> None:
    ball = scene()
    ball.field = Ball()
    views = ball.render(ring(1, 0.0, 48), torch.ones(1, 3), normals=True, lights=light([0.0, 50.0, 0.0]))
    inside = views.opacity[0, 0] > 0.999
    cosine = views.normal[0, 1].clamp(min=0)  # the light is far away on +y
    expected = ALBEDO[:, None, None] * (0.1 + 0.9 * cosine)
    error = (views.rgb[0] - expected).abs()[:, inside]
    assert inside.sum() > 200 and error.max() < 0.02
    assert expected[0][inside].max() > 0.7 and (expected[0][inside] < 0.081).sum() > 50  # lit and unlit

    white = ball.render(ring(1, 0.0, 48), torch.ones(1, 3), lights=light([0.0, 50.0, 0.0], textureless=True))
    torch.testing.assert_close(
        white.rgb[0][:, inside], (0.1 + 0.9 * cosine)[inside].expand(3, -1), atol=0.02, rtol=0
    )


def test_each_view_has_its_light_and_the_light_its_distance() -> None:
    albedo, normals = torch.ones(2, 3), torch.tensor([[0.0, 0.0, 1.0]] * 2)
    points = torch.tensor([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    lights = PointLights(torch.tensor([[0.0, 0, -5], [0.0, 0, 1]]), 0.2, 0.5, False)
    shaded = lights.shade(albedo, points, normals, torch.tensor([0, 1]))
    torch.testing.assert_close(shaded[:, 0], torch.tensor([0.2, 0.2 + 0.5 / 2**0.5]))
    torch.testing.assert_close(lights.shade(albedo, points, normals * 0, torch.tensor([1, 1])), 0.2 * albedo)
    repeated = lights.repeat_interleave(3).positions
    assert torch.equal(repeated[2], lights.positions[0]) and torch.equal(repeated[3], lights.positions[1])


def test_lights_start_late_and_have_their_probabilities() -> None:
    rng, options = torch.Generator().manual_seed(0), ShadingOptions(begin=0.5)
    cameras = sample_cameras(CameraOptions(), 4, 8, rng)
    before = rng.get_state()
    assert options.sample(cameras, 0.49, rng) is None
    assert torch.equal(rng.get_state(), before)
    lights = [options.sample(cameras, 0.5, rng) for _ in range(400)]
    lit = [value for value in lights if value is not None]
    assert abs(len(lit) / 400 - 0.75) < 0.06
    assert abs(sum(value.textureless for value in lit) / len(lit) - 0.5) < 0.08
    distances = torch.stack([value.positions.norm(dim=-1) for value in lit])
    assert 1.8 <= distances.min() < 1.85 and 2.95 < distances.max() <= 3.0


def test_a_light_without_jitter_shines_from_the_camera() -> None:
    cameras = orbit(*(torch.tensor([value]) for value in (30.0, 20.0, 3.0, 35.0)), 8)
    options = ShadingOptions(begin=0.0, probability=1.0, light_jitter=0.0)
    lights = options.sample(cameras, 0.0, torch.Generator().manual_seed(0))
    assert lights is not None
    torch.testing.assert_close(F.normalize(lights.positions), F.normalize(cameras.position))
    near = replace(options, light_jitter=1.0)
    directions = []
    for seed in range(200):
        lights = near.sample(cameras, 0.0, torch.Generator().manual_seed(seed))
        assert lights is not None
        directions.append(F.normalize(lights.positions))
    cosine = torch.cat(directions) @ F.normalize(cameras.position[0], dim=0)
    assert cosine.mean() > 0.8 and cosine.min() < 0.8


def test_textureless_views_train_the_geometry_alone() -> None:
    nerf = scene()
    nerf.update(0)
    views = nerf.render(
        ring(1, resolution=16), torch.ones(1, 3), training=True, lights=light([3.0, 1.0, 1.0], True)
    )
    views.rgb.square().mean().backward()
    last = nerf.field.mlp[-1].weight.grad
    assert last[0].abs().max() > 0 and last[1:].abs().max() == 0  # rows: density, albedo


def test_lit_views_split_their_gradients() -> None:
    nerf = scene()
    nerf.update(0)
    weight = nerf.field.mlp[-1].weight
    views = nerf.render(
        ring(1, resolution=16), torch.ones(1, 3), training=True, lights=light([3.0, 1.0, 1.0])
    )
    loss = torch.rand(views.rgb.shape, generator=torch.Generator().manual_seed(0))
    whole = torch.autograd.grad((views.rgb * loss).sum(), weight, retain_graph=True)[0]
    density_rgb, albedo_rgb = views.split_gradients()
    torch.testing.assert_close(albedo_rgb, views.rgb)
    density = torch.autograd.grad((density_rgb * loss).sum(), weight, retain_graph=True)[0]
    albedo = torch.autograd.grad((albedo_rgb * loss).sum(), weight)[0]
    assert albedo[0].abs().max() == 0 and density[1:].abs().max() < 1e-4 * whole[1:].abs().max()
    torch.testing.assert_close(density + albedo, whole, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"probability": 1.5}, "1.5"),
        ({"ambient": -0.1}, "negative"),
        ({"light_distance": (2.0, 1.0)}, "light_distance"),
    ],
)
def test_options_out_of_range_raise(values: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ShadingOptions(**values)
