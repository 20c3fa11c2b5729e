"""A text-to-3D run in a browser (viser), during training and after.

Shows the scene, its mesh, the true mesh, the training cameras, and the teacher's prediction for a view.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from trimesh.transformations import quaternion_from_matrix, quaternion_matrix

from distill.core.score import Guided
from distill.core.teacher import Teacher
from distill.runtime.checkpoint import checkpoints
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.images import to_bytes
from distill.runtime.precision import Precision
from distill.teacher.load import load_teacher
from sds3d.evaluation.subjects import has_truth, truth_of
from sds3d.export.export import scene_of_run
from sds3d.export.files import load_mesh
from sds3d.export.turntable import GREY, render_views
from sds3d.scene.cameras import CameraOptions, Cameras, sample_cameras
from sds3d.scene.protocol import Scene3D
from sds3d.text_to_3d.prompts import view_of, view_prompt

SCENE = "scene"
MESHES = ("mesh", "true mesh")
FRUSTUMS = 24
OPENGL_TO_OPENCV = np.diag([1.0, -1.0, -1.0])  # right, up, backward <-> right, down, forward


@dataclass(frozen=True)
class ViewerOptions:
    """The viewer's server and renders. Raises `UserError` for a value out of range."""

    host: str = "127.0.0.1"
    port: int = 8080
    moving_resolution: int = 64  # pixels of the longer side while the camera moves
    still_resolution: int = 224  # and when it stands still
    poll: float = 2.0  # seconds between checks for a newer checkpoint

    def __post_init__(self) -> None:
        resolution = min(self.moving_resolution, self.still_resolution)
        if not 0 < self.port < 65536 or resolution < 16 or self.poll <= 0:
            raise UserError("the viewer needs a port from 1 to 65535, at least 16 pixels and a positive poll")


@dataclass(frozen=True)
class Viewport:
    """The camera of a browser window."""

    wxyz: tuple[float, ...]  # orientation, a quaternion of axes right, down, forward
    position: tuple[float, ...]
    fov: float  # vertical, radians
    aspect: float  # width / height

    def camera(self, resolution: int, fovy: float | None = None) -> Cameras:
        """One square camera that covers the viewport, or with a field of view `fovy` in radians.

        `resolution` is that of the viewport's longer side.
        """
        position = torch.tensor(self.position, dtype=torch.float32)
        rotation = torch.from_numpy(quaternion_matrix(self.wxyz)[:3, :3] @ OPENGL_TO_OPENCV).float()
        azimuth = torch.atan2(position[1], position[0]).rad2deg()
        elevation = torch.asin(position[2] / position.norm().clamp_min(1e-6)).rad2deg()
        half_width = np.tan(self.fov / 2) * max(self.aspect, 1.0)
        fov = torch.tensor([2 * np.arctan(half_width) if fovy is None else fovy], dtype=torch.float32)
        return Cameras(position[None], azimuth[None], elevation[None], rotation[None], fov, resolution)

    def crop(self, image: np.ndarray) -> np.ndarray:
        """The part (H, W, 3) of that camera's square image that is in the viewport."""
        side = len(image)
        height = round(side / self.aspect) if self.aspect >= 1 else side
        width = side if self.aspect >= 1 else round(side * self.aspect)
        top, left = (side - height) // 2, (side - width) // 2
        return image[top : top + height, left : left + width]


