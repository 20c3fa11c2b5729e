"""The critic: a denoiser trained on the generator's outputs (the fake score), behind the contract of every
score model.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from distill.core.conditioning import Conditioning
from distill.core.score import Prediction, ScoreModel
from distill.core.teacher import Teacher
from distill.objectives.options import CriticOptions
from distill.runtime.errors import UserError
from distill.runtime.optim import optimizer_step
from distill.runtime.processes import draw_rows
from distill.runtime.sharding import copy_values
from distill.runtime.transfer import upload_all


@final
class Critic(ScoreModel):
    """A LoRA on a teacher's denoiser, or a copy of it. Starts equal to the teacher, which itself never
    changes.

    A teacher carries one LoRA at a time: a new critic replaces the last one's. What is trained has float32
    weights and computes in the teacher's precision.
    """

    def __init__(self, teacher: Teacher, options: CriticOptions, camera_dim: int = 0) -> None:
        """camera_dim: size of the conditioning's extra `camera` (B, camera_dim), with options.camera.

        Raises `UserError` where peft is needed and not installed.
        """
        if options.camera and not camera_dim:
            raise UserError("there are no cameras here: set objective.critic.camera=false")
        self.options, self.schedule, self.precision = options, teacher.schedule, teacher.precision
        if options.kind == "lora":
            self.denoiser = teacher.denoiser.with_lora(options.rank)
        else:
            self.denoiser = teacher.trainable_copy()

        self.camera_token: nn.Linear | None = None
        if options.camera:
            self.camera_token = nn.Linear(camera_dim, self.denoiser.embedding_dim).to(teacher.device)
            nn.init.zeros_(self.camera_token.bias)
        self.optimizer = torch.optim.AdamW(
            self.parameters(), lr=options.learning_rate, betas=options.betas, weight_decay=0.0
        )

    def parameters(self) -> list[nn.Parameter]:
        """What is trained."""
        token = [] if self.camera_token is None else list(self.camera_token.parameters())
        return self.denoiser.trainable_parameters() + token

    def _with_camera(self, conditioning: Conditioning, drop_camera: Tensor | None = None) -> Conditioning:
        """The camera as one more token, embedding (B, L + 1, D); zero where `drop_camera` (B,) is true."""
        if self.camera_token is None:
            return conditioning
        if "camera" not in conditioning.extras:
            raise UserError(
                "a critic with a camera needs the camera of each sample in its conditioning: "
                "give it, or set objective.critic.camera=false"
            )
        token = self.camera_token(conditioning.extras["camera"].float()).float()
        if drop_camera is not None:
            token = torch.where(drop_camera[:, None], torch.zeros_like(token), token)
        return replace(conditioning, embedding=torch.cat([conditioning.embedding, token[:, None]], 1))

    @torch.no_grad()
    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """As of every score model, without gradient."""
        with self.denoiser.adapter_enabled(), self.precision.autocast():
            return self.denoiser.predict(x_t, t, self._with_camera(conditioning))

    def loss(self, latents: Tensor, conditioning: Conditioning, generator: torch.Generator) -> Tensor:
        """Denoising loss on latents (B, C, h, w) at uniform times in [0, T) (VSD, algorithm 1), one a group
        of views.

        Call it, and differentiate it, inside `denoiser.adapter_enabled()`.
        """
        clean = latents.detach()
        views = conditioning.views
        steps, count = self.schedule.num_train_timesteps, len(clean)
        times = draw_rows(lambda rows: torch.randint(steps, (rows,), generator=generator), count // views)
        times = times.repeat_interleave(views)
        noise = draw_rows(lambda rows: torch.randn(rows, *clean.shape[1:], generator=generator), count)
        uniform = draw_rows(lambda rows: torch.rand(rows, generator=generator), count)
        drop_camera = uniform < self.options.camera_dropout
        times, noise, drop_camera = upload_all([times, noise, drop_camera], clean.device)
        with self.precision.autocast():
            conditioning = self._with_camera(conditioning, drop_camera)
            return self.denoiser.denoising_loss(clean, noise.to(clean.dtype), times, conditioning)

    def train_on(
        self,
        latents: Tensor,
        conditioning: Conditioning,
        generator: torch.Generator,
        scaler: GradScaler | None = None,
    ) -> Tensor:
        """`updates` steps of denoising on latents (B, C, h, w), each at fresh times and noise; the last loss.

        `scaler` is the run's, which float16 needs.
        """
        for _ in range(self.options.updates):
            with self.denoiser.adapter_enabled():
                loss = self.loss(latents, conditioning, generator)
                optimizer_step(self.optimizer, loss, self.options.max_norm, scaler)
        return loss.detach()

    def state_dict(self) -> dict[str, Any]:
        """The trained parameters, in order, and the optimizer."""
        parameters = [value.detach() for value in self.parameters()]
        return {"parameters": parameters, "optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over the state of a critic of the same options."""
        for parameter, value in zip(self.parameters(), state["parameters"], strict=True):
            copy_values(parameter, value)
        self.optimizer.load_state_dict(state["optimizer"])
