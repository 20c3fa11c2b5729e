"""This machine's speed: every operation of a plan, run and timed on it."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from distill.planning.hardware import HERE, Machine
from distill.planning.operations import Operation, Record, TensorSpec
from distill.planning.recorder import MetaRecorder
from distill.runtime.machine import available_memory

SECONDS = 0.01  # of repetitions of an operation; one that takes longer is run twice
REPETITIONS = 20
LIMIT = 30.0  # seconds of the whole calibration


def this_machine(device: torch.device, record: Record) -> Machine:
    """This machine with the measured times of a record's operations.

    Its rates are the best that an operation of the record has reached.
    """
    measured = time_operations((operation for _, _, operation in record.operations), device)
    if device.type == "cpu":
        factor = context_factor(device)
        measured = {operation: seconds * factor for operation, seconds in measured.items()}
    rates = [op.flops / seconds for op, seconds in measured.items() if op.flops and seconds > 0]
    speeds = [op.bytes / seconds for op, seconds in measured.items() if op.bytes and seconds > 0]
    best, bandwidth = max(rates, default=1.0), max(speeds, default=1.0)
    memory = available_memory(device)
    precision = torch.bfloat16 if device.type == "cuda" else torch.float32
    return Machine(HERE, best, best, bandwidth, memory, precision, measured)


def time_operations(operations: Iterable[Operation], device: torch.device) -> dict[Operation, float]:
    """Seconds of each operation, the largest first; those left at the limit take as long as the shortest."""
    unique = sorted(set(operations), key=lambda operation: -(operation.flops + operation.bytes))
    seconds: dict[Operation, float] = {}
    started = time.perf_counter()
    for operation in unique:
        if operation.view or time.perf_counter() - started < LIMIT:
            seconds[operation] = 0.0 if operation.view else _seconds(operation, device)
    shortest = min((value for value in seconds.values() if value > 0), default=0.0)
    return {operation: seconds.get(operation, shortest) for operation in unique}


@torch.no_grad()
def _seconds(operation: Operation, device: torch.device) -> float:
    """The median of repetitions; 0 where it cannot be repeated on its own."""
    rows = _indexed_rows(operation.args)
    args, kwargs = _filled(operation.args, device, rows), dict(_filled(operation.kwargs, device, rows))
    if "device" in kwargs:
        kwargs["device"] = device
    try:
        operation.function(*args, **kwargs)
    except (RuntimeError, IndexError, TypeError, NotImplementedError):
        return 0.0
    times: list[float] = []
    while not times or (sum(times) < SECONDS and len(times) < REPETITIONS):
        start = now(device)
        operation.function(*args, **kwargs)
        times.append(now(device) - start)
    return sorted(times)[len(times) // 2]


def now(device: torch.device) -> float:
    """Seconds, once the device is done; of one thread alone its own, which other processes do not slow."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.process_time() if alone else time.perf_counter()


def _indexed_rows(args: tuple[Any, ...]) -> int:
    """How many values an index among the operands may take: the length of the indexed dimension."""
    if not args or not isinstance(args[0], TensorSpec) or not args[0].shape:
        return 1
    dim = args[1] if len(args) > 1 and type(args[1]) is int else 0
    return args[0].shape[dim] if -len(args[0].shape) <= dim < len(args[0].shape) else 1


def _filled(value: Any, device: torch.device, rows: int) -> Any:
    """Operands from their specs: zeros, and indices all over the rows, whose reads no cache holds."""
    if isinstance(value, TensorSpec):
        span = (value.span,)  # filled before it is expanded: elements may share their memory
        flat = torch.zeros(span, dtype=value.dtype, device=device)
        flat = flat.random_(0, max(rows, 1)) if value.dtype == torch.long else flat
        return flat.as_strided(value.shape, value.stride)
    if isinstance(value, tuple):
        return [_filled(item, device, rows) for item in value]
    return value


def context_factor(device: torch.device) -> float:
    """Seconds of a network's training step over those of its operations, each timed alone.

    In a step caches are cold, memory is allocated anew, and Python and autograd take their time. A small
    U-Net stands for all networks.
    """
    with MetaRecorder() as recorder:
        with torch.device("meta"):
            step = _reference_step()
        with recorder.measured() as record:
            step()
    alone = time_operations((operation for _, _, operation in record.operations), device)
    total = sum(alone[operation] * count for (_, _, operation), count in record.operations.items())

    with torch.random.fork_rng(), torch.device(device):
        step = _reference_step()
    times = []
    for _ in range(5):
        start = now(device)
        step()
        times.append(now(device) - start)
    return sorted(times)[2] / total


def _reference_step() -> Callable[[], None]:
    """Forward and backward of a U-Net of shapes64's kind, on torch's default device."""
    unet = UNet2DConditionModel(
        sample_size=8,
        in_channels=16,
        out_channels=16,
        block_out_channels=(96, 192),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=128,
    )
    x, t, text = torch.randn(16, 16, 8, 8), torch.full((16,), 500), torch.randn(16, 24, 128)

    def step() -> None:
        unet(x, t, encoder_hidden_states=text).sample.square().mean().backward()

    return step
