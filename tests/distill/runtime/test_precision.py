"""The dtypes of a run: what frozen and trained networks compute in, and loss scaling in float16."""

import pytest
import torch
from torch import nn

from distill.runtime.errors import UserError
from distill.runtime.optim import optimizer_step
from distill.runtime.precision import Precision, resolve_precision

CPU = torch.device("cpu")


def test_auto_is_float32_on_a_cpu_and_autocast_then_does_nothing() -> None:
    precision = resolve_precision("auto", CPU)
    assert precision.dtype == torch.float32 and precision.scaler() is None
    with precision.autocast():
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.float32


@pytest.mark.parametrize("name", ["bfloat16", "float16"])
def test_autocast_computes_in_half_precision_and_trains_float32_weights(name: str) -> None:
    precision = resolve_precision(name, CPU)  # type: ignore[arg-type]
    network = nn.Linear(4, 1)
    before = network.weight.detach().clone()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    with precision.autocast():
        output = network(torch.ones(3, 4))
    assert output.dtype == precision.dtype
    optimizer_step(optimizer, output.float().sum() / 4, scaler=precision.scaler())
    torch.testing.assert_close(network.weight, before - 0.075)  # from three rows of ones, over 4
    assert network.weight.dtype == torch.float32


def test_scaler_keeps_gradients_that_float16_would_flush_to_zero() -> None:
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    tiny = 1e-6  # its square is far below float16's smallest number, 6e-8
    loss = (weight.half() * tiny) * torch.tensor(tiny, dtype=torch.float16)
    optimizer_step(optimizer, loss.float(), scaler=None)
    assert weight.item() == 1.0

    weight = nn.Parameter(torch.ones((), dtype=torch.float64))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer_step(optimizer, weight.half().float() * 1e-6, scaler=Precision(CPU, torch.float16).scaler())
    assert weight.item() == pytest.approx(1 - 1e-6, rel=1e-9, abs=2e-9)


def test_overflowing_gradients_skip_the_update_and_lower_the_scale() -> None:
    scaler = Precision(CPU, torch.float16).scaler()
    assert scaler is not None
    weight = nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer_step(optimizer, weight * float("inf"), scaler=scaler)
    assert weight.item() == 1.0 and scaler.get_scale() == 2.0**15


def test_clipping_measures_the_unscaled_gradient() -> None:
    weight = nn.Parameter(torch.zeros(4))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    optimizer_step(optimizer, (weight * 3).sum(), 1.0, Precision(CPU, torch.float16).scaler())
    assert float(weight.norm()) == pytest.approx(1.0, rel=1e-4)


def test_unknown_and_unsupported_dtypes(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="precision is 'half': expected auto, float32"):
        resolve_precision("half", CPU)  # type: ignore[arg-type]
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "Tesla V100")
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match="Tesla V100 does not compute in bfloat16: use float16"):
        resolve_precision("bfloat16", cuda)
    assert resolve_precision("auto", cuda).dtype == torch.float16
