"""The benchmark: Janus rate and confusion by hand, ranking of meshes, rows by seed, pages, pairs of runs."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import trimesh
from command_line import script

from distill.evaluation.graders import Graders
from distill.runtime.errors import UserError
from sds3d.evaluation.benchmark import (
    ViewPredictions,
    averages,
    confusion,
    grade_mesh,
    grade_views,
    janus_rate,
    paired,
    r_precision,
    run_suite,
)
from sds3d.evaluation.page import means_by_group, save_page
from sds3d.evaluation.subjects import Subject, Suite, truth_of
from sds3d.text_to_3d.prompts import view_of
from sds3d.world.shapes import COLOURS, OBJECTS


def test_janus_rate_and_confusion_by_hand() -> None:
    azimuth = [0.0, 90.0, 170.0, 180.0, 190.0, 270.0]
    predictions = ViewPredictions({"view": ["front", "side", "front", "back", "front", "side"]}, azimuth)
    assert janus_rate(predictions) == pytest.approx(2 / 3)
    table = confusion(predictions)
    assert table["back"] == {"front": 2, "side": 0, "back": 1, "overhead": 0} and table["side"]["side"] == 2


def coloured(mesh: trimesh.Trimesh, colour: tuple[float, float, float]) -> trimesh.Trimesh:
    copied = mesh.copy()
    copied.visual = trimesh.visual.ColorVisuals(
        copied, vertex_colors=np.round(255 * np.array([*colour, 1.0])).astype(np.uint8)
    )
    return copied


def test_grades_rank_meshes() -> None:
    shape, albedo = truth_of("a red torus")
    true = coloured(shape.mesh, COLOURS["red"])
    rotated = true.copy()
    rotated.apply_transform(trimesh.transformations.rotation_matrix(1.0, [0, 0, 1]))
    rotated.apply_scale(0.8)
    ball = coloured(trimesh.creation.icosphere(3, 0.7), COLOURS["red"])
    grades = [grade_mesh(mesh, shape, albedo, 2000) for mesh in (true, rotated, ball)]
    assert min(grade["f_score_5"] for grade in grades[:2]) > 0.99
    assert min(grade["silhouette_iou"] for grade in grades[:2]) > 0.95
    assert grades[2]["f_score_5"] < 0.9 and grades[2]["volume_iou"] < 0.7
    assert grades[2]["silhouette_iou"] < 0.9
    assert grades[0]["manifold"] == grades[0]["watertight"] == 1
    assert grades[0]["components"] == 1 and grades[0]["colour_error"] < 0.01


def test_r_precision_by_hand() -> None:
    """With one-hot features of each caption: two of three images have that of the prompt."""
    captions: list[str] = []

    def text_features(texts: list[str]) -> torch.Tensor:
        captions[:] = texts
        return torch.eye(len(texts))

    def image_features(images: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(OBJECTS) * len(COLOURS))[images[:, 0, 0, 0].long()]

    index = list(OBJECTS).index("duck") * len(COLOURS) + list(COLOURS).index("green")
    images = torch.tensor([index, index, 0.0])[:, None, None, None].expand(3, 3, 2, 2)
    clip = SimpleNamespace(text_features=text_features, image_features=image_features)
    assert r_precision(images, "a green duck", clip) == pytest.approx(2 / 3)  # type: ignore[arg-type]
    assert captions[index] == "a green duck"


def test_without_graders_their_figures_are_missing() -> None:
    for name in ("a red teapot", "picture of a red teapot", "picture of assembly 1000000"):
        figures, predictions = grade_views(torch.rand(24, 3, 8, 8), Subject(name), Graders())
        assert set(figures) == {"saturation"} and predictions is None


def test_azimuths_count_from_the_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """A judge that is right about the object's true azimuths finds no Janus in either frame."""
    for name in ("a red car", "picture of a red car"):
        subject = Subject(name)
        azimuths = [angle + subject.angles[0] for angle in range(0, 360, 15)]
        views = [view_of(azimuth, 20.0) for azimuth in azimuths]
        judge = SimpleNamespace(labels={"view": ["front", "side", "back", "overhead"]})
        labels = {"view": views}
        monkeypatch.setattr("sds3d.evaluation.benchmark.predict", lambda judge, images, all=labels: all)
        graders = Graders(judge=judge)  # type: ignore[arg-type]
        figures, predictions = grade_views(torch.rand(24, 3, 8, 8), subject, graders)
        assert figures["janus_rate"] == 0 and predictions is not None
        assert all(true == predicted for true, predicted in predictions.views())


def test_averages_and_paired_differences() -> None:
    one = [{"prompt": p, "f": f, "confusion": {}} for p, f in (("a", 0.5), ("b", 0.7), ("c", 0.1))]
    other = [{"prompt": p, "f": f, "g": 1.0} for p, f in (("b", 0.8), ("a", 0.7))]
    assert averages(one)["f"][0] == pytest.approx(1.3 / 3)
    difference = paired(one, other)
    assert set(difference) == {"f"} and difference["f"][0] == pytest.approx(0.15)
    with pytest.raises(UserError, match="share no prompt"):
        paired(one, [{"prompt": "z", "f": 1.0}])


