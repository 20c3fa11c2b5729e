"""A run in a browser (viser): its NeRF from where you stand, while it trains and after; its mesh, the truth, the cameras it is trained
from, and what the teacher makes of a view."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from trimesh.transformations import quaternion_from_matrix, quaternion_matrix

from distill.core.score import Guided
from distill.runtime.checkpoint import checkpoints
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.images import to_bytes
from distill.teacher.latent import Teacher
from sds3d.evaluation.benchmark import knows_truth, truth_of
from sds3d.export.export import GREY, scene_of_run
from sds3d.export.files import load_mesh
from sds3d.export.turntable import render_views
from sds3d.scene.cameras import CameraOptions, Cameras, sample_cameras
from sds3d.text_to_3d.prompts import view_of, view_prompt

SUBJECTS = ("NeRF", "mesh", "truth")
FRUSTUMS = 24
TO_CV = np.diag([1.0, -1.0, -1.0])  # right, up, backward <-> right, down, forward


@dataclass(frozen=True)
class ViewerOptions:
    """Where it listens; pixels of the NeRF's longer side while the view moves and when it stands; seconds between looks at the run."""

    host: str = "127.0.0.1"
    port: int = 8080
    moving: int = 64
    still: int = 224
    poll: float = 2.0

    def __post_init__(self) -> None:
        if not 0 < self.port < 65536 or min(self.moving, self.still) < 16 or self.poll <= 0:
            raise UserError(
                "the viewer needs a port from 1 to 65535, at least 16 pixels and a positive time between looks"
            )


@dataclass(frozen=True)
class Window:
    """What a browser looks through: orientation (w, x, y, z) of axes right, down, forward; position; vertical field in radians; aspect."""

    wxyz: tuple[float, ...]
    position: tuple[float, ...]
    fov: float
    aspect: float

    def camera(self, resolution: int, fovy: float | None = None) -> Cameras:
        """One square camera that covers it, `resolution` along its longer side; with a field of its own (radians) where one is given."""
        position = torch.tensor(self.position, dtype=torch.float32)
        rotation = torch.from_numpy(quaternion_matrix(self.wxyz)[:3, :3] @ TO_CV).float()
        azimuth, elevation = (
            torch.atan2(position[1], position[0]),
            torch.asin(position[2] / position.norm().clamp_min(1e-6)),
        )
        reach = np.tan(self.fov / 2) * max(self.aspect, 1.0)
        field = torch.tensor([2 * np.arctan(reach) if fovy is None else fovy], dtype=torch.float32)
        return Cameras(
            position[None],
            azimuth.rad2deg()[None],
            elevation.rad2deg()[None],
            rotation[None],
            field,
            resolution,
        )

    def crop(self, image: np.ndarray) -> np.ndarray:
        """The part (H, W, 3) of that camera's square picture that the window shows."""
        side = len(image)
        rows, columns = (
            (round(side / self.aspect), side) if self.aspect >= 1 else (side, round(side * self.aspect))
        )
        top, left = (side - rows) // 2, (side - columns) // 2
        return image[top : top + rows, left : left + columns]


