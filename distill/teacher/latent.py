"""The latent-diffusion teacher: CLIP text encoder, VAE and U-Net of a Stable Diffusion folder, all frozen."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from diffusers import AutoencoderKL, DDIMScheduler
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer

from distill.core.conditioning import Conditioning
from distill.core.identity import TeacherIdentity
from distill.core.noise import NoiseSchedule
from distill.core.teacher import Teacher
from distill.runtime import shipped
from distill.runtime.checkpoint import fingerprint
from distill.runtime.errors import UserError
from distill.runtime.precision import Precision, resolve_precision
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.identity import identify
from distill.teacher.multi_view import load_view_conditions
from distill.teacher.vocabulary import check_length, check_prompt, load_vocabulary

TEXT_CACHE_BYTES = 256 * 2**20  # of text embeddings on the device: 1,100 prompts of Stable Diffusion 1.5


@final
class LatentDiffusionTeacher(Teacher):
    """Stable Diffusion 1.x or 2.x, or a teacher trained here. Latents carry the VAE's scaling factor.

    Its parts compute in the dtype of their weights; every method takes and returns float32.
    """

    denoiser: UNetDenoiser

    def __init__(
        self,
        parts: dict[str, Any],
        vocabulary: frozenset[str] | None = None,
        name_or_path: str = "",
        identity: TeacherIdentity | None = None,
    ) -> None:
        """parts: tokenizer, text_encoder, vae, unet, scheduler, as a diffusers pipeline names them.

        All are frozen. `vocabulary` is None where any word is allowed.
        """
        self.identity = identity
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
    def conditioned_on_cameras(self) -> bool:
        """As of every teacher: true of a multi-view U-Net."""
        return self.denoiser.conditioned_on_views

    @property
    def precision(self) -> Precision:
        """As of every teacher."""
        return Precision(self.device, self.unet.dtype)

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
        """CLIP's last hidden states (B, L, D); the newest prompts' are cached, up to `TEXT_CACHE_BYTES`.

        Raises `UserError` for words outside a closed vocabulary and, where there is one, for a prompt longer
        than the context; Stable Diffusion truncates it, with a warning.
        """
        for prompt in prompts:
            if prompt:
                self.check_prompt(prompt)
        cache = self._text_embeddings
        missing = [prompt for prompt in dict.fromkeys(prompts) if prompt not in cache]
        if missing:
            check_length(self.tokenizer, missing, truncate=self.vocabulary is None)
            tokens = self.tokenizer(missing, padding="max_length", truncation=True, return_tensors="pt")
            embeddings = self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state.float()
            cache.update(zip(missing, embeddings, strict=True))
        rows = torch.stack([cache[prompt] for prompt in prompts])
        excess = len(cache) - TEXT_CACHE_BYTES // rows[0].nbytes
        for prompt in list(cache)[: max(excess, 0)]:
            del cache[prompt]
        return Conditioning(rows)

    def enable_gradient_checkpointing(self) -> None:
        """As of every teacher; the encoder and decoder of images are part of it."""
        super().enable_gradient_checkpointing()
        self.vae.enable_gradient_checkpointing()

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

    `dtype` is that of the weights of all parts, by default the device's `auto` precision. Raises `UserError`
    where there is no such teacher.
    """
    from diffusers import StableDiffusionPipeline
    from diffusers.utils import logging

    logging.disable_progress_bar()
    if dtype is None:
        dtype = resolve_precision("auto", torch.device(device)).dtype

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
        raise UserError(_not_loaded(name_or_path, folder, str(error).splitlines()[0])) from None
    parts, vocabulary = dict(pipeline.to(device).components), None
    # where diffusers found the U-Net: of a hub id in the hub's cache
    identity = identify(str(folder or name_or_path), Path(pipeline.unet.config["_name_or_path"]).parent)
    if folder is not None:
        parts["unet"] = load_view_conditions(folder, parts["unet"])
        vocabulary = load_vocabulary(folder / "tokenizer")
    return LatentDiffusionTeacher(parts, vocabulary, str(folder or name_or_path), identity)


def _not_loaded(name_or_path: str, folder: Path | None, reason: str) -> str:
    """Why a teacher cannot be loaded: where it was looked for, and how to get it."""
    from huggingface_hub import constants

    choices = f"{shipped.names('teacher')}, a diffusers folder or a hub id"
    if folder is not None:
        return f"teacher {name_or_path!r} cannot be loaded ({reason[:200]}): give {choices}"
    path = Path(name_or_path)
    if path.is_absolute() or len(path.parts) != 2:  # not owner/name
        return f"teacher {name_or_path!r} is no folder ({path.absolute()}): give {choices}"
    cached = Path(constants.HF_HUB_CACHE) / f"models--{name_or_path.replace('/', '--')}"
    hub = "the hub is switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else reason[:100]
    return (
        f"teacher {name_or_path!r} is neither a folder ({path.absolute()}) nor whole in the cache "
        f"({cached}; {hub}): get it with `hf download {name_or_path}`, or give a diffusers folder of it, or "
        f"{shipped.names('teacher')}"
    )


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
