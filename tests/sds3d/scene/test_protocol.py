"""The protocol with another representation than the NeRF: saved, loaded and exported like any other."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import final

import pytest
import torch
import trimesh
from torch import Tensor, nn

from distill.runtime.checkpoint import checkpoint_path, save_state
from distill.runtime.errors import UserError
from distill.runtime.files import read_json, write_json
from sds3d.export.export import ExportOptions, export_scene, scene_of_run
from sds3d.export.texture import TextureOptions, vertex_coloured
from sds3d.scene.cameras import Cameras, ring
from sds3d.scene.nerf import GridOptions, NeRF, NerfOptions
from sds3d.scene.protocol import (
    ExtractedMesh,
    MeshOptions,
    ParameterGroup,
    RenderedViews,
    Scene3D,
    SceneOptions,
    load_scene,
)
from sds3d.scene.regularizers import RegularizerOptions


@final
@dataclass(frozen=True)
class BallOptions(SceneOptions):
    radius: float = 0.5
    colours: tuple[float, ...] = field(default=(0.8, 0.2, 0.1))

    def build(self, device: torch.device | str = "cpu") -> "Ball":
        return Ball(self).to(device)


@final
class Ball(Scene3D):
    """A ball with a learned radius and colour, and a soft silhouette."""

    options: BallOptions

    def __init__(self, options: BallOptions) -> None:
        super().__init__(options)
        self.radius = nn.Parameter(torch.tensor(options.radius))
        self.colour = nn.Parameter(torch.tensor(options.colours))

    def render(
        self,
        cameras: Cameras,
        background: Tensor | None = None,
        generator: torch.Generator | None = None,
        training: bool = False,
        normals: bool = False,
    ) -> RenderedViews:
        origins, directions = cameras.rays()
        along = -(origins * directions).sum(-1, keepdim=True)
        impact = (origins + along * directions).norm(dim=-1)
        with torch.set_grad_enabled(training):
            opacity = ((self.radius - impact) * 50).sigmoid()[:, None]
            colours = torch.zeros(len(cameras), 3) if background is None else background
            rgb = opacity * self.colour[:, None, None] + (1 - opacity) * colours[:, :, None, None]
        normal = (origins + along * directions).permute(0, 3, 1, 2) * opacity if normals else None
        return RenderedViews(rgb, opacity, along.permute(0, 3, 1, 2) * opacity, normal)

    def parameter_groups(self) -> list[ParameterGroup]:
        return [ParameterGroup("ball", "explicit", [self.radius, self.colour], 0.5)]

    def regularization(
        self, views: RenderedViews, options: RegularizerOptions, progress: float, generator: torch.Generator
    ) -> Tensor:
        return views.opacity.mean()

    def extract_mesh(self, options: MeshOptions) -> ExtractedMesh:
        mesh = trimesh.creation.icosphere(3, float(self.radius.detach()))
        mesh = vertex_coloured(mesh, lambda points, normals: self.surface_colours(points, normals, 0.1))
        return ExtractedMesh(mesh, 0.0, 1.0, True, 0)

    def surface_colours(self, points: Tensor, normals: Tensor, spacing: float) -> Tensor:
        return self.colour.detach().expand(len(points), 3)

    def rotate(self, quarter_turns: int) -> None:
        pass


def test_any_representation_is_saved_loaded_and_exported(tmp_path: Path) -> None:
    scene = BallOptions(0.4).build()
    scene.colour.data[1] = 0.6
    options = ExportOptions(
        texture=TextureOptions(64),
        frames=2,
        resolution=32,
        layers=("rgb", "depth", "normals"),
        videos=("gif",),
    )
    figures = export_scene(scene, tmp_path, options)
    assert figures["mesh"]["faces"] == 1280 and figures["mesh"]["psnr_to_scene"] > 20
    assert (tmp_path / "mesh.glb").is_file() and (tmp_path / "turntable.gif").is_file()
    again = load_scene(tmp_path / "scene")
    assert (
        isinstance(again, Ball) and again.options == scene.options and torch.equal(again.colour, scene.colour)
    )
    assert isinstance(scene_of_run(tmp_path), Ball)


def test_split_gradients_default_to_the_whole_gradient() -> None:
    views = BallOptions().build().render(ring(2, resolution=8), training=True)
    assert all(rgb is views.rgb and rgb.requires_grad for rgb in views.split_gradients())


@pytest.mark.parametrize("named", [True, False], ids=["with _target_", "without"])
def test_checkpoints_are_built_by_the_class_in_the_config(named: bool, tmp_path: Path) -> None:
    options = NerfOptions(grid=GridOptions(resolution=16)) if not named else BallOptions(0.3)
    values = {"grid": {"resolution": 16}}
    if named:
        options.build().save(tmp_path / "elsewhere")
        values = read_json(tmp_path / "elsewhere" / "scene.json")["options"]
        assert values["_target_"].endswith(".BallOptions")
    write_json(tmp_path / "config.json", {"scene": values})
    scene = options.build()
    save_state(checkpoint_path(tmp_path / "checkpoints", 5), {"parts": {"scene": scene.state_dict()}})
    again = scene_of_run(tmp_path)
    assert isinstance(again, Ball if named else NeRF) and again.options == options
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in scene.state_dict().items())


def test_unknown_classes_raise(tmp_path: Path) -> None:
    BallOptions().build().save(tmp_path)
    content = read_json(tmp_path / "scene.json")
    content["options"]["_target_"] = "sds3d.scene.nerf.NeRF"
    write_json(tmp_path / "scene.json", content)
    with pytest.raises(UserError, match="SceneOptions"):
        load_scene(tmp_path)
