"""The scene as a function of position: density and albedo from an encoded point by a tiny MLP."""

from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from distill.runtime.errors import UserError
from sds3d.scene.encoding import HashEncodingOptions, make_encoding

# Corners of a tetrahedron: four taps give a gradient where the six of central differences would.
TETRAHEDRON = ((1.0, 1.0, 1.0), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))


@dataclass(frozen=True)
class FieldOptions:
    """Size of the field and its start. Raises `UserError` for sizes that cannot be.

    Before the activation, density gets `density_bias + blob_density * (1 - |x| / blob_radius)` (Magic3D, Lin
    et al. 2023, section 4.1; DreamFusion, appendix A.2, uses a Gaussian): a soft ball to carve from, empty
    far from the centre.
    """

    encoding: HashEncodingOptions = field(default_factory=HashEncodingOptions)
    hidden_width: int = 32
    hidden_layers: int = 1
    activation: Literal["softplus", "trunc_exp"] = "softplus"
    density_bias: float = 0.0
    blob_density: float = 10.0
    blob_radius: float = 0.5  # world units; the box is [-1, 1]^3

    def __post_init__(self) -> None:
        if self.hidden_width < 1 or self.hidden_layers < 1 or self.blob_radius <= 0:
            raise UserError(
                f"field of {self.hidden_layers} hidden layers of width {self.hidden_width} and blob radius "
                f"{self.blob_radius}: all three must be positive"
            )
        if self.activation not in ("softplus", "trunc_exp"):
            raise UserError(f"field activation is '{self.activation}': use softplus or trunc_exp")


class _TruncExp(torch.autograd.Function):
    """exp with its gradient's exponent clamped at 15, so that a far outlier cannot blow up a step (Mueller et
    al. 2022)."""

    @staticmethod
    def forward(ctx, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clamp(max=15).exp()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].clamp(max=15).exp()


def _unturned(field: "Field", state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Scenes and checkpoints written before fields could turn stand as they were made."""
    state.setdefault(f"{prefix}turn", torch.eye(3))


class Field(nn.Module):
    """Density and albedo at positions in [-1, 1]^3; no dependence on the view, as the light is baked and
    fixed to the world."""

    def __init__(self, options: FieldOptions, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.options = options
        self.encoding = make_encoding(options.encoding, device)
        widths = [options.encoding.width] + [options.hidden_width] * options.hidden_layers
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
        self.mlp = nn.Sequential(*layers, nn.Linear(options.hidden_width, 4)).to(device)
        self.register_buffer(
            "turn", torch.eye(3, device=device)
        )  # what the field was turned by since it began
        self.register_load_state_dict_pre_hook(_unturned)

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (N, 3) -> density (N,) per world unit, albedo (N, 3) in [0, 1]. Density is 0 outside the
        box."""
        raw = self._raw(positions)
        return self._activate(raw[:, 0], positions), raw[:, 1:].sigmoid()

    def density(self, positions: Tensor) -> Tensor:
        """positions (N, 3) -> density (N,)."""
        return self._activate(self._raw(positions)[:, 0], positions)

    def normal(self, positions: Tensor, step: float = 0.01) -> Tensor:
        """Unit outward normals (N, 3): minus the density's gradient, by differences over a tetrahedron of
        half-width `step`.

        Differentiable with respect to the parameters (four evaluations of the density).
        """
        taps = positions.new_tensor(TETRAHEDRON)
        density = self.density((positions[:, None] + step * taps).flatten(0, 1)).view(-1, 4)
        # log1p keeps the direction while taming slopes of thousands at a hard surface.
        return functional.normalize(-torch.log1p(density) @ taps, dim=-1, eps=1e-8)

    def turn_by(self, quarters: int) -> None:
        """Turn what is there about the vertical, by 90 degrees each, so that the box stays the box."""
        quarter = self.turn.new_tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        self.turn.copy_(torch.linalg.matrix_power(quarter, quarters % 4) @ self.turn)

    def _raw(self, positions: Tensor) -> Tensor:
        with torch.autocast(
            positions.device.type, enabled=False
        ):  # in half, positions would be off by a cell
            turned = positions @ self.turn
        # Back to the positions' dtype: under autocast the MLP answers in half, too coarse to composite in.
        return self.mlp(self.encoding((turned + 1) / 2)).to(positions.dtype)

    def _activate(self, raw: Tensor, positions: Tensor) -> Tensor:
        options = self.options
        blob = options.blob_density * (1 - positions.norm(dim=-1) / options.blob_radius)
        value = raw + (blob + options.density_bias)
        density = functional.softplus(value) if options.activation == "softplus" else _TruncExp.apply(value)
        return density * (positions.abs().amax(dim=-1) <= 1)
