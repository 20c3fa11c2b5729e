"""Runs of prompts and pictures whose true meshes are known, graded by shape, images and mesh quality."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import trimesh
from torch import Tensor

from distill.evaluation.ablation.plan import Figures, interval
from distill.evaluation.clip import ClipScorer
from distill.evaluation.graders import Graders, target_labels
from distill.evaluation.judge import Judge, predict
from distill.evaluation.metrics import saturation
from distill.evaluation.rows import RowJob, shared_rows
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.names import slug
from sds3d.evaluation.grading import Alignment, align, grade, surface
from sds3d.evaluation.subjects import Subject, Suite
from sds3d.export.files import load_mesh, load_textured
from sds3d.export.mesh import is_manifold, mean_iou, silhouettes
from sds3d.export.turntable import GREY, render_mesh, render_views
from sds3d.scene.cameras import ring
from sds3d.scene.protocol import Scene3D, load_scene
from sds3d.text_to_3d.prompts import VIEWS, view_of
from sds3d.text_to_3d.view_groups import rotate_azimuth
from sds3d.world.raycast import Albedo, RayCaster, render
from sds3d.world.shapes import COLOURS, OBJECTS, RELATIONS, Shape, noun_phrase

ELEVATION, RING = 20.0, 24  # degrees and number of the graded views
WITHOUT_MESH = dict.fromkeys(("f_score_5", "f_score_2", "volume_iou", "watertight", "manifold"), 0.0)


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


def grade_mesh(mesh: trimesh.Trimesh, shape: Shape, albedo: Albedo, points: int = 6000) -> Figures:
    """A mesh with vertex colours, in scene axes, against the truth; and its topology.

    `albedo` is that of the true faces (F, 3), or a function of points and faces.
    """
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
def grade_views(images: Tensor, subject: Subject, graders: Graders) -> tuple[Figures, ViewPredictions | None]:
    """Figures of a ring of views (RING, 3, H, W), and the judge's predictions.

    Without a judge or CLIP their figures are missing, as are both for shapes without a name; the Janus rate
    is defined for objects with a front. Azimuths count from the picture's, where there is one.
    """
    figures: Figures = {}
    predictions = None
    if graders.judge is not None and subject.caption:
        azimuth = (ring(RING).azimuth + subject.angles[0]).tolist()
        predictions = ViewPredictions(predict(graders.judge, images), azimuth)
        figures |= _accuracy(predictions, subject.caption, graders.judge)
        figures |= {"janus_rate": janus_rate(predictions)} if subject.truth[0].has_front else {}
    if graders.clip is not None and subject.caption:
        figures["r_precision"] = r_precision(images, subject.caption, graders.clip)
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
    scene: Scene3D, mesh: trimesh.Trimesh | None, subject: Subject, resolution: int, graders: Graders
) -> tuple[Figures, ViewPredictions | None]:
    """A scene's views, and its mesh, against the truth; no mesh scores 0."""
    images = render_views(scene, ring(RING, ELEVATION, resolution), GREY).rgb
    figures, predictions = grade_views(images, subject, graders)
    return {**figures, **(WITHOUT_MESH if mesh is None else grade_mesh(mesh, *subject.truth))}, predictions


