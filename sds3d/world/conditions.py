"""Condition images of geometry for adapters: of the world's renders, and of any mesh from any camera."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from distill.control.conditions import condition_images
from distill.data.folders import CaptionedImages
from distill.runtime.errors import UserError
from sds3d.scene.cameras import Cameras, orbit
from sds3d.world.raycast import RayCaster, render
from sds3d.world.segments import segmentation_images

CONDITIONS = ("silhouette", "depth", "normals", "segmentation")
NEAR, FAR = 1.7, 4.3  # range of distances of the unit ball from the world's cameras
FAR_GREY = 55  # level of an image's farthest point
MIN_RANGE = 0.5  # smaller ranges of distances are not stretched to all levels


def depth_images(depth: Tensor) -> Tensor:
    """(N, 1, H, W) uint8 of distances (N, H, W): 255 at an image's nearest point, 55 at its farthest.

    0 for a miss. Relative, as the depth maps that ControlNets are trained on: absolute ones have no contrast.
    """
    depth = depth.float()
    hit = depth > 0
    near = torch.where(hit, depth, torch.inf).amin((1, 2), keepdim=True)
    span = (depth.amax((1, 2), keepdim=True) - near).clamp_min(MIN_RANGE)
    levels = torch.where(hit, 255 - (255 - FAR_GREY) * (depth - near) / span, 0.0)
    return levels.round().to(torch.uint8)[:, None]


def normal_images(normals: Tensor, rotation: Tensor) -> Tensor:
    """(N, 3, H, W) uint8 of unit normals (N, H, W, 3) in world axes and camera rotations (N, 3, 3).

    Red, green and blue are right, up and towards the camera; 0 where nothing is hit.
    """
    camera_normals = torch.einsum("nhwi,nij->njhw", normals.float(), rotation)
    hit = (normals != 0).any(-1)[:, None]
    return torch.where(hit, ((camera_normals + 1) * 127.5).round().clamp(1, 255), 0.0).to(torch.uint8)


def nearness(depth: Tensor) -> Tensor:
    """(N, 1, H, W) in [0, 1] of distances (N, H, W): 1 at `NEAR`, 0 at `FAR` and for a miss."""
    return torch.where(depth > 0, ((FAR - depth) / (FAR - NEAR)).clamp(0, 1), 0.0)[:, None]


def world_geometry(
    folder: Path | str, split: str, name: Literal["depth", "normal", "part"], count: int
) -> Tensor:
    """Distances (N, H, W) float16, unit normals (N, H, W, 3) times 127 int8, or parts (N, H, W) uint8.

    Of a split's first N images. Raises `UserError` where the world was written without `world.geometry=true`.
    """
    from safetensors.torch import load_file

    files = map(load_file, sorted((Path(folder) / "geometry").glob(f"{split}-*.safetensors")))
    # earlier versions wrote no parts: what follows such a block is of later images
    blocks = [values[name] for values in itertools.takewhile(lambda values: name in values, files)]
    values = torch.cat(blocks)[:count] if blocks else torch.zeros(0)
    if len(values) < count:
        command = f"scripts/make_shapes.py output={folder} world.geometry=true"
        raise UserError(f"{folder} has the {name} of {len(values)} of its {count} {split} images: {command}")
    return values


def geometry_images(folder: Path | str, split: str, condition: str, rows: Sequence[dict[str, Any]]) -> Tensor:
    """Condition images (N, 1 or 3, H, W) of the rows of a split, from the geometry files of the world."""
    if condition == "depth":
        return depth_images(world_geometry(folder, split, "depth", len(rows)))
    if condition == "segmentation":
        return segmentation_images(world_geometry(folder, split, "part", len(rows)))
    normals = world_geometry(folder, split, "normal", len(rows))
    angles = torch.tensor([[row["azimuth"], row["elevation"]] for row in rows])
    ones = torch.ones(len(rows))
    rotation = orbit(angles[:, 0], angles[:, 1], 3 * ones, 35 * ones, 64).rotation
    chunks = zip(normals.split(1000), rotation.split(1000), strict=True)
    return torch.cat([normal_images(normal.float() / 127, matrix) for normal, matrix in chunks])


def split_condition_images(folder: Path | str, split: str, condition: str, data: CaptionedImages) -> Tensor:
    """Condition images of a split: from the world's geometry, or by `distill.control.conditions`."""
    if condition in CONDITIONS[1:]:
        return geometry_images(folder, split, condition, data.rows)
    return condition_images(condition, Path(folder) / split, data)


def mesh_condition_images(caster: RayCaster, condition: str, cameras: Cameras) -> Tensor:
    """Condition images (B, 1 or 3, H, W) uint8 of a mesh in scene axes, rendered as those of the world."""
    blank = np.zeros((len(caster.faces), 3))
    views = [render(caster, blank, camera) for camera in cameras.split(1)]
    if condition == "silhouette":
        alpha = torch.from_numpy(np.stack([view.rgba[..., 3] for view in views]))
        return (alpha * 255 + 0.5).to(torch.uint8)[:, None]
    if condition == "depth":
        return depth_images(torch.from_numpy(np.stack([view.depth for view in views])))
    if condition == "segmentation":
        return segmentation_images(torch.from_numpy(np.stack([caster.parts[view.face] for view in views])))
    return normal_images(torch.from_numpy(np.stack([view.normal for view in views])), cameras.rotation)
