"""The scene as a function of position: density and albedo from an encoded point by a tiny MLP."""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from distill.runtime.errors import UserError
from sds3d.scene.encoding import HashEncodingOptions, make_encoding

# Corners of a tetrahedron: four taps give a gradient where the six of central differences would.
TETRAHEDRON = ((1.0, 1.0, 1.0), (1.0, -1.0, -1.0), (-1.0, 1.0, -1.0), (-1.0, -1.0, 1.0))
RAY_STEPS = 7  # of the short ray that a surface point's colour is rendered along
CHUNK = 1 << 17  # evaluations at once, which bounds the memory


@dataclass(frozen=True)
class BandOptions:
    """Levels of the encoding that are unlocked over steps: coarse shapes first, with smooth normals.

    Neuralangelo (Li et al. 2023, section 3.2); defaults are threestudio's for 16 levels and 10,000 steps.
    Raises `UserError` for a value out of range.
    """

    start_level: int = 8  # levels that are active from the first step
    start_step: int = 2000  # until which no other is unlocked
    update_steps: int = 500  # steps from each level to the next

    def __post_init__(self) -> None:
        if min(self.start_level, self.update_steps) < 1 or self.start_step < 0:
            raise UserError(
                f"bands start_level {self.start_level}, start_step {self.start_step}, update_steps "
                f"{self.update_steps}: at least 1 level, step 0 and 1 step are expected"
            )

    def levels(self, step: int) -> int:
        """How many levels are active at a step."""
        return self.start_level + max(step - self.start_step, 0) // self.update_steps


@dataclass(frozen=True)
class FieldOptions:
    """Size of the field and its initial density. Raises `UserError` for sizes that are not positive.

    Before the activation, density gets `density_bias + blob_density * (1 - |x| / blob_radius)` (Magic3D, Lin
    et al. 2023, section 4.1; DreamFusion, appendix A.2, uses a Gaussian): a soft ball, empty far from the
    centre.
    """

    encoding: HashEncodingOptions = field(default_factory=HashEncodingOptions)
    hidden_width: int = 32
    hidden_layers: int = 1
    activation: Literal["softplus", "trunc_exp"] = "softplus"
    density_bias: float = 0.0
    blob_density: float = 6.0  # 10 and a radius of 0.5 prevented spouts and handles
    blob_radius: float = 0.6  # world units; the box is [-1, 1]^3
    bands: BandOptions | None = None  # null: all levels of the encoding from the first step on

    def __post_init__(self) -> None:
        if self.hidden_width < 1 or self.hidden_layers < 1 or self.blob_radius <= 0:
            raise UserError(
                f"field of {self.hidden_layers} hidden layers of width {self.hidden_width} and blob radius "
                f"{self.blob_radius}: all three must be positive"
            )
        if self.activation not in ("softplus", "trunc_exp"):
            raise UserError(f"field activation is '{self.activation}': use softplus or trunc_exp")


