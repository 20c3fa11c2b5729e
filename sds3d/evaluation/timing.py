"""Wall-clock time of a text-to-3D step: its parts, and the whole."""

from functools import partial

import torch

from distill.runtime.timing import Timing, measure
from sds3d.scene.cameras import sample_cameras
from sds3d.text_to_3d.stages.score_distillation import ScoreDistillationStage
from sds3d.text_to_3d.stages.sdedit_refinement import SDEditRefinementStage
from sds3d.text_to_3d.trainer import TextTo3d


def time_step(trainer: TextTo3d, runs: int) -> list[Timing]:
    """The parts of a step at full resolution, then whole steps of each stage, which change the scene."""
    context, teacher, scene = trainer.context, trainer.teacher, trainer.scene
    views, generator = context.whole_groups(context.options.views), torch.Generator().manual_seed(0)
    cameras = sample_cameras(context.options.camera, views, teacher.resolution, generator)
    cameras = cameras.to(context.run.device)
    background = context.backgrounds(views)
    images = scene.render(cameras, background, generator, training=True).rgb.detach()

    def encode() -> None:
        pixels = images.clone().requires_grad_()
        teacher.encode_images(pixels).sum().backward()

    def render() -> None:
        scene.render(cameras, background, generator, training=True).rgb.sum().backward()

    timings = [
        measure("render, forward and backward", render, runs),
        measure("image encoder, forward and backward", encode, runs),
        measure("scene update (the occupancy grid)", lambda: scene.update(0, generator), runs),
    ]
    for stage in trainer.stages.values():
        if isinstance(stage, ScoreDistillationStage):
            timings += _score_distillation(stage, runs)
        if isinstance(stage, SDEditRefinementStage):
            timings.append(measure("SDEdit round, strength 0.5", partial(stage.resample_views, 0.5), 1))
            timings.append(measure("refinement step", partial(stage.refine_step, 1), runs))
    return timings


def _score_distillation(stage: ScoreDistillationStage, runs: int) -> list[Timing]:
    """The objective alone, the lower bound of a step, and whole steps at both resolutions."""
    context = stage.context
    generator = torch.Generator().manual_seed(0)
    resolution = context.teacher.resolution
    cameras = sample_cameras(context.options.camera, stage.views, resolution, generator)
    latents = torch.randn(len(cameras), *context.teacher.latent_shape, generator=generator)
    latents, conditionings = latents.to(context.run.device), context.prompt_conditionings(cameras)
    return [
        measure("objective", lambda: stage.objective(latents, conditionings, 0.5, generator), runs),
        measure(f"score distillation step, {resolution} pixels", lambda: stage.sds_step(1, 0.99), runs),
        measure("score distillation step, coarse", lambda: stage.sds_step(1, 0.0), runs),
    ]
