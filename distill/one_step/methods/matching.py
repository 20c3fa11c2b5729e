"""What a cycle of distillation does: one update of the student, then as many of what follows it.

`DistributionMatching` is any first-order loss of the algebra on what the student makes (DMD, Diff-Instruct, f-distill, ...), with the
adversarial part and regression where they are asked for; `SiD` is SiD. Trajectory methods are in `trajectory`.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from distill.core.score import Guided
from distill.objectives.algebra import PromptConditionings, ScoreDistillation, surrogate_loss
from distill.objectives.critic import Critic
from distill.objectives.options import CriticOptions, ObjectiveOptions
from distill.one_step.adversarial import (
    Adversary,
    Divergence,
    GanOptions,
    capture_mid_block,
    divergence_weight,
    frozen,
)
from distill.one_step.methods import sid as second_order
from distill.one_step.methods.sid import SecondOrderOptions
from distill.one_step.regression import Regression
from distill.one_step.student import Student
from distill.teacher.latent import Distillable

ENCODER_FLOP_FRACTION = (
    0.4  # of a U-Net's work lies up to its bottleneck (measured on shapes64's, forward and backward alike)
)


@dataclass(frozen=True)
class Batch:
    """Text states (B, L, D) of captions, the empty one's (1, L, D), real latents of those captions (B, C, h, w), noise alike."""

    states: Tensor
    empty: Tensor
    real: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Outcome:
    """A student's loss on a batch, what it generated (None where it did not), and figures to show."""

    loss: Tensor
    generated: Tensor | None
    figures: dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """A part of a cycle's batch as it was generated, and where its further draws come from."""

    outcome: Outcome
    batch: Batch
    generator: torch.Generator


class Method(ABC):
    """One way to train a student."""

    @abstractmethod
    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """What the student is to descend, at a share of the run."""

    def follow(self, made: Sequence[MicroBatch], updates: int | None = None) -> dict[str, float]:
        """Update what follows the student on what it has just generated: as often as its options say, or `updates` times."""
        return {}

    def parts(self) -> dict[str, Any]:
        """What a checkpoint must hold, by name."""
        return {}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of what follows the student."""
        return []

    @property
    def follower(self) -> Critic | None:
        """The critic, where there is one."""
        return None

    @abstractmethod
    def cost(self, progress: float) -> float:
        """U-Net work of a cycle a sample, in forward passes (F); a backward pass counts 2, through inputs alone 1."""


def generate(student: Student, batch: Batch, generator: torch.Generator) -> Tensor:
    """Latents with gradient, at one of the student's times, drawn for the whole batch; its inputs there are what it makes itself."""
    index = int(torch.randint(len(student.times), (1,), generator=generator)) if len(student.times) > 1 else 0
    return student.clean(student.simulate(batch.noise, batch.states, index, generator), index, batch.states)


def simulation_cost(student: Student) -> float:
    """Mean F of a generation with gradient: forward and backward, and the steps before it."""
    return 3 + (len(student.times) - 1) / 2


