"""This machine's speed: every operation of a plan, run and timed on it."""

import time
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from distill.planning.hardware import HERE, Machine
from distill.planning.operations import Operation, Record, TensorSpec
from distill.runtime.machine import available_memory

SECONDS = 0.01  # of repetitions of an operation; one that takes longer is run twice
REPETITIONS = 20
LIMIT = 30.0  # seconds of the whole calibration


def this_machine(device: torch.device, record: Record) -> Machine:
    """This machine with the measured times of a record's operations.

    Its rates are the best that an operation of the record has reached.
    """
    measured = time_operations((operation for _, _, operation in record.operations), device)
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
    args, kwargs = _filled(operation.args, device), dict(_filled(operation.kwargs, device))
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


def _filled(value: Any, device: torch.device) -> Any:
    """Operands from their specs: zeros, which are valid indices too."""
    if isinstance(value, TensorSpec):
        return _zeros(value, device)
    if isinstance(value, tuple):
        return [_filled(item, device) for item in value]
    return value


def _zeros(spec: TensorSpec, device: torch.device) -> Tensor:
    return spec.empty(device).zero_()
