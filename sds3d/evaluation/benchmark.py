"""Text-to-3D of prompts whose true meshes are known, graded by shape, by images and by mesh quality."""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from torch import Tensor
from tqdm import tqdm

from distill.evaluation.ablation.plan import Figures, interval
from distill.evaluation.clip import ClipScorer
from distill.evaluation.graders import Graders, target_labels
from distill.evaluation.judge import Judge, predict
from distill.evaluation.metrics import saturation
from distill.evaluation.rows import cached_row
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.names import slug
from sds3d.evaluation.grading import Alignment, align, grade, surface
from sds3d.export.files import load_mesh, load_textured
from sds3d.export.mesh import is_manifold, mean_iou, silhouettes
from sds3d.export.turntable import GREY, render_mesh, render_views
from sds3d.scene.cameras import ring
from sds3d.scene.protocol import Scene3D, load_scene
from sds3d.text_to_3d.prompts import VIEWS, view_of
from sds3d.world.raycast import RayCaster, render
from sds3d.world.shapes import COLOURS, OBJECTS, RELATIONS, Shape, make_pair, make_shape, noun_phrase
from sds3d.world.world import held_out

TINY = ("a red teapot", "a blue torus", "a green duck", "a yellow chair", "a purple car")
PAIRS = (
    "a red sphere on top of a blue cube",
    "a green cone next to a yellow cylinder",
    "a purple cube in front of an orange torus",
)
ELEVATION, RING = 20.0, 24  # degrees and number of the graded views
WITHOUT_MESH = dict.fromkeys(("f_score_5", "f_score_2", "volume_iou", "watertight", "manifold"), 0.0)


def full_suite() -> tuple[str, ...]:
    """The tiny suite, every other object (a third of them in a held-out colour), and the pairs."""
    colours = list(COLOURS)
    tiny = {prompt.rsplit(" ", 1)[1] for prompt in TINY}
    rest = [name for name in OBJECTS if name not in tiny]
    first = [
        next(c for c in colours if held_out(name, c) == (i % 3 == 0) and c != colours[i % 2])
        for i, name in enumerate(rest)
    ]
    cycled = [colours[i % len(colours)] if i % 3 else colour for i, colour in enumerate(first)]
    return (*TINY, *(noun_phrase(colour, name) for name, colour in zip(rest, cycled, strict=True)), *PAIRS)


def _match(prompt: str) -> re.Match[str] | None:
    noun = rf"an? ({'|'.join(COLOURS)}) ({'|'.join(OBJECTS)})"
    return re.fullmatch(rf"{noun}(?: ({'|'.join(RELATIONS)}) {noun})?", prompt.strip())


def has_truth(prompt: str) -> bool:
    """Whether the prompt is about the world: an object in a colour, or a pair of them."""
    return _match(prompt) is not None


def truth_of(prompt: str) -> tuple[Shape, np.ndarray]:
    """The true shape of a prompt about the world, and its face colours (F, 3).

    Raises `UserError` for any other prompt.
    """
    match = _match(prompt)
    if match is None:
        raise UserError(
            f"{prompt!r} is no prompt of the world: "
            "expected 'a red teapot' or 'a blue cube on top of a green cylinder'"
        )
    colour, name, relation, second_colour, second_name = match.groups()
    first = make_shape(name)
    if relation is None:
        return first, first.albedo(np.array(COLOURS[colour]))
    colours = np.array(COLOURS[colour]), np.array(COLOURS[second_colour])
    pair = make_pair(first, relation, make_shape(second_name), colours)
    return pair, pair.accents


@dataclass(frozen=True)
class ViewPredictions:
    """The judge's labels of a ring of views, by attribute, and the azimuth of each view in degrees."""

    labels: Mapping[str, Sequence[str]]
    azimuth: Sequence[float]

    def views(self) -> list[tuple[str, str]]:
        """True and predicted view word of each view."""
        return [
            (view_of(azimuth, ELEVATION), predicted)
            for azimuth, predicted in zip(self.azimuth, self.labels["view"], strict=True)
        ]


def janus_rate(predictions: ViewPredictions) -> float:
    """The fraction of back views that the judge classifies as front views."""
    back = [predicted for true, predicted in predictions.views() if true == "back"]
    return sum(predicted == "front" for predicted in back) / max(len(back), 1)


def confusion(predictions: ViewPredictions) -> dict[str, dict[str, int]]:
    """Counts of predicted views by true view."""
    table = {true: dict.fromkeys(VIEWS, 0) for true in VIEWS}
    for true, predicted in predictions.views():
        table[true][predicted] += 1
    return table


def r_precision(images: Tensor, prompt: str, clip: ClipScorer) -> float:
    """The fraction of images (N, 3, H, W) whose nearest caption by CLIP is the prompt.

    The captions are those of the world's single objects, and the prompt (Park et al. 2021, CLIP R-Precision).
    """
    captions = [noun_phrase(colour, name) for name in OBJECTS for colour in COLOURS]
    captions += [] if prompt in captions else [prompt]
    nearest = (clip.image_features(images) @ clip.text_features(captions).T).argmax(1)
    return float((nearest == captions.index(prompt)).double().mean())


def grade_mesh(mesh: trimesh.Trimesh, shape: Shape, albedo: np.ndarray, points: int = 6000) -> Figures:
    """A mesh with vertex colours, in scene axes, against the truth; and its topology."""
    assert isinstance(mesh.visual, trimesh.visual.ColorVisuals)
    colours = np.asarray(mesh.visual.vertex_colors, np.float64)[:, :3][mesh.faces].mean(1) / 255
    result, truth = surface(mesh, colours, points), surface(shape.mesh, albedo, points)
    alignment = align(result.points, truth.points)
    cameras = ring(RING, ELEVATION)
    masks = [silhouettes(each, cameras) for each in (_aligned(mesh, alignment), shape.mesh)]
    return {
        **asdict(grade(result, truth, alignment)),
        "silhouette_iou": mean_iou(*masks),
        "watertight": float(mesh.is_watertight),
        "manifold": float(is_manifold(mesh)),
        "components": float(mesh.body_count),
        "triangles": float(len(mesh.faces)),
    }


