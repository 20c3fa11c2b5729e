"""Label columns: which rows count; accuracy by column, joint and by subset, counted by hand."""

from typing import Any

import pytest
import torch

from distill.evaluation import labels as module
from distill.evaluation.judge import Judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.evaluation.labels import LabelOptions, fill_caption, judge_accuracy, template_columns
from distill.runtime.errors import UserError

WORLD = LabelOptions(
    only_if=(("view", "has_front"),),
    in_caption=("view",),
    joint=("object", "colour"),
    subsets=(("held_out_combinations", "held_out"),),
    exclude_if="relation",
)
LABELS = {"object": ("cube", "duck"), "colour": ("blue", "orange"), "view": ("back", "front")}
IMAGES = torch.zeros(4, 3, 16, 16)


def row(name: str, colour: str, view: str, has_front: bool, held_out: bool) -> dict[str, Any]:
    text = f"a {colour} {name}, {view} view"
    return {
        "text": text,
        "object": name,
        "colour": colour,
        "view": view,
        "has_front": has_front,
        "held_out": held_out,
    }


@pytest.fixture
def judge(monkeypatch: pytest.MonkeyPatch) -> Judge:
    predictions = {
        "object": ["duck", "duck", "cube", "cube"],
        "colour": ["blue"] * 4,
        "view": ["front", "front", "front", "back"],
    }
    monkeypatch.setattr(module, "predict", lambda judge, images: predictions)
    return Judge(LABELS, JudgeOptions(tuple(LABELS), width=8))


def rows() -> list[dict[str, Any]]:
    return [
        row("duck", "blue", "front", True, False),
        row("duck", "orange", "back", True, True),
        row("cube", "blue", "front", False, True),  # no front: its view does not count
        {**row("duck", "blue", "back", True, False), "text": "a blue duck"},  # its caption names no view
    ]


def test_accuracy_by_hand(judge: Judge) -> None:
    assert judge_accuracy(judge, IMAGES, rows(), WORLD) == {
        "object": 0.75,
        "colour": 0.75,
        "object_and_colour": 0.5,
        "view": 0.5,
        "held_out_combinations": 0.5,
    }


def test_columns_are_configurable_and_those_absent_are_left_out(judge: Judge) -> None:
    only_colour = [{"text": "x", "colour": "blue"}, {"text": "y", "colour": None}] * 2
    assert judge_accuracy(judge, IMAGES, only_colour, WORLD) == {"colour": 1.0}
    assert judge_accuracy(judge, IMAGES, [{"text": "x"}] * 4, WORLD) == {}
    assert judge_accuracy(judge, IMAGES, rows(), LabelOptions(columns=("object",))) == {"object": 0.75}
    with pytest.raises(UserError, match="the judge predicts object, colour, view: labels.columns names size"):
        judge_accuracy(judge, IMAGES, rows(), LabelOptions(columns=("size",)))


def test_the_conditions_of_judge_and_options_add_up(judge: Judge) -> None:
    options = LabelOptions(columns=("view",))
    assert judge_accuracy(judge, IMAGES, rows(), options)["view"] == 0.75
    conditional = Judge(LABELS, JudgeOptions(tuple(LABELS), (("view", "has_front"),), width=8))
    assert judge_accuracy(conditional, IMAGES, rows(), options)["view"] == pytest.approx(2 / 3)


def test_rows_with_a_value_in_the_excluding_column_have_no_labels() -> None:
    pairs = [{"relation": ""}, {"relation": "on top of"}, {}]
    assert WORLD.labelled(pairs) == [0, 2] and LabelOptions().labelled(pairs) == [0, 1, 2]


def test_captions_of_classes() -> None:
    assert template_columns("a {colour} {object}") == ["colour", "object"] and template_columns("") == []
    assert fill_caption("a {colour} {object}", {"colour": "orange", "object": "car"}) == "an orange car"
    assert fill_caption("a {colour} {object}", {"colour": "red", "object": "apple"}) == "a red apple"
    with pytest.raises(UserError, match="expected one column"):
        LabelOptions(caption_detail="{view} {size}")
