"""The elevation of a picture, by a teacher whose images are known for every camera."""

import pytest
import torch
from scene_fixtures import OneImageTeacher
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.views import POSE, REFERENCE
from sds3d.text_to_3d.elevation import ELEVATIONS, NFE, estimate_elevation, parabola_minimum


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
