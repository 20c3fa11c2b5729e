"""Grades of a teacher of cameras: 1 for one that draws the true views, less for wrong views and objects."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command_line import script
from PIL import Image
from scene_fixtures import OneImageTeacher
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.score import Prediction
from distill.core.views import POSE, REFERENCE
from distill.evaluation.judge import Judge, save_judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.runtime.errors import UserError
from sds3d.evaluation.views.azimuth import AzimuthOptions, evaluate_azimuths, view_figures
from sds3d.evaluation.views.multi_view import MultiViewOptions, evaluate_multi_view
from sds3d.evaluation.views.novel_views import NovelViewOptions, evaluate_novel_views, picture_tasks
from sds3d.evaluation.views.objects import KnownObject, composite, named_objects, silhouettes, unseen_objects
from sds3d.evaluation.views.sampling import SamplingOptions, ViewTeacher, silhouette_iou
from sds3d.evaluation.views.segmentation import background_levels, segment
from sds3d.evaluation.views.visual_hull import (
    HALF,
    best_turn_iou,
    project,
    visual_hull,
    volume_iou,
    voxel_centres,
    voxelise,
)
from sds3d.scene.cameras import CameraOptions, Cameras, orbit, ring, sample_cameras
from sds3d.world.shapes import COLOURS, OBJECTS, RADIUS, make_shape

SIDE = 48
FAST = SamplingOptions(steps=2, guidance=1.0, batch=8)


def cameras_of(poses: Tensor) -> Cameras:
    """The cameras whose `view_poses` are `poses` (B, 5)."""
    angles = torch.rad2deg(poses[:, :2])
    fovy = torch.full((len(poses),), 35.0)
    centred = orbit(angles[:, 0], angles[:, 1], poses[:, 2], fovy, SIDE)
    offset = poses[:, 3:] * (poses[:, 2] * torch.tan(centred.fovy / 2))[:, None]  # of the origin
    shift = torch.einsum("bij,bj->bi", centred.rotation[:, :, :2], offset)
    return orbit(angles[:, 0], angles[:, 1], poses[:, 2], fovy, SIDE, -shift)


class TrueTeacher(OneImageTeacher):
    """A teacher in pixel space that knows the true view of every object from every pose.

    `turn` (degrees) and `swapped` make it draw every object turned, or every object as the next one.
    """

    resolution = SIDE
    latent_shape = (3, SIDE, SIDE)
    conditioned_on_cameras = True

    def __init__(self, objects: Sequence[KnownObject], turn: float = 0.0, swapped: bool = False) -> None:
        super().__init__(torch.zeros(3, SIDE, SIDE), std=1e-4)
        self.objects, self.turn, self.swapped = list(objects), turn, swapped
        self.pictures: list[tuple[Tensor, int, Tensor]] = []  # each with its object and azimuth
        self.calls: list[Conditioning] = []

    def register(self, picture: Tensor, index: int, azimuth: Tensor) -> None:
        self.pictures.append((picture, index, azimuth))

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        captions = [each.caption for each in self.objects]
        indices = [captions.index(p.split(",")[0]) if p else -1 for p in prompts]
        return Conditioning(torch.tensor(indices, dtype=torch.float32)[:, None, None])

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        self.calls.append(conditioning)
        return super().predict(x_t, t, conditioning)

    def mean(self, conditioning: Conditioning) -> Tensor:
        rows = []
        for row in range(len(conditioning)):
            one = conditioning.grouped(1).select(slice(row, row + 1))
            index, pose = int(one.embedding), one.extras.get(POSE, torch.zeros(1, 5) + 3.0).clone()
            if REFERENCE in one.extras:
                reference = one.extras[REFERENCE]
                errors = [float((picture - reference).square().sum()) for picture, _, _ in self.pictures]
                _, index, azimuth = self.pictures[int(np.argmin(errors))]
                pose[:, 0] += azimuth
            pose[:, 0] += np.deg2rad(self.turn)
            drawn_object = self.objects[(index + self.swapped) % len(self.objects)]
            rows.append(composite(drawn_object.render(cameras_of(pose)), 0.7)[0])
        return torch.stack(rows)


# Geometry


def test_poses_and_cameras_of_the_fake_agree() -> None:
    cameras = sample_cameras(CameraOptions(), 6, SIDE, torch.Generator().manual_seed(0))
    again = cameras_of(cameras.view_poses())
    torch.testing.assert_close(again.position, cameras.position, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(again.rotation, cameras.rotation, atol=1e-5, rtol=1e-4)


def test_points_project_to_the_pixels_whose_rays_pass_through_them() -> None:
    cameras = sample_cameras(CameraOptions(), 3, 8, torch.Generator().manual_seed(0))
    origins, directions = cameras.rays()
    points = origins + 2.5 * directions
    centres = (torch.arange(8) + 0.5) / 4 - 1
    for camera in range(3):
        projected = project(points[camera].flatten(0, 1), cameras)[camera].view(8, 8, 2)
        torch.testing.assert_close(projected[..., 0], centres.expand(8, 8), atol=1e-4, rtol=0)
        torch.testing.assert_close(projected[..., 1], centres[:, None].expand(8, 8), atol=1e-4, rtol=0)


def test_the_hull_of_a_sphere_is_about_the_sphere() -> None:
    """From cameras all around; a hull contains its solid, but for voxels at the rim."""
    shape = make_shape("sphere")
    azimuth, elevation = torch.tensor([[0.0, 60, 120, 0, 90], [0, 0, 0, 60, -40]])
    distance, fovy = torch.tensor([[3.0] * 5, [35] * 5])
    cameras = orbit(azimuth, elevation, distance, fovy, 128)
    views = KnownObject("sphere", "", shape, np.ones(3)).render(cameras)
    hull, solid = visual_hull(silhouettes(views), cameras), voxelise(shape.mesh)
    inside = (voxel_centres().norm(dim=1) < RADIUS).view(hull.shape).numpy()
    assert volume_iou(solid, inside) > 0.93
    assert (hull & inside).sum() / inside.sum() > 0.995
    assert 0.8 < volume_iou(hull, inside) < 0.95
    one = visual_hull(silhouettes(views)[:1], cameras.select(slice(0, 1)))
    assert volume_iou(one, inside) < volume_iou(hull, inside) - 0.1


def test_a_turned_hull_is_found_again() -> None:
    corner = (voxel_centres() > HALF / 4).all(1).view(64, 64, 64).numpy()
    turned = np.rot90(corner, 1, (0, 1))
    assert volume_iou(corner, turned) == 0 and best_turn_iou(turned, corner) == 1
    assert volume_iou(corner, corner) == 1 and volume_iou(corner[:0], corner[:0]) == 1


# Silhouettes


def test_real_renders_are_segmented() -> None:
    """At every background, with white, dark and patterned parts."""
    generator = torch.Generator().manual_seed(0)
    objects = [*named_objects(["snowman", "torus", "chair", "mug", "house", "teapot"]), *unseen_objects(6)]
    limits = CameraOptions(elevation=(-10, 50))
    views = torch.cat([each.render(sample_cameras(limits, 4, 64, generator)) for each in objects])
    truth = silhouettes(views)
    for levels in (0.4, 0.7, 1.0, 0.4 + 0.6 * torch.rand(len(views), generator=generator)):
        images = composite(views, levels)
        torch.testing.assert_close(
            background_levels(images)[:, 0], torch.as_tensor(levels).expand(len(views)), atol=1e-6, rtol=0
        )
        assert silhouette_iou(segment(images), truth).mean() > 0.98
    noisy = composite(views, 0.7) + 0.003 * torch.randn(len(views), 3, 64, 64, generator=generator)
    assert silhouette_iou(segment(noisy), truth).mean() > 0.97


def test_an_empty_image_has_no_silhouette() -> None:
    empty = torch.full((2, 3, 32, 32), 0.6)
    assert not segment(empty).any()
    assert silhouette_iou(segment(empty), torch.zeros(2, 32, 32, dtype=torch.bool)).tolist() == [1.0, 1.0]
    spot = empty.clone()
    spot[0, :, 10, 10:12] = 0.0
    assert not segment(spot).any()


def test_named_objects_have_captions_and_unseen_ones_have_none() -> None:
    objects = named_objects(OBJECTS)
    assert [each.name for each in objects] == list(OBJECTS)
    assert {each.caption.split()[1] for each in objects} == set(COLOURS)
    assert [each.caption for each in unseen_objects(2)] == ["", ""]
    with pytest.raises(UserError, match="the world has no object dragon: expected some of cube"):
        named_objects(["cube", "dragon"])


# Multi-view groups


@pytest.mark.parametrize("further_groups", ["independent", "pictured"])
def test_true_rings_have_the_true_hull(further_groups: Any, tmp_path: Path) -> None:
    names = ("chair", "duck")
    teacher = TrueTeacher(named_objects(names))
    options = MultiViewOptions(names, 4, 2, 20.0, further_groups)
    for index, each in enumerate(teacher.objects):
        first = ring(4, 20.0, SIDE).select(slice(0, 1))
        teacher.register(composite(each.render(first), 0.7)[0], index, torch.zeros(()))
    figures = evaluate_multi_view(ViewTeacher(teacher, None, FAST), options, tmp_path)
    mean, ceiling = figures["mean"], figures["ceiling"]
    assert mean["silhouette_iou"] > 0.98 and mean["hull_iou"] > 0.96
    assert set(figures["by_object"]) == set(names)
    assert mean["hull_iou"] == pytest.approx(ceiling["real_hull_iou"], abs=0.01)
    assert mean["solid_iou"] == pytest.approx(ceiling["true_hull_solid_iou"], abs=0.03)
    assert {conditioning.views for conditioning in teacher.calls} == {2}
    poses = teacher.calls[0].extras[POSE]
    steps = torch.rad2deg(poses[1::2, 0] - poses[::2, 0]) % 360
    torch.testing.assert_close(steps, torch.full_like(steps, 180.0), atol=1e-3, rtol=0)
    grid = np.asarray(Image.open(tmp_path / "multi_view.png"))
    assert grid.shape == (2 * (SIDE + 2) - 2, 8 * (SIDE + 2) - 2, 3)
    samples, truth = grid[:, : 4 * (SIDE + 2) - 2], grid[:, 4 * (SIDE + 2) :]
    assert np.abs(samples.astype(float) - truth).mean() < 1


def test_wrong_rings_have_another_hull(tmp_path: Path) -> None:
    names = ("chair", "duck")
    options = MultiViewOptions(names, 4, 4)
    turned = evaluate_multi_view(
        ViewTeacher(TrueTeacher(named_objects(names), turn=180.0), None, FAST), options, tmp_path
    )["mean"]
    assert turned["hull_iou"] < 0.8 and turned["hull_iou_turned"] > 0.9
    swapped = evaluate_multi_view(
        ViewTeacher(TrueTeacher(named_objects(names), swapped=True), None, FAST), options, tmp_path
    )["mean"]
    assert max(swapped.values()) < 0.8
    with pytest.raises(UserError, match="8 views cannot be divided into groups of 3"):
        MultiViewOptions(views_per_group=3)


# Novel views

PICTURES = NovelViewOptions(("car", "teapot"), unseen=2, pictures=1, views=2)


def picture_teacher(turn: float = 0.0, swapped: bool = False) -> TrueTeacher:
    """One that recognises the pictures of `PICTURES`."""
    sets = named_objects(PICTURES.objects), unseen_objects(PICTURES.unseen)
    teacher = TrueTeacher([*sets[0], *sets[1]], turn, swapped)
    for offset, objects in zip((0, len(sets[0])), sets, strict=True):
        for index, task in enumerate(picture_tasks(objects, PICTURES, SIDE, FAST.seed)):
            picture = composite(task.views[:1], PICTURES.background)[0]
            teacher.register(picture, offset + index, task.poses[0, 0])
    return teacher


def test_true_novel_views_are_right(tmp_path: Path) -> None:
    teacher = picture_teacher()
    figures = evaluate_novel_views(ViewTeacher(teacher, None, FAST), PICTURES, tmp_path)
    assert set(figures) == {"known", "unseen"}
    for part in figures.values():
        assert part["images"] == 4 and part["silhouette_iou"] > 0.97
        assert part["psnr"] > 40 and part["psnr_of_mean"] > 40
        assert part["copy"]["silhouette_iou"] < 0.9 and part["copy"]["psnr"] < 25
        assert part["reconstructed"]["silhouette_iou"] > 0.97
        assert len(part["by_object"]) == 2 and 1 <= len(part["by_angle"]) <= 4
    for conditioning in teacher.calls:
        assert conditioning.views == 2 and conditioning.extras[POSE][:, 0].abs().max() <= torch.pi
        assert (conditioning.embedding == -1).all()  # no caption
    grid = np.asarray(Image.open(tmp_path / "novel_views_unseen.png")).astype(float)
    cells = [grid[:SIDE, i * (SIDE + 2) : i * (SIDE + 2) + SIDE] for i in range(5)]
    assert np.abs(cells[1] - cells[3]).mean() < 1 < np.abs(cells[0] - cells[3]).mean()


@pytest.mark.parametrize(("turn", "swapped"), [(90.0, False), (0.0, True)])
def test_wrong_novel_views_are_noticed(turn: float, swapped: bool, tmp_path: Path) -> None:
    teacher = picture_teacher(turn, swapped)
    figures = evaluate_novel_views(ViewTeacher(teacher, None, FAST), PICTURES, tmp_path)
    assert all(part["psnr"] < 25 and part["silhouette_iou"] < 0.95 for part in figures.values())
    with pytest.raises(UserError, match="views=0"):
        NovelViewOptions(views=0)


# Azimuths


class ColourTeacher(OneImageTeacher):
    """Draws images whose red is the azimuth that they were asked for, and whose green that they were."""

    resolution = SIDE
    latent_shape = (3, SIDE, SIDE)
    conditioned_on_cameras = True

    def encode_text(self, prompts: Sequence[str]) -> Conditioning:
        words = [
            next((i for i, word in enumerate(("front", "side", "back")) if word in p), 3) for p in prompts
        ]
        return Conditioning(torch.tensor(words, dtype=torch.float32)[:, None, None])

    def mean(self, conditioning: Conditioning) -> Tensor:
        azimuth = conditioning.embedding[:, 0, 0] * 90.0
        if POSE in conditioning.extras:
            azimuth = torch.rad2deg(conditioning.extras[POSE][:, 0])
        images = torch.zeros(len(azimuth), 3, SIDE, SIDE)
        images[:, 0], images[:, 1] = (azimuth[:, None, None] + 180) / 540, 1.0
        return images


def read_colour(images: Tensor) -> Tensor:
    """What `ColourTeacher` was asked for; of real renders, nothing."""
    return torch.where(images[:, 1, 0, 0] > 0.99, images[:, 0, 0, 0] * 540 - 180, 0.0)


def test_azimuths_are_compared_with_those_of_the_cameras(tmp_path: Path) -> None:
    teacher = ViewTeacher(ColourTeacher(torch.zeros(3, SIDE, SIDE), 1e-4), None, FAST)
    options = AzimuthOptions(samples=26)
    figures = evaluate_azimuths(teacher, read_colour, options, tmp_path)
    assert figures["camera"]["within_15"] == 1 and figures["camera"]["flips"] == 0
    assert figures["camera"]["median_error"] < 0.1 and figures["camera"]["view"] == 1
    assert figures["view_words"] == {"view": 1.0, "view_flips": 0.0}
    assert figures["real"]["within_15"] < 0.5 and figures["real"]["median_error"] > 15
    assert len(figures["camera"]["within_15_by_object"]) == 13
    assert (tmp_path / "azimuth.png").is_file()

    def opposite(images: Tensor) -> Tensor:
        return read_colour(images) + 180

    flipped = evaluate_azimuths(teacher, opposite, options, tmp_path)
    assert flipped["camera"]["flips"] == 1 and flipped["camera"]["within_15"] == 0
    assert flipped["view_words"]["view_flips"] == 1


def test_view_figures_by_hand() -> None:
    elevation, distance, fovy = torch.tensor([[10.0] * 4, [3] * 4, [35] * 4])
    cameras = orbit(torch.tensor([0.0, 170, 90, -20]), elevation, distance, fovy, 8)
    figures = view_figures(torch.tensor([30.0, 5, -80, -170]), cameras)
    assert figures == {"view": 0.5, "view_flips": pytest.approx(2 / 3)}


# The script


def test_the_script_grades_and_resumes(multi_view_teacher_folder: Path, tmp_path: Path) -> None:
    judge = Judge({"object": ("a", "b")}, JudgeOptions(("object",), directions=("azimuth",), width=8))
    save_judge(judge, tmp_path / "judge", {})
    small = [
        "sampling.steps=1",
        "azimuth.samples=3",
        "multi_view.objects=[cube]",
        "novel_views.objects=[cube]",
    ]
    arguments = [f"teacher={multi_view_teacher_folder}", f"output={tmp_path / 'o'}", *small]
    arguments += ["novel_views.unseen=1", "novel_views.pictures=1"]
    script("evaluate_views", *arguments, f"judge={tmp_path / 'judge'}")
    figures = json.loads((tmp_path / "o" / "evaluation.json").read_text())
    assert {"azimuth", "multi_view", "novel_views", "sampling", "teacher", "machine"} <= set(figures)
    assert figures["novel_views"]["unseen"]["images"] == 3
    names = {"azimuth.png", "multi_view.png", "novel_views_known.png", "novel_views_unseen.png"}
    assert names <= {path.name for path in (tmp_path / "o").iterdir()}
    before = (tmp_path / "o" / "multi_view.json").stat().st_mtime_ns
    script("evaluate_views", *arguments, "azimuth=null", "novel_views=null", f"judge={tmp_path / 'judge'}")
    assert (tmp_path / "o" / "multi_view.json").stat().st_mtime_ns == before


def test_unsuitable_teachers_and_judges_are_refused(
    tiny_teacher_folder: Path, multi_view_teacher_folder: Path
) -> None:
    from sds3d.evaluation.views.run import ViewEvaluation, run_view_evaluation

    with pytest.raises(UserError, match="is not conditioned on cameras"):
        run_view_evaluation(ViewEvaluation(teacher=str(tiny_teacher_folder)))
    with pytest.raises(UserError, match="the judge judge64 reads no azimuth"):
        run_view_evaluation(ViewEvaluation(teacher=str(multi_view_teacher_folder), judge="judge64"))
    with pytest.raises(UserError, match="steps=0"):
        SamplingOptions(steps=0)
    with pytest.raises(UserError, match="azimuth samples is 0"):
        AzimuthOptions(samples=0)
