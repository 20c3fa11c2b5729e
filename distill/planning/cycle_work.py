"""The work of a cycle of one-step distillation, counted on the meta device, beside what its method states."""

from dataclasses import dataclass, replace
from functools import partial

import torch

from distill.core.teacher import Teacher
from distill.one_step.recipe import OneStepRecipe
from distill.planning.one_step import one_step_modules, placeholder_trainer
from distill.planning.plan import Job, Subject, Trial, make_plan
from distill.runtime.run import Run


@dataclass(frozen=True)
class CycleWork:
    """Forward passes of the U-Net (F) a sample in one cycle: those its method states, and those counted."""

    step: int
    stated: float
    counted: float

    @property
    def ratio(self) -> float:
        """Counted over stated: 1 where nothing is computed twice or for nothing."""
        return self.counted / self.stated


def cycle_work(recipe: OneStepRecipe) -> list[CycleWork]:
    """Of the first cycle and, where its method states another cost for it, the last."""
    stated: dict[str, float] = {}

    def prepare(run: Run, teacher: Teacher) -> Trial:
        steps, trainer = recipe.run.steps, placeholder_trainer(run, teacher, recipe)
        batch = trainer.micro_batch(0, 0)[0]
        t = torch.zeros(len(batch.noise), dtype=torch.long, device=run.device)

        @torch.no_grad()
        def forward() -> None:
            teacher.predict(batch.noise, t, batch.conditioning)

        for step in (0, steps - 1):
            cost = trainer.method.cost(step / steps)
            if cost not in stated.values():
                stated[str(step)] = cost
        jobs = [Job(step, 1, partial(trainer.update, int(step))) for step in stated]
        return Trial(one_step_modules(trainer), lambda: None, [Job("forward", 1, forward), *jobs])

    # Recomputed activations are work that the options ask for.
    run_options = replace(recipe.run, gradient_checkpointing=False)
    plan = make_plan(Subject(recipe.teacher, run_options, prepare), torch.float32)
    flops = {phase.name: phase.record.flops / recipe.distill.accumulate for phase in plan.phases}
    forward = flops["forward"] * recipe.distill.accumulate
    return [CycleWork(int(step), cost, flops[step] / forward) for step, cost in stated.items()]
