"""Evaluation of generators: figures of captions alone, and rows that are kept for the same weights only."""

from pathlib import Path

import pytest
import torch

from distill.data.folders import CaptionedImages
from distill.evaluation.generate import student_sampler, teacher_sampler
from distill.evaluation.generator import (
    GeneratorEvaluationOptions,
    Reference,
    cached_rows,
    evaluate_generator,
    reference,
)
from distill.evaluation.graders import Graders, load_graders
from distill.evaluation.labels import LabelOptions
from distill.one_step.student import Student, StudentOptions
from distill.runtime.errors import UserError
from distill.teacher.latent import LatentDiffusionTeacher

SMALL = GeneratorEvaluationOptions(samples=6, captions=2, each=2, neighbours=1)


@pytest.fixture
def real(tiny_teacher: LatentDiffusionTeacher) -> Reference:
    """A split of captions without labels, compared in CLIP's features."""
    rows = [{"text": text} for text in ("a red cube", "a blue duck", "a green cone", "a red duck")]
    images = (torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).byte()
    graders = load_graders(tiny_teacher.name_or_path, judge=None)
    return reference(CaptionedImages(images, rows), graders, LabelOptions(joint=("object", "colour")))


def test_captions_alone_are_gradable(tiny_teacher: LatentDiffusionTeacher, real: Reference) -> None:
    sampler = teacher_sampler(tiny_teacher, 1, 2.0)
    figures, images = evaluate_generator(sampler, tiny_teacher, real, SMALL)
    assert images.shape == (6, 3, 64, 64) and figures["nfe"] == 2
    assert figures["frechet"] > 0 and figures["diversity"] > 0 and -1 <= figures["clip_score"] <= 1
    assert 0 <= figures["precision"] <= 1 and 0 <= figures["recall"] <= 1
    assert not any(name.startswith("judge_") for name in figures)


def test_features_are_required(real: Reference) -> None:
    with pytest.raises(UserError, match="no judge and no CLIP to take features from"):
        reference(real.data, Graders(), LabelOptions())


def test_a_row_is_kept_for_the_same_weights_and_query_only(
    tiny_teacher: LatentDiffusionTeacher, real: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run directory that is trained again keeps its name and must not be given the old figures."""
    calls: list[int] = []

    def evaluate(*_: object) -> tuple[dict[str, int], torch.Tensor]:
        calls.append(1)
        return {"frechet": len(calls)}, torch.zeros(1, 3, 8, 8)

    monkeypatch.setattr("distill.evaluation.generator.evaluate_generator", evaluate)
    student = Student.from_teacher(tiny_teacher, StudentOptions())

    def frechet(seed: int) -> int:
        samplers = [student_sampler("s", student)]
        (row,) = cached_rows(samplers, tiny_teacher, real, SMALL, {"seed": seed}, tmp_path)
        return row["frechet"]

    assert [frechet(0), frechet(0), frechet(1)] == [1, 1, 2] and (tmp_path / "s.png").is_file()
    with torch.no_grad():
        next(student.parameters())[0] += 1e-3
    assert [frechet(1), frechet(1)] == [3, 3]
