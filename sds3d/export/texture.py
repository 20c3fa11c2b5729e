"""Mesh colours from a scene: at vertices, or in a texture over a UV atlas (xatlas)."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import trimesh
from PIL import Image
from torch import Tensor
from torch.nn import functional
from trimesh.triangles import points_to_barycentric
from trimesh.visual import TextureVisuals
from trimesh.visual.material import PBRMaterial

from distill.runtime.errors import UserError
from sds3d.world.raycast import RayCaster

# Surface points (N, 3) and outward unit normals (N, 3) to sRGB colours (N, 3) in [0, 1], all on the CPU.
SurfaceColours = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class TextureOptions:
    """The texture of an exported mesh. Raises `UserError` for a size out of range."""

    size: int = 512  # pixels a side; 0 for vertex colours only
    padding: int = 2  # pixels between charts

    def __post_init__(self) -> None:
        if (self.size and not 16 <= self.size <= 8192) or self.padding < 0:
            raise UserError(
                f"a texture of {self.size} pixels, padding {self.padding}: "
                "give 16 to 8192 pixels a side (0: no texture) and a padding of 0 or more"
            )


def _colours_of(colours: SurfaceColours, points: np.ndarray, normals: np.ndarray) -> np.ndarray:
    return colours(*(torch.from_numpy(np.array(value, np.float32)) for value in (points, normals))).numpy()


def vertex_coloured(mesh: trimesh.Trimesh, colours: SurfaceColours) -> trimesh.Trimesh:
    """The same mesh, with colours (V, 4) uint8 at its vertices."""
    rgb = np.round(_colours_of(colours, mesh.vertices, mesh.vertex_normals) * 255)
    rgba = np.concatenate([rgb, np.full((len(rgb), 1), 255)], axis=1)
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=rgba.astype(np.uint8))
    return mesh


def unwrap(mesh: trimesh.Trimesh, options: TextureOptions) -> trimesh.Trimesh:
    """The mesh cut into charts, with UV in [0, 1]^2 (v upwards), its smooth normals and a white texture."""
    import xatlas

    atlas, packing = xatlas.Atlas(), xatlas.PackOptions()
    packing.padding, packing.resolution, packing.bilinear = options.padding, options.size, True
    atlas.add_mesh(np.asarray(mesh.vertices, np.float32), np.asarray(mesh.faces, np.uint32))
    atlas.generate(pack_options=packing)
    vertex_indices, faces, uv = atlas[0]
    material = PBRMaterial(
        name="mesh",
        baseColorFactor=[255] * 4,
        baseColorTexture=Image.new("RGB", (options.size,) * 2, "white"),
        metallicFactor=0.0,
        roughnessFactor=1.0,
    )
    return trimesh.Trimesh(
        np.asarray(mesh.vertices)[vertex_indices],
        faces.astype(np.int64),
        vertex_normals=np.asarray(mesh.vertex_normals)[vertex_indices],
        visual=TextureVisuals(uv=uv.astype(np.float64), material=material),
        process=False,
    )


def texels(mesh: trimesh.Trimesh, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The K texels of a size x size texture that lie in a chart.

    Returns their indices (K,), row by row from the top, their faces (K,) and barycentric coordinates (K, 3).
    """
    flat_vertices = np.concatenate([mesh.visual.uv * size, np.zeros((len(mesh.vertices), 1))], 1)
    flat_mesh = trimesh.Trimesh(flat_vertices, mesh.faces, process=False)
    rows, columns = np.divmod(np.arange(size * size), size)
    origins = np.stack([columns + 0.5, size - rows - 0.5, np.ones(size * size)], 1).astype(np.float32)
    directions = np.broadcast_to(np.array([0, 0, -1], np.float32), origins.shape)
    face, _, _ = RayCaster(flat_mesh).cast(torch.from_numpy(origins), torch.from_numpy(directions.copy()))

    indices = np.flatnonzero(face >= 0)
    centres = np.concatenate([origins[indices, :2], np.zeros((len(indices), 1))], 1)
    barycentric = points_to_barycentric(flat_mesh.triangles[face[indices]], centres)
    return indices, face[indices], barycentric.clip(0, 1)


def bake(mesh: trimesh.Trimesh, colours: SurfaceColours, options: TextureOptions) -> trimesh.Trimesh:
    """The mesh unwrapped and textured; texels between charts take the colour of the nearest in a chart."""
    from scipy.ndimage import distance_transform_edt

    textured, size = unwrap(mesh, options), options.size
    indices, face, barycentric = texels(textured, size)
    points, normals = (
        np.einsum("nc,ncd->nd", barycentric, values[textured.faces[face]])
        for values in (textured.vertices, textured.vertex_normals)
    )
    normals /= np.linalg.norm(normals, axis=1, keepdims=True).clip(1e-9)

    image, empty = np.zeros((size * size, 3)), np.ones(size * size, bool)
    image[indices], empty[indices] = _colours_of(colours, points, normals), False
    nearest = distance_transform_edt(empty.reshape(size, size), return_distances=False, return_indices=True)
    image = image.reshape(size, size, 3)[tuple(nearest)]
    textured.visual.material.baseColorTexture = Image.fromarray(np.round(image * 255).astype(np.uint8))
    return textured


def colours_at(mesh: trimesh.Trimesh, face: np.ndarray, barycentric: np.ndarray) -> np.ndarray:
    """sRGB colours (N, 3) in [0, 1] at barycentric coordinates (N, 3) of faces (N,).

    Interpolated bilinearly in the texture, or between vertex colours.
    """
    corners = mesh.faces[face]
    if not isinstance(mesh.visual, TextureVisuals):
        colours = np.asarray(mesh.visual.vertex_colors, np.float32)[:, :3] / 255
        return np.einsum("nc,ncd->nd", barycentric, colours[corners]).clip(0, 1)
    texture = torch.from_numpy(np.array(mesh.visual.material.baseColorTexture, np.float32) / 255)
    uv = torch.from_numpy(np.einsum("nc,ncd->nd", barycentric, mesh.visual.uv[corners])).float()
    grid = torch.stack([2 * uv[:, 0] - 1, 1 - 2 * uv[:, 1]], 1)[None, None]
    image = texture.permute(2, 0, 1)[None]
    samples = functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
    return samples[0, :, 0].T.numpy()
