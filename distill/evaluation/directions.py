"""Angles that a judge reads off images, against those of their rows."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from distill.evaluation.judge import Judge, read_directions
from distill.evaluation.judge_columns import counts

NEAR = 15.0  # degrees within which a direction is right
FLIP = 135.0  # degrees of error from which it is taken for its opposite


def angular_error(first: Tensor, second: Tensor) -> Tensor:
    """Angles (N,) in degrees, in [0, 180], between directions (N,) in degrees of any number of turns."""
    return (torch.remainder(first - second + 180, 360) - 180).abs()


def error_figures(errors: Tensor) -> dict[str, float]:
    """Of errors (N,) in degrees: the fractions within `NEAR` and from `FLIP` on, and the median."""
    return {
        "within_15": float((errors <= NEAR).double().mean()),
        "flips": float((errors >= FLIP).double().mean()),
        "median_error": float(errors.median()),
    }


def direction_accuracy(judge: Judge, images: Tensor, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """`error_figures` of each direction of a judge over images (N, 3, H, W), of the rows that count.

    A direction for which no row counts is left out.
    """
    figures: dict[str, float] = {}
    for name, angles in read_directions(judge, images).items():
        counting = [
            index
            for index, row in enumerate(rows)
            if row.get(name) is not None and counts(row, name, judge.options.only_if)
        ]
        if counting:
            targets = torch.tensor([float(rows[index][name]) for index in counting])
            errors = error_figures(angular_error(angles[counting], targets))
            figures |= {f"{name}_{key}": value for key, value in errors.items()}
    return figures
