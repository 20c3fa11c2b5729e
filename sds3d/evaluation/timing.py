"""Where a text-to-3D step's time goes: each part timed on its own, beside the whole, on the machine at hand."""

import torch

from distill.runtime.timing import Timing, timed
from distill.teacher.latent import Teacher
from sds3d.scene.cameras import sample_cameras
from sds3d.text_to_3d.trainer import TextTo3d, conditions_for, grey_backgrounds


def time_step(task: TextTo3d, runs: int) -> list[Timing]:
    """The parts of a full-resolution step of a scene as it is, then the step as a whole (which changes the scene)."""
    teacher: Teacher = task.teacher
    options, generator = task.options, torch.Generator().manual_seed(0)
    cameras = (
        sample_cameras(options.camera, options.views, generator).at(teacher.resolution).to(task.run.device)
    )
    behind = grey_backgrounds(options, options.views, generator).to(task.run.device)
    conditions = conditions_for(teacher, options, task.objective.options, cameras)
    images = task.scene.render(cameras, behind, generator, training=True).rgb.detach()
    latents = teacher.encode_images(images)

    def encode() -> None:
        pixels = images.clone().requires_grad_()
        teacher.encode_images(pixels).sum().backward()

    def render() -> None:
        task.scene.render(cameras, behind, generator, training=True).rgb.sum().backward()

    return [
        timed("render, forward and backward", render, runs),
        timed("VAE encoder, forward and backward", encode, runs),
        timed(
            "teacher, guided pair (the floor)",
            lambda: task.objective(latents, conditions, 0.5, generator),
            runs,
        ),
        timed("occupancy grid update (one step in 16)", lambda: task.scene.update(0, generator), runs),
        timed("whole step, 64 pixels", lambda: task.step(0.99, 1), runs),
        timed("whole step, coarse", lambda: task.step(0.0, 1), runs),
        timed("redrawing a round of views, strength .5", lambda: task.redraw(0.5), 1),
        timed("step towards what was redrawn", lambda: task.fit(1), runs),
    ]
