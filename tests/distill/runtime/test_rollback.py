"""Rollbacks: the loop continues from the newest checkpoint; files and resumed sessions record them."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions


def train(
    directory: Path, bad_steps: tuple[int, ...], steps: int = 10, keep_start: bool = True
) -> tuple[Run, list[int], float]:
    """A weight that grows by 1 per step; each of the bad steps is rolled back once.

    Returns the run, the indices of the steps in order and the weight.
    """
    options = RunOptions(str(directory), steps, trackers=(), checkpoint_every=3, log_every=1)
    run = Run(options, {"x": 1}, "toy")
    weight = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(weight.weight)
    run.track(weight=weight)
    visited, pending = [], list(bad_steps)
    for step in run.steps(keep_start=keep_start):
        visited.append(step)
        with torch.no_grad():
            weight.weight += 1
        if step in pending:
            pending.remove(step)
            run.roll_back(f"bad step {step}")
            continue
        run.log(weight=weight.weight.item())
    run.finish({})
    return run, visited, weight.weight.item()


def test_rollback_continues_from_the_newest_checkpoint(tmp_path: Path) -> None:
    run, visited, weight = train(tmp_path, (1, 4))
    assert visited == [0, 1, 0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 9] and weight == 10 and run.rollbacks == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["weight"]) for line in lines] == [(i, i) for i in range(1, 11)]
    result = json.loads((tmp_path / "result.json").read_text())
    rollbacks = [{"step": 2, "to": 0, "reason": "bad step 1"}, {"step": 5, "to": 3, "reason": "bad step 4"}]
    assert result["run"]["rollbacks"] == rollbacks and result["run"]["steps"] == 10


def test_resume_restores_the_number_of_rollbacks(tmp_path: Path) -> None:
    train(tmp_path, (4,), steps=6)
    resumed, visited, weight = train(tmp_path, (), steps=8)
    assert visited == [6, 7] and weight == 8 and resumed.rollbacks == 1


def test_rollback_without_a_checkpoint_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to return to"):
        train(tmp_path, (1,), keep_start=False)
