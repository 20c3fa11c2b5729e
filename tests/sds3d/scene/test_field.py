"""The field: its initial density, gradients, normals and rotation."""

import pytest
import torch
from torch import Tensor

from distill.runtime.errors import UserError
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import BandOptions, Field, FieldOptions

SMALL = HashEncodingOptions(
    n_levels=2, n_features_per_level=2, log2_hashmap_size=5, base_resolution=3, per_level_scale=1.7
)


def random_field(activation: str = "softplus", layers: int = 1) -> Field:
    """A field whose details are as strong as its blob, float64."""
    torch.manual_seed(0)
    field = Field(FieldOptions(SMALL, 6, layers, activation, blob_density=3.0, blob_radius=0.7)).double()
    field.encoding.table.data.normal_()
    return field


def points(count: int) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 1.6 - 0.8


@pytest.mark.parametrize("activation", ["softplus", "trunc_exp"])
@pytest.mark.parametrize("layers", [1, 2])
def test_gradients_match_finite_differences(activation: str, layers: int) -> None:
    field, positions = random_field(activation, layers), points(4)
    names = [name for name, _ in field.named_parameters()]

    def evaluate(*values: Tensor) -> tuple[Tensor, Tensor]:
        return torch.func.functional_call(field, dict(zip(names, values)), positions)

    assert torch.autograd.gradcheck(evaluate, [p.detach().requires_grad_() for p in field.parameters()])


def test_normals_have_gradients() -> None:
    field, positions = random_field(), points(4)
    weight = field.mlp[0].weight

    def normal(value: Tensor) -> Tensor:
        with torch.no_grad():
            before = weight.clone()
            weight.copy_(value)
            result = field.normal(positions)
            weight.copy_(before)
        return result

    field.normal(positions).cos().sum().backward()
    direction = torch.randn(weight.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ends = [normal(weight + sign * 1e-6 * direction).cos().sum() for sign in (1, -1)]
    slope = (ends[0] - ends[1]) / 2e-6
    torch.testing.assert_close((weight.grad * direction).sum(), slope.detach(), rtol=1e-5, atol=1e-8)


def test_density_is_the_first_output_and_albedo_a_colour() -> None:
    field, positions = random_field(), points(50)
    density, albedo = field(positions)
    assert torch.equal(field.density(positions), density)
    assert density.shape == (50,) and albedo.shape == (50, 3)
    assert (density >= 0).all() and (albedo > 0).all() and (albedo < 1).all()


def test_initial_density_is_a_soft_ball() -> None:
    field = Field(FieldOptions())
    radii = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    density = field.density(radii[:, None] * torch.tensor([[0.6, 0.0, 0.8]]))
    expected = torch.nn.functional.softplus(6 * (1 - radii / 0.6))
    torch.testing.assert_close(
        density, expected, rtol=0.25, atol=0.3
    )  # the MLP's initial biases are not zero
    assert density[0] > 5 and density[-1] < 0.05


def test_initial_normals_point_outwards() -> None:
    directions = torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    positions = torch.nn.functional.normalize(directions, dim=-1) / 3
    normals = Field(FieldOptions()).normal(positions)
    torch.testing.assert_close(normals.norm(dim=-1), torch.ones(40))
    assert ((normals * positions).sum(-1) * 3).min() > 0.99


def test_density_outside_the_box_is_zero() -> None:
    field = Field(FieldOptions(density_bias=5.0))
    density = field.density(torch.tensor([[1.01, 0, 0], [0, -1.2, 0], [0, 0, 1.5], [0.99, 0.99, -0.99]]))
    assert density[:3].eq(0).all() and density[3] > 0


def test_truncated_exponential_bounds_outliers() -> None:
    field = Field(FieldOptions(activation="trunc_exp", density_bias=1000.0))
    density = field.density(torch.zeros(1, 3))
    density.sum().backward()
    limit = torch.tensor(15.0).exp()
    torch.testing.assert_close(density[0], limit)
    assert field.mlp[-1].bias.grad[0] == limit  # not zero: the outlier can still decrease


def test_under_autocast_density_stays_single() -> None:
    field = Field(FieldOptions())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        density, albedo = field(torch.zeros(3, 3))
    assert density.dtype == albedo.dtype == torch.float32


@pytest.mark.parametrize(
    "values", [{"hidden_width": 0}, {"hidden_layers": 0}, {"blob_radius": -1.0}, {"activation": "relu"}]
)
def test_options_out_of_range_raise(values: dict[str, object]) -> None:
    with pytest.raises(UserError, match=str(next(iter(values.values())))):
        FieldOptions(**values)


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the GPU's parity with the CPU is unchecked"
)
def test_cuda_matches_cpu() -> None:
    field, positions = Field(FieldOptions()), points(200).float()
    twin = Field(FieldOptions(), "cuda")
    twin.load_state_dict(field.state_dict())
    inner = positions * 0.9  # tinycudann differs in the outermost half cell
    for ours, theirs in zip(field(inner), twin(inner.cuda())):
        torch.testing.assert_close(theirs.cpu(), ours, rtol=1e-2, atol=1e-3)


def test_levels_are_unlocked_over_steps() -> None:
    """A locked level neither changes the field nor gets a gradient."""
    torch.manual_seed(0)
    bands = BandOptions(start_level=1, start_step=10, update_steps=5)
    field = Field(FieldOptions(SMALL, 6, bands=bands))
    field.encoding.table.data.normal_()
    first = SMALL.sizes()[0]
    positions = points(200).float()
    for step, unlocked in ((0, False), (14, False), (15, True), (1000, True)):
        field.unlock_levels(step)
        field.zero_grad()
        field.density(positions).sum().backward()
        grad = field.encoding.table.grad
        assert grad[:first].abs().max() > 0
        assert bool(grad[first:].abs().max() > 0) == unlocked
    plain = Field(FieldOptions(SMALL, 6))
    plain.load_state_dict({k: v for k, v in field.state_dict().items() if k != "level_mask"})
    torch.testing.assert_close(plain.density(positions), field.density(positions))
    assert "level_mask" not in plain.state_dict()  # which scenes without bands have never had


def test_unlocked_levels_are_those_of_threestudio() -> None:
    bands = BandOptions()
    assert [bands.levels(step) for step in (0, 1999, 2499, 2500, 3000, 6000)] == [8, 8, 8, 9, 10, 16]
    with pytest.raises(UserError, match="start_level 0"):
        BandOptions(start_level=0)


def test_a_scene_is_saved_with_its_unlocked_levels() -> None:
    field = Field(FieldOptions(SMALL, 6, bands=BandOptions(1, 0, 1)))
    field.unlock_levels(1)
    again = Field(FieldOptions(SMALL, 6, bands=BandOptions(1, 0, 1)))
    again.load_state_dict(field.state_dict())
    assert again.level_mask.tolist() == [1.0] * 4
