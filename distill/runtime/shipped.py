"""Weights that come with the package, by name."""

from pathlib import Path
from typing import Literal

WeightsKind = Literal["teacher", "judge", "probe", "student", "adapter", "upscaler"]
WEIGHTS = Path(__file__).resolve().parents[1] / "weights"
SHIPPED: dict[WeightsKind, dict[str, str]] = {  # folders by name
    # conditioned on text, cameras, several views and pictures; of handwritten digits, in pixels
    "teacher": {"shapes64": "shapes64", "digits28": "digits28"},
    # of single objects; of pairs and azimuths; of elevations, for image to 3D; of digits
    "judge": {
        "judge64": "judge64",
        "pairs64": "pairs64",
        "elevation64": "elevation64",
        "digits28": "digits28_judge",
    },
    "probe": {"probe64": "probe64"},
    "student": {"shapes64": "students/shapes64"},  # one-step, by the name of its teacher
    "adapter": {"silhouette": "adapters/geometry", "depth": "adapters/geometry"},  # by their condition
    "upscaler": {"renders512": "upscalers/renders512"},  # by the data set of its training
}


def resolve(kind: WeightsKind, name_or_path: Path | str) -> Path:
    """The folder of shipped weights by name; any other name as a path."""
    folder = SHIPPED[kind].get(str(name_or_path))
    return Path(name_or_path) if folder is None else WEIGHTS / folder


def display_name(name_or_path: Path | str) -> str:
    """A path within the shipped weights, from their folder on; any other name or path as it is."""
    path = Path(name_or_path).resolve()
    return str(path.relative_to(WEIGHTS)) if path.is_relative_to(WEIGHTS) else str(name_or_path)


def names(kind: WeightsKind) -> str:
    """The shipped names, comma-separated, for messages."""
    return ", ".join(SHIPPED[kind])