def grade_run(
    directory: Path, subject: Subject, resolution: int, graders: Graders, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """All figures of a finished run; those of renders of its mesh begin with `mesh_`.

    `device` is where its scene is rendered.
    """
    result = read_json(directory / "result.json")
    mesh = None if result["mesh"] is None else load_mesh(directory / "mesh.glb")
    scene = load_scene(directory / "scene", device)
    figures, predictions = grade_scene(scene, mesh, subject, resolution, graders)
    if mesh is not None:
        cameras = ring(RING, ELEVATION, resolution)
        images = render_mesh(load_textured(directory / "mesh.glb"), cameras, GREY).rgb
        of_mesh, _ = grade_views(images, subject, graders)
        figures |= {f"mesh_{name}": value for name, value in of_mesh.items()}
        figures["mesh_to_scene_psnr"] = result["mesh"]["psnr_to_scene"]
    if subject.is_picture:
        figures["reference_psnr"] = result["reference_psnr"]
        figures["elevation_error"] = abs(result["elevation"] - subject.angles[1])
        figures["has_caption"] = float(result["has_caption"])
    run = result["run"]
    figures |= {"seconds": run["seconds"], "peak_memory_mib": run["peak_memory_mib"]}
    figures["nfe"] = float(result["nfe"])
    return figures if predictions is None else {**figures, "confusion": confusion(predictions)}


def averages(rows: Sequence[Mapping[str, Any]]) -> dict[str, tuple[float, float]]:
    """Mean and half-width of the 95 % interval of each figure over the prompts that have it.

    The seeds of a prompt are averaged first, as they are not independent; those of a single one are not.
    """
    names = dict.fromkeys(name for row in rows for name, value in row.items() if isinstance(value, float))
    return {
        name: _prompt_interval([(row["prompt"], row[name]) for row in rows if name in row]) for name in names
    }


def _prompt_interval(values: Sequence[tuple[str, float]]) -> tuple[float, float]:
    """The interval of values by prompt."""
    by_prompt: dict[str, list[float]] = {}
    for prompt, value in values:
        by_prompt.setdefault(prompt, []).append(value)
    if len(by_prompt) == 1:
        return interval([value for _, value in values])
    return interval([float(np.mean(of_prompt)) for of_prompt in by_prompt.values()])


def paired(
    first: Sequence[Mapping[str, Any]], second: Sequence[Mapping[str, Any]]
) -> dict[str, tuple[float, float]]:
    """Mean of second minus first, with its 95 % interval, of each figure over the prompts and seeds in both.

    Rows without a seed, of earlier versions, are of seed 0. Raises `UserError` where there is no row in both.
    """
    by_run = {_run_of(row): row for row in first}
    pairs = [(by_run[_run_of(row)], row) for row in second if _run_of(row) in by_run]
    if not pairs:
        raise UserError("the two benchmarks share no prompt and seed: compare runs of one suite")
    differences = {
        name: [
            (after["prompt"], after[name] - before[name])
            for before, after in pairs
            if name in before and name in after
        ]
        for name in averages([row for _, row in pairs])
    }
    return {name: _prompt_interval(values) for name, values in differences.items() if values}


def _run_of(row: Mapping[str, Any]) -> tuple[str, int]:
    return row["prompt"], row.get("seed", 0)


def row_folder(folder: Path, prompt: str, seed: int = 0) -> Path:
    """Where a benchmark in `folder` keeps one run and its row."""
    return folder / (slug(prompt) if seed == 0 else f"{slug(prompt)}-seed{seed}")


def run_suite(
    suite: Suite,
    folder: Path,
    query: Mapping[str, Any],
    compute: Callable[[Subject, int, Path], Mapping[str, Any]],
) -> list[dict[str, Any]]:
    """A row per subject and seed, all subjects by the first seed first: `compute` runs and grades one in a
    directory of its own.

    A row is computed where there is none yet for the same `query`, the options that all rows depend on; by
    one of any number of processes with the same suite and folder (`shared_rows`).
    """
    jobs = []
    for subject, seed in [(Subject(name), seed) for seed in suite.seeds for name in suite.names]:
        directory = row_folder(folder, subject.name, seed)
        row_query = {"prompt": subject.name, "seed": seed, **query}
        row_query |= {"group": subject.group} if subject.group else {}
        jobs.append(RowJob(directory / "row.json", row_query, partial(compute, subject, seed, directory)))
    return shared_rows(jobs, "benchmark")


def truth_strip(subject: Subject, count: int = 8, resolution: int = 128) -> Tensor:
    """Views of the truth as in the teacher's data, (count, 3, H, W), to lay beside a result's."""
    shape, albedo = subject.truth
    azimuth = torch.tensor(subject.angles[0])
    caster, cameras = RayCaster(shape.mesh), rotate_azimuth(ring(count, ELEVATION, resolution), azimuth)
    rgba = torch.stack(
        [
            torch.from_numpy(render(caster, albedo, camera).rgba).permute(2, 0, 1)
            for camera in cameras.split(1)
        ]
    ).float()
    return rgba[:, :3] * rgba[:, 3:] + GREY[0] * (1 - rgba[:, 3:])
