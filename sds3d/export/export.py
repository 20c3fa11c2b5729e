"""The files of a finished scene: its mesh, turntables, renders, and the scene itself."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from distill.core.teacher import Teacher
from distill.evaluation.clip import clip_score, load_clip_scorer
from distill.runtime.checkpoint import load_newest
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.machine import pick_device
from distill.runtime.video import save_animation, save_video
from distill.upscaler.network import load_upscaler, upscale
from sds3d.export.files import save_mesh
from sds3d.export.texture import TextureOptions, bake
from sds3d.export.turntable import GREY, Layer, contact_sheet, render_layers, render_mesh, render_views
from sds3d.scene.cameras import ring
from sds3d.scene.protocol import MeshOptions, Scene3D, build_scene_options, load_scene
from sds3d.text_to_3d.prompts import view_of, view_prompt

if TYPE_CHECKING:
    from sds3d.text_to_3d.reference_view import ReferenceView
    from sds3d.text_to_3d.trainer import TextTo3d


@dataclass(frozen=True)
class ExportOptions:
    """The files of a scene and their resolution. Raises `UserError` for a value out of range."""

    mesh: MeshOptions = MeshOptions()
    texture: TextureOptions = TextureOptions()
    frames: int = 72
    resolution: int = 128
    elevation: float = 20.0  # degrees
    fps: int = 24
    layers: tuple[Layer, ...] = ("rgb",)  # of the turntable, side by side: rgb, depth, normals
    videos: tuple[Literal["mp4", "gif", "webp"], ...] = ("mp4", "gif")
    upscale: int | None = None  # turntable and renders so many pixels a side, by the upscaler
    upscaler: str = "renders512"  # a shipped name, or a folder of train_upscaler.py
    # a CLIP model of transformers for the CLIP score; null: the teacher's own, where it has one
    clip: str | None = None

    def __post_init__(self) -> None:
        if self.frames < 2 or self.resolution < 16 or self.fps < 1:
            raise UserError("an export needs at least 2 frames, 16 pixels and 1 frame a second")
        if not self.layers:
            raise UserError("the turntable has no layer: give at least one of rgb, depth, normals")


def scene_of_run(directory: Path | str, device: str = "auto") -> Scene3D:
    """The scene of a text-to-3D run: the finished one, else that of its newest checkpoint.

    Raises `UserError` where there is neither.
    """
    directory, target = Path(directory), pick_device(device)
    if (directory / "scene" / "scene.json").is_file():
        return load_scene(directory / "scene", target)
    newest = load_newest(directory / "checkpoints") if (directory / "checkpoints").is_dir() else None
    if newest is None:
        raise UserError(
            f"{directory} holds neither a scene nor a checkpoint: give the directory of a text_to_3d run"
        )
    scene = build_scene_options(read_json(directory / "config.json")["scene"]).build(target)
    scene.load_state_dict(newest.state["parts"]["scene"])
    return scene


def export_run(trainer: "TextTo3d", options: ExportOptions) -> Path:
    """Export a finished run's scene to its directory and write result.json, whose path is returned.

    `nfe` there is the NFE of the teacher in samples.
    """
    run, scene, teacher, prompt = trainer.run, trainer.scene, trainer.teacher, trainer.options.prompt
    started = time.monotonic()
    figures = export_scene(scene, run.directory, options)
    figures |= {"prompt": prompt, "seed": run.options.seed, "teacher": teacher.name_or_path}
    figures |= {"nfe": trainer.nfe, "seconds_export": round(time.monotonic() - started, 1)}
    reference = trainer.reference
    if reference is not None:
        figures |= reference_figures(reference, scene, run.directory)
    # Views are compared with view words: the front must be known.
    score = None
    if reference is None or reference.has_caption:
        score = scene_clip_score(scene, teacher, prompt, options.clip)
    if score is not None:
        figures["clip_score"] = score
    return run.finish({**figures, "config": read_json(run.directory / "config.json")})


def reference_figures(reference: "ReferenceView", scene: Scene3D, folder: Path) -> dict[str, Any]:
    """Figures of the view from a picture's camera; picture.png shows the picture as it was cut out, and the
    view.
    """
    background = torch.full((1, 3), GREY[0], device=scene.device)
    render = scene.render(reference.camera, background).rgb
    save_png(folder / "picture.png", image_grid(torch.cat([reference.picture.over(background), render]), 2))
    return {
        "has_caption": reference.has_caption,
        "azimuth": reference.azimuth,
        "elevation": reference.elevation,
        "elevation_estimated": reference.estimated,
        "reference_psnr": reference.psnr(render, background),
    }


def scene_clip_score(
    scene: Scene3D, teacher: Teacher, prompt: str, clip_name: str | None = None
) -> float | None:
    """CLIP score of 8 views with their view prompts, by `clip_name`, else the teacher's CLIP; None without.

    Raises `UserError` where `clip_name` holds no CLIP.
    """
    clip = load_clip_scorer(teacher.name_or_path, clip_name, teacher.device)
    if clip is None:
        return None
    cameras = ring(8, 20.0, teacher.resolution)
    prompts = [view_prompt(prompt, view_of(azimuth, 20.0)) for azimuth in cameras.azimuth.tolist()]
    return clip_score(clip, render_views(scene, cameras, GREY).rgb, prompts)


def enlargement(options: ExportOptions) -> Callable[[Tensor], Tensor]:
    """A map of layers side by side (N, 3, H, L H) to `upscale` pixels a side each; the identity without it.

    Raises `UserError` for an upscaler that cannot be loaded, and when called for a side that it cannot reach.
    """
    side = options.upscale
    if side is None:
        return lambda images: images
    upscaler = load_upscaler(options.upscaler)

    def enlarge(images: Tensor) -> Tensor:
        return torch.cat([upscale(upscaler, part, side) for part in images.split(images.shape[-2], -1)], -1)

    return enlarge


def export_scene(scene: Scene3D, folder: Path | str, options: ExportOptions) -> dict[str, Any]:
    """Write scene/, mesh.glb, .obj and .ply, turntable.*, contact_sheet.png and renders.png.

    renders.png shows the scene, and below it the textured mesh. Returns the figures of the mesh. For a scene
    without a surface there is no mesh, and `mesh_error` gives the reason.
    """
    folder = Path(folder)
    scene.save(folder / "scene")
    cameras = ring(options.frames, options.elevation, options.resolution)
    enlarge = enlargement(options)
    frames = enlarge(render_layers(scene, cameras, options.layers, GREY))
    for kind in options.videos:
        (save_video if kind == "mp4" else save_animation)(frames, folder / f"turntable.{kind}", options.fps)
    layers = len(options.layers)
    save_png(folder / "contact_sheet.png", contact_sheet(frames, 8 // layers, layers))

    cameras = ring(8, options.elevation, options.resolution)
    renders = render_views(scene, cameras, GREY).rgb
    try:
        extracted = scene.extract_mesh(options.mesh)
    except UserError as error:
        save_png(folder / "renders.png", image_grid(enlarge(renders), 8))
        return {"mesh": None, "mesh_error": str(error)}
    textured = None
    if options.texture.size:
        colours = partial(scene.surface_colours, spacing=1 / options.mesh.resolution)
        textured = bake(extracted.mesh, colours, options.texture)
    save_mesh(extracted.mesh, folder, textured=textured)

    mesh_renders = render_mesh(textured or extracted.mesh, cameras, GREY).rgb
    rows = torch.cat([renders, mesh_renders])
    save_png(folder / "renders.png", image_grid(enlarge(rows), 8))
    difference = (renders - mesh_renders).square().mean()
    return {
        "mesh": {
            "faces": len(extracted.mesh.faces),
            "watertight": extracted.watertight,
            "threshold": extracted.threshold,
            "silhouette_iou": extracted.silhouette_iou,
            "floaters_removed": extracted.floaters,
            "psnr_to_scene": float(-10 * difference.log10()),
        }
    }
