"""A plan beside the run itself: its jobs are done once more on this machine, and timed."""

import ctypes
import gc
from dataclasses import dataclass
from pathlib import Path

import torch

from distill.planning.calibration import now
from distill.planning.hardware import GIB, Machine
from distill.planning.plan import Job, Plan, Subject, temporary_run
from distill.planning.teachers import teacher_modules
from distill.teacher.load import load_teacher

REPETITIONS = 3


@dataclass(frozen=True)
class Comparison:
    """Seconds of the whole run, predicted and measured, by job; bytes that its tensors add to the process."""

    seconds: dict[str, tuple[float, float]]
    memory: tuple[float, float]

    @property
    def total(self) -> tuple[float, float]:
        """Seconds of the whole run, predicted and measured."""
        predicted, measured = zip(*self.seconds.values())
        return sum(predicted), sum(measured)

    def __str__(self) -> str:
        rows = {**self.seconds, "whole run": self.total}
        lines = [f"{'job':34}{'predicted s':>14}{'measured s':>14}{'ratio':>8}"]
        lines += [f"{name:34}{a:14.4g}{b:14.4g}{a / b:8.2f}" for name, (a, b) in rows.items()]
        a, b = (value / GIB for value in self.memory)
        lines.append(f"{'memory of its tensors, GiB':34}{a:14.3f}{b:14.3f}{a / b:8.2f}")
        return "\n".join(lines)


def check(subject: Subject, plan: Plan, machine: Machine, device: torch.device) -> Comparison:
    """Do each job of a plan on a device. Raises `UserError` where the teacher's weights are not here."""
    seconds: dict[str, tuple[float, float]] = {}
    with temporary_run(subject.run) as run:
        teacher = load_teacher(subject.teacher, device, run.precision.dtype)
        parts = teacher_modules(teacher).values()
        loaded = sum(value.nbytes for part in parts for value in part.parameters())
        before = _reset_peak(device) - loaded  # modules that loading imports are no tensors
        trial = subject.prepare(run, teacher)
        trial.warm_up()
        jobs = [job for job in trial.jobs if job.count > 0]
        for phase, job in zip(plan.phases, jobs, strict=True):
            step = machine.total(phase.record).total()
            predicted, measured = seconds.get(job.name, (0.0, 0.0))
            seconds[job.name] = predicted + step * job.count, measured + _median(job, device) * job.count
    return Comparison(seconds, (plan.peak, _peak(device) - before))


def _median(job: Job, device: torch.device) -> float:
    times = []
    for _ in range(REPETITIONS):
        start = now(device)
        job.step()
        times.append(now(device) - start)
    return sorted(times)[REPETITIONS // 2]


def _reset_peak(device: torch.device) -> float:
    """Start the peak anew; returns the bytes in use. Linux resets a process's peak by a 5 in clear_refs."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return float(torch.cuda.memory_allocated(device))
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that the process still holds
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _peak(device: torch.device) -> float:
    """Peak memory in bytes: of the device's allocator, or of the process."""
    return float(torch.cuda.max_memory_allocated(device)) if device.type == "cuda" else _status("VmHWM")


def _status(name: str) -> float:
    """An entry of this process's status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(name))
