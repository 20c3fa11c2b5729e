"""Captions of two things in a relation, such as "a red cube on top of a blue sphere": what a judge reads."""

from collections.abc import Mapping, Sequence

from distill.evaluation.labels import PairLabels, Row, fractions


def pair_accuracy(
    predictions: Mapping[str, Sequence[str]], rows: Sequence[Row], labels: PairLabels
) -> dict[str, float]:
    """Fractions of the rows of pairs that a judge's predictions (by column, N each) match.

    `pair_first` and `pair_second`: all columns of either thing; `pair_relation`; `pair_right`: everything;
    `pair_right_any_side`: up to the side that it is seen from (`PairLabels`). Empty without rows of pairs.
    """
    hits: dict[str, list[bool]] = {}
    for index in labels.rows(rows):
        predicted = {name: predictions[name][index] for name in labels.columns}
        for name, hit in _matches(predicted, rows[index], labels).items():
            hits.setdefault(name, []).append(hit)
    return fractions(hits)


def _matches(predicted: Row, row: Row, labels: PairLabels) -> dict[str, bool]:
    """By figure, whether one prediction matches its row."""

    def values(source: Row, columns: Sequence[str]) -> list[str]:
        return [source[name] for name in columns]

    first, second = (values(predicted, columns) for columns in (labels.first, labels.second))
    true_first, true_second = (values(row, columns) for columns in (labels.first, labels.second))
    relation, true_relation = predicted[labels.relation], row[labels.relation]
    in_order = first == true_first and second == true_second
    either_order = in_order or (first == true_second and second == true_first)
    same_kind = {relation, true_relation} <= set(labels.interchangeable)
    right = in_order and relation == true_relation
    return {
        "pair_first": first == true_first,
        "pair_second": second == true_second,
        "pair_relation": relation == true_relation,
        "pair_right": right,
        "pair_right_any_side": right or (same_kind and either_order),
    }