class Viewer:
    """A server for a run's directory. `update` handles pending work, `serve` does so until interrupted."""

    def __init__(self, directory: Path | str, options: ViewerOptions, precision: Precision) -> None:
        """The scene is rendered on the precision's device, the teacher has weights of its dtype.

        Raises `UserError` for a directory without a scene, and where viser is not installed.
        """
        try:
            import viser
        except ImportError:
            raise UserError('viser is not installed: pip install -e ".[viewer]"') from None
        self.directory, self.options, self.precision = Path(directory), options, precision
        if not (self.directory / "config.json").is_file():
            raise UserError(f"{directory} holds no config.json: give the directory of a text_to_3d run")
        self.config = read_json(self.directory / "config.json")
        self.prompt = self.config["text_to_3d"]["prompt"]
        self.scene, self.version = self._load_scene(), self._newest_version()
        self.teacher: Teacher | None = None
        self.query: Viewport | None = None  # for which a prediction was requested
        self.frames: dict[int, tuple[Any, int]] = {}  # by client: state and resolution of its image
        self.last_poll = time.monotonic()

        self.server = viser.ViserServer(options.host, options.port, label=self.prompt, verbose=False)
        self.server.scene.set_up_direction("+z")
        self.server.initial_camera.position = (2.6, 0.9, 1.1)
        self.server.initial_camera.look_at = (0.0, 0.0, 0.0)
        self.meshes: dict[str, Any] = {}
        self._add_controls()
        self._add_meshes()
        self._add_frustums()

    def _load_scene(self) -> Scene3D:
        return scene_of_run(self.directory, str(self.precision.device))

    def _newest_version(self) -> tuple[str, float]:
        """Name and time of the finished scene, else of the newest checkpoint."""
        path = self.directory / "scene" / "scene.json"
        if not path.is_file():
            path = next(reversed(checkpoints(self.directory / "checkpoints")), self.directory)
        return path.stem, path.stat().st_mtime

    def _add_controls(self) -> None:
        gui = self.server.gui
        self.status = gui.add_markdown("")
        names = (SCENE, *MESHES) if has_truth(self.prompt) else (SCENE, MESHES[0])
        self.subject = gui.add_dropdown("show", names)
        self.show_cameras = gui.add_checkbox("training cameras", False)
        with gui.add_folder("teacher's prediction"):
            self.noise = gui.add_slider("noise level t", 0.02, 0.98, 0.02, 0.5)
            self.guidance = gui.add_slider("guidance", 1.0, 20.0, 0.5, 7.5)
            button = gui.add_button("predict this view")
            self.prediction = gui.add_image(np.zeros((64, 128, 3), np.uint8), label="render, x0")
        button.on_click(lambda event: self._set_query(event.client))
        self._update_status()

    def _set_query(self, client: Any) -> None:
        if client is not None:
            self.query = viewport_of(client)

    def _update_status(self) -> None:
        progress = self.version[0].replace("step_", "step ").replace("scene", "finished")
        self.status.content = f"**{self.prompt}**\n\n{self.directory}\n\n{progress}"

    def _add_meshes(self) -> None:
        """Add the run's mesh where there is one, and once the true mesh, both invisible."""
        scene, (name, true_name) = self.server.scene, MESHES
        if (self.directory / "mesh.glb").is_file():
            mesh = load_mesh(self.directory / "mesh.glb")
            self.meshes[name] = scene.add_mesh_trimesh("/mesh", mesh, visible=False)
        if true_name not in self.meshes and has_truth(self.prompt):
            shape, albedo = truth_of(self.prompt)
            mesh = trimesh.Trimesh(shape.mesh.vertices, shape.mesh.faces, process=False)
            colours = np.round(albedo * 255).astype(np.uint8)
            mesh.visual = trimesh.visual.ColorVisuals(mesh, face_colors=colours)
            self.meshes[true_name] = scene.add_mesh_trimesh("/true_mesh", mesh, visible=False)

    def _add_frustums(self) -> None:
        """Add cameras from the distribution of the run's training cameras."""
        ranges = dict(self.config["text_to_3d"]["camera"])
        ranges.pop("resolution", None)  # in older runs
        generator = torch.Generator().manual_seed(self.config["run"]["seed"])
        cameras = sample_cameras(build(CameraOptions, ranges, "camera"), FRUSTUMS, 64, generator)
        self.frustums = []
        for index, camera in enumerate(cameras.split(1)):
            pose = np.eye(4)
            pose[:3, :3] = camera.rotation[0].double().numpy() @ OPENGL_TO_OPENCV
            handle = self.server.scene.add_camera_frustum(
                f"/cameras/{index}",
                float(camera.fovy),
                1.0,
                scale=0.12,
                wxyz=quaternion_from_matrix(pose),
                position=tuple(camera.position[0].tolist()),
                visible=False,
            )
            self.frustums.append(handle)

    def update(self) -> None:
        """Load a newer scene, render for browsers whose camera has moved, and predict a requested view."""
        if time.monotonic() - self.last_poll > self.options.poll:
            self.last_poll = time.monotonic()
            if (version := self._newest_version()) != self.version:
                self.scene, self.version = self._load_scene(), version
                self._add_meshes()
                self._update_status()

        subject: str = self.subject.value
        for name, handle in self.meshes.items():
            handle.visible = name == subject
        for handle in self.frustums:
            handle.visible = self.show_cameras.value

        clients = self.server.get_clients()
        self.frames = {index: frame for index, frame in self.frames.items() if index in clients}
        for index, client in clients.items():
            self._render(index, client, subject)
        if self.query is not None:
            viewport, self.query = self.query, None
            self.prediction.image = self.predict_view(viewport)

    def _render(self, index: int, client: Any, subject: str) -> None:
        """Send a client's image: at low resolution after a change, then once at full resolution."""
        viewport = viewport_of(client)
        state = (viewport, subject, self.version)
        last_state, last_resolution = self.frames.get(index, (None, 0))
        still = self.options.still_resolution
        if state == last_state and last_resolution == still:
            return
        resolution = still if state == last_state else self.options.moving_resolution
        if subject == SCENE:
            rgb = render_views(self.scene, viewport.camera(resolution), GREY).rgb[0]
            image = viewport.crop(to_bytes(rgb))
        else:  # the browser draws meshes itself
            image, resolution = np.full((8, 8, 3), round(255 * GREY[0]), np.uint8), still
        client.scene.set_background_image(image, "jpeg", jpeg_quality=92)
        self.frames[index] = state, resolution

    @torch.no_grad()
    def predict_view(self, viewport: Viewport) -> np.ndarray:
        """A render as in training and, beside it, the guided x0 of its noisy latents: (R, 2 R, 3)."""
        if self.teacher is None:
            device, dtype = self.precision.device, self.precision.dtype
            self.teacher = load_teacher(self.config["teacher"], device, dtype)
        teacher, options = self.teacher, self.config["text_to_3d"]
        camera = viewport.camera(teacher.resolution, float(np.deg2rad(np.mean(options["camera"]["fovy"]))))
        render = render_views(self.scene, camera, GREY).rgb.to(teacher.device)
        view = view_of(float(camera.azimuth), float(camera.elevation))
        prompt = view_prompt(self.prompt, view) if options["view_words"] else self.prompt

        last = teacher.schedule.num_train_timesteps - 1
        t = torch.tensor([round(self.noise.value * last)], device=teacher.device)
        clean = teacher.encode_images(render)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
        noisy = teacher.schedule.add_noise(clean, noise, t)
        guided = Guided(teacher, teacher.encode_text([""]), self.guidance.value)
        prediction = guided.predict(noisy, t, teacher.encode_text([prompt]))
        return to_bytes(torch.cat([render[0], teacher.decode(prediction.x0)[0]], -1))

    def serve(self) -> None:
        """Print the address, and update until interrupted."""
        try:
            print(f"open http://{self.options.host}:{self.server.get_port()} (Ctrl-C to stop)", flush=True)
            while True:
                self.update()
                time.sleep(0.03)
        except KeyboardInterrupt:
            self.server.stop()


def viewport_of(client: Any) -> Viewport:
    """The viewport of a viser client."""
    camera = client.camera
    wxyz, position = tuple(map(float, camera.wxyz)), tuple(map(float, camera.position))
    return Viewport(wxyz, position, float(camera.fov), float(camera.aspect))
