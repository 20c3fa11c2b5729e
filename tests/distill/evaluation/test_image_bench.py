"""Images and scenes as subjects of the bench: what is graded, and that a cell leaves its row and picture."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from command_line import ROOT, script

from distill.apps.optimise_image import OptimiseImageOptions
from distill.evaluation.ablation.images import Graders, grade, picture, run_images, wanted
from distill.evaluation.ablation.plan import AblationOptions, plan, run_cells
from distill.evaluation.judge import Judge, JudgeOptions
from distill.objectives.options import ObjectiveOptions
from distill.runtime.config import build
from distill.teacher.folder import load_clip
from distill.teacher.latent import Teacher
from sds3d.evaluation.ablation import run_scene
from sds3d.scene.cameras import CameraOptions
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import FieldOptions
from sds3d.scene.nerf import GridOptions, SceneOptions
from sds3d.text_to_3d.trainer import TextTo3dOptions

OBJECTIVES = ROOT / "configs" / "objective"


@pytest.fixture
def graders(tiny_teacher: Teacher) -> Graders:
    torch.manual_seed(0)
    labels = {"object": ("cube", "duck"), "colour": ("blue", "red"), "view": ("back", "front")}
    return Graders(load_clip(tiny_teacher.place), Judge(labels, JudgeOptions(width=8)).eval())


def test_prompts_tell_what_the_judge_looks_for(graders: Graders) -> None:
    assert wanted("a red duck, back view", graders.judge) == {
        "object": "duck",
        "colour": "red",
        "view": "back",
    }
    assert wanted("a teapot", graders.judge) == {}


def test_grades_are_shares_of_what_was_asked(
    graders: Graders, tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = {"object": ["duck", "duck", "cube"], "colour": ["red", "blue", "blue"]}
    monkeypatch.setattr("distill.evaluation.ablation.images.predict", lambda judge, images: told)
    found = grade(torch.rand(3, 3, 64, 64), ["a red duck", "a red duck", "a duck"], tiny_teacher, graders)
    assert (
        found["judge_object"] == pytest.approx(2 / 3) and found["judge_colour"] == 0.5
    )  # the third names no colour
    assert -1 <= found["clip_score"] <= 1 and 0 <= found["saturation"] <= 1


@pytest.mark.parametrize("subject", ["images", "scenes"])
def test_a_cell_leaves_its_row_and_picture(
    subject: str, graders: Graders, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    field = FieldOptions(
        HashEncodingOptions(n_levels=2, n_features_per_level=2, log2_hashmap_size=10), hidden_width=16
    )
    scene = SceneOptions(field, GridOptions(resolution=16, every=4))
    made = TextTo3dOptions("", views=1, camera=CameraOptions(resolution=16), coarse_resolution=8)

    def bench(cell: Any) -> dict[str, float]:
        if subject == "images":
            return run_images(cell, tiny_teacher, graders, OptimiseImageOptions("", particles=2, frames=1))
        return run_scene(cell, tiny_teacher, graders, scene, made, views=2)

    losses = {
        name: build(ObjectiveOptions, yaml.safe_load((OBJECTIVES / f"{name}.yaml").read_text()), name)
        for name in ("csd", "vsd")
    }
    cells = list(plan(AblationOptions(("a red duck",), seeds=(0,), budget=6), losses, tmp_path))
    rows = run_cells(cells, bench)
    assert [(row["loss"], row["steps"], row["forwards"]) for row in rows] == [("csd", 3, 6), ("vsd", 1, 6)]
    for cell in cells:
        assert picture(cell).is_file() and json.loads((cell.directory / "row.json").read_text())["seed"] == 0
    assert {"clip_score", "judge_object", "judge_colour", "saturation", "seconds"} <= set(rows[0])
    assert ("f_score_2" in rows[0] and "janus" in rows[0]) == (
        subject == "scenes"
    )  # of the world, so graded against its mesh


def test_the_script_compares_losses_on_the_oracle(tmp_path: Path) -> None:
    given = [
        "subject=particles",
        "losses=[sds, csd]",
        "ablation.prompts=[c0]",
        "ablation.seeds=[0, 1]",
        "ablation.budget=8",
    ]
    told = script("ablate", *given, "particles.particles=8", f"output={tmp_path}")
    assert "| sds | own | 2 | 4 | 8 |" in told and "| csd | own | 2 | 4 | 8 |" in told
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "csd",
        "index.html",
        "rows.csv",
        "rows.json",
        "sds",
        "table.md",
    ]
    assert "none of csd, dds" in script("ablate", "losses=[nothing]", f"output={tmp_path}", code=2)
