"""Captions of two things: what counts as right, strictly and up to the side they are seen from."""

from pathlib import Path
from typing import Any

import pytest

from distill.evaluation.judge import Judge, JudgeOptions
from distill.evaluation.judge_run import judge_metrics, load_splits
from distill.evaluation.labels import LabelOptions, PairLabels
from distill.evaluation.pairs import pair_accuracy
from distill.runtime.errors import UserError
from sds3d.world.world import WorldOptions, make_world

PAIR = PairLabels(
    ("object", "colour"), ("second_object", "second_colour"), "relation", ("next to", "in front of")
)


def row(first: str, relation: str, second: str) -> dict[str, Any]:
    """`red cube` in a relation to `blue cone`; a single thing where there is no relation."""
    colour, name = first.split()
    second_colour, second_name = second.split() if second else ("", "")
    columns = {"object": name, "colour": colour, "relation": relation}
    return {**columns, "second_object": second_name, "second_colour": second_colour}


def accuracy(*pairs: tuple[dict[str, Any], dict[str, Any]]) -> dict[str, float]:
    """Of predictions and rows."""
    predictions = {name: [predicted[name] for predicted, _ in pairs] for name in PAIR.columns}
    return pair_accuracy(predictions, [true for _, true in pairs], PAIR)


@pytest.mark.parametrize(
    ("predicted", "true", "strict", "any_side"),
    [
        (("red cube", "on top of", "blue cone"), ("red cube", "on top of", "blue cone"), 1, 1),
        (("blue cone", "on top of", "red cube"), ("red cube", "on top of", "blue cone"), 0, 0),
        (("red cube", "next to", "blue cone"), ("red cube", "on top of", "blue cone"), 0, 0),
        (("red cube", "next to", "blue cone"), ("red cube", "in front of", "blue cone"), 0, 1),
        (("blue cone", "next to", "red cube"), ("red cube", "next to", "blue cone"), 0, 1),
        (("blue cone", "in front of", "red cube"), ("red cube", "next to", "blue cone"), 0, 1),
        (("blue cube", "next to", "red cone"), ("red cube", "next to", "blue cone"), 0, 0),  # mixed colours
        (("red cube", "next to", "blue ball"), ("red cube", "next to", "blue cone"), 0, 0),
    ],
)
def test_what_is_right(predicted: Any, true: Any, strict: int, any_side: int) -> None:
    figures = accuracy((row(*predicted), row(*true)))
    assert figures["pair_right"] == strict and figures["pair_right_any_side"] == any_side


def test_only_pairs_count() -> None:
    pair, single = row("red cube", "on top of", "blue cone"), row("red cube", "", "")
    wrong = row("green cube", "on top of", "blue cone")
    figures = accuracy((pair, pair), (wrong, pair), (pair, single))
    assert figures == {
        "pair_first": 0.5,
        "pair_second": 1.0,
        "pair_relation": 1.0,
        "pair_right": 0.5,
        "pair_right_any_side": 0.5,
    }
    assert accuracy((pair, single)) == {}
    assert PAIR.rows([pair, single, {}]) == [0] and PairLabels().rows([pair]) == []


def test_incomplete_columns_are_refused() -> None:
    with pytest.raises(UserError, match="as many of the second thing as of the first"):
        PairLabels(("object", "colour"), ("second_object",), "relation")
    with pytest.raises(UserError, match="and the relation's"):
        PairLabels(("object",), ("second_object",))


def test_a_judge_of_pairs_reports_them_and_joins_folders(tmp_path: Path) -> None:
    """An untrained one, on worlds of pairs and of single objects."""
    for name, pairs in (("pairs", 1.0), ("single", 0.0)):
        options = WorldOptions(train=2, validation=0, test=6, pairs=pairs, supersample=1, hold_out=False)
        make_world(tmp_path / name, options, workers=1)
    data = load_splits((str(tmp_path / "pairs"), str(tmp_path / "single")), "test")
    assert len(data) == 12 and sum(bool(row["relation"]) for row in data.rows) == 6
    assert len(load_splits(str(tmp_path / "single"), "test")) == 6
    labels = {name: tuple(sorted({row[name] for row in data.rows if row[name]})) for name in PAIR.columns}
    judge = Judge(labels, JudgeOptions(tuple(labels), (("azimuth", "has_front"),), ("azimuth",), width=8))
    metrics = judge_metrics(judge.eval(), data, LabelOptions(pair=PAIR))
    expected = {*PAIR.columns, "pair_right", "pair_right_any_side", "azimuth_within_15"}
    assert expected <= set(metrics)
    assert "pair_right" not in judge_metrics(judge, data, LabelOptions())
