"""What a method of one-step distillation is: a loss of the student, and updates of the critic that tracks
it.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from distill.core.conditioning import Conditioning
from distill.core.teacher import Teacher
from distill.objectives.critic import Critic
from distill.objectives.options import CriticOptions
from distill.one_step.adversarial import Adversary, GanOptions, no_param_grad
from distill.one_step.regression import Pairs
from distill.one_step.student import Student
from distill.one_step.updates import update_weights
from distill.runtime.checkpoint import Stateful
from distill.runtime.optim import backward

# Of a U-Net's work, up to its bottleneck (measured on shapes64_text's, forward and backward alike).
ENCODER_FLOP_FRACTION = 0.4


@dataclass(frozen=True)
class Batch:
    """Captions' conditioning (B rows), the empty prompt's (1 row), real latents of the captions (B, C, h, w),
    noise.

    Without rows of `real` where the method reads none (`MethodOptions.needs_real`).
    """

    conditioning: Conditioning
    uncond: Conditioning
    real: Tensor
    noise: Tensor


@dataclass(frozen=True)
class Outcome:
    """A student's loss on a batch, the latents it generated (None where it generates none), and metrics to
    log.
    """

    loss: Tensor
    generated: Tensor | None
    metrics: dict[str, Tensor]


@dataclass(frozen=True)
class MicroBatch:
    """A part of a cycle's batch with its outcome, and the generator of its further draws."""

    outcome: Outcome
    batch: Batch
    generator: torch.Generator


class Method(ABC):
    """One way to train a student."""

    @abstractmethod
    def loss(self, student: Student, batch: Batch, progress: float, generator: torch.Generator) -> Outcome:
        """The student's loss at a fraction of the run."""

    def update_critic(
        self, micro_batches: Sequence[MicroBatch], progress: float, updates: int | None = None
    ) -> dict[str, Tensor]:
        """Train the critic on what was just generated: as often as its options say, or `updates` times.

        Returns the mean losses, float64 scalars on the device.
        """
        return {}

    def frozen_critic(self) -> AbstractContextManager[None]:
        """Inside the block, which holds the student's loss and its backward pass, the critic is frozen."""
        return nullcontext()

    def state(self) -> dict[str, Stateful]:
        """What a checkpoint must hold, by name."""
        return {}

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Those of the critic and its discriminator."""
        return []

    @property
    def critic(self) -> Critic | None:
        """The critic, where there is one."""
        return None

    @property
    def copies(self) -> list[Student]:
        """Further networks of the student's kind, which it keeps."""
        return []

    @property
    def through_critic(self) -> bool:
        """Whether the student's gradient passes through the critic."""
        return False

    @abstractmethod
    def cost(self, progress: float) -> float:
        """U-Net work of a cycle a sample in F, one forward pass; a backward pass counts 2, through inputs
        alone 1.
        """


@dataclass(frozen=True)
class MethodContext:
    """What a method is built from. `example` gives shapes only.

    features: image layers of a perceptual distance, where there is a network for it. pairs: noise-image pairs
    in place of those on disk. scaler: the run's, for float16.
    """

    teacher: Teacher
    student: Student
    example: Batch
    features: Callable[[Tensor], Sequence[Tensor]] | None = None
    pairs: Pairs | None = None
    scaler: GradScaler | None = None


@dataclass(frozen=True)
class MethodOptions(ABC):
    """The options of a method, which build it."""

    @abstractmethod
    def build(self, context: MethodContext) -> Method:
        """The method itself."""

    @property
    def critic_updates(self) -> int:
        """Updates of the critic a cycle; 0 without a critic."""
        return 0

    @property
    def needs_real(self) -> bool:
        """Whether it learns from real images, not from their captions alone."""
        return True

    @property
    def needs_pairs(self) -> bool:
        """Whether it learns from noise-image pairs."""
        return False

    @property
    def from_last_level(self) -> bool:
        """Whether its student starts at the schedule's last level (distill.student.sigma_max=null)."""
        return False

    def unguided(self, critic_learning_rate: float, gan_weights: tuple[float, float]) -> "MethodOptions":
        """The same method without guidance, whose target is then the teacher's own distribution.

        For studies on closed-form teachers, with a critic's learning rate and GAN weights of their own.
        """
        return self


