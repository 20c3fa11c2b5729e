"""One HTML page that needs no other file: pictures lie inside it."""

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
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
    with atomic_path(path) as temporary:
        temporary.write_text(
            "\n".join([head, *body, f"<pre>{html.escape(json.dumps(facts, indent=1))}</pre>"]),
            encoding="utf-8",
        )


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the head."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "\n".join(["<table>", *lines, "</table>"])


def picture(image: bytes, caption: str = "", kind: str = "png") -> str:
    """A PNG, or a picture of another kind, with a caption."""
    data = base64.b64encode(image).decode()
    return f"<figure><img src='data:image/{kind};base64,{data}'><figcaption>{html.escape(caption)}</figcaption></figure>"


def bars(
    title: str, labels: Sequence[str], values: Sequence[float], widths: Sequence[float] | None = None
) -> str:
    """A bar chart, a line a label, with intervals where their half-widths are given; what is not a number has no bar."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(7.5, 0.8 + 0.24 * len(labels)), layout="constrained")
    errors = None if widths is None else np.nan_to_num(widths)
    axis.barh(range(len(labels)), np.nan_to_num(values), xerr=errors, color="#58a", capsize=3)
    axis.set_yticks(range(len(labels)), labels)
    axis.invert_yaxis()
    axis.margins(y=0.01)
    axis.set_title(title, fontsize=10)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=80, format="png")
    pyplot.close(figure)
    return picture(buffer.getvalue())
