"""A mesh as an adapter's picture: what it looks like from a camera, bad files in one sentence, and a scene driven by it."""

from pathlib import Path

import numpy as np
import pytest
import torch
import trimesh

from distill.control.adapter import make_adapter, save_adapter
from distill.objectives.options import ObjectiveOptions, Term
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import Teacher
from sds3d.export.files import save_mesh
from sds3d.scene.cameras import ring
from sds3d.scene.nerf import SceneOptions
from sds3d.text_to_3d.mesh_control import MeshControl, MeshControlOptions, coarse_mesh
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions
from sds3d.world.conditions import depth_pictures, mesh_pictures, normal_pictures
from sds3d.world.shapes import make_shape


@pytest.fixture
def chair(tmp_path: Path) -> str:
    """The world's chair as a file of another size and place."""
    mesh = make_shape("chair").mesh.copy()
    mesh.apply_scale(7.0)
    mesh.apply_translation([3.0, -2.0, 5.0])
    return str(save_mesh(mesh, tmp_path, "chair")[0])


def test_a_mesh_is_brought_to_the_worlds_size_and_axes(chair: str) -> None:
    ours, truth = coarse_mesh(chair), make_shape("chair").mesh
    np.testing.assert_allclose(ours.bounds, truth.bounds, atol=1e-5)
    same = [mesh_pictures(mesh, "depth", ring(4)) for mesh in (ours, truth)]
    assert (same[0].int() - same[1].int()).abs().float().mean() < 0.5


def test_pictures_of_a_ball() -> None:
    ball, cameras = trimesh.creation.icosphere(4, 0.8), ring(2, elevation=0.0)
    deep = mesh_pictures(ball, "depth", cameras)
    assert int(deep[0, 0, 0, 0]) == 0
    seen = deep[0, 0][deep[0, 0] > 0]
    assert (
        int(deep[0, 0, 32, 32]) >= 254 and 55 <= int(seen.min()) < 75
    )  # its middle is nearest, its outline farthest
    offset = (
        3 * np.tan(np.deg2rad(17.5)) * 12.5 / 32
    )  # of the ray through column 44, where it passes the centre
    across = offset / np.hypot(offset, 3) * 3
    distance = np.sqrt(9 - across**2) - np.sqrt(0.64 - across**2)
    assert int(deep[0, 0, 32, 44]) == pytest.approx(
        255 - 200 * (distance - 2.2) / (np.sqrt(9 - 0.64) - 2.2), abs=4
    )
    outline = mesh_pictures(ball, "silhouette", cameras)
    reach = 32 * np.tan(np.arcsin(0.8 / 3)) / np.tan(np.deg2rad(17.5))  # pixels
    assert float((outline[0] > 127).sum()) == pytest.approx(np.pi * reach**2, rel=0.02)
    facing = mesh_pictures(ball, "normals", cameras)
    for view in facing:  # towards every camera alike: right and up are half way, towards the camera is full
        assert view[:, 32, 32].int().tolist() == pytest.approx([127, 127, 255], abs=6)
        assert (
            int(view[0, 32, 45]) > 160 and int(view[1, 20, 32]) > 160
        )  # the right side faces right, the top up
    assert facing[:, :, 0, 0].sum() == 0
    shown = (
        depth_pictures(torch.tensor([[[0.0, 2.0, 3.0, 4.0]], [[0.0, 2.0, 2.1, 2.0]], [[0.0, 0.0, 0.0, 0.0]]]))
        .flatten(1)
        .tolist()
    )
    assert shown == [[0, 255, 155, 55], [0, 255, 215, 255], [0, 0, 0, 0]]  # stretched; a flat face is not
    assert normal_pictures(torch.zeros(1, 1, 1, 3), torch.eye(3)[None]).sum() == 0


def test_bad_meshes_are_one_sentence_each(tmp_path: Path) -> None:
    def written(name: str, text: str) -> Path:
        (tmp_path / name).write_text(text)
        return tmp_path / name

    flat = "v 0 0 0\nv 1 0 0\nv 2 0 0\nf 1 2 3\n"
    cases = [
        (written("none.obj", ""), "none.obj"),
        (written("points.obj", "v 0 0 0\nv 1 0 0\n"), "points.obj"),
        (written("broken.obj", "v 0 0 0\nv nan 0 0\nv 0 1 0\nf 1 2 3\n"), "not finite"),
        (written("line.obj", flat), "no extent"),
        (written("letter.glb", "Dear Sir,"), "cannot be read as a mesh"),
        (written("letter.doc", "Dear Sir,"), "cannot be read as a mesh"),
        (tmp_path / "absent.glb", "does not exist"),
    ]
    for path, said in cases:
        with pytest.raises(UserError, match=said) as told:
            coarse_mesh(path)
        assert "\n" not in str(told.value)


def test_millions_of_faces_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_mesh(trimesh.creation.icosphere(3), tmp_path)[0]
    monkeypatch.setattr("sds3d.text_to_3d.mesh_control.MOST_FACES", 1000)
    with pytest.raises(UserError, match="1,280 faces: a coarse mesh of at most 1,000"):
        coarse_mesh(path)


def test_a_scene_is_driven_through_the_adapter(chair: str, tiny_teacher: Teacher, tmp_path: Path) -> None:
    save_adapter(tmp_path / "adapter", make_adapter(tiny_teacher), "depth", {})
    control, options = (
        MeshControl(tiny_teacher, MeshControlOptions(chair, str(tmp_path / "adapter"))),
        TextTo3dOptions("a red chair", views=2),
    )
    run = Run(RunOptions(str(tmp_path / "run"), 1, trackers=()), {}, "controlled")
    objective = ObjectiveOptions((Term("teacher", guidance=2.0), Term("noise", -1.0)))
    made = TextTo3d(run, tiny_teacher, SceneOptions(), objective, options, control)
    seen: list[torch.Tensor] = []
    adapter = control.control.adapter
    adapter.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["controlnet_cond"]), with_kwargs=True
    )
    made.step(0.5, 0)
    (pictures,) = seen
    assert pictures.shape == (4, 3, 64, 64) and torch.equal(
        pictures[:2], pictures[2:]
    )  # guidance asks twice, of the same views
    made.redraw(0.5)
    assert len(seen) > 1 and all(
        torch.equal(later[:16], later[16:]) for later in seen[1:]
    )  # and is shown what is drawn over
    assert (
        float((pictures[0] - pictures[1]).abs().max()) > 0.1
        and 0.02 < float((pictures > 0).float().mean()) < 0.5
    )


def test_an_adapter_that_reads_no_geometry_is_refused(
    chair: str, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "adapter", make_adapter(tiny_teacher), "edges", {})
    with pytest.raises(UserError, match="takes edges: of a mesh there are silhouette, depth, normals"):
        MeshControl(tiny_teacher, MeshControlOptions(chair, str(tmp_path / "adapter")))
