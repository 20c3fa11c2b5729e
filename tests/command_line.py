"""Scripts as a user runs them, for the tests of several rooms."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from simulated_cuda.session import environment

ROOT = Path(__file__).resolve().parent.parent


def script(name: str, *arguments: str, code: int = 0) -> str:
    """Run a script from the checkout; its standard output, or its error line where it must fail."""
    status, output, errors = _run(name, arguments)
    assert status == code, errors
    if code == 0:
        return output
    assert "Traceback" not in errors
    lines = [line for line in errors.splitlines() if line.strip()]
    assert len(lines) == 1 and lines[0].startswith("error: "), errors
    return lines[0]


@cache
def _server(hub: str | None) -> subprocess.Popen[str]:
    """That of this process of pytest and of HF_HOME, which is read at import; it ends with its input."""
    command = [sys.executable, str(ROOT / "tests" / "script_server.py")]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=ROOT, env=environment(), stdin=pipe, stdout=pipe, text=True)


def _run(name: str, arguments: Sequence[str], seconds: int = 300) -> tuple[int, str, str]:
    """A script's exit status, standard output and error output; it is killed after so many seconds."""
    request = {"name": name, "arguments": arguments, "environment": environment(), "seconds": seconds}
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "stdout", Path(folder) / "stderr"
        request |= {"output": str(output), "errors": str(errors)}
        server = _server(os.environ.get("HF_HOME"))
        assert server.stdin is not None and server.stdout is not None
        server.stdin.write(json.dumps(request) + "\n")
        server.stdin.flush()
        status = int(server.stdout.readline())
        return status, output.read_text(), errors.read_text()
