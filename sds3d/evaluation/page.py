"""A benchmark as files: rows.json, and one HTML page with means, plots, and every result beside the truth."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from distill.evaluation import html as page
from distill.evaluation.ablation.report import format_figure
from distill.runtime.files import write_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.names import slug
from sds3d.evaluation.benchmark import ELEVATION, averages, truth_strip
from sds3d.export.files import load_textured
from sds3d.export.turntable import GREY, render_mesh
from sds3d.scene.cameras import ring
from sds3d.text_to_3d.prompts import VIEWS

SHAPE = ("f_score_5", "f_score_2", "silhouette_iou", "volume_iou", "watertight", "manifold")
COLUMNS = (*SHAPE, "judge_object", "judge_colour", "janus_rate", "r_precision", "colour_error", "seconds")
PLOTS = ("f_score_5", "f_score_2", "volume_iou", "janus_rate", "judge_object", "r_precision", "seconds")
IMAGES = ("turntable.gif", "renders.png", "truth.png")
Intervals = Mapping[str, tuple[float, float]]


def save_page(
    folder: Path, title: str, rows: Sequence[Mapping[str, Any]], facts: object, differences: Intervals
) -> None:
    """Write rows.json, overview.png and index.html.

    differences: paired ones to another benchmark, empty where there is none.
    """
    means = averages(rows)
    content = {"facts": facts, "means": means, "rows": list(rows), "paired": dict(differences)}
    write_json(folder / "rows.json", content)
    save_png(folder / "overview.png", overview(folder, [row["prompt"] for row in rows]))

    body = [
        _means(means, differences),
        page.figure((folder / "overview.png").read_bytes(), "four views of each mesh, and of the truth"),
    ]
    for name in PLOTS:
        values = {row["prompt"]: row[name] for row in rows if name in row}
        if values:
            body.append(page.bars(_title(name), list(values), list(values.values())))
    for row in rows:
        body += _result(folder / slug(row["prompt"]), row)
    body += ["<h2>Views as predicted by the judge</h2>", page.table(_confusion(rows))]
    page.save_html(folder / "index.html", title, body, facts)


def overview(folder: Path, prompts: Sequence[str], resolution: int = 64) -> Tensor:
    """Four views of each prompt's mesh and of the truth, as one grid; white where there is no mesh."""
    strips = []
    for prompt in prompts:
        path, truth = folder / slug(prompt) / "mesh.glb", truth_strip(prompt, 4, resolution)
        result = torch.ones_like(truth)
        if path.is_file():
            result = render_mesh(load_textured(path), ring(4, ELEVATION, resolution), GREY).rgb
        strips += [result, truth]
    return image_grid(torch.cat(strips), 16 if len(prompts) > 8 else 8)


def _title(name: str) -> str:
    return name.replace("_", " ")


def _means(means: Intervals, differences: Intervals) -> str:
    lines = [["figure", "mean, 95 %", "paired difference"]]
    for name, interval in means.items():
        difference = format_figure(*differences[name]) if name in differences else ""
        lines.append([_title(name), format_figure(*interval), difference])
    return page.table(lines)


def _result(directory: Path, row: Mapping[str, Any]) -> list[str]:
    """One prompt: its images, the truth's, and its figures."""
    save_png(directory / "truth.png", image_grid(truth_strip(row["prompt"]), 8))
    paths = [directory / name for name in IMAGES if (directory / name).is_file()]
    names = [name for name in COLUMNS if name in row]
    return [
        f"<h2>{html.escape(row['prompt'])}</h2>",
        *(page.figure(path.read_bytes(), path.name, path.suffix[1:]) for path in paths),
        page.table([[_title(name) for name in names], [f"{row[name]:.3g}" for name in names]]),
    ]


def _confusion(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Predicted view (column) by true view (row), summed over the objects with a front."""
    tables = [row["confusion"] for row in rows if "janus_rate" in row]
    counts = [
        [true, *(str(sum(table[true][predicted] for table in tables)) for predicted in VIEWS)]
        for true in VIEWS
    ]
    return [["", *VIEWS], *counts]