def _aligned(mesh: trimesh.Trimesh, alignment: Alignment) -> trimesh.Trimesh:
    return trimesh.Trimesh(alignment.apply(np.asarray(mesh.vertices)), mesh.faces, process=False)


@torch.no_grad()
def grade_views(
    images: Tensor, prompt: str, graders: Graders, has_front: bool
) -> tuple[Figures, ViewPredictions | None]:
    """Figures of a ring of views (RING, 3, H, W), and the judge's predictions.

    Without a judge or CLIP their figures are missing; the Janus rate is defined for objects with a front.
    """
    figures: Figures = {}
    predictions = None
    if graders.judge is not None:
        predictions = ViewPredictions(predict(graders.judge, images), ring(RING).azimuth.tolist())
        figures |= _accuracy(predictions, prompt, graders.judge)
        figures |= {"janus_rate": janus_rate(predictions)} if has_front else {}
    if graders.clip is not None:
        figures["r_precision"] = r_precision(images, prompt, graders.clip)
    return {**figures, "saturation": float(saturation(images).mean())}, predictions


def _accuracy(predictions: ViewPredictions, prompt: str, judge: Judge) -> Figures:
    """The fraction of views in which the judge predicts what the prompt names; none for a pair of objects."""
    if any(f" {relation} " in prompt for relation in RELATIONS):
        return {}
    return {
        f"judge_{name}": float(np.mean([label == target for label in predictions.labels[name]]))
        for name, target in target_labels(prompt, judge).items()
        if name != "view"
    }


def grade_scene(
    scene: Scene3D, mesh: trimesh.Trimesh | None, prompt: str, resolution: int, graders: Graders
) -> tuple[Figures, ViewPredictions | None]:
    """A scene's views, and its mesh, against the truth of a prompt about the world; no mesh scores 0."""
    shape, albedo = truth_of(prompt)
    images = render_views(scene, ring(RING, ELEVATION, resolution), GREY).rgb
    figures, predictions = grade_views(images, prompt, graders, shape.has_front)
    return {**figures, **(WITHOUT_MESH if mesh is None else grade_mesh(mesh, shape, albedo))}, predictions


def grade_run(
    directory: Path, prompt: str, resolution: int, graders: Graders, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """All figures of a finished text-to-3D run; those of renders of its mesh begin with `mesh_`.

    `device` is where its scene is rendered.
    """
    result = read_json(directory / "result.json")
    mesh = None if result["mesh"] is None else load_mesh(directory / "mesh.glb")
    scene = load_scene(directory / "scene", device)
    figures, predictions = grade_scene(scene, mesh, prompt, resolution, graders)
    if mesh is not None:
        cameras = ring(RING, ELEVATION, resolution)
        images = render_mesh(load_textured(directory / "mesh.glb"), cameras, GREY).rgb
        of_mesh, _ = grade_views(images, prompt, graders, "janus_rate" in figures)
        figures |= {f"mesh_{name}": value for name, value in of_mesh.items()}
        figures["mesh_to_scene_psnr"] = result["mesh"]["psnr_to_scene"]
    run = result["run"]
    figures |= {"seconds": run["seconds"], "peak_memory_mib": run["peak_memory_mib"]}
    figures["nfe"] = float(result["nfe"])
    return figures if predictions is None else {**figures, "confusion": confusion(predictions)}


def averages(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and half-width of the 95 % interval of each figure over the prompts that have it."""
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float))
    return {name: interval([row[name] for row in rows if name in row]) for name in names}


def paired(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Mean of second minus first, with its 95 % interval, of each figure over the prompts in both.

    Raises `UserError` where they have no prompt in common.
    """
    by_prompt = {row["prompt"]: row for row in first}
    pairs = [(by_prompt[row["prompt"]], row) for row in second if row["prompt"] in by_prompt]
    if not pairs:
        raise UserError("the two benchmarks share no prompt: compare runs of one suite")
    differences = {
        name: [after[name] - before[name] for before, after in pairs if name in before and name in after]
        for name in averages([row for _, row in pairs])
    }
    return {name: interval(values) for name, values in differences.items() if values}


def run_suite(
    prompts: Sequence[str],
    folder: Path,
    query: Mapping[str, Any],
    compute: Callable[[str, Path], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row per prompt, in their order: `compute` runs and grades one in a directory of its own.

    A row is computed where there is none yet for the same `query`, the options that all rows depend on.
    """
    rows = []
    for prompt in tqdm(prompts, desc="benchmark", unit="prompt"):
        directory = folder / slug(prompt)
        row_query = {"prompt": prompt, **query}
        rows.append(cached_row(directory / "row.json", row_query, partial(compute, prompt, directory)))
    return rows


def truth_strip(prompt: str, count: int = 8, resolution: int = 128) -> Tensor:
    """Views of the truth as in the teacher's data, (count, 3, H, W), to lay beside a result's."""
    shape, albedo = truth_of(prompt)
    caster, cameras = RayCaster(shape.mesh), ring(count, ELEVATION, resolution)
    rgba = torch.stack(
        [
            torch.from_numpy(render(caster, albedo, camera).rgba).permute(2, 0, 1)
            for camera in cameras.split(1)
        ]
    ).float()
    return rgba[:, :3] * rgba[:, 3:] + GREY[0] * (1 - rgba[:, 3:])
