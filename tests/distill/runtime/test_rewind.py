"""A run that is rewound: where it goes on, what its files say, and that a resume remembers it."""

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions


def drift(
    directory: Path, wrong_at: tuple[int, ...], steps: int = 10, keep_start: bool = True
) -> tuple[Run, list[int], float]:
    """A weight that grows by 1 a step; at the given indices, the first time, the step is bad and the run is rewound."""
    run = Run(
        RunOptions(str(directory), steps, trackers=(), checkpoint_every=3, log_every=1), {"x": 1}, "drift"
    )
    weight = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(weight.weight)
    run.track(weight=weight)
    walked, pending = [], list(wrong_at)
    for step in run.steps(keep_start=keep_start):
        walked.append(step)
        with torch.no_grad():
            weight.weight += 1
        if step in pending:
            pending.remove(step)
            run.rewind(f"bad step {step}")
            continue
        run.log(weight=weight.weight.item())
    run.finish({})
    return run, walked, weight.weight.item()


def test_a_rewound_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    run, walked, weight = drift(tmp_path, (1, 4))
    assert walked == [0, 1, 0, 1, 2, 3, 4, 3, 4, 5, 6, 7, 8, 9] and weight == 10 and run.rollbacks == 2
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["weight"]) for line in lines] == [(i, i) for i in range(1, 11)]
    result = json.loads((tmp_path / "result.json").read_text())
    told = [{"step": 2, "to": 0, "why": "bad step 1"}, {"step": 5, "to": 3, "why": "bad step 4"}]
    assert result["run"]["rewound"] == told and result["run"]["steps"] == 10


def test_a_resume_remembers_it(tmp_path: Path) -> None:
    drift(tmp_path, (4,), steps=6)
    again, walked, weight = drift(tmp_path, (), steps=8)
    assert walked == [6, 7] and weight == 8 and again.rollbacks == 1


def test_without_a_checkpoint_it_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no checkpoint to go back to"):
        drift(tmp_path, (1,), keep_start=False)
