"""Feature extractors by name: a judge, a teacher's CLIP, a TorchScript file, a transformers model."""

from pathlib import Path

import pytest
import torch
from transformers import ViTConfig, ViTModel

from distill.evaluation.features import extractor
from distill.evaluation.judge import judge_features, load_judge
from distill.runtime.errors import UserError
from distill.teacher.clip import image_features
from distill.teacher.folder import load_clip

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


class Inception(torch.nn.Module):
    """Called as StyleGAN's metrics call theirs."""

    def forward(self, images: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert images.dtype == torch.uint8 and return_features
        return images.float().mean((2, 3))


def test_the_judge_and_clip(tiny_teacher_folder: Path) -> None:
    assert torch.equal(extractor("judge64")(IMAGES), judge_features(load_judge("judge64"), IMAGES))
    with torch.no_grad():
        torch.testing.assert_close(
            extractor(str(tiny_teacher_folder))(IMAGES),
            image_features(load_clip(tiny_teacher_folder), IMAGES),
        )


def test_a_torchscript_inception(tmp_path: Path) -> None:
    path = tmp_path / "inception.pt"
    torch.jit.script(Inception()).save(str(path))
    torch.testing.assert_close(extractor(str(path))(IMAGES), (IMAGES * 255).round().mean((2, 3)))
    (tmp_path / "broken.pt").write_bytes(b"no")
    with pytest.raises(UserError, match="cannot be loaded as TorchScript"):
        extractor(str(tmp_path / "broken.pt"))


def test_a_transformers_model_gets_the_preprocessing_of_its_folder(tmp_path: Path) -> None:
    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=32,
        patch_size=16,
    )
    model = ViTModel(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(
        '{"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}'
    )
    small = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        torch.testing.assert_close(
            extractor(str(tmp_path))(small), model(pixel_values=small * 2 - 1).pooler_output
        )
    assert extractor(str(tmp_path))(IMAGES).shape == (3, 16)


def test_anything_else_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="expected judge64, pairs64, elevation64, digits28, a teacher"):
        extractor(str(tmp_path / "nothing"))
