"""What the simulated device promises: it refuses what a GPU refuses, and counts what a GPU pays for."""

import copy
from pathlib import Path

import pytest
import torch
from simulated_cuda.device import Device, activate
from simulated_cuda.waits import record
from torch import Tensor


@pytest.fixture
def device() -> Device:
    device = activate()
    device.reset_counts()
    return device


def cuda(*shape: int) -> Tensor:
    return torch.arange(float(torch.Size(shape).numel())).view(shape).cuda()


def test_results_and_gradients_are_the_cpus() -> None:
    weight = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    gradients = []
    for name in ("cpu", "cuda"):
        inputs = torch.linspace(-1, 1, 8).view(2, 4).to(name).requires_grad_()
        (inputs @ weight.to(name).t()).softmax(-1).square().sum().backward()
        assert inputs.grad is not None and inputs.grad.device.type == name
        gradients.append(inputs.grad.cpu())
    assert torch.equal(*gradients)


def test_forward_mode_derivatives_are_the_cpus() -> None:
    """They begin with zeros that no memory holds on a GPU."""
    x, weight = torch.randn(2, 4), torch.randn(4, 4)

    def derivative(device: str) -> Tensor:
        inputs, matrix = x.to(device), weight.to(device)
        function = lambda value: torch.nn.functional.silu(value @ matrix).sum(1)  # noqa: E731
        return torch.func.jvp(function, (inputs,), (torch.ones_like(inputs),))[1].cpu()

    torch.testing.assert_close(derivative("cuda"), derivative("cpu"))


def test_views_write_through() -> None:
    values = cuda(4, 3)
    values[1:3].t()[0] = -1
    assert values[:, 0].tolist() == [0, -1, -1, 9]
    values.view(-1)[5:6].add_(100)
    assert values[1, 2].item() == 105


REFUSED = {
    "two devices": lambda: cuda(2) + torch.ones(2),
    "a result on the host": lambda: torch.zeros(()).add_(cuda(1).sum()),
    "weights on the host": lambda: torch.nn.Linear(2, 2)(cuda(1, 2)),
    "a generator of the host": lambda: torch.randn(2, device="cuda", generator=torch.Generator()),
    "a generator of the device": lambda: torch.randn(2, generator=torch.Generator("cuda")),
    "numpy": lambda: cuda(2).numpy(),
    "two dtypes": lambda: cuda(2, 2) @ cuda(2, 2).bfloat16(),
    "no such device": lambda: torch.ones(2, device="cuda:1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_gpu_refuses_is_refused(name: str) -> None:
    with pytest.raises((RuntimeError, TypeError), match=r"device|dtype|CUDA"):
        REFUSED[name]()


WAITS = {
    "item": (lambda x: x.sum().item(), 1),
    "download": (lambda x: x.cpu(), 1),
    "nonzero": (lambda x: x.nonzero(), 1),
    "mask": (lambda x: x[x > 2], 1),
    "assigned mask": (lambda x: x.index_put_((x > 2,), x[:1]), 1),
    "filled mask": (lambda x: x.masked_fill_(x > 2, 0.0), 0),
    "number assigned to a mask": (lambda x: x.__setitem__(x > 2, 0.0), 0),
    "uploaded indices": (lambda x: x[torch.tensor([0, 1])], 1),
    "indices of the device": (lambda x: x[torch.arange(2, device="cuda")], 0),
    "pageable upload": (lambda x: torch.ones(2).to(x, non_blocking=True), 1),
    "pinned upload": (lambda x: torch.ones(2).pin_memory().to(x, non_blocking=True), 0),
    "blocking upload": (lambda x: torch.ones(2).pin_memory().to(x), 1),
    "download to pinned memory": (lambda x: torch.empty(4).pin_memory().copy_(x, non_blocking=True), 0),
    "arithmetic with a number": (lambda x: (x * 2 + torch.tensor(3.0)).clamp_(0, 1), 0),
    "factory": (lambda x: torch.zeros(4, device="cuda") + x, 0),
    "comparison": (lambda x: torch.equal(x, x), 1),
}


@pytest.mark.parametrize("name", WAITS)
def test_waits_are_counted(device: Device, name: str) -> None:
    run, expected = WAITS[name]
    values = cuda(4)
    with record(device) as waits:
        run(values)
    assert waits.total == expected, waits.table()


def test_copied_bytes_kernels_and_peak_are_counted(device: Device) -> None:
    device.reset_peak()
    before = device.allocated()
    values = torch.ones(1000).cuda()
    doubled = (values * 2).view(10, 100)
    assert device.uploaded() == 4000 and device.kernels() == {"aten::copy_": 1, "aten::mul.out": 1}
    assert device.allocated() - before == 8000
    del values
    assert device.allocated() - before == 4000 and device.peak() - before == 8000
    doubled.cpu()
    assert device.downloaded() == 4000 and torch.cuda.max_memory_allocated() == device.peak()


def test_memory_runs_out_as_on_a_gpu(device: Device) -> None:
    memory = device.memory
    device.memory = device.allocated() + 1000
    try:
        values = cuda(100)
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            torch.zeros(1000, device="cuda")
        with pytest.raises(torch.OutOfMemoryError, match="CUDA out of memory"):
            values.expand(10, 100) * 2  # a result of the fallback
        assert torch.cuda.mem_get_info()[0] == 600
    finally:
        device.memory = memory


def test_pinned_memory_is_real() -> None:
    pinned = torch.ones(4).pin_memory()
    assert pinned.is_pinned() and pinned[1:].is_pinned() and not torch.ones(4).is_pinned()
    assert torch.empty(2, pin_memory=True).is_pinned()


def test_copies_of_modules_and_files_stay_on_the_device(tmp_path: Path) -> None:
    module = torch.nn.Linear(2, 2).cuda()
    twin = copy.deepcopy(module)
    twin.weight.data.zero_()
    assert twin.weight.is_cuda and module.weight.abs().sum() > 0
    torch.save(module.state_dict(), tmp_path / "module.pt")
    assert torch.load(tmp_path / "module.pt")["weight"].is_cuda
    assert torch.load(tmp_path / "module.pt", map_location="cpu")["weight"].device.type == "cpu"


def test_generators_of_the_device_are_seeded() -> None:
    torch.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.randn(2, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(first, torch.randn(2, device="cuda"))
    own = torch.Generator("cuda").manual_seed(3)
    torch.randn(2, device="cuda")
    assert torch.equal(first, torch.randn(2, generator=own, device="cuda"))


def test_autocast_and_loss_scaling() -> None:
    module, scaler = torch.nn.Linear(2, 2).cuda(), torch.amp.GradScaler("cuda", init_scale=8.0)
    optimizer = torch.optim.AdamW(module.parameters(), fused=True)
    with torch.autocast("cuda", torch.float16):
        output = module(cuda(1, 2))
    before = module.weight.clone()
    scaler.scale(output.float().sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert output.dtype == torch.float16 and module.weight.dtype == torch.float32
    assert not torch.equal(before, module.weight)
