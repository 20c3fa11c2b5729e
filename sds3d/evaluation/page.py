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
from sds3d.evaluation.benchmark import ELEVATION, averages, row_folder, truth_strip
from sds3d.evaluation.subjects import Subject
from sds3d.export.files import load_textured
from sds3d.export.turntable import GREY, render_mesh
from sds3d.scene.cameras import ring
from sds3d.text_to_3d.prompts import VIEWS

SHAPE = ("f_score_5", "f_score_2", "silhouette_iou", "volume_iou", "watertight", "manifold")
ACCURACY = ("judge_object", "judge_colour", "janus_rate", "r_precision")
COLUMNS = (*SHAPE, *ACCURACY, "colour_error", "reference_psnr", "elevation_error", "has_caption", "seconds")
PLOTS = ("f_score_5", "f_score_2", "volume_iou", "janus_rate", "judge_object", "r_precision", "seconds")
IMAGES = ("picture.png", "turntable.gif", "renders.png", "truth.png")
Intervals = Mapping[str, tuple[float, float]]
Row = Mapping[str, Any]


def save_page(folder: Path, title: str, rows: Sequence[Row], facts: object, differences: Intervals) -> None:
    """Write rows.json, overview.png and index.html.

    differences: paired ones to another benchmark, empty where there is none. Of a prompt with several seeds
    only the first has its turntable on the page.
    """
    means, groups = averages(rows), means_by_group(rows)
    content = {"facts": facts, "means": means, "rows": list(rows), "paired": dict(differences)}
    write_json(folder / "rows.json", {**content, "means_by_group": groups} if groups else content)
    save_png(folder / "overview.png", overview(folder, rows))

    body = [
        _means(means, groups, differences),
        page.figure((folder / "overview.png").read_bytes(), "four views of each mesh, and of the truth"),
    ]
    for name in PLOTS:
        values = {_label(row): row[name] for row in rows if name in row}
        if values:
            body.append(page.bars(_title(name), list(values), list(values.values())))
    for index, row in enumerate(rows):
        first = row["prompt"] not in [before["prompt"] for before in rows[:index]]
        body += _result(_folder(folder, row), row, IMAGES if first else IMAGES[2:])
    body += ["<h2>Views as predicted by the judge</h2>", page.table(_confusion(rows))]
    page.save_html(folder / "index.html", title, body, facts)


def means_by_group(rows: Sequence[Row]) -> dict[str, dict[str, tuple[float, float]]]:
    """The averages of each group of rows, known and unseen shapes; empty where rows have none."""
    groups = dict.fromkeys(row["group"] for row in rows if "group" in row)
    return {group: averages([row for row in rows if row.get("group") == group]) for group in groups}


def overview(folder: Path, rows: Sequence[Row], resolution: int = 64) -> Tensor:
    """Four views of each row's mesh and of the truth, as one grid; white where there is no mesh."""
    strips = []
    for row in rows:
        path = _folder(folder, row) / "mesh.glb"
        truth = truth_strip(Subject(row["prompt"]), 4, resolution)
        result = torch.ones_like(truth)
        if path.is_file():
            result = render_mesh(load_textured(path), ring(4, ELEVATION, resolution), GREY).rgb
        strips += [result, truth]
    return image_grid(torch.cat(strips), 16 if len(rows) > 8 else 8)


def _folder(folder: Path, row: Row) -> Path:
    return row_folder(folder, row["prompt"], row.get("seed", 0))


def _label(row: Row) -> str:
    """A row's prompt, with its seed where it is not 0."""
    return f"{row['prompt']}, seed {row['seed']}" if row.get("seed", 0) else str(row["prompt"])


def _title(name: str) -> str:
    return name.replace("_", " ")


def _means(means: Intervals, groups: Mapping[str, Intervals], differences: Intervals) -> str:
    """Figures by line, with a column for each group of rows."""
    columns = groups or {"mean, 95 %": means}
    lines = [["figure", *columns, "paired difference"]]
    for name in means:
        cells = [
            format_figure(*intervals[name]) if name in intervals else ""
            for intervals in (*columns.values(), differences)
        ]
        lines.append([_title(name), *cells])
    return page.table(lines)


def _result(directory: Path, row: Row, images: Sequence[str]) -> list[str]:
    """One row: its images, the truth's, and its figures."""
    save_png(directory / "truth.png", image_grid(truth_strip(Subject(row["prompt"])), 8))
    paths = [directory / name for name in images if (directory / name).is_file()]
    names = [name for name in COLUMNS if name in row]
    return [
        f"<h2>{html.escape(_label(row))}</h2>",
        *(page.figure(path.read_bytes(), path.name, path.suffix[1:]) for path in paths),
        page.table([[_title(name) for name in names], [f"{row[name]:.3g}" for name in names]]),
    ]


def _confusion(rows: Sequence[Row]) -> list[list[str]]:
    """Predicted view (column) by true view (row), summed over the objects with a front."""
    tables = [row["confusion"] for row in rows if "janus_rate" in row]
    counts = [
        [true, *(str(sum(table[true][predicted] for table in tables)) for predicted in VIEWS)]
        for true in VIEWS
    ]
    return [["", *VIEWS], *counts]
