"""A mesh as the condition of an adapter: its images by camera, invalid files, a scene optimised with it."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh
from scene_fixtures import OPTIONS, run_options, with_stages

from distill.control.adapter import make_adapter, save_adapter
from distill.objectives.options import ObjectiveOptions, Term
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from distill.teacher.latent import LatentDiffusionTeacher
from sds3d.export.files import save_mesh
from sds3d.scene.cameras import ring
from sds3d.scene.nerf import NerfOptions
from sds3d.text_to_3d.mesh_control import MeshControl, MeshControlOptions, coarse_mesh
from sds3d.text_to_3d.stages.sdedit_refinement import SDEditRefinementOptions
from sds3d.text_to_3d.trainer import TextTo3d
from sds3d.world.conditions import depth_images, mesh_condition_images, normal_images
from sds3d.world.raycast import RayCaster
from sds3d.world.shapes import make_shape


@pytest.fixture
def chair(tmp_path: Path) -> str:
    """The world's chair as a file, of another size and position."""
    mesh = make_shape("chair").mesh.copy()
    mesh.apply_scale(7.0)
    mesh.apply_translation([3.0, -2.0, 5.0])
    return str(save_mesh(mesh, tmp_path, "chair")[0])


def test_mesh_is_normalised_to_the_worlds_size_and_axes(chair: str) -> None:
    mesh, truth = coarse_mesh(chair), make_shape("chair").mesh
    np.testing.assert_allclose(mesh.bounds, truth.bounds, atol=1e-5)
    images = [mesh_condition_images(RayCaster(each), "depth", ring(4)) for each in (mesh, truth)]
    assert (images[0].int() - images[1].int()).abs().float().mean() < 0.5


def test_depth_of_a_ball() -> None:
    ball, cameras = RayCaster(trimesh.creation.icosphere(4, 0.8)), ring(2, elevation=0.0)
    image = mesh_condition_images(ball, "depth", cameras)[0, 0]
    assert int(image[0, 0]) == 0
    assert (
        int(image[32, 32]) >= 254 and 55 <= int(image[image > 0].min()) < 75
    )  # centre nearest, outline farthest
    offset = 3 * np.tan(np.deg2rad(17.5)) * 12.5 / 32  # of the ray of column 44 where it passes the centre
    across = offset / np.hypot(offset, 3) * 3
    distance = np.sqrt(9 - across**2) - np.sqrt(0.64 - across**2)
    expected = 255 - 200 * (distance - 2.2) / (np.sqrt(9 - 0.64) - 2.2)
    assert int(image[32, 44]) == pytest.approx(expected, abs=4)


def test_silhouette_and_normals_of_a_ball() -> None:
    ball, cameras = RayCaster(trimesh.creation.icosphere(4, 0.8)), ring(2, elevation=0.0)
    silhouette = mesh_condition_images(ball, "silhouette", cameras)
    radius = 32 * np.tan(np.arcsin(0.8 / 3)) / np.tan(np.deg2rad(17.5))  # pixels
    assert float((silhouette[0] > 127).sum()) == pytest.approx(np.pi * radius**2, rel=0.02)

    normals = mesh_condition_images(ball, "normals", cameras)
    for view in normals:  # in camera axes: 127 is zero along right and up, 255 points at the camera
        assert view[:, 32, 32].int().tolist() == pytest.approx([127, 127, 255], abs=6)
        assert int(view[0, 32, 45]) > 160 and int(view[1, 20, 32]) > 160
    assert normals[:, :, 0, 0].sum() == 0


def test_depth_images_are_normalised_per_view() -> None:
    depth = torch.tensor([[[0.0, 2.0, 3.0, 4.0]], [[0.0, 2.0, 2.1, 2.0]], [[0.0, 0.0, 0.0, 0.0]]])
    images = depth_images(depth).flatten(1).tolist()
    assert images == [[0, 255, 155, 55], [0, 255, 215, 255], [0, 0, 0, 0]]  # flat surfaces keep low contrast
    assert normal_images(torch.zeros(1, 1, 1, 3), torch.eye(3)[None]).sum() == 0


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("none.obj", "", "none.obj"),
        ("points.obj", "v 0 0 0\nv 1 0 0\n", "points.obj"),
        ("broken.obj", "v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n", "not finite"),
        ("line.obj", "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n", "is flat"),
        ("triangle.obj", "v 0 0 0\nv 1 0 1\nv 0 1 1\nf 1 2 3\n", "is flat"),
        ("letter.glb", "Dear Sir,", "cannot be read as a mesh"),
        ("letter.doc", "Dear Sir,", "cannot be read as a mesh"),
        ("absent.glb", None, "does not exist"),
    ],
)
def test_invalid_mesh_raises_one_line(name: str, content: str | None, message: str, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        coarse_mesh(tmp_path / name)
    assert "\n" not in str(error.value)


def test_too_many_faces_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_mesh(trimesh.creation.icosphere(3), tmp_path)[0]
    monkeypatch.setattr("sds3d.text_to_3d.mesh_control.MOST_FACES", 1000)
    with pytest.raises(UserError, match="1,280 faces: a coarse mesh of at most 1,000"):
        coarse_mesh(path)


def test_adapter_gets_the_mesh_from_each_camera(
    chair: str, tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", make_adapter(tiny_teacher), "depth", {})
    control = MeshControl(tiny_teacher, MeshControlOptions(chair, str(tmp_path / "adapter")))
    run = Run(run_options(tmp_path / "run", 1), {}, "controlled")
    objective = ObjectiveOptions((Term("teacher", guidance=2.0), Term("noise", -1.0)))
    options = with_stages(replace(OPTIONS, prompt="a red chair"), sdedit_refinement=SDEditRefinementOptions())
    task = TextTo3d(run, tiny_teacher, NerfOptions(), objective, options, control)
    inputs: list[torch.Tensor] = []
    control.control.adapter.register_forward_pre_hook(
        lambda module, args, kwargs: inputs.append(kwargs["controlnet_cond"]), with_kwargs=True
    )

    task.stages["score_distillation"].sds_step(0, 0.5)
    (images,) = inputs
    assert images.shape == (4, 3, 64, 64) and torch.equal(images[:2], images[2:])  # guidance: two a view
    task.stages["sdedit_refinement"].resample_views(0.5)
    assert len(inputs) > 1 and all(torch.equal(later[:16], later[16:]) for later in inputs[1:])
    assert float((images[0] - images[1]).abs().max()) > 0.1
    assert 0.02 < float((images > 0).float().mean()) < 0.5


def test_adapter_of_another_condition_raises(
    chair: str, tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", make_adapter(tiny_teacher), "edges", {})
    with pytest.raises(UserError, match="takes edges: of a mesh there are silhouette, depth, normals"):
        MeshControl(tiny_teacher, MeshControlOptions(chair, str(tmp_path / "adapter")))
