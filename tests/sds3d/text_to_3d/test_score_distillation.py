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
from distill.objectives.options import CriticOptions, ObjectiveOptions, Term
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from sds3d.scene.cameras import orbit
from sds3d.scene.nerf import BackgroundOptions, NeRF, NerfOptions
from sds3d.scene.shading import ShadingOptions
from sds3d.text_to_3d.context import check_view_words, grey_backgrounds, prompt_conditionings
from sds3d.text_to_3d.stages.score_distillation import ScoreDistillationOptions, ScoreDistillationStage
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions

OBJECTIVES = ROOT / "configs" / "objective"


def stage(
    directory: Path,
    teacher: Teacher | None = None,
    objective: ObjectiveOptions = SDS,
    options: TextTo3dOptions = OPTIONS,
    distillation: ScoreDistillationOptions = DISTILLATION,
    scene: NerfOptions = SMALL,
    **run_choices: str | bool,
) -> ScoreDistillationStage:
    options = with_stages(options, score_distillation=distillation)
    run = Run(replace(run_options(directory, 4), **run_choices), {}, "t")
    task = TextTo3d(run, teacher or OneImageTeacher(disc()), scene, objective, options)
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


def test_prompts_of_views_that_a_teacher_cannot_read_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With what to do about it; a prompt that it cannot read is another mistake."""
    teacher = OneImageTeacher(disc())

    def check(self: Teacher, prompt: str) -> None:
        for word in ("view", "zebra"):
            if word in prompt:
                raise UserError(f"unknown word {word!r}")

    monkeypatch.setattr(OneImageTeacher, "check_prompt", check)
    with pytest.raises(UserError, match="unknown word 'view'; set text_to_3d.view_words=false"):
        check_view_words(teacher, "a red ball")
    with pytest.raises(UserError, match="unknown word 'zebra'$"):
        check_view_words(teacher, "a zebra")


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


def test_renders_have_their_own_resolution_and_the_teacher_its(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: LatentDiffusionTeacher
) -> None:
    """As of ProlificDreamer: small at first, then large, enlarged for the teacher of 64 pixels."""
    options = ScoreDistillationOptions(coarse_resolution=16, coarse_until=0.5, resolution=24)
    objective = replace(SDS, image=1.0)
    task = stage(tmp_path, tiny_teacher, objective, replace(OPTIONS, prompt="a red cube"), options)
    encoded: list[Tensor] = []
    encode = tiny_teacher.encode_images
    monkeypatch.setattr(
        tiny_teacher, "encode_images", lambda images: encoded.append(images) or encode(images)
    )
    for progress, side in ((0.0, 16), (0.6, 24)):
        _, views = task.sds_step(0, progress)
        assert views.rgb.shape[-1] == side and encoded[-1].shape[-1] == 64
        expected = torch.nn.functional.interpolate(views.rgb, (64, 64), mode="bilinear")
        torch.testing.assert_close(encoded[-1], expected)
    assert task.render(0.6, coarse=False)[1].resolution == 24


def test_linear_pixels_do_without_the_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: LatentDiffusionTeacher
) -> None:
    distillation = ScoreDistillationOptions(coarse_until=0.0, pixel_decoder="linear")
    objective = replace(SDS, image=1.0)
    options = replace(OPTIONS, prompt="a red cube")
    task = stage(tmp_path, tiny_teacher, objective, options, distillation)
    monkeypatch.setattr(tiny_teacher, "decode", lambda latents: pytest.fail("the VAE's decoder is used"))
    task.sds_step(0, 0.5)
    albedo = task.context.scene.field.mlp[-1].weight.grad[1:]  # type: ignore[union-attr]
    assert albedo.abs().max() > 0

    # Where the prediction is the latents themselves, nothing changes, however poor the decoder is.
    images = torch.rand(2, 3, 64, 64, requires_grad=True)
    latents = tiny_teacher.encode_images(images)
    pixels = task.pixels(images, latents)
    assert task.linear_decoder is not None
    torch.testing.assert_close(pixels, task.linear_decoder(latents.detach()))
    (slope,) = torch.autograd.grad(pixels[0, 0, 0, 0], images)
    torch.testing.assert_close(slope[0, 0, :8, :8], torch.full((8, 8), 1 / 64))
    assert slope.abs().sum() == pytest.approx(1)
    assert stage(tmp_path / "plain", tiny_teacher, SDS, options, distillation).linear_decoder is None


@pytest.mark.parametrize("replacement", [0.0, 0.5, 1.0])
def test_learned_background_is_trained_where_it_is_seen(tmp_path: Path, replacement: float) -> None:
    """The disc stands on a grey of 0.5: the background learns it, and greys replace it as often as asked."""
    scene = replace(SMALL, background=BackgroundOptions("mlp", (0.9, 0.9, 0.9)))
    options = replace(OPTIONS, background_replacement=replacement, mlp_learning_rate=0.02)
    task = stage(tmp_path, None, SDS, options, scene=scene)
    nerf = task.context.scene
    assert isinstance(nerf, NeRF)
    learned = [task.context.training_backgrounds(2) is None for _ in range(60)]
    assert sum(learned) / 60 == pytest.approx(1 - replacement, abs=0.15)
    before = nerf.background(torch.eye(3)).detach()
    for step in range(12):
        task.sds_step(step, 0.5)
    change = nerf.background(torch.eye(3)).detach() - before
    if replacement == 1:
        assert not change.any()
    else:
        assert change.mean() < -0.02


def test_shading_is_by_schedule(tmp_path: Path) -> None:
    shading = ShadingOptions(begin=0.5, probability=1.0, textureless=1.0)
    task = stage(tmp_path, distillation=replace(DISTILLATION, coarse_until=0.0, shading=shading))
    nerf = task.context.scene
    assert isinstance(nerf, NeRF)
    task.sds_step(0, 0.4)
    last = nerf.field.mlp[-1].weight
    assert last.grad is not None and last.grad[1:].abs().max() > 0
    task.sds_step(1, 0.6)  # white surfaces: the albedo is not seen
    assert last.grad is not None and last.grad[1:].abs().max() == 0 and last.grad[0].abs().max() > 0


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_trains_float32_weights(
    tmp_path: Path, tiny_teacher_folder: Path, precision: str
) -> None:
    dtype = getattr(torch, precision)
    teacher = load_latent_diffusion(str(tiny_teacher_folder), dtype=dtype)
    critic = CriticOptions(rank=2, camera=True)
    objective = ObjectiveOptions(
        (Term("teacher", guidance=7.5), Term("critic", -1.0, prompt="critic")), critic=critic
    )
    options = replace(OPTIONS, prompt="a red cube")
    task = stage(tmp_path, teacher, objective, options, precision=precision)
    scene, state = task.context.scene, task.context.optimizer.state
    before = [parameter.detach().clone() for parameter in scene.parameters()]
    for step in range(4 if precision == "bfloat16" else 16):  # loss scaling starts high, and skips updates
        output, views = task.sds_step(step, 0.5)
        assert views.rgb.dtype == output.gradient.dtype == torch.float32 and output.loss.isfinite()
    assert (task.context.run.scaler is not None) == (precision == "float16")
    pairs = zip(before, scene.parameters(), strict=True)
    assert any(not torch.equal(a, b) for a, b in pairs)
    assert task.context.critic is not None
    trained = [*scene.parameters(), *task.context.critic.parameters()]
    assert all(parameter.dtype == torch.float32 for parameter in trained)
    assert all(value.dtype == torch.float32 for slots in state.values() for value in slots.values())


def test_checkpointing_changes_no_gradient(tmp_path: Path, tiny_teacher_folder: Path) -> None:
    tables = []
    for choice in (False, True):
        teacher = load_latent_diffusion(str(tiny_teacher_folder))
        torch.manual_seed(0)
        options = replace(OPTIONS, prompt="a red cube")
        task = stage(tmp_path / str(choice), teacher, SDS, options, gradient_checkpointing=choice)
        assert teacher.vae.encoder.gradient_checkpointing == choice and not teacher.vae.training
        task.sds_step(0, 0.9)
        tables.append([value.grad for value in task.context.scene.parameters()])
    for plain, recomputed in zip(*tables, strict=True):
        assert (plain is None) == (recomputed is None)
        assert plain is None or torch.equal(plain, recomputed)
