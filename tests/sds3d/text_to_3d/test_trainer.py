"""The optimisation: what drives it, and that it resumes to the same scene."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
import yaml
from command_line import ROOT
from torch import Tensor

from distill.core.noise import NoiseSchedule
from distill.core.score import Prediction, ScoreModel
from distill.objectives.algebra import DistillationOutput, ScoreDistillation
from distill.objectives.options import ObjectiveOptions, Term
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import Teacher
from sds3d.scene.cameras import CameraOptions, orbit
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import FieldOptions
from sds3d.scene.nerf import GridOptions, SceneOptions
from sds3d.scene.regularizers import RegularizerOptions
from sds3d.scene.renderer import RenderOptions
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions, check_inputs, conditions_for, grey_backgrounds

OBJECTIVES = ROOT / "configs" / "objective"
SDS = ObjectiveOptions((Term("teacher"), Term("noise", -1.0)))
SMALL = SceneOptions(
    FieldOptions(
        HashEncodingOptions(n_levels=2, n_features_per_level=2, log2_hashmap_size=12, base_resolution=8),
        hidden_width=16,
    ),
    GridOptions(resolution=16, every=4),
    RenderOptions(samples=24),
)
OPTIONS = TextTo3dOptions(
    "a red ball",
    views=2,
    camera=CameraOptions(resolution=16),
    coarse_resolution=8,
    coarse_until=0.3,
    background=(0.5, 0.5),
)


class OneImage(ScoreModel):
    """A teacher in pixel space that knows one image: x0 is normal about it with a small spread; its texts are what was asked."""

    resolution = 16

    def __init__(self, image: Tensor) -> None:
        self.schedule = NoiseSchedule(torch.linspace(0.999, 0.01, 1000))
        self.image, self.asked = image, []

    def encode_text(self, prompts: list[str]) -> Tensor:
        self.asked += prompts
        return torch.zeros(len(prompts), 1, 1)

    def encode_images(self, images: Tensor) -> Tensor:
        return images

    def decode(self, latents: Tensor) -> Tensor:
        return latents

    def predict(self, x_t: Tensor, t: Tensor, condition: Tensor) -> Prediction:
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        eps = sigma * (x_t - alpha * self.image) / (alpha**2 * 0.05**2 + sigma**2)
        return Prediction.of(eps, x_t, t, self.schedule, "epsilon")


@dataclass
class Words:
    words: frozenset[str]


def disc() -> Tensor:
    """A red disc on grey, as every camera sees a ball."""
    steps = (torch.arange(16) + 0.5) / 8 - 1
    inside = (steps[None] ** 2 + steps[:, None] ** 2 < 0.5**2).float()
    red = torch.tensor([0.9, 0.1, 0.1])[:, None, None]
    return red * inside + 0.5 * (1 - inside)


def options(directory: object, steps: int) -> RunOptions:
    return RunOptions(
        str(directory), steps, checkpoint_every=3, preview_every=1000, trackers=(), device="cpu"
    )


def test_scene_becomes_what_the_teacher_knows(tmp_path):
    task = TextTo3d(Run(options(tmp_path, 120), {}, "t"), OneImage(disc()), SMALL, SDS, OPTIONS)
    scene = task.train()
    views = scene.render(
        orbit(*(torch.tensor(v) for v in ([0.0, 120.0], [0.0, 30.0], [3.0, 3.0], [35.0, 35.0])), 16),
        torch.full((2, 3), 0.5),
    )
    assert (views.rgb - disc()).abs().mean() < 0.08  # a constant grey is .14 off
    centre = views.rgb[:, :, 7:9, 7:9].mean((0, 2, 3))
    assert centre[0] > 0.6 and centre[1:].max() < 0.35


def test_a_broken_run_resumes_to_the_same_scene(tmp_path, monkeypatch):
    def task(name: str) -> TextTo3d:
        return TextTo3d(Run(options(tmp_path / name, 6), {}, "t"), OneImage(disc()), SMALL, SDS, OPTIONS)

    whole = task("whole").train()
    broken = task("broken")
    step = TextTo3d.step

    def breaks(self: TextTo3d, progress: float, number: int) -> object:
        if number == 4:
            raise RuntimeError("power cut")
        return step(self, progress, number)

    monkeypatch.setattr(TextTo3d, "step", breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        broken.train()
    monkeypatch.setattr(TextTo3d, "step", step)
    again = task("broken").train()
    for name, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_each_camera_asks_for_its_view():
    teacher = OneImage(disc())
    angles = torch.tensor([0.0, 90.0, 180.0, 0.0]), torch.tensor([10.0, 10.0, 10.0, 75.0])
    cameras = orbit(*angles, torch.full((4,), 3.0), torch.full((4,), 35.0), 8)
    guided = ObjectiveOptions((Term("teacher", guidance=7.5),))
    conditions = conditions_for(teacher, OPTIONS, guided, cameras)
    assert sorted(teacher.asked) == sorted(
        [f"a red ball, {view} view" for view in ("front", "side", "back", "overhead")] + [""]
    )
    assert (
        set(conditions.states) == {"conditional", "unconditional"}
        and len(conditions.states["conditional"]) == 4
    )
    conditions_for(teacher, replace(OPTIONS, view_words=False), SDS, cameras)
    assert teacher.asked[5:] == ["a red ball"] * 4


def test_perp_neg_asks_for_two_other_views() -> None:
    teacher = OneImage(disc())
    cameras = orbit(
        torch.tensor([0.0, 180.0]),
        torch.tensor([10.0, 10.0]),
        torch.full((2,), 3.0),
        torch.full((2,), 35.0),
        8,
    )
    conditions = conditions_for(
        teacher, OPTIONS, ObjectiveOptions((Term("teacher", guidance=7.5, perp_neg=0.5),)), cameras
    )
    views = [["front", "back"], ["side", "front"], ["back", "side"]]
    assert sorted(teacher.asked) == sorted(
        [f"a red ball, {view} view" for both in views for view in both] + [""]
    )
    assert {"other_view_0", "other_view_1"} < set(conditions.states)


def test_backgrounds_are_grey_and_within_the_range():
    greys = grey_backgrounds(replace(OPTIONS, background=(0.4, 0.9)), 500, torch.Generator().manual_seed(0))
    assert torch.equal(greys[:, 0], greys[:, 2])
    assert 0.4 <= greys.min() < 0.42 and 0.88 < greys.max() <= 0.9


@pytest.mark.parametrize(
    "name",
    ["opacity", "entropy", "orientation", "depth_variance", "sparsity", "smooth_density", "smooth_albedo"],
)
def test_every_regulariser_reaches_the_scene(tmp_path, name):
    weights = RegularizerOptions(**{name: 1.0}, entropy_from=0.0, samples=256)
    no_pull = ObjectiveOptions((Term("noise", 0.0),))
    task = TextTo3d(
        Run(options(tmp_path, 2), {}, "t"),
        OneImage(disc()),
        SMALL,
        no_pull,
        replace(OPTIONS, regularizers=weights),
    )
    with torch.no_grad():  # a scene that is not uniform, so that smoothness has something to say
        for parameter in task.scene.field.encoding.parameters():
            parameter.normal_(generator=torch.Generator().manual_seed(0))
    before = [p.detach().clone() for p in task.scene.field.parameters()]
    task.step(0.5, 0)
    assert any(not torch.equal(a, b) for a, b in zip(before, task.scene.field.parameters(), strict=True))


def test_mistakes_are_told():
    with pytest.raises(UserError, match="'blob'"):
        check_inputs(Words(frozenset({"a", "red"})), replace(OPTIONS, prompt="a red blob"))
    with pytest.raises(UserError, match="empty"):
        check_inputs(Words(frozenset()), replace(OPTIONS, prompt=" "))
    with pytest.raises(UserError, match="views is 0"):
        replace(OPTIONS, views=0)
    with pytest.raises(UserError, match="background"):
        replace(OPTIONS, background=(0.9, 0.1))


def test_a_linear_warm_up_leaves_the_encoder_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_teacher: Teacher
) -> None:
    options = replace(OPTIONS, prompt="a red cube", coarse_resolution=16, coarse_latents="linear")
    run = Run(RunOptions(str(tmp_path), 2, trackers=()), {}, "warm-up")
    task = TextTo3d(run, tiny_teacher, SMALL, SDS, options)
    encoded: list[int] = []
    plain = tiny_teacher.encode_images
    monkeypatch.setattr(
        tiny_teacher, "encode_images", lambda images: encoded.append(images.shape[-1]) or plain(images)
    )
    task.step(0.0, 0)
    assert encoded == []
    assert max(float(parameter.grad.abs().max()) for parameter in task.scene.field.encoding.parameters()) > 0
    task.step(0.9, 1)
    assert encoded == [64]


def test_coarse_renders_are_enlarged_for_the_encoder(tmp_path: Path) -> None:
    task = TextTo3d(
        Run(RunOptions(str(tmp_path), 1, trackers=()), {}, "x"), OneImage(disc()), SMALL, SDS, OPTIONS
    )
    images = torch.rand(2, 3, 8, 8)
    assert task.encode(images, coarse=True).shape[-1] == OneImage.resolution


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in OBJECTIVES.glob("*.yaml") if path.stem != "dds")
)
def test_every_objective_drives_a_scene(name: str, tmp_path: Path, tiny_teacher: Teacher) -> None:
    """Two steps, one coarse and one full; what is counted is what the loss says it costs, the critic's training apart."""
    objective = build(
        ObjectiveOptions, yaml.safe_load((OBJECTIVES / f"{name}.yaml").read_text()), "objective"
    )
    task = TextTo3d(
        Run(options(tmp_path, 4), {}, "t"),
        tiny_teacher,
        SMALL,
        objective,
        replace(OPTIONS, prompt="a red cube"),
    )
    before = {key: value.clone() for key, value in task.scene.state_dict().items()}
    for progress, step in ((0.0, 0), (0.75, 3)):
        outcome, _ = task.step(progress, step)
        assert outcome.gradient.isfinite().all()
    assert (
        float(outcome.gradient.abs().max()) > 0
    )  # at the first step a critic is the teacher, and Diff-Instruct's g is 0
    assert any(not torch.equal(value, before[key]) for key, value in task.scene.state_dict().items())
    critic = objective.critic is not None
    path = objective.noise.steps + objective.noise.has_gap if objective.noise.kind == "inversion" else 0
    assert task.objective.model.calls == 2 * (1 + path)
    assert task.objective.critic is None or task.objective.critic.calls == 2 * critic


