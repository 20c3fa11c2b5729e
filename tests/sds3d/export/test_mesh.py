"""Meshes of analytic fields: threshold in closed form, closed surfaces, floaters, colours, files."""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

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
    extract_isosurface,
    is_manifold,
    split_edges,
    split_vertices,
)
from sds3d.export.turntable import Frames, render_mesh, render_views
from sds3d.scene.cameras import Cameras
from sds3d.scene.field import surface_colours

SMALL = MeshOptions(resolution=64, max_faces=4000, views=4)
RED, BLUE = (0.8, 0.1, 0.2), (0.1, 0.2, 0.9)


@dataclass(frozen=True)
class AnalyticScene:
    """A scene of a closed-form density, rendered by quadrature with 160 samples per ray."""

    shape: Callable[[Tensor], Tensor]  # (N, 3) -> density (N,)
    device: torch.device = torch.device("cpu")

    def density(self, x: Tensor) -> Tensor:
        return self.shape(x) * (x.abs().amax(-1) <= 1)

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        # The front is red.
        return self.density(x), torch.where(x[:, :1] > 0, torch.tensor(RED), torch.tensor(BLUE))

    def surface_colours(self, points: Tensor, normals: Tensor, spacing: float) -> Tensor:
        return surface_colours(self, points, normals, spacing, self.device)

    def render(
        self,
        cameras: Cameras,
        background: Tensor | None = None,
        generator: torch.Generator | None = None,
        training: bool = False,
    ) -> Frames:
        colours = torch.ones(len(cameras), 3) if background is None else background
        origins, directions = cameras.rays()
        along, step = torch.linspace(1.9, 4.1, 160), 2.2 / 159
        points = origins[..., None, :] + directions[..., None, :] * along[:, None]
        density, albedo = (value.reshape(*points.shape[:-1], -1) for value in self(points.reshape(-1, 3)))
        thickness = density * step
        weight = torch.exp(thickness - thickness.cumsum(-2)) * (1 - torch.exp(-thickness))
        opacity = weight.sum(-2)
        rgb = (weight * albedo).sum(-2) + (1 - opacity) * colours[:, None, None]
        return Frames(rgb.permute(0, 3, 1, 2), opacity.permute(0, 3, 1, 2))


def extract(scene: AnalyticScene, options: MeshOptions) -> ExtractedMesh:
    return extract_isosurface(scene, scene.density, options)


def ball(
    centre: tuple[float, float, float], radius: float, density: float = 60.0
) -> Callable[[Tensor], Tensor]:
    return lambda x: density * torch.sigmoid((radius - (x - torch.tensor(centre)).norm(dim=-1)) * 80)


def silhouette_radius(shape: Callable[[Tensor], Tensor]) -> float:
    """Impact parameter of rays with opacity 0.5, optical depth ln 2, at a round shape at the origin."""
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
    return extract(AnalyticScene(lambda x: main(x) + floater(x)), SMALL)


def test_parts_that_touch_in_a_point_are_not_manifold() -> None:
    box, other = trimesh.creation.box(), trimesh.creation.box()
    other.apply_translation([1, 1, 1])
    union = trimesh.util.concatenate([box, other])
    assert is_manifold(box) and is_manifold(union)  # corners coincide but are not shared
    union.merge_vertices()
    assert union.is_watertight and not is_manifold(union)
    split = split_vertices(union)
    assert is_manifold(split) and len(split.vertices) == 16
    assert np.abs(split.bounds - union.bounds).max() < 1e-6
    split.merge_vertices()  # as on loading a file
    assert is_manifold(split)
    assert np.allclose(split_vertices(box).triangles.mean(1), box.triangles.mean(1))  # nothing moved
    assert not is_manifold(trimesh.Trimesh(box.vertices, box.faces[1:]))


def test_threshold_is_the_closed_form_of_a_gaussian_cloud() -> None:
    # Optical depth at impact b is A s sqrt(2 pi) exp(-b^2 / 2 s^2), which is ln 2 (opacity 0.5) where the
    # largest density on the ray is ln 2 / (s sqrt(2 pi)), for any amplitude A.
    width = 0.2
    expected = math.log(2) / (width * math.sqrt(2 * math.pi))
    for amplitude in (20.0, 100.0):
        extracted = extract(
            AnalyticScene(lambda x, a=amplitude: a * torch.exp(-(x**2).sum(-1) / (2 * width**2))), SMALL
        )
        assert extracted.threshold == pytest.approx(expected, rel=0.15)
        radius = width * math.sqrt(2 * math.log(amplitude / expected))
        assert extracted.mesh.volume == pytest.approx(volume(radius), rel=0.04)
        assert extracted.silhouette_iou > 0.97


