"""What lies behind a scene: a colour, or colours by direction."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from distill.runtime.errors import UserError


@dataclass(frozen=True)
class BackgroundOptions:
    """The background: a `fixed` colour, a learned `constant`, or a learned `mlp` of the ray's direction.

    Raises `UserError` for an unknown kind or a colour out of range.
    """

    kind: Literal["fixed", "constant", "mlp"] = "fixed"
    colour: tuple[float, float, float] = (
        0.85,
        0.85,
        0.85,
    )  # RGB in [0, 1], the initial value of a learned one
    width: int = 16  # of the MLP's two hidden layers

    def __post_init__(self) -> None:
        if self.kind not in ("fixed", "constant", "mlp"):
            raise UserError(f"background kind is '{self.kind}': use fixed, constant or mlp")
        if len(self.colour) != 3 or not all(0 <= value <= 1 for value in self.colour):
            raise UserError(f"background colour is {self.colour}: give three numbers from 0 to 1")
        if self.width < 1:
            raise UserError(f"background width is {self.width}: at least 1 is expected")


class Background(nn.Module):
    """Background colours for unit ray directions (R, 3) -> (R, 3) in [0, 1].

    The `mlp` is an environment map as in DreamFusion (Poole et al. 2022, section 3.2): directions encoded by
    spherical harmonics, as threestudio does.
    """

    def __init__(self, options: BackgroundOptions) -> None:
        super().__init__()
        self.kind = options.kind
        self.colour: Tensor
        colour = torch.tensor(options.colour, dtype=torch.float32)
        if options.kind == "fixed":
            self.register_buffer("colour", colour)
            return
        logit = colour.clamp(0.02, 0.98).logit()
        if options.kind == "constant":
            self.logit = nn.Parameter(logit)
            return
        width, last = options.width, nn.Linear(options.width, 3)
        self.mlp = nn.Sequential(nn.Linear(9, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), last)
        nn.init.zeros_(last.weight)
        last.bias.data.copy_(logit)

    def forward(self, directions: Tensor) -> Tensor:
        if self.kind == "mlp":
            return self.mlp(spherical_harmonics(directions)).to(directions.dtype).sigmoid()
        colour = self.colour if self.kind == "fixed" else self.logit.sigmoid()
        return colour.expand_as(directions)


def spherical_harmonics(directions: Tensor) -> Tensor:
    """The nine real spherical harmonics of degrees 0 to 2 at unit directions (N, 3): (N, 9), orthonormal.

    Sloan 2008, "Stupid spherical harmonics tricks", appendix A2.
    """
    x, y, z = directions.unbind(-1)
    values = [
        torch.full_like(x, 0.28209479),
        -0.48860251 * y,
        0.48860251 * z,
        -0.48860251 * x,
        1.09254843 * x * y,
        -1.09254843 * y * z,
        0.94617470 * z * z - 0.31539157,
        -1.09254843 * x * z,
        0.54627422 * (x * x - y * y),
    ]
    return torch.stack(values, dim=-1)
