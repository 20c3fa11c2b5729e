"""Baked textures: the field's colours where they belong, charts that close again, files other tools take."""

import json
import shutil
import subprocess
from dataclasses import dataclass
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
from sds3d.export.texture import TextureOptions, bake, colours_at, texels, unwrap, vertex_coloured
from sds3d.export.turntable import render_mesh
from sds3d.scene.cameras import ring

CPU = torch.device("cpu")
NODE = ROOT / ".venv" / "node"  # where scripts/test.sh puts the Khronos validator


@dataclass(frozen=True)
class Stripes:
    """A dense ball whose colour is a smooth function of the place, finer than a coarse mesh's vertices."""

    waves: float

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(x),), 500.0), 0.5 + 0.4 * torch.sin(self.waves * x)


@pytest.fixture(scope="module")
def sphere() -> trimesh.Trimesh:
    return trimesh.creation.icosphere(3, radius=0.6)


def error(mesh: trimesh.Trimesh, field: Stripes) -> float:
    """Root mean square distance of a mesh's colours from its field's, at random points of its faces."""
    generator = np.random.default_rng(0)
    face, share = generator.integers(len(mesh.faces), size=4000), generator.dirichlet(np.ones(3), 4000)
    points = np.einsum("nc,ncd->nd", share, mesh.vertices[mesh.faces[face]])
    wanted = field(torch.from_numpy(points).float())[1].numpy()
    return float(np.sqrt(((colours_at(mesh, face, share) - wanted) ** 2).mean()))


def test_a_texture_holds_what_vertices_cannot(sphere: trimesh.Trimesh) -> None:
    field = Stripes(20.0)  # three vertices a wave
    baked = bake(sphere, field, 1e-4, TextureOptions(256), CPU)
    at_vertices = vertex_coloured(sphere.copy(), field, 1e-4, CPU)
    assert error(baked, field) < 0.015 and error(at_vertices, field) > 4 * error(baked, field)


def test_charts_do_not_overlap_and_close_again(sphere: trimesh.Trimesh) -> None:
    made = unwrap(sphere, TextureOptions(256))
    where, face, share = texels(made, 256)
    assert len(np.unique(where)) == len(where) and 0.4 < len(where) / 256**2 < 1
    u, v = np.einsum("nc,ncd->nd", share, made.visual.uv[made.faces[face]]).T
    rows, columns = np.divmod(where, 256)
    assert (
        np.abs(u * 256 - columns - 0.5).max() < 1e-2 and np.abs((1 - v) * 256 - rows - 0.5).max() < 1e-2
    )  # rows count from the top
    corners = made.visual.uv[made.faces]
    one, other = corners[:, 1] - corners[:, 0], corners[:, 2] - corners[:, 0]
    areas = np.abs(one[:, 0] * other[:, 1] - one[:, 1] * other[:, 0]).sum() / 2
    assert areas == pytest.approx(len(where) / 256**2, rel=0.02)  # a texel seen twice would be missing here
    assert len(made.vertices) > len(sphere.vertices) and not made.is_watertight
    made.merge_vertices(merge_tex=True, merge_norm=True)
    assert made.is_watertight and made.volume == pytest.approx(sphere.volume, rel=1e-5)


def test_texels_between_charts_continue_them(sphere: trimesh.Trimesh) -> None:
    """A red ball: bilinear lookups at a chart's edge would else mix in what lies outside."""

    def red(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.full((len(x),), 500.0), torch.tensor([0.8, 0.1, 0.2]).expand(len(x), 3)

    pixels = np.asarray(bake(sphere, red, 1e-4, TextureOptions(64), CPU).visual.material.baseColorTexture)
    assert np.abs(pixels / 255 - [0.8, 0.1, 0.2]).max() < 1 / 255


@pytest.mark.parametrize("suffix", ["glb", "obj", "ply"])
def test_textured_files_come_back_whole(sphere: trimesh.Trimesh, tmp_path: Path, suffix: str) -> None:
    field = Stripes(4.0)
    whole = vertex_coloured(sphere.copy(), field, 1e-4, CPU)
    paths = save_mesh(whole, tmp_path, "ball", bake(sphere, field, 1e-4, TextureOptions(256), CPU))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ball.glb",
        "ball.mtl",
        "ball.obj",
        "ball.ply",
        "ball.png",
    ]
    assert (
        Image.open(tmp_path / "ball.png").size == (256, 256)
        and "Kd 1 1 1" in (tmp_path / "ball.mtl").read_text()
    )
    back = load_mesh(next(path for path in paths if path.suffix == f".{suffix}"))
    assert (
        back.is_watertight
        and len(back.vertices) == len(sphere.vertices)
        and back.volume == pytest.approx(sphere.volume, rel=1e-4)
    )
    assert error(back, field) < 0.03
    cameras = ring(3, 20.0, 48)
    assert (render_mesh(back, cameras).rgb - render_mesh(whole, cameras).rgb).abs().mean() < 0.01


@pytest.mark.skipif(
    shutil.which("node") is None or not (NODE / "node_modules" / "gltf-validator").is_dir(),
    reason="the Khronos glTF validator is not installed (scripts/test.sh installs it where there is npm)",
)
@pytest.mark.parametrize("textured", [True, False])
def test_the_khronos_validator_finds_nothing(sphere: trimesh.Trimesh, tmp_path: Path, textured: bool) -> None:
    field = Stripes(4.0)
    whole = vertex_coloured(sphere.copy(), field, 1e-4, CPU)
    path = save_mesh(
        whole, tmp_path, textured=bake(sphere, field, 1e-4, TextureOptions(64), CPU) if textured else None
    )[0]
    ask = (
        "require('gltf-validator').validateBytes(new Uint8Array(require('fs').readFileSync(process.argv[1])))"
        ".then(told => console.log(JSON.stringify(told)))"
    )
    told = subprocess.run(
        ["node", "-e", ask, str(path)], cwd=NODE, capture_output=True, text=True, check=True
    ).stdout
    issues, info = json.loads(told)["issues"], json.loads(told)["info"]
    assert (issues["numErrors"], issues["numWarnings"]) == (0, 0), issues["messages"]
    assert info["totalTriangleCount"] == len(sphere.faces) and info["hasTextures"] == textured


def test_sizes_no_texture_can_have_are_refused() -> None:
    with pytest.raises(UserError, match="a texture of 8 pixels"):
        TextureOptions(8)
