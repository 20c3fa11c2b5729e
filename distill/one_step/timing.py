"""What a cycle of distillation costs, beside its floor: as many forward passes of the U-Net as its method states."""

import torch

from distill.one_step.trainer import OneStep
from distill.runtime.timing import Timing, timed
from distill.teacher.unet import denoising_loss


def time_cycle(task: OneStep, runs: int) -> tuple[list[Timing], float]:
    """One forward pass at the cycle's batch (F), one update of a U-Net (3 F), a whole cycle; and the cycle over its stated F.

    All in one run, so that the ratio holds on a noisy machine.
    """
    batch, generator = task.draw(0, 0)
    unet, schedule = task.student.unet, task.student.schedule
    t = torch.randint(schedule.num_train_timesteps, (len(batch.noise),), generator=generator).to(
        batch.noise.device
    )
    noise = torch.randn(batch.noise.shape, generator=generator).to(batch.noise)

    @torch.no_grad()
    def forward() -> None:
        task.teacher.predict(batch.noise, t, batch.states)

    def update() -> None:
        denoising_loss(
            unet, schedule, (batch.real, noise, t, batch.states), task.student.prediction_type
        ).backward()

    told = [
        timed("one forward pass (F)", forward, runs),
        timed("forward and backward (3 F)", update, runs),
        timed("a cycle", lambda: task.cycle(0), runs),
    ]
    stated = task.nfe / task.run.options.steps * task.options.accumulate
    return told, told[2].median / (stated * told[0].median)


def profile_cycle(task: OneStep, rows: int = 12) -> str:
    """The operators that a cycle spends its time in, their own time, by torch's profiler."""
    with torch.profiler.profile() as profile:
        task.cycle(0)
    return profile.key_averages().table(
        sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40
    )
