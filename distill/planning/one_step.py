"""The plan of a one-step distillation."""

from functools import partial

import torch

from distill.core.conditioning import Conditioning
from distill.core.teacher import Teacher
from distill.data.latents import LatentCache
from distill.one_step.recipe import OneStepRecipe, decoder
from distill.one_step.regression import Pairs
from distill.one_step.trainer import OneStep
from distill.planning.plan import Job, Subject, Trial, groups
from distill.planning.teachers import teacher_modules
from distill.runtime.run import Run

CAPTIONS = 8  # that the data is taken to have; its size changes nothing of a step


def placeholder_data(teacher: Teacher, count: int) -> LatentCache:
    """Latents and captions of the right shapes, on the CPU."""
    with torch.no_grad():
        row = teacher.encode_text([""])
    conditioning = row.apply(lambda value: torch.zeros(CAPTIONS + 1, *value.shape[1:]))
    latents = torch.zeros(1, *teacher.latent_shape).expand(count, -1, -1, -1)
    return LatentCache(latents, conditioning, torch.arange(count) % CAPTIONS)


def placeholder_pairs(teacher: Teacher, conditioning: Conditioning, count: int) -> Pairs:
    """Noise-image pairs of the right shapes."""
    values = torch.zeros(1, *teacher.latent_shape).expand(count, -1, -1, -1)
    return Pairs(values, values, conditioning, torch.zeros(count, dtype=torch.long))


def placeholder_trainer(run: Run, teacher: Teacher, recipe: OneStepRecipe) -> OneStep:
    """A distillation of placeholders, without a monitor."""
    options = recipe.distill
    data = placeholder_data(teacher, options.batch * options.accumulate)
    pairs = placeholder_pairs(teacher, data.conditioning, options.batch)
    return OneStep(
        run, teacher, data, recipe.method, options, None, features=lambda images: [images], pairs=pairs
    )


def one_step_subject(recipe: OneStepRecipe) -> Subject:
    """The cycles of a distillation, by the cost that its method states of them, and the monitor's samples."""

    def prepare(run: Run, teacher: Teacher) -> Trial:
        steps, every = recipe.run.steps, recipe.distill.monitor.every
        trainer, decode = placeholder_trainer(run, teacher, recipe), decoder(teacher)
        jobs = [
            Job("cycle", count, partial(trainer.update, step))
            for step, count in groups(range(steps), lambda step: trainer.method.cost(step / steps))
        ]
        jobs.append(Job("monitor", steps // every if every else 0, lambda: decode(trainer.samples())))
        return Trial(one_step_modules(trainer), partial(trainer.update, 0), jobs)

    return Subject(recipe.teacher, recipe.run, prepare)


def one_step_modules(trainer: OneStep) -> dict[str, torch.nn.Module]:
    """The networks of a distillation by name."""
    modules = {f"teacher: {name}": module for name, module in teacher_modules(trainer.teacher).items()}
    modules["student"] = trainer.student.denoiser.network
    critic = trainer.method.critic
    if critic is not None and critic.options.kind == "copy":
        modules["critic"] = critic.denoiser.network
    return modules
