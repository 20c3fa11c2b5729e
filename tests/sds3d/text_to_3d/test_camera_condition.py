"""A teacher that takes cameras and groups of views: what every stage gives it, and what it decides."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from command_line import ROOT
from scene_fixtures import OPTIONS, SDS, SMALL, OneImageTeacher, disc, run_options, with_stages
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.score import Prediction
from distill.core.views import POSE
from distill.objectives.options import ObjectiveOptions
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.latent import LatentDiffusionTeacher
from sds3d.scene.cameras import CameraOptions, orbit, ring, sample_cameras
from sds3d.scene.nerf import NeRF, NerfOptions
from sds3d.text_to_3d.stages.orientation import OrientationCheck, OrientationOptions, quarter_turns
from sds3d.text_to_3d.stages.sdedit_refinement import SDEditRefinementOptions
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions
from sds3d.text_to_3d.view_groups import rotate_azimuth, sample_view_groups, spread_groups

GROUPED = replace(OPTIONS, views=4, views_per_group=2)
ANY_GREY = replace(GROUPED, background=(0.4, 0.9))


class CameraTeacher(OneImageTeacher):
    """A teacher in pixel space with one image for each of N azimuths, from 0 on; it records its calls."""

    conditioned_on_cameras = True

    def __init__(self, images: Tensor, std: float = 0.05) -> None:
        super().__init__(images, std)
        self.calls: list[tuple[Tensor, Conditioning]] = []  # the times and the conditioning

    def predict(self, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Prediction:
        self.calls.append((t, conditioning))
        return super().predict(x_t, t, conditioning)

    def mean(self, conditioning: Conditioning) -> Tensor:
        fraction = conditioning.extras[POSE][:, 0] / (2 * torch.pi)
        return self.image[(fraction * len(self.image)).round().long() % len(self.image)]


def camera_teacher() -> CameraTeacher:
    return CameraTeacher(disc()[None])


def trainer(
    directory: Path,
    teacher: OneImageTeacher | LatentDiffusionTeacher,
    options: TextTo3dOptions,
    objective: ObjectiveOptions = SDS,
    scene: NerfOptions = SMALL,
) -> TextTo3d:
    return TextTo3d(Run(run_options(directory, 4), {}, "t"), teacher, scene, objective, options)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# Cameras


def test_rotated_cameras_are_those_of_the_orbit() -> None:
    def cameras(azimuth: list[float]) -> dict[str, Tensor]:
        rest = (torch.full((2,), value) for value in (20.0, 3.0, 35.0))
        return vars(orbit(torch.tensor(azimuth), *rest, 8))

    options = CameraOptions()
    for degrees in (torch.tensor([90.0, -30.0]), torch.tensor(90.0)):
        first = orbit(torch.tensor([10.0, 50.0]), *(torch.full((2,), v) for v in (20.0, 3.0, 35.0)), 8)
        rotated = vars(rotate_azimuth(first, degrees))
        for name, value in cameras((torch.tensor([10.0, 50.0]) + degrees).tolist()).items():
            torch.testing.assert_close(rotated[name], value, msg=name)

    moved = sample_cameras(options, 5, 8, generator())  # their targets are beside the object
    rotated = rotate_azimuth(moved, torch.tensor(123.0))
    torch.testing.assert_close(rotated.view_poses()[:, 1:], moved.view_poses()[:, 1:])


def test_a_ring_has_equal_steps_at_one_elevation() -> None:
    cameras = sample_view_groups(CameraOptions(), 8, 4, "ring", 16, generator())
    poses = cameras.view_poses().view(2, 4, 5)
    assert torch.allclose(poses[:, 1:, 0] - poses[:, :-1, 0], torch.tensor(torch.pi / 2))
    torch.testing.assert_close(poses[:, 1:, 1:], poses[:, :1, 1:].expand(2, 3, 4))
    assert not torch.allclose(poses[0, 0], poses[1, 0])
    assert cameras.azimuth.min() >= -180 and cameras.azimuth.max() <= 180


def test_random_groups_are_spread_over_the_azimuths() -> None:
    cameras = sample_view_groups(CameraOptions(), 8, 4, "random", 16, generator())
    quarters = ((cameras.azimuth + 180) // 90).long().view(2, 4)
    assert quarters.tolist() == [[0, 1, 2, 3], [0, 1, 2, 3]]
    assert len(cameras.elevation.unique()) == 8
    order = spread_groups(ring(6), 3).azimuth / 60
    assert torch.allclose(order, torch.tensor([0.0, 2, 4, 1, 3, 5]))


def test_single_views_have_the_cameras_of_before() -> None:
    for layout in ("ring", "random"):
        cameras = sample_view_groups(CameraOptions(), 6, 1, layout, 16, generator())  # type: ignore[arg-type]
        for name, value in vars(sample_cameras(CameraOptions(), 6, 16, generator())).items():
            assert name == "resolution" or torch.equal(vars(cameras)[name], value)


# What the objective evaluates


@pytest.mark.parametrize("name", ["sds_pixels", "sds_perp_neg", "csd", "nfsd", "ism", "recon", "sds_bridge"])
def test_every_prompt_has_the_poses_of_the_cameras_in_groups(name: str, tmp_path: Path) -> None:
    values = yaml.safe_load((ROOT / "configs" / "objective" / f"{name}.yaml").read_text())
    options = replace(GROUPED, negative_prompt="blurry")
    task = trainer(tmp_path, camera_teacher(), options, build(ObjectiveOptions, values, "objective"))
    cameras = task.context.sample_cameras(options.camera, 4, 16)
    conditionings = task.context.prompt_conditionings(cameras)
    assert {"conditional", "unconditional"} <= set(conditionings.by_name)
    for conditioning in conditionings.by_name.values():
        torch.testing.assert_close(conditioning.extras[POSE], cameras.view_poses())
        assert len(conditioning) == 4 and conditioning.views == 2

    task.stages["score_distillation"].sds_step(0, 0.9)
    for t, conditioning in task.teacher.calls:
        poses = conditioning.extras[POSE].view(-1, 4, 5)
        assert torch.equal(poses, poses[:1].expand_as(poses))  # those of every prompt
        assert conditioning.views == 2 and torch.equal(t[::2], t[1::2])
    assert len(task.teacher.calls[-1][0].unique()) > 1  # times differ between groups


def test_a_group_has_one_background(tmp_path: Path) -> None:
    context = trainer(tmp_path, camera_teacher(), ANY_GREY).context
    greys = context.backgrounds(4)
    assert torch.equal(greys[::2], greys[1::2]) and not torch.equal(greys[0], greys[2])


def test_the_critic_has_poses_and_groups_beside_its_own_camera(
    tmp_path: Path, tiny_teacher: LatentDiffusionTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[Tensor, Conditioning]] = []
    output = UNetDenoiser.output

    def recorded(self: UNetDenoiser, x_t: Tensor, t: Tensor, conditioning: Conditioning) -> Tensor:
        calls.append((t, conditioning))
        return output(self, x_t, t, conditioning)

    monkeypatch.setattr(UNetDenoiser, "output", recorded)
    monkeypatch.setattr(LatentDiffusionTeacher, "conditioned_on_cameras", True)
    values = yaml.safe_load((ROOT / "configs" / "objective" / "vsd.yaml").read_text())
    objective = build(ObjectiveOptions, values, "objective")
    task = trainer(tmp_path, tiny_teacher, replace(GROUPED, prompt="a red cube"), objective)
    task.stages["score_distillation"].sds_step(0, 0.9)

    assert [len(t) for t, _ in calls] == [8, 4, 4]  # the teacher's two prompts, the critic, its training
    for t, conditioning in calls:
        assert conditioning.views == 2 and torch.equal(t[::2], t[1::2])
        assert torch.equal(conditioning.extras[POSE][:4], calls[0][1].extras[POSE][:4])
    assert "camera" in calls[1][1].extras and "camera" in calls[2][1].extras


@pytest.mark.parametrize("teacher", [OneImageTeacher(disc()), camera_teacher()])
def test_without_cameras_options_of_groups_change_nothing(teacher: OneImageTeacher, tmp_path: Path) -> None:
    plain = replace(OPTIONS, views=4, camera_condition=False)
    scenes = []
    for index, options in enumerate((plain, replace(plain, views_per_group=2, group_layout="random"))):
        torch.manual_seed(0)
        task = trainer(tmp_path / str(index), OneImageTeacher(disc()), options)
        assert not task.context.camera_condition and task.context.views_per_group == 1
        scenes.append(task.train().state_dict())
    assert all(torch.equal(scenes[0][name], scenes[1][name]) for name in scenes[0])
    unasked = trainer(tmp_path / "unasked", teacher, plain).context
    conditioning = unasked.prompt_conditionings(ring(4)).by_name["conditional"]
    assert not conditioning.extras and conditioning.views == 1


# Orientation


@pytest.fixture(scope="module")
def scene() -> NeRF:
    """A scene without rotational symmetry."""
    torch.manual_seed(0)
    nerf = NeRF(NerfOptions())
    with torch.no_grad():
        for parameter in nerf.field.parameters():
            parameter += 0.5 * torch.randn(parameter.shape)
    nerf.update(0)
    return nerf


@pytest.mark.parametrize(("turns", "group"), [(0, 1), (1, 1), (2, 1), (3, 4), (2, 4)])
def test_orientation_by_pose_finds_the_turn(turns: int, group: int, scene: NeRF, tmp_path: Path) -> None:
    """What the scene shows from azimuth a, the teacher expects from a + 90 turns; no view words are given."""
    stages = with_stages(OPTIONS, orientation=OrientationOptions((OrientationCheck(0.5),))).stages
    grey = replace(OPTIONS, background=(0.7, 0.7), views=4, views_per_group=group)
    options = replace(grey, view_words=False, stages=stages)
    cameras = ring(16, stages["orientation"].elevation, 16)
    images = scene.render(cameras, torch.full((16, 3), 0.7)).rgb
    teacher = CameraTeacher(images.roll(4 * turns, 0), std=0.1)
    task = trainer(tmp_path, teacher, options, scene=NerfOptions())
    task.scene.load_state_dict(scene.state_dict())

    stage = task.stages["orientation"]
    assert stage.align_orientation(OrientationCheck(0.5, margin=1.0), 0) == 0.0  # below the margin
    assert stage.align_orientation(OrientationCheck(0.5), 0) == 90.0 * turns
    assert stage.align_orientation(OrientationCheck(0.5), 0) == 0.0
    assert set(teacher.prompts) == {"a red ball"}
    assert {conditioning.views for _, conditioning in teacher.calls} == {group}
    calls = 3 * 5 * 2
    assert len(teacher.calls) == calls and teacher.nfe == calls * 16 * 4
    assert stage.nfe(0) == 5 * 2 * 16 * 4


def test_a_turn_must_be_significant() -> None:
    """Noise of standard deviation 1 in 160 differences, whose mean is known."""
    noise = torch.randn(10, 16, generator=generator())
    noise = (noise - noise.mean()) / noise.std()
    for reduction, expected in ((0.1, 0), (0.2, 2)):  # 1.3 and 2.5 standard errors
        errors = torch.full((10, 16, 4), 10.0)
        errors[..., 2] -= reduction + noise
        assert quarter_turns(errors, 0.0, 2.0) == expected
        assert quarter_turns(errors, 0.0) == 2
        assert quarter_turns(errors, 0.03) == 0


# Refinement


def test_refinement_gives_poses_and_whole_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sds3d.text_to_3d.stages.sdedit_refinement.CHUNK", 5)
    options = with_stages(
        GROUPED, sdedit_refinement=SDEditRefinementOptions((0.5,), start=0.5, views=6, steps=4)
    )
    task = trainer(tmp_path, camera_teacher(), options)
    stage = task.stages["sdedit_refinement"]
    stage.resample_views(0.5)
    poses = []
    for t, conditioning in task.teacher.calls:
        uncond, cond = conditioning.extras[POSE].chunk(2)
        assert torch.equal(uncond, cond) and conditioning.views == 2 and len(t.unique()) == 1
        poses.append(cond)
    assert [len(pose) for pose in poses] == [4, 4, 2, 2]  # two steps for each chunk
    assert torch.equal(torch.cat(poses[::2])[:, 0], stage.refined.azimuth.deg2rad())
    assert len(stage.refined.elevation.unique()) == 3


def test_views_are_rounded_up_to_whole_groups(tmp_path: Path) -> None:
    refinement = SDEditRefinementOptions((0.5,), views=5, start=0.5, steps=4)
    check = OrientationOptions((OrientationCheck(0.25),), views=9)
    options = with_stages(replace(GROUPED, views=3), orientation=check, sdedit_refinement=refinement)
    teacher = camera_teacher()
    task = trainer(tmp_path, teacher, options)
    task.stages["score_distillation"].sds_step(0, 0.9)
    assert len(teacher.calls[0][0]) == 4
    task.train()
    assert len(task.stages["sdedit_refinement"].refined.images) == 6
    nfe = {name: stage.nfe(2) for name, stage in task.stages.items()}
    assert nfe == {"score_distillation": 2 * 4, "orientation": 5 * 4 * 2 * 10, "sdedit_refinement": 2 * 2 * 6}
    assert teacher.nfe == 4 + task.nfe == 4 + sum(nfe.values())


def test_sizes_without_meaning_raise() -> None:
    with pytest.raises(UserError, match="views_per_group is 0"):
        replace(OPTIONS, views_per_group=0)
    with pytest.raises(UserError, match="min_z_score is -1"):
        OrientationOptions(min_z_score=-1)
