"""The NeRF: from cameras to images, and to a folder and back."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.export.mesh import sample_log_density
from sds3d.export.turntable import render_views
from sds3d.scene.cameras import CameraOptions, ring, sample_cameras
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import FieldOptions
from sds3d.scene.nerf import BackgroundOptions, GridOptions, NeRF, NerfOptions, NerfViews
from sds3d.scene.protocol import load_scene
from sds3d.scene.renderer import RenderOptions

SMALL = HashEncodingOptions(n_levels=3, n_features_per_level=2, log2_hashmap_size=10, base_resolution=4)


def small_scene(kind: str = "fixed", seed: int = 0, density_bias: float = 0.0) -> NeRF:
    torch.manual_seed(seed)
    options = NerfOptions(
        FieldOptions(SMALL, 8, density_bias=density_bias),
        GridOptions(resolution=16),
        RenderOptions(samples=32),
        BackgroundOptions(kind, (0.9, 0.5, 0.2)),
    )
    scene = options.build()
    scene.field.encoding.table.data.normal_()
    return scene


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_training_views_have_shapes_ranges_and_samples() -> None:
    scene = small_scene()
    scene.update(0, generator())
    cameras = sample_cameras(CameraOptions(), 3, 12, generator())
    views = scene.render(
        cameras, torch.rand(3, 3, generator=generator()), generator(), training=True, normals=True
    )
    assert views.rgb.shape == views.normal.shape == (3, 3, 12, 12)
    assert views.opacity.shape == views.depth.shape == (3, 1, 12, 12)
    assert views.rgb.min() >= 0 and views.rgb.max() <= 1 and views.opacity.max() <= 1
    assert views.directions.shape == (3 * 144, 3) and views.rays.ray_indices.max() < 3 * 144
    views.rgb.mean().backward()
    assert all(value.grad is not None and value.grad.abs().sum() > 0 for value in scene.field.parameters())


def test_views_without_training_have_no_gradient_and_equal_unjittered_ones() -> None:
    scene = small_scene()
    scene.update(0)
    cameras = ring(2, resolution=96)  # more rays than one chunk holds
    colours = torch.tensor([[1.0, 0, 0], [0, 0, 1]])
    plain, training = scene.render(cameras, colours), scene.render(cameras, colours, training=True)
    assert not plain.rgb.requires_grad and plain.rays is None and training.rgb.requires_grad
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
def test_learned_backgrounds_start_at_their_colour_and_have_gradients(kind: str) -> None:
    scene = small_scene(kind, density_bias=-100.0)
    views = scene.render(ring(1, resolution=8), training=True)
    torch.testing.assert_close(views.rgb[0, :, 0, 0].detach(), torch.tensor([0.9, 0.5, 0.2]))
    views.rgb.sum().backward()
    grads = [value.grad for value in scene.background.parameters()]
    assert bool(grads) == (kind != "fixed") and all(g is not None for g in grads)
    assert kind == "fixed" or any(g.abs().sum() > 0 for g in grads)


class _Ball(torch.nn.Module):
    """An opaque ball at (0, 0.5, 0.3)."""

    def density(self, positions: Tensor) -> Tensor:
        return 200.0 * ((positions - positions.new_tensor([0.0, 0.5, 0.3])).norm(dim=-1) < 0.2)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(positions), torch.full_like(positions, 0.5)

    def normal(self, positions: Tensor) -> Tensor:
        return torch.nn.functional.normalize(positions - positions.new_tensor([0.0, 0.5, 0.3]), dim=-1)


def ball_views(resolution: int = 40) -> NerfViews:
    scene = small_scene()
    scene.field = _Ball()
    return scene.render(ring(4, elevation=0.0, resolution=resolution), normals=True)


def test_image_axes_follow_the_camera_convention() -> None:
    opacity = ball_views().opacity[:, 0]
    steps = (torch.arange(40) + 0.5) / 40 * 2 - 1
    column, row = ((opacity * s).sum((1, 2)) / opacity.sum((1, 2)) for s in (steps, steps[:, None]))
    half = torch.tan(torch.deg2rad(torch.tensor(17.5)))
    # +y is on the right at azimuth 0, in the centre and nearer at 90, on the left at 180.
    distance = torch.tensor([3.0, 2.5, 3.0, 3.5])
    torch.testing.assert_close(column, torch.tensor([0.5, 0, -0.5, 0]) / distance / half, rtol=0, atol=0.02)
    torch.testing.assert_close(row, -0.3 / distance / half, rtol=0, atol=0.02)


def test_depth_and_normals_match_the_ball() -> None:
    views = ball_views()
    hit = views.opacity[1, 0] > 0.99
    rays = views.directions.view(4, 40, 40, 3)[1]
    centre = torch.tensor([0.0, 0.5, 0.3])
    points = torch.tensor([0.0, 3.0, 0.0]) + views.depth[1, 0, :, :, None] * rays
    distance = (points - centre).norm(dim=-1)[hit]
    assert (distance - 0.2).abs().max() < 2 / 32  # within a step of the surface
    normal = views.normal[1].permute(1, 2, 0)
    assert ((normal * rays).sum(-1)[hit] < 0).all()  # towards the camera


def test_views_and_density_grid_have_the_requested_sizes() -> None:
    scene = small_scene()
    frames = render_views(scene, ring(5, resolution=8))
    assert frames.rgb.shape == (5, 3, 8, 8)
    assert sample_log_density(scene.field.density, 8, scene.device).shape == (8, 8, 8)


def test_grid_is_updated_at_its_interval() -> None:
    scene = small_scene()
    scene.update(3)
    assert not scene.grid.density_ema.any()
    scene.update(16)
    assert scene.grid.density_ema.any()


def test_optimisation_fits_an_image() -> None:
    scene, rng = small_scene(), generator()
    optimizer = torch.optim.Adam(scene.parameters(), lr=2e-2)
    target = torch.zeros(2, 3, 16, 16)
    target[:, 1] = 1
    target[:, :, 4:12, 4:12] = torch.tensor([1.0, 0, 0])[:, None, None]
    losses = []
    for step in range(30):
        scene.update(step, rng)
        views = scene.render(ring(2, resolution=16), torch.tensor([[0.0, 1, 0]] * 2), rng, training=True)
        loss = (views.rgb - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.35 * losses[0]


@pytest.mark.parametrize("kind", ["fixed", "constant", "mlp"])
def test_saved_scene_loads_identically(kind: str, tmp_path: Path) -> None:
    scene = small_scene(kind)
    scene.update(0, generator())
    scene.save(tmp_path / "scene")
    torch.manual_seed(99)
    again = load_scene(tmp_path / "scene")
    assert again.options == scene.options
    for name, value in scene.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    cameras = ring(2, resolution=12)
    assert torch.equal(again.render(cameras).rgb, scene.render(cameras).rgb)
    assert sorted(path.name for path in (tmp_path / "scene").iterdir()) == ["scene.json", "scene.safetensors"]


def test_scene_of_format_1_loads(tmp_path: Path) -> None:
    """It has no class of options, former names of the grid's buffers, and no rotation of the field."""
    scene = small_scene()
    scene.update(0, generator())
    scene.save(tmp_path)
    former = {"grid.density_ema": "grid.levels", "grid.occlusion_lower_bound": "grid.guide"}
    state = {former.get(name, name): value for name, value in scene.state_dict().items()}
    del state["field.rotation"]
    save_file(state, tmp_path / "scene.safetensors")
    options = json.loads((tmp_path / "scene.json").read_text())["options"]
    del options["_target_"]
    (tmp_path / "scene.json").write_text(json.dumps({"format": "sds3d-scene-1", "options": options}))
    again = load_scene(tmp_path)
    assert again.options == scene.options
    for name, value in scene.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name

    scene.rotate(1)
    rotated = {
        f"field.{'turn' if 'rotation' in name else name}": v for name, v in scene.field.state_dict().items()
    }
    again.load_state_dict({**state, **rotated})
    assert torch.equal(again.field.rotation, scene.field.rotation)


