"""Grading of meshes: the truth scores perfectly, distortions are ranked, poses are recovered."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh

from distill.runtime.errors import UserError
from sds3d.evaluation.grading import Alignment, Surface, align, grade, surface
from sds3d.world.shapes import make_shape

IDENTITY = Alignment(0.0, 1.0, np.zeros(3))


def surface_of(name: str, count: int = 8000, seed: int = 0) -> Surface:
    shape = make_shape(name)
    return surface(shape.mesh, shape.albedo(np.array([0.8, 0.1, 0.1])), count, seed)


@pytest.mark.parametrize("name", ["teapot", "chair", "torus", "car"])
def test_truth_scores_perfectly_in_any_pose(name: str) -> None:
    """Another sample of the same surface, rotated, scaled and translated."""
    posed = surface_of(name, seed=1).transformed(Alignment(130.0, 0.7, np.array([0.2, -0.1, 0.3])))
    result = grade(posed, surface_of(name))
    assert result.f_score_5 > 0.999 and result.f_score_2 > 0.97 and result.chamfer < 0.01
    assert result.volume_iou > 0.93 and result.normal_consistency > 0.9 and result.colour_error < 0.03
    assert result.scale == pytest.approx(1 / 0.7, rel=0.02)


def test_pose_is_recovered() -> None:
    pose = Alignment(75.0, 1.3, np.array([0.5, 0.2, -0.4]))
    alignment = align(surface_of("teapot", seed=1).transformed(pose).points, surface_of("teapot").points)
    assert (alignment.yaw + 75.0 + 180) % 360 - 180 == pytest.approx(0, abs=2)
    assert alignment.scale == pytest.approx(1 / 1.3, rel=0.01)
    assert np.abs(alignment.apply(pose.apply(np.zeros((1, 3))))).max() < 0.02


def test_more_noise_scores_worse() -> None:
    truth, generator = surface_of("chair"), np.random.default_rng(0)
    noise = generator.normal(size=truth.points.shape)
    grades = [
        grade(replace(truth, points=truth.points + size * noise), truth) for size in (0.0, 0.02, 0.06, 0.15)
    ]
    assert [g.chamfer for g in grades] == sorted(g.chamfer for g in grades)
    assert [g.f_score_2 for g in grades] == sorted((g.f_score_2 for g in grades), reverse=True)
    assert grades[-1].f_score_5 < 0.9


def test_another_object_scores_worse_than_a_squashed_one() -> None:
    truth = surface_of("chair")
    flat = np.array([1, 1, 0.8])
    squashed = replace(truth, points=truth.points * flat, shell=truth.shell * flat)
    scores = [grade(each, truth).f_score_5 for each in (truth, squashed, surface_of("sphere"))]
    assert scores[0] > scores[1] > scores[2]
    assert grade(surface_of("sphere"), truth).volume_iou < 0.5


def test_colour_error_by_hand() -> None:
    truth = surface_of("cube")
    result = grade(replace(truth, colours=truth.colours + np.array([0.3, 0.0, 0.0])), truth, IDENTITY)
    assert result.colour_error == pytest.approx((0.09 / 3) ** 0.5, rel=1e-6)
    assert result.chamfer == 0 and result.f_score_2 == 1 and result.volume_iou == 1


def test_hidden_faces_are_ignored() -> None:
    """A ball within a ball: half of a plain sample of its faces would lie inside."""
    balls = trimesh.util.concatenate([trimesh.creation.icosphere(3, radius) for radius in (0.4, 0.8)])
    outer = surface(balls, np.zeros((len(balls.faces), 3)), 2000)
    assert np.linalg.norm(outer.points, axis=1).min() > 0.75


def test_chamfer_of_spheres_by_hand() -> None:
    """Radii 0.5 and 0.6, not aligned: 0.1 apart everywhere, over a diagonal of 1.2 sqrt(3)."""
    meshes = (trimesh.creation.icosphere(5, radius) for radius in (0.5, 0.6))
    small, large = (surface(mesh, np.zeros((len(mesh.faces), 3)), 6000) for mesh in meshes)
    result = grade(small, large, IDENTITY)
    assert result.chamfer == pytest.approx(0.1 / (1.2 * 3**0.5), rel=0.03)
    assert result.volume_iou == pytest.approx((0.5 / 0.6) ** 3, abs=0.06)


def test_mesh_without_a_surface_raises() -> None:
    with pytest.raises(UserError, match="0 faces has no finite surface"):
        surface(trimesh.Trimesh(), np.zeros((0, 3)))
