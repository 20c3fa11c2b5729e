"""Methods on noise-image pairs of the teacher's ODE, of make_pairs.py: knowledge distillation and reflow."""

from dataclasses import dataclass, replace
from typing import final

import torch

from distill.one_step.methods.base import Batch, Method, MethodContext, MethodOptions, Outcome
from distill.one_step.regression import Pairs, Regression, RegressionOptions, load_pairs
from distill.one_step.student import Student


class PairMethodOptions(MethodOptions):
    """What both have in common: they learn from pairs alone, which have captions of their own."""

    @property
    def needs_real(self) -> bool:
        """As of every method."""
        return False

    @property
    def needs_pairs(self) -> bool:
        """As of every method."""
        return True


@dataclass(frozen=True)
class KnowledgeDistillationOptions(PairMethodOptions):
    """The student's output for a pair's noise becomes its image (Luhman & Luhman 2021, arXiv:2101.02388)."""

    regression: RegressionOptions

    def build(self, context: MethodContext) -> "KnowledgeDistillation":
        """As of every method."""
        return KnowledgeDistillation(context, self)

    def unguided(
        self, critic_learning_rate: float, gan_weights: tuple[float, float]
    ) -> "KnowledgeDistillationOptions":
        """As of every method: guidance is that of the pairs."""
        return replace(self, regression=replace(self.regression, distance="latents"))


@final
class KnowledgeDistillation(Method):
    """Regression alone, in one of its distances."""

    def __init__(self, context: MethodContext, options: KnowledgeDistillationOptions) -> None:
        pairs = context.pairs or load_pairs(options.regression.pairs, context.teacher)
        self.options = options
        self.regression = Regression(pairs, options.regression, context.teacher.decode, context.features)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """As of every method; the batch gives the number of pairs."""
        loss = self.regression(student, len(batch.noise), generator)
        return Outcome(loss, None, {"regression": loss.detach()})

    def cost(self, progress: float) -> float:
        """As of every method: student forward and backward."""
        return 3 * self.options.regression.batch_fraction


@dataclass(frozen=True)
class ReflowOptions(PairMethodOptions):
    """Rectified flow on pairs: the student's ODE becomes straight (Liu et al. 2022, arXiv:2209.03003).

    Another round: make pairs with the trained student as the teacher. InstaFlow (Liu et al. 2023,
    arXiv:2309.06380) is one or two rounds, then knowledge distillation on the last one's pairs.
    """

    pairs: str  # a folder of make_pairs.py

    def build(self, context: MethodContext) -> "Reflow":
        """As of every method."""
        return Reflow(context, self)

    @property
    def from_last_level(self) -> bool:
        """As of every method."""
        return True


@final
class Reflow(Method):
    """Flow matching between the two ends of a pair, in place of independent noise and image."""

    def __init__(self, context: MethodContext, options: ReflowOptions) -> None:
        self.pairs: Pairs = context.pairs or load_pairs(options.pairs, context.teacher)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """Half the squared error of eps - x0 (eq. 1), at times uniform on (1 - s) x0 + s eps."""
        count, device = len(batch.noise), batch.noise.device
        noise, latents, conditioning = self.pairs.sample(count, generator, device)

        schedule, last = student.schedule, torch.tensor([student.timesteps[0]])
        highest = float(schedule.sigma(last) / (schedule.alpha(last) + schedule.sigma(last)))
        s = highest * torch.rand(count, generator=generator).clamp_min(1e-4)
        t = schedule.sigma_to_t(s / (1 - s)).to(device)
        prediction = student.predict(schedule.add_noise(latents, noise, t), t, conditioning)
        loss = (prediction.flow - (noise - latents)).square().sum((1, 2, 3)).mean() / 2
        return Outcome(loss, None, {"reflow": loss.detach()})

    def cost(self, progress: float) -> float:
        """As of every method: student forward and backward."""
        return 3.0