def test_parameter_groups_hold_every_parameter_once_with_the_encoding_first() -> None:
    scene = small_scene("mlp")
    encoding, mlps = scene.parameter_groups()
    assert (encoding.role, mlps.role) == ("explicit", "mlp")
    assert [p is scene.field.encoding.table for p in encoding.parameters] == [True]
    names = {id(p): name for name, p in scene.named_parameters()}
    order = [names[id(p)] for p in (*encoding.parameters, *mlps.parameters)]
    assert order == [name for name in names.values() if "encoding" in name] + [
        name for name in names.values() if "encoding" not in name
    ]


def test_missing_and_damaged_folders_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no scene"):
        load_scene(tmp_path / "nowhere")
    small_scene().save(tmp_path)
    weights = tmp_path / "scene.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="holds no scene"):
        load_scene(tmp_path)
    (tmp_path / "scene.json").write_text('{"format": "other"}')
    with pytest.raises(UserError, match="'other'"):
        load_scene(tmp_path)


def test_options_out_of_range_raise() -> None:
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
    twin, cameras = load_scene(tmp_path, "cuda"), ring(3, resolution=32)
    ours, theirs = scene.render(cameras), twin.render(cameras)
    assert (ours.rgb - theirs.rgb.cpu()).abs().mean() < 5e-3
    views = twin.render(cameras, generator=generator(), training=True)
    views.rgb.mean().backward()
    assert twin.field.encoding.table.grad.isfinite().all()
