"""The benchmark nobody else can have: text-to-3D of prompts whose true meshes are known, graded as shape, as pictures, as files."""

import re
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import trimesh
from torch import Tensor
from tqdm import tqdm

from distill.apps.optimise_image import saturation
from distill.evaluation.ablation.images import Graders, wanted
from distill.evaluation.ablation.plan import Figures, interval
from distill.evaluation.judge import predict
from distill.runtime.errors import UserError
from distill.runtime.files import read_json, write_json
from distill.runtime.names import slug
from distill.teacher.clip import caption_features, image_features
from distill.teacher.latent import Teacher
from distill.teacher.vocabulary import phrase
from sds3d.evaluation.grading import Alignment, align, grade, surface
from sds3d.export.export import GREY
from sds3d.export.files import load_mesh, load_textured
from sds3d.export.mesh import is_manifold, mean_iou
from sds3d.export.turntable import chunks, render_mesh, render_views
from sds3d.scene.cameras import Cameras, ring
from sds3d.scene.nerf import Scene
from sds3d.text_to_3d.prompts import VIEWS, view_of
from sds3d.world.raycast import RayCaster, render
from sds3d.world.shapes import COLOURS, OBJECTS, RELATIONS, Shape, make_pair, make_shape
from sds3d.world.world import held_out

TINY = ("a red teapot", "a blue torus", "a green duck", "a yellow chair", "a purple car")
PAIRS = (
    "a red sphere on top of a blue cube",
    "a green cone next to a yellow cylinder",
    "a purple cube in front of an orange torus",
)
ELEVATION, RING = 20.0, 24


def full_suite() -> tuple[str, ...]:
    """The tiny suite, every other object in a colour going round (some combinations never trained on), and pairs."""
    colours = list(COLOURS)
    told = {prompt.rsplit(" ", 1)[1] for prompt in TINY}
    rest = [name for name in OBJECTS if name not in told]
    picked = [
        next(c for c in colours if held_out(name, c) == (i % 3 == 0) and c != colours[i % 2])
        for i, name in enumerate(rest)
    ]
    turned = [colours[i % len(colours)] if i % 3 else colour for i, colour in enumerate(picked)]
    return (*TINY, *(phrase(colour, name) for name, colour in zip(rest, turned, strict=True)), *PAIRS)


def _match(prompt: str) -> re.Match[str] | None:
    thing = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(OBJECTS)})"
    return re.fullmatch(rf"{thing}(?: ({'|'.join(RELATIONS)}) {thing})?", prompt.strip())


def knows_truth(prompt: str) -> bool:
    """Whether the prompt is of the world: an object in a colour, or a pair of them."""
    return _match(prompt) is not None


def truth_of(prompt: str) -> tuple[Shape, np.ndarray]:
    """The true shape of a prompt of the world and its face colours (F, 3). Raises `UserError` for any other prompt."""
    found = _match(prompt)
    if found is None:
        raise UserError(
            f"{prompt!r} is no prompt of the world: expected 'a red teapot' or 'a blue cube on top of a green cylinder'"
        )
    colour, name, relation, other_colour, other = found.groups()
    first = make_shape(name)
    if relation is None:
        return first, first.albedo(np.array(COLOURS[colour]))
    pair = make_pair(
        first, relation, make_shape(other), (np.array(COLOURS[colour]), np.array(COLOURS[other_colour]))
    )
    return pair, pair.accents


@dataclass(frozen=True)
class ViewPredictions:
    """What the judge told of a ring of views: names by attribute, and where each camera stood."""

    told: dict[str, list[str]]
    azimuth: list[float]


def janus(views: ViewPredictions) -> float:
    """Share of the views from behind that the judge takes for the front: a face where none should be."""
    behind = [
        told
        for told, azimuth in zip(views.told["view"], views.azimuth, strict=True)
        if view_of(azimuth, ELEVATION) == "back"
    ]
    return sum(told == "front" for told in behind) / max(len(behind), 1)


