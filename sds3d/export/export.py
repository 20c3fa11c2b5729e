"""Everything that leaves a finished scene: meshes, turntables, final renders, and the scene itself."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from distill.runtime.checkpoint import load_newest
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import pick_device
from distill.runtime.video import save_animation, save_video
from distill.teacher.clip import caption_features, image_features
from distill.teacher.folder import CLIP, load_clip
from distill.teacher.latent import Teacher
from sds3d.export.files import save_mesh
from sds3d.export.mesh import MeshOptions, extract_mesh
from sds3d.export.texture import TextureOptions, bake
from sds3d.export.turntable import Layer, contact_sheet, render_layers, render_mesh, render_views
from sds3d.scene.cameras import ring
from sds3d.scene.nerf import Scene, SceneOptions
from sds3d.text_to_3d.prompts import view_of, view_prompt
from sds3d.text_to_3d.trainer import TextTo3d

GREY = (0.85, 0.85, 0.85)


@dataclass(frozen=True)
class ExportOptions:
    """What is written of a scene, and how finely."""

    mesh: MeshOptions = MeshOptions()
    texture: TextureOptions = TextureOptions()
    frames: int = 72
    resolution: int = 128
    elevation: float = 20.0
    fps: int = 24
    layers: tuple[Layer, ...] = ("rgb",)  # of the turntable, side by side
    films: tuple[Literal["mp4", "gif", "webp"], ...] = ("mp4", "gif")

    def __post_init__(self) -> None:
        if self.frames < 2 or self.resolution < 16 or self.fps < 1:
            raise UserError("an export needs at least 2 frames, 16 pixels and 1 frame a second")
        if not self.layers:
            raise UserError("a turntable without a layer shows nothing: give some of rgb, depth, normals")


def scene_of_run(directory: Path | str, device: str = "auto") -> Scene:
    """The scene of a text-to-3D run: the finished one, else that of its newest checkpoint. Raises `UserError` where there is none."""
    directory, target = Path(directory), pick_device(device)
    if (directory / "scene" / "scene.json").is_file():
        return Scene.load(directory / "scene", target)
    newest = load_newest(directory / "checkpoints") if (directory / "checkpoints").is_dir() else None
    if newest is None:
        raise UserError(
            f"{directory} holds neither a scene nor a checkpoint: give the directory of a text_to_3d run"
        )
    scene = Scene(build(SceneOptions, read_json(directory / "config.json")["scene"], "scene"), target)
    scene.load_state_dict(newest.state["parts"]["scene"])
    return scene


def finish(made: TextTo3d, options: ExportOptions) -> Path:
    """Export a finished run's scene into its directory and write result.json, whose path is returned.

    `nfe` there is the U-Net work in forward passes of one sample.
    """
    run, scene, teacher, prompt = made.run, made.scene, made.teacher, made.options.prompt
    started = time.monotonic()
    figures = export_scene(scene, run.directory, options)
    figures |= {"prompt": prompt, "seed": run.options.seed, "teacher": teacher.place}
    figures |= {"forwards": made.nfe, "seconds_export": round(time.monotonic() - started, 1)}
    if (score := clip_score(scene, teacher, prompt)) is not None:
        figures["clip_score"] = score
    return run.finish({**figures, "config": read_json(run.directory / "config.json")})


@torch.no_grad()
def clip_score(scene: Scene, teacher: Teacher, prompt: str) -> float | None:
    """Mean cosine between views of the scene and their view prompts under the teacher's own CLIP; None where it has none."""
    if not (Path(teacher.place) / CLIP).is_dir():
        return None
    clip = load_clip(teacher.place)
    cameras = ring(8, 20.0, teacher.resolution)
    prompts = [view_prompt(prompt, view_of(azimuth, 20.0)) for azimuth in cameras.azimuth.tolist()]
    images = image_features(clip, render_views(scene, cameras, GREY).rgb)
    return float((images * caption_features(clip, teacher.tokenizer, prompts)).sum(1).mean())


def export_scene(scene: Scene, folder: Path | str, options: ExportOptions) -> dict[str, Any]:
    """Write scene/, mesh.glb, .obj (with what it names) and .ply, turntable.*, contact_sheet.png, renders.png (mesh below NeRF).

    Returns the figures of the mesh. A scene without a surface still leaves its pictures; `mesh` then says why there is none.
    """
    folder = Path(folder)
    scene.save(folder / "scene")
    frames = render_layers(
        scene, ring(options.frames, options.elevation, options.resolution), options.layers, GREY
    )
    for kind in options.films:
        (save_video if kind == "mp4" else save_animation)(frames, folder / f"turntable.{kind}", options.fps)
    save_png(
        folder / "contact_sheet.png", contact_sheet(frames, 8 // len(options.layers), len(options.layers))
    )
    cameras = ring(8, options.elevation, options.resolution)
    views = [render_views(scene, cameras, GREY).rgb]
    try:
        extracted = extract_mesh(scene, options.mesh)
    except UserError as error:
        save_png(folder / "renders.png", image_grid(views[0], 8))
        return {"mesh": None, "why": str(error)}
    textured = None
    if options.texture.size:
        textured = bake(
            extracted.mesh, scene.field, 1 / options.mesh.resolution, options.texture, scene.device
        )
    save_mesh(extracted.mesh, folder, textured=textured)
    views.append(render_mesh(textured or extracted.mesh, cameras, GREY).rgb)
    save_png(folder / "renders.png", image_grid(torch.cat(views), 8))
    difference = (views[0] - views[1]).square().mean()
    return {
        "mesh": {
            "faces": len(extracted.mesh.faces),
            "watertight": extracted.watertight,
            "threshold": extracted.threshold,
            "silhouette_iou": extracted.silhouette_iou,
            "floaters_dropped": extracted.dropped,
            "psnr_to_nerf": float(-10 * difference.log10()),
        }
    }
