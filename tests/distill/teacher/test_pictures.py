"""A picture as the condition of a multi-view teacher: extras of every row, and what stands for no picture."""

from pathlib import Path

import pytest
import torch

from distill.core.score import Guided
from distill.core.views import IMAGE_EMBEDDING, POSE, REFERENCE, REFERENCE_POSE
from distill.runtime.errors import UserError
from distill.teacher.clip import image_features
from distill.teacher.folder import load_clip
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from distill.teacher.pictures import encode_pictures, picture_conditioning

POSES = torch.rand(2, 3, 5, generator=torch.Generator().manual_seed(0))


def test_every_row_has_its_groups_picture(multi_view_teacher_folder: Path) -> None:
    teacher = load_latent_diffusion(str(multi_view_teacher_folder))
    clip = load_clip(multi_view_teacher_folder)
    pictures = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    pose = torch.rand(2, 5, generator=torch.Generator().manual_seed(2))
    cond, uncond = picture_conditioning(teacher, clip, pictures, pose, POSES, "a red cube")
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    assert cond.views == uncond.views == 3 and set(cond.extras) == set(uncond.extras)
    torch.testing.assert_close(cond.extras[REFERENCE], teacher.encode_images(pictures)[rows])
    torch.testing.assert_close(cond.extras[IMAGE_EMBEDDING], image_features(clip, pictures)[rows])
    for conditioning in (cond, uncond):
        torch.testing.assert_close(conditioning.extras[POSE], POSES.flatten(0, 1))
        torch.testing.assert_close(conditioning.extras[REFERENCE_POSE], pose[rows])
    assert uncond.extras[REFERENCE].isnan().all() and uncond.extras[IMAGE_EMBEDDING].isnan().all()
    assert not torch.equal(cond.embedding, uncond.embedding)

    x_t = torch.randn(6, *teacher.latent_shape)
    prediction = Guided(teacher, uncond, 3.0).predict(x_t, torch.full((6,), 500), cond)
    assert torch.isfinite(prediction.x0).all()


def test_one_picture_serves_all_groups(multi_view_teacher_folder: Path) -> None:
    teacher = load_latent_diffusion(str(multi_view_teacher_folder))
    condition = encode_pictures(teacher, None, torch.rand(1, 3, 64, 64), torch.zeros(1, 5))
    text = teacher.encode_text([""])
    cond = condition.views(text, POSES)
    assert len(cond) == 6 and IMAGE_EMBEDDING not in cond.extras
    assert torch.equal(cond.extras[REFERENCE], condition.latents.expand(6, -1, -1, -1))


def test_a_teacher_without_pictures_is_refused(tiny_teacher: LatentDiffusionTeacher) -> None:
    with pytest.raises(UserError, match="tiny takes no picture .* teacher.unet.views"):
        encode_pictures(tiny_teacher, None, torch.rand(1, 3, 64, 64), torch.zeros(1, 5))
