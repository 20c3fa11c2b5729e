"""A run as phases of equal steps, each measured once on the meta device."""

import tempfile
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from distill.core.teacher import Teacher
from distill.planning.operations import Record
from distill.planning.recorder import MetaRecorder
from distill.planning.teachers import meta_teacher
from distill.runtime.checkpoint import random_state, set_random_state
from distill.runtime.precision import Precision
from distill.runtime.run import Run, RunOptions


@dataclass(frozen=True)
class Phase:
    """What is done `count` times in the run; `record` is of one time, `peak` its bytes at most."""

    name: str
    count: float
    record: Record
    peak: int


@dataclass
class Plan:
    """The phases of a run, and the bytes of its weights and of what its updates add (Adam's moments)."""

    steps: int
    phases: list[Phase] = field(default_factory=list)
    weights: int = 0
    states: int = 0

    @property
    def peak(self) -> int:
        """Bytes at most."""
        return max((phase.peak for phase in self.phases), default=0)

    @property
    def flops(self) -> float:
        """Of the whole run."""
        return sum(phase.count * phase.record.flops for phase in self.phases)

    @property
    def record(self) -> Record:
        """Of the whole run."""
        return sum((phase.record.scaled(phase.count) for phase in self.phases), Record())


@dataclass(frozen=True)
class Job:
    """Something that the run does `count` times."""

    name: str
    count: float
    step: Callable[[], object]


@dataclass(frozen=True)
class Trial:
    """A trainer's networks by name, a step that is not counted and creates optimizer states, and its jobs."""

    modules: Mapping[str, nn.Module]
    warm_up: Callable[[], object]
    jobs: Sequence[Job]


@dataclass(frozen=True)
class Subject:
    """What is planned: the name of the teacher, the run, and how a trainer is built in it.

    `wrapper` is a context of the whole measurement on the meta device.
    """

    teacher: str
    run: RunOptions
    prepare: Callable[[Run, Teacher], Trial]
    wrapper: Callable[[MetaRecorder], AbstractContextManager[None]] = lambda _: nullcontext()


def make_plan(subject: Subject, dtype: torch.dtype) -> Plan:
    """The subject's jobs, each done once on the meta device with frozen networks of `dtype`."""
    plan, recorder = Plan(subject.run.steps), MetaRecorder()
    with recorder, planned_run(subject.run, dtype) as run, subject.wrapper(recorder):
        trial = subject.prepare(run, meta_teacher(subject.teacher, dtype))
        plan.weights = recorder.live
        recorder.attribute(trial.modules)
        trial.warm_up()
        plan.states = recorder.live - plan.weights
        for job in trial.jobs:
            if job.count > 0:
                with recorder.measured() as record:
                    job.step()
                plan.phases.append(Phase(job.name, job.count, record, recorder.peak))
    return plan


def groups(steps: Iterable[int], key: Callable[[int], Hashable]) -> list[tuple[int, int]]:
    """A step of each group of equal key, and how many there are; in the order of their first steps."""
    keys = {step: key(step) for step in steps}
    counts = Counter(keys.values())
    last = {value: step for step, value in keys.items()}
    return [(last[value], count) for value, count in counts.items()]


class SilentRun(Run):
    """A run that shows nothing."""

    def preview(self, name: str, images: Tensor) -> Path:
        """Writes nothing."""
        return self.directory


@contextmanager
def temporary_run(options: RunOptions) -> Iterator[SilentRun]:
    """A run in a temporary directory; the random generators are as before after it."""
    states = random_state()
    with tempfile.TemporaryDirectory() as folder:
        options = replace(options, directory=f"{folder}/run", trackers=(), overwrite=False)
        try:
            yield SilentRun(options, {}, "plan")
        finally:
            set_random_state(states)


@contextmanager
def planned_run(options: RunOptions, dtype: torch.dtype) -> Iterator[SilentRun]:
    """A temporary run on the meta device."""
    options = replace(options, device="cpu", precision="float32", compile="off", deterministic=False)
    with temporary_run(options) as run:
        run.device = torch.device("meta")
        run.precision = Precision(run.device, dtype)
        yield run