class Viewer:
    """A server on a run's directory. `tick` does what there is to do; `serve` does so until it is told to stop."""

    def __init__(self, directory: Path | str, options: ViewerOptions, device: str = "auto") -> None:
        """Raises `UserError` for a directory that is no run with something to show, and where viser is not installed."""
        try:
            import viser
        except ImportError:
            raise UserError('viser is not installed: pip install -e ".[viewer]"') from None
        self.directory, self.options, self.device = Path(directory), options, device
        if not (self.directory / "config.json").is_file():
            raise UserError(f"{directory} holds no config.json: give the directory of a text_to_3d run")
        self.config = read_json(self.directory / "config.json")
        self.prompt = self.config["text_to_3d"]["prompt"]
        self.scene, self.version = scene_of_run(self.directory, device), self.newest()
        self.teacher: Teacher | None = None
        self.asked: Window | None = None
        self.drawn: dict[int, tuple[Any, int]] = {}  # by client: what its picture shows and its resolution
        self.polled = time.monotonic()
        self.server = viser.ViserServer(options.host, options.port, label=self.prompt, verbose=False)
        self.server.scene.set_up_direction("+z")
        self.server.initial_camera.position, self.server.initial_camera.look_at = (
            (2.6, 0.9, 1.1),
            (0.0, 0.0, 0.0),
        )
        self.solid: dict[str, Any] = {}
        self._controls()
        self._solids()
        self._frustums()

    def newest(self) -> tuple[str, float]:
        """The finished scene or the newest checkpoint, and when it was written."""
        finished = self.directory / "scene" / "scene.json"
        path = (
            finished
            if finished.is_file()
            else next(reversed(checkpoints(self.directory / "checkpoints")), self.directory)
        )
        return path.stem, path.stat().st_mtime

    def _controls(self) -> None:
        gui = self.server.gui
        self.told = gui.add_markdown("")
        self.subject = gui.add_dropdown(
            "show", [name for name in SUBJECTS if name != "truth" or knows_truth(self.prompt)]
        )
        self.frustums = gui.add_checkbox("training cameras", False)
        with gui.add_folder("the teacher's view"):
            self.noise = gui.add_slider("noise level t", 0.02, 0.98, 0.02, 0.5)
            self.guidance = gui.add_slider("guidance", 1.0, 20.0, 0.5, 7.5)
            button = gui.add_button("ask it from here")
            self.answer = gui.add_image(np.zeros((64, 128, 3), np.uint8), label="render, x0")
        button.on_click(lambda event: self._ask(event.client))
        self._tell()

    def _ask(self, client: Any) -> None:
        if client is not None:
            self.asked = window_of(client)

    def _tell(self) -> None:
        done = self.version[0].replace("step_", "step ").replace("scene", "finished")
        self.told.content = f"**{self.prompt}**\n\n{self.directory}\n\n{done}"

    def _solids(self) -> None:
        """The mesh where there is one, and once the truth, hidden until they are asked for."""
        if (self.directory / "mesh.glb").is_file():
            self.solid["mesh"] = self.server.scene.add_mesh_trimesh(
                "/mesh", load_mesh(self.directory / "mesh.glb"), visible=False
            )
        if "truth" not in self.solid and knows_truth(self.prompt):
            shape, albedo = truth_of(self.prompt)
            mesh = trimesh.Trimesh(shape.mesh.vertices, shape.mesh.faces, process=False)
            mesh.visual = trimesh.visual.ColorVisuals(
                mesh, face_colors=np.round(albedo * 255).astype(np.uint8)
            )
            self.solid["truth"] = self.server.scene.add_mesh_trimesh("/truth", mesh, visible=False)

    def _frustums(self) -> None:
        """Cameras as the run draws them."""
        options = build(CameraOptions, self.config["text_to_3d"]["camera"], "camera")
        cameras = sample_cameras(options, FRUSTUMS, torch.Generator().manual_seed(self.config["run"]["seed"]))
        self.poses = []
        for number, (position, rotation, fovy) in enumerate(
            zip(cameras.position, cameras.rotation, cameras.fovy, strict=True)
        ):
            turn = np.eye(4)
            turn[:3, :3] = rotation.double().numpy() @ TO_CV
            wxyz, at = quaternion_from_matrix(turn), tuple(position.tolist())
            name = f"/cameras/{number}"
            self.poses.append(
                self.server.scene.add_camera_frustum(
                    name, float(fovy), 1.0, scale=0.12, wxyz=wxyz, position=at, visible=False
                )
            )

    def tick(self) -> None:
        """Take up a newer scene, draw what a browser has moved to, answer for the teacher."""
        if time.monotonic() - self.polled > self.options.poll:
            self.polled = time.monotonic()
            if (found := self.newest()) != self.version:
                self.scene, self.version = scene_of_run(self.directory, self.device), found
                self._solids()
                self._tell()
        chosen: str = self.subject.value
        for name, handle in self.solid.items():
            handle.visible = name == chosen
        for handle in self.poses:
            handle.visible = self.frustums.value
        clients = self.server.get_clients()
        self.drawn = {number: value for number, value in self.drawn.items() if number in clients}
        for number, client in clients.items():
            self._draw(number, client, chosen)
        if self.asked is not None:
            window, self.asked = self.asked, None
            self.answer.image = self.teachers_view(window)

    def _draw(self, number: int, client: Any, chosen: str) -> None:
        """First coarsely, then, where nothing has moved since, finely."""
        window = window_of(client)
        wanted = (window, chosen, self.version)
        before, resolution = self.drawn.get(number, (None, 0))
        if wanted == before and resolution == self.options.still:
            return
        size = self.options.still if wanted == before else self.options.moving
        if chosen == "NeRF":
            image = window.crop(to_bytes(render_views(self.scene, window.camera(size), GREY).rgb[0]))
        else:
            image, size = np.full((8, 8, 3), round(255 * GREY[0]), np.uint8), self.options.still
        client.scene.set_background_image(image, "jpeg", jpeg_quality=92)
        self.drawn[number] = wanted, size

    @torch.no_grad()
    def teachers_view(self, window: Window) -> np.ndarray:
        """A render (R, 2 R, 3) from a window's place as in training, beside it the x0 that the guided teacher sees in its noisy latents."""
        if self.teacher is None:
            self.teacher = Teacher.load(self.config["teacher"], self.scene.device)
        teacher = self.teacher
        fovy = float(np.deg2rad(np.mean(self.config["text_to_3d"]["camera"]["fovy"])))
        camera = window.camera(teacher.resolution, fovy)
        render = render_views(self.scene, camera, GREY).rgb.to(teacher.device)
        view = view_of(float(camera.azimuth), float(camera.elevation))
        prompt = view_prompt(self.prompt, view) if self.config["text_to_3d"]["view_words"] else self.prompt
        t = torch.tensor(
            [round(self.noise.value * (teacher.schedule.num_train_timesteps - 1))], device=teacher.device
        )
        clean = teacher.encode_images(render)
        noise = torch.randn(clean.shape, generator=torch.Generator().manual_seed(0)).to(clean)
        guided = Guided(teacher, teacher.encode_text([""]), self.guidance.value)
        told = guided.predict(teacher.schedule.add_noise(clean, noise, t), t, teacher.encode_text([prompt]))
        return to_bytes(torch.cat([render[0], teacher.decode(told.x0)[0]], -1))

    def serve(self) -> None:
        """Until interrupted."""
        try:
            while True:
                self.tick()
                time.sleep(0.03)
        except KeyboardInterrupt:
            self.server.stop()


def window_of(client: Any) -> Window:
    """What a viser client looks through."""
    camera = client.camera
    return Window(
        tuple(map(float, camera.wxyz)),
        tuple(map(float, camera.position)),
        float(camera.fov),
        float(camera.aspect),
    )
