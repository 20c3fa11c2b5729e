"""The score distillation stage: prompts of views, the warm-up, gradients by target, every objective."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from command_line import ROOT
from scene_fixtures import DISTILLATION, OPTIONS, SDS, SMALL, OneImageTeacher, disc, run_options, with_stages
from torch import Tensor

from distill.core.teacher import Teacher
from distill.objectives.algebra import DistillationOutput, ScoreDistillation
from distill.objectives.options import ObjectiveOptions, Term
from distill.runtime.config import build
from distill.runtime.run import Run
from distill.teacher.latent import LatentDiffusionTeacher
from sds3d.scene.cameras import orbit
from sds3d.text_to_3d.context import grey_backgrounds, prompt_conditionings
from sds3d.text_to_3d.stages.score_distillation import ScoreDistillationOptions, ScoreDistillationStage
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions

OBJECTIVES = ROOT / "configs" / "objective"


def stage(
    directory: Path,
    teacher: Teacher | None = None,
    objective: ObjectiveOptions = SDS,
    options: TextTo3dOptions = OPTIONS,
    distillation: ScoreDistillationOptions = DISTILLATION,
) -> ScoreDistillationStage:
    options = with_stages(options, score_distillation=distillation)
    run = Run(run_options(directory, 4), {}, "t")
    task = TextTo3d(run, teacher or OneImageTeacher(disc()), SMALL, objective, options)
    return task.stages["score_distillation"]  # type: ignore[return-value]  # the stage of those options


def test_each_camera_gets_the_prompt_of_its_view() -> None:
    teacher = OneImageTeacher(disc())
    angles = torch.tensor([0.0, 90.0, 180.0, 0.0]), torch.tensor([10.0, 10.0, 10.0, 75.0])
    cameras = orbit(*angles, torch.full((4,), 3.0), torch.full((4,), 35.0), 8)
    guided = ObjectiveOptions((Term("teacher", guidance=7.5),))
    conditionings = prompt_conditionings(teacher, OPTIONS, guided, cameras).by_name
    expected = [f"a red ball, {view} view" for view in ("front", "side", "back", "overhead")] + [""]
    assert sorted(teacher.prompts) == sorted(expected)
    assert set(conditionings) == {"conditional", "unconditional"} and len(conditionings["conditional"]) == 4
    prompt_conditionings(teacher, replace(OPTIONS, view_words=False), SDS, cameras)
    assert teacher.prompts[5:] == ["a red ball"] * 4


def test_perp_neg_has_the_prompts_of_two_other_views() -> None:
    teacher = OneImageTeacher(disc())
    angles = torch.tensor([0.0, 180.0]), torch.tensor([10.0, 10.0])
    cameras = orbit(*angles, torch.full((2,), 3.0), torch.full((2,), 35.0), 8)
    perp_neg = ObjectiveOptions((Term("teacher", guidance=7.5, perp_neg=0.5),))
    conditionings = prompt_conditionings(teacher, OPTIONS, perp_neg, cameras).by_name
    views = ["front", "back", "side", "front", "back", "side"]
    assert sorted(teacher.prompts) == sorted([f"a red ball, {view} view" for view in views] + [""])
    assert {"perp_neg_0", "perp_neg_1"} < set(conditionings)


def test_backgrounds_are_grey_and_within_the_range() -> None:
    greys = grey_backgrounds((0.4, 0.9), 500, torch.Generator().manual_seed(0))
    assert torch.equal(greys[:, 0], greys[:, 2])
    assert 0.4 <= greys.min() < 0.42 and 0.88 < greys.max() <= 0.9


def test_linear_warm_up_does_without_the_encoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: LatentDiffusionTeacher
) -> None:
    linear = ScoreDistillationOptions(coarse_resolution=16, coarse_latents="linear")
    task = stage(tmp_path, tiny_teacher, SDS, replace(OPTIONS, prompt="a red cube"), linear)
    encoded: list[int] = []
    encode = tiny_teacher.encode_images
    monkeypatch.setattr(
        tiny_teacher, "encode_images", lambda images: encoded.append(images.shape[-1]) or encode(images)
    )
    task.sds_step(0, 0.0)
    assert encoded == []
    encoding = task.context.scene.field.encoding
    assert max(float(parameter.grad.abs().max()) for parameter in encoding.parameters()) > 0
    task.sds_step(1, 0.9)
    assert encoded == [64]


def test_coarse_renders_are_upsampled_for_the_encoder(tmp_path: Path) -> None:
    images = torch.rand(2, 3, 8, 8)
    assert stage(tmp_path).encode(images, coarse=True).shape[-1] == OneImageTeacher.resolution


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in OBJECTIVES.glob("*.yaml") if path.stem != "dds")
)
def test_every_objective_updates_a_scene(
    name: str, tmp_path: Path, tiny_teacher: LatentDiffusionTeacher
) -> None:
    """A coarse step and one at full resolution make the stated number of calls."""
    values = yaml.safe_load((OBJECTIVES / f"{name}.yaml").read_text())
    objective = build(ObjectiveOptions, values, "objective")
    task = stage(tmp_path, tiny_teacher, objective, replace(OPTIONS, prompt="a red cube"))
    scene = task.context.scene
    before = {key: value.clone() for key, value in scene.state_dict().items()}
    for step, progress in ((0, 0.0), (3, 0.75)):
        output, _ = task.sds_step(step, progress)
        assert output.gradient.isfinite().all()
    # not after the first step: a critic then equals the teacher, and the gradient of Diff-Instruct is 0
    assert float(output.gradient.abs().max()) > 0
    assert any(not torch.equal(value, before[key]) for key, value in scene.state_dict().items())
    noise = objective.noise
    inversion = noise.steps + noise.has_gap if noise.kind == "inversion" else 0
    assert task.objective.model.calls == 2 * (1 + inversion)
    critic_calls = 2 * (objective.critic is not None)
    assert task.objective.critic is None or task.objective.critic.calls == critic_calls


@pytest.mark.parametrize("target", ["albedo", "scene"])
def test_pixel_loss_updates_albedo_and_latents_density(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After the warm-up the objective gets two gradient paths; otherwise the render itself."""
    calls = []
    call = ScoreDistillation.__call__

    def record(
        self: ScoreDistillation, latents: Tensor, *arguments: object, images: Tensor | None = None
    ) -> DistillationOutput:
        calls.append((latents, images))
        return call(self, latents, *arguments, images=images)

    monkeypatch.setattr(ScoreDistillation, "__call__", record)
    for name, objective in (("with", replace(SDS, image=1.0)), ("without", SDS)):
        distillation = replace(DISTILLATION, pixel_loss_target=target)
        task = stage(tmp_path / name, None, objective, OPTIONS, distillation)
        for step, progress in ((0, 0.0), (3, 0.75)):
            _, views = task.sds_step(step, progress)
        assert calls[0][1] is None
        latents, images = calls[1]
        torch.testing.assert_close(latents, views.rgb)
        torch.testing.assert_close(images, views.rgb)
        assert (latents is views.rgb) == (images is views.rgb) == (name == "without" or target == "scene")
        calls.clear()


def test_learning_rates_decay_as_a_cosine(tmp_path: Path) -> None:
    task = stage(tmp_path, distillation=replace(DISTILLATION, final_lr_scale=0.2))
    rates = []
    for progress in (0.0, 0.5, 1.0):
        task.sds_step(1, progress)
        rates.append([group["lr"] for group in task.context.optimizer.param_groups])
    assert rates == [pytest.approx([scale * 0.01, scale * 0.002]) for scale in (1.0, 0.6, 0.2)]
