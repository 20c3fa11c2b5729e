"""Metadata columns as labels: which of them a data set has, where they count, and accuracy on them."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from string import Formatter
from typing import Any

from torch import Tensor

from distill.evaluation.judge import Judge, predict
from distill.evaluation.judge_columns import label_of
from distill.runtime.errors import UserError

Row = Mapping[str, Any]
ARRANGEMENT, ORDER = "arrangement", "order"  # columns that `PairLabels` derives


def template_columns(template: str) -> list[str]:
    """The columns that a caption template names in braces."""
    return [name for _, name, _, _ in Formatter().parse(template) if name]


def fill_caption(template: str, values: Mapping[str, str]) -> str:
    """A template filled in; "a" before a vowel becomes "an"."""
    return re.sub(r"\ba(?= [aeiou])", "an", template.format(**values))


@dataclass(frozen=True)
class PairLabels:
    """The metadata columns of captions of two things in a relation; empty where the data has none.

    The relations in `interchangeable` depend on the side that the two are seen from ("next to" is "in front
    of" a quarter turn on), and so does their order. One picture does not show them, but by its light.
    """

    first: tuple[str, ...] = ()  # columns of the first thing
    second: tuple[str, ...] = ()  # the same of the second
    relation: str = ""  # the column that holds a value in rows of two things only
    interchangeable: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if len(self.first) != len(self.second) or bool(self.first) != bool(self.relation):
            raise UserError(
                f"pairs have the columns {list(self.first)}, {self.relation!r} and {list(self.second)}: "
                "expected as many of the second thing as of the first, and the relation's"
            )

    @property
    def visible(self) -> tuple[str, ...]:
        """The columns of `derive` that every picture shows: those of either thing, and the arrangement."""
        if not self.relation:
            return ()
        return (*(f"{name}_{thing}" for thing in ("a", "b") for name in self.first), ARRANGEMENT)

    def derive(self, row: Row) -> dict[str, str]:
        """Further columns of a row, in which what a picture does not show makes no difference.

        Thing a is the first and b the second one; in interchangeable relations they are sorted by their
        columns. `arrangement` is the relation, or all interchangeable ones; `order` states whether the first
        thing is a, where they were sorted and differ. Of one thing: a.
        """
        if not self.relation:
            return {}
        things = [tuple(row.get(name) or "" for name in columns) for columns in (self.first, self.second)]
        arrangement, order = row.get(self.relation) or "", ""
        if arrangement in self.interchangeable:
            arrangement = " or ".join(self.interchangeable)
            order = "" if things[0] == things[1] else "sorted" if things[0] < things[1] else "reversed"
            things.sort()
        columns = {
            f"{name}_{letter}": value
            for letter, thing in zip(("a", "b"), things, strict=True)
            for name, value in zip(self.first, thing, strict=True)
        }
        return {**columns, ARRANGEMENT: arrangement, ORDER: order}

    def rows(self, rows: Sequence[Row]) -> list[int]:
        """The indices of the rows of two things."""
        return [index for index, row in enumerate(rows) if self.relation and row.get(self.relation)]


@dataclass(frozen=True)
class LabelOptions:
    """What a data set's metadata columns mean. Figures whose columns are absent are left out.

    A row counts for a column where it holds a value and, for each pair (column, condition) in `only_if`
    and in the judge's own, its column `condition` is True.
    """

    columns: tuple[str, ...] | None = None  # null: all that the judge predicts and the data holds
    only_if: tuple[tuple[str, str], ...] = ()
    in_caption: tuple[str, ...] = ()  # columns that count only where the caption contains their value
    joint: tuple[str, ...] = ()  # columns that must all be right, for one figure more
    # (figure, column): the joint figure over the rows where the column is True
    subsets: tuple[tuple[str, str], ...] = ()
    # rows with a value in this column have no labels, such as captions of two objects
    exclude_if: str | None = None
    pair: PairLabels = PairLabels()  # what those rows hold, for a judge of pairs
    caption: str = ""  # of a class, for zero-shot labels: "a {colour} {object}"
    caption_detail: str = ""  # appended for the values of one column more: ", {view} view"

    def __post_init__(self) -> None:
        if len(template_columns(self.caption_detail)) > 1:
            raise UserError(f"caption_detail is {self.caption_detail!r}: expected one column in braces")

    @property
    def joint_name(self) -> str:
        """The name of the joint figure: object_and_colour."""
        return "_and_".join(self.joint)

    def labelled(self, rows: Sequence[Row]) -> list[int]:
        """The indices of the rows that `exclude_if` leaves."""
        return [i for i, row in enumerate(rows) if self.exclude_if is None or not row.get(self.exclude_if)]


DEFAULT = LabelOptions()


def judge_accuracy(
    judge: Judge, images: Tensor, rows: Sequence[Row], options: LabelOptions = DEFAULT
) -> dict[str, float]:
    """The judge's accuracy on images (N, 3, H, W) against their rows, by column, joint and by subset.

    A figure for which no row counts is left out. Raises `UserError` for a column that the judge lacks.
    """
    return prediction_accuracy(judge, predict(judge, images), rows, options)


def prediction_accuracy(
    judge: Judge,
    predictions: Mapping[str, Sequence[str]],
    rows: Sequence[Row],
    options: LabelOptions = DEFAULT,
) -> dict[str, float]:
    """`judge_accuracy` of a judge's predictions (by column, N each) that have been made already."""
    foreign = [name for name in options.columns or () if name not in judge.labels]
    if foreign:
        raise UserError(
            f"the judge predicts {', '.join(judge.labels)}: labels.columns names {', '.join(foreign)}"
        )
    only_if = (*options.only_if, *judge.options.only_if)

    def correct(name: str) -> list[bool | None]:
        """By row; None where the row does not count."""
        labels = [label_of(row, name, only_if) for row in rows]
        if name in options.in_caption:
            labels = [
                label if label and label in row["text"] else None
                for label, row in zip(labels, rows, strict=True)
            ]
        return [
            None if label is None else p == label for p, label in zip(predictions[name], labels, strict=True)
        ]

    by_column = {name: correct(name) for name in options.columns or judge.labels}
    figures: dict[str, Iterable[bool | None]] = dict(by_column)
    if options.joint and all(name in by_column for name in options.joint):
        columns = zip(*(by_column[name] for name in options.joint), strict=True)
        joint = [None if None in values else all(values) for values in columns]
        figures[options.joint_name] = joint
        for name, column in options.subsets:
            figures[name] = [
                hit if row.get(column) is True else None for hit, row in zip(joint, rows, strict=True)
            ]
    return fractions(figures)


def fractions(figures: Mapping[str, Iterable[bool | None]]) -> dict[str, float]:
    """The fraction of True among the values that are not None; a name without such values is left out."""
    counted = {name: [value for value in values if value is not None] for name, values in figures.items()}
    return {name: sum(values) / len(values) for name, values in counted.items() if values}
