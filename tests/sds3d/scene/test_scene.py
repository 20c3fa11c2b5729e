"""The scene: from cameras to images, and to a folder and back."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.export.mesh import sample_log_density
from sds3d.export.turntable import render_views
from sds3d.scene.cameras import CameraOptions, ring, sample_cameras
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import FieldOptions
from sds3d.scene.nerf import BackgroundOptions, GridOptions, RenderedViews, Scene, SceneOptions
from sds3d.scene.renderer import RenderOptions

SMALL = HashEncodingOptions(n_levels=3, n_features_per_level=2, log2_hashmap_size=10, base_resolution=4)


def small_scene(kind: str = "fixed", seed: int = 0, density_bias: float = 0.0) -> Scene:
    torch.manual_seed(seed)
    options = SceneOptions(
        FieldOptions(SMALL, 8, density_bias=density_bias),
        GridOptions(resolution=16),
        RenderOptions(samples=32),
        BackgroundOptions(kind, (0.9, 0.5, 0.2)),
    )
    scene = Scene(options)
    scene.field.encoding.table.data.normal_()
    return scene


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_training_views_have_shapes_ranges_and_samples() -> None:
    scene = small_scene()
    scene.update(0, generator())
    cameras = sample_cameras(CameraOptions(resolution=12), 3, generator())
    views = scene.render(
        cameras, torch.rand(3, 3, generator=generator()), generator(), training=True, normals=True
    )
    assert views.rgb.shape == views.normal.shape == (3, 3, 12, 12)
    assert views.opacity.shape == views.depth.shape == (3, 1, 12, 12)
    assert views.rgb.min() >= 0 and views.rgb.max() <= 1 and views.opacity.max() <= 1
    assert views.directions.shape == (3 * 144, 3) and views.rendered.rays.max() < 3 * 144
    views.rgb.mean().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in scene.field.parameters())


def test_plain_views_have_no_gradient_and_equal_unjittered_training() -> None:
    scene = small_scene()
    scene.update(0)
    cameras = ring(2, resolution=96)  # more rays than one chunk holds
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    plain, training = scene.render(cameras, colours), scene.render(cameras, colours, training=True)
    assert not plain.rgb.requires_grad and plain.rendered is None and training.rgb.requires_grad
    for name in ("rgb", "opacity", "depth"):
        torch.testing.assert_close(vars(plain)[name], vars(training)[name].detach(), rtol=1e-5, atol=1e-5)


def test_each_view_has_its_background() -> None:
    scene = small_scene()
    cameras, colours = ring(2, resolution=16), torch.tensor([[1.0, 0, 0], [0, 0.5, 1]])
    over, black = scene.render(cameras, colours), scene.render(cameras, torch.zeros(2, 3))
    torch.testing.assert_close(over.rgb, black.rgb + (1 - black.opacity) * colours[:, :, None, None])
    empty = small_scene(density_bias=-100.0).render(cameras, colours)
    torch.testing.assert_close(empty.rgb, colours[:, :, None, None].expand(2, 3, 16, 16))


@pytest.mark.parametrize("kind", ["fixed", "constant", "mlp"])
def test_own_backgrounds_start_at_their_colour_and_learn(kind: str) -> None:
    scene = small_scene(kind, density_bias=-100.0)
    views = scene.render(ring(1, resolution=8), training=True)
    torch.testing.assert_close(views.rgb[0, :, 0, 0].detach(), torch.tensor([0.9, 0.5, 0.2]))
    views.rgb.sum().backward()
    grads = [value.grad for value in scene.background.parameters()]
    assert bool(grads) == (kind != "fixed") and all(g is not None for g in grads)
    assert kind == "fixed" or any(g.abs().sum() > 0 for g in grads)


class _Ball(torch.nn.Module):
    """Opaque matter near (0, 0.5, 0.3)."""

    def density(self, positions: Tensor) -> Tensor:
        return 200.0 * ((positions - positions.new_tensor([0.0, 0.5, 0.3])).norm(dim=-1) < 0.2)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(positions), torch.full_like(positions, 0.5)

    def normal(self, positions: Tensor) -> Tensor:
        return torch.nn.functional.normalize(positions - positions.new_tensor([0.0, 0.5, 0.3]), dim=-1)


def ball_views(resolution: int = 40) -> RenderedViews:
    scene = small_scene()
    scene.field = _Ball()
    return scene.render(ring(4, elevation=0.0, resolution=resolution), normals=True)


def test_the_image_is_the_right_way_up_and_round() -> None:
    opacity = ball_views().opacity[:, 0]
    steps = (torch.arange(40) + 0.5) / 40 * 2 - 1
    column, row = ((opacity * s).sum((1, 2)) / opacity.sum((1, 2)) for s in (steps, steps[:, None]))
    half = torch.tan(torch.deg2rad(torch.tensor(17.5)))
    # Azimuth 0 sees +y on its right, 90 (from +y) sees it in the middle and nearer, 180 on its left.
    distance = torch.tensor([3.0, 2.5, 3.0, 3.5])
    torch.testing.assert_close(column, torch.tensor([0.5, 0, -0.5, 0]) / distance / half, rtol=0, atol=0.02)
    torch.testing.assert_close(row, -0.3 / distance / half, rtol=0, atol=0.02)


def test_depth_and_normals_are_those_of_the_ball() -> None:
    views = ball_views()
    facing = views.opacity[1, 0] > 0.99
    rays = views.directions.view(4, 40, 40, 3)[1]
    centre = torch.tensor([0.0, 0.5, 0.3])
    points = torch.tensor([0.0, 3.0, 0.0]) + views.depth[1, 0, :, :, None] * rays
    distance = (points - centre).norm(dim=-1)[facing]
    assert (distance - 0.2).abs().max() < 2 / 32  # within a step of the surface
    normal = views.normal[1].permute(1, 2, 0)
    assert ((normal * rays).sum(-1)[facing] < 0).all()  # they face the camera


def test_mesh_and_turntable_can_use_it() -> None:
    scene = small_scene()
    frames = render_views(scene, ring(5, resolution=8))
    assert frames.rgb.shape == (5, 3, 8, 8)
    assert sample_log_density(scene.field, 8, scene.device).shape == (8, 8, 8)


def test_the_grid_is_updated_on_its_beat() -> None:
    scene = small_scene()
    scene.update(3)
    assert not scene.grid.levels.any()
    scene.update(16)
    assert scene.grid.levels.any()


def test_it_learns_a_picture() -> None:
    scene, draws = small_scene(), generator()
    optimizer = torch.optim.Adam(scene.parameters(), lr=2e-2)
    target = torch.zeros(2, 3, 16, 16)
    target[:, 1] = 1
    target[:, :, 4:12, 4:12] = torch.tensor([1.0, 0, 0])[:, None, None]
    losses = []
    for step in range(30):
        scene.update(step, draws)
        views = scene.render(ring(2, resolution=16), torch.tensor([[0.0, 1, 0]] * 2), draws, training=True)
        loss = (views.rgb - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.parametrize("kind", ["fixed", "constant", "mlp"])
def test_a_folder_gives_the_scene_back(kind: str, tmp_path: Path) -> None:
    scene = small_scene(kind)
    scene.update(0, generator())
    scene.save(tmp_path / "scene")
    torch.manual_seed(99)
    again = Scene.load(tmp_path / "scene")
    assert again.options == scene.options
    for name, value in scene.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    cameras = ring(2, resolution=12)
    assert torch.equal(again.render(cameras).rgb, scene.render(cameras).rgb)
    assert sorted(path.name for path in (tmp_path / "scene").iterdir()) == ["scene.json", "scene.safetensors"]


def test_missing_and_damaged_folders_are_told(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no scene"):
        Scene.load(tmp_path / "nowhere")
    small_scene().save(tmp_path)
    weights = tmp_path / "scene.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="holds no scene"):
        Scene.load(tmp_path)
    (tmp_path / "scene.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="'other'"):
        Scene.load(tmp_path)


def test_impossible_options_are_refused() -> None:
    with pytest.raises(UserError, match="'sky'"):
        BackgroundOptions("sky")
    with pytest.raises(UserError, match="1.5"):
        BackgroundOptions(colour=(0.0, 1.5, 0.0))
    with pytest.raises(UserError, match="every 0"):
        GridOptions(every=0)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the GPU's parity with the CPU is unchecked"
)
def test_cuda_matches_cpu(tmp_path: Path) -> None:
    scene = small_scene()
    scene.update(0)
    scene.save(tmp_path)
    twin, cameras = Scene.load(tmp_path, "cuda"), ring(3, resolution=32)
    ours, theirs = scene.render(cameras), twin.render(cameras)
    assert (ours.rgb - theirs.rgb.cpu()).abs().mean() < 5e-3
    views = twin.render(cameras, generator=generator(), training=True)
    views.rgb.mean().backward()
    assert twin.field.encoding.table.grad.isfinite().all()
