"""A mesh's colours out of its field: at vertices, or in a texture over a UV atlas (xatlas), so that detail is not bound to vertices."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor
from trimesh.triangles import points_to_barycentric
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from distill.runtime.errors import UserError
from sds3d.world.raycast import RayCaster

POINTS = 1 << 17  # field evaluations at once
STEPS = 7  # of the short ray that a colour is collected along


class ColourField(Protocol):
    """Points x (N, 3) in [-1, 1]^3; density (N,) >= 0 per unit length and albedo (N, 3) in [0, 1]."""

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Density and albedo."""


@dataclass(frozen=True)
class TextureOptions:
    """Pixels a side, 0 for none (vertex colours); pixels left between charts."""

    size: int = 512
    padding: int = 2

    def __post_init__(self) -> None:
        if (self.size and not 16 <= self.size <= 8192) or self.padding < 0:
            raise UserError(
                f"a texture of {self.size} pixels, padding {self.padding}: 16 to 8192 a side (0: none) and no less than 0 expected"
            )


@torch.no_grad()
def field_colours(
    field: ColourField, points: np.ndarray, normals: np.ndarray, step: float, device: torch.device
) -> np.ndarray:
    """sRGB colours (N, 3) in [0, 1] of surface points (N, 3): what a short ray against each normal collects in steps of length `step`."""
    depth = torch.arange(STEPS)[:, None, None] * step
    start, normal = (torch.from_numpy(np.array(a, np.float32)) for a in (points, normals))
    colours = []
    for at, out in zip(start.split(POINTS // STEPS), normal.split(POINTS // STEPS), strict=True):
        density, albedo = field((at - depth * out).clamp(-1, 1).reshape(-1, 3).to(device))
        thickness = density.reshape(STEPS, -1, 1).float().cpu() * step
        weight = torch.exp(thickness - thickness.cumsum(0)) * (1 - torch.exp(-thickness)) + 1e-6
        colours.append((weight * albedo.reshape(STEPS, -1, 3).float().cpu()).sum(0) / weight.sum(0))
    return torch.cat(colours).clamp(0, 1).numpy()


def vertex_coloured(
    mesh: trimesh.Trimesh, field: ColourField, step: float, device: torch.device
) -> trimesh.Trimesh:
    """The mesh with its field's colours (V, 4) uint8 at its vertices."""
    colours = field_colours(field, mesh.vertices, mesh.vertex_normals, step, device)
    opaque = np.concatenate([np.round(colours * 255), np.full((len(colours), 1), 255)], axis=1)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=opaque.astype(np.uint8))
    return mesh


def unwrap(mesh: trimesh.Trimesh, options: TextureOptions) -> trimesh.Trimesh:
    """The mesh cut into charts, with UV in [0, 1]^2 (v upwards) and the smooth normals it had, its texture still white."""
    import xatlas

    atlas, packing = xatlas.Atlas(), xatlas.PackOptions()
    packing.padding, packing.resolution, packing.bilinear = options.padding, options.size, True
    atlas.add_mesh(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.uint32))
    atlas.generate(pack_options=packing)
    kept, faces, uv = atlas[0]
    white = Image.new("RGB", (options.size,) * 2, "white")
    material = PBRMaterial(
        name="mesh",
        baseColorFactor=[255] * 4,
        baseColorTexture=white,
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
    return trimesh.Trimesh(
        np.asarray(mesh.vertices)[kept],
        faces.astype(np.int64),
        vertex_normals=np.asarray(mesh.vertex_normals)[kept],
        visual=TextureVisuals(uv=uv.astype(np.float64), material=material),
        process=False,
    )


def texels(mesh: trimesh.Trimesh, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which texels (K,) of a size x size image, row by row from its top, lie in a chart; their faces (K,) and barycentric (K, 3)."""
    flat = np.concatenate([mesh.visual.uv * size, np.zeros((len(mesh.vertices), 1))], 1)
    lying = trimesh.Trimesh(flat, mesh.faces, process=False)
    rows, columns = np.divmod(np.arange(size * size), size)
    above = np.stack([columns + 0.5, size - rows - 0.5, np.ones(size * size)], 1).astype(np.float32)
    down = np.broadcast_to(np.array([0, 0, -1], np.float32), above.shape)
    face, _, _ = RayCaster(lying).cast(torch.from_numpy(above), torch.from_numpy(down.copy()))
    inside = np.flatnonzero(face >= 0)
    at = np.concatenate([above[inside, :2], np.zeros((len(inside), 1))], 1)
    return inside, face[inside], points_to_barycentric(lying.triangles[face[inside]], at).clip(0, 1)


def bake(
    mesh: trimesh.Trimesh, field: ColourField, step: float, options: TextureOptions, device: torch.device
) -> trimesh.Trimesh:
    """The mesh unwrapped, its texture filled with its field's colours; texels between charts take the nearest chart's."""
    from scipy.ndimage import distance_transform_edt

    made, size = unwrap(mesh, options), options.size
    where, face, share = texels(made, size)
    points, normals = (
        np.einsum("nc,ncd->nd", share, values[made.faces[face]])
        for values in (made.vertices, made.vertex_normals)
    )
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-9)
    colours, bare = np.zeros((size * size, 3)), np.ones(size * size, bool)
    colours[where], bare[where] = field_colours(field, points, normals, step, device), False
    nearest = distance_transform_edt(bare.reshape(size, size), return_distances=False, return_indices=True)
    filled = colours.reshape(size, size, 3)[tuple(nearest)]
    made.visual.material.baseColorTexture = Image.fromarray(np.round(filled * 255).astype(np.uint8))
    return made


def colours_at(mesh: trimesh.Trimesh, face: np.ndarray, share: np.ndarray) -> np.ndarray:
    """sRGB colours (N, 3) in [0, 1] at barycentric (N, 3) of faces (N,): of the texture, bilinearly, or between vertex colours."""
    corners = mesh.faces[face]
    if not isinstance(mesh.visual, TextureVisuals):
        colours = np.asarray(mesh.visual.vertex_colors, np.float32)[:, :3] / 255
        return np.einsum("nc,ncd->nd", share, colours[corners]).clip(0, 1)
    pixels = torch.from_numpy(np.array(mesh.visual.material.baseColorTexture, np.float32) / 255).permute(
        2, 0, 1
    )[None]
    uv = torch.from_numpy(np.einsum("nc,ncd->nd", share, mesh.visual.uv[corners])).float()
    at = torch.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], 1)[None, None]
    return torch.nn.functional.grid_sample(pixels, at, padding_mode="border", align_corners=False)[
        0, :, 0
    ].T.numpy()
