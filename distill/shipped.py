"""Weights that come with the package, by name."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
TEACHERS = ("shapes64",)
JUDGES = ("judge64",)


def located(name: Path | str) -> Path:
    """The folder of a shipped name, any other name as a path."""
    return WEIGHTS / str(name) if str(name) in (*TEACHERS, *JUDGES) else Path(name)
