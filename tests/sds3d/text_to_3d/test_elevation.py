"""The elevation of a picture: by the shipped judge, by a teacher whose images are known for all cameras."""

import numpy as np
import pytest
import torch
from scene_fixtures import OneImageTeacher
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.views import POSE, REFERENCE
from distill.runtime.errors import UserError
from sds3d.evaluation.subjects import Subject
from sds3d.text_to_3d.alignment import picture_camera
from sds3d.text_to_3d.elevation import ELEVATIONS, NFE, estimate_elevation, parabola_minimum, read_elevation
from sds3d.text_to_3d.picture import CutOut
from sds3d.world.assemblies import UNSEEN
from sds3d.world.raycast import RayCaster, render


@pytest.mark.parametrize("elevation", [12.0, 35.0])
def test_the_judge_reads_elevations_of_shapes_that_it_has_not_seen(elevation: float) -> None:
    errors = []
    for seed in UNSEEN[:8]:
        subject = Subject(f"picture of assembly {seed}")
        shape, albedo = subject.truth
        view = render(RayCaster(shape.mesh), albedo, picture_camera(80.0 * seed, elevation, 128)).rgba
        read = read_elevation("elevation64", CutOut(view[..., :3], view[..., 3], "x"))
        errors.append(abs(read - elevation))
    assert np.median(errors) < 8


def test_a_judge_of_other_columns_is_refused() -> None:
    cut_out = CutOut(np.ones((40, 40, 3)), np.ones((40, 40)), "x")
    with pytest.raises(UserError, match="the judge judge64 does not read the direction elevation"):
        read_elevation("judge64", cut_out)


def views(poses: Tensor) -> Tensor:
    """What cameras at poses (B, 5) see (B, 3, 16, 16): smooth in the angles, another at every azimuth."""
    waves = torch.linspace(0, 3, 16)
    rows = torch.sin(4 * poses[:, 1, None] + waves)[:, None, :, None]
    columns = torch.cos(poses[:, 0, None] + waves)[:, None, None]
    return (0.5 + 0.2 * (rows + columns)).expand(-1, 3, -1, -1)


class KnownViews(OneImageTeacher):
    """A teacher whose x0 is normal around what the camera sees."""

    conditioned_on_cameras = True

    def __init__(self) -> None:
        super().__init__(torch.zeros(3, 16, 16), std=0.1)

    def mean(self, conditioning: Conditioning) -> Tensor:
        assert conditioning.views == 1 and REFERENCE not in conditioning.extras
        return views(conditioning.extras[POSE])


@pytest.mark.parametrize("elevation", [8.0, 22.0, 40.0])
def test_the_elevation_is_found_whatever_the_azimuth(elevation: float) -> None:
    teacher = KnownViews()
    for azimuth in (0.0, 2.0):
        pose = torch.tensor([[azimuth, torch.pi * elevation / 180, 3.0, 0.0, 0.0]])
        assert estimate_elevation(teacher, views(pose)) == pytest.approx(elevation, abs=3)
    assert teacher.nfe == 2 * NFE and set(teacher.prompts) == {""}


def test_parabola_by_hand() -> None:
    grid = torch.tensor(ELEVATIONS)
    assert parabola_minimum((grid - 27.0) ** 2) == pytest.approx(27.0)
    assert parabola_minimum(grid) == ELEVATIONS[0] and parabola_minimum(-grid) == ELEVATIONS[-1]
    assert parabola_minimum(torch.zeros(len(ELEVATIONS))) == ELEVATIONS[0]
