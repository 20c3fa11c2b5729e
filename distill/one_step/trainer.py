"""The distillation loop: one `Run` in which a student follows a frozen teacher by any method, and is watched."""

import math
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from distill.data.folders import batches
from distill.data.latents import LatentCache
from distill.objectives.options import CriticOptions, ObjectiveOptions
from distill.one_step.adversarial import Divergence, GanOptions
from distill.one_step.critic_diagnostics import LagOptions, adapted, critic_lag
from distill.one_step.methods.matching import (
    Batch,
    DistributionMatching,
    Method,
    MicroBatch,
    SiD,
    simulation_cost,
)
from distill.one_step.methods.sid import SecondOrderOptions
from distill.one_step.methods.trajectory import (
    Consistency,
    ConsistencyOptions,
    Progressive,
    ProgressiveOptions,
)
from distill.one_step.monitor import Monitor, MonitorOptions, all_finite
from distill.one_step.regression import Regression, RegressionOptions
from distill.one_step.student import Student, StudentOptions
from distill.runtime import processes
from distill.runtime.ema import EMA
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from distill.teacher.latent import Distillable


@dataclass(frozen=True)
class MethodOptions:
    """One of `objective` (a first-order loss as data, with its critic), `second_order`, `consistency`, `progressive`, and its extras."""

    objective: ObjectiveOptions | None = None
    second_order: SecondOrderOptions | None = None
    consistency: ConsistencyOptions | None = None
    progressive: ProgressiveOptions | None = None
    critic: CriticOptions | None = None  # of second_order
    gan: GanOptions | None = None
    divergence: Divergence = "reverse_kl"
    regression: RegressionOptions | None = None

    def __post_init__(self) -> None:
        given = [
            name
            for name in ("objective", "second_order", "consistency", "progressive")
            if getattr(self, name) is not None
        ]
        if len(given) != 1:
            raise UserError(
                f"a method is one of objective, second_order, consistency, progressive: given are {', '.join(given) or 'none'}"
            )
        if self.objective is not None and self.objective.critic is None:
            raise UserError(
                "the objective of a distillation needs a critic: give objective.critic, kind copy or lora"
            )
        if self.second_order is not None and self.critic is None:
            raise UserError("second_order needs a critic: give method.critic")
        if self.objective is None and (self.gan or self.regression or self.divergence != "reverse_kl"):
            raise UserError("gan, divergence and regression belong to a method with an objective")
        if self.divergence != "reverse_kl" and self.gan is None:
            raise UserError(
                f"the divergence {self.divergence} weighs by the discriminator's density ratio: give method.gan"
            )
        if self.objective is not None and self.objective.image:
            raise UserError("objective.image weighs rendered pictures: a student has none, leave it 0")


@dataclass(frozen=True)
class OneStepOptions:
    """How a student is trained. A cycle is one update of the student and those of its critic, on `accumulate` batches of `batch`.

    Several processes (torchrun) share those batches out: their number must divide `accumulate`, and the result is the same.
    """

    method: MethodOptions
    student: StudentOptions = StudentOptions()
    batch: int = 32
    accumulate: int = 1
    learning_rate: float = 2e-4
    final_rate: float = 0.1  # share of the rates left at the end, falling as a cosine
    warmup: int = 50
    betas: tuple[float, float] = (0.9, 0.999)
    ema: float = 0.99
    precision: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the networks, by autocast; auto: bfloat16 on CUDA
    )
    compiled: Literal["auto", "on", "off"] = "auto"  # torch.compile of teacher and student; auto: on CUDA
    lag: LagOptions = field(default_factory=LagOptions)
    monitor: MonitorOptions = field(default_factory=MonitorOptions)

    def __post_init__(self) -> None:
        if self.accumulate % processes.count():
            raise UserError(
                f"accumulate is {self.accumulate}: {processes.count()} processes need a multiple of their number"
            )
        if min(self.batch, self.accumulate) < 1 or self.learning_rate <= 0 or not 0 < self.final_rate <= 1:
            raise UserError(
                "batch and accumulate must be at least 1, the learning rate positive and final_rate within (0, 1]"
            )


