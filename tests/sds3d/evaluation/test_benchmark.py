"""The benchmark's figures: truths by prompt, Janus and confusion by hand, meshes in the right order, paired differences."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from command_line import script

from distill.runtime.errors import UserError
from distill.teacher.vocabulary import words_of
from sds3d.evaluation import benchmark
from sds3d.evaluation.benchmark import (
    PAIRS,
    TINY,
    RenderedViews,
    averages,
    confusion,
    full_suite,
    grade_mesh,
    janus,
    paired,
    truth_of,
)
from sds3d.world.shapes import COLOURS, OBJECTS, make_shape
from sds3d.world.world import held_out


def test_the_suite_holds_every_object_held_out_combinations_and_pairs() -> None:
    suite = full_suite()
    singles = [prompt.split() for prompt in suite if prompt not in PAIRS]
    assert suite[:5] == TINY and len(suite) == len(set(suite)) == len(OBJECTS) + len(PAIRS) >= 24
    assert {words[2] for words in singles} == set(OBJECTS) and len({words[1] for words in singles}) >= 6
    assert 4 <= sum(held_out(words[2], words[1]) for words in singles) <= 12
    assert all(words_of(prompt) for prompt in suite)
    for prompt in suite:
        truth_of(prompt)


def test_truths_are_the_worlds_own() -> None:
    shape, albedo = truth_of("a red teapot")
    assert shape.mesh is make_shape("teapot").mesh and np.allclose(albedo[0], COLOURS["red"])
    pair, painted = truth_of("a blue cube on top of an orange cylinder")
    assert not pair.has_front and {tuple(c) for c in painted.round(6)} == {
        tuple(np.round(COLOURS[c], 6)) for c in ("blue", "orange")
    }
    for wrong in ("a red zebra", "teapot", "a red teapot beside a cube"):
        with pytest.raises(UserError, match="no prompt of the world"):
            truth_of(wrong)


def test_a_face_on_the_back_is_counted() -> None:
    azimuth = [0.0, 90.0, 170.0, 180.0, 190.0, 270.0]
    views = RenderedViews({"view": ["front", "side", "front", "back", "front", "side"]}, azimuth)
    assert janus(views) == pytest.approx(2 / 3)
    table = confusion(views)
    assert table["back"] == {"front": 2, "side": 0, "back": 1, "overhead": 0} and table["side"]["side"] == 2


def painted(mesh: trimesh.Trimesh, colour: tuple[float, float, float]) -> trimesh.Trimesh:
    copied = mesh.copy()
    copied.visual = trimesh.visual.ColorVisuals(
        copied, vertex_colors=np.round(255 * np.array([*colour, 1.0])).astype(np.uint8)
    )
    return copied


def test_meshes_score_in_the_right_order() -> None:
    shape, albedo = truth_of("a red torus")
    true = painted(shape.mesh, COLOURS["red"])
    turned = true.copy()
    turned.apply_transform(trimesh.transformations.rotation_matrix(1.0, [0, 0, 1]))
    turned.apply_scale(0.8)
    ball = painted(trimesh.creation.icosphere(3, 0.7), COLOURS["red"])
    told = [grade_mesh(mesh, shape, albedo, 2000) for mesh in (true, turned, ball)]
    assert (
        min(told[0]["f_score_5"], told[1]["f_score_5"]) > 0.99
        and min(told[0]["silhouette_iou"], told[1]["silhouette_iou"]) > 0.95
    )
    assert told[2]["f_score_5"] < 0.9 and told[2]["volume_iou"] < 0.7 and told[2]["silhouette_iou"] < 0.9
    assert (
        told[0]["manifold"] == told[0]["watertight"] == 1
        and told[0]["components"] == 1
        and told[0]["colour_error"] < 0.01
    )


def test_r_precision_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Features that are the caption's own number: two of three images sit on the prompt's."""
    captions: list[str] = []

    def of_captions(clip: object, tokenizer: object, texts: list[str]) -> torch.Tensor:
        captions[:] = texts
        return torch.eye(len(texts))

    def of_images(clip: object, images: torch.Tensor) -> torch.Tensor:
        return torch.eye(len(OBJECTS) * len(COLOURS))[images[:, 0, 0, 0].long()]

    monkeypatch.setattr(benchmark, "caption_features", of_captions)
    monkeypatch.setattr(benchmark, "image_features", of_images)
    index = list(OBJECTS).index("duck") * len(COLOURS) + list(COLOURS).index("green")
    images = torch.tensor([index, index, 0.0])[:, None, None, None].expand(3, 3, 2, 2)
    things: list[object] = [type("Any", (), {"tokenizer": None, "clip": None})()] * 2
    assert benchmark.r_precision(images, "a green duck", *things) == pytest.approx(2 / 3)  # type: ignore[arg-type]
    assert captions[index] == "a green duck"


def test_averages_and_pairs() -> None:
    one = [{"prompt": p, "f": f, "confusion": {}} for p, f in (("a", 0.5), ("b", 0.7), ("c", 0.1))]
    other = [{"prompt": p, "f": f, "g": 1.0} for p, f in (("b", 0.8), ("a", 0.7))]
    assert averages(one)["f"][0] == pytest.approx(1.3 / 3)
    difference = paired(one, other)  # type: ignore[arg-type]
    assert set(difference) == {"f"} and difference["f"][0] == pytest.approx(0.15)
    with pytest.raises(UserError, match="share no prompt"):
        paired(one, [{"prompt": "z", "f": 1.0}])


def test_the_script_makes_grades_and_compares(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """One prompt, two steps; a second call makes nothing anew; a comparison with itself is nil."""
    small = [
        "run.steps=2",
        "run.trackers=[]",
        "export.frames=4",
        "export.resolution=32",
        "export.mesh.resolution=32",
    ]
    given = ["prompts=[a red torus]", f"teacher={tiny_teacher_folder}", f"output={tmp_path}", *small]
    assert "f_score_5" in script("benchmark_3d", *given)
    made = (tmp_path / "a-red-torus" / "mesh.glb").stat().st_mtime_ns
    script("benchmark_3d", *given, f"compare={tmp_path}")
    assert (tmp_path / "a-red-torus" / "mesh.glb").stat().st_mtime_ns == made
    content = json.loads((tmp_path / "rows.json").read_text())
    assert content["rows"][0]["prompt"] == "a red torus" and content["paired"]["f_score_5"][0] == 0
    row = content["rows"][0]
    assert row["peak_memory_mib"] > 100 and {"mesh_r_precision", "mesh_judge_object", "manifold"} <= set(row)
    page = (tmp_path / "index.html").read_text()
    # overview, views, truth; plots, and none of a front that a torus lacks
    assert page.count("data:image/gif") == 1 and page.count("data:image/png") == 3 + 6
    assert "paired difference" in page
    assert "no prompt of the world" in script(
        "benchmark_3d", "prompts=[a red zebra]", f"output={tmp_path}", code=2
    )
    assert "expected tiny or full" in script("benchmark_3d", "suite=huge", f"output={tmp_path}", code=2)
