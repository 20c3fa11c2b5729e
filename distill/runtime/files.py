"""Atomic files and folders: written completely or not at all."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from distill.runtime.errors import UserError


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """A temporary path with the same suffix, renamed to `path` on success and removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(folder: Path | str, marker: str, content: str) -> Iterator[Path]:
    """A temporary folder, renamed to `folder` on success; replaces an older one that holds the file `marker`.

    Raises `UserError` when the folder holds something other than `content`.
    """
    folder = Path(folder)
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise UserError(f"{folder} holds something other than {content}: choose another folder")
    temporary = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(temporary, ignore_errors=True)
    yield temporary
    if folder.exists():
        shutil.rmtree(folder)
    temporary.rename(folder)


def write_json(path: Path | str, value: object) -> None:
    """`value` as indented JSON, written atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_json(path: Path | str) -> Any:
    """The content of a JSON file. Raises `UserError` where it is missing or malformed."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not JSON ({error})") from None