def make_method(
    teacher: Distillable,
    student: Student,
    options: MethodOptions,
    regression: Regression | None,
    batch: Batch,
) -> Method:
    """The method of its options; `batch` shows shapes only."""
    if options.objective is not None:
        return DistributionMatching(
            teacher, options.objective, options.gan, options.divergence, regression, batch
        )
    if options.second_order is not None:
        assert options.critic is not None
        return SiD(teacher, options.critic, options.second_order, batch)
    if options.consistency is not None:
        return Consistency(teacher, student, options.consistency)
    assert options.progressive is not None
    return Progressive(teacher, student, options.progressive)


class CriticUpdateRate:
    """The critic's updates a cycle, where they adapt, as a checkpoint holds it."""

    def __init__(self, updates: int) -> None:
        self.updates = updates

    def state_dict(self) -> dict[str, int]:
        return {"updates": self.updates}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.updates = state["updates"]


class OneStep:
    """A student, its teacher and its method; `train` runs the distillation inside a `Run`.

    Every draw of a batch is a function of the seed, the cycle, the part of its batch and how often the run was rolled back: a resumed
    run and one of several processes repeat it.
    """

    def __init__(
        self,
        run: Run,
        teacher: Distillable,
        cache: LatentCache,
        options: OneStepOptions,
        monitor: Monitor,
        regression: Regression | None = None,
        decode: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        """`decode` turns latents into images for previews, which are due with a look of the monitor."""
        self.run, self.teacher, self.cache, self.options, self.monitor, self.decode = (
            run,
            teacher,
            cache,
            options,
            monitor,
            decode,
        )
        self.student = Student.of(teacher, options.student)
        self.averaged = Student.of(teacher, options.student).requires_grad_(False).eval()
        self.method = make_method(teacher, self.student, options.method, regression, self.draw(0, 0)[0])
        self.ema = EMA(self.student, options.ema)
        self.optimizer = torch.optim.AdamW(
            self.student.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=0.0
        )
        critic = (
            options.method.critic if options.method.objective is None else options.method.objective.critic
        )
        self.pace = CriticUpdateRate(0 if critic is None else critic.updates)
        cuda = run.device.type == "cuda"
        self.half = options.precision == "bfloat16" or (options.precision == "auto" and cuda)
        if options.compiled == "on" or (options.compiled == "auto" and cuda):
            self.student.unet.compile()
            if (
                critic is None or critic.kind == "copy"
            ):  # a critic's middle is watched by hooks, which compiled code passes over
                teacher.unet.compile()
        for optimizer in (self.optimizer, *self.method.optimizers):
            processes.share_gradients(optimizer)
        self.rates = [float(group["lr"]) for group in self._groups()]
        run.track(
            student=self.student,
            optimizer=self.optimizer,
            ema=self.ema,
            monitor=monitor,
            pace=self.pace,
            **self.method.parts(),
        )

    def train(self) -> tuple[Student, Student]:
        """Run to the end; returns the averaged student and the raw one."""
        run, options = self.run, self.options
        for step in run.steps(keep_start=True):
            self._set_rates(step)
            figures, good = self.cycle(step)
            if not good:
                self._roll_back("the loss or a weight is not finite")
                continue
            run.log(**figures)
            if run.due(options.monitor.every) or run.due(run.options.checkpoint_every):
                latents = self.samples()
                told = self.monitor.look(latents)
                said = len(self.monitor.alarms)
                why = self.monitor.judge(told)
                for alarm in self.monitor.alarms[said:]:
                    print(f"{run.label}: {alarm}", file=sys.stderr)
                if why is not None:
                    self._roll_back(why)
                    continue
                run.log(**told)
                if self.decode is not None and run.due(run.options.preview_every):
                    run.preview("samples", self.decode(latents[:: options.monitor.each][:64]))
            if options.lag.every and self.pace.updates and (step + 1) % options.lag.every == 0:
                self._look_at_lag(step)
        self.ema.copy_to(self.averaged)
        return self.averaged, self.student

    def cycle(self, step: int) -> tuple[dict[str, float | Tensor], bool]:
        """One update of the student, then of what follows it; figures, and whether all is finite."""
        progress = step / self.run.options.steps
        parts = range(processes.rank(), self.options.accumulate, processes.count())
        made: list[MicroBatch] = []
        self.optimizer.zero_grad(set_to_none=True)
        for part in parts:
            batch, generator = self.draw(step, part)
            with self._autocast():
                outcome = self.method.loss(self.student, batch, progress, generator)
            (outcome.loss / len(parts)).backward()
            made.append(MicroBatch(replace(outcome, loss=outcome.loss.detach()), batch, generator))
        self.optimizer.step()
        figures: dict[str, float | Tensor] = {
            name: _mean([part.outcome.figures[name] for part in made]) for name in made[0].outcome.figures
        }
        with self._autocast():
            figures |= self.method.follow(made, self.pace.updates if self.options.lag.adapt else None)
        self.ema.update()
        good = all(math.isfinite(float(value)) for value in figures.values()) and all_finite(
            list(self.student.parameters())
        )
        return figures, processes.largest(int(not good)) == 0

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.run.device.type, torch.bfloat16, enabled=self.half)

    @torch.no_grad()
    def samples(self) -> Tensor:
        """Latents of the averaged student, for captions spread over the data, the same noise each time."""
        self.ema.copy_to(self.averaged)
        options = self.options.monitor
        chosen = (
            torch.arange(options.captions) * len(self.cache.latents) // options.captions
        ).repeat_interleave(options.each)
        generator = torch.Generator().manual_seed(1)
        noise = torch.randn(len(chosen), *self.cache.latents.shape[1:], generator=generator)
        states = self.cache.states[self.cache.caption[chosen]]
        parts = zip(noise.split(64), states.split(64), strict=True)
        return torch.cat(
            [self.averaged(n.to(self.run.device), s.to(self.run.device), generator).cpu() for n, s in parts]
        )

    @property
    def nfe(self) -> float:
        """U-Net work of the whole run a sample in F; a student of several steps generates before it learns."""
        steps = self.run.options.steps
        return sum(
            self.method.cost(step / steps) - 3 + simulation_cost(self.student) for step in range(steps)
        )

    def draw(self, step: int, part: int) -> tuple[Batch, torch.Generator]:
        """A part of a cycle's batch, and the generator that its further draws come from."""
        options, cache, device = self.options, self.cache, self.run.device
        generator = torch.Generator().manual_seed(
            hash((self.run.options.seed, step, part, self.run.rollbacks)) % 2**63
        )
        index = batches(
            len(cache.latents), options.batch * options.accumulate, step, self.run.options.seed
        ).chunk(options.accumulate)[part]
        noise = torch.randn(len(index), *cache.latents.shape[1:], generator=generator)
        values = (cache.states[cache.caption[index]], cache.states[-1:], cache.latents[index], noise)
        return Batch(*(value.to(device) for value in values)), generator

    def _groups(self) -> list[dict[str, Any]]:
        optimizers = [self.optimizer, *self.method.optimizers]
        return [group for optimizer in optimizers for group in optimizer.param_groups]

    def _set_rates(self, step: int) -> None:
        options = self.options
        fall = (
            options.final_rate
            + (1 - options.final_rate) * (1 + math.cos(math.pi * step / self.run.options.steps)) / 2
        )
        share = fall * min((step + 1) / options.warmup, 1.0) * 0.5**self.run.rollbacks
        for group, rate in zip(self._groups(), self.rates, strict=True):
            group["lr"] = rate * share

    def _roll_back(self, why: str) -> None:
        if self.run.rollbacks >= self.options.monitor.rollbacks:
            raise UserError(
                f"{why}, after {self.run.rollbacks} roll-backs: lower learning_rate or the critic's, or raise its updates"
            )
        self.run.rewind(why)

    def _look_at_lag(self, step: int) -> None:
        batch, generator = self.draw(step, self.options.accumulate - 1)
        assert self.method.follower is not None
        with torch.no_grad():
            generated = self.student(batch.noise, batch.states, generator)
        told = critic_lag(self.method.follower, generated, batch.states, generator, {"teacher": self.teacher})
        lag = max(abs(value) for value in told.values())
        if self.options.lag.adapt:
            self.pace.updates = adapted(self.pace.updates, lag, self.options.lag)
        self.run.log(lag=lag, updates=self.pace.updates)


def _mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean()
