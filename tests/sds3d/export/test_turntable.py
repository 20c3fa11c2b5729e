"""Turntables, videos and contact sheets; files are decoded and compared."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch
import trimesh
from PIL import Image
from torch import Tensor

from distill.runtime.errors import UserError
from distill.runtime.video import save_animation, save_video
from sds3d.export.turntable import Frames, contact_sheet, render_layers, render_mesh, render_views
from sds3d.scene.cameras import Cameras, ring
from sds3d.scene.protocol import RenderedViews
from sds3d.world.raycast import RayCaster


class Compass:
    """A scene whose colour is the camera's azimuth and elevation."""

    device = torch.device("cpu")
    batches: list[int]

    def __init__(self) -> None:
        self.batches = []

    def render(
        self,
        cameras: Cameras,
        background: Tensor | None = None,
        generator: torch.Generator | None = None,
        training: bool = False,
        normals: bool = False,
    ) -> Frames:
        assert not training and not normals and not torch.is_grad_enabled()
        self.batches.append(len(cameras))
        blue = torch.full((len(cameras),), 0.5) if background is None else background[:, 2]
        colour = torch.stack([cameras.azimuth / 360, cameras.elevation / 90, blue], 1)
        size = cameras.resolution
        return Frames(
            colour[:, :, None, None].expand(-1, 3, size, size), torch.ones(len(cameras), 1, size, size)
        )


def video_frames(count: int = 10, height: int = 48, width: int = 64) -> Tensor:
    """A bright block that moves right on a gradient."""
    frames = torch.linspace(0, 0.6, width).expand(count, 3, height, width).clone()
    for index in range(count):
        frames[index, :2, 10:30, 4 * index : 4 * index + 16] = 1
    return frames


def decode(path: Path) -> tuple[dict[str, Any], np.ndarray]:
    reader = imageio_ffmpeg.read_frames(str(path))
    meta = next(reader)
    width, height = meta["size"]
    return meta, np.stack([np.frombuffer(frame, np.uint8).reshape(height, width, 3) for frame in reader])


def test_turntable_starts_at_the_front_and_is_uniform() -> None:
    scene = Compass()
    frames = render_layers(scene, ring(9, 45, 16), background=(0, 0, 0.25))
    assert frames.shape == (9, 3, 16, 16)
    assert torch.allclose(frames[:, 0, 0, 0], torch.arange(9) / 9)
    assert torch.allclose(frames[:, 1:, 8, 8], torch.tensor([0.5, 0.25]).expand(9, 2))
    assert sum(scene.batches) == 9 and max(scene.batches) <= 4
    assert render_views(scene, ring(1, 0, 8), None).rgb[0, 2, 0, 0] == 0.5  # its own background


class Ball:
    """A white ball of radius .6 about the origin, by ray casting."""

    device = torch.device("cpu")

    def render(
        self,
        cameras: Cameras,
        background: Tensor,
        generator: None = None,
        training: bool = False,
        normals: bool = False,
    ) -> RenderedViews:
        ball = trimesh.creation.icosphere(4, radius=0.6)
        face, distance, normal = RayCaster(ball).cast(*cameras.rays())
        side = cameras.resolution

        def layer(values: np.ndarray) -> Tensor:
            masked = torch.from_numpy(np.where(face[:, None] >= 0, values, 0)).float()
            return masked.view(len(cameras), side, side, -1).permute(0, 3, 1, 2)

        opacity = layer(np.ones((len(face), 1)))
        rgb = opacity + (1 - opacity) * background[:, :, None, None]
        return RenderedViews(rgb, opacity, layer(distance[:, None]), layer(normal) if normals else None)


def test_layers_are_side_by_side_in_camera_axes() -> None:
    frames = render_layers(Ball(), ring(3, 30, 32), ("rgb", "depth", "normals"), (0.0, 0.0, 0.25))
    assert frames.shape == (3, 3, 32, 96)
    # The nearest point is at distance 2.4, in a range from 2 to 4.
    for first, colour in ((0, (1.0, 1, 1)), (32, (0.8, 0.8, 0.8)), (64, (0.5, 0.5, 1.0))):
        centre = frames[:, :, 15:17, first + 15 : first + 17].mean((2, 3))
        assert torch.allclose(centre, torch.tensor(colour).expand(3, 3), atol=0.03)
        corner = (0.0, 0.0, 0.0 if first == 32 else 0.25)  # the background has no depth
        assert torch.allclose(frames[:, :, 0, first], torch.tensor(corner).expand(3, 3))
    right, up = frames[0, :, 16, 64 + 21], frames[0, :, 10, 64 + 16]
    assert right[0] > 0.7 and abs(float(right[1]) - 0.5) < 0.1
    assert up[1] > 0.7 and abs(float(up[0]) - 0.5) < 0.1
    assert render_layers(Ball(), ring(1, 0, 8), ("normals",)).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(("height", "width"), [(48, 64), (50, 66), (49, 63)])
