"""Weights that come with the package, by name."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
TEACHERS = ("shapes64",)
JUDGES = ("judge64",)
PROBES = ("probe64",)
STUDENTS = ("shapes64",)  # one-step students, by the name of their teacher
ADAPTERS = ("silhouette", "depth")  # by what they are conditioned on


def located(name: Path | str) -> Path:
    """The folder of a shipped name, any other name as a path."""
    return WEIGHTS / str(name) if str(name) in (*TEACHERS, *JUDGES, *PROBES) else Path(name)


def located_student(name: Path | str) -> Path:
    """As `located`, of a student."""
    return WEIGHTS / "students" / str(name) if str(name) in STUDENTS else Path(name)


def located_adapter(name: Path | str) -> Path:
    """As `located`, of an adapter."""
    return WEIGHTS / "adapters" / str(name) if str(name) in ADAPTERS else Path(name)
