"""Distribution matching: DMD, DMD2, Diff-Instruct, f-distill, decoupled DMD, as first-order losses on
generated latents.

DMD arXiv:2311.18828, DMD2 arXiv:2405.14867, Diff-Instruct arXiv:2305.18455, f-distill arXiv:2502.15681.
"""

from dataclasses import dataclass, replace
from typing import final

import torch

from distill.objectives.algebra import ScoreDistillation, surrogate_loss
from distill.objectives.options import ObjectiveOptions
from distill.objectives.prompts import PromptConditionings
from distill.one_step.adversarial import Divergence, GanOptions, divergence_weight
from distill.one_step.methods.base import (
    ENCODER_FLOP_FRACTION,
    Batch,
    CriticMethod,
    MethodContext,
    MethodOptions,
    Outcome,
    generate,
)
from distill.one_step.regression import Regression, RegressionOptions, load_pairs
from distill.one_step.student import Student
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class DistributionMatchingOptions(MethodOptions):
    """A first-order loss with its critic, and optionally a GAN and regression on noise-image pairs.

    A divergence other than reverse KL weighs each sample's gradient by the GAN's density ratio.
    """

    objective: ObjectiveOptions
    gan: GanOptions | None = None
    divergence: Divergence = "reverse_kl"
    regression: RegressionOptions | None = None

    def __post_init__(self) -> None:
        if self.objective.critic is None:
            raise UserError("distribution matching needs a critic: give method.objective.critic")
        if self.divergence != "reverse_kl" and self.gan is None:
            raise UserError(
                f"the divergence {self.divergence} needs the discriminator's density ratio: give method.gan"
            )
        if self.divergence != "reverse_kl" and self.gan is not None and self.gan.start:
            raise UserError(
                f"the divergence {self.divergence} needs the density ratio from the start: set gan.start=0"
            )
        if self.objective.image:
            raise UserError("objective.image weighs rendered images: a student has none, leave it 0")

    def build(self, context: MethodContext) -> "DistributionMatching":
        """As of every method."""
        return DistributionMatching(context, self)

    @property
    def critic_updates(self) -> int:
        """As of every method."""
        return 0 if self.objective.critic is None else self.objective.critic.updates

    @property
    def needs_real(self) -> bool:
        """As of every method: only a discriminator sees real images."""
        return self.gan is not None

    @property
    def needs_pairs(self) -> bool:
        """As of every method."""
        return self.regression is not None

    def unguided(
        self, critic_learning_rate: float, gan_weights: tuple[float, float]
    ) -> "DistributionMatchingOptions":
        """As of every method; a second component that holds guidance alone is dropped."""
        assert self.objective.critic is not None
        terms = tuple(replace(term, guidance=1.0) if term.guided else term for term in self.objective.terms)
        critic = replace(self.objective.critic, learning_rate=critic_learning_rate)
        objective = replace(self.objective, terms=terms, second=None, critic=critic)
        gan = self.gan
        if gan is not None:
            generator, discriminator = gan_weights
            gan = replace(gan, generator_weight=generator, discriminator_weight=discriminator, t_max=1.0)
        regression = None if self.regression is None else replace(self.regression, distance="latents")
        return replace(self, objective=objective, gan=gan, regression=regression)


@final
class DistributionMatching(CriticMethod):
    """The gradient teacher minus critic on generated latents, with its adversarial and regression losses."""

    def __init__(self, context: MethodContext, options: DistributionMatchingOptions) -> None:
        assert options.objective.critic is not None
        super().__init__(context, options.objective.critic, options.gan)
        self.objective = ScoreDistillation(context.teacher, options.objective, self.critic)
        self.divergence: Divergence = options.divergence
        self.regression: Regression | None = None
        if options.regression is not None:
            teacher, pairs = context.teacher, context.pairs
            if pairs is None:
                pairs = load_pairs(options.regression.pairs, teacher)
            self.regression = Regression(pairs, options.regression, teacher.decode, context.features)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """As of every method."""
        generated = generate(student, batch, generator)
        prompts = {
            "conditional": batch.conditioning,
            "unconditional": batch.uncond,
            "critic": batch.conditioning,
        }
        output = self.objective(generated, PromptConditionings(prompts), progress, generator)
        gradient = output.gradient
        if self.divergence != "reverse_kl":
            assert self.adversary is not None
            with torch.no_grad(), self.critic.denoiser.adapter_enabled():
                logits = self.adversary.logits(output.x_t, output.t, batch.conditioning)
            gradient = gradient * divergence_weight(self.divergence, logits)

        loss = surrogate_loss(generated, gradient)
        metrics = {"g": gradient.square().mean().sqrt()}
        if self.adversary is not None and self._generator_loss(progress):
            metrics["gan"] = self.adversary.generator_loss(generated, batch.conditioning, generator)
            loss = loss + metrics["gan"]
        if self.regression is not None:
            metrics["regression"] = self.regression(student, len(batch.noise), generator)
            loss = loss + metrics["regression"]
        return Outcome(loss, generated.detach(), {name: value.detach() for name, value in metrics.items()})

    def _generator_loss(self, progress: float) -> bool:
        """Whether the student has an adversarial loss at a fraction of the run."""
        adversary = self.adversary
        return adversary is not None and adversary.active(progress) and adversary.options.generator_weight > 0

    def cost(self, progress: float) -> float:
        """As of every method.

        Regression generates once more; the adversary evaluates the encoder, forward and back to its inputs.
        """
        nfe = sum(component.nfe(progress) for component in self.objective.options.components)
        cost = 3 + nfe + self.critic_cost(progress)
        if self._generator_loss(progress):
            cost += 2 * ENCODER_FLOP_FRACTION
        if self.divergence != "reverse_kl":
            cost += ENCODER_FLOP_FRACTION
        return cost if self.regression is None else cost + 3 * self.regression.options.batch_fraction
