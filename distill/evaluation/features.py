"""Feature extractors that sets of images are compared in: the judge's, a teacher's own CLIP, or a network that the user has."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from distill.evaluation.judge import judge_features, load_judge
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.shipped import SHIPPED, known, located
from distill.teacher.clip import image_features
from distill.teacher.folder import CLIP, load_clip

Extractor = Callable[[Tensor], Tensor]


def extractor(name: str) -> Extractor:
    """Images (N, 3, H, W) in [0, 1] to features (N, D) on the CPU.

    `name`: a judge; a teacher trained here, for its CLIP; a TorchScript file of Inception (as of StyleGAN's metrics, called with
    return_features=True on uint8 images); or a folder or hub id of a transformers image model (DINOv2, CLIP, ViT).
    Raises `UserError` for anything else.
    """
    if name in SHIPPED["judge"] or (Path(name) / "judge.json").is_file():
        judge = load_judge(name)
        return lambda images: judge_features(judge, images)
    place = located("teacher", name)
    if (place / CLIP / "config.json").is_file():
        clip = load_clip(place)
        return _in_parts(lambda images: image_features(clip, images))
    if place.suffix in (".pt", ".ts", ".torchscript"):
        return _torchscript(place)
    return _transformers(name)


def _in_parts(model: Extractor, size: int = 64) -> Extractor:
    @torch.no_grad()
    def run(images: Tensor) -> Tensor:
        return torch.cat([model(part).float().cpu() for part in images.split(size)])

    return run


def _torchscript(path: Path) -> Extractor:
    try:
        network = torch.jit.load(str(path), map_location="cpu").eval()
    except (RuntimeError, ValueError, OSError) as error:
        raise UserError(f"{path} cannot be loaded as TorchScript ({str(error).splitlines()[0]})") from None
    return _in_parts(lambda images: network((images * 255).round().to(torch.uint8), return_features=True))


def _transformers(name: str) -> Extractor:
    from transformers import AutoModel

    local = Path(name).is_dir()
    try:
        model = AutoModel.from_pretrained(name, local_files_only=local, dtype=torch.float32).eval()
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0][:200]
        expected = (
            f"{known('judge')}, a teacher, a TorchScript file of Inception or an image model of transformers"
        )
        raise UserError(f"features from {name!r} cannot be had ({reason}): expected {expected}") from None
    model = getattr(model, "vision_model", model)
    side, mean, std = _preprocessing(Path(name), model.config.image_size)

    def run(images: Tensor) -> Tensor:
        sized = F.interpolate(images, (side, side), mode="bicubic", antialias=True).clamp(0, 1)
        return model(pixel_values=(sized - mean) / std).pooler_output

    return _in_parts(run)


def _preprocessing(folder: Path, side: int) -> tuple[int, Tensor, Tensor]:
    """Side, mean and spread of the images a model expects: ImageNet's where its folder does not say."""
    path = folder / "preprocessor_config.json"
    told = read_json(path) if path.is_file() else {}
    mean, std = told.get("image_mean", [0.485, 0.456, 0.406]), told.get("image_std", [0.229, 0.224, 0.225])
    return side, torch.tensor(mean)[:, None, None], torch.tensor(std)[:, None, None]
