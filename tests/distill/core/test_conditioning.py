"""A conditioning is a batch: rows are selected, repeated and joined in every tensor alike."""

import pytest
import torch

from distill.core.conditioning import Conditioning
from distill.runtime.errors import UserError


def rows(*numbers: float) -> Conditioning:
    embedding = torch.tensor(numbers)[:, None, None].expand(-1, 2, 3)
    return Conditioning(embedding, {"camera": torch.tensor(numbers)[:, None] * 10})


def values(conditioning: Conditioning) -> list[float]:
    camera = (conditioning.extras["camera"][:, 0] / 10).tolist()
    assert camera == conditioning.embedding[:, 0, 0].tolist()
    assert conditioning.embedding.shape == (len(conditioning), 2, 3)
    return camera


def test_rows_of_all_tensors_move_together() -> None:
    batch = rows(1, 2, 3)
    assert values(batch.select(torch.tensor([2, 0]))) == [3, 1]
    assert values(batch.select(slice(-1, None))) == [3]
    assert [values(part) for part in batch.split(2)] == [[1, 2], [3]]
    assert values(batch.repeat(2)) == [1, 2, 3, 1, 2, 3]
    assert values(batch.repeat_interleave(2)) == [1, 1, 2, 2, 3, 3]
    assert values(Conditioning.cat([batch, rows(4)])) == [1, 2, 3, 4]
    assert values(batch.apply(lambda value: 2 * value)) == [2, 4, 6]


def test_one_row_expands_without_a_copy() -> None:
    one = rows(5)
    assert values(one.expand(3)) == [5, 5, 5]
    assert one.expand(3).embedding.data_ptr() == one.embedding.data_ptr()
    assert rows(1, 2).expand(2).embedding.shape[0] == 2
    with pytest.raises(UserError, match="2 rows cannot serve 3 samples"):
        rows(1, 2).expand(3)


def test_mismatched_rows_and_extras_raise() -> None:
    with pytest.raises(UserError, match="extras of other sizes.*'camera': 2"):
        Conditioning(torch.zeros(3, 1, 1), {"camera": torch.zeros(2, 4)})
    with pytest.raises(UserError, match="cannot be joined"):
        Conditioning.cat([rows(1), Conditioning(torch.zeros(1, 2, 3))])


def test_extras_are_added() -> None:
    more = rows(1).with_extras(labels=torch.tensor([7]))
    assert set(more.extras) == {"camera", "labels"} and int(more.extras["labels"]) == 7
