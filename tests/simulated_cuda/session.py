"""The tests' side of a process with the simulated device (worker.py). Does not need the device itself."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent


@dataclass(frozen=True)
class Phase:
    """The host's waits in one step of a run, or between two: how many, and a table of their places."""

    name: str
    waits: int
    table: str


@dataclass(frozen=True)
class ScriptResult:
    """One run of a script on the device."""

    code: int
    output: str
    errors: str
    seconds: float
    peak: int  # bytes of device memory
    phases: tuple[Phase, ...]

    def step(self, index: int) -> Phase:
        """The waits in a step."""
        return next(phase for phase in self.phases if phase.name == f"step {index}")


def environment(**variables: str) -> dict[str, str]:
    """One thread, no network."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **variables}


def run_pytest(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """pytest in a process of its own with the device."""
    # without the settings of an outer pytest, such as its number of processes
    own = {key: value for key, value in environment(**variables).items() if not key.startswith("PYTEST_")}
    command = [sys.executable, str(HERE), "pytest", "-p", "no:cacheprovider", *arguments]
    return subprocess.run(command, cwd=ROOT, env=own, capture_output=True, text=True)


class DeviceProcess:
    """Runs scripts one after the other in one process with the device, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._errors = (folder / "device_process.log").open("w")
        self._process = self._start()

    def _start(self) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-X", "faulthandler", str(HERE), "serve"],
            env=environment(),
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
        )

    def run(self, script: str, *arguments: str, memory_gib: float = 64) -> ScriptResult:
        """Run a script to its end.

        Raises `RuntimeError` when the process has died of it; the next script has a new process.
        """
        request = {"script": script, "arguments": arguments, "folder": str(self.folder)}
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(json.dumps({**request, "memory_gib": memory_gib}) + "\n")
        stdin.flush()
        answer = stdout.readline()
        if not answer:
            log = Path(self._errors.name).read_text()[-2000:]
            self._process.wait()
            self._process = self._start()
            command = " ".join([script, *arguments])
            raise RuntimeError(f"{command} ended the device's process:\n{log}")
        values = json.loads(answer)
        return ScriptResult(**{**values, "phases": tuple(Phase(*phase) for phase in values["phases"])})

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._errors.close()
