"""The benchmark: truths by prompt, Janus rate and confusion by hand, ranking of meshes, paired rows."""

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
from distill.teacher.vocabulary import words_of
from sds3d.evaluation.benchmark import (
    PAIRS,
    TINY,
    ViewPredictions,
    averages,
    confusion,
    full_suite,
    grade_mesh,
    grade_views,
    janus_rate,
    paired,
    r_precision,
    run_suite,
    truth_of,
)
from sds3d.world.shapes import COLOURS, OBJECTS, make_shape
from sds3d.world.world import held_out


def test_suite_has_every_object_held_out_combinations_and_pairs() -> None:
    suite = full_suite()
    singles = [prompt.split()[1:] for prompt in suite if prompt not in PAIRS]
    assert suite[:5] == TINY and len(suite) == len(set(suite)) == len(OBJECTS) + len(PAIRS) >= 24
    assert {name for _, name in singles} == set(OBJECTS) and len({colour for colour, _ in singles}) >= 6
    assert 4 <= sum(held_out(name, colour) for colour, name in singles) <= 12
    assert all(words_of(prompt) for prompt in suite)
    for prompt in suite:
        truth_of(prompt)


def test_truths_are_the_worlds_own() -> None:
    shape, albedo = truth_of("a red teapot")
    assert shape.mesh is make_shape("teapot").mesh and np.allclose(albedo[0], COLOURS["red"])
    pair, colours = truth_of("a blue cube on top of an orange cylinder")
    expected = {tuple(np.round(COLOURS[c], 6)) for c in ("blue", "orange")}
    assert not pair.has_front and {tuple(c) for c in colours.round(6)} == expected
    for wrong in ("a red zebra", "teapot", "a red teapot beside a cube"):
        with pytest.raises(UserError, match="no prompt of the world"):
            truth_of(wrong)


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
    figures, predictions = grade_views(torch.rand(24, 3, 8, 8), "a red teapot", Graders(), has_front=True)
    assert set(figures) == {"saturation"} and predictions is None


def test_averages_and_paired_differences() -> None:
    one = [{"prompt": p, "f": f, "confusion": {}} for p, f in (("a", 0.5), ("b", 0.7), ("c", 0.1))]
    other = [{"prompt": p, "f": f, "g": 1.0} for p, f in (("b", 0.8), ("a", 0.7))]
    assert averages(one)["f"][0] == pytest.approx(1.3 / 3)
    difference = paired(one, other)
    assert set(difference) == {"f"} and difference["f"][0] == pytest.approx(0.15)
    with pytest.raises(UserError, match="share no prompt"):
        paired(one, [{"prompt": "z", "f": 1.0}])


def test_rows_are_computed_once_per_query(tmp_path: Path) -> None:
    computed = []

    def compute(prompt: str, directory: Path) -> dict[str, float]:
        computed.append(prompt)
        return {"f": 1.0}

    for steps in (1, 1, 2):
        rows = run_suite(["a", "b"], tmp_path, {"steps": steps}, compute)
        assert [(row["prompt"], row["steps"], row["f"]) for row in rows] == [("a", steps, 1), ("b", steps, 1)]
    assert computed == ["a", "b"] * 2


def test_script_runs_grades_and_compares(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """One prompt, two steps; a second call computes nothing again; a comparison with itself is zero."""
    small = ["run.steps=2", "run.trackers=[]", "export.frames=4", "export.resolution=32"]
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
    assert "expected one of tiny, full" in script("benchmark_3d", "suite=huge", f"output={tmp_path}", code=2)
