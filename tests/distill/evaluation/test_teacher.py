"""Evaluation of teachers: reports with label columns and of captions alone, cameras, pairs, resuming."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import script
from PIL import Image
from torch import Tensor

from distill.data.folders import CaptionedImages
from distill.evaluation import teacher as evaluation
from distill.evaluation.clip import load_clip_scorer
from distill.evaluation.evaluation_set import EvaluationSet, SetGraders, make_evaluation_set
from distill.evaluation.features import judge_extractor
from distill.evaluation.generate import generate, teacher_sampler
from distill.evaluation.graders import Graders, load_graders
from distill.evaluation.judge import Judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.evaluation.labels import LabelOptions, PairLabels, fill_caption
from distill.evaluation.metrics import frechet_distance, moments
from distill.evaluation.teacher import EvaluationOptions, evaluate_teacher, zero_shot
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, to_bytes
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from distill.teacher.vae import psnr

LABELS = {"object": ("cube", "duck"), "colour": ("blue", "orange"), "view": ("back", "front")}
RETRIEVAL = ("retrieval_top1", "retrieval_top5", "retrieval_captions")
WORLD = LabelOptions(
    only_if=(("view", "has_front"),),
    in_caption=("view",),
    joint=("object", "colour"),
    subsets=(("held_out_combinations", "held_out"),),
    exclude_if="relation",
    pair=PairLabels(("object",), ("second_object",), "relation", ("next to", "in front of")),
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


@pytest.fixture
def no_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of CLIP, VAE and denoiser nothing is computed, to save time."""
    monkeypatch.setattr(evaluation, "part_figures", lambda teacher, clip, test: {"judge_accuracy": {}})


SMALL = EvaluationOptions(samples=4, guidance=(1.0, 3.0), steps=1)


def evaluation_set(
    graders: Graders, data: CaptionedImages, labels: LabelOptions = WORLD, pair_judge: Judge | None = None
) -> EvaluationSet:
    return make_evaluation_set(data, SetGraders(graders, labels, pair_judge), SMALL.samples)


def evaluate(
    teacher: LatentDiffusionTeacher, test: EvaluationSet, folder: Path, options: EvaluationOptions = SMALL
) -> dict[str, Any]:
    return evaluate_teacher(teacher, test.graders.common.clip, test, options, folder, {"data": "d"})


def pixels(path: Path) -> Any:
    return np.asarray(Image.open(path))


def grid_of(images: Tensor) -> Any:
    return to_bytes(image_grid(images, 12))


def test_the_report_is_complete(
    tiny_teacher: LatentDiffusionTeacher, graders: Graders, tmp_path: Path
) -> None:
    rows = world_rows()
    data = CaptionedImages(noise_images(10), [*rows, {**rows[0], "relation": "on top of"}, {"text": " "}])
    test = evaluation_set(graders, data)
    figures = evaluate(tiny_teacher, test, tmp_path)
    assert [sample["guidance"] for sample in figures["samples"]] == [1.0, 3.0]
    assert {sample["condition"] for sample in figures["samples"]} == {"caption"}
    assert set(figures["clip"]) == {"object", "colour", "view", *RETRIEVAL}
    assert figures["clip"]["retrieval_captions"] == 8 and figures["vae"]["psnr"] > 0
    assert set(figures["frechet"]) == {"real_count", "floor", "floor_counts", "reconstructions"}
    assert figures["frechet"]["real_count"] == 8 and figures["frechet"]["floor_counts"] == [4, 4]
    assert figures["frechet"]["reconstructions"] > 0
    assert set(figures["judge_accuracy"]["real"]) == {*LABELS, "object_and_colour", "held_out_combinations"}
    best = max(sample["object_and_colour"] for sample in figures["samples"])
    scale = next(sample["guidance"] for sample in figures["samples"] if sample["object_and_colour"] == best)
    texts = [each["text"] for each in rows[:4]]
    expected = generate(tiny_teacher, texts, teacher_sampler(tiny_teacher, 1, scale), SMALL.batch).images
    assert (pixels(tmp_path / "samples.png") == grid_of(expected)).all()


@pytest.mark.usefixtures("no_parts")
def test_figures_are_those_of_all_samples_whatever_the_batch(
    tiny_teacher: LatentDiffusionTeacher, graders: Graders, tmp_path: Path
) -> None:
    data = CaptionedImages(noise_images(8), world_rows())
    test = evaluation_set(graders, data)
    options = EvaluationOptions(samples=11, guidance=(2.0,), steps=1, batch=5)  # more than there are captions
    row = evaluate(tiny_teacher, test, tmp_path, options)["samples"][0]
    rows = [data.rows[i % 8] for i in range(11)]
    texts = [each["text"] for each in rows]
    images = generate(tiny_teacher, texts, teacher_sampler(tiny_teacher, 1, 2.0), 11).images
    expected = {**graders.accuracy(images, rows, WORLD), **graders.clip_figures(images, texts)}
    real = moments(graders.features(data.composite(slice(None))))
    expected["frechet"] = frechet_distance(moments(graders.features(images)), real)
    assert row.pop("condition") == "caption"
    assert row == pytest.approx({"guidance": 2.0, **expected}, rel=1e-3)