@pytest.mark.parametrize("moves", ["albedo", "scene"])
def test_pixels_paint_and_latents_shape(moves: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the warm-up the objective meets the two halves of the render, in the warm-up and without a residual in pixels the whole."""
    met = []

    def look(
        self: ScoreDistillation, latents: Tensor, *given: object, images: Tensor | None = None
    ) -> DistillationOutput:
        met.append((latents, images))
        return call(self, latents, *given, images=images)

    call = ScoreDistillation.__call__
    monkeypatch.setattr(ScoreDistillation, "__call__", look)
    for name, objective in (("with", replace(SDS, image=1.0)), ("without", SDS)):
        task = TextTo3d(
            Run(options(tmp_path / name, 4), {}, "t"),
            OneImage(disc()),
            SMALL,
            objective,
            replace(OPTIONS, pixel_loss_target=moves),
        )
        for progress, step in ((0.0, 0), (0.75, 3)):
            _, views = task.step(progress, step)
        assert met[0][1] is None
        latents, images = met[1]
        torch.testing.assert_close(latents, views.rgb)
        torch.testing.assert_close(images, views.rgb)
        assert (latents is views.rgb) == (images is views.rgb) == (name == "without" or moves == "scene")
        met.clear()


def test_rates_fall_as_a_cosine(tmp_path: Path) -> None:
    task = TextTo3d(
        Run(options(tmp_path, 4), {}, "t"), OneImage(disc()), SMALL, SDS, replace(OPTIONS, final_rate=0.2)
    )
    told = []
    for progress in (0.0, 0.5, 1.0):
        task.step(progress, 1)
        told.append([group["lr"] for group in task.optimizer.param_groups])
    assert told == [pytest.approx([share * 0.01, share * 0.002]) for share in (1.0, 0.6, 0.2)]
