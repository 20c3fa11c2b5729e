"""Weights that come with the package, by name."""

from pathlib import Path
from typing import Literal

WeightsKind = Literal["teacher", "judge", "probe", "student", "adapter"]
WEIGHTS = Path(__file__).parents[1] / "weights"
SHIPPED: dict[WeightsKind, dict[str, str]] = {  # folders by name
    "teacher": {"shapes64": "shapes64"},
    "judge": {"judge64": "judge64"},
    "probe": {"probe64": "probe64"},
    "student": {"shapes64": "students/shapes64"},  # one-step, by the name of its teacher
    "adapter": {"silhouette": "adapters/silhouette", "depth": "adapters/depth"},  # by their condition
}


def resolve(kind: WeightsKind, name_or_path: Path | str) -> Path:
    """The folder of shipped weights by name; any other name as a path."""
    folder = SHIPPED[kind].get(str(name_or_path))
    return Path(name_or_path) if folder is None else WEIGHTS / folder


def names(kind: WeightsKind) -> str:
    """The shipped names, comma-separated, for messages."""
    return ", ".join(SHIPPED[kind])
