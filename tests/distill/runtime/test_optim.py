"""Learning-rate schedules and the optimisation step."""

import math

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import OneCycleLR

from distill.runtime.optim import (
    cosine_annealing,
    cosine_decay,
    one_cycle,
    optimizer_step,
    scale_learning_rates,
)


def _optimizer(*rates: float) -> torch.optim.AdamW:
    groups = [{"params": [nn.Parameter(torch.ones(2))], "lr": rate} for rate in rates]
    return torch.optim.AdamW(groups)


def _rates(
    scheduler: torch.optim.lr_scheduler.LRScheduler, optimizer: torch.optim.Optimizer, steps: int
) -> list[float]:
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_cosine_decay_falls_from_one_to_the_final_factor() -> None:
    assert cosine_decay(0, 0.1, 50) == 1.0
    assert cosine_decay(50, 0.1, 50) == pytest.approx(0.1)
    assert cosine_decay(0.25, 0.1) == 0.1 + 0.9 * (1 + math.cos(math.pi * 0.25)) / 2


@pytest.mark.parametrize(("steps", "warmup"), [(20, 0.05), (10, 0.1), (5, 0.2)])
def test_one_cycle_of_a_warm_up_of_one_step_starts_at_the_peak(steps: int, warmup: float) -> None:
    optimizer = _optimizer(0.1)
    rates = _rates(one_cycle(optimizer, steps, warmup), optimizer, steps)
    assert rates[0] == pytest.approx(0.1)
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 1e-6


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0.3), (9, 0.1), (21, 0.05), (100, 0.2)])
def test_one_cycle_is_torchs_with_the_optimizers_rate_as_peak(steps: int, warmup: float) -> None:
    ours, theirs = _optimizer(0.1), _optimizer(0.1)
    expected = _rates(OneCycleLR(theirs, 0.1, total_steps=steps, pct_start=warmup), theirs, steps)
    assert _rates(one_cycle(ours, steps, warmup), ours, steps) == expected


def test_cosine_annealing_ends_at_the_final_fraction() -> None:
    optimizer = _optimizer(0.1)
    scheduler = cosine_annealing(optimizer, 8, 0.25)
    assert _rates(scheduler, optimizer, 8)[0] == 0.1
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.025)


def test_learning_rates_of_groups_scale_by_one_factor() -> None:
    optimizer = _optimizer(0.1, 0.2)
    scale_learning_rates(optimizer.param_groups, [0.1, 0.2], 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.1]


@pytest.mark.parametrize("max_norm", [None, 0.5])
def test_optimizer_step_equals_the_written_out_update(max_norm: float | None) -> None:
    torch.manual_seed(0)
    module, x = nn.Linear(3, 2), torch.randn(4, 3)
    twin = nn.Linear(3, 2)
    twin.load_state_dict(module.state_dict())
    ours = torch.optim.SGD(module.parameters(), lr=0.1)
    theirs = torch.optim.SGD(twin.parameters(), lr=0.1)
    for _ in range(2):
        optimizer_step(ours, module(x).square().sum(), max_norm)
        theirs.zero_grad()
        twin(x).square().sum().backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(twin.parameters(), max_norm)
        theirs.step()
    for parameter, expected in zip(module.parameters(), twin.parameters(), strict=True):
        assert torch.equal(parameter, expected)
