"""A process with the simulated device that runs scripts for the tests: one import of torch for many runs.

One JSON object a line: requests on standard input, results on what was standard output.
"""

import gc
import io
import json
import os
import sys
import time
import traceback
from contextlib import redirect_stderr, redirect_stdout
from typing import Any

from simulated_cuda.device import GIB, Device
from simulated_cuda.scripts import run_script
from simulated_cuda.waits import record_steps


def serve(device: Device) -> int:
    """Answer requests until standard input ends."""
    results = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not become an answer
    for line in sys.stdin:
        print(json.dumps(_run(device, **json.loads(line))), file=results, flush=True)
    return 0


def _run(device: Device, script: str, arguments: list[str], folder: str, memory_gib: float) -> dict[str, Any]:
    os.chdir(folder)
    device.memory = int(memory_gib * GIB)
    device.reset_peak()
    output, errors, start = io.StringIO(), io.StringIO(), time.monotonic()
    with redirect_stdout(output), redirect_stderr(errors), record_steps(device) as phases:
        try:
            code = run_script(script, arguments)
        except Exception:
            traceback.print_exc()
            code = 1
    gc.collect()
    return {
        "code": code,
        "output": output.getvalue(),
        "errors": errors.getvalue(),
        "seconds": time.monotonic() - start,
        "peak": device.peak(),
        "phases": [(phase.name, phase.total, phase.table()) for phase in phases],
    }
