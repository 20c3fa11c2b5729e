"""Detects and corrects scenes rotated by a multiple of 90 degrees, by the teacher's denoising error."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.score import ScoreModel
from distill.runtime.errors import UserError
from distill.runtime.transfer import upload
from sds3d.scene.cameras import Cameras, ring
from sds3d.text_to_3d.context import TextTo3dContext
from sds3d.text_to_3d.prompts import VIEWS, view_of, view_prompt
from sds3d.text_to_3d.stages.base import Stage, StageOptions
from sds3d.text_to_3d.view_groups import rotate_azimuth, spread_groups

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
    """When the orientation is checked, on a ring of how many views; no checks leave it as it is.

    The views are rounded up to whole groups.

    A teacher that is given cameras is asked by pose, others by view words. A rotation by pose must also
    reduce the error by `min_z_score` standard errors, lest an object that is much alike from two sides, such
    as a table, be rotated by chance.
    """

    checks: tuple[OrientationCheck, ...] = (
        OrientationCheck(0.2),
        OrientationCheck(0.4),
        OrientationCheck(0.79, draws=8, margin=0.001),
    )
    views: int = 16
    elevation: float = 15.0  # degrees
    min_z_score: float = 2.0

    def __post_init__(self) -> None:
        if self.views < 4:
            raise UserError(f"orientation views is {self.views}: at least 4 are needed to cover all azimuths")
        if self.min_z_score < 0:
            raise UserError(f"orientation min_z_score is {self.min_z_score}: 0 or more is expected")

    @property
    def rotates_at(self) -> tuple[float, ...]:
        """The fractions of the checks."""
        return tuple(check.fraction for check in self.checks)

    def build(self, context: TextTo3dContext) -> "OrientationStage":
        """The stage of a run."""
        return OrientationStage(context, self)


@final
class OrientationStage(Stage):
    """Rotates the scene by quarter turns at the checks of a run."""

    def __init__(self, context: TextTo3dContext, options: OrientationOptions) -> None:
        """Nothing is checked without poses or view words for the teacher, with a mesh or a picture that fixes
        the pose, or once a picture with a caption is aligned to the scene.
        """
        self.context, self.options = context, options
        self.views = context.whole_groups(options.views)
        decidable = context.camera_condition or context.options.view_words
        end = context.run.options.steps
        by_step = {round(check.fraction * end): check for check in options.checks if decidable}
        if context.control is not None:
            end = 0
        elif context.reference is not None:
            end = context.reference.aligned_from(end) or 0
        self.checks = {step: check for step, check in by_step.items() if step < end}

    def before_step(self, step: int) -> None:
        """Run the check that is due, if one is."""
        if step in self.checks:
            self.context.run.log(rotation=self.align_orientation(self.checks[step], step))

    def nfe(self, updates: int) -> int:
        """NFE of the checks."""
        candidates = 4 if self.context.camera_condition else len(AZIMUTH_VIEWS)
        draws = sum(check.draws for check in self.checks.values())
        return self.views * len(NOISE_LEVELS) * candidates * draws

    def align_orientation(self, check: OrientationCheck, step: int) -> float:
        """Rotate the scene to where its views fit poses or view words best; returns the angle in degrees."""
        context, options, teacher = self.context, self.options, self.context.teacher
        generator = torch.Generator().manual_seed(context.run.options.seed + step)

        cameras = ring(self.views, options.elevation, teacher.resolution)
        cameras = spread_groups(cameras, context.views_per_group)
        background = context.backgrounds(self.views, generator)
        views = context.scene.render(cameras.to(context.run.device), background)
        latents = teacher.encode_images(views.rgb)

        candidates = self.rotated_poses(cameras) if context.camera_condition else self.view_prompts()
        errors = denoising_errors(teacher, latents, candidates, check.draws, generator).cpu()
        if context.camera_condition:
            turns = quarter_turns(errors, check.margin, options.min_z_score)
        else:
            turns = quarter_turns(by_turn(errors, cameras), check.margin)
        context.scene.rotate(turns)
        return 90.0 * turns

    def view_prompts(self) -> list[Conditioning]:
        """The prompt with each of `AZIMUTH_VIEWS`."""
        prompts = [view_prompt(self.context.options.prompt, view) for view in AZIMUTH_VIEWS]
        return self.context.teacher.encode_text(prompts).split(1)

    def rotated_poses(self, cameras: Cameras) -> list[Conditioning]:
        """The prompt, without view words, at the poses that cameras have after 0 to 3 quarter turns."""
        context = self.context
        prompt = context.teacher.encode_text([context.options.prompt])
        angles = 90.0 * torch.arange(4)
        return [context.with_cameras(prompt, rotate_azimuth(cameras, angle)) for angle in angles]


@torch.no_grad()
def denoising_errors(
    model: ScoreModel,
    latents: Tensor,
    candidates: Sequence[Conditioning],
    draws: int,
    generator: torch.Generator,
) -> Tensor:
    """|eps - noise|^2 (S, N, K) at S noise levels and draws, of latents (N, C, h, w) under K candidates.

    Each is a conditioning of N rows or of one. The smaller the mean, the likelier it is: the diffusion
    classifier (Li et al. 2023, arXiv:2303.16203, eq. 5), with the same noise for all candidates.
    """
    count, classes = len(latents), len(candidates)
    conditioning = Conditioning.cat([candidate.expand(count) for candidate in candidates])
    errors = []
    for level in NOISE_LEVELS:
        t = torch.full((count,), round(level * model.schedule.num_train_timesteps), device=latents.device)
        for _ in range(draws):
            noise = upload(torch.randn(latents.shape, generator=generator), latents.device)
            noise = noise.to(latents.dtype)
            x_t = model.schedule.add_noise(latents, noise, t)
            eps = model.predict(x_t.repeat(classes, 1, 1, 1), t.repeat(classes), conditioning).eps
            errors.append((eps.view(classes, *noise.shape) - noise).square().sum((2, 3, 4)).T)
    return torch.stack(errors)


def by_turn(errors: Tensor, cameras: Cameras) -> Tensor:
    """Errors (S, N, 4) under the view words after 0 to 3 quarter turns.

    errors (S, N, 3) are those of `AZIMUTH_VIEWS` at cameras (N). What is seen from azimuth a is seen from
    a + 90 q after q turns.
    """
    azimuths = cameras.azimuth.tolist()
    words = [[view_of(azimuth + 90.0 * turns, 0.0) for turns in range(4)] for azimuth in azimuths]
    columns = torch.tensor([[AZIMUTH_VIEWS.index(word) for word in row] for row in words])
    return errors[:, torch.arange(len(azimuths))[:, None], columns]


def quarter_turns(errors: Tensor, margin: float, min_z_score: float = 0.0) -> int:
    """Quarter turns of the scene, 0 to 3, after which its views fit best; errors (S, N, 4) by turn.

    0 where none reduces the mean error by a fraction `margin`, and by `min_z_score` standard errors.
    """
    errors = errors.flatten(0, 1)
    means = errors.mean(0)
    best = int(means.argmin())
    reduction = errors[:, 0] - errors[:, best]
    standard_error = reduction.std() / len(errors) ** 0.5
    needed = max(float(margin * means[0]), float(min_z_score * standard_error))
    return best if float(reduction.mean()) > needed else 0
