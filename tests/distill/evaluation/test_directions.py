"""Directions: a judge learns an angle, rows that do not count leave no trace, errors wrap around."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from distill.data.folders import CaptionedImages
from distill.evaluation.directions import angular_error, direction_accuracy, error_figures
from distill.evaluation.judge import (
    Judge,
    direction_loss,
    load_judge,
    read_directions,
    save_judge,
    train_judge,
)
from distill.evaluation.judge_columns import JudgeOptions, direction_table
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions

LABELS = {"kind": ("hand", "none")}
OPTIONS = JudgeOptions(("kind",), (("angle", "pointed"),), ("angle",), width=8, batch=32)


def hands(count: int, seed: int) -> CaptionedImages:
    """Clock hands at random angles, and discs, whose angle does not count."""
    generator = torch.Generator().manual_seed(seed)
    angles = 360 * torch.rand(count, generator=generator) - 180
    y, x = torch.meshgrid(torch.linspace(1, -1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    images, rows = [], []
    for index, angle in enumerate(angles.tolist()):
        along = x * math.cos(math.radians(angle)) + y * math.sin(math.radians(angle))
        across = y * math.cos(math.radians(angle)) - x * math.sin(math.radians(angle))
        pointed = index % 4 > 0
        shape = (along > 0) & (along < 0.8) & (across.abs() < 0.2) if pointed else x**2 + y**2 < 0.2
        colour = torch.tensor([0.9, 0.2, 0.1])[:, None, None] * shape
        images.append((torch.cat([colour, shape[None].float()]) * 255).byte())
        rows.append({"text": "", "kind": "hand" if pointed else "none", "angle": angle, "pointed": pointed})
    return CaptionedImages(torch.stack(images), rows)


def test_an_angle_is_learnt_and_survives_saving(tmp_path: Path) -> None:
    run = Run(RunOptions(str(tmp_path / "run"), 150, trackers=(), device="cpu"), {}, "judge")
    judge = train_judge(run, hands(600, 0), OPTIONS)
    data = hands(100, 1)
    images = data.composite(slice(None))
    figures = direction_accuracy(judge, images, data.rows)
    assert set(figures) == {"angle_within_15", "angle_flips", "angle_median_error"}
    assert figures["angle_within_15"] > 0.8 and figures["angle_flips"] < 0.02
    save_judge(judge, tmp_path / "judge", {})
    loaded = load_judge(tmp_path / "judge")
    assert loaded.options == OPTIONS
    assert torch.equal(read_directions(loaded, images)["angle"], read_directions(judge, images)["angle"])
    assert direction_accuracy(judge, images[:1], [{**data.rows[0], "pointed": False}]) == {}


def test_the_weight_of_directions_scales_their_loss(tmp_path: Path) -> None:
    losses = []
    for weight in (1.0, 2.0, 4.0):
        torch.manual_seed(0)
        run = Run(RunOptions(str(tmp_path / str(weight)), 1, trackers=(), device="cpu"), {}, "judge")
        train_judge(run, hands(64, 0), replace(OPTIONS, direction_weight=weight))
        losses.append(json.loads((run.directory / "metrics.jsonl").read_text())["loss"])
    assert losses[1] > losses[0]
    assert losses[2] - losses[1] == pytest.approx(2 * (losses[1] - losses[0]), rel=1e-4)
    with pytest.raises(UserError, match="direction_weight is 0"):
        replace(OPTIONS, direction_weight=0.0)


def test_judges_without_directions_load_as_before(tmp_path: Path) -> None:
    """Also those that were saved when there were none."""
    judge = load_judge("judge64")
    assert judge.options.directions == () and read_directions(judge, torch.zeros(1, 3, 64, 64)) == {}
    assert direction_accuracy(judge, torch.zeros(1, 3, 64, 64), [{"azimuth": 1.0}]) == {}
    save_judge(Judge(LABELS, JudgeOptions(("kind",), width=8)), tmp_path, {})
    assert json.loads((tmp_path / "judge.json").read_text())["options"]["directions"] == []


def test_targets_are_unit_vectors_of_the_rows_that_count() -> None:
    def row(angle: Any, pointed: bool = True) -> dict[str, Any]:
        return {"angle": angle, "pointed": pointed}

    table = direction_table([row(0), row(90.0), row(-180), row(30, pointed=False), row(None)], OPTIONS)
    expected = torch.tensor([[1.0, 0], [0, 1], [-1, 0]])
    torch.testing.assert_close(table[:3, 0], expected, atol=1e-6, rtol=0)
    assert table[3:].isnan().all()
    with pytest.raises(UserError, match="row 0 has the angle 'north'; expected degrees"):
        direction_table([row("north")], OPTIONS)
    with pytest.raises(UserError, match="no row counts for the direction 'angle'"):
        direction_table([row(3, pointed=False)], OPTIONS)


def test_the_loss_is_the_cosine_of_rows_that_count() -> None:
    targets = torch.tensor([[[1.0, 0]], [[0, 1]], [[torch.nan, torch.nan]]])
    vectors = torch.tensor([[1.0, 0], [1, 0], [5, 5]], requires_grad=True)
    loss = direction_loss({"angle": vectors}, targets)
    assert loss.item() == pytest.approx((0 + 1) / 2)  # lengths of 1 add nothing
    loss.backward()
    assert vectors.grad is not None
    assert vectors.grad[2].abs().sum() == 0 and vectors.grad[1].abs().sum() > 0
    long = direction_loss({"angle": 3 * vectors}, targets)
    assert loss < long < loss + 1
    assert float(direction_loss({}, targets[:, :0])) == 0
    assert float(direction_loss({"angle": vectors}, targets * torch.nan)) == 0


def test_errors_wrap_around() -> None:
    def error(first: float, second: float) -> Tensor:
        return angular_error(torch.tensor([first]), torch.tensor([second]))

    assert error(179, -179) == 2 and error(-170, 190) == 0 and error(0, 180) == 180
    assert error(725, 0) == 5 and error(10, 350) == 20
    figures = error_figures(torch.tensor([0.0, 15, 16, 135, 180]))
    assert figures == {"within_15": 0.4, "flips": 0.4, "median_error": 16.0}
