"""CLIP as a grader: unit features of images and captions, and the CLIP score between them."""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer

from distill.evaluation.features import load_pretrained, pixel_preprocessing
from distill.runtime.errors import UserError
from distill.runtime.shipped import resolve
from distill.teacher.clip import caption_features, pixel_values
from distill.teacher.folder import CLIP, load_clip
from distill.teacher.vocabulary import check_prompt, load_vocabulary


@final
class ClipScorer:
    """CLIP (Radford et al. 2021, arXiv:2103.00020) with its tokenizer and the preprocessing of its images."""

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        preprocess: Callable[[Tensor], Tensor] | None = None,
        vocabulary: frozenset[str] | None = None,
    ) -> None:
        """preprocess: images (B, 3, H, W) in [0, 1] to the pixel values that the vision tower expects.

        None: those of a CLIP trained here. vocabulary: the words that it knows; None: any.
        """
        self.vocabulary = vocabulary
        self.model, self.tokenizer = model.eval().requires_grad_(False), tokenizer
        self.preprocess = partial(pixel_values, self.model) if preprocess is None else preprocess

    @torch.no_grad()
    def image_features(self, images: Tensor, batch: int = 250) -> Tensor:
        """Unit features (N, D) on the CPU of images (N, 3, H, W) in [0, 1]."""
        parts = []
        for part in images.split(batch):
            pixels = self.preprocess(part.to(self.model.device))
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            parts.append(F.normalize(self.model.visual_projection(pooled), dim=-1).cpu())
        return torch.cat(parts)

    def text_features(self, captions: Sequence[str], batch: int = 512) -> Tensor:
        """Unit features (N, D) on the CPU of captions."""
        return caption_features(self.model, self.tokenizer, captions, batch).cpu()

    def label_probabilities(self, images: Tensor, labels: Sequence[str]) -> Tensor:
        """Zero-shot probabilities (N, K) of K labels: softmax of scaled cosines (section 3.1)."""
        cosines = self.image_features(images) @ self.text_features(labels).T
        return (self.model.logit_scale.exp().cpu() * cosines).softmax(1)


def load_clip_scorer(
    teacher: str, clip: str | None = None, device: torch.device | str = "cpu"
) -> ClipScorer | None:
    """The CLIP named by `clip`, else the one in the teacher's own folder, float32 on `device`.

    None where there is neither.

    teacher: a shipped name or a folder; clip: the same, or a folder or hub id of a transformers CLIP model.
    Raises `UserError` where `clip` is given and holds no CLIP.
    """
    folder = resolve("teacher", clip or teacher)
    if (folder / CLIP / "config.json").is_file():
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
        vocabulary = load_vocabulary(folder / "tokenizer")
        return ClipScorer(load_clip(folder, device), tokenizer, vocabulary=vocabulary)
    if clip is None:
        return None

    loaded = load_pretrained(clip, "a teacher trained here or a CLIP model of transformers")
    if not isinstance(loaded, CLIPModel):
        raise UserError(f"{clip} holds a {type(loaded).__name__}: expected a CLIPModel of transformers")
    model: Any = loaded
    try:
        tokenizer = CLIPTokenizer.from_pretrained(clip, local_files_only=Path(clip).is_dir())
    except (OSError, ValueError) as error:
        raise UserError(f"{clip} has no tokenizer ({str(error).splitlines()[0][:200]})") from None
    return ClipScorer(
        model.to(device), tokenizer, pixel_preprocessing(clip, model.config.vision_config.image_size)
    )


def load_text_scorer(clip: str, texts: Sequence[str], device: torch.device | str = "cpu") -> ClipScorer:
    """The CLIP named by `clip`. Raises `UserError` where there is none, and for texts that it cannot read."""
    scorer = load_clip_scorer(clip, clip, device)
    assert scorer is not None  # it was given by name
    for text in texts:
        check_prompt(text, scorer.vocabulary)
    return scorer


def caption_retrieval(clip: ClipScorer, features: Tensor, captions: Sequence[str]) -> dict[str, float]:
    """How often the caption of an image is the nearest, or among the five nearest, of all distinct captions.

    features: of the images (N, D), by the same CLIP. As CLIP R-precision (Park et al. 2021).
    """
    texts = sorted(set(captions))
    number = {text: index for index, text in enumerate(texts)}
    cosines = features @ clip.text_features(texts).T
    own = cosines.gather(1, torch.tensor([[number[caption]] for caption in captions]))
    rank = (~(cosines < own)).sum(1) - 1  # ties, and what is no number, count against it
    tops = {f"retrieval_top{count}": float((rank < count).float().mean()) for count in (1, 5)}
    return {**tops, "retrieval_captions": float(len(texts))}


def clip_score(clip: ClipScorer, images: Tensor, captions: Sequence[str]) -> float:
    """Mean cosine between images (N, 3, H, W) in [0, 1] and their N captions (arXiv:2104.08718, w = 1)."""
    return mean_cosine(clip, clip.image_features(images), captions)


def mean_cosine(clip: ClipScorer, features: Tensor, captions: Sequence[str]) -> float:
    """`clip_score` of images' features (N, D) by the same CLIP."""
    return float((features * clip.text_features(captions)).sum(1).mean())
