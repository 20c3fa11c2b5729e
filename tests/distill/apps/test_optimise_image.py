"""The playground: particles go where the teacher points, every loss drives them, an edit keeps what it should."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

import pytest
import torch
import yaml
from command_line import ROOT
from PIL import Image

from distill.apps.optimise_image import OptimiseImage, OptimiseImageOptions, diversity, load_image, saturation
from distill.objectives.diagnostics import DiagnosticOptions
from distill.objectives.options import ObjectiveOptions, Term
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import Teacher

OBJECTIVES = ROOT / "configs" / "objective"
SDS = ObjectiveOptions((Term("teacher", guidance=3.0), Term("noise", -1.0)))
OPTIONS = OptimiseImageOptions("a red cube", particles=2)


def run(directory: Path, steps: int = 2) -> Run:
    return Run(RunOptions(str(directory), steps, checkpoint_every=1, trackers=()), {}, "playground")


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "red.png"
    Image.new("RGB", (64, 64), (200, 30, 30)).save(path)
    return str(path)


@pytest.mark.parametrize(
    "name", sorted(path.stem for path in OBJECTIVES.glob("*.yaml") if path.stem != "sds_perp_neg")
)
def test_every_loss_drives_the_particles(
    name: str, tmp_path: Path, tiny_teacher: Teacher, picture: str
) -> None:
    objective = build(
        ObjectiveOptions, yaml.safe_load((OBJECTIVES / f"{name}.yaml").read_text()), "objective"
    )
    task = OptimiseImage(
        run(tmp_path / "run"),
        tiny_teacher,
        objective,
        replace(OPTIONS, source=picture, source_prompt="a blue cube"),
    )
    before = task.parameter.detach().clone()
    images = task.train()
    assert images.shape == (2, 3, 64, 64) and len(task.frames) == 2
    moved = (task.parameter.detach() - before).abs().mean()
    assert 1e-3 < float(moved) <= 2 * OPTIONS.learning_rate * 1.5


@pytest.mark.parametrize("space", ["latent", "pixel"])
def test_a_source_is_where_it_starts(
    space: Literal["latent", "pixel"], tmp_path: Path, tiny_teacher: Teacher, picture: str
) -> None:
    options = replace(OPTIONS, space=space, start="source", source=picture)
    task = OptimiseImage(run(tmp_path / "run"), tiny_teacher, SDS, options)
    whole = load_image(picture, 64)
    latents = tiny_teacher.encode_images(whole).expand(
        2, -1, -1, -1
    )  # of one image: an untrained VAE magnifies a batch's rounding
    expected = whole.expand(2, -1, -1, -1) if space == "pixel" else tiny_teacher.decode(latents)
    torch.testing.assert_close(task.images(), expected, atol=1e-4, rtol=0)
    task.step(0.0)
    assert float((task.images() - expected).detach().abs().max()) > 1e-4


def test_resumes_to_the_same_images(
    tmp_path: Path, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = OptimiseImage(run(tmp_path / "whole", 3), tiny_teacher, SDS, OPTIONS).train()
    step = OptimiseImage.step
    count = iter(range(9))

    def breaks(self: OptimiseImage, progress: float) -> object:
        if next(count) == 2:
            raise RuntimeError("power cut")
        return step(self, progress)

    monkeypatch.setattr(OptimiseImage, "step", breaks)
    with pytest.raises(RuntimeError, match="power cut"):
        OptimiseImage(run(tmp_path / "broken", 3), tiny_teacher, SDS, OPTIONS).train()
    assert torch.equal(OptimiseImage(run(tmp_path / "broken", 3), tiny_teacher, SDS, OPTIONS).train(), whole)


def test_figures_by_hand() -> None:
    images = torch.stack([torch.tensor([1.0, 0.5, 0.0]), torch.tensor([0.5, 0.5, 0.5])])[
        :, :, None, None
    ].expand(2, 3, 4, 4)
    assert saturation(images).tolist() == [1.0, 0.0]
    assert diversity(images) == pytest.approx((0.5 / 3) ** 0.5, rel=1e-5)  # differences .5, 0, .5
    assert diversity(images[:1]) == 0


def test_transparent_images_lie_on_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert load_image(str(tmp_path / "clear.png"), 4).min() == 1


def test_mistakes(tmp_path: Path, tiny_teacher: Teacher, picture: str) -> None:
    dds = build(ObjectiveOptions, yaml.safe_load((OBJECTIVES / "dds.yaml").read_text()), "objective")
    with pytest.raises(UserError, match="give source=picture.png and source_prompt"):
        OptimiseImage(run(tmp_path / "a"), tiny_teacher, dds, replace(OPTIONS, source=picture))
    with pytest.raises(UserError, match="does not know the word"):
        OptimiseImage(run(tmp_path / "b"), tiny_teacher, SDS, replace(OPTIONS, prompt="a zebra"))
    (tmp_path / "no.png").write_text("no picture")
    with pytest.raises(UserError, match="cannot be read as an image"):
        load_image(str(tmp_path / "no.png"), 8)
    with pytest.raises(UserError, match="needs an image"):
        replace(OPTIONS, start="source")


def test_a_look_on_the_way_changes_nothing(tmp_path: Path, tiny_teacher: Teacher) -> None:
    plain = OptimiseImage(run(tmp_path / "plain"), tiny_teacher, SDS, OPTIONS).train()
    looking = replace(OPTIONS, diagnostics=DiagnosticOptions(every=2, levels=3, draws=2))
    assert torch.equal(OptimiseImage(run(tmp_path / "seen"), tiny_teacher, SDS, looking).train(), plain)
    names = ["step_00000002.json", "step_00000002.png", "x0_00000002.png"]
    assert sorted(path.name for path in (tmp_path / "seen" / "diagnostics").iterdir()) == names
