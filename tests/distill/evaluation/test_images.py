"""Images and scenes as subjects of an ablation: what is graded, with a teacher without CLIP too."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from command_line import ROOT, script

from distill.apps.optimise_image import OptimiseImageOptions
from distill.evaluation.ablation.images import preview_path, run_images
from distill.evaluation.ablation.plan import AblationOptions, Cell, plan, run_cells
from distill.evaluation.clip import load_clip_scorer
from distill.evaluation.graders import Graders
from distill.evaluation.judge import Judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.objectives.options import ObjectiveOptions
from distill.runtime.config import build
from distill.teacher.latent import LatentDiffusionTeacher
from sds3d.evaluation.ablation import run_scene
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import FieldOptions
from sds3d.scene.nerf import GridOptions, NerfOptions
from sds3d.text_to_3d.stages.score_distillation import ScoreDistillationOptions
from sds3d.text_to_3d.trainer import TextTo3dOptions

OBJECTIVES = ROOT / "configs" / "objective"


@pytest.fixture
def graders(tiny_teacher: LatentDiffusionTeacher) -> Graders:
    torch.manual_seed(0)
    labels = {"object": ("cube", "duck"), "colour": ("blue", "red"), "view": ("back", "front")}
    judge = Judge(labels, JudgeOptions(tuple(labels), (("view", "has_front"),), width=8)).eval()
    return Graders(judge, load_clip_scorer(tiny_teacher.name_or_path))


@pytest.mark.parametrize("subject", ["images", "scenes"])
def test_a_cell_leaves_its_row_and_picture(
    subject: str, graders: Graders, tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    field = FieldOptions(
        HashEncodingOptions(n_levels=2, n_features_per_level=2, log2_hashmap_size=10), hidden_width=16
    )
    scene = NerfOptions(field, GridOptions(resolution=16, every=4))
    stages = {"score_distillation": ScoreDistillationOptions(coarse_resolution=8)}
    options = TextTo3dOptions("", views=1, stages=stages)

    def bench(cell: Cell) -> dict[str, float]:
        if subject == "images":
            return run_images(cell, tiny_teacher, graders, OptimiseImageOptions("", particles=2, frames=1))
        return run_scene(cell, tiny_teacher, graders, scene, options, views=2)

    losses = {
        name: build(ObjectiveOptions, yaml.safe_load((OBJECTIVES / f"{name}.yaml").read_text()), name)
        for name in ("csd", "vsd")
    }
    cells = list(plan(AblationOptions(("a red duck",), seeds=(0,), budget=6), losses, tmp_path))
    rows = run_cells(cells, bench)
    assert [(row["loss"], row["steps"], row["nfe"]) for row in rows] == [("csd", 3, 6), ("vsd", 1, 6)]
    for cell in cells:
        assert (
            preview_path(cell).is_file()
            and json.loads((cell.directory / "row.json").read_text())["seed"] == 0
        )
    assert {"clip_score", "judge_object", "judge_colour", "saturation", "seconds"} <= set(rows[0])
    # a prompt about the world: a scene is graded against its true mesh
    assert ("f_score_2" in rows[0] and "janus_rate" in rows[0]) == (subject == "scenes")


@pytest.mark.parametrize("subject", ["images", "scenes"])
def test_the_script_grades_with_a_teacher_without_clip(
    subject: str, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    """Without a CLIP, as Stable Diffusion's folders, and without a judge: their figures are left out."""
    teacher = tmp_path / "teacher"
    shutil.copytree(tiny_teacher_folder, teacher, ignore=shutil.ignore_patterns("clip"))
    options = [
        f"subject={subject}",
        f"teacher={teacher}",
        "judge=null",
        "losses=[csd]",
        "ablation={prompts: [a red cube], seeds: [0], budget: 2}",
        f"output={tmp_path / 'out'}",
    ]
    script("ablate", *options)
    (row,) = json.loads((tmp_path / "out" / "rows.json").read_text())["rows"]
    assert row["saturation"] >= 0 and row["seconds"] > 0
    assert not any("clip" in name or "judge" in name for name in row)


def test_the_script_compares_losses_on_a_mixture(tmp_path: Path) -> None:
    options = [
        "subject=particles",
        "losses=[sds, csd]",
        "ablation.prompts=[c0]",
        "ablation.seeds=[0, 1]",
        "ablation.budget=8",
    ]
    table = script("ablate", *options, "particles.particles=8", f"output={tmp_path}")
    assert "| sds | own | 2 | 4 | 8 |" in table and "| csd | own | 2 | 4 | 8 |" in table
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "csd",
        "index.html",
        "rows.csv",
        "rows.json",
        "sds",
        "table.md",
    ]
    assert "expected one of csd, dds" in script("ablate", "losses=[nothing]", f"output={tmp_path}", code=2)
