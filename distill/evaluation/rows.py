"""A row of figures on disk, computed again only where it answers another query."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from distill.runtime.files import read_json, write_json


def cached_row(
    path: Path, query: Mapping[str, Any], compute: Callable[[], Mapping[str, Any]]
) -> dict[str, Any]:
    """The row at `path` where it holds the same query; else `{**query, **compute()}`, written there first.

    query: what the figures depend on (weights, data, options, seed), as plain JSON values.
    """
    plain = json.loads(json.dumps(query))
    row = read_json(path) if path.is_file() else {}
    if not row or any(name not in row or row[name] != value for name, value in plain.items()):
        write_json(path, {**plain, **compute()})
        row = read_json(path)
    return row