def test_seeds_of_a_prompt_are_averaged_first() -> None:
    rows = [{"prompt": p, "seed": s, "f": f} for p, s, f in (("a", 0, 0.2), ("a", 1, 0.4), ("b", 0, 0.9))]
    mean, width = averages(rows)["f"]
    assert mean == pytest.approx(0.6)
    assert width == pytest.approx(averages([{"prompt": "a", "f": 0.3}, {"prompt": "b", "f": 0.9}])["f"][1])
    of_one = averages(rows[:2])["f"]  # a single prompt: over its seeds
    assert of_one[0] == pytest.approx(0.3) and of_one[1] > 0.1

    old = [{"prompt": "a", "f": 0.1}, {"prompt": "b", "f": 0.8}]  # rows of before: seed 0
    assert paired(old, rows)["f"][0] == pytest.approx(0.1)
    later = [{**row, "seed": row["seed"] + 5} for row in rows]
    with pytest.raises(UserError, match="no prompt and seed"):
        paired(old, later)


def test_rows_are_computed_once_per_query(tmp_path: Path) -> None:
    computed = []

    def compute(subject: Subject, seed: int, directory: Path) -> dict[str, float]:
        computed.append((subject.name, seed, directory.name))
        return {"f": 1.0}

    suite = Suite(("a", "picture of a red cube"), (0, 2))
    for steps in (1, 1, 2):
        rows = run_suite(suite, tmp_path, {"steps": steps}, compute)
        assert [(row["prompt"], row["seed"], row["steps"]) for row in rows] == [
            (name, seed, steps) for seed in suite.seeds for name in suite.names
        ]
    names = ["a", "picture-of-a-red-cube", "a-seed2", "picture-of-a-red-cube-seed2"]
    assert [name for _, _, name in computed] == names * 2
    assert "group" not in rows[0] and rows[1]["group"] == "known"
    run_suite(Suite(suite.names, (0, 1, 2)), tmp_path, {"steps": 2}, compute)
    assert [seed for _, seed, _ in computed[8:]] == [1, 1]  # a third seed: the others stay


def test_page_shows_rows_of_before_and_groups(tmp_path: Path) -> None:
    """Rows without a seed; and means of known and unseen shapes side by side."""
    old = [{"prompt": "a red torus", "f_score_5": 0.5, "seconds": 2.0}]
    save_page(tmp_path, "old", old, {}, {})
    page = (tmp_path / "index.html").read_text()
    assert "<h2>a red torus</h2>" in page and "mean, 95 %" in page
    assert "means_by_group" not in json.loads((tmp_path / "rows.json").read_text())

    names = ("picture of a red torus", "picture of assembly 1000000")
    pictures = [
        {"prompt": name, "seed": seed, "group": Subject(name).group, "f_score_5": score}
        for name, score in zip(names, (0.9, 0.7), strict=True)
        for seed in (0, 1)
    ]
    groups = means_by_group(pictures)
    assert groups["known"]["f_score_5"][0] == 0.9 and groups["unseen"]["f_score_5"][0] == 0.7
    save_page(tmp_path / "new", "new", pictures, {}, {})
    page = (tmp_path / "new" / "index.html").read_text()
    assert ">known<" in page and ">unseen<" in page and "picture of a red torus, seed 1" in page


def test_script_runs_grades_and_compares(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """One prompt, two steps; a second call computes nothing again; a comparison with itself is zero."""
    small = ["recipe=score_distillation", "run.steps=2", "run.trackers=[]"]
    small += ["export.frames=4", "export.resolution=32"]
    given = ["prompts=[a red torus]", f"teacher={tiny_teacher_folder}", f"output={tmp_path}", *small]
    given.append("export.mesh.resolution=32")
    assert "f_score_5" in script("benchmark_3d", *given)
    mesh = tmp_path / "a-red-torus" / "mesh.glb"
    modified = mesh.stat().st_mtime_ns
    script("benchmark_3d", *given, f"compare={tmp_path}")
    assert mesh.stat().st_mtime_ns == modified
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["rows"][0]["prompt"] == "a red torus" and content["paired"]["f_score_5"][0] == 0
    row = content["rows"][0]
    assert row["peak_memory_mib"] > 100 and {"mesh_r_precision", "mesh_judge_object", "manifold"} <= set(row)
    page = (tmp_path / "index.html").read_text()
    # overview, views, truth; and plots, without a Janus rate, as a torus has no front
    assert page.count("data:image/gif") == 1 and page.count("data:image/png") == 3 + 6
    assert "paired difference" in page
    wrong = ["prompts=[a red zebra]", f"output={tmp_path}"]
    assert "no prompt of the world" in script("benchmark_3d", *wrong, code=2)
    assert "expected one of tiny, quick, full, images" in script(
        "benchmark_3d", "suite=huge", f"output={tmp_path}", code=2
    )
