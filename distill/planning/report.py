"""A plan on a machine: the table that is printed, the JSON, and what to change where it does not fit."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from distill.planning.hardware import GIB, Machine
from distill.planning.plan import Plan
from distill.planning.recorder import BACKWARD

SMALLER = "run.gradient_checkpointing=true, a smaller batch with more accumulate, run.precision=bfloat16"


@dataclass(frozen=True)
class Row:
    """A component of the run: samples it is called with, operations and seconds over the whole run."""

    component: str
    samples: float
    tflop: float
    seconds: float


@dataclass(frozen=True)
class Report:
    """Work, time and memory of a run on a machine."""

    plan: Plan
    machine: Machine
    smaller: str  # options that need less memory

    @property
    def rows(self) -> list[Row]:
        """By component and direction, the longest first."""
        record = self.plan.record
        flops: Counter[tuple[str, str]] = Counter()
        for (component, direction, operation), count in record.operations.items():
            flops[component, direction] += operation.flops * count
        seconds = self.machine.total(record)
        rows = [Row(_label(*key), record.samples[key[0]], flops[key] / 1e12, seconds[key]) for key in seconds]
        return sorted(rows, key=lambda row: -row.seconds)

    @property
    def seconds(self) -> float:
        """Of the whole run."""
        return sum(row.seconds for row in self.rows)

    @property
    def floor(self) -> float:
        """Seconds of its arithmetic at the machine's peak rates."""
        return self.machine.floor(self.plan.record)

    @property
    def memory(self) -> float:
        """Bytes at most, with what the process needs beside tensors."""
        return self.machine.reserved(self.plan.peak)

    @property
    def fits(self) -> bool:
        """Whether the machine has as much memory."""
        return self.memory <= self.machine.memory

    @property
    def advice(self) -> str:
        """A sentence on memory."""
        need, have = self.memory / GIB, self.machine.memory / GIB
        if self.fits:
            return f"peak memory {need:.1f} GiB of {have:.1f} GiB"
        return f"peak memory {need:.1f} GiB does not fit into {have:.1f} GiB: try {self.smaller}"

    def __str__(self) -> str:
        total, plan = max(self.seconds, 1e-12), self.plan
        lines = [f"{'component':34}{'samples':>12}{'TFLOP':>14}{'seconds':>12}{'share':>8}"]
        for row in self.rows:
            samples = f"{row.samples:.0f}" if row.samples else ""
            values = f"{samples:>12}{row.tflop:14.4g}{row.seconds:12.4g}{row.seconds / total:8.1%}"
            lines.append(f"{row.component:34}{values}")
        parts = (("weights", plan.weights), ("gradients, moments, averages", plan.states))
        held = ", ".join(f"{name} {size / GIB:.2f} GiB" for name, size in parts)
        work = f"{plan.flops / 1e12:.4g} TFLOP in {hours(self.seconds)}"
        floor = f"at peak rates {hours(self.floor)}, of which it reaches {self.floor / total:.0%}"
        lines.append(f"{plan.steps} steps on {self.machine.name}: {work}; {floor}")
        lines.append(f"{self.advice} ({held})")
        return "\n".join(lines)

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "machine": self.machine.name,
            "steps": self.plan.steps,
            "tflop": self.plan.flops / 1e12,
            "seconds": self.seconds,
            "floor_seconds": self.floor,
            "peak_memory_gib": self.memory / GIB,
            "available_memory_gib": self.machine.memory / GIB,
            "fits": self.fits,
            "weights_gib": self.plan.weights / GIB,
            "states_gib": self.plan.states / GIB,
            "components": [vars(row) for row in self.rows],
        }


def _label(component: str, direction: str) -> str:
    return f"{component}, backward" if direction == BACKWARD else component


def hours(seconds: float) -> str:
    """A duration in a unit that suits it."""
    if seconds >= 5400:
        return f"{seconds / 3600:.3g} h"
    return f"{seconds / 60:.3g} min" if seconds >= 90 else f"{seconds:.3g} s"
