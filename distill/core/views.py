"""Cameras and reference pictures as conditions: the extras of a `Conditioning` that a multi-view teacher
reads.

A pose (5,) is where the camera sees the object: azimuth and elevation in radians, the distance of the
object's origin along the viewing axis in world units, and the origin's offset on the image to the right and
up, in half-widths of the image. A row of NaN gives none: that sample is conditioned on its text alone.
"""

import torch
from torch import Tensor

POSE = "pose"  # (B, 5)
REFERENCE = (
    "reference"  # (B, C, h, w) clean latents of a picture of the object, equal within a group; NaN: none
)
REFERENCE_POSE = "reference_pose"  # (B, 5) its camera, likewise
IMAGE_EMBEDDING = "image_embedding"  # (B, D) CLIP's embedding of the picture; a row of NaN gives none
POSE_DIM = 5


def relative_poses(poses: Tensor, origin: Tensor) -> Tensor:
    """Poses (B, 5) with azimuths counted from `origin` (B,) in radians, in [-pi, pi)."""
    azimuth = torch.remainder(poses[:, 0] - origin + torch.pi, 2 * torch.pi) - torch.pi
    return torch.cat([azimuth[:, None], poses[:, 1:]], 1)


def is_given(values: Tensor) -> Tensor:
    """Which rows (B,) of (B, D) hold values rather than NaN."""
    return ~values.isnan().any(1)
