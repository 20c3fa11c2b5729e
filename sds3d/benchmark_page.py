"""A benchmark's rows as JSON and one HTML page: the means, every prompt with its turntable and the truth beside it, the confusions."""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.bench.report import shown
from distill.data import atomic_path, write_json
from distill.report import image_grid, save_png
from sds3d.benchmark import averages, truth_strip
from sds3d.prompts import VIEWS

SHAPE = ("f_score_5", "silhouette_iou", "volume_iou", "watertight")
FIRST = (*SHAPE, "judge_object", "judge_colour", "janus", "r_precision", "colour_error", "seconds")
STYLE = """body{font:15px sans-serif;margin:2em} img{max-width:100%}
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"""
Differences = Mapping[str, tuple[float, float]]


def save_page(folder: Path, title: str, rows: Sequence[dict[str, object]], facts: object, compared: Differences) -> None:
    """Write rows.json and index.html; `compared` are paired differences to another benchmark, empty where there is none."""
    means = averages(rows)
    write_json(folder / "rows.json", {"facts": facts, "means": means, "rows": list(rows), "paired": dict(compared)})
    body = [f"<h1>{html.escape(title)}</h1>", _means(means, compared)]
    for row in rows:
        prompt = str(row["prompt"])
        directory = folder / prompt.replace(" ", "-")
        save_png(directory / "truth.png", image_grid(truth_strip(prompt), 8))
        body.append(f"<h2>{html.escape(prompt)}</h2>")
        body += [_image(directory / name) for name in ("contact_sheet.png", "renders.png", "truth.png") if (directory / name).is_file()]
        cells = "".join(f"<td>{html.escape(name.replace('_', ' '))}<br><b>{row[name]:.3g}</b></td>" for name in FIRST if name in row)
        body.append(f"<table><tr>{cells}</tr></table>")
    body.append(f"<h2>Views told by the judge</h2>{_confusion(rows)}<pre>{html.escape(json.dumps(facts, indent=1))}</pre>")
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style>"
    with atomic_path(folder / "index.html") as temporary:
        temporary.write_text(head + "\n".join(body), encoding="utf-8")


def _image(path: Path) -> str:
    return f"<p><img src='data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}' alt='{path.stem}'></p>"


def _means(means: Differences, compared: Differences) -> str:
    lines = ["<table><tr><th>figure</th><th>mean, 95 %</th><th>paired difference</th></tr>"]
    for name, value in means.items():
        difference = shown(*compared[name]) if name in compared else ""
        lines.append(f"<tr><td>{html.escape(name.replace('_', ' '))}</td><td>{shown(*value)}</td><td>{difference}</td></tr>")
    return "\n".join([*lines, "</table>"])


def _confusion(rows: Sequence[dict[str, object]]) -> str:
    """True view a row, told view a column, summed over the objects with a front."""
    total = {true: dict.fromkeys(VIEWS, 0) for true in VIEWS}
    for row in rows:
        table = row["confusion"]
        if "janus" in row and isinstance(table, dict):
            for true in VIEWS:
                for told in VIEWS:
                    total[true][told] += table[true][told]
    head = "<tr><th></th>" + "".join(f"<th>{view}</th>" for view in VIEWS) + "</tr>"
    body = ["<tr><th>" + true + "</th>" + "".join(f"<td>{total[true][told]}</td>" for told in VIEWS) + "</tr>" for true in VIEWS]
    return "<table>" + head + "".join(body) + "</table>"
