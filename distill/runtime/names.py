"""Names of folders, without a heavy import: every script needs one."""

import re


def slug(text: str) -> str:
    """`A red teapot!` as a folder's name: a-red-teapot."""
    return re.sub(r"[^a-z0-9]+", "-", str(text).lower()).strip("-") or "run"
