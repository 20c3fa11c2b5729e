"""What is looked at: turntables of a scene or a mesh, and contact sheets. Frames are (F, 3, H, W) in [0, 1]."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

import numpy as np
import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.scene.cameras import Cameras

if TYPE_CHECKING:
    import trimesh

    from sds3d.scene.nerf import RenderedViews, Scene
    from sds3d.world.raycast import RayCaster

Layer = Literal["rgb", "depth", "normals"]
Colour = tuple[float, float, float]  # RGB in [0, 1]
WHITE: Colour = (1.0, 1.0, 1.0)
VIEWS = 4  # rendered at once; bounds the memory


class RenderedViews(Protocol):
    """rgb (B, 3, H, W) and opacity (B, 1, H, W), both in [0, 1]."""

    @property
    def rgb(self) -> Tensor:
        """Colours over the background."""

    @property
    def opacity(self) -> Tensor:
        """Opacities."""


class Renderable(Protocol):
    """Anything that cameras can look at: `sds3d.scene.Scene`, or a stand-in."""

    @property
    def device(self) -> torch.device:
        """Where it lives."""

    def render(
        self,
        cameras: Cameras,
        background: Tensor | None = None,
        generator: torch.Generator | None = None,
        training: bool = False,
    ) -> RenderedViews:
        """Views over backgrounds (B, 3), or over its own."""


@dataclass(frozen=True)
class Frames:
    """Views on the CPU: rgb (B, 3, H, W), opacity (B, 1, H, W)."""

    rgb: Tensor
    opacity: Tensor


def render_views(scene: Renderable, cameras: Cameras, background: Colour | None = WHITE) -> Frames:
    """All views, a few at a time, without gradients; over the scene's own background where none is given."""
    colours, opacities = [], []
    with torch.no_grad():
        for part in chunks(cameras.to(scene.device), VIEWS):
            behind = (
                None
                if background is None
                else torch.tensor(background, device=scene.device).expand(len(part), 3)
            )
            views = scene.render(part, behind, training=False)
            colours.append(views.rgb.float().cpu())
            opacities.append(views.opacity.float().cpu())
    return Frames(torch.cat(colours).clamp(0, 1), torch.cat(opacities))


def chunks(cameras: Cameras, size: int) -> Iterator[Cameras]:
    """The cameras in order, `size` at a time."""
    parts = (cameras.position, cameras.azimuth, cameras.elevation, cameras.rotation, cameras.fovy)
    for tensors in zip(*(part.split(size) for part in parts), strict=True):
        yield Cameras(*tensors, cameras.resolution)


@torch.no_grad()
def render_layers(
    scene: "Scene", cameras: Cameras, layers: Sequence[Layer] = ("rgb",), background: Colour = WHITE
) -> Tensor:
    """Each view's layers side by side (B, 3, H, layers * W): colours; nearness to the camera, black where nothing is;
    normals as it sees them (right, up, towards it as red, green, blue)."""
    shown = []
    for part in chunks(cameras.to(scene.device), VIEWS):
        behind = torch.tensor(background, device=scene.device).expand(len(part), 3)
        views = scene.render(part, behind, normals="normals" in layers)
        pictures = [_picture(views, layer, part, behind[:, :, None, None]) for layer in layers]
        shown.append(torch.cat(pictures, -1).float().cpu())
    return torch.cat(shown).clamp(0, 1)


def _picture(views: "RenderedViews", layer: Layer, cameras: Cameras, behind: Tensor) -> Tensor:
    if layer == "rgb":
        return views.rgb
    if layer == "depth":
        centre = cameras.position.norm(dim=-1)[:, None, None, None]
        bare = ((centre + 1 - views.depth) / 2).clamp(0, 1)  # what lies within the unit ball
        return (bare * views.opacity).expand(-1, 3, -1, -1)
    assert views.normal is not None
    seen = torch.einsum("bihw,bij->bjhw", views.normal, cameras.rotation)  # its length is the opacity
    return (seen + views.opacity) / 2 + (1 - views.opacity) * behind


def _hit_colours(caster: "RayCaster", mesh: "trimesh.Trimesh", camera: Cameras) -> np.ndarray:
    """Colours and coverage (N, 4) of one camera's rays; zeros for a miss."""
    from trimesh.triangles import points_to_barycentric

    from sds3d.export.texture import colours_at

    origins, directions = (ray.reshape(-1, 3).numpy() for ray in camera.rays())
    face, distance, _ = caster.cast(*camera.rays())
    hit = face >= 0
    points = (origins + directions * np.where(hit, distance, 0)[:, None])[hit]
    share = points_to_barycentric(mesh.triangles[face[hit]], points).clip(0, 1).astype(np.float32)
    rgba = np.zeros((len(face), 4), np.float32)
    rgba[hit, :3] = colours_at(mesh, face[hit], share)
    rgba[hit, 3] = 1
    return rgba


def render_mesh(
    mesh: "trimesh.Trimesh", cameras: Cameras, background: Colour = WHITE, supersample: int = 2
) -> Frames:
    """Ray-cast views of a mesh in scene axes by its texture or vertex colours, unlit, so that it can be laid beside its NeRF."""
    from sds3d.world.raycast import RayCaster

    caster, size = RayCaster(mesh), cameras.resolution
    views = []
    for camera in chunks(cameras.at(size * supersample), 1):
        rgba = _hit_colours(caster, mesh, camera)
        views.append(rgba.reshape(size, supersample, size, supersample, 4).mean((1, 3)))
    rgba = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    opacity = rgba[:, 3:]  # the colours carry it already
    return Frames(rgba[:, :3] + (1 - opacity) * torch.tensor(background)[:, None, None], opacity)


def contact_sheet(frames: Tensor, columns: int = 8, rows: int = 1) -> Tensor:
    """Evenly spaced frames, first one included, side by side, then below: (3, rows H, columns W)."""
    if columns < 1 or rows < 1 or not len(frames):
        raise UserError(
            f"a contact sheet of {rows} x {columns} from {len(frames)} frames: each must be at least 1"
        )
    count = columns * rows
    chosen = frames[torch.arange(count) * len(frames) // count]
    _, channels, height, width = chosen.shape
    sheet = chosen.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return sheet.reshape(channels, rows * height, columns * width)
