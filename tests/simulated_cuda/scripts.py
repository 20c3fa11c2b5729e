"""Runs the project's scripts in this process, one after the other."""

import runpy
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_script(script: str, arguments: Sequence[str]) -> int:
    """The exit status of a script (a path, or a name in scripts/) as a user runs it."""
    from hydra.core.global_hydra import GlobalHydra

    path = Path(script) if script.endswith(".py") else ROOT / "scripts" / f"{script}.py"
    GlobalHydra.instance().clear()
    argv, folder = sys.argv, str(path.resolve().parent)
    sys.argv = [str(path), *arguments]
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        runpy.run_path(str(path), run_name="__main__")
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    finally:
        sys.argv = argv
    return 0
