"""EMA against its definition, computed parameter by parameter."""

import pytest
import torch
from torch import nn

from distill.runtime.ema import EMA
from distill.runtime.errors import UserError


def test_averages_equal_the_definition() -> None:
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
    for value, average_value in zip(target.parameters(), expected, strict=True):
        torch.testing.assert_close(value.detach(), average_value, rtol=1e-12, atol=1e-12)


def test_half_precision_is_averaged_in_single_and_buffers_are_copied() -> None:
    linear, norm = nn.Linear(2, 2, dtype=torch.bfloat16), nn.BatchNorm1d(2)
    module = nn.Sequential(linear, norm)
    average = EMA(module, 1.0)
    average.updates = 10**6
    average.decay = 0.9999
    assert norm.running_mean is not None
    start = linear.weight.detach().float().clone()
    linear.weight.data.fill_(1.0)
    norm.running_mean.fill_(5.0)
    for _ in range(10):
        average.update()
    weight = average.state_dict()["average"]["0.weight"]
    torch.testing.assert_close(weight, 1 + (start - 1) * 0.9999**10)
    target_norm = nn.BatchNorm1d(2)
    average.copy_to(nn.Sequential(nn.Linear(2, 2), target_norm))
    assert target_norm.running_mean is not None and bool((target_norm.running_mean == 5.0).all())


def test_restored_state_continues_and_other_structures_are_refused() -> None:
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


def test_averages_change_places_with_the_parameters() -> None:
    module = nn.Linear(3, 2)
    average = EMA(module, 0.5)
    initial = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    trained, storage = module.weight.detach().clone(), module.weight.data_ptr()
    with average.applied():
        assert torch.equal(module.weight, initial) and module.weight.data_ptr() != storage
    assert torch.equal(module.weight, trained) and module.weight.data_ptr() == storage
    with pytest.raises(RuntimeError), average.applied():
        raise RuntimeError
    assert torch.equal(module.weight, trained)
