"""The distillation loop: one `Run` in which a student learns from a frozen teacher by any method,
monitored on the way.
"""

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.data.folders import batch_indices
from distill.data.latents import LatentCache
from distill.one_step.critic_diagnostics import (
    CriticDiagnosticsOptions,
    CriticUpdateRate,
    adapt_updates,
    critic_error,
)
from distill.one_step.methods.base import Batch, MethodContext, MethodOptions, MicroBatch, simulation_cost
from distill.one_step.monitor import Monitor, MonitorOptions, all_finite
from distill.one_step.regression import Pairs
from distill.one_step.student import Student, StudentOptions
from distill.runtime import processes
from distill.runtime.ema import EMA
from distill.runtime.errors import UserError
from distill.runtime.optim import cosine_decay, scale_learning_rates
from distill.runtime.run import Run


@dataclass(frozen=True)
class OneStepOptions:
    """How a student is trained.

    A cycle is one update of the student and those of its critic, on `accumulate` batches of `batch`. Several
    processes (torchrun) divide those batches: their number must divide `accumulate`; the result is the same.
    """

    student: StudentOptions = StudentOptions()
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 3e-4
    # Fraction of the rates at the end of the cosine decay: late noise in the weights is most of what is left.
    final_rate: float = 0.02
    warmup: int = 50  # cycles
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float = 0.995
    critic_diagnostics: CriticDiagnosticsOptions = field(default_factory=CriticDiagnosticsOptions)
    monitor: MonitorOptions = field(default_factory=MonitorOptions)

    def __post_init__(self) -> None:
        rates = self.learning_rate > 0 and 0 < self.final_rate <= 1
        if min(self.batch, self.accumulate) < 1 or not rates:
            raise UserError(
                "batch and accumulate must be at least 1, learning_rate positive and final_rate in (0, 1]"
            )


