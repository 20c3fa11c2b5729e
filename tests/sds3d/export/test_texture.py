"""Baked textures: colours against the field, charts that merge into a closed mesh, valid files."""

import json
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from command_line import ROOT
from PIL import Image
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.export.files import load_mesh, save_mesh
from sds3d.export.texture import (
    SurfaceColours,
    TextureOptions,
    bake,
    colours_at,
    texels,
    unwrap,
    vertex_coloured,
)
from sds3d.export.turntable import render_mesh
from sds3d.scene.cameras import ring

NODE = ROOT / ".venv" / "node"  # where scripts/test.sh puts the Khronos validator


def stripes(frequency: float) -> SurfaceColours:
    """Colours that vary smoothly with position, at high frequency within a face of a coarse mesh."""
    return lambda points, normals: 0.5 + 0.4 * torch.sin(frequency * points)


@pytest.fixture(scope="module")
def sphere() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(3, radius=0.6)


def error(mesh: trimesh.Trimesh, colours: SurfaceColours) -> float:
    """Root mean square error of a mesh's colours at random points of its faces."""
    generator = np.random.default_rng(0)
    face, barycentric = generator.integers(len(mesh.faces), size=4000), generator.dirichlet(np.ones(3), 4000)
    points = np.einsum("nc,ncd->nd", barycentric, mesh.vertices[mesh.faces[face]])
    target = colours(torch.from_numpy(points).float(), torch.zeros(0)).numpy()
    return float(np.sqrt(((colours_at(mesh, face, barycentric) - target) ** 2).mean()))


def test_texture_is_finer_than_vertex_colours(sphere: trimesh.Trimesh) -> None:
    colours = stripes(20.0)  # three vertices a period
    baked = bake(sphere, colours, TextureOptions(256))
    coloured = vertex_coloured(sphere.copy(), colours)
    assert error(baked, colours) < 0.015 and error(coloured, colours) > 4 * error(baked, colours)


def test_charts_do_not_overlap_and_merge_into_a_closed_mesh(sphere: trimesh.Trimesh) -> None:
    unwrapped = unwrap(sphere, TextureOptions(256))
    indices, face, barycentric = texels(unwrapped, 256)
    assert len(np.unique(indices)) == len(indices) and 0.4 < len(indices) / 256**2 < 1
    u, v = np.einsum("nc,ncd->nd", barycentric, unwrapped.visual.uv[unwrapped.faces[face]]).T
    rows, columns = np.divmod(indices, 256)
    assert np.abs(u * 256 - columns - 0.5).max() < 1e-2
    assert np.abs((1 - v) * 256 - rows - 0.5).max() < 1e-2  # row 0 is the top
    corners = unwrapped.visual.uv[unwrapped.faces]
    one, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    areas = np.abs(one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]).sum() / 2
    assert areas == pytest.approx(len(indices) / 256**2, rel=0.02)  # less where charts overlap
    assert len(unwrapped.vertices) > len(sphere.vertices) and not unwrapped.is_watertight
    unwrapped.merge_vertices(merge_tex=True, merge_norm=True)
    assert unwrapped.is_watertight and unwrapped.volume == pytest.approx(sphere.volume, rel=1e-5)


def test_texels_between_charts_extend_them(sphere: trimesh.Trimesh) -> None:
    """A red ball has no other texel that bilinear interpolation could mix in at a chart's edge."""

    def red(points: Tensor, normals: Tensor) -> Tensor:
        return torch.tensor([0.8, 0.1, 0.2]).expand(len(points), 3)

    pixels = np.asarray(bake(sphere, red, TextureOptions(64)).visual.material.baseColorTexture)
    assert np.abs(pixels / 255 - [0.8, 0.1, 0.2]).max() < 1 / 255


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
def test_textured_files_round_trip(sphere: trimesh.Trimesh, tmp_path: Path, suffix: str) -> None:
    colours = stripes(4.0)
    whole = vertex_coloured(sphere.copy(), colours)
    paths = save_mesh(whole, tmp_path, "ball", bake(sphere, colours, TextureOptions(256)))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [f"ball.{suffix}" for suffix in ("glb", "mtl", "obj", "ply", "png")]
    assert Image.open(tmp_path / "ball.png").size == (256, 256)
    assert "Kd 1 1 1" in (tmp_path / "ball.mtl").read_text()
    back = load_mesh(next(path for path in paths if path.suffix == f".{suffix}"))
    assert back.is_watertight and len(back.vertices) == len(sphere.vertices)
    assert back.volume == pytest.approx(sphere.volume, rel=1e-4)
    assert error(back, colours) < 0.03
    cameras = ring(3, 20.0, 48)
    assert (render_mesh(back, cameras).rgb - render_mesh(whole, cameras).rgb).abs().mean() < 0.01


@pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules" / "gltf-validator").is_dir(),
    reason="the Khronos glTF validator is not installed (scripts/test.sh installs it where there is npm)",
)
@pytest.mark.parametrize("textured", [True, False])
def test_khronos_validator_reports_no_issues(sphere: trimesh.Trimesh, tmp_path: Path, textured: bool) -> None:
    whole = vertex_coloured(sphere.copy(), stripes(4.0))
    baked = bake(sphere, stripes(4.0), TextureOptions(64)) if textured else None
    path = save_mesh(whole, tmp_path, textured=baked)[0]
    script = (
        "require('gltf-validator').validateBytes(new Uint8Array(require('fs').readFileSync(process.argv[1])))"
        ".then(report => console.log(JSON.stringify(report)))"
    )
    command = ["node", "-e", script, str(path)]
    report = json.loads(subprocess.run(command, cwd=NODE, capture_output=True, text=True, check=True).stdout)
    issues, info = report["issues"], report["info"]
    assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]
    assert info["totalTriangleCount"] == len(sphere.faces) and info["hasTextures"] == textured


def test_sizes_out_of_range_raise() -> None:
    with pytest.raises(UserError, match="a texture of 8 pixels"):
        TextureOptions(8)
