"""Timing of a piece of work: median and spread over runs, after a warm-up."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Timing:
    """Median and spread in milliseconds of one part over `runs` runs."""

    part: str
    median: float
    low: float
    high: float


def timed(part: str, work: Callable[[], object], runs: int) -> Timing:
    """Time a call after one warm-up; waits for the GPU where one is in use."""
    samples = []
    for _ in range(runs + 1):
        started = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        samples.append(1e3 * (time.perf_counter() - started))
    kept = samples[1:]
    return Timing(part, statistics.median(kept), min(kept), max(kept))
