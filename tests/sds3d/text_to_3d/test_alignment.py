"""A picture's camera, found by comparing the picture with a scene."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from torch import Tensor

from sds3d.scene.cameras import Cameras
from sds3d.scene.protocol import RenderedViews
from sds3d.text_to_3d.alignment import align_picture, picture_camera
from sds3d.text_to_3d.picture import CutOut, silhouette_bounds
from sds3d.world.raycast import RayCaster, render
from sds3d.world.shapes import make_shape


class MeshScene:
    """Renders of the true mesh, all that alignment needs of a scene."""

    device = torch.device("cpu")

    def __init__(self, name: str, colour: Sequence[float] = (0.8, 0.7, 0.1)) -> None:
        shape = make_shape(name)
        self.caster, self.albedo = RayCaster(shape.mesh), shape.albedo(np.array(colour))

    def rgba(self, camera: Cameras) -> np.ndarray:
        return render(self.caster, self.albedo, camera, 1).rgba

    def render(self, cameras: Cameras, background: Tensor) -> RenderedViews:
        rgba = torch.stack([torch.from_numpy(self.rgba(camera)).float() for camera in cameras.split(1)])
        rgb, alpha = rgba.permute(0, 3, 1, 2).split([3, 1], 1)
        over = rgb * alpha + background[:, :, None, None] * (1 - alpha)
        return RenderedViews(rgb=over, opacity=alpha, depth=alpha, normal=None)


@pytest.mark.parametrize(("name", "angles"), [("chair", (155.0, 12.0)), ("car", (-70.0, 38.0))])
def test_the_camera_of_a_picture_is_found(name: str, angles: tuple[float, float]) -> None:
    """Whatever its size and place in the file; and where it lies in the scene's views."""
    scene = MeshScene(name)
    rgba = np.pad(scene.rgba(picture_camera(*angles, 160)), ((10, 50), (70, 0), (0, 0)))
    alignment = align_picture(scene, CutOut(rgba[..., :3], rgba[..., 3], "x"), 64)  # type: ignore[arg-type]
    assert alignment is not None
    assert alignment.azimuth == pytest.approx(angles[0], abs=2)
    assert alignment.elevation == pytest.approx(angles[1], abs=2)
    view = torch.from_numpy(scene.rgba(picture_camera(*angles, 64))[None, ..., 3])
    (centre,), (radius,) = silhouette_bounds(view)
    expected = [*(centre / 32 - 1).tolist(), float(radius) / 32]
    assert [alignment.frame.right, alignment.frame.down, alignment.frame.extent] == pytest.approx(
        expected, abs=0.03
    )


def test_a_given_elevation_is_kept() -> None:
    scene = MeshScene("teapot")
    rgba = scene.rgba(picture_camera(40.0, 25.0, 128))
    alignment = align_picture(scene, CutOut(rgba[..., :3], rgba[..., 3], "x"), 48, elevation=20.0)  # type: ignore[arg-type]
    assert alignment is not None and alignment.elevation == 20.0
    assert alignment.azimuth == pytest.approx(40.0, abs=5)


def test_an_empty_scene_has_no_alignment() -> None:
    class Empty(MeshScene):
        def rgba(self, camera: Cameras) -> np.ndarray:
            return np.zeros((camera.resolution, camera.resolution, 4))

    cut_out = CutOut(np.ones((40, 40, 3)), np.ones((40, 40)), "x")
    assert align_picture(Empty("cube"), cut_out, 16) is None  # type: ignore[arg-type]
