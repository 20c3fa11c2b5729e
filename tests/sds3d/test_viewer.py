"""The viewer: a viewport as a camera, newer scenes loaded, and an end-to-end test in a browser."""

import io
import math
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from command_line import ROOT
from PIL import Image
from trimesh.transformations import quaternion_from_matrix

from distill.runtime.checkpoint import checkpoint_path, save_state
from distill.runtime.errors import UserError
from distill.runtime.files import write_json
from distill.runtime.precision import Precision
from distill.teacher.latent import LatentDiffusionTeacher
from sds3d.scene.cameras import orbit
from sds3d.scene.nerf import GridOptions, NeRF, NerfOptions
from sds3d.viewer import OPENGL_TO_OPENCV, Viewer, ViewerOptions, Viewport

CPU = Precision(torch.device("cpu"), torch.float32)
CHROMIUM = shutil.which("chromium")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def viewport(azimuth: float, elevation: float, aspect: float = 1.0, fovy: float = 35.0) -> Viewport:
    camera = orbit(*(torch.tensor([v]) for v in (azimuth, elevation, 3.0, fovy)), 16)
    pose = np.eye(4)
    pose[:3, :3] = camera.rotation[0].double().numpy() @ OPENGL_TO_OPENCV
    wxyz, position = tuple(quaternion_from_matrix(pose)), tuple(camera.position[0].tolist())
    return Viewport(wxyz, position, math.radians(fovy), aspect)


def blob() -> NeRF:
    """Untrained: a grey blob in the centre of the box."""
    torch.manual_seed(0)
    scene = NerfOptions(grid=GridOptions(resolution=16)).build()
    scene.update(0, torch.Generator().manual_seed(0))
    return scene


@pytest.fixture
def run(tmp_path: Path, tiny_teacher: LatentDiffusionTeacher) -> Path:
    camera = {
        "elevation": [-10, 70],
        "azimuth": [-180, 180],
        "distance": [2.75, 3.25],
        "fovy": [35, 35],
        "centre_jitter": 0.0,
        "resolution": 64,  # as in runs of earlier versions
    }
    options = {"prompt": "a red cube", "camera": camera, "view_words": True}
    write_json(
        tmp_path / "run" / "config.json",
        {"text_to_3d": options, "teacher": tiny_teacher.name_or_path, "run": {"seed": 0}},
    )
    blob().save(tmp_path / "run" / "scene")
    return tmp_path / "run"


