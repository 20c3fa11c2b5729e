"""The latent-diffusion teacher: CLIP text encoder, VAE and U-Net of a Stable Diffusion folder, all frozen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.core.teacher import Teacher
from distill.runtime import shipped
from distill.runtime.checkpoint import fingerprint
from distill.runtime.errors import UserError
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.vocabulary import check_length, check_prompt, load_vocabulary


@final
class LatentDiffusionTeacher(Teacher):
    """Stable Diffusion 1.x or 2.x, or a teacher trained here. Latents carry the VAE's scaling factor."""

    denoiser: UNetDenoiser

    def __init__(
        self, parts: dict[str, Any], vocabulary: frozenset[str] | None = None, name_or_path: str = ""
    ) -> None:
        """parts: tokenizer, text_encoder, vae, unet, scheduler, as a diffusers pipeline names them.

        All are frozen. `vocabulary` is None where any word is allowed.
        """
        self.tokenizer: CLIPTokenizer = parts["tokenizer"]
        self.text_encoder: CLIPTextModel = parts["text_encoder"]
        self.vae: AutoencoderKL = parts["vae"]
        self.vocabulary, self.name_or_path = vocabulary, name_or_path
        for module in (self.text_encoder, self.vae, parts["unet"]):
            module.eval().requires_grad_(False).to(memory_format=torch.channels_last)

        # diffusers' default clips predicted latents to [-1, 1]
        self.scheduler = DDIMScheduler.from_config(parts["scheduler"].config, clip_sample=False)
        self.schedule = NoiseSchedule(self.scheduler.alphas_cumprod)
        self.denoiser = UNetDenoiser(parts["unet"], self.schedule, self.scheduler.config.prediction_type)
        self._text_embeddings: dict[str, Tensor] = {}

    @property
    def unet(self) -> Any:
        """The U-Net itself, for what only a U-Net can do: LoRA, ControlNet, weights on disk."""
        return self.denoiser.network

    @property
    def device(self) -> torch.device:
        """The device of its parts."""
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

    def fingerprint(self) -> str:
        """A digest of the VAE's and the text encoder's weights."""
        return fingerprint(self.vae, self.text_encoder)

    def check_prompt(self, prompt: str) -> None:
        """Raise `UserError` for an empty prompt, and for words outside a closed vocabulary."""
        check_prompt(prompt, self.vocabulary)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        """CLIP's last hidden states (B, L, D); each prompt is encoded once and cached.

        Raises `UserError` for words outside a closed vocabulary and, where there is one, for a prompt longer
        than the context; Stable Diffusion truncates it, with a warning.
        """
        for prompt in prompts:
            if prompt:
                self.check_prompt(prompt)
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in self._text_embeddings]
        if missing:
            check_length(self.tokenizer, missing, truncate=self.vocabulary is None)
            tokens = self.tokenizer(missing, padding="max_length", truncation=True, return_tensors="pt")
            embeddings = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state
            self._text_embeddings.update(zip(missing, embeddings, strict=True))
        return Conditioning(torch.stack([self._text_embeddings[prompt] for prompt in prompts]))

    def encode_images(self, images: Tensor) -> Tensor:
        """Latents (the posterior's mean, scaled) of images (B, 3, H, W) in [0, 1]; differentiable in the
        images.
        """
        posterior = self.vae.encode((images * 2 - 1).to(self.vae.dtype)).latent_dist
        return posterior.mean.float() * self.vae.config.scaling_factor

    def decode(self, latents: Tensor) -> Tensor:
        """Images (B, 3, H, W) in [0, 1], clamped, of scaled latents; differentiable in the latents."""
        image = self.vae.decode((latents / self.vae.config.scaling_factor).to(self.vae.dtype)).sample
        return (image.float() / 2 + 0.5).clamp(0, 1)


def load_latent_diffusion(
    name_or_path: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None
) -> LatentDiffusionTeacher:
    """A shipped teacher (`shapes64`), a diffusers folder or a hub id of Stable Diffusion 1.x or 2.x.

    bf16 on CUDA and float32 elsewhere unless `dtype` is given: without AMX, bf16 is slower on a CPU. Raises
    `UserError` where there is no such teacher.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    if dtype is None:
        dtype = torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32

    folder = _folder(name_or_path)
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            name_or_path if folder is None else str(folder),
            dtype=dtype,
            local_files_only=folder is not None,
            **extras,
        )
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(
            f"teacher {name_or_path!r} cannot be loaded ({reason}): "
            f"give {shipped.names('teacher')}, a diffusers folder or a hub id"
        ) from None
    vocabulary = None if folder is None else load_vocabulary(folder / "tokenizer")
    return LatentDiffusionTeacher(pipeline.to(device).components, vocabulary, str(folder or name_or_path))


def _folder(name_or_path: str) -> Path | None:
    """The local folder of a teacher; None for a hub id."""
    folder = shipped.resolve("teacher", name_or_path)
    if not folder.is_dir():
        if name_or_path in shipped.SHIPPED["teacher"]:
            raise UserError(
                f"the teacher {name_or_path!r} is not in this checkout: "
                "train one (scripts/train_teacher.py) and give teacher=its folder"
            )
        return None
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"{folder} holds no model_index.json: "
            "expected a diffusers folder of a Stable Diffusion 1.x or 2.x model"
        )
    return folder