class OneStep:
    """A student, its teacher and its method; `train` runs the distillation inside a `Run`.

    Every batch is a function of the seed, the cycle, the part of its batch and the number of roll-backs, so
    that a resumed run and one of several processes repeat it.
    """

    def __init__(
        self,
        run: Run,
        teacher: Teacher,
        cache: LatentCache,
        method: MethodOptions,
        options: OneStepOptions,
        monitor: Monitor,
        decode: Callable[[Tensor], Tensor] | None = None,
        features: Callable[[Tensor], Sequence[Tensor]] | None = None,
        pairs: Pairs | None = None,
    ) -> None:
        """decode: latents to images for previews. features, pairs: as of `MethodContext`."""
        self.run, self.teacher, self.cache, self.options = run, teacher, cache, options
        self.monitor, self.decode = monitor, decode
        self.student = Student.from_teacher(teacher, options.student)
        self.averaged = Student.from_teacher(teacher, options.student).requires_grad_(False).eval()
        example = self.micro_batch(0, 0)[0]
        self.method = method.build(MethodContext(teacher, self.student, example, features, pairs))
        self.update_rate = CriticUpdateRate(method.critic_updates)

        self.ema = EMA(self.student, options.ema)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=0.0
        )
        if run.compiled:
            self._compile()
        for optimizer in (self.optimizer, *self.method.optimizers):
            processes.average_gradients(optimizer)
        self._rates = [float(group["lr"]) for group in self._param_groups()]
        run.track(student=self.student, optimizer=self.optimizer, ema=self.ema, monitor=monitor)
        run.track(update_rate=self.update_rate, **self.method.state())

    def _compile(self) -> None:
        self.student.denoiser.network.compile()
        critic = self.method.critic
        # A LoRA shares the teacher's network, whose bottleneck hooks compiled code would skip.
        if critic is None or critic.options.kind == "copy":
            self.teacher.denoiser.network.compile()

    def _param_groups(self) -> list[dict[str, Any]]:
        """Those of all optimizers. Loading an optimizer's state replaces its groups: do not store them."""
        optimizers = [self.optimizer, *self.method.optimizers]
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    def train(self) -> tuple[Student, Student]:
        """Run to the end; returns the averaged student and the raw one."""
        run, options = self.run, self.options
        for step in run.steps(keep_start=True):
            self.set_learning_rates(step)
            metrics, finite = self.cycle(step)
            if not finite:
                self._roll_back("the loss or a weight is not finite")
                continue
            run.log(**metrics)
            if run.due(options.monitor.every) or run.due(run.options.checkpoint_every):
                divergence = self._evaluate()
                if divergence is not None:
                    self._roll_back(divergence)
                    continue
            every = options.critic_diagnostics.every
            if every and self.update_rate.updates and (step + 1) % every == 0:
                self._measure_critic(step)
        self.ema.copy_to(self.averaged)
        return self.averaged, self.student

    def set_learning_rates(self, step: int) -> None:
        """Warm-up, cosine decay, and half for every roll-back, on the rates of all optimizers."""
        decay = cosine_decay(step, self.options.final_rate, self.run.options.steps)
        factor = decay * min((step + 1) / self.options.warmup, 1.0) * 0.5**self.run.rollbacks
        scale_learning_rates(self._param_groups(), self._rates, factor)

    def cycle(self, step: int) -> tuple[dict[str, float | Tensor], bool]:
        """One update of the student, then of its critic; the metrics, and whether all is finite."""
        run = self.run
        progress = step / run.options.steps
        parts = range(processes.rank(), self.options.accumulate, processes.world_size())
        micro_batches: list[MicroBatch] = []
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            batch, generator = self.micro_batch(step, part)
            with run.precision.autocast():
                outcome = self.method.loss(self.student, batch, progress, generator)
            (outcome.loss / len(parts)).backward()
            outcome = replace(outcome, loss=outcome.loss.detach())
            micro_batches.append(MicroBatch(outcome, batch, generator))
        self.optimizer.step()

        outcomes = [part.outcome for part in micro_batches]
        metrics: dict[str, float | Tensor] = {
            name: torch.stack([outcome.metrics[name] for outcome in outcomes]).mean()
            for name in outcomes[0].metrics
        }
        updates = self.update_rate.updates if self.options.critic_diagnostics.adapt else None
        with run.precision.autocast():
            metrics |= self.method.update_critic(micro_batches, updates)
        self.ema.update()

        finite = all(math.isfinite(float(value)) for value in metrics.values())
        finite = finite and all_finite(list(self.student.parameters()))
        return metrics, processes.all_reduce_max(int(not finite)) == 0

    def _evaluate(self) -> str | None:
        """Log the monitor's metrics; why the run has diverged, or None."""
        run, monitor = self.run, self.monitor
        latents = self.samples()
        metrics, warnings = monitor.evaluate(latents), len(monitor.warnings)
        divergence = monitor.check_divergence(metrics)
        for warning in monitor.warnings[warnings:]:
            print(f"{run.label}: {warning}", file=sys.stderr)
        if divergence is None:
            run.log(**metrics)
            if self.decode is not None and run.due(run.options.preview_every):
                run.preview("samples", self.decode(latents[:: monitor.options.samples_per_caption][:64]))
        return divergence

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Latents of the averaged student, for captions spread over the data, the same noise each time."""
        self.ema.copy_to(self.averaged)
        options, device = self.options.monitor, self.run.device
        indices = torch.arange(options.captions) * len(self.cache) // options.captions
        indices = indices.repeat_interleave(options.samples_per_caption)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(len(indices), *self.cache.latents.shape[1:], generator=generator)
        batches = zip(noise.split(64), self.cache.conditioning_of(indices).split(64), strict=True)
        return torch.cat([self.averaged(n.to(device), c.to(device), generator).cpu() for n, c in batches])

    @property
    def nfe(self) -> float:
        """U-Net work of the whole run a sample in F; a student of several steps generates before it
        learns.
        """
        steps = self.run.options.steps
        simulation = simulation_cost(self.student) - 3
        return sum(self.method.cost(step / steps) + simulation for step in range(steps))

    def micro_batch(self, step: int, part: int) -> tuple[Batch, torch.Generator]:
        """A part of a cycle's batch, and the generator of its further draws."""
        options, cache, device = self.options, self.cache, self.run.device
        seed = self.run.options.seed
        generator = torch.Generator().manual_seed(hash((seed, step, part, self.run.rollbacks)) % 2**63)
        indices = batch_indices(len(cache), options.batch * options.accumulate, step, seed)
        indices = indices.chunk(options.accumulate)[part]
        noise = torch.randn(len(indices), *cache.latents.shape[1:], generator=generator)
        batch = Batch(
            conditioning=cache.conditioning_of(indices).to(device),
            uncond=cache.uncond.to(device),
            real=cache.latents[indices].to(device),
            noise=noise.to(device),
        )
        return batch, generator

    def _roll_back(self, reason: str) -> None:
        if self.run.rollbacks >= self.options.monitor.max_rollbacks:
            raise UserError(
                f"{reason}, after {self.run.rollbacks} roll-backs: "
                "lower learning_rate or the critic's, or raise its updates"
            )
        self.run.roll_back(reason)

    def _measure_critic(self, step: int) -> None:
        """Log the critic's error, and adapt its update rate."""
        batch, generator = self.micro_batch(step, self.options.accumulate - 1)
        critic, options = self.method.critic, self.options.critic_diagnostics
        assert critic is not None
        with torch.no_grad():
            generated = self.student(batch.noise, batch.conditioning, generator)
        others: dict[str, Any] = {"teacher": self.teacher}
        errors = critic_error(critic, generated, batch.conditioning, generator, others)
        error = max(abs(value) for value in errors.values())
        if options.adapt:
            self.update_rate.updates = adapt_updates(self.update_rate.updates, error, options)
        self.run.log(critic_error=error, updates=self.update_rate.updates)
