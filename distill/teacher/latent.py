"""The frozen teacher: a latent diffusion model in a diffusers folder, behind the score contract."""

from collections.abc import Sequence
from typing import Any, Protocol, final

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from distill.core.noise import NoiseSchedule, PredictionType
from distill.core.score import Prediction, ScoreModel
from distill.runtime.errors import UserError
from distill.runtime.shipped import SHIPPED, known, located
from distill.teacher.vocabulary import check_prompt, load_words


@final
class UNetDenoiser(ScoreModel):
    """A U-Net alone behind the contract: what the previews of its training use."""

    def __init__(self, unet: Any, schedule: NoiseSchedule, kind: PredictionType) -> None:
        self.unet, self.schedule, self.kind = unet, schedule, kind

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As the contract says; the network runs in its own dtype, the conversions in float32."""
        output = self.unet(
            x_t.to(self.unet.dtype), t, encoder_hidden_states=condition.to(self.unet.dtype)
        ).sample
        return Prediction.of(output, x_t, t, self.schedule, self.kind)


class Distillable(Protocol):
    """What a critic or a student needs of a teacher besides its answers: the network it starts from."""

    schedule: NoiseSchedule
    unet: Any
    score: UNetDenoiser

    @property
    def device(self) -> torch.device:
        """Where it is."""

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As of every score model."""


@final
class Teacher(ScoreModel):
    """Frozen CLIP text encoder, VAE and U-Net. Latents carry the VAE's scaling factor; images are (B, 3, H, W) in [0, 1].

    Loads any Stable Diffusion 1.x or 2.x folder or hub id, and the shipped teachers by name (`shapes64`).
    """

    def __init__(self, parts: dict[str, Any], words: frozenset[str] | None = None, place: str = "") -> None:
        """parts: tokenizer, text_encoder, vae, unet, scheduler, as a diffusers pipeline names them. All are frozen."""
        self.tokenizer: CLIPTokenizer = parts["tokenizer"]
        self.text_encoder: CLIPTextModel = parts["text_encoder"]
        self.vae: AutoencoderKL = parts["vae"]
        self.unet: UNet2DConditionModel = parts["unet"]
        self.scheduler = DDIMScheduler.from_config(
            parts["scheduler"].config, clip_sample=False
        )  # its default clips latents to 1
        self.words, self.place = words, place
        for module in (self.text_encoder, self.vae, self.unet):
            module.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.schedule = NoiseSchedule(self.scheduler.alphas_cumprod)
        self.score = UNetDenoiser(self.unet, self.schedule, self.scheduler.config.prediction_type)
        self._states: dict[str, Tensor] = {}

    @staticmethod
    def load(name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> "Teacher":
        """A shipped name, a diffusers folder or a hub id, in bf16 on CUDA and float32 elsewhere unless `dtype` says otherwise.

        Raises `UserError` where there is no such teacher.
        """
        from diffusers import StableDiffusionPipeline
        from diffusers.utils import logging

        logging.disable_progress_bar()
        if dtype is None:  # without AMX bf16 is slower on a CPU
            dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32

        place = located("teacher", name)
        local = place.is_dir()
        if name in SHIPPED["teacher"] and not local:
            raise UserError(
                f"the teacher {name!r} is not in this checkout: train one (scripts/train_teacher.py) and give teacher=its folder"
            )
        if local and not (place / "model_index.json").is_file():
            raise UserError(
                f"{place} holds no model_index.json: expected a diffusers folder of a Stable Diffusion 1.x or 2.x model"
            )
        extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
        try:
            source = str(place) if local else name
            pipeline = StableDiffusionPipeline.from_pretrained(
                source, dtype=dtype, local_files_only=local, **extras
            )
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0][:200]
            raise UserError(
                f"teacher {name!r} cannot be loaded ({reason}): give {known('teacher')}, a diffusers folder or a hub id"
            ) from None
        return Teacher(
            pipeline.to(device).components,
            load_words(place / "tokenizer") if local else None,
            str(place if local else name),
        )

    @property
    def device(self) -> torch.device:
        """Where the parts are."""
        return self.unet.device

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Channels, height and width of a latent at the model's own resolution."""
        side = self.unet.config.sample_size
        return self.unet.config.in_channels, side, side

    @property
    def resolution(self) -> int:
        """Image side in pixels at the model's own resolution."""
        return self.latent_shape[1] * 2 ** (len(self.vae.config.block_out_channels) - 1)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        """CLIP's last hidden states (B, L, D), each prompt computed once and kept. The empty prompt is the unconditional one.

        Raises `UserError` for words that the vocabulary lacks, where it is a closed one.
        """
        for prompt in prompts:
            if prompt:
                check_prompt(prompt, self.words)
        fresh = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._states]
        if fresh:
            ids = self.tokenizer(fresh, padding="max_length", truncation=True, return_tensors="pt").input_ids
            states = self.text_encoder(ids.to(self.device)).last_hidden_state
            self._states.update(zip(fresh, states, strict=True))
        return torch.stack([self._states[prompt] for prompt in prompts])

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (the posterior's mean, scaled) of images (B, 3, H, W) in [0, 1]; differentiable in the images."""
        posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], clamped, of scaled latents; differentiable in the latents."""
        image = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return (image.float() / 2 + 0.5).clamp(0, 1)

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        """As the contract says; condition (B, L, D) from `encode_text`."""
        return self.score.predict(x_t, t, condition)
