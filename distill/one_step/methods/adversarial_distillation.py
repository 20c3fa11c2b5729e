"""Latent adversarial diffusion distillation (LADD, Sauer et al. 2024, arXiv:2403.12015).

The student is trained by a discriminator alone, whose heads read the frozen teacher's features of noisy
latents. Nothing tracks the student's distribution, and no score is matched.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from diffusers.models import Transformer2DModel
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.conditioning import Conditioning
from distill.core.teacher import Denoiser
from distill.one_step.adversarial import Discriminator, no_param_grad
from distill.one_step.methods.base import (
    Batch,
    Method,
    MethodContext,
    MethodOptions,
    MicroBatch,
    Outcome,
    generate,
)
from distill.one_step.regression import Pairs, load_pairs
from distill.one_step.student import Student
from distill.one_step.updates import update_weights
from distill.runtime.checkpoint import Stateful
from distill.runtime.errors import UserError
from distill.runtime.optim import backward
from distill.runtime.transfer import upload_all


@dataclass(frozen=True)
class AdversarialDistillationOptions(MethodOptions):
    """The heads, the noise levels at which they judge, and what is real to them."""

    width: int = 128
    learning_rate: float = 1e-3  # of the heads
    updates: int = 2  # of the heads a cycle
    logit_mean: float = -1.0  # of t / T, logit-normal (section 4.2), wide, as found on the mixture
    logit_std: float = 2.0
    # a folder of make_pairs.py, whose images are the real ones, as in the paper; null: the data
    pairs: str | None = None

    def __post_init__(self) -> None:
        if self.width < 8 or self.updates < 1 or min(self.learning_rate, self.logit_std) <= 0:
            raise UserError(
                "adversarial distillation needs a width of at least 8, updates of at least 1 and a positive "
                "learning_rate and logit_std"
            )

    def build(self, context: MethodContext) -> "AdversarialDistillation":
        """As of every method."""
        return AdversarialDistillation(context, self)

    @property
    def needs_real(self) -> bool:
        """As of every method."""
        return self.pairs is None

    @property
    def needs_pairs(self) -> bool:
        """As of every method."""
        return self.pairs is not None

    def unguided(
        self, critic_learning_rate: float, gan_weights: tuple[float, float]
    ) -> "AdversarialDistillationOptions":
        """As of every method; data are without guidance."""
        return replace(self, pairs=None)


def block_features(denoiser: Denoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> list[Tensor]:
    """Outputs (B, D, h, w) of a denoiser's transformer blocks, with gradient to x_t; of a network without
    any, of its bottleneck.
    """
    modules = [module for module in denoiser.network.modules() if isinstance(module, Transformer2DModel)]
    values: list[Tensor] = []

    def collect(module: nn.Module, inputs: Any, output: Any) -> None:
        values.append((output if isinstance(output, Tensor) else output[0]).float())

    handles = [module.register_forward_hook(collect) for module in modules or [denoiser.bottleneck]]
    try:
        denoiser.output(x_t, t, conditioning)
    finally:
        for handle in handles:
            handle.remove()
    return values


@final
class AdversarialDistillation(Method):
    """Hinge losses: heads above 1 on real and below -1 on generated latents, the student raises them."""

    def __init__(self, context: MethodContext, options: AdversarialDistillationOptions) -> None:
        self.options, self.scaler = options, context.scaler
        self.denoiser = context.teacher.denoiser
        self.pairs: Pairs | None = None
        if options.pairs is not None:
            self.pairs = context.pairs or load_pairs(options.pairs, context.teacher)
        with torch.no_grad():
            example, t = context.example, torch.zeros(1, dtype=torch.long, device=context.teacher.device)
            features = block_features(self.denoiser, example.noise[:1], t, example.uncond)
        heads = [Discriminator(value.shape[1], options.width) for value in features]
        self.heads = nn.ModuleList(heads).to(context.teacher.device)
        self.optimizer = torch.optim.AdamW(
            self.heads.parameters(), lr=options.learning_rate, weight_decay=0.0
        )

    def logits(self, latents: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
        """Of each head (B, heads) for latents (B, C, h, w) noised to random levels; above 0 means real."""
        options, schedule = self.options, self.denoiser.schedule
        normal = torch.randn(len(latents), generator=generator)
        fraction = torch.sigmoid(options.logit_mean + options.logit_std * normal)
        t = (fraction * (schedule.num_train_timesteps - 1)).round().long()
        noise = torch.randn(latents.shape, generator=generator)
        t, noise = upload_all([t, noise], latents.device)
        x_t = schedule.add_noise(latents, noise.to(latents.dtype), t)
        features = block_features(self.denoiser, x_t, t, conditioning)
        return torch.stack([head(value) for head, value in zip(self.heads, features, strict=True)], 1)

    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """Minus the mean logit of what the student generates (section 4)."""
        generated = generate(student, batch, generator)
        with no_param_grad(self.denoiser.network, self.heads):
            loss = -self.logits(generated, batch.conditioning, generator).mean()
        return Outcome(loss, generated.detach(), {"gan": loss.detach()})

    def update_critic(
        self, micro_batches: Sequence[MicroBatch], progress: float, updates: int | None = None
    ) -> dict[str, Tensor]:
        """Train the heads, at fresh noise on the same generated latents."""
        losses = []
        for _ in range(self.options.updates):
            self.optimizer.zero_grad(set_to_none=True)
            for part in micro_batches:
                loss = self.discriminator_loss(part)
                backward(loss / len(micro_batches), self.scaler)
                losses.append(loss.detach())
            update_weights([self.optimizer], None, self.scaler)
        return {"discriminator": torch.stack(losses).double().mean()}

    def discriminator_loss(self, part: MicroBatch) -> Tensor:
        """Hinge loss on a part's generated latents and as many real ones."""
        batch, generator, generated = part.batch, part.generator, part.outcome.generated
        assert generated is not None
        real, conditioning = batch.real, batch.conditioning
        if self.pairs is not None:
            _, real, conditioning = self.pairs.sample(len(generated), generator, generated.device)
        with no_param_grad(self.denoiser.network):
            of_real = self.logits(real, conditioning, generator)
            of_generated = self.logits(generated, batch.conditioning, generator)
        return F.relu(1 - of_real).mean() + F.relu(1 + of_generated).mean()

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the heads."""
        return [self.optimizer]

    def state(self) -> dict[str, Stateful]:
        """The heads and their optimizer."""
        return {"heads": self.heads, "head_optimizer": self.optimizer}

    def cost(self, progress: float) -> float:
        """As of every method: forward and backward through the student, to the teacher's inputs; the heads'
        updates.
        """
        return 3 + 2 + 2 * self.options.updates
