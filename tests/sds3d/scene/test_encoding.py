"""The grid encoding against a loop written from the paper, and its gradient against finite differences."""

import importlib.util
import math

import pytest
import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.scene.encoding import HashEncoding, HashEncodingOptions, make_encoding

# Levels of 4, 8 and 15 nodes a side: 64 and 512 entries fit into 2^9 and are dense, 3375 are hashed.
MIXED = HashEncodingOptions(
    n_levels=3, n_features_per_level=2, log2_hashmap_size=9, base_resolution=4, per_level_scale=1.9
)
HASHED = HashEncodingOptions(
    n_levels=2, n_features_per_level=2, log2_hashmap_size=4, base_resolution=5, per_level_scale=1.5
)
NO_CUDA = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the GPU's parity with the CPU is unchecked"
)
NO_TINYCUDANN = pytest.mark.skipif(
    importlib.util.find_spec("tinycudann") is None,
    reason="tinycudann is not installed: its parity is unchecked",
)


def random_encoding(options: HashEncodingOptions, seed: int = 0) -> HashEncoding:
    encoding = HashEncoding(options).double()
    table = torch.randn(
        encoding.table.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    encoding.table.data.copy_(table)
    return encoding


def points(count: int, seed: int = 1) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def slow_level(table: Tensor, point: list[float], scale: float, log2_size: int) -> Tensor:
    """One point in one level, corner by corner, in Python's integers (Mueller et al. 2022, eq. 1 to 4)."""
    nodes = math.ceil(scale) + 1
    coordinates = [min(max(x * scale + 0.5, 0.0), nodes - 1) for x in point]
    low = [min(math.floor(x), nodes - 2) for x in coordinates]
    total = torch.zeros(table.shape[1], dtype=table.dtype)
    for corner in range(8):
        offset = [corner >> axis & 1 for axis in range(3)]
        weight = math.prod(p - q if o else 1 - (p - q) for p, q, o in zip(coordinates, low, offset))
        x, y, z = (q + o for q, o in zip(low, offset))
        if nodes**3 <= 2**log2_size:
            entry = x + nodes * y + nodes**2 * z
        else:
            entry = ((x * 1) ^ (y * 2654435761 % 2**32) ^ (z * 805459861 % 2**32)) % 2**log2_size
        total += weight * table[entry]
    return total


def slow(encoding: HashEncoding, positions: Tensor) -> Tensor:
    options = encoding.options
    tables = encoding.table.detach().split(options.sizes())
    rows = []
    for point in positions.tolist():
        levels = [
            slow_level(t, point, s, options.log2_hashmap_size) for t, s in zip(tables, options.scales())
        ]
        rows.append(torch.cat(levels))
    return torch.stack(rows)


def test_sizes_are_those_of_the_paper() -> None:
    assert MIXED.resolutions() == [4, 8, 15]
    assert MIXED.sizes() == [64, 512, 512]
    assert MIXED.width == 6
    # Cells a side: 3, 6.6 and 13.44, of which the first is whole and the last has room for half a cell.
    assert MIXED.border == 2.5 / 3
    padded = HashEncodingOptions(n_levels=1, base_resolution=5)
    assert padded.sizes() == [128]  # 125, padded to a multiple of 8


@pytest.mark.parametrize("options", [MIXED, HASHED], ids=["dense and hashed", "hashed"])
def test_matches_the_slow_loop(options: HashEncodingOptions) -> None:
    encoding = random_encoding(options)
    corners = torch.tensor([[0.0, 0, 0], [1, 1, 1], [1, 0, 0.5], [0.5, 0.5, 1]], dtype=torch.float64)
    positions = torch.cat([points(60), corners])
    torch.testing.assert_close(encoding(positions), slow(encoding, positions), rtol=1e-10, atol=1e-10)


def test_the_indexing_path_matches_the_sparse_one(monkeypatch: pytest.MonkeyPatch) -> None:
    encoding, positions = random_encoding(MIXED), points(50)
    expected = encoding(positions)
    monkeypatch.setattr("sds3d.scene.encoding._sparse_product_works", lambda: False)
    torch.testing.assert_close(encoding(positions), expected)


@pytest.mark.parametrize("options", [MIXED, HASHED], ids=["dense and hashed", "hashed"])
def test_gradient_matches_finite_differences(options: HashEncodingOptions) -> None:
    encoding, positions = random_encoding(options), points(5)

    def encode(table: Tensor) -> Tensor:
        return torch.func.functional_call(encoding, {"table": table}, positions)

    assert torch.autograd.gradcheck(
        encode, encoding.table.detach().requires_grad_(), fast_mode=options is MIXED
    )


@pytest.mark.parametrize("options", [MIXED, HASHED], ids=["dense and hashed", "hashed"])
def test_recomputed_corners_give_the_same_gradient_from_less_memory(
    options: HashEncodingOptions, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoding, positions = random_encoding(options), points(500)
    target = torch.rand(500, options.width, generator=torch.Generator().manual_seed(2)).double()

    def gradient() -> tuple[Tensor, int]:
        sizes: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x: sizes.append(x.nbytes) or x, lambda x: x):
            values = encoding(positions)
        (grad,) = torch.autograd.grad(values, encoding.table, target)
        return grad, sum(sizes)

    grad, saved = gradient()
    monkeypatch.setattr("sds3d.scene.encoding.SAVED_CORNERS", 0)
    recomputed, positions_only = gradient()
    assert torch.equal(recomputed, grad)
    assert saved == 500 * options.n_levels * 8 * (4 + 8) and positions_only == 500 * 3 * 8


def test_is_continuous_across_cells() -> None:
    encoding = random_encoding(MIXED)
    line = torch.linspace(0.01, 0.99, 4001, dtype=torch.float64)
    values = encoding(torch.stack([line, torch.full_like(line, 0.3), torch.full_like(line, 0.7)], dim=1))
    # Entries differ by a few units over a cell of 1/14.
    assert values.diff(dim=0).abs().max() < 10 * 14 / 4000


def test_no_points_and_single_precision() -> None:
    encoding = HashEncoding(MIXED)
    assert encoding(torch.zeros(0, 3)).shape == (0, 6)
    assert encoding(torch.rand(3, 3)).dtype == torch.float32
    assert isinstance(make_encoding(MIXED, "cpu"), HashEncoding)


@pytest.mark.parametrize(
    "values", [{"n_levels": 0}, {"base_resolution": 1}, {"per_level_scale": 0.5}, {"log2_hashmap_size": 30}]
)
def test_sizes_out_of_range_raise(values: dict[str, float]) -> None:
    with pytest.raises(UserError, match=str(next(iter(values.values())))):
        HashEncodingOptions(**values)


@pytest.mark.gpu
@NO_CUDA
def test_cuda_matches_cpu() -> None:
    encoding, positions = random_encoding(MIXED), points(500)
    encoding(positions).square().sum().backward()
    twin = HashEncoding(MIXED).double().cuda()
    twin.load_state_dict(encoding.state_dict())
    values = twin(positions.cuda())
    values.square().sum().backward()
    torch.testing.assert_close(values.cpu(), encoding(positions))
    torch.testing.assert_close(twin.table.grad.cpu(), encoding.table.grad)


@pytest.mark.gpu
@NO_CUDA
@NO_TINYCUDANN
def test_tinycudann_matches_torch() -> None:
    from sds3d.scene.encoding import TinyCudaEncoding

    twin, theirs = random_encoding(MIXED).float().cuda(), TinyCudaEncoding(MIXED)
    theirs.load_state_dict(twin.state_dict())
    positions = (points(500) * MIXED.border).float().cuda()
    ours, other = twin(positions), theirs(positions)
    torch.testing.assert_close(other, ours, rtol=2e-3, atol=2e-3)
    ours.square().sum().backward()
    other.square().sum().backward()
    torch.testing.assert_close(theirs.table.grad, twin.table.grad, rtol=1e-2, atol=1e-2)
