"""The two protocols that every experiment rests on: a trainable denoiser, and a frozen teacher that owns
one.
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from distill.core.conditioning import Conditioning
from distill.core.identity import TeacherIdentity
from distill.core.noise import NoiseSchedule, PredictionType
from distill.core.sampling import OdeScheduler
from distill.core.score import Prediction, ScoreModel
from distill.runtime.errors import UserError
from distill.runtime.precision import Precision

# Of a conditioning's extras, for a network that takes them: CFG scales (B,); where an interval of time starts
# (B,), in [0, 1] as a flow's time.
GUIDANCE, INTERVAL_START = "guidance", "interval_start"


class Denoiser(nn.Module, ScoreModel):
    """A network with its noise schedule and parameterisation: what a student or a critic is initialised from.

    An implementation turns the network's output into a `Prediction`; nothing else branches on
    `prediction_type`. What it cannot do (LoRA, mid-block features) raises `UserError`.
    """

    network: Any  # a module, called as its implementation needs

    def __init__(self, network: Any, schedule: NoiseSchedule, prediction_type: PredictionType) -> None:
        super().__init__()
        self.network, self.schedule, self.prediction_type = network, schedule, prediction_type

    @abstractmethod
    def output(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The network's own output (B, C, h, w), float32, for x_t (B, C, h, w) at integer times (B,)."""

    @abstractmethod
    def trainable_copy(self) -> "Denoiser":
        """An independent copy in float32 whose parameters require gradients."""

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """As of every score model, differentiable; conversions are computed in float32."""
        output = self.output(x_t, t, conditioning)
        return Prediction.from_output(output, x_t, t, self.schedule, self.prediction_type)

    def denoising_loss(self, latents: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Mean squared error of the network's own target for latents (B, C, h, w) noised to times (B,).

        Uniform weights, so that the last, pure-noise level is trained too.
        """
        x_t = self.schedule.add_noise(latents, noise, t).contiguous(memory_format=torch.channels_last)
        target = self.schedule.target(latents, noise, t, self.prediction_type)
        return F.mse_loss(self.output(x_t, t, conditioning), target)

    def trainable_parameters(self) -> list[nn.Parameter]:
        """The parameters that an optimizer updates, float32."""
        return list(self.network.parameters())

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in backward, for less memory; no effect where it is not supported."""

    @contextmanager
    def adapter_enabled(self) -> Iterator[None]:
        """A LoRA is active inside the block only; a backward pass must be inside too."""
        yield

    @property
    def embedding_dim(self) -> int:
        """D of the embeddings (B, L, D) that it attends to."""
        raise UserError(f"{type(self).__name__} attends to no tokens: set objective.critic.camera=false")

    def limit_time_frequency(self, highest: float) -> None:
        """From now on the network reads its time by sinusoids of at most `highest` radians a timestep."""
        raise UserError(f"{type(self).__name__} has no time embedding of sinusoids that can be limited")

    def add_interval_start(self, features: int) -> None:
        """Give the network an input more: `INTERVAL_START`, of which 0 is the same as none, by sinusoids."""
        raise UserError(f"{type(self).__name__} takes no start of an interval: mean flow needs a U-Net")

    def with_lora(self, rank: int) -> "Denoiser":
        """The same frozen weights with a trainable LoRA."""
        raise UserError(f"{type(self).__name__} has no LoRA: use a critic of kind=copy")

    def with_guidance_embedding(self, dim: int) -> "Denoiser":
        """The same weights with the CFG scale as an input, without effect until it is trained.

        The conditioning's `extras["guidance"]` (B,) is embedded as `dim` sines and cosines.
        """
        raise UserError(
            f"{type(self).__name__} has no input for a guidance scale: "
            "set distill.student.guidance_embedding=null"
        )

    def as_x0_predictor(self, t: int) -> "Denoiser":
        """The same weights reparameterised to predict x0, exactly so at time t."""
        raise UserError(f"{type(self).__name__} cannot predict x0 directly: use parameterisation=teacher")

    def mid_block_features(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """Activations (B, C, h, w) at the bottleneck, for a discriminator."""
        raise UserError(f"{type(self).__name__} has no bottleneck for a discriminator: set method.gan=null")

    @contextmanager
    def capture_mid_block(self) -> Iterator[list[Tensor]]:
        """Collect the bottleneck activations of every call inside the block; nothing where there are none."""
        yield []


@dataclass(frozen=True)
class TeacherSource(ABC):
    """The options of a family of teachers, which load one: what a YAML file given as `teacher=` holds."""

    @abstractmethod
    def build(self, device: torch.device, dtype: torch.dtype | None) -> "Teacher":
        """The teacher on a device; `dtype` is that of its networks, or None for its default."""


class Teacher(ScoreModel):
    """A frozen diffusion model with its text and image encoders. Latents carry its scaling factor.

    Images are (B, 3, H, W) in [0, 1]; a pixel-space teacher encodes and decodes by rescaling.
    """

    denoiser: Denoiser
    scheduler: OdeScheduler
    name_or_path: str
    # What its adapters, students and pairs record; None: not identified, and then nothing is compared.
    identity: TeacherIdentity | None = None

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """The device of its parts."""

    @property
    def precision(self) -> Precision:
        """The device and the dtype of its networks' weights; what is trained beside it is float32.

        Images, latents, embeddings and predictions are float32 whatever that dtype is.
        """
        return Precision(self.device, torch.float32)

    @property
    @abstractmethod
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent at the native resolution."""

    @property
    @abstractmethod
    def resolution(self) -> int:
        """Image side in pixels at the native resolution."""

    @property
    def size_multiple(self) -> int | None:
        """What the side of its images must be a multiple of; None where it has one size alone."""
        return None

    @property
    def conditioned_on_cameras(self) -> bool:
        """Whether it reads poses, and groups of views, of a conditioning (`distill.core.views`)."""
        return False

    def check_prompt(self, prompt: str) -> None:
        """Raise `UserError` for an empty prompt, or one that the teacher cannot encode."""
        if not prompt.strip():
            raise UserError("the prompt is empty: describe the object, for example 'a red teapot'")

    def prompt_of(self, row: Mapping[str, Any]) -> str:
        """The prompt that stands for a row of a data set's metadata: its caption."""
        return str(row["text"])

    @abstractmethod
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """The conditioning of prompts, one row each; the empty prompt is the unconditional one."""

    @abstractmethod
    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (B, C, h, w) of images (B, 3, H, W) in [0, 1]; differentiable in the images."""

    @abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1] of latents (B, C, h, w); differentiable in the latents."""

    def fingerprint(self) -> str:
        """A digest of the encoders: cached latents are valid while it stays the same."""
        return hashlib.sha256(self.name_or_path.encode()).hexdigest()[:16]

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        """As of every score model."""
        return self.denoiser.predict(x_t, t, conditioning)

    def denoising_loss(self, latents: Tensor, noise: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        """The loss that its denoiser was trained with (`Denoiser.denoising_loss`)."""
        return self.denoiser.denoising_loss(latents, noise, t, conditioning)

    def enable_gradient_checkpointing(self) -> None:
        """Recompute activations in the backward pass, for less memory (`Denoiser`)."""
        self.denoiser.enable_gradient_checkpointing()

    def trainable_copy(self) -> Denoiser:
        """A copy of its denoiser to train (`Denoiser.trainable_copy`)."""
        return self.denoiser.trainable_copy()
