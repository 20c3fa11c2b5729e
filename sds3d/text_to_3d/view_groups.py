"""Cameras in groups, whose views a multi-view teacher denoises together (MVDream, arXiv:2308.16512)."""

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from sds3d.scene.cameras import CameraOptions, Cameras, sample_cameras


def rotate_azimuth(cameras: Cameras, degrees: Tensor) -> Cameras:
    """Cameras (B) rotated about the z axis by degrees (B,), or all by the same (): only azimuths change."""
    angle = torch.deg2rad(degrees)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros_like(angle)
    rows = [cos, -sin, zero, sin, cos, zero, zero, zero, zero + 1]
    rotation = torch.stack(rows, -1).unflatten(-1, (3, 3))
    return replace(
        cameras,
        azimuth=cameras.azimuth + degrees,
        position=(rotation @ cameras.position[:, :, None])[:, :, 0],
        rotation=rotation @ cameras.rotation,
    )


def spread_groups(cameras: Cameras, views_per_group: int) -> Cameras:
    """Cameras in order of azimuth, reordered so that each group covers the whole range."""
    return cameras.select(torch.arange(len(cameras)).view(views_per_group, -1).T.flatten())


def sample_view_groups(
    options: CameraOptions,
    count: int,
    views_per_group: int,
    layout: Literal["ring", "random"],
    resolution: int,
    generator: torch.Generator,
) -> Cameras:
    """`count` random cameras on the CPU, every `views_per_group` consecutive ones a group.

    ring: a group's azimuths are equal steps of the whole range from a random start; all else is shared, as in
    MVDream's data. random: each camera is drawn for itself, as by `sample_cameras`.
    """
    if layout == "random" or views_per_group == 1:
        return spread_groups(sample_cameras(options, count, resolution, generator), views_per_group)
    low, high = options.azimuth
    step, groups = (high - low) / views_per_group, count // views_per_group
    first = sample_cameras(replace(options, azimuth=(low, low + step)), groups, resolution, generator)
    cameras = first.select(torch.arange(groups).repeat_interleave(views_per_group))
    return rotate_azimuth(cameras, step * torch.arange(views_per_group).repeat(groups))
