"""Score distillation: cameras -> renders -> latents -> objective -> update.

DreamFusion (Poole et al. 2022, arXiv:2209.14988), algorithm 1.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, final

from torch import Tensor
from torch.nn import functional as F

from distill.objectives.algebra import DistillationOutput, ScoreDistillation
from distill.objectives.diagnostics import DiagnosticOptions, diagnose_run
from distill.runtime import processes
from distill.runtime.checkpoint import Stateful
from distill.runtime.errors import UserError
from distill.runtime.optim import cosine_decay, scale_learning_rates
from distill.teacher.linear import fit_linear_decoder, fit_linear_encoder
from sds3d.scene.cameras import Cameras
from sds3d.scene.protocol import RenderedViews
from sds3d.scene.shading import ShadingOptions
from sds3d.text_to_3d.context import TextTo3dContext
from sds3d.text_to_3d.stages.base import Stage, StageOptions


@final
@dataclass(frozen=True)
class ScoreDistillationOptions(StageOptions):
    """How the objective's gradient reaches the scene. Progress is the fraction of this stage's updates."""

    coarse_resolution: int = 32  # of the warm-up's renders, which are upsampled for the teacher
    coarse_until: float = 0.3  # progress at which the warm-up ends
    resolution: int | None = None  # of the renders after it, upsampled likewise; null: the teacher's
    coarse_latents: Literal["vae", "linear"] = (
        "vae"  # linear: no encoder in the warm-up (distill/teacher/linear.py)
    )
    pixel_loss_target: Literal["albedo", "scene"] = (
        "albedo"  # albedo: latent gradients then update density only
    )
    pixel_decoder: Literal["vae", "linear"] = (
        "vae"  # of the residual in pixels; linear: of mean colours, without the VAE's decoder
    )
    shading: ShadingOptions | None = None  # random lights; null: views show the albedo
    final_lr_scale: float = 0.1  # the learning rates fall to it as a cosine: late gradients are mostly noise
    diagnostics: DiagnosticOptions = DiagnosticOptions()

    def __post_init__(self) -> None:
        if self.coarse_resolution < 8:
            raise UserError(f"coarse_resolution is {self.coarse_resolution}: at least 8 pixels are expected")
        if self.resolution is not None and self.resolution < 8:
            raise UserError(f"resolution is {self.resolution}: at least 8 pixels, or null, are expected")
        if not 0 <= self.coarse_until <= 1:
            raise UserError(f"coarse_until is {self.coarse_until}: a fraction in [0, 1] is expected")
        if not 0 <= self.final_lr_scale <= 1:
            raise UserError(f"final_lr_scale is {self.final_lr_scale}: a fraction in [0, 1] is expected")

    @property
    def updates_from(self) -> float | None:
        """From the first step on."""
        return 0.0

    def build(self, context: TextTo3dContext) -> "ScoreDistillationStage":
        """The stage of a run."""
        return ScoreDistillationStage(context, self)


@final
class ScoreDistillationStage(Stage):
    """Updates the scene by the run's objective, whose schedules span the stage."""

    def __init__(self, context: TextTo3dContext, options: ScoreDistillationOptions) -> None:
        self.context, self.options = context, options
        self.views = context.whole_groups(context.options.views)
        self.rows = processes.equal_rows(self.views, "text_to_3d.views", context.views_per_group)
        teacher = context.teacher
        linear_pixels = options.pixel_decoder == "linear" and context.objective.image > 0
        self.linear_decoder = fit_linear_decoder(teacher) if linear_pixels else None
        self.objective = ScoreDistillation(
            context.conditioned_teacher,
            context.objective,
            context.critic,
            self.linear_decoder or teacher.decode,
        )
        self.linear_encoder = fit_linear_encoder(teacher) if options.coarse_latents == "linear" else None

    def state(self) -> Mapping[str, Stateful]:
        """The critic."""
        return {} if self.context.critic is None else {"critic": self.context.critic}

    def nfe(self, updates: int) -> int:
        """NFE of the objective over all views and updates."""
        return self.views * self.context.objective.total_cost(updates)

    def update(self, step: int, progress: float) -> RenderedViews:
        """One update, its diagnostics and its gradient's size."""
        output, views = self.sds_step(step, progress)
        diagnose_run(self.context.run, self.objective, output, self.options.diagnostics)
        self.context.run.log(g=output.gradient.square().mean().sqrt())
        return views

    def sds_step(self, step: int, progress: float) -> tuple[DistillationOutput, RenderedViews]:
        """One update of the scene, then of the critic, at a progress in [0, 1)."""
        context, options, generator = self.context, self.options, self.context.run.generator
        lr_scale = cosine_decay(progress, options.final_lr_scale)
        scale_learning_rates(context.optimizer.param_groups, context.learning_rates, lr_scale)

        context.scene.update(step, generator)
        coarse = progress < options.coarse_until
        with processes.split_rows():
            views, cameras, background = self.render(progress, coarse)

        # The latents' residual then updates the density, the residual in pixels the albedo.
        separate = options.pixel_loss_target == "albedo" and self.objective.options.image and not coarse
        rgb_density_grad, rgb_albedo_grad = views.split_gradients() if separate else (views.rgb, views.rgb)
        latents = self.encode(rgb_density_grad, coarse)
        images = None if coarse else self.pixels(rgb_albedo_grad, latents)

        context.set_cameras(cameras)
        conditionings = context.prompt_conditionings(cameras, background)
        with processes.split_rows():
            output = self.objective(latents, conditionings, progress, generator, images=images)
        context.optimizer_step(output.loss + context.regularization(views, progress))
        with processes.split_rows():
            context.train_critic(latents, conditionings)
        return output, views

    def render(self, progress: float, coarse: bool) -> tuple[RenderedViews, Cameras, Tensor | None]:
        """Views for training from random cameras over random backgrounds (B, 3), the cameras on the CPU.

        The backgrounds are None where they are the scene's own. Of several processes each has its own views.
        """
        context, options, count = self.context, self.options, self.views
        fine = context.teacher.resolution if options.resolution is None else options.resolution
        resolution = options.coarse_resolution if coarse else fine
        cameras = context.sample_cameras(context.options.camera, count, resolution)
        background = context.training_backgrounds(count)
        lights = None
        if options.shading is not None:
            lights = options.shading.sample(cameras, progress, context.run.generator)
        cameras = cameras.select(self.rows)
        background = None if background is None else background[self.rows]
        lights = None if lights is None else lights.select(self.rows)
        views = context.render(cameras.to(context.run.device), background, lights)
        return views, cameras, background

    def encode(self, images: Tensor, coarse: bool) -> Tensor:
        """Latents of renders (B, 3, H, W), upsampled; coarse ones may go through the linear encoder."""
        if coarse and self.linear_encoder is not None:
            return self.linear_encoder(images)
        return self.context.teacher.encode_images(self.upsample(images))

    def pixels(self, images: Tensor, latents: Tensor) -> Tensor:
        """What the residual in pixels compares with the decoded prediction, of renders and their latents.

        With the linear decoder that is the latents' colours, with the gradient of the cells' mean colours:
        its errors cancel, where a comparison with the renders themselves would teach them to the scene.
        """
        images = self.upsample(images)
        if self.linear_decoder is None:
            return images
        cells = self.linear_decoder.cells(images)
        return self.linear_decoder(latents.detach()) + (cells - cells.detach())

    def upsample(self, images: Tensor) -> Tensor:
        """Renders (B, 3, H, W) at the teacher's resolution."""
        side = self.context.teacher.resolution
        if images.shape[-1] == side:
            return images
        return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)
