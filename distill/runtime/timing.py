"""Wall-clock timing: median and range over repetitions, after a warm-up."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Median, minimum and maximum in milliseconds."""

    name: str
    median: float
    low: float
    high: float


def measure(name: str, function: Callable[[], object], repetitions: int) -> Timing:
    """Time a call after one warm-up; waits for the GPU where there is one."""
    samples = []
    for _ in range(repetitions + 1):
        start = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - start))
    samples = samples[1:]
    return Timing(name, statistics.median(samples), min(samples), max(samples))
