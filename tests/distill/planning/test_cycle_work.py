"""Counted work of a cycle against what its method states, in forward passes of the U-Net."""

from pathlib import Path

import pytest
import yaml
from command_line import ROOT

from distill.one_step.methods.base import MethodOptions
from distill.one_step.methods.distribution_matching import DistributionMatchingOptions
from distill.one_step.recipe import OneStepRecipe
from distill.one_step.trainer import OneStepOptions
from distill.planning.cycle_work import CycleWork, cycle_work
from distill.runtime.config import build
from distill.runtime.run import RunOptions


def work_of(teacher: Path | str, folder: Path, gan: bool, updates: int) -> list[CycleWork]:
    values = yaml.safe_load((ROOT / "configs" / "method" / "dmd2.yaml").read_text())
    values["objective"]["critic"]["updates"] = updates
    options = build(MethodOptions, values | {"gan": {"start": 0.5} if gan else None}, "dmd2")
    assert isinstance(options, DistributionMatchingOptions)
    run = RunOptions(str(folder), 4, trackers=())
    return cycle_work(
        OneStepRecipe(teacher=str(teacher), run=run, method=options, distill=OneStepOptions(batch=2))
    )


def test_a_cycle_does_no_more_work_than_stated(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """DMD with five critic updates is 21 F: less the gradients to inputs, which nobody needs."""
    (work,) = work_of(tiny_teacher_folder, tmp_path, gan=False, updates=5)
    assert work.stated == 21 and 0.9 < work.ratio <= 1.05
    first, last = work_of(tiny_teacher_folder, tmp_path, gan=True, updates=2)
    assert (first.step, first.stated, last.step) == (0, 12, 3) and last.stated == pytest.approx(15.2)
    assert 0.9 < first.ratio <= 1.05 and 0.8 < last.ratio <= 1.05
    assert last.counted > first.counted + 2


@pytest.mark.slow
def test_nor_at_stable_diffusions_size(tmp_path: Path) -> None:
    (work,) = work_of("stable-diffusion-v1-5/stable-diffusion-v1-5", tmp_path, gan=False, updates=5)
    assert work.stated == 21 and 0.98 < work.ratio <= 1.05
