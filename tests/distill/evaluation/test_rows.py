"""Cached rows: computed once for a query, again for another."""

import json
from pathlib import Path

import pytest

from distill.evaluation.rows import cached_row


def test_a_row_is_computed_once_for_a_query(tmp_path: Path) -> None:
    calls: list[int] = []

    def compute() -> dict[str, float]:
        calls.append(1)
        return {"score": float(len(calls))}

    path = tmp_path / "rows" / "row.json"
    query = {"weights": "ab", "options": {"seed": 0, "scales": (1, 2.5)}, "limit": None}
    first = cached_row(path, query, compute)
    assert first == {"weights": "ab", "options": {"seed": 0, "scales": [1, 2.5]}, "limit": None, "score": 1.0}
    assert cached_row(path, query, compute) == first == json.loads(path.read_text())
    for other in ({**query, "weights": "cd"}, {**query, "limit": 3}, {**query, "new": None}):
        assert cached_row(path, other, compute)["score"] == len(calls)
    assert len(calls) == 4


def test_an_interrupted_computation_leaves_no_row(tmp_path: Path) -> None:
    def compute() -> dict[str, float]:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        cached_row(tmp_path / "row.json", {}, compute)
    assert not (tmp_path / "row.json").exists()
    assert cached_row(tmp_path / "row.json", {}, lambda: {"score": 1}) == {"score": 1}
