"""What the benchmark is given: suites and their seeds, truths of prompts and pictures, and the pictures."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from distill.runtime.errors import UserError
from distill.teacher.vocabulary import words_of
from sds3d.evaluation.benchmark import ELEVATION, grade_mesh, truth_strip
from sds3d.evaluation.grading import surface
from sds3d.evaluation.subjects import (
    PAIRS,
    PICTURE,
    PICTURE_SIDE,
    QUICK,
    TINY,
    Subject,
    Suite,
    full_suite,
    picture_suite,
    suite_of,
    truth_of,
)
from sds3d.export.mesh import mean_iou, silhouettes
from sds3d.export.turntable import GREY
from sds3d.scene.cameras import orbit
from sds3d.text_to_3d.picture import load_cut_out
from sds3d.world.assemblies import UNSEEN, make_assembly
from sds3d.world.shapes import COLOURS, OBJECTS, make_shape
from sds3d.world.world import held_out


def test_full_suite_has_every_object_held_out_combinations_and_pairs() -> None:
    suite = full_suite()
    singles = [prompt.split()[1:] for prompt in suite if prompt not in PAIRS]
    assert suite[:5] == TINY and len(suite) == len(set(suite)) == len(OBJECTS) + len(PAIRS) >= 24
    assert {name for _, name in singles} == set(OBJECTS) and len({colour for colour, _ in singles}) >= 6
    assert 4 <= sum(held_out(name, colour) for colour, name in singles) <= 12
    assert all(words_of(prompt) for prompt in suite)
    for prompt in suite:
        truth_of(prompt)


def test_suites_and_their_seeds() -> None:
    assert suite_of("tiny") == Suite(TINY, (0,)) and suite_of("full").seeds == (0, 1, 2)
    quick = suite_of("quick")
    assert len(quick.names) == 8 and not set(quick.names) & set(full_suite())
    assert len(quick.seeds) == 2 and not set(quick.seeds) & set(suite_of("full").seeds)
    images = suite_of("images")
    assert len(images.names) == len(OBJECTS) + len(UNSEEN) and len(images.seeds) == 1
    for name in (*quick.names, *images.names):
        Subject(name).check()
    assert suite_of("full", 2, ("a red cube",)) == Suite(("a red cube",), (0, 1))
    assert suite_of("full", None, ("a red cube",)).seeds == (0,)
    with pytest.raises(UserError, match="seeds is 0"):
        suite_of("full", 0)
    assert quick.names == QUICK


def test_truths_are_the_worlds_own() -> None:
    shape, albedo = truth_of("a red teapot")
    assert shape.mesh is make_shape("teapot").mesh and np.allclose(albedo[0], COLOURS["red"])
    assert Subject("picture of a red teapot").truth[0] is shape
    pair, colours = truth_of("a blue cube on top of an orange cylinder")
    expected = {tuple(np.round(COLOURS[c], 6)) for c in ("blue", "orange")}
    assert not pair.has_front and {tuple(c) for c in colours.round(6)} == expected
    for wrong in ("a red zebra", "teapot", "a red teapot beside a cube", "picture of a red zebra"):
        with pytest.raises(UserError, match="no prompt of the world"):
            Subject(wrong).check()
    with pytest.raises(UserError, match="no picture of the world: expected .* assembly 1000000"):
        Subject("picture of assembly x").check()


def test_captions_and_groups_of_subjects() -> None:
    prompt, named, unseen = map(Subject, ("a red car", "picture of a red car", "picture of assembly 1000001"))
    assert [subject.caption for subject in (prompt, named, unseen)] == ["a red car", "a red car", ""]
    assert [subject.group for subject in (prompt, named, unseen)] == ["", "known", "unseen"]
    assert prompt.angles == (0.0, 0.0) and named.angles == Subject(named.name).angles != unseen.angles
    angles = [Subject(name).angles for name in picture_suite()]
    assert min(a for a, _ in angles) < -120 and max(a for a, _ in angles) > 120
    assert all(10 <= elevation <= 40 for _, elevation in angles)


def patterned() -> Subject:
    """The first unseen assembly with a texture."""
    return Subject(f"{PICTURE}assembly {next(seed for seed in UNSEEN if make_assembly(seed).patterns)}")


def test_pictures_show_the_truth_from_their_camera(tmp_path: Path) -> None:
    """And the strip of the truth begins at the picture's azimuth, as the views of a result do."""
    for subject in (Subject("picture of a red car"), patterned()):
        subject.save_picture(tmp_path / "pictures" / "a.png")
        shape, camera = subject.truth[0], subject.camera(PICTURE_SIDE)
        with Image.open(tmp_path / "pictures" / "a.png") as image:
            mask = torch.from_numpy(np.asarray(image)[..., 3] > 127)
        assert mean_iou(mask[None], silhouettes(shape.mesh, camera)) > 0.98
        assert load_cut_out(tmp_path / "pictures" / "a.png").picture(64).alpha.mean() > 0.05

        azimuth, elevation, distance, fovy = torch.tensor([[subject.angles[0]], [ELEVATION], [3.0], [35.0]])
        first = (truth_strip(subject, 4, 64)[:1] - GREY[0]).abs().amax(1) > 0.02
        assert mean_iou(first, silhouettes(shape.mesh, orbit(azimuth, elevation, distance, fovy, 64))) > 0.9


def test_truth_of_an_assembly_has_its_texture() -> None:
    """The colours of surface points are those of the pattern, not of the faces."""
    subject = patterned()
    shape, albedo = subject.truth
    assert callable(albedo)
    points = surface(shape.mesh, albedo, 4000)
    plain = surface(shape.mesh, shape.albedo(np.zeros(3)), 4000)
    np.testing.assert_array_equal(points.points, plain.points)
    assert 0.01 < (points.colours != plain.colours).any(1).mean() < 0.9

    mesh = shape.mesh.copy()
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=np.full((len(mesh.vertices), 4), 128))
    grade = grade_mesh(mesh, shape, albedo, 2000)
    assert grade["f_score_2"] > 0.99 and grade["colour_error"] > 0.1
    assert torch.isfinite(truth_strip(subject, 2, 32)).all()
