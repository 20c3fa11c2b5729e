"""Evaluation of generators: figures of captions alone, and rows that are kept for the same weights only."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from distill.data.folders import CaptionedImages
from distill.evaluation.generate import student_sampler, teacher_sampler
from distill.evaluation.generator import (
    GeneratorEvaluationOptions,
    Reference,
    cached_rows,
    evaluate_generator,
    real_figures,
    reference,
)
from distill.evaluation.graders import Graders, load_graders
from distill.evaluation.labels import LabelOptions, PairLabels
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


def test_pairs_are_graded_by_a_judge_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of two things alone; real images too. A judge that does not read their columns is refused."""
    pair = PairLabels(("object",), ("second_object",), "relation")
    one = {"text": "a duck", "object": "duck", "relation": "", "second_object": ""}
    two = {"text": "x", "object": "cube", "relation": "on top of", "second_object": "cone"}
    images = torch.zeros(3, 3, 8, 8, dtype=torch.uint8)
    images[2] = 255
    judge: Any = SimpleNamespace(labels=dict.fromkeys(pair.visible, ("x",)))

    def predict(judge: Any, images: torch.Tensor) -> dict[str, list[str]]:
        right = {**two, **pair.derive(two)}
        return {name: [right[name] if image.any() else "x" for image in images] for name in pair.visible}

    monkeypatch.setattr("distill.evaluation.evaluation_set.predict", predict)
    graders = Graders(extract=lambda images: images.flatten(1))
    data = CaptionedImages(images, [one, two, two])
    real = reference(data, graders, LabelOptions(pair=pair), judge)
    assert real_figures(real, 3)["judge_pair_right"] == 0.5
    assert real_figures(real, 1) == {"generator": "real images"}
    with pytest.raises(UserError, match="the judge of pairs does not read"):
        reference(data, graders, LabelOptions(pair=pair), SimpleNamespace(labels={}))  # type: ignore[arg-type]
