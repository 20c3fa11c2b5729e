"""A second stage: a scene is fitted to its own views as the teacher redraws them, round after round, ever closer to what they show.

Score distillation averages what the teacher would draw, so surfaces stay soft; a view that was sampled to its end is sharp. The
loop is the iterative dataset update of Instruct-NeRF2NeRF (Haque et al. 2023, arXiv:2303.12789, section 4.2), its editor SDEdit.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from distill.runtime.errors import UserError
from sds3d.scene.cameras import Cameras

CHUNK = 16  # views drawn at once; bounds the memory


@dataclass(frozen=True)
class SDEditRefinementOptions:
    """From a share `begin` of a run on: one round a strength (SDEdit's share of the way back to noise), in equal parts; [] for none.

    Each draws `views` anew in `steps` of DDIM at `guidance`, to which the scene is then fitted with `weight` on the mean square
    error, on the scale of the objective, at a learning rate of its own.
    """

    strengths: tuple[float, ...] = ()
    begin: float = 0.8
    views: int = 32
    elevation: tuple[float, float] = (-10.0, 50.0)  # from above, what is drawn over loses the legs of chairs
    guidance: float = 4.0
    steps: int = 20
    weight: float = 3000.0
    learning_rate: float = 0.02
    opacity: float = 10.0  # the regulariser's weight meanwhile: the pictures say what is empty

    def __post_init__(self) -> None:
        if self.steps < 1 or any(not 1 <= strength * self.steps <= self.steps for strength in self.strengths):
            raise UserError(
                f"redraw.strengths is {list(self.strengths)}, steps {self.steps}: shares up to 1 of at least one step each are expected"
            )
        if (
            not 0 <= self.begin < 1
            or self.views < 1
            or min(self.weight, self.learning_rate) <= 0
            or self.opacity < 0
        ):
            raise UserError(
                "redraw needs begin in [0, 1), at least 1 view, a positive weight and learning_rate, opacity of 0 or more"
            )

    def rounds(self, steps: int) -> dict[int, float]:
        """The strength of each round by the step of a run that it begins at."""
        first, count = round(self.begin * steps), len(self.strengths)
        begins = {
            first + (steps - first) * number // count: strength
            for number, strength in enumerate(self.strengths)
        }
        return {at: strength for at, strength in begins.items() if at < steps}

    def cost(self, steps: int) -> int:
        """U-Net work of the rounds of a run of so many steps in F, one forward pass of a sample."""
        return (
            self.views
            * (1 if self.guidance == 1 else 2)
            * sum(int(self.steps * share) for share in self.rounds(steps).values())
        )


class RefinedViews(nn.Module):
    """V views: their cameras, the greys behind them and what was drawn; a module, so that checkpoints hold it."""

    def __init__(self, views: int, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution
        shapes = {"images": (3, resolution, resolution), "behind": (3,), "position": (3,), "rotation": (3, 3)}
        for name, shape in {**shapes, "azimuth": (), "elevation": (), "fovy": ()}.items():
            self.register_buffer(name, torch.zeros(views, *shape))

    def take(self, cameras: Cameras, behind: Tensor, images: Tensor) -> None:
        """Replace all views."""
        given = {**vars(cameras), "behind": behind, "images": images}
        for name, kept in self.named_buffers():
            kept.copy_(given[name])

    def some(self, count: int, generator: torch.Generator) -> tuple[Cameras, Tensor, Tensor]:
        """Cameras, greys (count, 3) and images (count, 3, H, W) of views drawn without repetition."""
        at = torch.randperm(len(self.images), generator=generator)[:count].to(self.images.device)
        every = Cameras(
            self.position, self.azimuth, self.elevation, self.rotation, self.fovy, self.resolution
        )
        return every.some(at), self.behind[at], self.images[at]
