"""Which way a scene faces, told by the teacher's denoising error, so that one that grew turned round is turned back."""

from dataclasses import dataclass

import torch
from torch import Tensor

from distill.core.score import ScoreModel
from distill.runtime.errors import UserError
from sds3d.scene.cameras import Cameras
from sds3d.text_to_3d.prompts import VIEWS, view_of

AZIMUTH_VIEWS = tuple(view for view in VIEWS if view != "overhead")  # the view words that tell an azimuth
LEVELS = (0.15, 0.3, 0.45, 0.6, 0.75)  # t / T


@dataclass(frozen=True)
class OrientationCheck:
    """At a share `at` of a run, with so many `draws` of the noise a view and level; a turn must make the error smaller by a share `margin`.

    Early a turn costs nothing, but a vague shape says little; of a finished one small differences tell, if enough noise is drawn.
    """

    at: float
    draws: int = 2
    margin: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.at < 1 or self.draws < 1 or self.margin < 0:
            raise UserError(
                f"facing is asked at {self.at:g}: a share within (0, 1), at least 1 draw and a margin of 0 or more are expected"
            )


@dataclass(frozen=True)
class OrientationOptions:
    """Which quarter turn suits the view words best is asked of `views` all around, so often; no asks leave a scene as it grows."""

    asks: tuple[OrientationCheck, ...] = ()
    views: int = 16
    elevation: float = 15.0

    def __post_init__(self) -> None:
        if self.views < 4:
            raise UserError(f"facing.views is {self.views}: at least 4 are needed to see all around")

    def cost(self, ask: OrientationCheck) -> int:
        """U-Net work of one ask in F, one forward pass of a sample."""
        return self.views * len(LEVELS) * len(AZIMUTH_VIEWS) * ask.draws


@torch.no_grad()
def view_errors(
    model: ScoreModel, latents: Tensor, states: Tensor, draws: int, generator: torch.Generator
) -> Tensor:
    """|eps - noise|^2 (N, K), a mean over levels and draws, of latents (N, C, h, w) under K prompts' text states (K, L, D).

    The smaller, the likelier the prompt: the diffusion classifier (Li et al. 2023, arXiv:2303.16203, eq. 5); all prompts are
    asked about the same noise.
    """
    count, words = len(latents), len(states)
    total = latents.new_zeros(count, words)
    for level in LEVELS:
        t = torch.full((count,), round(level * model.schedule.num_train_timesteps), device=latents.device)
        for _ in range(draws):
            noise = torch.randn(latents.shape, generator=generator).to(latents)
            x_t = model.schedule.add_noise(latents, noise, t)
            told = model.predict(
                x_t.repeat(words, 1, 1, 1), t.repeat(words), states.repeat_interleave(count, 0)
            ).eps
            total += (told.view(words, *noise.shape) - noise).square().sum((2, 3, 4)).T
    return total / (len(LEVELS) * draws)


def quarter_turns(errors: Tensor, cameras: Cameras, margin: float) -> int:
    """Quarter turns of the scene, 0 to 3, after which the view words fit best; errors (N, 3) of `AZIMUTH_VIEWS` as seen from cameras (N).

    What is seen from azimuth a is seen from a + 90 q after q of them. 0 where none is better by a share `margin`.
    """

    def mean(turns: int) -> float:
        words = [
            AZIMUTH_VIEWS.index(view_of(azimuth + 90.0 * turns, 0.0)) for azimuth in cameras.azimuth.tolist()
        ]
        return float(errors[torch.arange(len(words)), torch.tensor(words)].mean())

    found = [mean(turns) for turns in range(4)]
    best = min(range(4), key=found.__getitem__)
    return best if found[best] < found[0] * (1 - margin) else 0
