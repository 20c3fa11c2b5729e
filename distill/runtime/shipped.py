"""Weights that come with the package, by name."""

from pathlib import Path
from typing import Literal

Kind = Literal["teacher", "judge", "probe", "student", "adapter"]
WEIGHTS = Path(__file__).parents[1] / "weights"
SHIPPED: dict[Kind, dict[str, str]] = {  # names and their folders
    "teacher": {"shapes64": "shapes64"},
    "judge": {"judge64": "judge64"},
    "probe": {"probe64": "probe64"},
    "student": {"shapes64": "students/shapes64"},  # of one step, by the name of its teacher
    "adapter": {
        "silhouette": "adapters/silhouette",
        "depth": "adapters/depth",
    },  # by what it is conditioned on
}


def resolve(kind: Kind, name: Path | str) -> Path:
    """The folder of a shipped name, any other name as a path."""
    folder = SHIPPED[kind].get(str(name))
    return Path(name) if folder is None else WEIGHTS / folder


def names(kind: Kind) -> str:
    """The shipped names, for a sentence."""
    return ", ".join(SHIPPED[kind])
