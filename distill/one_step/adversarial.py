"""The adversarial part: a head on the critic's bottleneck that tells noisy real latents from noisy generated ones.

DMD2, arXiv:2405.14867, section 4.3; its logit is also the density ratio that f-distill weighs by (arXiv:2502.15681).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.objectives.critic import Critic
from distill.runtime.errors import UserError

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger", "jeffreys", "softened_reverse_kl"
]

# h(r) = r^2 f''(r) of D_f(p | q), r = p / q real over generated: what the matching gradient is multiplied by (arXiv:2502.15681, table 1)
WEIGHTS: dict[Divergence, Callable[[Tensor], Tensor]] = {
    "reverse_kl": torch.ones_like,
    "forward_kl": lambda r: r,
    "jensen_shannon": lambda r: r / (1 + r),
    "squared_hellinger": lambda r: r.sqrt() / 4,
    "jeffreys": lambda r: 1 + r,
    "softened_reverse_kl": lambda r: 1 / (1 + r),
}


@dataclass(frozen=True)
class GanOptions:
    """Weights on the loss of the generator (on the scale that is summed over a latent) and of the critic (on the mean scale).

    The generator is told at the lowest `high` of the noise levels: near pure noise real and generated look alike.
    """

    generator: float = 1.0
    critic: float = 0.01
    high: float = 1.0
    width: int = 128
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.high <= 1:
            raise UserError(f"gan.high is {self.high}: a share of the noise levels in (0, 1] is expected")
        if min(self.generator, self.critic) < 0 or self.learning_rate <= 0 or self.width < 8:
            raise UserError(
                "the adversarial weights must not be negative, its learning rate positive and its width at least 8"
            )


class _Reached(Exception):
    """The bottleneck has been computed; what lies above is not needed."""


def bottleneck(unet: Any, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
    """Activations (B, C, h, w) in the middle of a U-Net; its upper half is not evaluated."""
    seen: list[Tensor] = []

    def stop(module: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        seen.append(output)
        raise _Reached

    handle = unet.mid_block.register_forward_hook(stop)
    try:
        unet(x_t.to(unet.dtype), t, encoder_hidden_states=states.to(unet.dtype))
    except _Reached:
        pass
    finally:
        handle.remove()
    return seen[0].float()


@contextmanager
def capture_mid_block(unet: Any) -> Iterator[list[Tensor]]:
    """Notes the bottleneck of every call within: what a denoising loss computes anyway."""
    seen: list[Tensor] = []
    handle = unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append(output.float()))
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def frozen(*modules: nn.Module) -> Iterator[None]:
    """Their parameters take no gradient within; what flows through them does."""
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


@final
class Discriminator(nn.Module):
    """Logits (B,) from a bottleneck (B, C, h, w): above 0 says real."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.out = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """As the class says."""
        return self.out(F.silu(self.norm(self.convolution(features))).mean((2, 3)))[:, 0]


class Adversary:
    """The head on a critic's bottleneck, its optimizer and its weights."""

    def __init__(self, critic: Critic, shape: torch.Size, states: Tensor, options: GanOptions) -> None:
        """shape (C, h, w) of a latent; states (1, L, D) of any prompt."""
        self.critic, self.options = critic, options
        device = states.device
        with torch.no_grad():
            middle = bottleneck(
                critic.unet,
                torch.zeros(1, *shape, device=device),
                torch.zeros(1, dtype=torch.long, device=device),
                states,
            )
        self.head = Discriminator(middle.shape[1], options.width).to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=options.learning_rate, weight_decay=0.0)

    def noisy(self, latents: Tensor, generator: torch.Generator, high: float = 1.0) -> tuple[Tensor, Tensor]:
        """Latents with noise of any of the lowest `high` of the levels, and its times."""
        levels = max(round(high * self.critic.schedule.num_train_timesteps), 1)
        t = torch.randint(levels, (len(latents),), generator=generator).to(latents.device)
        noise = torch.randn(latents.shape, generator=generator).to(latents)
        return self.critic.schedule.add_noise(latents, noise, t), t

    def logits(self, x_t: Tensor, t: Tensor, states: Tensor) -> Tensor:
        """Of noisy latents (B, C, h, w), with gradient, the critic's adapter on."""
        return self.head(bottleneck(self.critic.unet, x_t, t, states))

    def generator_loss(self, generated: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
        """softplus(-logit) of what was generated, weighted; only the student is moved by it."""
        with self.critic.on(), frozen(self.critic.unet, self.head):
            seen = self.noisy(generated, generator, self.options.high)
            return self.options.generator * F.softplus(-self.logits(*seen, states)).mean()

    def critic_loss(self, middle: Tensor, real: Tensor, states: Tensor, generator: torch.Generator) -> Tensor:
        """softplus(logit) of what was generated, by the bottleneck of its denoising, plus softplus(-logit) of what is real; weighted."""
        told_real = self.logits(*self.noisy(real, generator), states)
        return self.options.critic * (F.softplus(self.head(middle)).mean() + F.softplus(-told_real).mean())


def divergence_weight(name: Divergence, logits: Tensor, bounds: tuple[float, float] = (0.1, 20.0)) -> Tensor:
    """h(r) (B, 1, 1, 1) at r = exp(logit), clipped to `bounds`, no gradient."""
    ratio = logits.detach().float().exp().clamp(*bounds)
    return WEIGHTS[name](ratio)[:, None, None, None]
