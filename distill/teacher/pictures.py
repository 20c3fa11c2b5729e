"""A picture of an object as the condition of a multi-view teacher, and its absence.

Zero-1-to-3 (Liu et al. 2023, arXiv:2303.11328, section 3.2) conditions on the picture and on CLIP's embedding
of it, drops both for classifier-free guidance, and counts the azimuth of novel views from the picture's.
"""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from transformers import CLIPModel

from distill.core.conditioning import Conditioning
from distill.core.teacher import Teacher
from distill.core.views import IMAGE_EMBEDDING, POSE, REFERENCE, REFERENCE_POSE
from distill.runtime.errors import UserError
from distill.teacher.clip import image_features


@final
@dataclass(frozen=True)
class PictureCondition:
    """Pictures of G objects as a multi-view teacher reads them.

    latents (G, C, h, w); pose (G, 5), that of the camera, azimuth 0; embedding (G, D) by CLIP, or None where
    none is given.
    """

    latents: Tensor
    pose: Tensor
    embedding: Tensor | None

    def missing(self) -> "PictureCondition":
        """No picture: the condition of the unconditional branch of guidance, as in training."""
        embedding = None if self.embedding is None else torch.full_like(self.embedding, torch.nan)
        return PictureCondition(torch.full_like(self.latents, torch.nan), self.pose, embedding)

    def views(self, text: Conditioning, poses: Tensor) -> Conditioning:
        """The conditioning of views from poses (G, V, 5), azimuths counted from the picture's.

        `text` has one row or G V. Its groups are those of V views; one picture serves any number of groups.
        """
        groups, views = poses.shape[:2]
        extras = {REFERENCE: self.latents, REFERENCE_POSE: self.pose}
        if self.embedding is not None:
            extras[IMAGE_EMBEDDING] = self.embedding
        rows = {
            name: value.expand(groups, *value.shape[1:]).repeat_interleave(views, 0)
            for name, value in extras.items()
        }
        text = text.expand(groups * views)
        return text.with_extras(**{POSE: poses.flatten(0, 1), **rows}).grouped(views)


def check_takes_pictures(teacher: Teacher) -> None:
    """Raise `UserError` for a teacher without picture condition. A multi-view U-Net takes both."""
    if not teacher.conditioned_on_cameras:
        raise UserError(
            f"the teacher {teacher.name_or_path or type(teacher).__name__} takes no picture (it has no "
            "view_conditions folder): give teacher= one that was trained with views "
            "(scripts/train_teacher.py with teacher.unet.views)"
        )


@torch.no_grad()
def encode_pictures(
    teacher: Teacher, clip: CLIPModel | None, pictures: Tensor, pose: Tensor
) -> PictureCondition:
    """The condition of pictures (G, 3, H, W) in [0, 1] at the teacher's resolution, from poses `pose` (G, 5).

    `clip` is the teacher's own; None leaves its embedding out. Raises `UserError` for a teacher that takes no
    pictures.
    """
    check_takes_pictures(teacher)
    pictures = pictures.to(teacher.device)
    embedding = None if clip is None else image_features(clip, pictures.to(clip.device)).to(teacher.device)
    return PictureCondition(teacher.encode_images(pictures), pose.to(teacher.device), embedding)


def picture_conditioning(
    teacher: Teacher, clip: CLIPModel | None, pictures: Tensor, pose: Tensor, poses: Tensor, prompt: str = ""
) -> tuple[Conditioning, Conditioning]:
    """Conditional and unconditional conditioning of novel views, for `Guided` or an objective.

    pictures (G, 3, H, W) in [0, 1], their cameras pose (G, 5), the views' poses (G, V, 5); azimuths counted
    from each picture's. The unconditional one has the same poses, no picture and the empty prompt.
    """
    condition = encode_pictures(teacher, clip, pictures, pose)
    poses = poses.to(teacher.device)
    cond = condition.views(teacher.encode_text([prompt]), poses)
    return cond, condition.missing().views(teacher.encode_text([""]), poses)