def generate(student: Student, batch: Batch, generator: torch.Generator) -> Tensor:
    """Latents with gradient at one of the student's timesteps; its inputs there come from backward
    simulation.
    """
    steps = len(student.timesteps)
    index = int(torch.randint(steps, (1,), generator=generator)) if steps > 1 else 0
    x_t = student.backward_simulation(batch.noise, batch.conditioning, index, generator)
    return student.predict_x0(x_t, index, batch.conditioning)


def simulation_cost(student: Student) -> float:
    """Mean F of a generation with gradient: forward, backward, and the steps before it."""
    return 3 + (len(student.timesteps) - 1) / 2


class CriticMethod(Method):
    """A method whose critic tracks the student, with or without an adversary."""

    def __init__(self, context: MethodContext, critic: CriticOptions, gan: GanOptions | None) -> None:
        self.teacher, self.scaler = context.teacher, context.scaler
        self._critic = Critic(context.teacher, critic)
        self.adversary: Adversary | None = None
        if gan is not None:
            self.adversary = Adversary(
                self._critic, context.example.real.shape[1:], context.example.uncond, gan
            )

    def update_critic(
        self, micro_batches: Sequence[MicroBatch], progress: float, updates: int | None = None
    ) -> dict[str, Tensor]:
        """Each update at fresh times and noise on the same generated latents."""
        options, losses = self._critic.options, []
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none=True)
        for _ in range(options.updates if updates is None else updates):
            for part in micro_batches:
                losses.append(self._backward(part, len(micro_batches), progress))
            update_weights(self.optimizers, options.max_norm, self.scaler)
        means = torch.stack(losses).double().mean(0)
        names = ["critic"] if self.adversary is None else ["critic", "discriminator"]
        return dict(zip(names, means, strict=False))

    def frozen_critic(self) -> AbstractContextManager[None]:
        """As of every method; a LoRA is frozen where it is used, as it is trainable while enabled."""
        modules: list[nn.Module] = [] if self.adversary is None else [self.adversary.head]
        if self._critic.options.kind == "copy":
            modules.append(self._critic.denoiser.network)
        return no_param_grad(*modules)

    def critic_loss(self, part: MicroBatch) -> Tensor:
        """The critic's denoising loss on a part of what was generated."""
        assert part.outcome.generated is not None
        return self._critic.loss(part.outcome.generated, part.batch.conditioning, part.generator)

    def _backward(self, part: MicroBatch, count: int, progress: float) -> Tensor:
        """Gradients of the denoising and the discriminator loss of one of `count` parts; both losses (2,)."""
        batch, denoiser = part.batch, self._critic.denoiser
        with denoiser.adapter_enabled():
            # Not around several updates: autocast keeps its copies of the weights until its end.
            with self._critic.precision.autocast(), denoiser.capture_mid_block() as features:
                loss = self.critic_loss(part)
                gan_loss = 0 * loss
                if self.adversary is not None and self.adversary.active(progress):
                    gan_loss = self.adversary.discriminator_loss(
                        features[0], batch.real, batch.conditioning, part.generator
                    )
            backward((loss + gan_loss) / count, self.scaler)
        return torch.stack([loss.detach(), gan_loss.detach()])

    @property
    def optimizers(self) -> list[torch.optim.Optimizer]:
        """Of the critic and of the discriminator."""
        optimizers: list[torch.optim.Optimizer] = [self._critic.optimizer]
        return optimizers if self.adversary is None else [*optimizers, self.adversary.optimizer]

    @property
    def critic(self) -> Critic:
        """As of every method."""
        return self._critic

    @property
    def through_critic(self) -> bool:
        """As of every method."""
        return self.adversary is not None

    def state(self) -> dict[str, Stateful]:
        """Critic, discriminator and its optimizer."""
        state: dict[str, Stateful] = {"critic": self._critic}
        if self.adversary is not None:
            state |= {"head": self.adversary.head, "head_optimizer": self.adversary.optimizer}
        return state

    def critic_cost(self, progress: float) -> float:
        """F of the critic's updates; an active adversary's evaluate the encoder on real latents."""
        active = self.adversary is not None and self.adversary.active(progress)
        return self._critic.options.updates * (3.0 + 3 * ENCODER_FLOP_FRACTION * active)
