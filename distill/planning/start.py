"""Before a run: whether its memory is there. After it: the work that it has done."""

import io
import sys
import warnings
from contextlib import redirect_stderr
from pathlib import Path
from typing import Any

import torch

from distill.planning.hardware import CARDS, FRAGMENTATION, GIB, Machine
from distill.planning.plan import Plan, Subject, make_plan
from distill.runtime import processes
from distill.runtime.errors import UserError, memory_advice
from distill.runtime.files import read_json, write_json
from distill.runtime.machine import available_memory
from distill.runtime.precision import pick_precision

MIN_STEPS = 100  # of a run that is planned: a plan takes as long as a few steps


def plan_start(subject: Subject, options: object) -> Plan | None:
    """The plan of a run that is about to start, on its own device.

    None where `run.plan` is false, in a run of fewer than `MIN_STEPS`, in one of several processes, and where
    the run cannot be planned, such as one on a teacher of another family. Raises `UserError` where it needs
    more memory than is free, with those of `options` that need less.
    """
    short = subject.run.steps < MIN_STEPS
    if not subject.run.plan or short or processes.world_size() > 1:
        return None
    precision = pick_precision(subject.run.device, subject.run.precision)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):  # the run will repeat them
            warnings.simplefilter("ignore")
            plan = make_plan(subject, precision.dtype)
    except UserError:  # of what the run itself will report, if it is a mistake at all
        return None
    except Exception as error:  # whatever fails here, the run itself may well work
        reason = str(error).splitlines()[0][:200]
        print(f"warning: the run is not planned: {reason}", file=sys.stderr)
        return None
    require_memory(plan, precision.device, options)
    return plan


def require_memory(plan: Plan, device: torch.device, options: object) -> None:
    """Raise `UserError` where a plan's peak does not fit into the free memory of a device."""
    cuda = device.type == "cuda"
    required, available = plan.peak * (FRAGMENTATION if cuda else 1.0), available_memory(device)
    if required > available:
        raise UserError(
            f"the run needs about {required / GIB:.1f} GiB on {device} and {available / GIB:.1f} GiB are "
            f"free: try {memory_advice(options, cuda)}, or run.plan=false to start it nevertheless"
        )


def record_work(path: Path, plan: Plan | None) -> None:
    """Add to a result.json the work of its run, and what of the device's peak rate it has reached."""
    if plan is None or not path.is_file():
        return
    result = read_json(path)
    result["run"] |= work(plan, float(result["run"]["seconds"]), device_card())
    write_json(path, result)


def work(plan: Plan, seconds: float, machine: Machine | None) -> dict[str, Any]:
    """TFLOP of a run, TFLOP a second, and where the peak rate is known the fraction of it."""
    values = {"tflop": plan.flops / 1e12, "tflops_per_second": plan.flops / 1e12 / max(seconds, 1e-9)}
    if machine is not None:
        floor = machine.floor(plan.record)
        values |= {"floor_seconds": floor, "fraction_of_peak": floor / max(seconds, 1e-9)}
    return {name: float(f"{value:.4g}") for name, value in values.items()}


def device_card() -> Machine | None:
    """The entry of the CUDA device in use, where the table has one."""
    if not torch.cuda.is_initialized():
        return None
    name = torch.cuda.get_device_name().lower()
    return next((machine for key, machine in CARDS.items() if key in name), None)
