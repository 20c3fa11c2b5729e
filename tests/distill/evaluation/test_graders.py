"""Graders: labels that a prompt names, figures per prompt, figures left out without their grader."""

from pathlib import Path

import pytest
import torch

from distill.evaluation.clip import load_clip_scorer
from distill.evaluation.graders import Graders, grade_images, load_graders, target_labels
from distill.evaluation.judge import Judge, judge_features, load_judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.runtime.errors import UserError
from distill.teacher.latent import LatentDiffusionTeacher

IMAGES = torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def graders(tiny_teacher: LatentDiffusionTeacher) -> Graders:
    torch.manual_seed(0)
    labels = {"object": ("cube", "duck"), "colour": ("blue", "red"), "view": ("back", "front")}
    judge = Judge(labels, JudgeOptions(tuple(labels), (("view", "has_front"),), width=8)).eval()
    return Graders(judge, load_clip_scorer(tiny_teacher.name_or_path))


def test_prompts_name_labels_of_the_judge(graders: Graders) -> None:
    assert graders.judge is not None
    assert target_labels("a red duck, back view", graders.judge) == {
        "object": "duck",
        "colour": "red",
        "view": "back",
    }
    assert target_labels("a teapot", graders.judge) == {}


def test_accuracy_is_over_the_prompts_that_name_an_attribute(
    graders: Graders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The third prompt names no colour; a conditional attribute, the view, has no figure."""
    predictions = {
        "object": ["duck", "duck", "cube"],
        "colour": ["red", "blue", "blue"],
        "view": ["back"] * 3,
    }
    monkeypatch.setattr("distill.evaluation.graders.predict", lambda judge, images: predictions)
    figures = grade_images(IMAGES, ["a red duck, back view", "a red duck", "a duck"], graders)
    assert figures["judge_object"] == pytest.approx(2 / 3) and figures["judge_colour"] == 0.5
    assert -1 <= figures["clip_score"] <= 1 and 0 <= figures["saturation"] <= 1
    assert "judge_view" not in figures


def test_figures_without_their_grader_are_left_out(graders: Graders) -> None:
    assert set(grade_images(IMAGES, ["a red duck"] * 3, Graders())) == {"saturation"}
    assert set(grade_images(IMAGES, ["x"] * 3, Graders(clip=graders.clip))) == {"clip_score", "saturation"}
    with pytest.raises(UserError, match="give features="):
        Graders().features(IMAGES)


def test_features_default_to_the_judge_then_to_clip(tiny_teacher_folder: Path) -> None:
    teacher = str(tiny_teacher_folder)
    by_judge = load_graders(teacher, "judge64")
    assert torch.equal(by_judge.features(IMAGES), judge_features(load_judge("judge64"), IMAGES))
    without = load_graders(teacher, None)
    assert without.clip is not None
    assert torch.equal(without.features(IMAGES), without.clip.image_features(IMAGES))
    named = load_graders(teacher, None, features="judge64")
    assert torch.equal(named.features(IMAGES), by_judge.features(IMAGES))
