"""python tests/simulated_cuda run | waits SCRIPT [arguments]; pytest [arguments]; serve (for the tests)."""

import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
# In place of this folder, whose modules must not be found under their bare names.
sys.path[0:1] = [str(HERE.parent), str(HERE.parent.parent)]

from simulated_cuda.build import Unavailable  # noqa: E402
from simulated_cuda.device import activate  # noqa: E402


def main(command: str, *arguments: str) -> int:
    """The exit status."""
    device = activate()
    if command == "pytest":
        import pytest

        return int(pytest.main(list(arguments)))

    from simulated_cuda.scripts import run_script
    from simulated_cuda.waits import record_steps

    if command == "serve":
        from simulated_cuda.worker import serve

        return serve(device)
    if command == "run":
        return run_script(arguments[0], arguments[1:])
    with record_steps(device) as phases:
        status = run_script(arguments[0], arguments[1:])
    print(*(phase.table() for phase in phases if phase.total), sep="\n\n")
    copied = f"{device.uploaded()} bytes up, {device.downloaded()} down"
    print(f"\npeak {device.peak() / 2**20:.0f} MiB, {copied}")
    return status


if __name__ == "__main__":
    if len(sys.argv) < 2 or sys.argv[1] not in ("run", "waits", "pytest", "serve"):
        raise SystemExit(f"usage: {__doc__}")
    try:
        raise SystemExit(main(*sys.argv[1:]))
    except Unavailable as reason:
        raise SystemExit(f"the simulated device is not available: {reason}") from None
