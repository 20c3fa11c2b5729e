"""The viewer: a browser's window as a camera, a newer scene taken up, and all of it once in a real browser."""

import io
import math
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
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
from distill.teacher.latent import Teacher
from sds3d.scene.cameras import orbit
from sds3d.scene.nerf import GridOptions, Scene, SceneOptions
from sds3d.viewer import TO_CV, Viewer, ViewerOptions, Window

CHROMIUM = shutil.which("chromium")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def window(azimuth: float, elevation: float, aspect: float = 1.0, fovy: float = 35.0) -> Window:
    camera = orbit(*(torch.tensor([v]) for v in (azimuth, elevation, 3.0, fovy)), 16)
    turn = np.eye(4)
    turn[:3, :3] = camera.rotation[0].double().numpy() @ TO_CV
    return Window(
        tuple(quaternion_from_matrix(turn)), tuple(camera.position[0].tolist()), math.radians(fovy), aspect
    )


def scene() -> Scene:
    """Untrained: a grey blob in the middle of the box, which is enough to see it come and go."""
    torch.manual_seed(0)
    made = Scene(SceneOptions(grid=GridOptions(resolution=16)))
    made.update(0, torch.Generator().manual_seed(0))
    return made


@pytest.fixture
def run(tmp_path: Path, tiny_teacher: Teacher) -> Path:
    camera = {
        "elevation": [-10, 70],
        "azimuth": [-180, 180],
        "distance": [2.75, 3.25],
        "fovy": [35, 35],
        "centre_jitter": 0.0,
        "resolution": 64,
    }
    options = {"prompt": "a red cube", "camera": camera, "view_words": True}
    write_json(
        tmp_path / "run" / "config.json",
        {"text_to_3d": options, "teacher": tiny_teacher.place, "run": {"seed": 0}},
    )
    scene().save(tmp_path / "run" / "scene")
    return tmp_path / "run"


@pytest.mark.parametrize(("azimuth", "elevation"), [(0.0, 0.0), (130.0, 25.0), (-60.0, -40.0)])
def test_a_window_is_the_camera_that_stands_there(azimuth: float, elevation: float) -> None:
    wanted = orbit(*(torch.tensor([v]) for v in (azimuth, elevation, 3.0, 35.0)), 16)
    found = window(azimuth, elevation).camera(16)
    for one, other in zip(found.rays(), wanted.rays(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        torch.stack([found.azimuth, found.elevation]),
        torch.tensor([[azimuth], [elevation]]),
        atol=1e-3,
        rtol=0,
    )


def test_a_wide_window_is_the_middle_of_a_square() -> None:
    """The window's own field of view is vertical: the crop's upper edge must look along it."""
    wide, tall = window(0, 0, aspect=2.0), window(0, 0, aspect=0.5)
    _, directions = wide.camera(400).rays()
    rows = wide.crop(directions[0].numpy())
    assert rows.shape == (200, 400, 3) and tall.crop(np.zeros((400, 400, 3))).shape == (400, 200, 3)
    up = math.degrees(math.asin(rows[0, 200, 2]))
    assert up == pytest.approx(35 / 2, abs=0.2)
    assert float(tall.camera(400).fovy) == pytest.approx(math.radians(35))


@dataclass
class Browser:
    """A client that stands still, and what it was shown."""

    window: Window
    shown: list[np.ndarray] = field(default_factory=list)

    @property
    def camera(self) -> Window:
        return self.window

    @property
    def scene(self) -> Any:
        return SimpleNamespace(set_background_image=lambda image, *_, **__: self.shown.append(image))


@pytest.fixture
def viewer(run: Path) -> Iterator[Viewer]:
    made = Viewer(run, ViewerOptions(port=free_port(), moving=16, still=32, poll=1e-6))
    yield made
    made.server.stop()


def test_it_draws_coarsely_then_finely_then_rests(viewer: Viewer, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = Browser(window(0, 20))
    monkeypatch.setattr(viewer.server, "get_clients", lambda: {7: browser})
    for _ in range(4):
        viewer.tick()
    assert [len(image) for image in browser.shown] == [16, 32]
    browser.window = window(30, 20)
    viewer.tick()
    assert [len(image) for image in browser.shown] == [16, 32, 16]


def test_a_newer_checkpoint_is_taken_up(viewer: Viewer, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    browser = Browser(window(0, 20))
    monkeypatch.setattr(viewer.server, "get_clients", lambda: {7: browser})
    viewer.tick()
    viewer.tick()
    shutil.rmtree(run / "scene")  # the run goes on
    write_json(run / "config.json", {**viewer.config, "scene": {"grid": {"resolution": 16}}})
    empty = scene()
    empty.grid.set_densities(torch.zeros(16, 16, 16), torch.zeros(16, 16, 16))
    save_state(checkpoint_path(run / "checkpoints", 50), {"parts": {"scene": empty.state_dict()}})
    viewer.tick()
    viewer.tick()
    assert "step 00000050" in viewer.told.content
    before, after = browser.shown[1], browser.shown[-1]
    assert np.ptp(before) > 20 and np.ptp(after) <= 2  # nothing is left in the box


def test_the_teacher_answers_from_where_the_window_is(viewer: Viewer) -> None:
    told = viewer.teachers_view(window(0, 20, aspect=1.6))
    again = viewer.teachers_view(window(90, 20, aspect=1.6))
    assert told.shape == (64, 128, 3) and not np.array_equal(told[:, 64:], again[:, 64:])
    viewer.noise.value = 0.02
    assert np.abs(viewer.teachers_view(window(0, 20))[:, 64:].astype(int) - told[:, 64:]).max() > 5


def test_what_is_no_run_is_refused(tmp_path: Path, run: Path) -> None:
    with pytest.raises(UserError, match=r"holds no config\.json"):
        Viewer(tmp_path, ViewerOptions())
    shutil.rmtree(run / "scene")
    with pytest.raises(UserError, match="neither a scene nor a checkpoint"):
        Viewer(run, ViewerOptions())
    with pytest.raises(UserError, match="a port from 1"):
        ViewerOptions(port=0)


def mean_colour(page: Any) -> np.ndarray:
    """Of the middle of the page (3,), left of the panel."""
    picture = np.asarray(Image.open(io.BytesIO(page.screenshot())).convert("RGB"), float)
    return picture[250:350, 400:500].mean((0, 1))


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine (apt-get install chromium)")
def test_a_real_browser_sees_scene_truth_and_answer(run: Path, tmp_path: Path) -> None:
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

            def until(good: Any) -> bool:
                return any(time.sleep(0.5) or good() for _ in range(60))

            assert until(lambda: np.abs(mean_colour(page) - 217).max() > 20)  # the blob, in front of grey
            page.get_by_role("textbox", name="show").or_(page.locator("input[value=NeRF]")).first.click()
            page.get_by_role("option", name="truth").click()
            assert until(lambda: mean_colour(page)[0] > 1.5 * mean_colour(page)[1:].max())  # a red cube
            before = page.locator("img").last.get_attribute("src")
            page.get_by_text("ask it from here").click()
            assert until(lambda: page.locator("img").last.get_attribute("src") != before)
            browser.close()
    finally:
        server.terminate()
        server.wait()