@pytest.mark.parametrize(("azimuth", "elevation"), [(0.0, 0.0), (130.0, 25.0), (-60.0, -40.0)])
def test_viewport_converts_to_its_camera(azimuth: float, elevation: float) -> None:
    expected = orbit(*(torch.tensor([v]) for v in (azimuth, elevation, 3.0, 35.0)), 16)
    camera = viewport(azimuth, elevation).camera(16)
    for one, other in zip(camera.rays(), expected.rays(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    angles = torch.stack([camera.azimuth, camera.elevation])
    torch.testing.assert_close(angles, torch.tensor([[azimuth], [elevation]]), atol=1e-3, rtol=0)


def test_wide_viewport_is_the_centre_of_a_square() -> None:
    """The field of view is vertical: it ends at the upper edge of the crop."""
    wide, tall = viewport(0, 0, aspect=2.0), viewport(0, 0, aspect=0.5)
    _, directions = wide.camera(400).rays()
    rows = wide.crop(directions[0].numpy())
    assert rows.shape == (200, 400, 3) and tall.crop(np.zeros((400, 400, 3))).shape == (400, 200, 3)
    up = math.degrees(math.asin(rows[0, 200, 2]))
    assert up == pytest.approx(35 / 2, abs=0.2)
    assert float(tall.camera(400).fovy) == pytest.approx(math.radians(35))


@dataclass
class Browser:
    """A client with a fixed viewport, which records its images."""

    viewport: Viewport
    images: list[np.ndarray] = field(default_factory=list)

    @property
    def camera(self) -> Viewport:
        return self.viewport

    @property
    def scene(self) -> Any:
        return SimpleNamespace(set_background_image=lambda image, *_, **__: self.images.append(image))


@pytest.fixture
def viewer(run: Path) -> Iterator[Viewer]:
    options = ViewerOptions(port=free_port(), moving_resolution=16, still_resolution=32, poll=1e-6)
    viewer = Viewer(run, options, CPU)
    yield viewer
    viewer.server.stop()


def test_renders_at_low_resolution_then_once_at_full_resolution(
    viewer: Viewer, monkeypatch: pytest.MonkeyPatch
) -> None:
    browser = Browser(viewport(0, 20))
    monkeypatch.setattr(viewer.server, "get_clients", lambda: {7: browser})
    for _ in range(4):
        viewer.update()
    assert [len(image) for image in browser.images] == [16, 32]
    browser.viewport = viewport(30, 20)
    viewer.update()
    assert [len(image) for image in browser.images] == [16, 32, 16]


def test_newer_checkpoint_is_loaded(viewer: Viewer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = Browser(viewport(0, 20))
    monkeypatch.setattr(viewer.server, "get_clients", lambda: {7: browser})
    viewer.update()
    viewer.update()
    shutil.rmtree(run / "scene")  # the run goes on
    write_json(run / "config.json", {**viewer.config, "scene": {"grid": {"resolution": 16}}})
    empty = blob()
    empty.grid.set_densities(torch.zeros(16, 16, 16), torch.zeros(16, 16, 16))
    save_state(checkpoint_path(run / "checkpoints", 50), {"parts": {"scene": empty.state_dict()}})
    viewer.update()
    viewer.update()
    assert "step 00000050" in viewer.status.content
    before, after = browser.images[1], browser.images[-1]
    assert np.ptp(before) > 20 and np.ptp(after) <= 2  # an empty box


def test_prediction_depends_on_viewport_and_noise(viewer: Viewer) -> None:
    first = viewer.predict_view(viewport(0, 20, aspect=1.6))
    second = viewer.predict_view(viewport(90, 20, aspect=1.6))
    assert first.shape == (64, 128, 3) and not np.array_equal(first[:, 64:], second[:, 64:])
    viewer.noise.value = 0.02
    assert np.abs(viewer.predict_view(viewport(0, 20))[:, 64:].astype(int) - first[:, 64:]).max() > 5


def test_directory_without_a_run_raises(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        Viewer(tmp_path, ViewerOptions(), CPU)
    shutil.rmtree(run / "scene")
    with pytest.raises(UserError, match="neither a scene nor a checkpoint"):
        Viewer(run, ViewerOptions(), CPU)
    with pytest.raises(UserError, match="a port from 1"):
        ViewerOptions(port=0)


def mean_colour(page: Any) -> np.ndarray:
    """Mean (3,) of the centre of the page, left of the panel."""
    pixels = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), float)
    return pixels[250:350, 400:500].mean((0, 1))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")
def test_browser_shows_scene_true_mesh_and_prediction(run: Path, tmp_path: Path) -> None:
    playwright = pytest.importorskip("playwright.sync_api", reason='needs pip install -e ".[browser]"')
    port = free_port()
    command = [
        sys.executable,
        str(ROOT / "scripts" / "view.py"),
        f"run_directory={run}",
        f"viewer.port={port}",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        assert server.stdout is not None and any("open http" in line for line in server.stdout)
        with playwright.sync_playwright() as driver:
            flags = [
                "--no-sandbox",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
                "--disable-quic",
            ]
            flags += ["--use-gl=angle", "--use-angle=swiftshader", "--enable-unsafe-swiftshader"]
            browser = driver.chromium.launch(executable_path=CHROMIUM, args=flags)
            page = browser.new_page(viewport={"width": 900, "height": 600})
            page.goto(f"http://127.0.0.1:{port}")
            page.get_by_text("finished").wait_for(timeout=60_000)

            def until(condition: Callable[[], Any]) -> bool:
                return any(time.sleep(0.5) or condition() for _ in range(60))

            assert until(lambda: np.abs(mean_colour(page) - 217).max() > 20)  # the blob on grey
            page.get_by_role("textbox", name="show").or_(page.locator("input[value=scene]")).first.click()
            page.get_by_role("option", name="true mesh").click()
            assert until(lambda: mean_colour(page)[0] > 1.5 * mean_colour(page)[1:].max())  # a red cube
            before = page.locator("img").last.get_attribute("src")
            page.get_by_text("predict this view").click()
            assert until(lambda: page.locator("img").last.get_attribute("src") != before)
            browser.close()
    finally:
        server.terminate()
        server.wait()
