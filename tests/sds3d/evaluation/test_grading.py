"""The grading of meshes: the truth scores perfectly, known distortions in the right order, poses are found again."""

from dataclasses import replace

import numpy as np
import pytest
import trimesh

from distill.runtime.errors import UserError
from sds3d.evaluation.grading import Alignment, Surface, align, grade, surface
from sds3d.world.shapes import make_shape


def outside(name: str, count: int = 8000, seed: int = 0) -> Surface:
    shape = make_shape(name)
    return surface(shape.mesh, shape.albedo(np.array([0.8, 0.1, 0.1])), count, seed)


def moved(found: Surface, yaw: float, scale: float, shift: tuple[float, float, float]) -> Surface:
    return found.moved(Alignment(yaw, scale, np.array(shift)))


@pytest.mark.parametrize("name", ["teapot", "chair", "torus", "car"])
def test_the_truth_scores_perfectly_from_any_pose(name: str) -> None:
    """Other samples of the same surface, turned, scaled and shifted."""
    told = grade(moved(outside(name, seed=1), 130.0, 0.7, (0.2, -0.1, 0.3)), outside(name))
    assert told.f_score_5 > 0.999 and told.f_score_2 > 0.97 and told.chamfer < 0.01
    assert told.volume_iou > 0.93 and told.normal_consistency > 0.9 and told.colour_error < 0.03
    assert told.scale == pytest.approx(1 / 0.7, rel=0.02)


def test_the_pose_is_found_again() -> None:
    found = align(
        moved(outside("teapot", seed=1), 75.0, 1.3, (0.5, 0.2, -0.4)).points, outside("teapot").points
    )
    assert (found.yaw + 75.0 + 180) % 360 - 180 == pytest.approx(0, abs=2)
    assert found.scale == pytest.approx(1 / 1.3, rel=0.01)
    back = Alignment(75.0, 1.3, np.array([0.5, 0.2, -0.4])).apply(np.zeros((1, 3)))
    assert np.abs(found.apply(back)).max() < 0.02


def test_noise_costs_more_the_larger_it_is() -> None:
    truth, generator = outside("chair"), np.random.default_rng(0)
    noise = generator.normal(size=truth.points.shape)
    told = [
        grade(replace(truth, points=truth.points + size * noise), truth) for size in (0.0, 0.02, 0.06, 0.15)
    ]
    assert [t.chamfer for t in told] == sorted(t.chamfer for t in told)
    assert [t.f_score_2 for t in told] == sorted((t.f_score_2 for t in told), reverse=True)
    assert told[-1].f_score_5 < 0.9


def test_another_object_scores_worse_than_a_squashed_one() -> None:
    truth = outside("chair")
    flat = np.array([1, 1, 0.8])
    squashed = replace(truth, points=truth.points * flat, shell=truth.shell * flat)
    scores = [grade(each, truth).f_score_5 for each in (truth, squashed, outside("sphere"))]
    assert scores[0] > scores[1] > scores[2]
    assert grade(outside("sphere"), truth).volume_iou < 0.5


def test_colour_error_by_hand() -> None:
    truth = outside("cube")
    told = grade(
        replace(truth, colours=truth.colours + np.array([0.3, 0.0, 0.0])),
        truth,
        Alignment(0.0, 1.0, np.zeros(3)),
    )
    assert told.colour_error == pytest.approx((0.09 / 3) ** 0.5, rel=1e-6)
    assert told.chamfer == 0 and told.f_score_2 == 1 and told.volume_iou == 1


def test_hidden_faces_do_not_count() -> None:
    """A ball within a ball is a ball; half of the samples would else lie inside."""
    inner, outer = trimesh.creation.icosphere(3, 0.4), trimesh.creation.icosphere(3, 0.8)
    both = trimesh.util.concatenate([inner, outer])
    found = surface(both, np.zeros((len(both.faces), 3)), 2000)
    assert np.linalg.norm(found.points, axis=1).min() > 0.75


def test_chamfer_of_spheres_by_hand() -> None:
    """Radii .5 and .6, not aligned: .1 apart everywhere, over a diagonal of 1.2 root 3."""
    small, large = (trimesh.creation.icosphere(5, radius) for radius in (0.5, 0.6))
    one, two = (surface(mesh, np.zeros((len(mesh.faces), 3)), 6000) for mesh in (small, large))
    told = grade(one, two, Alignment(0.0, 1.0, np.zeros(3)))
    assert told.chamfer == pytest.approx(0.1 / (1.2 * 3**0.5), rel=0.03)
    assert told.volume_iou == pytest.approx((0.5 / 0.6) ** 3, abs=0.06)


def test_what_cannot_be_graded_is_told() -> None:
    with pytest.raises(UserError, match="0 faces has no finite surface"):
        surface(trimesh.Trimesh(), np.zeros((0, 3)))
