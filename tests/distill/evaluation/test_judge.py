"""The judge: learns a separable folder, masks rows that do not count, saves and loads."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from precision_checks import assert_float32_checkpoints
from torch import Tensor

from distill.data.folders import CaptionedImages
from distill.evaluation.judge import (
    Judge,
    augment,
    judge_features,
    judge_loss,
    load_judge,
    predict,
    save_judge,
    train_judge,
)
from distill.evaluation.judge_columns import IGNORE, JudgeOptions, collect_labels, label_table
from distill.evaluation.labels import judge_accuracy
from distill.runtime.errors import UserError
from distill.runtime.precision import PrecisionName
from distill.runtime.run import Run, RunOptions

LABELS = {"object": ("bar", "disc"), "colour": ("blue", "red"), "view": ("back", "front")}
TINY = JudgeOptions(tuple(LABELS), (("view", "has_front"),), width=8, batch=32)


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_it_is_trained_in_half_precision_with_float32_weights(
    precision: PrecisionName, tmp_path: Path
) -> None:
    options = RunOptions(str(tmp_path), 40, checkpoint_every=20, trackers=(), precision=precision)
    judge = train_judge(Run(options, {}, "judge"), toy(128, 0), TINY)
    assert_float32_checkpoints(tmp_path)
    data = toy(64, 1)
    assert judge_accuracy(judge, data.composite(slice(None)), data.rows)["colour"] > 0.9


def row(view: str | None = "front", has_front: bool | None = True) -> dict[str, Any]:
    return {"text": "", "object": "disc", "colour": "red", "view": view, "has_front": has_front}


def toy(count: int, seed: int) -> CaptionedImages:
    """Red or blue discs and bars, RGBA 32 x 32; a dark spot on the right of some discs is their front."""
    generator = torch.Generator().manual_seed(seed)
    y, x = torch.meshgrid(torch.linspace(-1, 1, 32), torch.linspace(-1, 1, 32), indexing="ij")
    images, rows = [], []
    for disc, red, front in torch.randint(0, 2, (count, 3), generator=generator).bool().tolist():
        shape = x**2 + y**2 < 0.36 if disc else (x.abs() < 0.2) & (y.abs() < 0.8)
        image = torch.zeros(4, 32, 32)
        image[0 if red else 2], image[3] = shape.float(), shape.float()
        if disc and front:
            image[:3, ((x - 0.3) ** 2 + y**2 < 0.04)] = 0
        images.append((image * 255).byte())
        rows.append(row("front" if front else "back", disc))
        rows[-1] |= {"object": "disc" if disc else "bar", "colour": "red" if red else "blue"}
    return CaptionedImages(torch.stack(images), rows)


def logits_of(judge: Judge, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        return judge(images)


def accuracy(judge: Judge, data: CaptionedImages) -> dict[str, float]:
    return judge_accuracy(judge, data.composite(slice(None)), data.rows)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Judge:
    options = RunOptions(str(tmp_path_factory.mktemp("judge")), 80, trackers=(), preview_every=80)
    return train_judge(Run(options, {}, "judge"), toy(400, 0), TINY)


def test_a_short_training_separates_a_separable_folder(trained: Judge) -> None:
    figures = accuracy(trained, toy(200, 1))
    assert figures.keys() == {"object", "colour", "view"}
    assert min(figures.values()) > 0.95, figures
    assert not trained.training


def test_accuracy_counts_only_rows_that_count(trained: Judge) -> None:
    data = toy(60, 2)
    for each in data.rows:
        if not each["has_front"]:
            each["view"] = "neither"  # wrong whatever is predicted, were it counted
        each["colour"] = None
    figures = accuracy(trained, data)
    assert figures["view"] > 0.95
    assert "colour" not in figures


def test_saved_judges_predict_the_same_after_loading(trained: Judge, tmp_path: Path) -> None:
    images = torch.rand(5, 3, 32, 32)
    save_judge(trained, tmp_path, {"test": {"object": 1.0}})
    loaded = load_judge(tmp_path)
    before, after = logits_of(trained, images), logits_of(loaded, images)
    assert all(torch.equal(before[name], after[name]) for name in LABELS)
    assert next(loaded.parameters()).dtype == torch.float32
    assert loaded.labels == LABELS and loaded.options == TINY
    assert predict(loaded, images) == predict(trained, images)
    assert judge_features(loaded, images).shape == (5, 128)
    assert json.loads((tmp_path / "judge.json").read_text())["metrics"] == {"test": {"object": 1.0}}


def test_a_hidden_layer_reads_where_features_are(tmp_path: Path) -> None:
    """The mean of the features does not change where they are permuted, the layer's output does."""
    torch.manual_seed(0)
    judge = Judge(LABELS, replace(TINY, hidden=24)).eval()
    images = torch.rand(3, 3, 64, 64)
    assert judge_features(judge, images).shape == (3, 24) and judge.hidden is not None
    maps = judge.trunk(images)
    turned = maps.flip(3)
    torch.testing.assert_close(maps.mean((2, 3)), turned.mean((2, 3)))
    assert not torch.allclose(judge.hidden(maps), judge.hidden(turned))
    save_judge(judge, tmp_path, {})
    assert load_judge(tmp_path).options.hidden == 24 and predict(load_judge(tmp_path), images)
    with pytest.raises(UserError, match="hidden 0"):
        replace(TINY, hidden=0)


