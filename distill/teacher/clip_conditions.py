"""Teachers of pixels that read CLIP's embedding of an image or of a text, as one vector.

Of images as the decoder of unCLIP (arXiv:2204.06125): samples are variations of a picture.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, final

import torch
from torch import Tensor, nn
from transformers import CLIPModel, CLIPTokenizer

from distill.core.conditioning import Conditioning
from distill.core.identity import TeacherIdentity
from distill.core.noise import NoiseSchedule, PredictionType
from distill.data.folders import PATH, CaptionedImages
from distill.data.images import is_image_file, load_image
from distill.runtime.checkpoint import fingerprint
from distill.runtime.errors import UserError
from distill.runtime.shipped import resolve
from distill.teacher.clip import caption_features, image_features
from distill.teacher.contexts import ContextDenoiser
from distill.teacher.denoiser import DiffusersDenoiser
from distill.teacher.folder import CLIP, load_clip
from distill.teacher.pixel_conditions import ConditionTable, PixelCondition, vector_unet
from distill.teacher.pixels import PixelTeacher
from distill.teacher.unet import UnetOptions
from distill.teacher.vocabulary import check_length, check_prompt, load_vocabulary, save_vocabulary

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class ClipEncoder:
    """CLIP with its tokenizer; vectors have a mean square of 1 a number, as a network's inputs should."""

    model: CLIPModel
    tokenizer: CLIPTokenizer
    vocabulary: frozenset[str] | None

    @classmethod
    def load(cls, folder: Path | str) -> "ClipEncoder":
        """That of a teacher's folder. Raises `UserError` for a folder without one."""
        folder = resolve("teacher", folder)
        if not (folder / CLIP / "config.json").is_file() or not (folder / TOKENIZER).is_dir():
            raise UserError(f"{folder} has no CLIP: give a shipped teacher, or a folder of train_teacher.py")
        tokenizer = CLIPTokenizer.from_pretrained(folder / TOKENIZER)
        return cls(load_clip(folder), tokenizer, load_vocabulary(folder / TOKENIZER))

    @property
    def size(self) -> int:
        """D."""
        return self.model.config.projection_dim

    def save(self, folder: Path) -> None:
        """Write it in fp16, in the layout of a teacher's folder."""
        copy.deepcopy(self.model).half().save_pretrained(folder / CLIP)
        self.tokenizer.save_pretrained(folder / TOKENIZER)
        if self.vocabulary is not None:
            save_vocabulary(folder / TOKENIZER, self.tokenizer, sorted(self.vocabulary))

    @torch.no_grad()
    def of_images(self, images: Tensor) -> Tensor:
        """Vectors (B, D) of images (B, 3, H, W) in [0, 1]."""
        return image_features(self.model, images) * self.size**0.5

    @torch.no_grad()
    def of_texts(self, texts: list[str]) -> Tensor:
        """Vectors (B, D). Raises `UserError` for words that CLIP does not know, and for long texts."""
        for text in texts:
            check_prompt(text, self.vocabulary)
        check_length(self.tokenizer, texts)
        return caption_features(self.model, self.tokenizer, texts) * self.size**0.5


@final
@dataclass(frozen=True, kw_only=True)
class ClipCondition(PixelCondition):
    """CLIP's embedding of each image itself, or of its caption."""

    clip: str = "shapes64"  # a shipped teacher, or a folder of train_teacher.py
    source: Literal["image", "text"] = "image"
    column: None = None

    @property
    def kind(self) -> str:
        """As of every condition."""
        return "clip"

    def table(self, data: CaptionedImages) -> ConditionTable:
        """As of every condition; no condition is all zeros."""
        encoder = ClipEncoder.load(self.clip)
        if self.source == "image":
            indices = torch.arange(len(data))
            rows = torch.cat([encoder.of_images(data.composite(part)) for part in indices.split(256)])
        else:
            texts = sorted(set(data.texts) - {""})
            numbers = {text: number for number, text in enumerate([*texts, ""])}  # the last: none
            indices = torch.tensor([numbers[text] for text in data.texts])
            rows = encoder.of_texts(texts)
        return ConditionTable([], torch.cat([rows, torch.zeros_like(rows[:1])])[:, None], indices)

    def build(self, options: UnetOptions, channels: int, side: int, table: ConditionTable) -> nn.Module:
        """As of every condition: a `UNet2DConditionModel` without attention to tokens."""
        return vector_unet(options, channels, side, table.rows.shape[-1])

    def denoiser(
        self, network: nn.Module, schedule: NoiseSchedule, prediction: PredictionType
    ) -> DiffusersDenoiser:
        """As of every condition."""
        return ContextDenoiser(network, schedule, prediction)

    def save_facts(self, folder: Path) -> dict[str, Any]:
        """As of every condition; CLIP is saved beside the network."""
        ClipEncoder.load(self.clip).save(folder)
        return {"source": self.source}


@final
class ClipTeacher(PixelTeacher):
    """A U-Net on pixels whose prompts are image files or texts, both read by CLIP.

    Trained on one of them it takes the other too, as their embeddings share a space; with a gap between them.
    """

    denoiser_class = ContextDenoiser

    def __init__(
        self,
        pipeline: Any,
        encoder: ClipEncoder,
        source: Literal["image", "text"],
        name_or_path: str = "",
        identity: TeacherIdentity | None = None,
    ) -> None:
        """pipeline: with a `UNet2DConditionModel` that reads vectors; source: what it was trained on."""
        super().__init__(pipeline, name_or_path, identity)
        self.encoder, self.source = encoder, source

    def fingerprint(self) -> str:
        """As of every teacher: vectors are of its CLIP, of images or of texts."""
        return f"{fingerprint(self.encoder.model)}-{self.source}"

    def prompt_of(self, row: Mapping[str, Any]) -> str:
        """As of every teacher: the row's image file, or its caption, as in the training."""
        return str(row.get(PATH, row["text"]) if self.source == "image" else row["text"])

    def check_prompt(self, prompt: str) -> None:
        """Raise `UserError` for what is no file and no text that CLIP can read."""
        if not is_image_file(prompt):
            check_prompt(prompt, self.encoder.vocabulary)

    def encode_new(self, prompts: list[str]) -> Conditioning:
        """Vectors (B, 1, D); zeros for the empty prompt."""
        return Conditioning(torch.stack([self._vector(prompt) for prompt in prompts]).to(self.device))

    def _vector(self, prompt: str) -> Tensor:
        if not prompt:
            return torch.zeros(1, self.encoder.size)
        if is_image_file(prompt):
            return self.encoder.of_images(load_image(prompt, self.resolution))
        return self.encoder.of_texts([prompt])


def load_clip_teacher(
    pipeline: Any, facts: Mapping[str, Any], path: str, identity: TeacherIdentity | None
) -> ClipTeacher:
    """The teacher of a folder with its CLIP. Raises `UserError` for one without."""
    return ClipTeacher(pipeline, ClipEncoder.load(path), facts["source"], path, identity)
