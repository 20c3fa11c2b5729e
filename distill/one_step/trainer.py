"""The distillation loop: one `Run` in which a student learns from a frozen teacher by any method,
monitored on the way.
"""

import copy
import math
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.data.folders import batch_indices
from distill.data.prompts import PromptData
from distill.one_step.acceleration import prepare_networks, shard_networks
from distill.one_step.critic_diagnostics import (
    CriticDiagnosticsOptions,
    CriticUpdateRate,
    adapt_updates,
    critic_error,
)
from distill.one_step.methods.base import Batch, MethodContext, MethodOptions, MicroBatch, simulation_cost
from distill.one_step.monitor import Monitor, MonitorOptions, finite
from distill.one_step.regression import Pairs
from distill.one_step.student import Student, StudentOptions
from distill.one_step.updates import update_weights
from distill.runtime import processes
from distill.runtime.checkpoint import Stateful
from distill.runtime.ema import EMA
from distill.runtime.errors import UserError
from distill.runtime.optim import backward, cosine_decay, scale_learning_rates
from distill.runtime.run import Run
from distill.runtime.sharding import gathered, is_sharded
from distill.runtime.transfer import upload, upload_all

MIN_SCALE = 1.0  # of float16's losses: below it gradients overflow whatever the scale
SAMPLE_BATCH = 64  # of the monitor's samples


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
    # Fraction of the rates at the end of their decay: late noise in the weights is most of what is left.
    final_lr_scale: float = 0.02
    drop_at: float | None = None  # fraction of the run at which the rates drop to that; null: along a cosine
    warmup: int = 50  # cycles
    betas: tuple[float, float] = (0.9, 0.999)
    max_norm: float | None = None  # to which the student's gradient is clipped; null: as it is
    ema: float | None = 0.995  # null: no average is kept, the student itself is what is evaluated
    # Split the weights of all networks, and the optimizers' states, among the processes of torchrun (FSDP2):
    # for networks that do not fit one device together; slower otherwise.
    shard: bool = False
    critic_diagnostics: CriticDiagnosticsOptions = field(default_factory=CriticDiagnosticsOptions)
    monitor: MonitorOptions = field(default_factory=MonitorOptions)

    def __post_init__(self) -> None:
        rates = self.learning_rate > 0 and 0 < self.final_lr_scale <= 1
        if min(self.batch, self.accumulate) < 1 or not rates:
            raise UserError(
                "batch and accumulate must be at least 1, learning_rate positive and final_lr_scale in (0, 1]"
            )
        if self.drop_at is not None and not 0 <= self.drop_at <= 1:
            raise UserError(f"drop_at is {self.drop_at}: expected a fraction of the run in [0, 1], or null")
        if self.max_norm is not None and self.max_norm <= 0:
            raise UserError(f"max_norm is {self.max_norm}: a number above 0 is expected, or null")


