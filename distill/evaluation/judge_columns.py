"""The metadata columns that a judge reads, as tables of labels and of directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from distill.runtime.errors import UserError

IGNORE = -100  # the label of a row that does not count, the default of `F.cross_entropy`


@dataclass(frozen=True)
class JudgeOptions:
    """The metadata columns that are read, size and training.

    A row counts for a column where its value is neither null nor empty and, for each pair (column,
    condition) in `only_if`, its column `condition` is True. Numbers and truth values are read as text.
    """

    attributes: tuple[str, ...]  # classified; "attributes.Smiling" is an entry of a column of several
    only_if: tuple[tuple[str, str], ...] = ()
    directions: tuple[str, ...] = ()  # angles in degrees, read as unit vectors
    width: int = 48
    hidden: int | None = None  # units of a layer that reads where in the image features are; null: their mean
    batch: int = 64
    learning_rate: float = 3e-3
    weight_decay: float = 0.02
    label_smoothing: float = 0.05
    direction_weight: float = 1.0  # of the directions' loss beside that of the attributes

    def __post_init__(self) -> None:
        if not self.attributes and not self.directions:
            raise UserError(
                "the judge has neither attributes nor directions; expected the name of a metadata column"
            )
        if self.width < 1 or self.batch < 2 or (self.hidden is not None and self.hidden < 1):
            raise UserError(
                f"judge width {self.width}, hidden {self.hidden}, batch {self.batch}; expected at least 1, 1 "
                "and 2"
            )
        if self.direction_weight <= 0:
            raise UserError(
                f"judge direction_weight is {self.direction_weight:g}: a positive one is expected"
            )


def collect_labels(rows: Sequence[Mapping[str, Any]], options: JudgeOptions) -> dict[str, tuple[str, ...]]:
    """The values of each attribute in the rows that count, sorted. Raises `UserError` for fewer than two."""
    labels = {}
    for name in options.attributes:
        labels[name] = tuple(
            sorted({value for row in rows if (value := label_of(row, name, options.only_if)) is not None})
        )
        if len(labels[name]) < 2:
            raise UserError(f"the column '{name}' has the values {list(labels[name])}; expected at least two")
    return labels


def label_table(
    rows: Sequence[Mapping[str, Any]], labels: Mapping[str, Sequence[str]], options: JudgeOptions
) -> Tensor:
    """Label indices (N, attributes), `IGNORE` where a row does not count.

    Raises `UserError` for a value not in `labels`.
    """
    table = torch.full((len(rows), len(labels)), IGNORE)
    for column, (name, values) in enumerate(labels.items()):
        indices = {value: index for index, value in enumerate(values)}
        for index, row in enumerate(rows):
            value = label_of(row, name, options.only_if)
            if value is not None and value not in indices:
                raise UserError(f"row {index} has the {name} '{value}'; expected one of {', '.join(values)}")
            table[index, column] = IGNORE if value is None else indices[value]
    return table


def direction_table(rows: Sequence[Mapping[str, Any]], options: JudgeOptions) -> Tensor:
    """Cosines and sines (N, directions, 2) of the angles; NaN where a row does not count.

    Raises `UserError` for a value that is no number, and where no row counts.
    """
    angles = torch.full((len(rows), len(options.directions)), torch.nan)
    for column, name in enumerate(options.directions):
        for index, row in enumerate(rows):
            value = row.get(name) if counts(row, name, options.only_if) else None
            if value is not None and not isinstance(value, int | float):
                raise UserError(f"row {index} has the {name} {value!r}; expected degrees")
            angles[index, column] = torch.nan if value is None else value
        if angles[:, column].isnan().all():
            raise UserError(f"no row counts for the direction '{name}'; expected a column of degrees")
    radians = torch.deg2rad(angles)
    return torch.stack([radians.cos(), radians.sin()], -1)


def counts(row: Mapping[str, Any], name: str, only_if: Sequence[tuple[str, str]]) -> bool:
    """Whether a row's conditions for the column `name` hold (`JudgeOptions`)."""
    return all(row.get(condition) is True for column, condition in only_if if column == name)


def label_of(row: Mapping[str, Any], name: str, only_if: Sequence[tuple[str, str]]) -> str | None:
    """The label of a row in the column `name`; None where the row does not count (`JudgeOptions`)."""
    column, _, entry = name.partition(".")
    value = row.get(column)
    if entry:
        value = value.get(entry) if isinstance(value, Mapping) else None
    if value in (None, "") or not counts(row, name, only_if):
        return None
    return str(value).lower() if isinstance(value, bool) else str(value)