def test_captions_alone_give_frechet_distance_and_clip_score(
    tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    """No label column and no judge: features are CLIP's, the best samples those of the lowest distance."""
    captions = [{"text": text} for text in ("a red cube", "a blue duck", "a green cone", "a red duck")]
    data = CaptionedImages(noise_images(4)[:, :3], captions)
    graders = load_graders(tiny_teacher.name_or_path, judge=None)
    for name, labels in (("none", LabelOptions()), ("world", WORLD)):
        figures = evaluate(tiny_teacher, evaluation_set(graders, data, labels), tmp_path / name)
        assert set(figures["clip"]) == set(RETRIEVAL)
        assert figures["judge_accuracy"] == {"real": {}, "reconstructions": {}}
        rows = figures["samples"]
        assert all(set(row) == {"guidance", "condition", "clip_score", "frechet"} for row in rows)
        best = min(rows, key=lambda row: row["frechet"])
        sampler = teacher_sampler(tiny_teacher, 1, best["guidance"])
        expected = generate(tiny_teacher, data.texts, sampler, SMALL.batch).images
        assert (pixels(tmp_path / name / "samples.png") == grid_of(expected)).all()


@pytest.mark.usefixtures("no_parts")
def test_rows_resume(
    tiny_teacher: LatentDiffusionTeacher, graders: Graders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    test = evaluation_set(graders, CaptionedImages(noise_images(8), world_rows()))
    calls: list[float] = []

    def counted(*arguments: Any) -> dict[str, Any]:
        _, _, _, scale, _, path = arguments
        calls.append(scale)
        Image.new("RGB", (1, 1)).save(path.with_suffix(".png"))
        return {"frechet": scale}

    monkeypatch.setattr(evaluation, "sample_figures", counted)
    first = evaluate(tiny_teacher, test, tmp_path)
    assert evaluate(tiny_teacher, test, tmp_path, replace(SMALL, batch=2)) == first and calls == [1.0, 3.0]
    more = replace(SMALL, guidance=(1.0, 2.0, 3.0))
    assert evaluate(tiny_teacher, test, tmp_path, more)["samples"][::2] == first["samples"]
    assert calls == [1.0, 3.0, 2.0]
    evaluate(tiny_teacher, test, tmp_path, replace(SMALL, seed=1))
    assert calls[3:] == [1.0, 3.0]
    with torch.no_grad():
        tiny_teacher.unet.conv_out.bias += 1
    evaluate(tiny_teacher, test, tmp_path, replace(SMALL, seed=1))
    assert calls[5:] == [1.0, 3.0]


@pytest.mark.usefixtures("no_parts")
def test_a_teacher_of_cameras_is_also_given_those_of_the_images(
    multi_view_teacher_folder: Path, graders: Graders, tmp_path: Path
) -> None:
    teacher = load_latent_diffusion(str(multi_view_teacher_folder))
    rows = [{**row, "pose": [i / 8, 0.3, 3.0, 0.0, 0.0]} for i, row in enumerate(world_rows())]
    test = evaluation_set(graders, CaptionedImages(noise_images(8), rows))
    options = replace(SMALL, guidance=(2.0,))
    samples = evaluate(teacher, test, tmp_path, options)["samples"]
    assert [row["condition"] for row in samples] == ["caption", "caption and camera"]
    assert samples[0]["frechet"] != samples[1]["frechet"]
    poses = torch.tensor([row["pose"] for row in rows[:4]])
    sampler = teacher_sampler(teacher, 1, 2.0, poses)
    images = generate(teacher, [row["text"] for row in rows[:4]], sampler, 4).images
    expected = grid_of(images)
    assert (pixels(tmp_path / "guidance-2-caption-and-camera.png") == expected).all()

    without = evaluation_set(graders, CaptionedImages(noise_images(8), world_rows()))
    row = next(evaluation.sample_rows(teacher, without, options, tmp_path / "without", {}))
    assert row == samples[0]


def test_pairs_are_graded_by_their_own_judge(
    tiny_teacher: LatentDiffusionTeacher, graders: Graders, tmp_path: Path
) -> None:
    names, relations = ("cube", "duck"), ("next to", "on top of")
    labels = {"object_a": names, "object_b": names, "arrangement": ("next to or in front of", "on top of")}
    judge = Judge(labels, JudgeOptions(tuple(labels), width=8)).eval()
    pairs = [
        {"text": f"a red cube {relation} a blue duck", "object": "cube", "relation": relation}
        | {"second_object": "duck"}
        for relation in relations * 2
    ]
    data = CaptionedImages(noise_images(12), [*world_rows(), *pairs])
    test = evaluation_set(graders, data, pair_judge=judge)
    assert len(test.data) == 8 and len(test.pairs) == 4
    options = replace(SMALL, guidance=(2.0,), pairs=3)
    figures = evaluate(tiny_teacher, test, tmp_path, options)
    for row in (*figures["judge_accuracy"].values(), figures["samples"][0]):
        assert {"pair_things", "pair_arrangement"} <= set(row)
        assert 0 <= row["pair_right"] <= row["pair_things"] <= 1
    assert pixels(tmp_path / "guidance-2-caption-pairs.png").shape == (64, 3 * 66 - 2, 3)
    with pytest.raises(UserError, match="the judge of pairs does not read arrangement, object_a, object_b"):
        SetGraders(graders, WORLD, graders.judge)


def test_a_reference_gives_a_floor_at_the_same_count(graders: Graders) -> None:
    data = CaptionedImages(noise_images(8), world_rows())
    reference = CaptionedImages(noise_images(16), world_rows() * 2)
    set_graders = SetGraders(graders, WORLD)
    test = make_evaluation_set(data, set_graders, 7, reference)
    features = graders.features(reference.composite(slice(None)))
    halves = moments(features[:7]), moments(features[7:14])
    assert test.floor_counts == (7, 7) and test.count == 7
    assert test.floor == pytest.approx(frechet_distance(*halves), rel=1e-4)
    torch.testing.assert_close(test.statistics.mean, halves[0].mean, rtol=1e-4, atol=1e-6)
    with pytest.raises(UserError, match="the reference has 16 labelled test images: at least 18"):
        make_evaluation_set(data, set_graders, 9, reference)


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
    assert "frechet" in output and "object" not in output and "clip_score" not in output
    several = [f"teachers=[{tiny_teacher_folder}, {tmp_path / 'teacher'}]", *where[1:], *small]
    output = script("evaluate_teacher", *several, f"output={tmp_path / 's'}")
    assert output.count("caption, guidance 2: clip_score") == 2  # by the first teacher's CLIP
    for folder in (tmp_path / "s").iterdir():
        figures = json.loads((folder / "evaluation.json").read_text())
        assert len(figures["samples"]) == 1 and (folder / "samples.png").is_file()
    message = script("evaluate_teacher", *where, *small, "judge=null", f"output={tmp_path / 'e'}", code=2)
    assert "no judge and no CLIP to take features from" in message
    steps = ["steps=[1]", "evaluation={samples: 4, captions: 2, each: 2, neighbours: 1}"]
    output = script("evaluate_generator", *where, *steps, f"output={tmp_path / 'g'}")
    assert "teacher, 1 steps, guidance 2  2  frechet" in output and "judge_" not in output


def test_a_split_without_labelled_rows_is_refused(graders: Graders) -> None:
    data = CaptionedImages(noise_images(2), [{"text": "x", "relation": "next to"}] * 2)
    with pytest.raises(UserError, match="the test split has 0 rows without relation"):
        evaluation_set(graders, data)
    with pytest.raises(UserError, match="must be positive"):
        EvaluationOptions(steps=0)


def test_reconstruction_error_is_reported_as_psnr(
    tiny_teacher: LatentDiffusionTeacher, graders: Graders, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reconstructions off by 0.1 everywhere have 20 dB."""
    monkeypatch.setattr(LatentDiffusionTeacher, "encode_images", lambda self, images: images)
    monkeypatch.setattr(LatentDiffusionTeacher, "decode", lambda self, latents: latents + 0.1)
    errors: list[Tensor] = []
    data = CaptionedImages(noise_images(5), world_rows()[:5])
    batches = list(evaluation.reconstruct(tiny_teacher, data, errors, batch=2))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    torch.testing.assert_close(psnr(torch.cat(errors)), torch.full((5,), 20.0))


def test_zero_shot_labels_of_real_renders() -> None:
    """The shipped CLIP on reference samples of the shipped teacher: colours are classified."""
    teacher = load_latent_diffusion("shapes64")
    rows = [row(name, colour, "") for name in ("sphere", "cube") for colour in ("red", "blue", "green")]
    texts = [fill_caption(WORLD.caption, each) for each in rows]
    rows = [{**each, "text": text} for each, text in zip(rows, texts, strict=True)]
    images = generate(teacher, texts, teacher_sampler(teacher, 10, 3.0), 6).images
    clip = load_clip_scorer("shapes64")
    assert clip is not None
    figures = zero_shot(clip, CaptionedImages((images * 255).byte(), rows), WORLD)
    assert figures["colour"] == 1.0 and figures["object"] >= 5 / 6 and "view" not in figures
