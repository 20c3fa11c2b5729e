"""Self-contained HTML pages: tables, bar charts and embedded images."""

import base64
import html
import io
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from distill.runtime.files import atomic_path

STYLE = """body{font:15px sans-serif;margin:2em} img{max-width:100%} figure{display:inline-block;margin:.3em}
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"""


def save_html(path: Path, title: str, body: Sequence[str], facts: object) -> None:
    """Write a page: its title, the parts of its body (HTML), then the facts as JSON."""
    name = html.escape(title)
    head = f"<!doctype html><meta charset='utf-8'><title>{name}</title><style>{STYLE}</style><h1>{name}</h1>"
    tail = f"<pre>{html.escape(json.dumps(facts, indent=1))}</pre>"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([head, *body, tail]), encoding="utf-8")


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table whose first row is its header."""
    lines = []
    for index, row in enumerate(rows):
        tag = "td" if index else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "\n".join(["<table>", *lines, "</table>"])


def figure(image: bytes, caption: str = "", kind: str = "png") -> str:
    """An embedded PNG, or an image of another MIME subtype, with a caption."""
    data = base64.b64encode(image).decode()
    caption = f"<figcaption>{html.escape(caption)}</figcaption>"
    return f"<figure><img src='data:image/{kind};base64,{data}'>{caption}</figure>"


def bars(
    title: str, labels: Sequence[str], values: Sequence[float], widths: Sequence[float] | None = None
) -> str:
    """A horizontal bar chart, with error bars where half-widths are given; NaNs are omitted."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    canvas, axis = pyplot.subplots(figsize=(7.5, 0.8 + 0.24 * len(labels)), layout="constrained")
    errors = None if widths is None else np.nan_to_num(widths)
    axis.barh(range(len(labels)), np.nan_to_num(values), xerr=errors, color="#58a", capsize=3)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_title(title, fontsize=10)
    buffer = io.BytesIO()
    canvas.savefig(buffer, dpi=80, format="png")
    pyplot.close(canvas)
    return figure(buffer.getvalue())
