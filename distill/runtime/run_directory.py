"""A run's directory: its lock, its config snapshot, and the removal of an earlier run's files."""

import json
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.runtime.checkpoint import checkpoints
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json
from distill.runtime.locks import lock

# options that may differ on resume, at the top level or in the `run` group: none changes a finished step
SESSION = ("directory", "steps", "resume", "overwrite", "trackers", "device", "plan")
EXECUTION = ("compile", "gradient_checkpointing", "deterministic")  # results differ by rounding at most
INTERVALS = ("checkpoint_every", "preview_every", "log_every", "keep")
MUTABLE = frozenset((*SESSION, *EXECUTION, *INTERVALS))
DESCRIPTION = "experiment"  # the group that describes a preset, at the top level; it changes no result
ABSENT = "absent"


def acquire(directory: Path, config: Mapping[str, Any], resume: bool, overwrite: bool) -> Callable[[], None]:
    """Lock a directory for a run and write its config.json; returns the release, safe to call twice.

    Raises `UserError` when it cannot be created or written, when it holds a run that may not be continued
    and when another process works in it.
    """
    plain = _plain(config)
    snapshot = directory / "config.json"
    try:
        if not overwrite and (snapshot.exists() or checkpoints(directory / "checkpoints")):
            if not resume:
                raise UserError(f"{directory} holds a run; use another one, resume=true or overwrite=true")
            _check_same(plain, read_json(snapshot), directory)
        elif not overwrite:
            _warn_of_others(directory)
        release = _lock(directory)
        if overwrite:
            _remove(directory)
        write_json(snapshot, plain)
    except OSError as error:
        raise UserError(f"run.directory is {directory}, which cannot be written ({error.strerror})") from None
    return release


def truncate_metrics(directory: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after a step: they will be written again."""
    metrics = directory / "metrics.jsonl"
    if not metrics.exists():
        return
    lines = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
        except json.JSONDecodeError:  # the last line of a killed session
            continue
    with atomic_path(metrics) as temporary:
        temporary.write_text("".join(lines), encoding="utf-8")


def portable(value: Any, directory: Path) -> Any:
    """A nested result with absolute paths made relative to the working directory or the run's `directory`.

    Only strings that name an existing path are changed: a prompt may begin with a slash.
    """
    if isinstance(value, Mapping):
        return {key: portable(item, directory) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [portable(item, directory) for item in value]
    if not isinstance(value, str) or not os.path.isabs(value) or not os.path.exists(value):
        return value
    path = Path(value).resolve()
    for base in (Path.cwd(), directory.resolve()):
        if path.is_relative_to(base):
            return str(path.relative_to(base))
    return os.path.relpath(path)


def _warn_of_others(directory: Path) -> None:
    """Report the files that a new run would lie among, as in a mistyped directory."""
    names = sorted(path.name for path in directory.glob("[!.]*") if path.suffix != ".lock")
    if names:
        listed = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        print(f"warning: {directory} holds other files ({listed}); the run's lie among them", file=sys.stderr)


def _remove(directory: Path) -> None:
    """Delete the files that an earlier run has written here and nothing else."""
    digits = 8 * "[0-9]"
    images = f"previews/*_{digits}.png", f"diagnostics/*_{digits}.png", f"diagnostics/*_{digits}.json"
    for pattern in ("config.json", "metrics.jsonl", "result.json", *images):
        for path in directory.glob(pattern):
            path.unlink()
    for path in checkpoints(directory / "checkpoints"):
        path.unlink()
    shutil.rmtree(directory / "trackers", ignore_errors=True)
    for path in (directory / "snapshots").glob("[0-9]*"):  # teachers during their training
        shutil.rmtree(path, ignore_errors=True)


def _lock(directory: Path) -> Callable[[], None]:
    """Lock a directory until released or the process dies. Raises `UserError` when it is locked."""
    directory.mkdir(parents=True, exist_ok=True)
    release = lock(directory)
    if release is None:
        raise UserError(f"a run is at work in {directory}; wait for it or choose another directory")
    return release


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config after a JSON round trip."""
    try:
        plain: dict[str, Any] = json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise UserError(f"the config is no plain nested dict ({error}); expected JSON values only") from None
    return plain


def _flatten(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {
        key: value for name, child in node.items() for key, value in _flatten(child, (*path, name)).items()
    }


def _check_same(new: dict[str, Any], old: dict[str, Any], directory: Path) -> None:
    """Raises `UserError` where two configs differ in an option that changes results."""
    after, before = _flatten(new), _flatten(old)
    differing = [
        f"{'.'.join(key)} ({before.get(key, ABSENT)} -> {after.get(key, ABSENT)})"
        for key in dict.fromkeys([*after, *before])
        if after.get(key, ABSENT) != before.get(key, ABSENT) and not _mutable(key)
    ]
    if differing:
        raise UserError(
            f"{directory} holds a run with another config: {', '.join(differing[:3])};"
            " choose another directory, or overwrite=true to start over"
        )


def _mutable(key: tuple[str, ...]) -> bool:
    if key[:1] == (DESCRIPTION,):
        return True
    in_group = len(key) > 1 and key[0] == "run"
    return bool(key) and key[1 if in_group else 0] in MUTABLE
