"""Where the host waits for the device: file and line of the project, step by step."""

import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from simulated_cuda.device import Device

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = tuple(f"{ROOT / name}/" for name in ("distill", "sds3d", "scripts"))


@dataclass
class StepWaits:
    """The waits within one step, or between two steps, by place and reason."""

    name: str
    places: Counter[tuple[str, str]] = field(default_factory=Counter)

    @property
    def total(self) -> int:
        return self.places.total()

    def table(self) -> str:
        """One line for each place, most waits first."""
        lines = [f"{self.name}: {self.total} waits"]
        lines += [f"{count:6} {line}  {reason}" for (line, reason), count in self.places.most_common()]
        return "\n".join(lines)


def call_site(depth: int = 3) -> str:
    """The project's innermost lines on this thread, or on the main thread where that started this one."""
    frames = _project_frames(sys._getframe(1))
    if not frames:  # autograd's thread for the device
        frames = _project_frames(sys._current_frames()[threading.main_thread().ident or 0])
    lines = [
        f"{Path(frame.f_code.co_filename).relative_to(ROOT)}:{frame.f_lineno}" for frame in frames[:depth]
    ]
    return " < ".join(lines) or "outside the project"


def _project_frames(frame: FrameType | None) -> list[FrameType]:
    frames = []
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGES):
            frames.append(frame)
        frame = frame.f_back
    return frames


@contextmanager
def record_steps(device: Device) -> Iterator[list[StepWaits]]:
    """The waits before, within and after the steps of every run in the context (`Run.steps`).

    What a run does between two steps, such as checkpoints, previews and logging, belongs to the earlier one.
    """
    from distill.runtime.run import Run

    phases = [StepWaits("before the first step")]
    original = Run.steps

    def steps(run: Run, keep_start: bool = False) -> Iterator[int]:
        for step in original(run, keep_start):
            phases.append(StepWaits(f"step {step}"))
            yield step
            phases.append(StepWaits(f"after step {step}"))
        phases.append(StepWaits("after the last step"))

    Run.steps = steps  # type: ignore[method-assign]
    try:
        with device.on_wait(lambda reason: phases[-1].places.update([(call_site(), reason)])):
            yield phases
    finally:
        Run.steps = original  # type: ignore[method-assign]


@contextmanager
def record(device: Device, name: str = "block") -> Iterator[StepWaits]:
    """The waits within the context."""
    waits = StepWaits(name)
    with device.on_wait(lambda reason: waits.places.update([(call_site(), reason)])):
        yield waits
