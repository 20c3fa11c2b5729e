"""An ablation's rows as files: JSON and CSV, a Markdown table of means, an HTML page with plots."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.evaluation import html as page
from distill.evaluation.ablation.plan import Summary, columns, summarise
from distill.runtime.files import atomic_path, write_json

MISSING = (math.nan, math.nan)  # mean and interval of a figure that a loss lacks


def save_report(
    folder: Path, title: str, rows: Sequence[Mapping[str, object]], images: Mapping[str, Path], facts: object
) -> None:
    """Write rows.json, rows.csv, table.md and index.html; `images` are PNG files by their caption."""
    table = summarise(rows)
    write_json(folder / "rows.json", {"facts": facts, "rows": list(rows)})
    with (
        atomic_path(folder / "rows.csv") as temporary,
        temporary.open("w", newline="", encoding="utf-8") as file,
    ):
        writer = csv.DictWriter(file, columns(rows))
        writer.writeheader()
        writer.writerows(rows)
    with atomic_path(folder / "table.md") as temporary:
        temporary.write_text(markdown(table), encoding="utf-8")
    page.save_html(folder / "index.html", title, _body(table, images), facts)


def format_figure(mean: float, width: float) -> str:
    """`0.812 ± 0.031`, to four digits; NaNs are omitted, a missing mean becomes a dash."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.4g}" if math.isnan(width) or width == 0 else f"{mean:.4g} ± {width:.2g}"


def markdown(table: Sequence[Summary]) -> str:
    """One row per loss and guidance scale: mean and 95 % interval of each figure."""
    names = columns([row.figures for row in table])
    head = ["loss", "guidance", "runs", *(name.replace("_", " ") for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table:
        scale = "own" if row.guidance is None else f"{row.guidance:g}"
        cells = [format_figure(*row.figures.get(name, MISSING)) for name in names]
        lines.append("| " + " | ".join([row.loss, scale, str(row.runs), *cells]) + " |")
    return "\n".join(lines) + "\n"


def _body(table: Sequence[Summary], images: Mapping[str, Path]) -> list[str]:
    cells = [
        line.strip("| \n").split(" | ")
        for line in markdown(table).splitlines()
        if not line.startswith("|---")
    ]
    labels = [row.loss if row.guidance is None else f"{row.loss} s={row.guidance:g}" for row in table]
    plots = []
    for name in columns([row.figures for row in table]):
        means, widths = zip(*(row.figures.get(name, MISSING) for row in table), strict=True)
        plots.append(page.bars(name.replace("_", " "), labels, means, widths))
    return [
        page.table(cells),
        *plots,
        *(page.figure(path.read_bytes(), name) for name, path in images.items()),
    ]
