"""The latent-diffusion teacher: CLIP text encoder, VAE and U-Net of a Stable Diffusion folder, all frozen."""

from pathlib import Path
from typing import Any, final

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from distill.core.conditioning import Conditioning
from distill.core.flow_scheduler import ode_scheduler, parameterisation
from distill.core.identity import TeacherIdentity
from distill.runtime import shipped
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.precision import resolve_precision
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.identity import identify
from distill.teacher.multi_view import load_view_conditions
from distill.teacher.pipeline import LatentTeacher
from distill.teacher.vocabulary import check_length, check_prompt, load_vocabulary

UNUSED = {"safety_checker", "feature_extractor", "image_encoder", "watermarker"}  # of a pipeline's parts


@final
class LatentDiffusionTeacher(LatentTeacher):
    """Stable Diffusion 1.x or 2.x, or a teacher trained here."""

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
        self.tokenizer: CLIPTokenizer = parts["tokenizer"]
        self.text_encoder: CLIPTextModel = parts["text_encoder"]
        self.vocabulary = vocabulary
        scheduler = ode_scheduler(parts["scheduler"])
        denoiser = UNetDenoiser(parts["unet"], *parameterisation(scheduler))
        super().__init__(denoiser, scheduler, parts["vae"], [self.text_encoder], name_or_path, identity)

    @property
    def unet(self) -> Any:
        """The U-Net itself, for what only a U-Net can do: ControlNet, weights on disk."""
        return self.denoiser.network

    @property
    def size_multiple(self) -> int:
        """As of every teacher: pixels a side of a latent's cell."""
        return self.resolution // self.latent_shape[1]

    def check_prompt(self, prompt: str) -> None:
        """Raise `UserError` for an empty prompt, and for words outside a closed vocabulary."""
        check_prompt(prompt, self.vocabulary)

    def encode_new(self, prompts: list[str]) -> Conditioning:
        """CLIP's last hidden states (B, L, D).

        Raises `UserError` for a prompt longer than the context where the vocabulary is closed.
        """
        check_length(self.tokenizer, prompts, truncate=self.vocabulary is None)
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        return Conditioning(self.text_encoder(tokens.input_ids.to(self.device)).last_hidden_state)


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

    folder = find_folder(name_or_path)
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            name_or_path if folder is None else str(folder),
            dtype=dtype,
            local_files_only=folder is not None,
            **extras,
        )
    except (OSError, ValueError) as error:
        raise loading_error(name_or_path, folder, error) from None
    parts, vocabulary = dict(pipeline.to(device).components), None
    # where diffusers found the U-Net: of a hub id in the hub's cache
    identity = identify(str(folder or name_or_path), Path(pipeline.unet.config["_name_or_path"]).parent)
    if folder is not None:
        parts["unet"] = load_view_conditions(folder, parts["unet"])
        vocabulary = load_vocabulary(folder / "tokenizer")
    return LatentDiffusionTeacher(parts, vocabulary, str(folder or name_or_path), identity)


def loading_error(name_or_path: str, folder: Path | None, error: Exception) -> UserError:
    """Why a teacher cannot be loaded: where it was looked for, and how to get it."""
    from huggingface_hub import constants

    reason = str(error).splitlines()[0]
    choices = f"{shipped.names('teacher')}, a diffusers folder or a hub id"
    if folder is not None:
        return UserError(f"teacher {name_or_path!r} cannot be loaded ({reason[:200]}): give {choices}")
    path = Path(name_or_path)
    if path.is_absolute() or len(path.parts) != 2:  # not owner/name
        return UserError(f"teacher {name_or_path!r} is no folder ({path.absolute()}): give {choices}")
    cached = Path(constants.HF_HUB_CACHE) / f"models--{name_or_path.replace('/', '--')}"
    hub = "the hub is switched off by HF_HUB_OFFLINE" if constants.HF_HUB_OFFLINE else reason[:100]
    return UserError(
        f"teacher {name_or_path!r} is neither a folder ({path.absolute()}) nor whole in the cache "
        f"({cached}; {hub}): get it with `hf download {name_or_path}`, or give a diffusers folder of it, or "
        f"{shipped.names('teacher')}"
    )


def find_folder(name_or_path: str) -> Path | None:
    """The local folder of a teacher; None for a hub id. Raises `UserError` for one that is incomplete."""
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
            f"{folder} holds no model_index.json: expected a diffusers folder of a text-to-image model"
        )
    index = read_json(folder / "model_index.json")
    parts = {name for name, value in index.items() if isinstance(value, list) and value[0] is not None}
    missing = sorted(name for name in parts - UNUSED if not (folder / name).is_dir())
    if missing:
        raise UserError(f"the teacher {folder} lacks {', '.join(missing)}: copy the whole folder")
    return folder
