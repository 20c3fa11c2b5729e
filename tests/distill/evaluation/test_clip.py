"""CLIP as a grader: a teacher's own, a transformers model of a folder, and none."""

import shutil
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers import CLIPModel

from distill.evaluation.clip import ClipScorer, caption_retrieval, clip_score, load_clip_scorer
from distill.runtime.errors import UserError
from distill.teacher.clip import ClipOptions, build_clip, image_features, text_features, tokenize
from distill.teacher.folder import load_clip
from distill.teacher.latent import LatentDiffusionTeacher

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
CAPTIONS = ["a red cube", "a blue duck", "a green cone"]


def without_clip(folder: Path, target: Path) -> Path:
    """A teacher folder as Stable Diffusion's are: without a CLIP of its own."""
    shutil.copytree(folder, target, ignore=shutil.ignore_patterns("clip"))
    return target


def save_transformers_clip(folder: Path, teacher: LatentDiffusionTeacher, side: int) -> CLIPModel:
    """A tiny CLIP as a transformers folder: model, tokenizer, preprocessing."""
    torch.manual_seed(0)
    small = ClipOptions(width=32, layers=1, patch=16, text_width=32, text_layers=2, projection=16)
    model = build_clip(small, teacher.tokenizer, side).eval()
    model.save_pretrained(folder)
    teacher.tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(
        '{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.5, 0.5, 0.5]}'
    )
    return model


def test_the_score_is_the_mean_cosine(tiny_teacher: LatentDiffusionTeacher) -> None:
    clip = load_clip_scorer(tiny_teacher.name_or_path)
    assert isinstance(clip, ClipScorer)
    model = load_clip(tiny_teacher.name_or_path)
    with torch.no_grad():
        text = text_features(model, tokenize(tiny_teacher.tokenizer, CAPTIONS))
        cosines = (image_features(model, IMAGES) * text).sum(1)
    assert clip_score(clip, IMAGES, CAPTIONS) == float(cosines.mean())


def test_retrieval_by_hand() -> None:
    """Images of six captions, all nearest to the first of them; ties and NaN are misses."""

    class OneHot:
        def text_features(self, captions: list[str]) -> torch.Tensor:
            return torch.eye(6)[["uvwxyz".index(caption) for caption in captions]]

    clip, captions = OneHot(), list("uvwxyz")
    ranked = torch.tensor([0.9, 0.8, 0.7, 0.6, 0.5, 0.4]).expand(6, 6)
    figures = caption_retrieval(clip, ranked, captions)  # type: ignore[arg-type]
    expected = {"retrieval_top1": 1 / 6, "retrieval_top5": 5 / 6, "retrieval_captions": 6}
    assert figures == pytest.approx(expected)
    for features in (torch.zeros(6, 6), torch.full((6, 6), torch.nan)):
        assert caption_retrieval(clip, features, captions)["retrieval_top5"] == 0.0  # type: ignore[arg-type]


def test_features_do_not_depend_on_the_batch_size(tiny_teacher: LatentDiffusionTeacher) -> None:
    clip = load_clip_scorer(tiny_teacher.name_or_path)
    assert clip is not None
    torch.testing.assert_close(clip.image_features(IMAGES, 2), clip.image_features(IMAGES), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        clip.text_features(CAPTIONS, 2), clip.text_features(CAPTIONS), atol=1e-5, rtol=0
    )


def test_label_probabilities_are_a_softmax_of_scaled_cosines(tiny_teacher: LatentDiffusionTeacher) -> None:
    clip = load_clip_scorer(tiny_teacher.name_or_path)
    assert clip is not None
    clip.model.logit_scale.data.fill_(2.0)
    logits = torch.tensor(2.0).exp() * clip.image_features(IMAGES) @ clip.text_features(CAPTIONS).T
    torch.testing.assert_close(clip.label_probabilities(IMAGES, CAPTIONS), logits.softmax(1))


def test_a_transformers_clip_with_its_own_resolution_and_normalisation(
    tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    model = save_transformers_clip(tmp_path / "clip", tiny_teacher, 32)
    teacher = without_clip(Path(tiny_teacher.name_or_path), tmp_path / "teacher")
    clip = load_clip_scorer(str(teacher), str(tmp_path / "clip"))
    assert clip is not None and clip.image_features(IMAGES).shape == (3, 16)
    small = IMAGES[..., :32, :32]
    pixels = (small - torch.tensor([0.4, 0.5, 0.6])[:, None, None]) / 0.5
    with torch.no_grad():
        expected = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    torch.testing.assert_close(clip.image_features(small), torch.nn.functional.normalize(expected, dim=-1))


def test_without_clip_there_is_no_scorer_and_a_wrong_name_is_one_sentence(
    tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    teacher = without_clip(Path(tiny_teacher.name_or_path), tmp_path / "teacher")
    assert (
        load_clip_scorer(str(teacher)) is None and load_clip_scorer("CompVis/stable-diffusion-v1-4") is None
    )
    assert load_clip_scorer(str(teacher), tiny_teacher.name_or_path) is not None  # another teacher's CLIP
    with pytest.raises(UserError, match="cannot be loaded .* expected a teacher trained here or a CLIP"):
        load_clip_scorer(str(teacher), str(tmp_path))


def test_images_of_other_sizes_are_resized_for_a_clip_trained_here() -> None:
    clip = load_clip_scorer("shapes64")
    assert clip is not None
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(F.avg_pool2d(images, 16), (64, 64), mode="bicubic")
    small = F.interpolate(smooth, (28, 28), mode="bicubic", antialias=True)
    cosines = (clip.image_features(small) * clip.image_features(smooth)).sum(1)
    assert bool((cosines > 0.9).all()), cosines