def test_threshold_lies_between_the_two_sides_of_a_step() -> None:
    step = AnalyticScene(lambda x: torch.where(x.norm(dim=-1) < 0.5, 30.0, 0.3))
    extracted = extract(step, SMALL)
    assert 0.3 < extracted.threshold < 30
    assert extracted.mesh.volume == pytest.approx(volume(0.5), rel=0.08)


def test_ball_is_closed_and_oriented_and_has_its_volume(pair: ExtractedMesh) -> None:
    assert pair.watertight and pair.mesh.is_watertight and pair.mesh.is_winding_consistent
    assert pair.mesh.volume == pytest.approx(volume(silhouette_radius(ball((0, 0, 0), 0.5))), rel=0.05)
    assert len(pair.mesh.faces) <= SMALL.max_faces
    outward = (pair.mesh.face_normals * pair.mesh.triangles_center).sum(1)
    assert (outward > 0).all()


def test_floaters_are_removed_unless_min_component_is_0(pair: ExtractedMesh) -> None:
    assert pair.floaters == 1 and pair.mesh.body_count == 1
    main, floater = ball((0, 0, 0), 0.5), ball((0.7, 0.0, 0.6), 0.08)
    extracted = extract(
        AnalyticScene(lambda x: main(x) + floater(x)), MeshOptions(64, 4000, 4, min_component=0)
    )
    assert extracted.floaters == 0 and extracted.mesh.body_count == 2 and extracted.watertight


def test_hollow_shell_is_filled() -> None:
    outer, inner = ball((0, 0, 0), 0.6), ball((0, 0, 0), 0.4)

    def shell(x: Tensor) -> Tensor:
        return (outer(x) - inner(x)).clamp_min(0)

    extracted = extract(AnalyticScene(shell), SMALL)
    assert extracted.mesh.body_count == 1 and extracted.watertight
    assert extracted.mesh.volume == pytest.approx(volume(silhouette_radius(shell)), rel=0.05)


def test_torus_keeps_its_hole_within_the_face_budget() -> None:
    extracted = extract(AnalyticScene(torus), MeshOptions(resolution=72, max_faces=1500, views=6))
    assert extracted.watertight and extracted.mesh.euler_number == 0
    assert 1000 < len(extracted.mesh.faces) <= 1500
    assert extracted.silhouette_iou > 0.93


def test_rough_field_remains_closed_within_the_face_budget(tmp_path: Path) -> None:
    # Decimation leaves dozens of edges with four faces on such a field.
    waves = 12 * torch.randn(24, 3, generator=torch.Generator().manual_seed(1))
    field = AnalyticScene(
        lambda x: torch.exp(((0.55 - x.norm(dim=-1)) * 25 + torch.sin(x @ waves.T * 2).sum(-1)).clamp(-6, 4))
    )
    extracted = extract(field, MeshOptions(resolution=64, max_faces=4000, views=2, min_component=0.2))
    assert extracted.watertight and 3000 < len(extracted.mesh.faces) <= 4000 and extracted.mesh.volume > 0
    assert all(load_mesh(path).is_watertight for path in save_mesh(extracted.mesh, tmp_path))


def test_object_cut_by_the_box_is_closed() -> None:
    extracted = extract(AnalyticScene(ball((0.9, 0, 0), 0.5)), SMALL)
    assert extracted.watertight and extracted.mesh.bounds[1, 0] < 1.05


def test_shared_edge_is_split() -> None:
    first = trimesh.creation.box()
    second = first.copy()
    second.apply_translation([1, 1, 0])  # shares one edge
    union = trimesh.util.concatenate([first, second])
    union.merge_vertices()
    assert not union.is_watertight
    split = split_edges(union)
    assert split.is_watertight and split.is_winding_consistent
    assert len(split.split()) == 2
    assert 1.9 < split.volume < 2  # slightly less


def test_vertex_colours_match_the_field(pair: ExtractedMesh) -> None:
    colours = np.asarray(pair.mesh.visual.vertex_colors)
    front = pair.mesh.vertices[:, 0] > 0.05
    back = pair.mesh.vertices[:, 0] < -0.05
    assert np.abs(colours[front, :3].astype(int) - np.round(np.array(RED) * 255)).max() <= 2
    assert np.abs(colours[back, :3].astype(int) - np.round(np.array(BLUE) * 255)).max() <= 2


