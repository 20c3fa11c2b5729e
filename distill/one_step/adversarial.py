"""The adversarial loss: a discriminator on the critic's bottleneck, between noisy real and noisy generated
latents.

DMD2, arXiv:2405.14867, section 4.3; its logit is also f-distill's density ratio (arXiv:2502.15681).
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.conditioning import Conditioning
from distill.objectives.critic import Critic
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload_all

Divergence = Literal[
    "reverse_kl", "forward_kl", "jensen_shannon", "squared_hellinger", "jeffreys", "softened_reverse_kl"
]

# h(r) = r^2 f''(r) of D_f(p | q), r = p / q real over generated: the factor on the matching gradient
# (arXiv:2502.15681, table 1)
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
    """Weights of the generator's loss (on the scale that is summed over a latent) and of the
    discriminator's.
    """

    generator_weight: float = 20.0
    discriminator_weight: float = 0.1
    # The generator's loss is taken at the lowest fraction of the noise levels: near pure noise real and
    # generated latents cannot be told apart.
    t_max: float = 0.5
    start: float = 0.0  # fraction of the run from which there is a GAN at all
    width: int = 128
    learning_rate: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.t_max <= 1:
            raise UserError(
                f"gan.t_max is {self.t_max}: a fraction of the noise levels in (0, 1] is expected"
            )
        if not 0 <= self.start < 1:
            raise UserError(f"gan.start is {self.start}: a fraction of the run in [0, 1) is expected")
        weights = min(self.generator_weight, self.discriminator_weight)
        if weights < 0 or self.learning_rate <= 0 or self.width < 8:
            raise UserError(
                "a GAN needs weights of 0 or more, a positive learning_rate and a width of at least 8"
            )


@contextmanager
def no_param_grad(*modules: nn.Module) -> Iterator[None]:
    """Inside the block the parameters take no gradient; gradients to the inputs still pass through."""
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
    """Logits (B,) from bottleneck features (B, C, h, w); above 0 means real."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(channels, width, 3, padding=1)
        self.norm = nn.GroupNorm(8, width)
        self.out = nn.Linear(width, 1)

    def forward(self, features: Tensor) -> Tensor:
        """As the class says."""
        return self.out(F.silu(self.norm(self.convolution(features))).mean((2, 3)))[:, 0]


class Adversary:
    """A discriminator on a critic's bottleneck, with its optimizer and its weights."""

    def __init__(self, critic: Critic, shape: torch.Size, uncond: Conditioning, options: GanOptions) -> None:
        """shape (C, h, w) of a latent; uncond: one row, for its shape."""
        self.critic, self.options = critic, options
        device = uncond.embedding.device
        with torch.no_grad():
            t = torch.zeros(1, dtype=torch.long, device=device)
            features = critic.denoiser.mid_block_features(torch.zeros(1, *shape, device=device), t, uncond)
        self.head = Discriminator(features.shape[1], options.width).to(device)
        self.optimizer = torch.optim.AdamW(self.head.parameters(), lr=options.learning_rate, weight_decay=0.0)

    def active(self, progress: float) -> bool:
        """Whether its losses count at a fraction of the run."""
        return progress >= self.options.start

    def add_noise(
        self, latents: Tensor, generator: torch.Generator, t_max: float = 1.0
    ) -> tuple[Tensor, Tensor]:
        """Latents noised to random times below t_max T, and the times (B,)."""
        levels = max(round(t_max * self.critic.schedule.num_train_timesteps), 1)
        t = torch.randint(levels, (len(latents),), generator=generator)
        noise = torch.randn(latents.shape, generator=generator)
        t, noise = upload_all([t, noise], latents.device)
        return self.critic.schedule.add_noise(latents, noise.to(latents.dtype), t), t

    def logits(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Of noisy latents (B, C, h, w), with gradient; call it with the critic's adapter enabled."""
        return self.head(self.critic.denoiser.mid_block_features(x_t, t, conditioning)).float()

    def generator_loss(
        self, generated: Tensor, conditioning: Conditioning, generator: torch.Generator
    ) -> Tensor:
        """Weighted softplus(-logit) of generated latents, with gradient to them only."""
        denoiser = self.critic.denoiser
        with denoiser.adapter_enabled(), no_param_grad(denoiser.network, self.head):
            x_t, t = self.add_noise(generated, generator, self.options.t_max)
            return self.options.generator_weight * F.softplus(-self.logits(x_t, t, conditioning)).mean()

    def discriminator_loss(
        self, features: Tensor, real: Tensor, conditioning: Conditioning, generator: torch.Generator
    ) -> Tensor:
        """Weighted softplus(logit) of generated plus softplus(-logit) of real latents.

        features: the bottleneck of the generated latents, from the critic's denoising loss.
        """
        real_logits = self.logits(*self.add_noise(real, generator), conditioning)
        loss = F.softplus(self.head(features).float()).mean() + F.softplus(-real_logits).mean()
        return self.options.discriminator_weight * loss


def divergence_weight(name: Divergence, logits: Tensor, bounds: tuple[float, float] = (0.1, 20.0)) -> Tensor:
    """h(r) (B, 1, 1, 1) at r = exp(logit), clipped to `bounds`, without gradient."""
    ratio = logits.detach().float().exp().clamp(*bounds)
    return WEIGHTS[name](ratio)[:, None, None, None]
