"""The picture of a mixture's scores: densities and score vectors of the plane, blurred by growing noise."""

import io
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.runtime.errors import UserError
from distill.teacher.mixture import MixtureTeacher, ring
from distill.teacher.unet import UnetOptions, make_scheduler


@dataclass(frozen=True)
class ScoreFieldOptions:
    """A ring of modes, and the noise levels that are shown, from the left to the right."""

    modes: int = 8
    std: float = 0.08
    label: str = ""  # a class, c0 to c3: the conditional score; empty: that of the whole mixture
    sigmas: tuple[float, ...] = (0.05, 0.2, 0.5, 0.8)  # the noise's standard deviation in x_t, in (0, 1)
    extent: float = 1.8  # half the side of the square
    arrows: int = 19  # a side

    def __post_init__(self) -> None:
        if not self.sigmas or not all(0 < sigma < 1 for sigma in self.sigmas):
            raise UserError(f"sigmas is {list(self.sigmas)}: expected numbers between 0 and 1")
        if self.modes < 1 or self.std <= 0 or self.extent <= 0 or self.arrows < 2:
            raise UserError("a score field needs a mode, 2 arrows a side, and a positive std and extent")


def plane(extent: float, count: int) -> Tensor:
    """count^2 points (N, 2, 1, 1) of the square, rows from below."""
    axis = torch.linspace(-extent, extent, count, dtype=torch.float64)
    y, x = torch.meshgrid(axis, axis, indexing="ij")
    return torch.stack([x.flatten(), y.flatten()], 1)[:, :, None, None]


def field_at(teacher: MixtureTeacher, points: Tensor, sigma: float, label: str = "") -> tuple[Tensor, Tensor]:
    """log p_t (N,) and the score (N, 2) at points (N, 2, 1, 1), at the level nearest to sigma / alpha."""
    ratio = torch.tensor([sigma / (1 - sigma**2) ** 0.5])
    t = teacher.schedule.sigma_to_t(ratio).expand(len(points))
    conditioning = teacher.encode_text([label]).expand(len(points))
    score = teacher.predict(points, t, conditioning).score
    return teacher.log_density(points, t, conditioning), score[:, :, 0, 0]


def draw_score_field(options: ScoreFieldOptions) -> Image.Image:
    """A panel for each level: the density, bright where it is high, and arrows along the score.

    An arrow has the score's direction and the length n / (1 + n), where n is that of sigma times the score.
    """
    from matplotlib.figure import Figure

    schedule = NoiseSchedule(make_scheduler(UnetOptions()).alphas_cumprod)
    teacher = MixtureTeacher(ring(options.modes, std=options.std), schedule)
    figure = Figure(figsize=(4 * len(options.sigmas), 4.3), layout="constrained")
    axes = figure.subplots(1, len(options.sigmas), squeeze=False)[0]
    fine, coarse = plane(options.extent, 160), plane(options.extent, options.arrows)
    extent = (-options.extent, options.extent) * 2
    for axis, sigma in zip(axes, options.sigmas, strict=True):
        density = field_at(teacher, fine, sigma, options.label)[0].exp().view(160, 160)
        score = field_at(teacher, coarse, sigma, options.label)[1] * sigma
        arrows = score / (1 + score.norm(dim=1, keepdim=True))
        axis.imshow(density.sqrt(), origin="lower", extent=extent, cmap="magma")
        x, y = coarse[:, :, 0, 0].T
        axis.quiver(x, y, *arrows.T, color="white", scale=options.arrows, width=0.004)
        axis.set(title=f"sigma {sigma:g}, alpha {(1 - sigma**2) ** 0.5:.2f}", xticks=[], yticks=[])
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=100)
    return Image.open(buffer).convert("RGB")
