"""The picture of a mixture's scores."""

from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import script
from PIL import Image

from distill.apps.score_field import ScoreFieldOptions, field_at, plane
from distill.core.noise import NoiseSchedule
from distill.runtime.errors import UserError
from distill.teacher.mixture import MixtureTeacher, ring


def test_scores_are_gradients_of_the_log_density(schedule: NoiseSchedule) -> None:
    teacher, points = MixtureTeacher(ring(), schedule), plane(1.5, 7)
    for label in ("", "c1"):
        _, score = field_at(teacher, points, 0.3, label)
        for axis in range(2):
            step = torch.zeros_like(points)
            step[:, axis] = 1e-4
            above, below = (field_at(teacher, points + sign * step, 0.3, label)[0] for sign in (1, -1))
            torch.testing.assert_close((above - below) / 2e-4, score[:, axis], atol=1e-3, rtol=1e-3)


def test_the_script_draws_a_panel_for_each_level(tmp_path: Path) -> None:
    path = tmp_path / "scores.png"
    script("draw_scores", f"output={path}", "scores.sigmas=[0.1, 0.6, 0.9]", "scores.arrows=5")
    image = np.asarray(Image.open(path))
    assert image.shape[1] > 2.5 * image.shape[0] and image.std() > 20
    assert "sigmas is [1.5]: expected numbers between 0 and 1" in script(
        "draw_scores", "scores.sigmas=[1.5]", code=2
    )


def test_options_are_checked() -> None:
    with pytest.raises(UserError, match="needs a mode, 2 arrows a side"):
        ScoreFieldOptions(arrows=1)
