"""The plan of an adapter's training."""

from functools import partial

import torch

from distill.control.train import AdapterOptions, AdapterTrainer
from distill.core.teacher import Teacher
from distill.planning.one_step import placeholder_data
from distill.planning.plan import Job, Subject, Trial
from distill.planning.teachers import teacher_modules
from distill.runtime.run import Run, RunOptions
from distill.teacher.load import require_pipeline


def adapter_subject(teacher: str, options: AdapterOptions, run: RunOptions) -> Subject:
    """The updates of an adapter of a teacher; its evaluations are left out."""

    def prepare(run: Run, teacher: Teacher) -> Trial:
        data = placeholder_data(teacher, options.batch * options.accumulate)
        shape = (3, teacher.resolution, teacher.resolution)
        conditions = torch.zeros(1, *shape, dtype=torch.uint8).expand(len(data), -1, -1, -1)
        trainer = AdapterTrainer(run, require_pipeline(teacher), data, conditions, "planned", options)
        jobs = [Job("update", run.options.steps, partial(trainer.step, 0))]
        modules = {**teacher_modules(teacher), "adapter": trainer.adapter}
        return Trial(modules, partial(trainer.step, 0), jobs)

    return Subject(teacher, run, prepare)
