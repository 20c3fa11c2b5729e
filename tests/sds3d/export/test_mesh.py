"""A mesh out of analytic fields: threshold in closed form, closed surfaces, floaters, colours, files."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import trimesh
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.export import mesh as meshes
from sds3d.export.files import load_mesh, save_mesh, to_linear, to_srgb
from sds3d.export.mesh import (
    ExtractedMesh,
    MeshOptions,
    extract_mesh,
    is_manifold,
    separate_pinches,
    separate_points,
)
from sds3d.export.turntable import Frames, render_mesh, render_views
from sds3d.scene.cameras import Cameras

SMALL = MeshOptions(resolution=64, max_faces=4000, views=4)
RED, BLUE = (0.8, 0.1, 0.2), (0.1, 0.2, 0.9)


@dataclass(frozen=True)
class Stand:
    """A field, and a scene with it rendered by slow quadrature along 160 samples of each ray."""

    shape: Callable[[Tensor], Tensor]  # (N, 3) -> density (N,)
    device: torch.device = torch.device("cpu")

    def density(self, x: Tensor) -> Tensor:
        return self.shape(x) * (x.abs().amax(-1) <= 1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.density(x), torch.where(
            x[:, :1] > 0, torch.tensor(RED), torch.tensor(BLUE)
        )  # the front is red

    @property
    def field(self) -> "Stand":
        return self

    def render(
        self,
        cameras: Cameras,
        background: Tensor | None = None,
        generator: torch.Generator | None = None,
        training: bool = False,
    ) -> Frames:
        behind = torch.ones(len(cameras), 3) if background is None else background
        origins, directions = cameras.rays()
        along, step = torch.linspace(1.9, 4.1, 160), 2.2 / 159
        points = origins[..., None, :] + directions[..., None, :] * along[:, None]
        density, albedo = (value.reshape(*points.shape[:-1], -1) for value in self(points.reshape(-1, 3)))
        thickness = density * step
        weight = torch.exp(thickness - thickness.cumsum(-2)) * (1 - torch.exp(-thickness))
        opacity = weight.sum(-2)
        rgb = (weight * albedo).sum(-2) + (1 - opacity) * behind[:, None, None]
        return Frames(rgb.permute(0, 3, 1, 2), opacity.permute(0, 3, 1, 2))


def ball(
    centre: tuple[float, float, float], radius: float, density: float = 60.0
) -> Callable[[Tensor], Tensor]:
    return lambda x: density * torch.sigmoid((radius - (x - torch.tensor(centre)).norm(dim=-1)) * 80)


def seen_radius(shape: Callable[[Tensor], Tensor]) -> float:
    """Where a ray past a round shape at the origin reaches opacity 0.5: optical depth ln 2."""
    impact, along = torch.linspace(0.2, 0.9, 500), torch.linspace(-1, 1, 2000)
    points = torch.cartesian_prod(impact, along)
    depth = shape(torch.cat([points, torch.zeros(len(points), 1)], 1)).reshape(500, 2000).sum(1) * 2 / 1999
    return impact[depth > math.log(2)].max().item()


def volume(radius: float) -> float:
    return 4 / 3 * math.pi * radius**3


def torus(x: Tensor) -> Tensor:
    ring = x[:, :2].norm(dim=-1) - 0.5
    return 60 * torch.sigmoid((0.18 - torch.stack([ring, x[:, 2]], -1).norm(dim=-1)) * 80)


@pytest.fixture(scope="module")
def pair() -> ExtractedMesh:
    """A ball of radius 0.5 with a floater beside it."""
    main, floater = ball((0, 0, 0), 0.5), ball((0.7, 0.0, 0.6), 0.08)
    return extract_mesh(Stand(lambda x: main(x) + floater(x)), SMALL)


def test_parts_that_touch_in_a_point_are_no_manifold() -> None:
    box, other = trimesh.creation.box(), trimesh.creation.box()
    other.apply_translation([1, 1, 1])
    both = trimesh.util.concatenate([box, other])
    assert is_manifold(box) and is_manifold(both)  # corners in one place, not shared
    both.merge_vertices()
    assert both.is_watertight and not is_manifold(both)
    apart = separate_points(both)
    assert (
        is_manifold(apart) and len(apart.vertices) == 16 and np.abs(apart.bounds - both.bounds).max() < 1e-6
    )
    apart.merge_vertices()  # as a file is read
    assert is_manifold(apart)
    assert np.allclose(
        separate_points(box).triangles.mean(1), box.triangles.mean(1)
    )  # nothing to separate, nothing moved
    assert not is_manifold(trimesh.Trimesh(box.vertices, box.faces[1:]))


def test_threshold_is_the_closed_form_of_a_gaussian_cloud() -> None:
    # Optical depth at impact b is A s sqrt(2 pi) exp(-b^2 / 2 s^2); it is ln 2 (opacity 0.5) where the largest density on the ray
    # is ln 2 / (s sqrt(2 pi)): whatever the amplitude A.
    width = 0.2
    expected = math.log(2) / (width * math.sqrt(2 * math.pi))
    for amplitude in (20.0, 100.0):
        found = extract_mesh(
            Stand(lambda x, a=amplitude: a * torch.exp(-(x**2).sum(-1) / (2 * width**2))), SMALL
        )
        assert found.threshold == pytest.approx(expected, rel=0.15)
        radius = width * math.sqrt(2 * math.log(amplitude / expected))
        assert found.mesh.volume == pytest.approx(volume(radius), rel=0.04)
        assert found.silhouette_iou > 0.97


def test_threshold_lies_between_the_two_sides_of_a_step() -> None:
    step = Stand(lambda x: torch.where(x.norm(dim=-1) < 0.5, 30.0, 0.3))
    found = extract_mesh(step, SMALL)
    assert 0.3 < found.threshold < 30
    assert found.mesh.volume == pytest.approx(volume(0.5), rel=0.08)


def test_ball_is_closed_outward_and_right_sized(pair: ExtractedMesh) -> None:
    assert pair.watertight and pair.mesh.is_watertight and pair.mesh.is_winding_consistent
    assert pair.mesh.volume == pytest.approx(volume(seen_radius(ball((0, 0, 0), 0.5))), rel=0.05)
    assert len(pair.mesh.faces) <= SMALL.max_faces
    outward = (pair.mesh.face_normals * pair.mesh.triangles_center).sum(1)
    assert (outward > 0).all()


def test_floater_is_dropped_unless_kept(pair: ExtractedMesh) -> None:
    assert pair.dropped == 1 and pair.mesh.body_count == 1
    main, floater = ball((0, 0, 0), 0.5), ball((0.7, 0.0, 0.6), 0.08)
    kept = extract_mesh(Stand(lambda x: main(x) + floater(x)), MeshOptions(64, 4000, 4, min_component=0))
    assert kept.dropped == 0 and kept.mesh.body_count == 2 and kept.watertight


def test_hollow_shell_is_filled() -> None:
    outer, inner = ball((0, 0, 0), 0.6), ball((0, 0, 0), 0.4)

    def shell(x: Tensor) -> Tensor:
        return (outer(x) - inner(x)).clamp_min(0)

    found = extract_mesh(Stand(shell), SMALL)
    assert found.mesh.body_count == 1 and found.watertight
    assert found.mesh.volume == pytest.approx(volume(seen_radius(shell)), rel=0.05)


def test_torus_keeps_its_hole_within_the_budget() -> None:
    found = extract_mesh(Stand(torus), MeshOptions(resolution=72, max_faces=1500, views=6))
    assert found.watertight and found.mesh.euler_number == 0
    assert 1000 < len(found.mesh.faces) <= 1500
    assert found.silhouette_iou > 0.93


def test_rough_field_stays_closed_within_the_budget(tmp_path) -> None:
    # Decimation leaves dozens of edges with four faces on such a field.
    waves = 12 * torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    field = Stand(
        lambda x: torch.exp(((0.55 - x.norm(dim=-1)) * 25 + torch.sin(x @ waves.T * 2).sum(-1)).clamp(-6, 4))
    )
    found = extract_mesh(field, MeshOptions(resolution=64, max_faces=4000, views=2, min_component=0.2))
    assert found.watertight and 3000 < len(found.mesh.faces) <= 4000 and found.mesh.volume > 0
    assert all(load_mesh(path).is_watertight for path in save_mesh(found.mesh, tmp_path))


def test_object_cut_by_the_box_is_closed() -> None:
    found = extract_mesh(Stand(ball((0.9, 0, 0), 0.5)), SMALL)
    assert found.watertight and found.mesh.bounds[1, 0] < 1.05


def test_pinched_edge_is_taken_apart() -> None:
    first = trimesh.creation.box()
    second = first.copy()
    second.apply_translation([1, 1, 0])  # shares one edge
    both = trimesh.util.concatenate([first, second])
    both.merge_vertices()
    assert not both.is_watertight
    apart = separate_pinches(both)
    assert apart.is_watertight and apart.is_winding_consistent
    assert len(apart.split()) == 2  # not one piece that runs through both
    assert 1.9 < apart.volume < 2  # each lost a little


def test_colours_lie_on_their_sides(pair: ExtractedMesh) -> None:
    colours = np.asarray(pair.mesh.visual.vertex_colors)
    front = pair.mesh.vertices[:, 0] > 0.05
    back = pair.mesh.vertices[:, 0] < -0.05
    assert np.abs(colours[front, :3].astype(int) - np.round(np.array(RED) * 255)).max() <= 2
    assert np.abs(colours[back, :3].astype(int) - np.round(np.array(BLUE) * 255)).max() <= 2


def test_colour_is_taken_behind_a_thin_skin() -> None:
    class Skinned(Stand):
        def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.density(x), torch.where(
                x.norm(dim=-1, keepdim=True) < 0.5, torch.tensor(RED), torch.tensor(BLUE)
            )

    fuzz = extract_mesh(
        Skinned(lambda x: torch.where(x.norm(dim=-1) < 0.5, 100.0, 2.0 * (x.norm(dim=-1) < 0.52))), SMALL
    )
    mean = np.asarray(fuzz.mesh.visual.vertex_colors)[:, :3].mean(0) / 255
    assert np.abs(mean - RED).max() < 0.15


def test_mesh_looks_like_its_scene(pair: ExtractedMesh) -> None:
    cameras = meshes.silhouette_cameras(SMALL)
    true = render_views(Stand(ball((0, 0, 0), 0.5)), cameras)
    seen = render_mesh(pair.mesh, cameras)
    assert pair.silhouette_iou > 0.95
    assert (seen.rgb - true.rgb).abs().mean() < 0.02


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
def test_files_round_trip(pair: ExtractedMesh, tmp_path, suffix: str) -> None:
    paths = {path.suffix[1:]: path for path in save_mesh(pair.mesh, tmp_path / "out")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mesh.glb", "mesh.obj", "mesh.ply"]
    back = load_mesh(paths[suffix])
    assert back.is_watertight and back.volume == pytest.approx(pair.mesh.volume, rel=1e-4)
    assert len(back.faces) == len(pair.mesh.faces)
    colours = np.asarray(back.visual.vertex_colors)[:, :3]
    front = back.vertices[:, 0] > 0.05
    law = (
        to_linear if suffix == "glb" else np.asarray
    )  # a GLB keeps eight bits of linear light: coarse in the dark
    assert np.abs(law(colours[front] / 255) - law(np.array(RED))).max() <= 2 / 255


def test_files_are_y_up_with_the_front_at_z(tmp_path) -> None:
    box = trimesh.creation.box(extents=(0.2, 0.4, 0.6))
    box.apply_translation([0.5, 0.2, 0.1])  # forward, left, up
    box.visual.vertex_colors = np.full((8, 4), 200, np.uint8)
    for path in save_mesh(box, tmp_path, "box"):
        turned = trimesh.load(path, force="mesh")
        assert np.allclose(turned.bounds.mean(0), [0.2, 0.1, 0.5], atol=1e-5)
        assert np.allclose(turned.extents, [0.4, 0.6, 0.2], atol=1e-5)


def test_glb_states_bounds_and_colours(pair: ExtractedMesh, tmp_path) -> None:
    path, obj, _ = save_mesh(pair.mesh, tmp_path)
    data = path.read_bytes()
    magic, version, length, size = struct.unpack("<4sIII", data[:16])
    assert (magic, version, length) == (b"glTF", 2, len(data))
    tree = json.loads(data[20 : 20 + size])
    attributes = tree["meshes"][0]["primitives"][0]["attributes"]
    accessor = tree["accessors"][attributes["POSITION"]]
    assert accessor["count"] == len(pair.mesh.vertices) and "COLOR_0" in attributes
    assert np.allclose([accessor["min"], accessor["max"]], pair.mesh.bounds[:, [1, 2, 0]], atol=1e-5)
    assert "NORMAL" in attributes
    material = tree["materials"][tree["meshes"][0]["primitives"][0]["material"]]
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0  # glTF's default is a metal
    stored = next(iter(trimesh.load_scene(path).geometry.values())).visual.vertex_attributes["color"]
    red = stored[pair.mesh.vertices[:, 0] > 0.05][:, 0] / 255
    assert np.abs(red - ((RED[0] + 0.055) / 1.055) ** 2.4).max() < 0.01  # linear light
    line = next(line for line in obj.read_text().splitlines() if line.startswith("v "))
    assert len(line.split()) == 7 and 0 <= float(line.split()[4]) <= 1


def test_linear_light_is_that_of_the_standard() -> None:
    """IEC 61966-2-1: sRGB 0.5 is 0.2140 in linear light, the two pieces meet, and the way back is exact."""
    values = np.linspace(0, 1, 256)
    assert float(to_linear(np.array(0.5))) == pytest.approx(0.21404, abs=1e-5)
    assert float(to_linear(np.array(0.04))) == pytest.approx(0.04 / 12.92)
    assert np.abs(to_srgb(to_linear(values)) - values).max() < 1e-6


def test_failed_write_leaves_nothing(pair: ExtractedMesh, tmp_path, monkeypatch) -> None:
    def broken(self: trimesh.Trimesh, path: object, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(trimesh.Trimesh, "export", broken)
    with pytest.raises(OSError, match="disk full"):
        save_mesh(pair.mesh, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", [0.0, 0.05, math.nan])
def test_empty_or_broken_scene_is_refused_in_one_sentence(level: float) -> None:
    with pytest.raises(UserError, match="not finite" if math.isnan(level) else "scene is empty"):
        extract_mesh(
            Stand(lambda x: torch.full((len(x),), level)),
            MeshOptions(resolution=16, views=1, view_resolution=16),
        )


def test_bad_options_and_files_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="max_faces is 3"):
        MeshOptions(max_faces=3)
    with pytest.raises(UserError, match="min_component is 2"):
        MeshOptions(min_component=2)
    with pytest.raises(UserError, match="does not exist"):
        load_mesh(tmp_path / "none.glb")
    (tmp_path / "bad.glb").write_bytes(b"no mesh at all")
    with pytest.raises(UserError, match="cannot be read"):
        load_mesh(tmp_path / "bad.glb")
