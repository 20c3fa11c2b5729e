"""An ablation's rows as files: JSON and CSV of every run, a Markdown table, and one HTML page with plots and pictures."""

import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from distill.evaluation import html as page
from distill.evaluation.ablation.plan import Summary, columns, summarise
from distill.runtime.files import atomic_path, write_json

MISSING = (math.nan, math.nan)  # the mean and interval of a figure that a loss has not


def save_report(
    folder: Path,
    title: str,
    rows: Sequence[Mapping[str, object]],
    pictures: Mapping[str, Path],
    facts: object,
) -> None:
    """Write rows.json, rows.csv, table.md and index.html; `pictures` are PNGs by caption, shown as they are."""
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
    page.save_html(folder / "index.html", title, _body(table, pictures), facts)


def shown(mean: float, width: float) -> str:
    """`0.812 ± 0.031`, to four figures; without an interval where there is none, a dash where there is no figure."""
    if math.isnan(mean):
        return "-"
    return f"{mean:.4g}" if math.isnan(width) or width == 0 else f"{mean:.4g} ± {width:.2g}"


def markdown(table: Sequence[Summary]) -> str:
    """A loss at a guidance a row: mean and 95 % interval of each figure."""
    names = columns([row.figures for row in table])
    head = ["loss", "guidance", "runs", *(name.replace("_", " ") for name in names)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in table:
        scale = "own" if row.guidance is None else f"{row.guidance:g}"
        told = [shown(*row.figures.get(name, MISSING)) for name in names]
        lines.append("| " + " | ".join([row.loss, scale, str(row.runs), *told]) + " |")
    return "\n".join(lines) + "\n"


def _body(table: Sequence[Summary], pictures: Mapping[str, Path]) -> list[str]:
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
        *(page.picture(path.read_bytes(), name) for name, path in pictures.items()),
    ]
