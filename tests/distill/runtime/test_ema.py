"""EMA against its definition, one float at a time."""

import pytest
import torch
from torch import nn

from distill.runtime.ema import EMA
from distill.runtime.errors import UserError


def test_against_the_definition() -> None:
    torch.manual_seed(0)
    module = nn.Linear(3, 2).double()
    average = EMA(module, 0.5)
    expected = [value.detach().clone() for value in module.parameters()]
    for n in range(20):
        decay = min(0.5, (1 + n) / (10 + n))  # the ramp reaches 0.5 at n = 8
        for index, value in enumerate(module.parameters()):
            value.data.add_(torch.randn_like(value))
            expected[index] = decay * expected[index] + (1 - decay) * value.detach()
        average.update()
    target = nn.Linear(3, 2).double()
    average.copy_to(target)
    for value, wanted in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-12, atol=1e-12)


def test_half_precision_is_averaged_in_single_and_buffers_are_copied() -> None:
    module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    module[0].to(torch.bfloat16)
    average = EMA(module, 1.0)
    average.updates = 10**6
    average.decay = 0.9999
    start = module[0].weight.detach().float().clone()
    module[0].weight.data.fill_(1.0)
    module[1].running_mean.fill_(5.0)
    for _ in range(10):
        average.update()
    held = average.state_dict()["average"]["0.weight"]
    torch.testing.assert_close(held, 1 + (start - 1) * 0.9999**10)
    target = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average.copy_to(target)
    assert torch.all(target[1].running_mean == 5.0)


def test_state_goes_on_and_misfits_are_refused() -> None:
    module = nn.Linear(2, 2)
    first, second = EMA(module, 0.9), EMA(module, 0.9)
    module.weight.data.add_(1.0)
    first.update()
    second.load_state_dict(first.state_dict())
    module.weight.data.add_(1.0)
    first.update()
    second.update()
    assert torch.equal(first.state_dict()["average"]["weight"], second.state_dict()["average"]["weight"])
    with pytest.raises(UserError, match="weight of another shape"):
        EMA(nn.Linear(3, 2)).load_state_dict(first.state_dict())
    with pytest.raises(UserError, match="bias on one side only"):
        first.copy_to(nn.Linear(2, 2, bias=False))
    with pytest.raises(UserError, match="decay is 1.5"):
        EMA(module, 1.5)
