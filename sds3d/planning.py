"""The plan of a text-to-3D run."""

from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.planning.plan import Job, Subject, Trial, groups
from distill.planning.recorder import MetaRecorder
from distill.planning.teachers import teacher_modules
from distill.runtime.run import Run
from distill.teacher.load import require_latent
from sds3d.scene import encoding, ray_sampling
from sds3d.scene.cameras import sample_cameras
from sds3d.scene.compositing import Samples
from sds3d.scene.nerf import NerfOptions
from sds3d.text_to_3d.mesh_control import MeshControl
from sds3d.text_to_3d.picture import CutOut
from sds3d.text_to_3d.recipe import TextTo3dRecipe
from sds3d.text_to_3d.reference_view import ReferenceView
from sds3d.text_to_3d.stages.base import Stage
from sds3d.text_to_3d.stages.orientation import OrientationStage
from sds3d.text_to_3d.stages.score_distillation import ScoreDistillationStage
from sds3d.text_to_3d.stages.sdedit_refinement import SDEditRefinementStage
from sds3d.text_to_3d.trainer import TextTo3d

PIXELS = 24  # side of the views in which samples are counted
_gather = encoding._gather


@torch.library.custom_op("sds3d::gather", mutates_args=())
def gather(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    """The encoding's sums of table entries as one operation: its sparse product has no kernel for meta."""
    return _gather(table, index, weight)


@gather.register_fake
def _(table: Tensor, index: Tensor, weight: Tensor) -> Tensor:
    return table.new_empty(len(index), table.shape[1])


@dataclass(frozen=True)
class SampleCounts:
    """Of the initial scene: the fraction of rays that hit it, their steps, and samples a ray of all."""

    hits: float = 0.0
    steps: int = 0
    samples: float = 0.0


def count_samples(recipe: TextTo3dRecipe) -> SampleCounts:
    """Counted on small views of the initial scene, on the CPU; zero where no rays are sampled."""
    counts = SampleCounts()
    sample_torch = ray_sampling.sample_torch

    def counted(grid: Any, origins: Tensor, *args: Any) -> Samples:
        nonlocal counts
        samples = sample_torch(grid, origins, *args)
        assert samples.dense is not None
        hits, steps = samples.dense[0].shape
        counts = SampleCounts(hits / len(origins), steps, len(samples.ray_indices) / len(origins))
        return samples

    generator = torch.Generator().manual_seed(0)
    counting = mock.patch.object(ray_sampling, "sample_torch", counted)
    with torch.random.fork_rng(devices=[]), torch.no_grad(), counting:
        scene = recipe.scene.build("cpu")
        scene.update(0, generator)
        cameras = sample_cameras(recipe.text_to_3d.camera, 8, PIXELS, generator)
        scene.render(cameras, torch.zeros(8, 3))
    return counts


@contextmanager
def expected_samples(recipe: TextTo3dRecipe, recorder: MetaRecorder) -> Iterator[None]:
    """Inside the block rays on the meta device have as many samples as those of the initial scene."""
    counts, sample_torch = count_samples(recipe), ray_sampling.sample_torch

    def expected(grid: Any, origins: Tensor, *args: Any) -> Samples:
        rays = len(origins)
        with recorder.answering([round(counts.hits * rays), round(counts.samples * rays)], counts.steps):
            return sample_torch(grid, origins, *args)

    sampling = mock.patch.object(ray_sampling, "sample_torch", expected)
    with sampling, mock.patch.object(encoding, "_gather", gather):
        yield


def blank_reference(recipe: TextTo3dRecipe, teacher: Teacher) -> ReferenceView:
    """A picture of nothing: the work is that of any, without CLIP's, the estimate of the elevation and the
    alignment. It has a caption where a prompt is given (`with_caption`).
    """
    side = teacher.resolution
    cut_out = CutOut(np.zeros((side, side, 3)), np.ones((side, side)), "plan")
    has_caption = recipe.caption.enabled and bool(recipe.text_to_3d.prompt)
    reference = ReferenceView(teacher, None, cut_out, 0.0, recipe.image_to_3d, has_caption=has_caption)
    reference.active = True
    return reference


def text_to_3d_subject(recipe: TextTo3dRecipe) -> Subject:
    """The stages' updates, resampling rounds, orientation checks and previews of a run.

    Rays are taken to have as many samples as in the initial scene, in which they are counted.
    """

    def prepare(run: Run, teacher: Teacher) -> Trial:
        control = None if recipe.control is None else MeshControl(require_latent(teacher), recipe.control)
        reference = None if recipe.image is None else blank_reference(recipe, teacher)
        args = recipe.scene, recipe.objective, recipe.text_to_3d, control, reference
        trainer = TextTo3d(run, teacher, *args)
        jobs: list[Job] = []  # rounds first: updates of refinement need their views
        for stage in trainer.stages.values():
            if isinstance(stage, SDEditRefinementStage):
                jobs += _cheapest("resampling round", stage, stage.rounds)
            if isinstance(stage, OrientationStage):
                draws = {step: check.draws for step, check in stage.checks.items()}
                jobs += _cheapest("orientation check", stage, draws)
        jobs += [
            Job(name.replace("_", " "), count, partial(trainer.update, step))
            for name, steps in trainer.updates.items()
            for step, count in groups(steps, _work(trainer, name))
        ]
        jobs.append(Job("preview", recipe.run.steps // recipe.run.preview_every, trainer.preview))
        warm_up = partial(trainer.update, min(1, recipe.run.steps - 1))
        return Trial(teacher_modules(teacher), warm_up, jobs)

    return Subject(recipe.teacher, recipe.run, prepare, partial(expected_samples, recipe))


def _cheapest(name: str, stage: Stage, work: Mapping[int, float]) -> list[Job]:
    """The cheapest of a stage's interventions, by step, as often as all together are worth."""
    if not work:
        return []
    step = min(work, key=lambda step: work[step])
    return [Job(name, sum(work.values()) / work[step], partial(stage.before_step, step))]


def _work(trainer: TextTo3d, name: str) -> Callable[[int], Hashable]:
    """What distinguishes the work of a stage's steps."""
    stage, steps = trainer.stages[name], trainer.updates[name]
    scene = trainer.scene.options
    every = scene.grid.every if isinstance(scene, NerfOptions) else 1

    def key(step: int) -> Hashable:
        grid = step % every == 0
        if not isinstance(stage, ScoreDistillationStage):
            return grid
        progress = (step - steps.start) / len(steps)
        coarse = progress < stage.options.coarse_until
        # the kind of light is drawn at random, and changes with the progress
        quarter = 0 if stage.options.shading is None else int(4 * progress)
        return grid, coarse, quarter, trainer.context.objective.cost(progress)

    return key
