"""File names from free text. No heavy import: every script needs this module."""

import hashlib
import re

MAX_LENGTH = 100  # file systems take 255 bytes; room for a prefix, a seed and a suffix


def slug(text: str) -> str:
    """`A red teapot!` as a folder name: a-red-teapot. A long one is cut and ends in a hash of the text."""
    name = re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-") or "run"
    if len(name) <= MAX_LENGTH:
        return name
    return f"{name[: MAX_LENGTH - 9]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
