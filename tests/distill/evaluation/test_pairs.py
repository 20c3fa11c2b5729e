"""Captions of two things: what counts as right, strictly and up to the side they are seen from."""

from pathlib import Path
from typing import Any

import pytest

from distill.evaluation.judge import Judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.evaluation.judge_run import judge_metrics, load_splits, with_pair_columns
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


def accuracy(*pairs: tuple[dict[str, Any], dict[str, Any]], strict: bool = True) -> dict[str, float]:
    """Of what is in pictures and of what their captions say; a judge reads the former."""
    read = [{**row, **PAIR.derive(row)} for row, _ in pairs]
    names = (*PAIR.visible, "relation", "order") if strict else PAIR.visible
    predictions = {name: [row[name] for row in read] for name in names}
    return pair_accuracy(predictions, [true for _, true in pairs], PAIR)


@pytest.mark.parametrize(
    ("drawn_pair", "caption", "right", "strict"),
    [
        (("red cube", "on top of", "blue cone"), ("red cube", "on top of", "blue cone"), 1, 1),
        (("blue cone", "on top of", "red cube"), ("red cube", "on top of", "blue cone"), 0, 0),
        (("red cube", "next to", "blue cone"), ("red cube", "on top of", "blue cone"), 0, 0),
        (("red cube", "next to", "blue cone"), ("red cube", "next to", "blue cone"), 1, 1),
        (("red cube", "next to", "blue cone"), ("red cube", "in front of", "blue cone"), 1, 0),
        (("blue cone", "next to", "red cube"), ("red cube", "next to", "blue cone"), 1, 0),
        (("blue cone", "in front of", "red cube"), ("red cube", "next to", "blue cone"), 1, 0),
        (("blue cube", "next to", "red cone"), ("red cube", "next to", "blue cone"), 0, 0),  # mixed colours
        (("red cube", "next to", "blue ball"), ("red cube", "next to", "blue cone"), 0, 0),
        (("red cube", "next to", "red cube"), ("red cube", "next to", "red cube"), 1, 1),
    ],
)
def test_what_is_right(drawn_pair: Any, caption: Any, right: int, strict: int) -> None:
    figures = accuracy((row(*drawn_pair), row(*caption)))
    assert figures["pair_right"] == right and figures["pair_right_strict"] == strict
    assert "pair_right_strict" not in accuracy((row(*drawn_pair), row(*caption)), strict=False)


def test_columns_show_no_more_than_a_picture() -> None:
    first, second = row("red cube", "next to", "blue cone"), row("blue cone", "in front of", "red cube")
    one, two = PAIR.derive(first), PAIR.derive(second)
    assert {one.pop("order"), two.pop("order")} == {"sorted", "reversed"} and one == two
    assert one["arrangement"] == "next to or in front of"
    assert (one["object_a"], one["colour_a"], one["object_b"], one["colour_b"]) == (
        "cone",
        "blue",
        "cube",
        "red",
    )
    top = PAIR.derive(row("red cube", "on top of", "blue cone"))
    assert top["object_a"] == "cube" and top["arrangement"] == "on top of" and top["order"] == ""
    single = PAIR.derive(row("red cube", "", ""))
    assert single["object_a"] == "cube" and {single[name] for name in ("object_b", "arrangement")} == {""}
    assert PairLabels().derive(first) == {} and PairLabels().visible == ()


def test_only_pairs_count() -> None:
    pair, single = row("red cube", "on top of", "blue cone"), row("red cube", "", "")
    wrong = row("green cube", "on top of", "blue cone")
    figures = accuracy((pair, pair), (wrong, pair), (pair, single))
    expected = {"pair_things": 0.5, "pair_arrangement": 1.0, "pair_right": 0.5, "pair_right_strict": 0.5}
    assert figures == expected
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
    data = load_splits((str(tmp_path / "pairs"), str(tmp_path / "single")), "test", 64)
    assert len(data) == 12 and sum(bool(row["relation"]) for row in data.rows) == 6
    assert len(load_splits(str(tmp_path / "single"), "test", 64)) == 6
    labels = LabelOptions(pair=PAIR)
    data = with_pair_columns(data, labels)
    values = {name: tuple(sorted({row[name] for row in data.rows if row[name]})) for name in PAIR.visible}
    judge = Judge(values, JudgeOptions(tuple(values), (("azimuth", "has_front"),), ("azimuth",), width=8))
    metrics = judge_metrics(judge.eval(), data, labels)
    assert {*PAIR.visible, "pair_right", "azimuth_within_15"} <= set(metrics)
    assert "pair_right" not in judge_metrics(judge, data, LabelOptions())
