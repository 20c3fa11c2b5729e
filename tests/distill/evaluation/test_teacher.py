"""Evaluation of a teacher: a complete report with label columns, and one of captions alone."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command_line import script
from PIL import Image
from torch import Tensor

from distill.data.folders import CaptionedImages
from distill.evaluation import teacher as evaluation
from distill.evaluation.clip import load_clip_scorer
from distill.evaluation.features import judge_extractor
from distill.evaluation.generate import generate, teacher_sampler
from distill.evaluation.graders import Graders, load_graders
from distill.evaluation.judge import Judge, JudgeOptions
from distill.evaluation.labels import LabelOptions, fill_caption
from distill.evaluation.teacher import EvaluationOptions, evaluate_teacher, zero_shot
from distill.runtime.errors import UserError
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion

LABELS = {"object": ("cube", "duck"), "colour": ("blue", "orange"), "view": ("back", "front")}
WORLD = LabelOptions(
    only_if=(("view", "has_front"),),
    in_caption=("view",),
    joint=("object", "colour"),
    subsets=(("held_out_combinations", "held_out"),),
    exclude_if="relation",
    caption="a {colour} {object}",
    caption_detail=", {view} view",
)


def row(name: str, colour: str, view: str, has_front: bool = True, held_out: bool = False) -> dict[str, Any]:
    values = {"object": name, "colour": colour, "view": view}
    text = fill_caption(WORLD.caption + WORLD.caption_detail, values)
    return {"text": text, **values, "has_front": has_front, "held_out": held_out, "relation": ""}


def world_rows() -> list[dict[str, Any]]:
    names, colours, views = LABELS.values()
    return [row(names[i % 2], colours[i // 2 % 2], views[i // 4], bool(i % 2), i == 3) for i in range(8)]


def noise_images(count: int) -> Tensor:
    return (torch.rand(count, 4, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).byte()


@pytest.fixture
def graders(tiny_teacher: LatentDiffusionTeacher) -> Graders:
    torch.manual_seed(0)
    judge = Judge(LABELS, JudgeOptions(tuple(LABELS), width=8)).eval()
    return Graders(judge, load_clip_scorer(tiny_teacher.name_or_path), judge_extractor(judge))


def test_the_report_is_complete(tiny_teacher: LatentDiffusionTeacher, graders: Graders) -> None:
    rows = world_rows()
    data = CaptionedImages(noise_images(9), [*rows, {**rows[0], "relation": "on top of"}])
    options = EvaluationOptions(samples=4, guidance=(1.0, 3.0), steps=1)
    figures, samples = evaluate_teacher(tiny_teacher, graders, data, options, WORLD)
    assert [sample["guidance"] for sample in figures["samples"]] == [1.0, 3.0]
    assert samples.shape == (4, 3, 64, 64)
    assert set(figures["clip"]) == {"object", "colour", "view", "retrieval_top1", "retrieval_captions"}
    assert figures["clip"]["retrieval_captions"] == 8 and figures["vae"]["psnr"] > 0
    assert set(figures["frechet"]) == {"real_halves", "reconstructions"}
    assert figures["frechet"]["reconstructions"] > 0
    assert set(figures["judge_accuracy"]["real"]) == {*LABELS, "object_and_colour", "held_out_combinations"}
    best = max(sample["object_and_colour"] for sample in figures["samples"])
    scale = next(sample["guidance"] for sample in figures["samples"] if sample["object_and_colour"] == best)
    sampler = teacher_sampler(tiny_teacher, 1, scale)
    texts = [each["text"] for each in rows[:4]]
    torch.testing.assert_close(samples, generate(tiny_teacher, texts, sampler, options.batch).images)


def test_captions_alone_give_frechet_distance_and_clip_score(tiny_teacher: LatentDiffusionTeacher) -> None:
    """No label column and no judge: features are CLIP's, the best samples those of the lowest distance."""
    captions = [{"text": text} for text in ("a red cube", "a blue duck", "a green cone", "a red duck")]
    data = CaptionedImages(noise_images(4)[:, :3], captions)
    graders = load_graders(tiny_teacher.name_or_path, judge=None)
    options = EvaluationOptions(samples=4, guidance=(1.0, 3.0), steps=1)
    for labels in (LabelOptions(), WORLD):
        figures, samples = evaluate_teacher(tiny_teacher, graders, data, options, labels)
        assert set(figures["clip"]) == {"retrieval_top1", "retrieval_captions"}
        assert figures["judge_accuracy"] == {"real": {}, "reconstructions": {}}
        assert all(set(sample) == {"guidance", "clip_score", "frechet"} for sample in figures["samples"])
        best = min(figures["samples"], key=lambda sample: sample["frechet"])
        sampler = teacher_sampler(tiny_teacher, 1, best["guidance"])
        expected = generate(tiny_teacher, data.texts, sampler, options.batch).images
        torch.testing.assert_close(samples, expected)


