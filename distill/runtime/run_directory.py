"""A run's directory: who may work in it, with which config, and what is removed to start over."""

import fcntl
import json
import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.runtime.checkpoint import checkpoints
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_path, read_json, write_json

# what a resumed run may change, at the config's top level or in its `run` group: none alters a finished step
FREE = frozenset(
    [
        "directory",
        "steps",
        "resume",
        "overwrite",
        "checkpoint_every",
        "keep",
        "preview_every",
        "log_every",
        "trackers",
        "device",
    ]
)
ABSENT = "absent"


def claim(directory: Path, config: Mapping[str, Any], resume: bool, overwrite: bool) -> Callable[[], None]:
    """Make a directory this run's, `config` its config.json; returns what gives it up (safe to call twice).

    Raises `UserError` when it holds a run that may not be continued or when another process works in it.
    """
    plain = _plain(config)
    snapshot = directory / "config.json"
    if not overwrite and (snapshot.exists() or checkpoints(directory / "checkpoints")):
        if not resume:
            raise UserError(f"{directory} holds a run; use another directory, resume=true or overwrite=true")
        _check_same(plain, read_json(snapshot), directory)
    release = _lock(directory)
    if overwrite:
        _remove(directory)
    write_json(snapshot, plain)
    return release


def truncate_metrics(directory: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after a step: they will be written again."""
    metrics = directory / "metrics.jsonl"
    if not metrics.exists():
        return
    kept = []
    for line in metrics.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except json.JSONDecodeError:  # a line the kill has cut off
            continue
    with atomic_path(metrics) as temporary:
        temporary.write_text("".join(kept), encoding="utf-8")


def _remove(directory: Path) -> None:
    """Delete what an earlier run has written here and nothing else."""
    numbered = 8 * "[0-9]"
    pictures = (
        f"previews/*_{numbered}.png",
        f"diagnostics/*_{numbered}.png",
        f"diagnostics/*_{numbered}.json",
    )
    for pattern in ("config.json", "metrics.jsonl", "result.json", *pictures):
        for path in directory.glob(pattern):
            path.unlink()
    for path in checkpoints(directory / "checkpoints"):
        path.unlink()
    shutil.rmtree(directory / "trackers", ignore_errors=True)


def _lock(directory: Path) -> Callable[[], None]:
    """Lock a directory until released or the process dies. Raises `UserError` when it is taken."""
    directory.mkdir(parents=True, exist_ok=True)
    descriptors = [os.open(directory, os.O_RDONLY)]

    def release() -> None:
        while descriptors:
            os.close(descriptors.pop())

    try:
        fcntl.flock(descriptors[0], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        release()
        raise UserError(f"a run is at work in {directory}; wait for it or choose another directory") from None
    return release


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """The config as JSON would give it back."""
    try:
        return json.loads(json.dumps(config))
    except (TypeError, ValueError) as error:
        raise UserError(f"the config is no plain nested dict ({error}); expected JSON values only") from None


def _flat(node: Any, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Any]:
    if not isinstance(node, dict) or not node:
        return {path: node}
    return {key: value for name, child in node.items() for key, value in _flat(child, (*path, name)).items()}


def _check_same(new: dict[str, Any], old: dict[str, Any], directory: Path) -> None:
    """Raises `UserError` where two configs differ in what alters results."""
    ours, theirs = _flat(new), _flat(old)
    differing = [
        f"{'.'.join(key)} ({theirs.get(key, ABSENT)} -> {ours.get(key, ABSENT)})"
        for key in dict.fromkeys([*ours, *theirs])
        if ours.get(key, ABSENT) != theirs.get(key, ABSENT) and not _free(key)
    ]
    if differing:
        raise UserError(
            f"{directory} holds a run with another config: {', '.join(differing[:3])};"
            " choose another directory, or overwrite=true to start over"
        )


def _free(key: tuple[str, ...]) -> bool:
    in_group = len(key) > 1 and key[0] == "run"
    return bool(key) and key[1 if in_group else 0] in FREE
