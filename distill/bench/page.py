"""One HTML page that needs no other file: pictures lie inside it."""

import base64
import html
import json
from collections.abc import Sequence
from pathlib import Path

from distill.data import atomic_path

STYLE = """body{font:15px sans-serif;margin:2em} img{max-width:100%} figure{display:inline-block;margin:.3em}
td,th{padding:.2em .7em;text-align:right;border-bottom:1px solid #ddd}"""


def save_html(path: Path, title: str, body: Sequence[str], facts: object) -> None:
    """Write a page: its title, the parts of its body (HTML), then the facts as JSON."""
    head = f"<!doctype html><meta charset='utf-8'><title>{html.escape(title)}</title><style>{STYLE}</style><h1>{html.escape(title)}</h1>"
    with atomic_path(path) as temporary:
        temporary.write_text("\n".join([head, *body, f"<pre>{html.escape(json.dumps(facts, indent=1))}</pre>"]), encoding="utf-8")


def table(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the head."""
    lines = []
    for number, row in enumerate(rows):
        tag = "td" if number else "th"
        lines.append("<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>")
    return "\n".join(["<table>", *lines, "</table>"])


def picture(png: bytes, caption: str = "") -> str:
    """A PNG with a caption."""
    data = base64.b64encode(png).decode()
    return f"<figure><img src='data:image/png;base64,{data}'><figcaption>{html.escape(caption)}</figcaption></figure>"
