"""What teachers made of a diffusers pipeline have in common: frozen parts, cached text embeddings, a VAE."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from distill.core.conditioning import Conditioning
from distill.core.identity import TeacherIdentity
from distill.core.noise import NoiseSchedule
from distill.core.sampling import OdeScheduler
from distill.core.teacher import Teacher
from distill.runtime.checkpoint import fingerprint
from distill.runtime.precision import Precision
from distill.teacher.denoiser import DiffusersDenoiser

TEXT_CACHE_BYTES = 256 * 2**20  # of text embeddings on the device: 1,100 prompts of Stable Diffusion 1.5


class PipelineTeacher(Teacher):
    """A frozen denoiser with text encoders.

    Its parts compute in the dtype of their weights; every method takes and returns float32.
    """

    denoiser: DiffusersDenoiser

    def __init__(
        self,
        denoiser: DiffusersDenoiser,
        scheduler: OdeScheduler,
        modules: Sequence[Any],
        name_or_path: str = "",
        identity: TeacherIdentity | None = None,
    ) -> None:
        """modules: all networks, which are frozen. The schedule is the denoiser's."""
        for module in modules:
            module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.denoiser, self.scheduler = denoiser, scheduler
        self.schedule: NoiseSchedule = denoiser.schedule
        self.name_or_path, self.identity = name_or_path, identity
        self._conditionings: dict[str, Conditioning] = {}

    @property
    def network(self) -> Any:
        """The denoising network itself."""
        return self.denoiser.network

    @property
    def device(self) -> torch.device:
        """The device of its parts."""
        return self.network.device

    @property
    def precision(self) -> Precision:
        """As of every teacher."""
        return Precision(self.device, self.network.dtype)

    @property
    def conditioned_on_cameras(self) -> bool:
        """As of every teacher: true of a multi-view U-Net."""
        return self.denoiser.conditioned_on_views

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """As of every teacher; the newest prompts' rows are cached, up to `TEXT_CACHE_BYTES`.

        Raises `UserError` for a prompt that the teacher cannot encode; a prompt longer than the context of an
        open vocabulary is truncated, with a warning.
        """
        for prompt in prompts:
            if prompt:
                self.check_prompt(prompt)
        cache = self._conditionings
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
        if missing:
            cache.update(zip(missing, self.encode_new(missing).apply(Tensor.float).split(1), strict=True))
        rows = Conditioning.cat([cache[prompt] for prompt in prompts])
        nbytes = sum(value[0].nbytes for value in (rows.embedding, *rows.extras.values()))
        excess = len(cache) - TEXT_CACHE_BYTES // nbytes
        for prompt in list(cache)[: max(excess, 0)]:
            del cache[prompt]
        return rows

    @abstractmethod
    def encode_new(self, prompts: list[str]) -> Conditioning:
        """The conditioning of different prompts, one row each; the empty one is the unconditional one."""


class LatentTeacher(PipelineTeacher):
    """A pipeline teacher in the latents of a VAE, which carry its scaling factor."""

    def __init__(
        self,
        denoiser: DiffusersDenoiser,
        scheduler: OdeScheduler,
        vae: Any,
        text_encoders: Sequence[nn.Module],
        name_or_path: str = "",
        identity: TeacherIdentity | None = None,
    ) -> None:
        """vae: an `AutoencoderKL`, or an `AutoencoderTiny` of its latents."""
        modules = (*text_encoders, vae, denoiser.network)
        super().__init__(denoiser, scheduler, modules, name_or_path, identity)
        self.vae, self.text_encoders = vae, tuple(text_encoders)

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent at the model's own resolution."""
        side = self.network.config.sample_size
        return self.vae.config.latent_channels, side, side

    @property
    def resolution(self) -> int:
        """Image side in pixels at the model's own resolution."""
        return self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    def fingerprint(self) -> str:
        """A digest of the VAE's and the text encoders' weights."""
        return fingerprint(self.vae, *self.text_encoders)

    def enable_gradient_checkpointing(self) -> None:
        """As of every teacher; the encoder and decoder of images are part of it."""
        super().enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (the posterior's mean, scaled) of images (B, 3, H, W) in [0, 1]; differentiable in the
        images.
        """
        output = self.vae.encode((images * 2 - 1).to(self.vae.dtype))
        latents = output.latents if "latents" in output else output.latent_dist.mean
        return (latents.float() - self.latent_mean) * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], clamped, of scaled latents; differentiable in the latents."""
        unscaled = latents / self.vae.config.scaling_factor + self.latent_mean
        image = self.vae.decode(unscaled.to(self.vae.dtype)).sample
        return (image.float() / 2 + 0.5).clamp(0, 1)

    @property
    def latent_mean(self) -> float:
        """What encoding subtracts from latents before they are scaled (Stable Diffusion 3, Flux)."""
        return self.vae.config.get("shift_factor") or 0.0