class _TruncExp(torch.autograd.Function):
    """exp whose gradient's exponent is clamped at 15, against overflow by outliers (Mueller et al. 2022)."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        ctx.save_for_backward(value)
        return value.clamp(max=15).exp()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0].clamp(max=15).exp()


def _rename_buffers(field: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    """Scenes of format sds3d-scene-1 call the rotation `turn`, or have none."""
    state.setdefault(f"{prefix}rotation", state.pop(f"{prefix}turn", torch.eye(3)))


class Field(nn.Module):
    """Density and albedo at positions in [-1, 1]^3, independent of the view: light is in the albedo."""

    def __init__(self, options: FieldOptions, device: torch.device | str = "cpu") -> None:
        super().__init__()
        self.options = options
        self.encoding = make_encoding(options.encoding, device)
        widths = [options.encoding.width] + [options.hidden_width] * options.hidden_layers
        layers: list[nn.Module] = []
        for before, after in pairwise(widths):
            layers += [nn.Linear(before, after), nn.ReLU(inplace=True)]
        self.mlp = nn.Sequential(*layers, nn.Linear(options.hidden_width, 4)).to(device)
        self.rotation: Tensor  # the product of all `rotate` calls
        self.register_buffer("rotation", torch.eye(3, device=device))
        self.taps: Tensor
        self.register_buffer("taps", torch.tensor(TETRAHEDRON, device=device), persistent=False)
        self.level_mask: Tensor  # of the encoding's features
        if options.bands is not None:
            self.register_buffer("level_mask", torch.zeros(options.encoding.width, device=device))
            self.unlock_levels(0)
        self.register_load_state_dict_pre_hook(_rename_buffers)

    @torch.no_grad()
    def unlock_levels(self, step: int) -> None:
        """Activate the encoding's levels that are unlocked at `step`; the features of the others are 0."""
        if self.options.bands is not None:
            levels = self.options.bands.levels(step)
            self.level_mask[: levels * self.options.encoding.n_features_per_level] = 1.0

    def forward(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """positions (N, 3) -> density (N,) per world unit, 0 outside the box, and albedo (N, 3) in [0, 1]."""
        raw = self._raw(positions)
        return self._activate(raw[:, 0], positions), raw[:, 1:].sigmoid()

    def density(self, positions: Tensor) -> Tensor:
        """positions (N, 3) -> density (N,)."""
        return self._activate(self._raw(positions)[:, 0], positions)

    def normal(self, positions: Tensor, step: float = 0.01) -> Tensor:
        """Unit outward normals (N, 3): the negative gradient of density, by finite differences.

        Four evaluations of the density at the corners of a tetrahedron of half-width `step`; differentiable
        with respect to the parameters.
        """
        taps = self.taps.to(positions)
        # Differences of densities in half precision would be noise.
        with torch.autocast(positions.device.type, enabled=False):
            density = self.density((positions[:, None] + step * taps).flatten(0, 1)).view(-1, 4)
        # log1p keeps the direction and bounds slopes of thousands at a hard surface.
        return functional.normalize(-torch.log1p(density) @ taps, dim=-1, eps=1e-8)

    def rotate(self, quarter_turns: int) -> None:
        """Rotate the scene about the vertical by 90 degrees a quarter turn, which maps the box to itself."""
        quarter = self.rotation.new_tensor([[0.0, -1.0, 0.0], [1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
        self.rotation.copy_(torch.linalg.matrix_power(quarter, quarter_turns % 4) @ self.rotation)

    def _raw(self, positions: Tensor) -> Tensor:
        # In half precision, positions would be off by a cell.
        with torch.autocast(positions.device.type, enabled=False):
            rotated = positions @ self.rotation
        features = self.encoding((rotated + 1) / 2)
        if self.options.bands is not None:
            features = features * self.level_mask
        # Under autocast the MLP's output is in half precision, too coarse for compositing.
        return self.mlp(features).to(positions.dtype)

    def _activate(self, raw: Tensor, positions: Tensor) -> Tensor:
        options = self.options
        blob = options.blob_density * (1 - positions.norm(dim=-1) / options.blob_radius)
        value = raw + (blob + options.density_bias)
        density = functional.softplus(value) if options.activation == "softplus" else _TruncExp.apply(value)
        return density * (positions.abs().amax(dim=-1) <= 1)


def surface_colours(
    field: Callable[[Tensor], tuple[Tensor, Tensor]],
    points: Tensor,
    normals: Tensor,
    step: float,
    device: torch.device,
) -> Tensor:
    """Colours (N, 3) of surface points (N, 3) with outward normals (N, 3), rendered along short inward rays.

    Each ray is `RAY_STEPS` steps of length `step`. The field is evaluated on `device`, all else on the CPU.
    """
    offsets = torch.arange(RAY_STEPS)[:, None, None] * step
    colours = []
    chunks = (value.split(CHUNK // RAY_STEPS) for value in (points, normals))
    for origin, normal in zip(*chunks, strict=True):
        samples = (origin - offsets * normal).clamp(-1, 1).reshape(-1, 3)
        density, albedo = field(samples.to(device))
        thickness = density.reshape(RAY_STEPS, -1, 1).float().cpu() * step
        weights = torch.exp(thickness - thickness.cumsum(0)) * (1 - torch.exp(-thickness)) + 1e-6
        colour = (weights * albedo.reshape(RAY_STEPS, -1, 3).float().cpu()).sum(0)
        colours.append(colour / weights.sum(0))
    return torch.cat(colours).clamp(0, 1)
