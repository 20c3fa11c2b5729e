"""SDEdit refinement: the scene is fitted to its own views as the teacher resamples them, in rounds.

Score distillation averages over the teacher's samples, so surfaces stay blurred; a view sampled to the end is
sharp. This is the iterative dataset update of Instruct-NeRF2NeRF (Haque et al. 2023, arXiv:2303.12789,
section 4.2), with SDEdit (arXiv:2108.01073) as its editor.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import final

import torch
from torch import Tensor, nn

from distill.core.sampling import Img2ImgInit, sample_ode
from distill.core.score import Guided, guidance_nfe
from distill.runtime import processes
from distill.runtime.checkpoint import Stateful
from distill.runtime.errors import UserError
from distill.runtime.optim import scale_learning_rates
from distill.runtime.transfer import upload
from sds3d.scene.cameras import CameraOptions, Cameras
from sds3d.scene.protocol import RenderedViews
from sds3d.text_to_3d.context import TextTo3dContext
from sds3d.text_to_3d.stages.base import Stage, StageOptions

CHUNK = 16  # views sampled at once, or one group; bounds the memory
MAX_DEVIATION = 0.03  # median absolute deviation of a plain background's colours


@final
@dataclass(frozen=True)
class SDEditRefinementOptions(StageOptions):
    """From a fraction `start` of a run on: one round a strength, of equal length; [] for none.

    A round resamples `views` (rounded up to whole groups) with DDIM at `guidance`; the scene is then fitted
    to them by the mean squared error, whose `weight` is on the scale of the objective.
    """

    strengths: tuple[float, ...] = (
        0.6,
        0.5,
        0.4,
        0.3,
    )  # fraction of the noise levels that SDEdit goes back to
    start: float = 0.8
    views: int = 32
    elevation: tuple[float, float] = (-10.0, 50.0)  # degrees; views from above lose the legs of chairs
    guidance: float = 4.0
    steps: int = 20  # of DDIM at strength 1
    weight: float = 3000.0
    learning_rate: float = 0.02  # of what the scene stores by place; other learning rates in proportion
    opacity: float = 10.0  # the regulariser's weight here: the images show what is empty

    def __post_init__(self) -> None:
        CameraOptions(elevation=self.elevation)  # raises for a range that no camera can have
        if self.steps < 1 or any(not 1 <= strength * self.steps <= self.steps for strength in self.strengths):
            raise UserError(
                f"sdedit_refinement strengths are {list(self.strengths)} with {self.steps} steps: "
                "fractions up to 1 of at least one step each are expected"
            )
        if not 0 <= self.start < 1 or self.views < 1:
            raise UserError("sdedit_refinement needs start in [0, 1) and at least 1 view")
        if min(self.weight, self.learning_rate) <= 0 or self.opacity < 0:
            raise UserError(
                "sdedit_refinement needs a positive weight and learning_rate, and opacity of 0 or more"
            )

    @property
    def updates_from(self) -> float | None:
        """From the first round on."""
        return self.start if self.strengths else None

    @property
    def fixed_pose_from(self) -> float | None:
        """From the first round on: the resampled views are tied to their cameras."""
        return self.updates_from

    @property
    def shape_from_views(self) -> bool:
        """Where the first round is at strength 1, and nothing updates the scene before it."""
        return self.start == 0 and self.strengths[:1] == (1.0,)

    def rounds(self, steps: int) -> dict[int, float]:
        """The strength of each round by its first step, in a run of `steps`."""
        first, count = round(self.start * steps), len(self.strengths)
        strengths = {
            first + (steps - first) * index // count: strength
            for index, strength in enumerate(self.strengths)
        }
        return {step: strength for step, strength in strengths.items() if step < steps}

    def build(self, context: TextTo3dContext) -> "SDEditRefinementStage":
        """The stage of a run."""
        return SDEditRefinementStage(context, self)


@final
class SDEditRefinementStage(Stage):
    """Resamples the scene's views at the start of a round, and fits the scene to them at every step."""

    def __init__(self, context: TextTo3dContext, options: SDEditRefinementOptions) -> None:
        self.context, self.options = context, options
        resolution = context.teacher.resolution
        self.rounds = options.rounds(context.run.options.steps)
        self.cameras = replace(context.options.camera, elevation=options.elevation)
        self.views = context.whole_groups(options.views)
        self.refined = RefinedViews(self.views, resolution).to(context.run.device)
        self.rows = processes.equal_rows(min(context.options.views, self.views), "text_to_3d.views")

    def state(self) -> Mapping[str, Stateful]:
        """The resampled views, in runs too short for a round as well: they may be continued."""
        return {"refined_views": self.refined} if self.options.strengths else {}

    def nfe(self, updates: int) -> int:
        """NFE of the rounds; fitting needs none."""
        samples = self.views * guidance_nfe(self.options.guidance)
        return samples * sum(int(self.options.steps * strength) for strength in self.rounds.values())

    def before_step(self, step: int) -> None:
        """Resample the views where a round begins."""
        if step in self.rounds:
            self.resample_views(self.rounds[step])

    def update(self, step: int, progress: float) -> RenderedViews:
        """One update towards the resampled views."""
        return self.refine_step(step)

    def resample_views(self, strength: float) -> None:
        """Resample views of the scene from new cameras by SDEdit, each with its prompt, pose and picture."""
        context, options, teacher = self.context, self.options, self.context.teacher
        cameras = context.sample_cameras(self.cameras, self.views, teacher.resolution)
        background = context.backgrounds(self.views)
        side = teacher.resolution
        images = torch.zeros(self.views, 3, side, side, device=context.run.device)
        # All processes draw that of all views.
        noise = torch.randn(self.views, *teacher.latent_shape, generator=context.run.generator)

        for part in self.chunks():
            chunk = cameras.select(part)
            render = context.scene.render(chunk.to(context.run.device), background[part]).rgb
            clean = teacher.encode_images(render)
            context.set_cameras(chunk)
            cond, uncond = context.encode_prompts(chunk, background[part])
            latents = sample_ode(
                Guided(context.conditioned_teacher, uncond, options.guidance),
                teacher.scheduler,
                cond,
                upload(noise[part], clean.device).to(clean.dtype),
                options.steps,
                init=Img2ImgInit(clean, strength),
            )
            images[part] = teacher.decode(latents)

        resampled = processes.sum_over_processes(images).clamp(0, 1)
        background = background_of(resampled, background)
        self.refined.replace(cameras.to(context.run.device), background, resampled)
        context.run.preview("refined", self.refined.images)

    def chunks(self) -> Iterator[slice]:
        """This process's views in parts that are sampled at once: whole groups, about `CHUNK` views."""
        group = self.context.views_per_group
        size = max(CHUNK // group, 1) * group
        for local in processes.local_rows(self.views, group=group):
            for first in range(local.rows.start, local.rows.stop, size):
                yield slice(first, min(first + size, local.rows.stop))

    def refine_step(self, step: int) -> RenderedViews:
        """One update of the scene by the squared error to some of the resampled views."""
        context, options, generator = self.context, self.options, self.context.run.generator
        base = context.options.learning_rate
        rates = [options.learning_rate * rate / base for rate in context.learning_rates]
        scale_learning_rates(context.optimizer.param_groups, rates, 1.0)

        context.scene.update(step, generator)
        cameras, background, images = self.refined.sample(context.options.views, generator)
        cameras, background, images = cameras.select(self.rows), background[self.rows], images[self.rows]
        with processes.split_rows():
            views = context.render(cameras, background)
        rgb_loss = (views.rgb - images).square().mean()
        regularizers = replace(context.options.regularizers, opacity=options.opacity)
        context.optimizer_step(options.weight * rgb_loss + context.regularization(views, 1.0, regularizers))
        context.run.log(rgb_loss=rgb_loss.detach())
        return views


def background_of(images: Tensor, expected: Tensor) -> Tensor:
    """The colours (B, 3) of the backgrounds of images (B, 3, H, W): their borders' medians.

    The teacher may change the background that a view had, and chooses it where nothing of the view is kept.
    A border of many colours says nothing: then it is the `expected` one (B, 3).
    """
    border = torch.cat([images[..., 0, :], images[..., -1, :], images[..., 0], images[..., -1]], -1)
    median = border.median(-1, keepdim=True).values
    deviation = (border - median).abs().median(-1).values.amax(1)
    return torch.where((deviation < MAX_DEVIATION)[:, None], median[..., 0], expected)


@final
class RefinedViews(nn.Module):
    """V views: their cameras, backgrounds and images; a module, so that checkpoints hold them."""

    images: Tensor  # (V, 3, H, W) in [0, 1]
    background: Tensor  # (V, 3)
    position: Tensor  # as in `Cameras`, like the others
    rotation: Tensor
    azimuth: Tensor
    elevation: Tensor
    fovy: Tensor

    def __init__(self, views: int, resolution: int) -> None:
        super().__init__()
        self.resolution = resolution
        shapes: dict[str, tuple[int, ...]] = {"images": (3, resolution, resolution), "background": (3,)}
        shapes |= {"position": (3,), "rotation": (3, 3), "azimuth": (), "elevation": (), "fovy": ()}
        for name, shape in shapes.items():
            self.register_buffer(name, torch.zeros(views, *shape))

    def replace(self, cameras: Cameras, background: Tensor, images: Tensor) -> None:
        """Replace all views."""
        values = {**vars(cameras), "background": background, "images": images}
        for name, buffer in self.named_buffers():
            buffer.copy_(values[name])

    def sample(self, count: int, generator: torch.Generator) -> tuple[Cameras, Tensor, Tensor]:
        """Cameras, backgrounds (count, 3) and images (count, 3, H, W) of random views without repetition."""
        indices = torch.randperm(len(self.images), generator=generator)[:count]
        indices = upload(indices, self.images.device)
        cameras = Cameras(
            self.position, self.azimuth, self.elevation, self.rotation, self.fovy, self.resolution
        )
        return cameras.select(indices), self.background[indices], self.images[indices]
