"""Renders for viewing: views of a scene or a mesh, and contact sheets. Frames are (F, 3, H, W) in [0, 1]."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.scene.cameras import Cameras
from sds3d.scene.protocol import RenderedViews, Scene3D

if TYPE_CHECKING:
    import trimesh

    from sds3d.world.raycast import RayCaster

Layer = Literal["rgb", "depth", "normals"]
Colour = tuple[float, float, float]  # RGB in [0, 1]
WHITE: Colour = (1.0, 1.0, 1.0)
GREY: Colour = (0.85, 0.85, 0.85)
CHUNK = 4  # views rendered at once, which bounds the memory


@dataclass(frozen=True)
class Frames:
    """Views on the CPU."""

    rgb: Tensor  # (B, 3, H, W) in [0, 1]
    opacity: Tensor  # (B, 1, H, W) in [0, 1]


@torch.no_grad()
def render_views(scene: Scene3D, cameras: Cameras, background: Colour | None = WHITE) -> Frames:
    """All views, a few at a time, without gradients; over the scene's own background where that is None."""
    rgb, opacity = [], []
    for chunk in cameras.to(scene.device).split(CHUNK):
        views = scene.render(chunk, None if background is None else _backgrounds(background, chunk))
        rgb.append(views.rgb.float().cpu())
        opacity.append(views.opacity.float().cpu())
    return Frames(torch.cat(rgb).clamp(0, 1), torch.cat(opacity))


@torch.no_grad()
def render_layers(
    scene: Scene3D, cameras: Cameras, layers: Sequence[Layer] = ("rgb",), background: Colour = WHITE
) -> Tensor:
    """Each view's layers side by side (B, 3, H, layers * W).

    The depth layer is nearness to the camera, black where nothing is hit. The layer of normals shows them in
    camera axes, right, up and backward as red, green and blue.
    """
    frames = []
    for chunk in cameras.to(scene.device).split(CHUNK):
        colours = _backgrounds(background, chunk)
        views = scene.render(chunk, colours, normals="normals" in layers)
        images = [_layer_image(views, layer, chunk, colours[:, :, None, None]) for layer in layers]
        frames.append(torch.cat(images, -1).float().cpu())
    return torch.cat(frames).clamp(0, 1)


def _backgrounds(colour: Colour, cameras: Cameras) -> Tensor:
    return torch.tensor(colour, device=cameras.position.device).expand(len(cameras), 3)


def _layer_image(views: RenderedViews, layer: Layer, cameras: Cameras, background: Tensor) -> Tensor:
    if layer == "rgb":
        return views.rgb
    if layer == "depth":
        distance = cameras.position.norm(dim=-1)[:, None, None, None]
        nearness = ((distance + 1 - views.depth) / 2).clamp(0, 1)  # 0 to 1 within the unit ball
        return (nearness * views.opacity).expand(-1, 3, -1, -1)
    assert views.normal is not None
    normal = torch.einsum("bihw,bij->bjhw", views.normal, cameras.rotation)  # its length is the opacity
    return (normal + views.opacity) / 2 + (1 - views.opacity) * background


def _cast_colours(caster: "RayCaster", mesh: "trimesh.Trimesh", camera: Cameras) -> np.ndarray:
    """Colour and coverage (N, 4) of one camera's rays; zeros for a miss."""
    from trimesh.triangles import points_to_barycentric

    from sds3d.export.texture import colours_at

    origins, directions = (ray.reshape(-1, 3).numpy() for ray in camera.rays())
    face, distance, _ = caster.cast(*camera.rays())
    hit = face >= 0
    points = (origins + directions * np.where(hit, distance, 0)[:, None])[hit]
    barycentric = points_to_barycentric(mesh.triangles[face[hit]], points).clip(0, 1).astype(np.float32)
    rgba = np.zeros((len(face), 4), np.float32)
    rgba[hit, :3] = colours_at(mesh, face[hit], barycentric)
    rgba[hit, 3] = 1
    return rgba


def render_mesh(
    mesh: "trimesh.Trimesh", cameras: Cameras, background: Colour = WHITE, supersample: int = 2
) -> Frames:
    """Ray-cast, unlit views of a mesh in scene axes with its texture or vertex colours."""
    from sds3d.world.raycast import RayCaster

    caster, size = RayCaster(mesh), cameras.resolution
    views = []
    for camera in cameras.with_resolution(size * supersample).split(1):
        rgba = _cast_colours(caster, mesh, camera)
        views.append(rgba.reshape(size, supersample, size, supersample, 4).mean((1, 3)))
    images = torch.from_numpy(np.stack(views)).permute(0, 3, 1, 2)
    opacity = images[:, 3:]  # colours are premultiplied by it
    return Frames(images[:, :3] + (1 - opacity) * torch.tensor(background)[:, None, None], opacity)


def contact_sheet(frames: Tensor, columns: int = 8, rows: int = 1) -> Tensor:
    """Evenly spaced frames, from the first on, row by row: (3, rows H, columns W).

    Raises `UserError` for no frames, columns or rows.
    """
    if columns < 1 or rows < 1 or not len(frames):
        raise UserError(
            f"a contact sheet of {rows} x {columns} from {len(frames)} frames: each must be at least 1"
        )
    count = columns * rows
    chosen = frames[torch.arange(count) * len(frames) // count]
    _, channels, height, width = chosen.shape
    sheet = chosen.reshape(rows, columns, channels, height, width).permute(2, 0, 3, 1, 4)
    return sheet.reshape(channels, rows * height, columns * width)
