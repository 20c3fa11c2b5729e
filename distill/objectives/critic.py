"""Critics: models of what is being made, trained on it by denoising, behind the contract of every score model."""

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn

from distill.core.score import Prediction, ScoreModel
from distill.objectives.options import CriticOptions
from distill.runtime.errors import UserError
from distill.teacher.latent import Distillable, UNetDenoiser
from distill.teacher.unet import denoising_loss

ADAPTER = "critic"
CAMERA = 12  # numbers that tell a view: the upper three rows of camera to world


@final
class Critic(ScoreModel):
    """A LoRA on a teacher's U-Net, or a copy of it. Starts as the teacher, exactly; the teacher itself is never changed.

    A teacher carries one LoRA at a time: a new critic takes the place of the last.
    """

    def __init__(self, teacher: Distillable, options: CriticOptions) -> None:
        """Raises `UserError` where peft is needed and not installed."""
        self.options, self.schedule = options, teacher.schedule
        self._lora = options.kind == "lora"
        self.unet = (
            _add_lora(teacher.unet, options.rank)
            if self._lora
            else copy.deepcopy(teacher.unet).requires_grad_(True)
        )
        self.score = UNetDenoiser(self.unet, teacher.schedule, teacher.score.prediction_type)
        width = teacher.unet.config.cross_attention_dim
        self.embed = nn.Linear(CAMERA, width).to(teacher.device) if options.camera else None
        if self.embed is not None:
            nn.init.zeros_(self.embed.bias)
        self.optimizer = torch.optim.AdamW(self.parameters(), lr=options.learning_rate, weight_decay=0.0)
        with self.on():
            pass  # leaves the adapter off: the teacher answers as before

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        named = [
            value for name, value in self.unet.named_parameters() if not self._lora or f".{ADAPTER}." in name
        ]
        return named + ([] if self.embed is None else list(self.embed.parameters()))

    @contextmanager
    def on(self) -> Iterator[None]:
        """The adapter counts, and is trained, within; a backward pass must be within too."""
        if not self._lora:
            yield
            return
        self.unet.enable_adapters()
        try:
            yield
        finally:
            self.unet.disable_adapters()

    def states(self, text: Tensor, poses: Tensor | None, forget: Tensor | None = None) -> Tensor:
        """What it is told: text states (B, L, D), and with a camera one more token (B, L + 1, D) from poses (B, 12)."""
        if self.embed is None:
            return text
        if poses is None:
            raise UserError(
                "a critic with a camera must be told the view: give poses, or set objective.critic.camera=false"
            )
        token = self.embed(poses.to(text))
        if forget is not None:
            token = torch.where(forget[:, None], torch.zeros_like(token), token)
        return torch.cat([text, token[:, None]], 1)

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As the contract says; condition from `states`."""
        with self.on():
            return self.score.predict(x_t, t, condition)

    def loss(self, latents: Tensor, text: Tensor, poses: Tensor | None, generator: torch.Generator) -> Tensor:
        """Denoising of latents (B, C, h, w) at times over all of [0, T) (VSD, algorithm 1); called and differentiated within `on`."""
        clean = latents.detach()
        t = torch.randint(self.schedule.num_train_timesteps, (len(clean),), generator=generator).to(
            clean.device
        )
        noise = torch.randn(clean.shape, generator=generator).to(clean)
        forget = (torch.rand(len(clean), generator=generator) < self.options.dropout).to(clean.device)
        return denoising_loss(
            self.unet,
            self.schedule,
            (clean, noise, t, self.states(text, poses, forget)),
            self.score.prediction_type,
        )

    def train_on(
        self, latents: Tensor, text: Tensor, poses: Tensor | None, generator: torch.Generator
    ) -> float:
        """`updates` steps of denoising on latents (B, C, h, w), each at fresh times and noise; the last loss."""
        loss = latents.new_zeros(())
        for _ in range(self.options.updates):
            with self.on():
                loss = self.loss(latents, text, poses, generator)
                self.optimizer.zero_grad(set_to_none=True)
                loss.backward()
            self.optimizer.step()
        return float(loss.detach())

    def state_dict(self) -> dict[str, Any]:
        """The trained parameters, in order, and the optimizer."""
        return {
            "parameters": [value.detach() for value in self.parameters()],
            "optimizer": self.optimizer.state_dict(),
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over a state of a critic of the same options."""
        for parameter, value in zip(self.parameters(), state["parameters"], strict=True):
            parameter.copy_(value)
        self.optimizer.load_state_dict(state["optimizer"])


def _add_lora(unet: Any, rank: int) -> Any:
    try:
        from peft import LoraConfig
    except ImportError:
        raise UserError(
            "a LoRA critic needs peft: pip install peft, or set objective.critic.kind=copy"
        ) from None
    if ADAPTER in getattr(unet, "peft_config", {}):
        unet.delete_adapters(ADAPTER)
    targets = ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"]
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, init_lora_weights=True),
        adapter_name=ADAPTER,
    )
    return unet
