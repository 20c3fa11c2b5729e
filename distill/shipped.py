"""Weights that come with the package, by name."""

from pathlib import Path

WEIGHTS = Path(__file__).parent / "weights"
TEACHERS = ("shapes64",)
JUDGES = ("judge64",)
STUDENTS = ("shapes64",)  # each named after its teacher


def located(name: Path | str) -> Path:
    """The folder of a shipped name, any other name as a path."""
    return WEIGHTS / str(name) if str(name) in (*TEACHERS, *JUDGES) else Path(name)


def located_student(name: Path | str) -> Path:
    """The folder of a shipped student's name, any other name as a path."""
    return WEIGHTS / "students" / str(name) if str(name) in STUDENTS else Path(name)