def confusion(views: ViewPredictions) -> dict[str, dict[str, int]]:
    """Counts of told views by true view."""
    table = {true: dict.fromkeys(VIEWS, 0) for true in VIEWS}
    for told, azimuth in zip(views.told["view"], views.azimuth, strict=True):
        table[view_of(azimuth, ELEVATION)][told] += 1
    return table


@torch.no_grad()
def r_precision(images: Tensor, prompt: str, teacher: Teacher, graders: Graders) -> float:
    """Share of images (N, 3, H, W) whose nearest caption among all of the world's single objects, and the prompt, is the prompt."""
    captions = [phrase(colour, name) for name in OBJECTS for colour in COLOURS]
    captions += [] if prompt in captions else [prompt]
    nearest = (
        image_features(graders.clip, images) @ caption_features(graders.clip, teacher.tokenizer, captions).T
    ).argmax(1)
    return float((nearest == captions.index(prompt)).double().mean())


def silhouettes(mesh: trimesh.Trimesh, cameras: Cameras) -> Tensor:
    """Which pixels of each view (B, H, W) a mesh covers."""
    face, _, _ = RayCaster(mesh).cast(*cameras.rays())
    return torch.from_numpy(face >= 0).reshape(len(cameras), cameras.resolution, cameras.resolution)


def grade_mesh(mesh: trimesh.Trimesh, shape: Shape, albedo: np.ndarray, points: int = 6000) -> Figures:
    """A mesh in scene axes with vertex colours against the truth: surface, solid, silhouettes; and its own making."""
    colours = np.asarray(mesh.visual.vertex_colors, np.float64)[:, :3][mesh.faces].mean(1) / 255
    made, true = surface(mesh, colours, points), surface(shape.mesh, albedo, points)
    aligned = align(made.points, true.points)
    cameras = ring(RING, ELEVATION)
    seen = [silhouettes(each, cameras) for each in (_placed(mesh, aligned), shape.mesh)]
    quality = {
        "watertight": float(mesh.is_watertight),
        "manifold": float(is_manifold(mesh)),
        "components": float(mesh.body_count),
        "triangles": float(len(mesh.faces)),
    }
    return {**asdict(grade(made, true, aligned)), "silhouette_iou": mean_iou(*seen), **quality}


def _placed(mesh: trimesh.Trimesh, way: Alignment) -> trimesh.Trimesh:
    return trimesh.Trimesh(way.apply(np.asarray(mesh.vertices)), mesh.faces, process=False)


@torch.no_grad()
def grade_pictures(
    images: Tensor, prompt: str, teacher: Teacher, graders: Graders, has_front: bool
) -> tuple[Figures, ViewPredictions]:
    """A ring of views (RING, 3, H, W) by the judge and by CLIP; Janus only where the object has a front."""
    views = ViewPredictions(predict(graders.judge, images), ring(RING).azimuth.tolist())
    asked = (
        wanted(prompt, graders.judge) if not any(f" {relation} " in prompt for relation in RELATIONS) else {}
    )
    right = {
        f"judge_{name}": float(np.mean([t == word for t in views.told[name]]))
        for name, word in asked.items()
        if name != "view"
    }
    front = {"janus": janus(views)} if has_front else {}
    figures = {**right, **front, "r_precision": r_precision(images, prompt, teacher, graders)}
    return {**figures, "saturation": float(saturation(images).mean())}, views


def grade_scene(
    scene: Scene, mesh: trimesh.Trimesh | None, prompt: str, teacher: Teacher, graders: Graders
) -> tuple[Figures, ViewPredictions]:
    """A scene's views, and its mesh, against the truth of a prompt of the world; without a mesh it scores 0 where a mesh would."""
    shape, albedo = truth_of(prompt)
    images = render_views(scene, ring(RING, ELEVATION, teacher.resolution), GREY).rgb
    figures, views = grade_pictures(images, prompt, teacher, graders, shape.has_front)
    missed = dict.fromkeys(("f_score_5", "f_score_2", "volume_iou", "watertight", "manifold"), 0.0)
    return {**figures, **(missed if mesh is None else grade_mesh(mesh, shape, albedo))}, views


