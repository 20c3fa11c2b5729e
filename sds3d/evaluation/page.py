"""A benchmark's rows as JSON and one HTML page: the means, every prompt with its turntable and the truth beside it, the confusions."""

import html
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from distill.evaluation import html as page
from distill.evaluation.ablation.report import shown
from distill.runtime.files import write_json
from distill.runtime.images import image_grid, save_png
from distill.runtime.names import slug
from sds3d.evaluation.benchmark import ELEVATION, averages, truth_strip
from sds3d.export.export import GREY
from sds3d.export.files import load_textured
from sds3d.export.turntable import render_mesh
from sds3d.scene.cameras import ring
from sds3d.text_to_3d.prompts import VIEWS

SHAPE = ("f_score_5", "f_score_2", "silhouette_iou", "volume_iou", "watertight", "manifold")
FIRST = (*SHAPE, "judge_object", "judge_colour", "janus", "r_precision", "colour_error", "seconds")
PICTURES = ("turntable.gif", "renders.png", "truth.png")
PLOTTED = ("f_score_5", "f_score_2", "volume_iou", "janus", "judge_object", "r_precision", "seconds")
Differences = Mapping[str, tuple[float, float]]


def save_page(
    folder: Path, title: str, rows: Sequence[dict[str, object]], facts: object, compared: Differences
) -> None:
    """Write rows.json, overview.png and index.html; `compared` are paired differences to another benchmark, empty where there is none."""
    means = averages(rows)
    write_json(
        folder / "rows.json", {"facts": facts, "means": means, "rows": list(rows), "paired": dict(compared)}
    )
    save_png(folder / "overview.png", overview(folder, [str(row["prompt"]) for row in rows]))
    body = [
        _means(means, compared),
        page.picture((folder / "overview.png").read_bytes(), "four views of each mesh, and of the truth"),
    ]
    for name in PLOTTED:
        if not (told := [row for row in rows if name in row]):
            continue
        body.append(
            page.bars(
                name.replace("_", " "),
                [str(row["prompt"]) for row in told],
                [float(str(row[name])) for row in told],
            )
        )
    for row in rows:
        prompt = str(row["prompt"])
        directory = folder / slug(prompt)
        save_png(directory / "truth.png", image_grid(truth_strip(prompt), 8))
        body.append(f"<h2>{html.escape(prompt)}</h2>")
        pictures = [directory / name for name in PICTURES]
        body += [
            page.picture(path.read_bytes(), path.name, path.suffix[1:]) for path in pictures if path.is_file()
        ]
        names = [name for name in FIRST if name in row]
        body.append(
            page.table([[name.replace("_", " ") for name in names], [f"{row[name]:.3g}" for name in names]])
        )
    page.save_html(
        folder / "index.html",
        title,
        [*body, "<h2>Views told by the judge</h2>", page.table(_confusion(rows))],
        facts,
    )


def overview(folder: Path, prompts: Sequence[str], resolution: int = 64) -> Tensor:
    """Four views of each prompt's mesh, beside them the truth's, as one grid: two prompts a row where there are many."""
    strips = []
    for prompt in prompts:
        path, truth = folder / slug(prompt) / "mesh.glb", truth_strip(prompt, 4, resolution)
        made = path.is_file()
        strips += [
            render_mesh(load_textured(path), ring(4, ELEVATION, resolution), GREY).rgb
            if made
            else torch.ones_like(truth),
            truth,
        ]
    return image_grid(torch.cat(strips), 16 if len(prompts) > 8 else 8)


def _means(means: Differences, compared: Differences) -> str:
    lines = [["figure", "mean, 95 %", "paired difference"]]
    lines += [
        [name.replace("_", " "), shown(*value), shown(*compared[name]) if name in compared else ""]
        for name, value in means.items()
    ]
    return page.table(lines)


def _confusion(rows: Sequence[dict[str, object]]) -> list[list[str]]:
    """True view a row, told view a column, summed over the objects with a front."""
    total = {true: dict.fromkeys(VIEWS, 0) for true in VIEWS}
    for row in rows:
        table = row["confusion"]
        if "janus" in row and isinstance(table, dict):
            for true in VIEWS:
                for told in VIEWS:
                    total[true][told] += table[true][told]
    return [["", *VIEWS], *([true, *(str(total[true][told]) for told in VIEWS)] for true in VIEWS)]
