"""The protocol of scene representations: all that training, export, grading and the viewer need of one.

A representation is one file: a `Scene3D`, and a `SceneOptions` that builds it, named by `_target_` in a YAML.
"""

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from distill.runtime.config import TARGET, as_mapping, build
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, write_json
from sds3d.scene.cameras import Cameras
from sds3d.scene.regularizers import RegularizerOptions
from sds3d.scene.shading import PointLights

if TYPE_CHECKING:  # a heavy import that nothing else here needs
    import trimesh

FORMAT = "sds3d-scene-2"
UNNAMED = "sds3d.scene.nerf.NerfOptions"  # the options of runs and folders that name no class (sds3d-scene-1)


@dataclass(frozen=True)
class MeshOptions:
    """How a mesh is extracted from a scene. Raises `UserError` for a value out of range."""

    resolution: int = 128  # density samples along each edge of the box
    max_faces: int = 20_000
    views: int = 12  # ring views whose silhouettes are compared, beside two at 60 degrees
    view_resolution: int = 64
    candidates: int = 24  # thresholds compared, then as many again around the best
    min_component: float = 0.02  # floaters have less than this fraction of the largest component's volume
    smoothing: int = 5  # Taubin iterations

    def __post_init__(self) -> None:
        minima = {"resolution": 8, "max_faces": 100, "views": 1, "view_resolution": 8, "candidates": 3}
        for name, value in vars(self).items():
            if value < minima.get(name, 0):
                raise UserError(f"mesh {name} is {value}: it must be at least {minima.get(name, 0)}")
        if self.min_component > 1:
            raise UserError(f"mesh min_component is {self.min_component}: give a fraction from 0 to 1")


@dataclass(frozen=True)
class ExtractedMesh:
    """A mesh in scene axes with sRGB vertex colours (8 bit), and the properties of its extraction."""

    mesh: "trimesh.Trimesh"
    threshold: float  # density of the isosurface
    silhouette_iou: float  # of the final mesh with the scene's opacity > 0.5, mean over the views
    watertight: bool
    floaters: int  # removed


@dataclass(frozen=True)
class RenderedViews:
    """Images of B cameras. A representation extends it with what its regularization needs."""

    rgb: Tensor  # (B, 3, H, W) in [0, 1]
    opacity: Tensor  # (B, 1, H, W) in [0, 1]
    depth: Tensor  # (B, 1, H, W) world units along the ray, 0 where nothing is hit
    normal: Tensor | None  # (B, 3, H, W) world space, weighted by opacity, so of length <= 1

    def split_gradients(self) -> tuple[Tensor, Tensor]:
        """`rgb` twice: as a function of the geometry only, and of the appearance only, for a loss on each.

        Here both depend on both, as for a representation that cannot tell them apart.
        """
        return self.rgb, self.rgb


class ParameterGroup(NamedTuple):
    """Parameters with one learning rate: that of their role, times `lr_scale`.

    `explicit` parameters are values stored by place (feature grids, Gaussians, vertices), `mlp` ones weights.
    """

    name: str
    role: Literal["explicit", "mlp"]
    parameters: list[nn.Parameter]
    lr_scale: float = 1.0


@dataclass(frozen=True)
class SceneOptions(ABC):
    """All choices that define a scene, saved beside its weights."""

    @abstractmethod
    def build(self, device: torch.device | str = "cpu") -> "Scene3D":
        """A new scene on `device`, initialised from torch's global generator."""


class Scene3D(nn.Module, ABC):
    """A differentiable scene in the box [-1, 1]^3, z up, front at +x; its state is its `state_dict`."""

    def __init__(self, options: SceneOptions) -> None:
        super().__init__()
        self.options = options

    @property
    def device(self) -> torch.device:
        """The device of its parameters and buffers."""
        return next(chain(self.parameters(), self.buffers())).device

    def update(self, step: int, generator: torch.Generator | None = None) -> None:
        """Update what gradients do not train (an occupancy grid, a set of Gaussians) before step `step`."""

    @abstractmethod
    def render(
        self,
        cameras: Cameras,
        background: Tensor | None = None,
        generator: torch.Generator | None = None,
        training: bool = False,
        normals: bool = False,
        lights: PointLights | None = None,
    ) -> RenderedViews:
        """Images through B cameras over a `background` (B, 3), or over the scene's own.

        `lights`, one a view, shade the surfaces; without, views show the albedo. A representation that cannot
        be shaded raises `UserError`.

        `training` renders with gradients, and with what `regularization` needs; `generator` then drives
        stochastic sampling. Otherwise rendering is deterministic, without gradients, in bounded memory.
        """

    @abstractmethod
    def parameter_groups(self) -> list[ParameterGroup]:
        """Every parameter once, in the order that optimizer states are saved in."""

    @abstractmethod
    def regularization(
        self, views: RenderedViews, options: RegularizerOptions, progress: float, generator: torch.Generator
    ) -> Tensor:
        """The weighted sum (scalar) of the penalties in `options`, for views rendered in training.

        `progress` in [0, 1] is the fraction of the run. Terms that a representation has no use for are 0.
        """

    @abstractmethod
    def extract_mesh(self, options: MeshOptions) -> ExtractedMesh:
        """A closed surface with sRGB vertex colours in scene axes. Raises `UserError` for an empty scene."""

    @abstractmethod
    def surface_colours(self, points: Tensor, normals: Tensor, spacing: float) -> Tensor:
        """sRGB colours (N, 3) in [0, 1], on the CPU, of points (N, 3) on the extracted mesh, for its texture.

        normals (N, 3) point outwards; `spacing` is the resolution of the extraction in world units.
        """

    @abstractmethod
    def rotate(self, quarter_turns: int) -> None:
        """Rotate about the vertical: the view from azimuth a becomes that from a + 90 degrees x turns."""

    def save(self, folder: Path | str) -> None:
        """Write scene.safetensors (the state) and scene.json (options and their class) to `folder`."""
        folder = Path(folder)
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.state_dict().items()}
        with atomic_path(folder / "scene.safetensors") as path:
            save_file(tensors, str(path), metadata={"format": FORMAT})
        write_json(folder / "scene.json", {"format": FORMAT, "options": as_mapping(self.options)})


def build_scene_options(values: Mapping[str, Any], name: str = "scene") -> SceneOptions:
    """Scene options from a mapping, of a NeRF without a `_target_`. Raises `UserError` as `build` does."""
    return build(SceneOptions, {TARGET: UNNAMED, **values}, name)


def load_scene(folder: Path | str, device: torch.device | str = "cpu") -> Scene3D:
    """The scene saved in `folder`, of any representation. Raises `UserError` for a damaged folder."""
    folder = Path(folder)
    hint = "give a folder written by Scene3D.save (scene.json and scene.safetensors)"
    try:
        content = json.loads((folder / "scene.json").read_text())
        if content.get("format") not in (FORMAT, "sds3d-scene-1"):
            raise UserError(
                f"{folder / 'scene.json'} has format {content.get('format')!r}, not {FORMAT!r}: {hint}"
            )
        scene = build_scene_options(content["options"], "options").build(device)
        scene.load_state_dict(load_file(str(folder / "scene.safetensors"), device=str(device)))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, SafetensorError) as error:
        raise UserError(f"{folder} holds no scene ({str(error).splitlines()[0]}): {hint}") from error
    return scene