def grade_run(directory: Path, prompt: str, teacher: Teacher, graders: Graders) -> dict[str, object]:
    """Every figure of a finished text_to_3d run, pictures, mesh and cost; those of the mesh's own pictures begin with `mesh_`."""
    result = read_json(directory / "result.json")
    mesh = None if result["mesh"] is None else load_mesh(directory / "mesh.glb")
    figures, views = grade_scene(Scene.load(directory / "scene"), mesh, prompt, teacher, graders)
    if mesh is not None:
        images = render_mesh(
            load_textured(directory / "mesh.glb"), ring(RING, ELEVATION, teacher.resolution), GREY
        ).rgb
        told, _ = grade_pictures(images, prompt, teacher, graders, "janus" in figures)
        figures |= {f"mesh_{name}": value for name, value in told.items()}
        figures["mesh_to_nerf_psnr"] = result["mesh"]["psnr_to_nerf"]
    run = result["run"]
    figures |= {
        "seconds": run["seconds"],
        "peak_memory_mib": run["peak_memory_mib"],
        "forwards": float(result["forwards"]),
    }
    return {"prompt": prompt, **figures, "confusion": confusion(views)}


def averages(rows: Sequence[dict[str, object]]) -> dict[str, tuple[float, float]]:
    """Mean and half-width of the 95 % interval of each figure over the prompts that have it."""
    names = list(
        dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float))
    )
    return {name: interval([float(str(row[name])) for row in rows if name in row]) for name in names}


def paired(
    one: Sequence[dict[str, object]], other: Sequence[dict[str, object]]
) -> dict[str, tuple[float, float]]:
    """Of the prompts that both have: mean of other minus one with its 95 % interval, figure by figure.

    Raises `UserError` where they share no prompt.
    """
    before = {str(row["prompt"]): row for row in one}
    shared = [(before[str(row["prompt"])], row) for row in other if str(row["prompt"]) in before]
    if not shared:
        raise UserError("the two benchmarks share no prompt: compare runs of one suite")
    names = list(averages([row for _, row in shared]))
    both = {
        name: [(float(str(a[name])), float(str(b[name]))) for a, b in shared if name in a and name in b]
        for name in names
    }
    return {name: interval([b - a for a, b in values]) for name, values in both.items() if values}


def run_suite(
    prompts: Sequence[str],
    folder: Path,
    make: Callable[[str, Path], None],
    grading: Callable[[Path, str], dict[str, object]],
) -> list[dict[str, object]]:
    """Make and grade every prompt that has no row yet, each in a directory of its own; a row a prompt, in their order."""
    rows = []
    for prompt in tqdm(prompts, desc="benchmark", unit="prompt"):
        directory = folder / slug(prompt)
        if not (directory / "row.json").is_file():
            make(prompt, directory)
            write_json(directory / "row.json", grading(directory, prompt))
        rows.append(read_json(directory / "row.json"))
    return rows


def truth_strip(prompt: str, count: int = 8, resolution: int = 128) -> Tensor:
    """The truth as the teacher's world shows it, (count, 3, H, W), to be laid beside a result's views."""
    shape, albedo = truth_of(prompt)
    caster, cameras = RayCaster(shape.mesh), ring(count, ELEVATION, resolution)
    views = [
        torch.from_numpy(render(caster, albedo, camera).rgba).permute(2, 0, 1)
        for camera in chunks(cameras, 1)
    ]
    rgba = torch.stack(views).float()
    return rgba[:, :3] * rgba[:, 3:] + GREY[0] * (1 - rgba[:, 3:])
