"""Runs scripts in forks of one process that has imported them already: seconds less for each.

Reads requests, a line of JSON each, and answers each with the exit status.
"""

import atexit
import importlib
import json
import os
import signal
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from simulated_cuda.scripts import run_script

SCRIPTS = Path(__file__).resolve().parent.parent / "scripts"


def serve() -> None:
    """Answer requests until the input ends."""
    sys.path.insert(0, str(SCRIPTS))
    for path in sorted(SCRIPTS.glob("*.py")):
        importlib.import_module(path.stem)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            _run(json.loads(line))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def _run(request: dict[str, Any]) -> NoReturn:
    """Run a script as `python scripts/NAME.py` would, and end this process."""
    signal.alarm(request["seconds"])  # ends it
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for descriptor, path in ((1, request["output"]), (2, request["errors"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(request["environment"])
    try:
        code = run_script(f"scripts/{request['name']}.py", request["arguments"])
    except BaseException:
        traceback.print_exc()
        code = 1
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    serve()
