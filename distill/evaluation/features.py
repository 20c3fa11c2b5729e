"""Feature extractors in which sets of images are compared: a judge, a CLIP, or any pretrained image model."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel
from transformers.image_processing_base import ImageProcessingMixin

from distill.evaluation.judge import Judge, judge_features, load_judge
from distill.runtime.errors import UserError
from distill.runtime.shipped import SHIPPED, names, resolve
from distill.teacher.clip import image_features
from distill.teacher.folder import CLIP, load_clip

Extractor = Callable[[Tensor], Tensor]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def extractor(name: str, device: torch.device | str = "cpu") -> Extractor:
    """Images (N, 3, H, W) in [0, 1] to features (N, D) on the CPU, computed in float32 on `device`.

    name: a judge; a teacher trained here, for its CLIP; a TorchScript file of Inception (StyleGAN's
    metrics, called with return_features=True on uint8 images); or a folder or hub id of a transformers
    image model (DINOv2, CLIP, ViT). Raises `UserError` for anything else.
    """
    if name in SHIPPED["judge"] or (Path(name) / "judge.json").is_file():
        return judge_extractor(load_judge(name, device))
    path = resolve("teacher", name)
    if (path / CLIP / "config.json").is_file():
        clip = load_clip(path, device)
        return _in_batches(lambda images: image_features(clip, images), device)
    if path.suffix in (".pt", ".ts", ".torchscript"):
        return _torchscript(path, device)
    return _transformers(name, device)


def judge_extractor(judge: Judge) -> Extractor:
    """The judge's own features."""
    return lambda images: judge_features(judge, images)


def _in_batches(model: Extractor, device: torch.device | str, size: int = 64) -> Extractor:
    @torch.no_grad()
    def extract(images: Tensor) -> Tensor:
        return torch.cat([model(part.to(device)).float().cpu() for part in images.split(size)])

    return extract


def _torchscript(path: Path, device: torch.device | str) -> Extractor:
    try:
        network = torch.jit.load(str(path), map_location=torch.device(device)).eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be loaded as TorchScript ({str(error).splitlines()[0]})") from None

    def features(images: Tensor) -> Tensor:
        return network((images * 255).round().to(torch.uint8), return_features=True)

    return _in_batches(features, device)


def _transformers(name: str, device: torch.device | str) -> Extractor:
    expected = (
        f"{names('judge')}, a teacher, a TorchScript file of Inception or an image model of transformers"
    )
    loaded: Any = load_pretrained(name, expected)
    model = getattr(loaded, "vision_model", loaded).to(device)
    preprocess = pixel_preprocessing(name, model.config.image_size)
    return _in_batches(lambda images: model(pixel_values=preprocess(images)).pooler_output, device)


def load_pretrained(name: str, expected: str) -> PreTrainedModel:
    """A transformers model of a folder or hub id, float32. Raises `UserError` if there is none."""
    try:
        local = Path(name).is_dir()
        return AutoModel.from_pretrained(name, local_files_only=local, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        raise UserError(f"{name!r} cannot be loaded ({reason}): expected {expected}") from None


def pixel_preprocessing(name: str, side: int) -> Callable[[Tensor], Tensor]:
    """Images (N, 3, H, W) in [0, 1] to a pretrained model's pixel values: resized to `side` and normalised.

    Mean and standard deviation are those of its preprocessor_config.json, ImageNet's without one.
    """
    try:
        facts, _ = ImageProcessingMixin.get_image_processor_dict(name, local_files_only=Path(name).is_dir())
    except OSError:
        facts = {}
    mean = torch.tensor(facts.get("image_mean", IMAGENET_MEAN))[:, None, None]
    std = torch.tensor(facts.get("image_std", IMAGENET_STD))[:, None, None]

    def preprocess(images: Tensor) -> Tensor:
        resized = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return (resized - mean.to(images)) / std.to(images)

    return preprocess