def test_colour_is_that_below_a_thin_skin() -> None:
    class Skinned(AnalyticScene):
        def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return self.density(x), torch.where(
                x.norm(dim=-1, keepdim=True) < 0.5, torch.tensor(RED), torch.tensor(BLUE)
            )

    fuzz = extract(
        Skinned(lambda x: torch.where(x.norm(dim=-1) < 0.5, 100.0, 2.0 * (x.norm(dim=-1) < 0.52))), SMALL
    )
    mean = np.asarray(fuzz.mesh.visual.vertex_colors)[:, :3].mean(0) / 255
    assert np.abs(mean - RED).max() < 0.15


def test_mesh_renders_match_the_scene(pair: ExtractedMesh) -> None:
    cameras = meshes.silhouette_cameras(SMALL)
    true = render_views(AnalyticScene(ball((0, 0, 0), 0.5)), cameras)
    views = render_mesh(pair.mesh, cameras)
    assert pair.silhouette_iou > 0.95
    assert (views.rgb - true.rgb).abs().mean() < 0.02


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
def test_files_round_trip(pair: ExtractedMesh, tmp_path: Path, suffix: str) -> None:
    paths = {path.suffix[1:]: path for path in save_mesh(pair.mesh, tmp_path / "out")}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["mesh.glb", "mesh.obj", "mesh.ply"]
    back = load_mesh(paths[suffix])
    assert back.is_watertight and back.volume == pytest.approx(pair.mesh.volume, rel=1e-4)
    assert len(back.faces) == len(pair.mesh.faces)
    colours = np.asarray(back.visual.vertex_colors)[:, :3]
    front = back.vertices[:, 0] > 0.05
    # A GLB has eight bits of linear light, which is coarse in dark colours.
    transfer = to_linear if suffix == "glb" else np.asarray
    assert np.abs(transfer(colours[front] / 255) - transfer(np.array(RED))).max() <= 2 / 255


def test_files_are_y_up_with_the_front_at_z(tmp_path: Path) -> None:
    box = trimesh.creation.box(extents=(0.2, 0.4, 0.6))
    box.apply_translation([0.5, 0.2, 0.1])  # forward, left, up
    box.visual.vertex_colors = np.full((8, 4), 200, np.uint8)
    for path in save_mesh(box, tmp_path, "box"):
        rotated = trimesh.load(path, force="mesh")
        assert np.allclose(rotated.bounds.mean(0), [0.2, 0.1, 0.5], atol=1e-5)
        assert np.allclose(rotated.extents, [0.4, 0.6, 0.2], atol=1e-5)


def test_glb_has_bounds_normals_and_linear_colours(pair: ExtractedMesh, tmp_path: Path) -> None:
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
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0  # glTF's default is metallic
    stored = next(iter(trimesh.load_scene(path).geometry.values())).visual.vertex_attributes["color"]
    red = stored[pair.mesh.vertices[:, 0] > 0.05][:, 0] / 255
    assert np.abs(red - ((RED[0] + 0.055) / 1.055) ** 2.4).max() < 0.01  # linear light
    line = next(line for line in obj.read_text().splitlines() if line.startswith("v "))
    assert len(line.split()) == 7 and 0 <= float(line.split()[4]) <= 1


def test_srgb_transfer_is_that_of_the_standard() -> None:
    """IEC 61966-2-1: sRGB 0.5 is 0.2140 in linear light, the two pieces meet, and the inverse is exact."""
    values = np.linspace(0, 1, 256)
    assert float(to_linear(np.array(0.5))) == pytest.approx(0.21404, abs=1e-5)
    assert float(to_linear(np.array(0.04))) == pytest.approx(0.04 / 12.92)
    assert np.abs(to_srgb(to_linear(values)) - values).max() < 1e-6


def test_failed_write_leaves_no_file(
    pair: ExtractedMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(self: trimesh.Trimesh, path: Path, **_: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(trimesh.Trimesh, "export", broken)
    with pytest.raises(OSError, match="disk full"):
        save_mesh(pair.mesh, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("level", [0.0, 0.05, math.nan])
def test_empty_or_diverged_scene_raises(level: float) -> None:
    with pytest.raises(UserError, match="not finite" if math.isnan(level) else "scene is empty"):
        extract(
            AnalyticScene(lambda x: torch.full((len(x),), level)),
            MeshOptions(resolution=16, views=1, view_resolution=16),
        )


def test_invalid_options_and_files_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="max_faces is 3"):
        MeshOptions(max_faces=3)
    with pytest.raises(UserError, match="min_component is 2"):
        MeshOptions(min_component=2)
    with pytest.raises(UserError, match="does not exist"):
        load_mesh(tmp_path / "none.glb")
    (tmp_path / "bad.glb").write_bytes(b"no mesh at all")
    with pytest.raises(UserError, match="cannot be read"):
        load_mesh(tmp_path / "bad.glb")