class OneStep:
    """A student, its teacher and its method; `train` runs the distillation inside a `Run`.

    Every batch is a function of the seed, the cycle, the part of its batch and the number of roll-backs, so
    that a resumed run and one of several processes repeat it.
    """

    def __init__(
        self,
        run: Run,
        teacher: Teacher,
        data: PromptData,
        method: MethodOptions,
        options: OneStepOptions,
        monitor: Monitor | None,
        decode: Callable[[Tensor], Tensor] | None = None,
        features: Callable[[Tensor], Sequence[Tensor]] | None = None,
        pairs: Pairs | None = None,
    ) -> None:
        """monitor: None where `options.monitor.every` is 0. decode: latents to images for previews.

        features, pairs: as of `MethodContext`.
        """
        self.run, self.teacher, self.data, self.options = run, teacher, data, options
        self.monitor, self.decode = monitor, decode
        self.student = Student.from_teacher(teacher, options.student)
        self._needs_real, self._uncond = method.needs_real, data.uncond.to(run.device)
        example = self.micro_batch(0, 0)[0]
        context = MethodContext(teacher, self.student, example, features, pairs, run.scaler)
        self.method = method.build(context)
        self.update_rate = CriticUpdateRate(method.critic_updates)

        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=0.0
        )
        if options.shard and processes.world_size() > 1:
            self._unsharded = copy.deepcopy(self.student).cpu()
            shard_networks(run, teacher, self.student, self.method, self.optimizer)
        self.ema = None if options.ema is None else EMA(self.student, options.ema)
        self._rates = [float(group["lr"]) for group in self._param_groups()]
        prepare_networks(run, teacher, self.student, self.method)
        parts: dict[str, Stateful | None] = {"ema": self.ema, "monitor": monitor}
        parts = {"student": self.student, "optimizer": self.optimizer, **parts}
        parts |= {"update_rate": self.update_rate, **self.method.state()}
        run.track(**{name: part for name, part in parts.items() if part is not None})

    def _param_groups(self) -> list[dict[str, Any]]:
        """Those of all optimizers. Loading an optimizer's state replaces its groups: do not store them."""
        optimizers = [self.optimizer, *self.method.optimizers]
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    def train(self) -> tuple[Student, Student]:
        """Run to the end; returns the averaged student and the raw one, which are one without an average."""
        run, options = self.run, self.options
        for step in run.steps(keep_start=True):
            self.set_learning_rates(step)
            metrics, finite = self.cycle(step)
            if not finite:
                self._roll_back("the loss or a weight is not finite")
                continue
            run.log(**metrics)
            divergence = self._evaluate()
            if divergence is not None:
                self._roll_back(divergence)
                continue
            every = options.critic_diagnostics.every
            if every and self.update_rate.updates and (step + 1) % every == 0:
                self._measure_critic(step)
        raw = self.whole_student() if is_sharded(self.student) else self.student
        if self.ema is None:
            return raw, raw
        with self.ema.applied():
            averaged = self.whole_student()
        return averaged, raw

    def whole_student(self) -> Student:
        """A frozen copy of the student; of a sharded one on the CPU, whose weights the first process has."""
        if not is_sharded(self.student):
            return copy.deepcopy(self.student).requires_grad_(False)
        state = gathered(self.student.state_dict(), keep=self.run.main)
        whole = copy.deepcopy(self._unsharded).requires_grad_(False)
        if self.run.main:
            whole.load_state_dict(state)
        return whole

    def set_learning_rates(self, step: int) -> None:
        """Warm-up, decay, and half for every roll-back, on the rates of all optimizers."""
        options, steps = self.options, self.run.options.steps
        if options.drop_at is None:
            decay = cosine_decay(step, options.final_lr_scale, steps)
        else:
            decay = options.final_lr_scale if step >= options.drop_at * steps else 1.0
        factor = decay * min((step + 1) / options.warmup, 1.0) * 0.5**self.run.rollbacks
        scale_learning_rates(self._param_groups(), self._rates, factor)

    def cycle(self, step: int) -> tuple[dict[str, float | Tensor], bool]:
        """One update of the student, then of its critic; the metrics, and whether all is finite."""
        metrics, critic_metrics = self.update(step)
        finite_weights = finite(list(self.student.parameters()))
        values = [*metrics.values(), *critic_metrics.values(), finite_weights]
        # The one wait of a cycle for the device.
        *numbers, weights = torch.stack([value.double() for value in values]).tolist()

        good = bool(weights) and all(math.isfinite(number) for number in numbers)
        if self.run.scaler is not None:  # it has skipped the updates by gradients that overflowed
            good = bool(weights) and self.run.scaler.get_scale() >= MIN_SCALE
        logged = {**metrics, **dict(zip(critic_metrics, numbers[len(metrics) :], strict=True))}
        for name, number in zip(tuple(logged), numbers, strict=True):
            if not math.isfinite(number):
                del logged[name]
        return logged, processes.all_reduce_max(int(not good)) == 0

    def update(self, step: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A cycle's updates, without a wait for the device; the student's and the critic's metrics."""
        run, options = self.run, self.options
        progress = step / run.options.steps
        micro_batches = self.accumulate_gradients(step)
        update_weights([self.optimizer], options.max_norm, run.scaler)

        outcomes = [part.outcome for part in micro_batches]
        metrics = {
            name: torch.stack([outcome.metrics[name] for outcome in outcomes]).mean()
            for name in outcomes[0].metrics
        }
        updates = self.update_rate.updates if options.critic_diagnostics.adapt else None
        critic_metrics = self.method.update_critic(micro_batches, progress, updates)
        if self.ema is not None:
            self.ema.update()
        return metrics, critic_metrics

    def accumulate_gradients(self, step: int) -> list[MicroBatch]:
        """The student's gradient of a cycle, and what it has generated on the way."""
        run = self.run
        parts = range(processes.rank(), self.options.accumulate, processes.world_size())
        micro_batches: list[MicroBatch] = []
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            batch, generator = self.micro_batch(step, part)
            # Backward too: what checkpointing recomputes there must be as frozen as it was.
            with self.method.frozen_critic():
                with run.precision.autocast():
                    outcome = self.method.loss(self.student, batch, step / run.options.steps, generator)
                backward(outcome.loss / len(parts), run.scaler)
            micro_batches.append(MicroBatch(replace(outcome, loss=outcome.loss.detach()), batch, generator))
        return micro_batches

    def _evaluate(self) -> str | None:
        """Run the monitor and write previews where they are due; why the run has diverged, or None.

        The monitor is due at every checkpoint too, so that a run rolls back to a good one.
        """
        run, monitor = self.run, self.monitor
        due = run.due(run.options.checkpoint_every) or run.due(self.options.monitor.every or sys.maxsize)
        monitored = due if monitor is not None else run.due(run.options.preview_every)
        if not monitored:
            return None
        latents = self.samples()
        divergence = None if monitor is None else self._monitor(monitor, latents)
        if divergence is None and self.decode is not None and run.due(run.options.preview_every):
            run.preview("samples", self.decode(latents[:: self.options.monitor.samples_per_caption][:64]))
        return divergence

    def _monitor(self, monitor: Monitor, latents: Tensor) -> str | None:
        """Log the metrics of samples; why the run has diverged, or None."""
        metrics, warnings = monitor.evaluate(latents), len(monitor.warnings)
        divergence = monitor.check_divergence(metrics)
        for warning in monitor.warnings[warnings:]:
            print(f"{self.run.label}: {warning}", file=sys.stderr)
        if divergence is None:
            self.run.log(**metrics)
        return divergence

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Latents of the averaged student, for captions spread over the data, the same noise each time."""
        options, data, device = self.options.monitor, self.data, self.run.device
        indices = torch.arange(options.captions) * len(data) // options.captions
        indices = indices.repeat_interleave(options.samples_per_caption)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(len(indices), *self.teacher.latent_shape, generator=generator)
        size = min(options.chunk or SAMPLE_BATCH, SAMPLE_BATCH)
        latents = []
        with self.averaged(), self.run.precision.autocast():
            for part, rows in zip(noise.split(size), indices.split(size), strict=True):
                conditioning = data.conditioning_of(rows).to(device)
                latents.append(self.student(part.to(device), conditioning, generator).cpu())
        return torch.cat(latents)

    def averaged(self) -> AbstractContextManager[None]:
        """Inside the block the student has its averaged weights, where there is an average."""
        return nullcontext() if self.ema is None else self.ema.applied()

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
        options, data = self.options, self.data
        seed = self.run.options.seed
        generator = torch.Generator().manual_seed(hash((seed, step, part, self.run.rollbacks)) % 2**63)
        indices = batch_indices(len(data), options.batch * options.accumulate, step, seed)
        indices = indices.chunk(options.accumulate)[part]
        noise = torch.randn(len(indices), *self.teacher.latent_shape, generator=generator)
        real = data.latents_of(indices if self._needs_real else indices[:0])
        real, noise = upload_all([real, noise], self.run.device)
        conditioning = data.conditioning_of(indices).apply(lambda value: upload(value, self.run.device))
        return Batch(conditioning, self._uncond, real, noise), generator

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
        with torch.no_grad(), self.run.precision.autocast():
            generated = self.student(batch.noise, batch.conditioning, generator)
        others: dict[str, Any] = {"teacher": self.teacher}
        errors = critic_error(critic, generated, batch.conditioning, generator, others)
        error = max(abs(value) for value in errors.values())
        if options.adapt:
            self.update_rate.updates = adapt_updates(self.update_rate.updates, error, options)
        self.run.log(critic_error=error, updates=self.update_rate.updates)