def test_training_starts_from_the_convolutions_of_another_judge(trained: Judge, tmp_path: Path) -> None:
    options = replace(TINY, attributes=("colour",), only_if=(), hidden=16, learning_rate=1e-6)
    run = Run(RunOptions(str(tmp_path), 1, trackers=()), {}, "judge")
    judge = train_judge(run, toy(64, 3), options, trained)
    for name, value in trained.trunk.named_parameters():
        torch.testing.assert_close(judge.trunk.get_parameter(name), value, atol=1e-3, rtol=1e-3)
    other = Run(RunOptions(str(tmp_path / "other"), 1, trackers=()), {}, "judge")
    with pytest.raises(UserError, match="the initial judge has another size"):
        train_judge(other, toy(64, 3), replace(options, width=16), trained)


def test_the_default_judge_is_small(tmp_path: Path) -> None:
    judge = Judge(
        {"object": [str(i) for i in range(23)], "colour": list("abcdefgh"), "view": list("abcd")},
        JudgeOptions(("object", "colour", "view")),
    )
    assert sum(value.numel() for value in judge.parameters()) <= 700_000
    save_judge(judge, tmp_path, {})
    assert (tmp_path / "model.safetensors").stat().st_size <= 1.5e6


@pytest.mark.parametrize("bad", [row(view=None), row(has_front=False), row(has_front=None)])
def test_a_row_that_does_not_count_leaves_no_gradient_in_its_head(bad: dict[str, Any]) -> None:
    judge = Judge(LABELS, TINY)
    images = torch.rand(2, 3, 32, 32)
    judge_loss(judge(images), label_table([bad, bad], LABELS, TINY), 0.05).backward()
    assert all(value.grad.count_nonzero() == 0 for value in judge.heads["view"].parameters())
    assert judge.heads["object"].weight.grad.count_nonzero() > 0
    # beside a row that counts, it does not dilute that row's loss either
    mixed, single = (label_table(rows, LABELS, TINY) for rows in ([row(), bad], [row()]))
    logits = torch.randn(2, 2)
    first = judge_loss({"view": logits[:1]}, single[:, 2:], 0.05)
    torch.testing.assert_close(judge_loss({"view": logits}, mixed[:, 2:], 0.05), first)


def test_the_condition_is_an_option_and_labels_come_from_rows_that_count() -> None:
    rows = [row("front"), row("back"), row("odd", has_front=False)]
    assert collect_labels([*rows, {**row(), "object": "bar", "colour": "blue"}], TINY) == LABELS
    unconditional = JudgeOptions(attributes=("view",), only_if=())
    assert collect_labels(rows, unconditional) == {"view": ("back", "front", "odd")}
    assert label_table([row(None), row("back")], LABELS, TINY)[:, 2].tolist() == [IGNORE, 0]


def test_augmentation_keeps_range_hue_and_sides() -> None:
    left_red = torch.full((64, 3, 32, 32), 0.5)
    left_red[:, 1:, :, 4:14] = 0.1
    left_red[:, 0, :, 4:14] = 0.7
    augmented = augment(left_red, torch.Generator().manual_seed(0))
    assert augmented.min() >= 0 and augmented.max() <= 1 and not torch.equal(augmented, left_red)
    redness = (augmented[:, 0] - augmented[:, 1]).mean(1)  # (64, 32) over columns
    assert (redness[:, :16].sum(1) > redness[:, 16:].sum(1)).all()
    assert torch.equal(augmented, augment(left_red, torch.Generator().manual_seed(0)))


def test_foreign_folders_and_bad_values_are_refused(trained: Judge, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        load_judge(tmp_path / "none")
    (tmp_path / "judge.json").write_text("{}")
    with pytest.raises(UserError, match="holds no judge"):
        load_judge(tmp_path)
    save_judge(trained, tmp_path, {})
    (tmp_path / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="damaged"):
        load_judge(tmp_path)
    with pytest.raises(UserError, match="'cone'"):
        label_table([{**row(), "object": "cone"}], LABELS, TINY)
    with pytest.raises(UserError, match="at least two"):
        collect_labels([row()], TINY)
    with pytest.raises(UserError, match="neither attributes nor directions"):
        JudgeOptions(attributes=())


def test_numbers_truth_values_and_entries_of_columns_are_labels(tmp_path: Path) -> None:
    """The digit 0 and what is False count; null and the empty text do not."""
    options = JudgeOptions(("label", "attributes.Smiling"), width=8)
    rows = [
        {"label": 0, "attributes": {"Smiling": False}},
        {"label": 10, "attributes": {"Smiling": True}},
        {"label": None, "attributes": {"Smiling": ""}},
        {"label": "", "attributes": {}},
    ]
    labels = collect_labels(rows, options)
    assert labels == {"label": ("0", "10"), "attributes.Smiling": ("false", "true")}
    assert label_table(rows, labels, options).tolist() == [[0, 0], [1, 1], [IGNORE] * 2, [IGNORE] * 2]
    judge = Judge(labels, options, 16).eval()
    save_judge(judge, tmp_path, {})
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    assert predict(load_judge(tmp_path), images).keys() == labels.keys()
