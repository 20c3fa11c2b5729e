"""Detects and corrects scenes rotated by a multiple of 90 degrees, by the teacher's denoising error."""

from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.score import ScoreModel
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload
from sds3d.scene.cameras import Cameras, ring
from sds3d.text_to_3d.context import TextTo3dContext, grey_backgrounds
from sds3d.text_to_3d.prompts import VIEWS, view_of, view_prompt
from sds3d.text_to_3d.stages.base import Stage, StageOptions

AZIMUTH_VIEWS = tuple(view for view in VIEWS if view != "overhead")  # the view words that depend on azimuth
NOISE_LEVELS = (0.15, 0.3, 0.45, 0.6, 0.75)  # t / T


@dataclass(frozen=True)
class OrientationCheck:
    """One check at `fraction` of a run, with `draws` noise samples a view and noise level.

    The scene is rotated only if this reduces the error by a fraction `margin`. Early, a rotation costs
    nothing but a vague shape gives little evidence; late, small differences count with enough noise samples.
    """

    fraction: float
    draws: int = 2
    margin: float = 0.005

    def __post_init__(self) -> None:
        if not 0 < self.fraction < 1 or self.draws < 1 or self.margin < 0:
            raise UserError(
                f"an orientation check at {self.fraction:g} with {self.draws} draws, margin {self.margin:g}: "
                "a fraction within (0, 1), at least 1 draw and a margin of 0 or more are expected"
            )


@final
@dataclass(frozen=True)
class OrientationOptions(StageOptions):
    """When the orientation is checked, on a ring of how many views; no checks leave it as it is."""

    checks: tuple[OrientationCheck, ...] = (
        OrientationCheck(0.2),
        OrientationCheck(0.4),
        OrientationCheck(0.79, draws=8, margin=0.001),
    )
    views: int = 16
    elevation: float = 15.0  # degrees

    def __post_init__(self) -> None:
        if self.views < 4:
            raise UserError(f"orientation views is {self.views}: at least 4 are needed to cover all azimuths")

    @property
    def rotates_at(self) -> tuple[float, ...]:
        """The fractions of the checks."""
        return tuple(check.fraction for check in self.checks)

    def nfe(self, check: OrientationCheck) -> int:
        """NFE of one check."""
        return self.views * len(NOISE_LEVELS) * len(AZIMUTH_VIEWS) * check.draws

    def build(self, context: TextTo3dContext) -> "OrientationStage":
        """The stage of a run."""
        return OrientationStage(context, self)


@final
class OrientationStage(Stage):
    """Rotates the scene by quarter turns at the checks of a run."""

    def __init__(self, context: TextTo3dContext, options: OrientationOptions) -> None:
        """Nothing is checked without view words in the prompts, or with a mesh that fixes the pose."""
        self.context, self.options = context, options
        checked = options.checks if context.options.view_words and context.control is None else ()
        steps = context.run.options.steps
        by_step = {round(check.fraction * steps): check for check in checked}
        self.checks = {step: check for step, check in by_step.items() if step < steps}

    def before_step(self, step: int) -> None:
        """Run the check that is due, if one is."""
        if step in self.checks:
            self.context.run.log(rotation=self.align_orientation(self.checks[step], step))

    def nfe(self, updates: int) -> int:
        """NFE of the checks."""
        return sum(self.options.nfe(check) for check in self.checks.values())

    def align_orientation(self, check: OrientationCheck, step: int) -> float:
        """Rotate the scene to where its views fit the view words best; returns the angle in degrees."""
        context, options, teacher = self.context, self.options, self.context.teacher
        generator = torch.Generator().manual_seed(context.run.options.seed + step)

        cameras = ring(options.views, options.elevation, teacher.resolution)
        background = grey_backgrounds(context.options.background, options.views, generator)
        views = context.scene.render(cameras.to(context.run.device), upload(background, context.run.device))
        latents = teacher.encode_images(views.rgb)

        prompts = [view_prompt(context.options.prompt, view) for view in AZIMUTH_VIEWS]
        errors = denoising_errors(teacher, latents, teacher.encode_text(prompts), check.draws, generator)
        turns = quarter_turns(errors.cpu(), cameras, check.margin)
        context.scene.rotate(turns)
        return 90.0 * turns


@torch.no_grad()
def denoising_errors(
    model: ScoreModel, latents: Tensor, prompts: Conditioning, draws: int, generator: torch.Generator
) -> Tensor:
    """|eps - noise|^2 (N, K), a mean over noise levels and draws, of latents (N, C, h, w) under K prompts.

    The smaller, the likelier the prompt: the diffusion classifier (Li et al. 2023, arXiv:2303.16203, eq. 5),
    with the same noise for all prompts.
    """
    count, classes = len(latents), len(prompts)
    conditioning = prompts.repeat_interleave(count)
    total = latents.new_zeros(count, classes)
    for level in NOISE_LEVELS:
        t = torch.full((count,), round(level * model.schedule.num_train_timesteps), device=latents.device)
        for _ in range(draws):
            noise = upload(torch.randn(latents.shape, generator=generator), latents.device)
            noise = noise.to(latents.dtype)
            x_t = model.schedule.add_noise(latents, noise, t)
            eps = model.predict(x_t.repeat(classes, 1, 1, 1), t.repeat(classes), conditioning).eps
            total += (eps.view(classes, *noise.shape) - noise).square().sum((2, 3, 4)).T
    return total / (len(NOISE_LEVELS) * draws)


def quarter_turns(errors: Tensor, cameras: Cameras, margin: float) -> int:
    """Quarter turns of the scene, 0 to 3, after which its views fit the view words best.

    errors (N, 3) are those of `AZIMUTH_VIEWS` at cameras (N). What is seen from azimuth a is seen from
    a + 90 q after q turns. 0 where none reduces the mean error by a fraction `margin`.
    """
    azimuths = cameras.azimuth.tolist()

    def mean_error(turns: int) -> float:
        views = [AZIMUTH_VIEWS.index(view_of(azimuth + 90.0 * turns, 0.0)) for azimuth in azimuths]
        return float(errors[torch.arange(len(views)), torch.tensor(views)].mean())

    means = [mean_error(turns) for turns in range(4)]
    best = min(range(4), key=means.__getitem__)
    return best if means[best] < means[0] * (1 - margin) else 0