class CriticMethod(Method):
    """A method whose critic follows the student, with or without an adversary."""

    def __init__(
        self, teacher: Distillable, critic: CriticOptions, gan: GanOptions | None, batch: Batch
    ) -> None:
        self.teacher = teacher
        self.critic = Critic(teacher, critic)
        self.adversary = (
            None if gan is None else Adversary(self.critic, batch.real.shape[1:], batch.empty, gan)
        )

    def follow(self, made: Sequence[MicroBatch], updates: int | None = None) -> dict[str, float]:
        """The critic's updates, each at fresh times and noise on what was generated once; the mean losses."""
        optimizers = self.optimizers
        told: list[tuple[float, float]] = []
        for _ in range(self.critic.options.updates if updates is None else updates):
            for optimizer in optimizers:
                optimizer.zero_grad(set_to_none=True)
            for part in made:
                told.append(self._descend(part, len(made)))
            for optimizer in optimizers:
                optimizer.step()
        critic, head = (sum(values) / max(len(values), 1) for values in zip(*told, strict=True))
        return {"critic": critic} if self.adversary is None else {"critic": critic, "discriminator": head}

    def _descend(self, part: MicroBatch, count: int) -> tuple[float, float]:
        assert part.outcome.generated is not None
        batch = part.batch
        with self.critic.on(), capture_mid_block(self.critic.unet) as seen:
            loss = self.critic.loss(part.outcome.generated, batch.states, None, part.generator)
            judged = 0 * loss
            if self.adversary is not None:
                judged = self.adversary.critic_loss(seen[0], batch.real, batch.states, part.generator)
            ((loss + judged) / count).backward()
        return float(loss.detach()), float(judged.detach())

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the critic and of the head."""
        return [self.critic.optimizer] + ([] if self.adversary is None else [self.adversary.optimizer])

    @property
    def follower(self) -> Critic | None:
        """The critic."""
        return self.critic

    def parts(self) -> dict[str, Any]:
        """Critic, head and its optimizer."""
        if self.adversary is None:
            return {"critic": self.critic}
        return {
            "critic": self.critic,
            "head": self.adversary.head,
            "head_optimizer": self.adversary.optimizer,
        }

    def follow_cost(self) -> float:
        """F of the critic's updates; an adversary's sees real latents with the lower half."""
        return self.critic.options.updates * (
            3.0 if self.adversary is None else 3.0 + 3 * ENCODER_FLOP_FRACTION
        )


@final
class DistributionMatching(CriticMethod):
    """A first-order loss of the algebra on generated latents; weighted by the density ratio for another divergence than reverse KL."""

    def __init__(
        self,
        teacher: Distillable,
        objective: ObjectiveOptions,
        gan: GanOptions | None,
        divergence: Divergence,
        regression: Regression | None,
        batch: Batch,
    ) -> None:
        """`batch` shows shapes only."""
        assert objective.critic is not None
        super().__init__(teacher, objective.critic, gan, batch)
        self.objective = ScoreDistillation(teacher, objective, self.critic)
        self.divergence: Divergence = divergence
        self.regression = regression

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """The algebra's gradient on what is generated, with its adversarial and regression parts."""
        generated = generate(student, batch, generator)
        conditions = PromptConditionings(
            {"conditional": batch.states, "unconditional": batch.empty, "critic": batch.states}
        )
        outcome = self.objective(generated, conditions, progress, generator)
        gradient, figures = outcome.gradient, {}
        if self.divergence != "reverse_kl":
            assert self.adversary is not None
            with torch.no_grad(), self.critic.on():
                gradient = gradient * divergence_weight(
                    self.divergence, self.adversary.logits(outcome.x_t, outcome.t, batch.states)
                )
        loss = surrogate_loss(generated, gradient)
        figures["g"] = gradient.square().mean().sqrt()
        if self.adversary is not None and self.adversary.options.generator:
            figures["gan"] = self.adversary.generator_loss(generated, batch.states, generator)
            loss = loss + figures["gan"]
        if self.regression is not None:
            figures["regression"] = self.regression(student, len(batch.noise), generator)
            loss = loss + figures["regression"]
        return Outcome(loss, generated.detach(), {name: value.detach() for name, value in figures.items()})

    def cost(self, progress: float) -> float:
        """As of every method; regression generates once more, the adversary sees the lower half, forth and back to the inputs."""
        work = 3 + sum(part.nfe(progress) for part in self.objective.options.parts) + self.follow_cost()
        if self.adversary is not None and self.adversary.options.generator:
            work += 2 * ENCODER_FLOP_FRACTION
        if self.divergence != "reverse_kl":
            work += ENCODER_FLOP_FRACTION
        return work if self.regression is None else work + 3 * self.regression.options.share


@final
class SiD(CriticMethod):
    """Score identity distillation: the second-order loss, whose gradient runs through teacher and critic to the student."""

    def __init__(
        self, teacher: Distillable, critic: CriticOptions, options: SecondOrderOptions, batch: Batch
    ) -> None:
        super().__init__(teacher, critic, None, batch)
        self.options = options

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """SiD's loss on what is generated."""
        generated = generate(student, batch, generator)
        schedule = student.schedule
        t = second_order.times(self.options, len(generated), schedule.num_train_timesteps, generator).to(
            generated.device
        )
        x_t = schedule.add_noise(
            generated, torch.randn(generated.shape, generator=generator).to(generated), t
        )
        with self.critic.on(), frozen(self.critic.unet):
            models = [
                Guided(model, batch.empty, self.options.guidance)
                for model in (self.teacher, self.critic.score)
            ]  # type: ignore[list-item]
            told = [model.predict(x_t, t, batch.states) for model in models]
            loss = second_order.identity_loss(told[0], told[1], generated, self.options.alpha)
        return Outcome(loss, generated.detach(), {"sid": loss.detach()})

    def cost(self, progress: float) -> float:
        """Forth and back through the student, forth and back to the inputs through both models."""
        return 3 + 4 * (1 if self.options.guidance == 1 else 2) + self.follow_cost()
