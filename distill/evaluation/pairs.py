"""Captions of two things in a relation, such as "a red cube on top of a blue sphere": what a judge reads."""

from collections.abc import Mapping, Sequence

from distill.evaluation.labels import ARRANGEMENT, ORDER, PairLabels, Row, fractions


def pair_accuracy(
    predictions: Mapping[str, Sequence[str]], rows: Sequence[Row], labels: PairLabels
) -> dict[str, float]:
    """Fractions of the rows of two things that a judge's predictions (by column, N each) match.

    `pair_things`: all columns of both; `pair_arrangement`; `pair_right`: both, which is the caption but for
    the side that it is seen from (`PairLabels.derive`). `pair_right_strict`: the relation and the order too,
    where the judge predicts them. Empty without rows of two things.
    """
    strict = (labels.relation, ORDER)
    hits: dict[str, list[bool]] = {}
    for index in labels.rows(rows):
        true = {**rows[index], **labels.derive(rows[index])}
        match = {
            name: not true[name] or values[index] == true[name]
            for name, values in predictions.items()
            if name in (*labels.visible, *strict)
        }
        things = all(match[name] for name in labels.visible if name != ARRANGEMENT)
        right = things and match[ARRANGEMENT]
        figures = {"pair_things": things, "pair_arrangement": match[ARRANGEMENT], "pair_right": right}
        if all(name in predictions for name in strict):
            figures["pair_right_strict"] = right and all(match[name] for name in strict)
        for name, hit in figures.items():
            hits.setdefault(name, []).append(hit)
    return fractions(hits)
