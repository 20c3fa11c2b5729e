"""The jobs of a sweep (--multirun), in this process or in those of a launcher: joblib, submitit, Ray."""

import importlib
import json
import os
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from entry import announce, mistake_of, register_resolvers, values_of

from distill.runtime.config import build
from distill.runtime.errors import UserError

FAILURES = "SDS3D_SWEEP_FAILURES"  # the folder in which jobs tell of their mistakes


class SweepJob:
    """One job: `main` of a script with the options of one combination.

    Other processes find this class and the script by their names, as what is defined in `__main__` cannot be
    sent to them. A mistake (`UserError`) ends its own job alone.
    """

    __name__ = "SweepJob"  # hydra shows it

    def __init__(self, script: str) -> None:
        self.script = script

    def __call__(self, config: Any) -> None:
        module, options = importlib.import_module(self.script), None
        register_resolvers(module.Config)
        try:
            options = build(module.Config, values_of(config))
            announce(options)
            module.main(options)
        except Exception as error:  # within hydra, which would print a traceback
            mistake = mistake_of(error, options)
            if mistake is None:
                raise
            _report(mistake)


def _report(mistake: UserError) -> None:
    """Print a job's mistake, and write it with the job's overrides for the process that started the sweep."""
    from hydra.core.hydra_config import HydraConfig

    job = ", ".join(HydraConfig.get().overrides.task)
    print(f"error: {mistake} ({job})", file=sys.stderr)
    record_failure(f"{job}: {mistake}")


def record_failure(sentence: str) -> None:
    """Tell the process that started the sweep of a job that failed."""
    path = Path(os.environ[FAILURES]) / f"{uuid.uuid4().hex}.json"
    path.write_text(json.dumps(sentence))


def run_sweep(script: str, start: Callable[[SweepJob], None]) -> None:
    """Start a sweep by hydra and wait for its jobs. Raises `UserError` where some have failed."""
    folders = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))  # of the launchers' processes
    Path("outputs").mkdir(exist_ok=True)  # which processes on other machines see
    with tempfile.TemporaryDirectory(prefix=".sweep-", dir="outputs") as folder:
        os.environ[FAILURES] = str(Path(folder).resolve())
        start(SweepJob(script))
        failures = sorted(json.loads(path.read_text()) for path in Path(folder).glob("*.json"))
    if failures:
        raise UserError(
            f"{len(failures)} jobs of the sweep failed, the first: {failures[0]}; the others are done"
        )
