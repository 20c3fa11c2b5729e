"""Experiment trackers: TensorBoard and others, through accelerate."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from distill.runtime.errors import UserError
from distill.runtime.names import slug


class Trackers:
    """The trackers of a run; accelerate is imported only where there is at least one."""

    def __init__(self, names: Sequence[str], directory: Path) -> None:
        """Raises `UserError` for a tracker that accelerate does not support or that is not installed."""
        self._directory = directory
        self._names = tuple(names)
        self._accelerator: Any = None
        if self._names:
            _check_installed(self._names)

    def start(self, label: str, step: int) -> None:
        """Open the trackers at a step; TensorBoard hides later points, which a killed session has written."""
        if not self._names:
            return
        from accelerate import Accelerator

        self._accelerator = Accelerator(log_with=list(self._names), project_dir=str(self._directory))
        self._accelerator.init_trackers(slug(label), init_kwargs={"tensorboard": {"purge_step": step + 1}})

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Send metrics to every tracker."""
        if self._accelerator is not None:
            self._accelerator.log(dict(metrics), step=step)

    def close(self) -> None:
        """Flush and close."""
        if self._accelerator is not None:
            self._accelerator.end_training()
            self._accelerator = None


def _check_installed(names: Sequence[str]) -> None:
    try:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
    except ImportError:
        raise UserError(f"tracker '{names[0]}' needs accelerate: pip install it, or trackers=[]") from None
    supported = sorted(str(name) for name in LOGGER_TYPE_TO_CLASS)
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        if name not in supported:
            raise UserError(f"tracker '{name}' is unknown; expected some of {', '.join(supported)}, or []")
        if name not in installed:
            raise UserError(f"the tracker '{name}' is not installed; pip install {name}, or trackers=[]")
