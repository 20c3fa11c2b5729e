"""Operations are repeated on this machine with operands that their kernels accept."""

import torch

from distill.planning.calibration import _filled, _indexed_rows, time_operations
from distill.planning.operations import TensorSpec
from distill.planning.recorder import MetaRecorder

CPU = torch.device("cpu")


def test_indices_lie_all_over_the_indexed_dimension() -> None:
    table, index = TensorSpec((1000, 2), (2, 1), torch.float32), TensorSpec((4096,), (1,), torch.long)
    assert _indexed_rows((table, 0, index)) == 1000 and _indexed_rows((table, -1, index)) == 2
    assert _indexed_rows((table, (index,))) == 1000 and _indexed_rows(()) == 1
    values = _filled((table, 0, index), CPU, 1000)[2]
    assert 0 <= int(values.min()) < 10 and 990 <= int(values.max()) < 1000
    expanded = TensorSpec((4, 100), (0, 1), torch.long)
    assert _filled(expanded, CPU, 5).stride() == (0, 1) and _filled(expanded, CPU, 5).max() == 4


def test_every_recorded_operation_can_be_repeated() -> None:
    with MetaRecorder() as recorder, torch.device("meta"):
        table, index = torch.randn(50, 3, requires_grad=True), torch.zeros(7, dtype=torch.long)
        with recorder.measured() as record:
            rows = table.index_select(0, index) @ torch.randn(3, 4)
            rows.sigmoid().sum().backward()
    operations = {operation for _, _, operation in record.operations}
    seconds = time_operations(operations, CPU)
    names = {str(operation.function) for operation in operations if not operation.view}
    assert {"aten.index_select.default", "aten.mm.default", "aten.index_add.default"} <= names
    assert all(seconds[operation] > 0 for operation in operations if not operation.view)