def test_the_script_grades_a_folder_of_captions(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """With a teacher as Stable Diffusion's, without CLIP, and a judge that serves for its features alone."""
    shutil.copytree(tiny_teacher_folder, tmp_path / "teacher", ignore=shutil.ignore_patterns("clip"))
    folder = tmp_path / "photos" / "test"
    folder.mkdir(parents=True)
    lines = []
    for index, text in enumerate(("a red cube", "a blue duck", "a green cone", "a red duck")):
        Image.new("RGB", (80, 64), (60 * index, 99, 99)).save(folder / f"{index}.png")
        lines.append(f'{{"file_name": "{index}.png", "text": "{text}"}}\n')
    (folder / "metadata.jsonl").write_text("".join(lines))
    where = [f"teacher={tmp_path / 'teacher'}", f"data={tmp_path / 'photos'}"]
    small = ["evaluation.samples=3", "evaluation.steps=1", "evaluation.guidance=[2]"]
    output = script("evaluate_teacher", *where, *small, f"output={tmp_path / 'e'}")
    assert '"frechet"' in output and '"object"' not in output and "clip_score" not in output
    message = script("evaluate_teacher", *where, *small, "judge=null", f"output={tmp_path / 'e'}", code=2)
    assert "no judge and no CLIP to take features from" in message
    steps = ["steps=[1]", "evaluation={samples: 4, captions: 2, each: 2, neighbours: 1}"]
    output = script("evaluate_generator", *where, *steps, f"output={tmp_path / 'g'}")
    assert "teacher, 1 steps, guidance 2  2  frechet" in output and "judge_" not in output


def test_a_split_without_labelled_rows_is_refused(
    tiny_teacher: LatentDiffusionTeacher, graders: Graders
) -> None:
    data = CaptionedImages(noise_images(2), [{"text": "x", "relation": "next to"}] * 2)
    with pytest.raises(UserError, match="the test split has 0 rows without relation"):
        evaluate_teacher(tiny_teacher, graders, data, EvaluationOptions(), WORLD)
    with pytest.raises(UserError, match="must be positive"):
        EvaluationOptions(steps=0)


def test_reconstruction_error_is_reported_as_psnr(
    tiny_teacher: LatentDiffusionTeacher, graders: Graders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reconstructions off by 0.1 everywhere have 20 dB."""

    def shifted(teacher: object, images: Tensor) -> Tensor:
        return images + 0.1

    monkeypatch.setattr(evaluation, "reconstruct", shifted)
    rows = [row("duck", ("blue", "orange")[i % 2], "front") for i in range(4)]
    options = EvaluationOptions(samples=2, guidance=(1.0,), steps=1)
    data = CaptionedImages(noise_images(4), rows)
    figures, _ = evaluate_teacher(tiny_teacher, graders, data, options, WORLD)
    assert figures["vae"]["psnr"] == pytest.approx(20, abs=1e-3)


def test_zero_shot_labels_of_real_renders() -> None:
    """The shipped CLIP on reference samples of the shipped teacher: colours are classified."""
    teacher = load_latent_diffusion("shapes64")
    rows = [row(name, colour, "") for name in ("sphere", "cube") for colour in ("red", "blue", "green")]
    texts = [fill_caption(WORLD.caption, each) for each in rows]
    rows = [{**each, "text": text} for each, text in zip(rows, texts, strict=True)]
    images = generate(teacher, texts, teacher_sampler(teacher, 10, 3.0), 6).images
    clip = load_clip_scorer("shapes64")
    assert clip is not None
    figures = zero_shot(clip, CaptionedImages((images * 255).byte(), rows), images, WORLD)
    assert figures["colour"] == 1.0 and figures["object"] >= 5 / 6 and "view" not in figures