def test_video_decodes_to_its_frames(tmp_path: Path, height: int, width: int) -> None:
    frames = video_frames(10, height, width)
    path = save_video(frames, tmp_path / "new" / "turn.mp4", fps=12)
    meta, pixels = decode(path)
    assert meta["codec"] == "h264" and meta["pix_fmt"].startswith("yuv420p") and meta["fps"] == 12
    assert pixels.shape == (10, height + height % 2, width + width % 2, 3)  # not rescaled to multiples of 16
    expected = (frames.permute(0, 2, 3, 1) * 255).numpy()
    assert np.abs(pixels[:, :height, :width].astype(float) - expected).mean() < 5
    assert path.read_bytes().index(b"moov") < path.read_bytes().index(b"mdat")


@pytest.mark.parametrize("kind", ["gif", "webp"])
def test_animation_has_its_frames_and_duration(tmp_path: Path, kind: str) -> None:
    frames = video_frames()
    with Image.open(save_animation(frames, tmp_path / f"turn.{kind}", fps=20)) as image:
        for index in (0, 4, 9):
            image.seek(index)
            pixels = np.asarray(image.convert("RGB"), float)
            assert np.abs(pixels - (frames[index].permute(1, 2, 0) * 255).numpy()).mean() < 8
        assert image.n_frames == 10 and image.info["duration"] == 50 and image.info["loop"] == 0


def test_contact_sheet_has_evenly_spaced_frames() -> None:
    frames = torch.arange(12.0)[:, None, None, None].expand(12, 3, 2, 5) / 12
    sheet = contact_sheet(frames, columns=3, rows=2)
    assert sheet.shape == (3, 4, 15)
    assert torch.allclose(sheet[0, ::2, ::5] * 12, torch.tensor([[0.0, 2, 4], [6, 8, 10]]))
    assert contact_sheet(frames, 4).shape == (3, 2, 20)
    with pytest.raises(UserError, match="contact sheet"):
        contact_sheet(frames, 0)


def test_mesh_view_interpolates_colours_and_background() -> None:
    ball = trimesh.creation.icosphere(subdivisions=4, radius=0.6)
    colours = np.full((len(ball.vertices), 4), 255, np.uint8)
    colours[:, :3] = np.round((ball.vertices + 1) / 2 * 255)  # position as colour
    ball.visual.vertex_colors = colours
    views = render_mesh(ball, ring(4, 0.0, 32), background=(0.0, 1.0, 0.0))
    assert views.rgb.shape == (4, 3, 32, 32) and views.opacity.shape == (4, 1, 32, 32)
    centre = views.rgb[:, :, 15:17, 15:17].mean((2, 3))
    near = torch.tensor(
        [[0.8, 0.5, 0.5], [0.5, 0.8, 0.5], [0.2, 0.5, 0.5], [0.5, 0.2, 0.5]]
    )  # +x, +y, -x, -y
    assert torch.allclose(centre, near, atol=0.02)
    assert views.rgb[0, 2, 10, 16] > views.rgb[0, 2, 22, 16]  # z is up
    assert torch.equal(views.rgb[:, :, 0, 0], torch.tensor([0.0, 1, 0]).expand(4, 3))
    assert views.opacity[0, 0, 0, 0] == 0


def test_failing_writers_leave_the_former_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(self: Image.Image, path: Path, **options: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    def interrupted(path: str, *arguments: object, **options: object) -> Iterator[None]:
        Path(path).write_bytes(b"half")
        yield
        yield
        raise OSError("disk full")

    monkeypatch.setattr(Image.Image, "save", broken)
    monkeypatch.setattr(imageio_ffmpeg, "write_frames", interrupted)
    for save, name in ((save_animation, "turn.gif"), (save_video, "turn.mp4")):
        (tmp_path / name).write_bytes(b"older")
        with pytest.raises(OSError, match="disk full"):
            save(video_frames(), tmp_path / name)
        assert (tmp_path / name).read_bytes() == b"older"
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("save", [save_video, save_animation])
def test_invalid_frames_rates_and_names_raise(tmp_path: Path, save: Callable[..., Path]) -> None:
    name = "turn.mp4" if save is save_video else "turn.gif"
    for frames, fps, file, message in (
        (video_frames()[0], 24, name, "shape"),
        (video_frames()[:0], 24, name, "at least one frame"),
        (video_frames(), 0, name, "fps is 0"),
        (video_frames(), 24, "turn.avi", "must end in"),
    ):
        with pytest.raises(UserError, match=message):
            save(frames, tmp_path / file, fps)


def test_missing_ffmpeg_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing() -> str:
        raise RuntimeError("No ffmpeg exe could be found")

    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", missing)
    with pytest.raises(UserError, match="pip install imageio-ffmpeg"):
        save_video(video_frames(), tmp_path / "turn.mp4")
