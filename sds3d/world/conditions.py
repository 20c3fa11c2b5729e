"""Geometry as the pictures that adapters are conditioned on: of the world's renders, and of any mesh from any camera."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import trimesh
from torch import Tensor

from distill.control.conditions import of_images
from distill.data.folders import CaptionedImages
from distill.runtime.errors import UserError
from sds3d.scene.cameras import Cameras, orbit

CONDITIONS = ("silhouette", "depth", "normals")
NEAR, FAR = 1.7, 4.3  # distances from the camera between which the world's cameras see the unit ball
FARTHEST, LEAST_RANGE = (
    55,
    0.5,
)  # grey of an image's farthest point; a range of distances below this is not stretched


def depth_pictures(depth: Tensor) -> Tensor:
    """(N, 1, H, W) uint8 of distances (N, H, W): 255 at an image's nearest point, 55 at its farthest, 0 where nothing is hit.

    Relative, as the maps of depth estimators that ControlNets are trained on: in absolute ones an object is one grey.
    """
    depth = depth.float()
    hit = depth > 0
    near = torch.where(hit, depth, torch.inf).amin((1, 2), keepdim=True)
    span = (depth.amax((1, 2), keepdim=True) - near).clamp_min(LEAST_RANGE)
    return (
        torch.where(hit, 255 - (255 - FARTHEST) * (depth - near) / span, 0.0).round().to(torch.uint8)[:, None]
    )


def normal_pictures(normals: Tensor, rotation: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 of unit normals (N, H, W, 3) in world axes: right, up, towards the camera as colours; 0 where nothing is hit."""
    seen = torch.einsum("nhwi,nij->njhw", normals.float(), rotation)
    hit = (normals != 0).any(-1)[:, None]
    return torch.where(hit, ((seen + 1) * 127.5).round().clamp(1, 255), 0.0).to(torch.uint8)


def closeness(depth: Tensor) -> Tensor:
    """(N, 1, H, W) in [0, 1] of distances (N, H, W): 1 at `NEAR`, 0 at `FAR` and where nothing is hit. What the probe learns."""
    return torch.where(depth > 0, ((FAR - depth) / (FAR - NEAR)).clamp(0, 1), 0.0)[:, None]


def world_geometry(folder: Path | str, split: str, name: Literal["depth", "normal"], count: int) -> Tensor:
    """Distances (N, H, W) float16, or unit normals (N, H, W, 3) times 127 int8, of a split's first `count` images.

    Raises `UserError` where it was written without (`world.geometry=true`).
    """
    from safetensors.torch import load_file

    blocks = [
        load_file(path)[name] for path in sorted((Path(folder) / "geometry").glob(f"{split}-*.safetensors"))
    ]
    whole = torch.cat(blocks)[:count] if blocks else torch.zeros(0)
    if len(whole) < count:
        make = f"scripts/make_shapes.py output={folder} world.geometry=true"
        raise UserError(f"{folder} has the {name} of {len(whole)} of its {count} {split} images: {make}")
    return whole


def world_pictures(folder: Path | str, split: str, condition: str, rows: Sequence[dict[str, Any]]) -> Tensor:
    """The pictures (N, 1 or 3, H, W) of a world's split, from the geometry written beside it, in the order of its rows."""
    if condition == "depth":
        return depth_pictures(world_geometry(folder, split, "depth", len(rows)))
    normals = world_geometry(folder, split, "normal", len(rows))
    angles = torch.tensor([[row["azimuth"], row["elevation"]] for row in rows])
    ones = torch.ones(len(rows))
    rotation = orbit(angles[:, 0], angles[:, 1], 3 * ones, 35 * ones, 64).rotation
    return torch.cat(
        [
            normal_pictures(n.float() / 127, r)
            for n, r in zip(normals.split(1000), rotation.split(1000), strict=True)
        ]
    )


def split_pictures(folder: Path | str, split: str, condition: str, data: CaptionedImages) -> Tensor:
    """The pictures of a split by the condition's name: the world's geometry, or what `distill.control.conditions` makes of any images."""
    if condition in CONDITIONS[1:]:
        return world_pictures(folder, split, condition, data.rows)
    return of_images(condition, Path(folder) / split, data)


def mesh_pictures(mesh: trimesh.Trimesh, condition: str, cameras: Cameras) -> Tensor:
    """The pictures (B, 1 or 3, H, W) uint8 of a mesh, as the world's own are made."""
    from sds3d.world.raycast import RayCaster, render

    caster, blank = RayCaster(mesh), np.zeros((len(mesh.faces), 3))
    views = [render(caster, blank, _one(cameras, i)) for i in range(len(cameras))]
    if condition == "silhouette":
        cover = torch.from_numpy(np.stack([view.rgba[..., 3] for view in views]))
        return (cover * 255 + 0.5).to(torch.uint8)[:, None]
    if condition == "depth":
        return depth_pictures(torch.from_numpy(np.stack([view.depth for view in views])))
    return normal_pictures(torch.from_numpy(np.stack([view.normal for view in views])), cameras.rotation)


def _one(cameras: Cameras, index: int) -> Cameras:
    part = slice(index, index + 1)
    tensors = (cameras.position, cameras.azimuth, cameras.elevation, cameras.rotation, cameras.fovy)
    return Cameras(*(value[part] for value in tensors), cameras.resolution)
