"""What a cycle of distillation costs beside its floor, the forward passes that its method states."""

import torch

from distill.one_step.trainer import OneStep
from distill.runtime.timing import Timing, measure


def time_cycle(trainer: OneStep, runs: int) -> tuple[list[Timing], float]:
    """A forward pass at the cycle's batch (F), an update (3 F), a whole cycle; and the cycle over its stated
    F.

    All in one run, so that the ratio holds on a noisy machine.
    """
    batch, generator = trainer.micro_batch(0, 0)
    denoiser, count = trainer.student.denoiser, len(batch.noise)
    t = torch.randint(denoiser.schedule.num_train_timesteps, (count,), generator=generator)
    t = t.to(batch.noise.device)
    noise = torch.randn(batch.noise.shape, generator=generator).to(batch.noise)

    @torch.no_grad()
    def forward() -> None:
        trainer.teacher.predict(batch.noise, t, batch.conditioning)

    def update() -> None:
        denoiser.denoising_loss(batch.noise, noise, t, batch.conditioning).backward()

    timings = [
        measure("one forward pass (F)", forward, runs),
        measure("forward and backward (3 F)", update, runs),
        measure("a cycle", lambda: trainer.cycle(0), runs),
    ]
    stated = trainer.nfe / trainer.run.options.steps * trainer.options.accumulate
    return timings, timings[2].median / (stated * timings[0].median)


def profile_cycle(trainer: OneStep, rows: int = 12) -> str:
    """The operators of a cycle by their own time, from torch's profiler."""
    with torch.profiler.profile() as profile:
        trainer.cycle(0)
    averages = profile.key_averages()
    return averages.table(sort_by="self_cpu_time_total", row_limit=rows, max_name_column_width=40)
