"""Which teacher a part (adapter, student, probe, pairs) belongs to: recorded with it, compared on use."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from distill.runtime.config import build
from distill.runtime.errors import UserError

TEACHER = "teacher"  # the key of the record in a part's JSON


@dataclass(frozen=True)
class TeacherIdentity:
    """A teacher's name, for messages, and a digest of its denoiser's weights, which identifies it."""

    name: str
    digest: str


def teacher_record(identity: TeacherIdentity | None) -> dict[str, Any]:
    """The entry of a part's JSON; empty where the teacher is not identified."""
    return {} if identity is None else {TEACHER: asdict(identity)}


def recorded_teacher(facts: Mapping[str, Any], name: str) -> TeacherIdentity | None:
    """The teacher that a part's JSON records; None where it records none, as parts made elsewhere.

    name: the file's, for messages. Raises `UserError` for a malformed record.
    """
    record = facts.get(TEACHER)
    return None if record is None else build(TeacherIdentity, record, f"{name}: {TEACHER}")


def teacher_mismatch(part: str, owner: TeacherIdentity | None, teacher: TeacherIdentity | None) -> str | None:
    """A clause where a part's `owner` is not the `teacher` in use; None where it is, or one is unknown.

    part: its kind and name.
    """
    if owner is None or teacher is None or owner.digest == teacher.digest:
        return None
    if owner.name == teacher.name:
        return f"the {part} belongs to the teacher {owner.name} as it was before its weights changed"
    return f"the {part} belongs to the teacher {owner.name}, not to {teacher.name}"


def check_teacher(
    part: str, owner: TeacherIdentity | None, teacher: TeacherIdentity | None, remedy: str
) -> None:
    """Raise `UserError` where a part belongs to another teacher (`teacher_mismatch`).

    remedy: how to make a part for the teacher in use.
    """
    mismatch = teacher_mismatch(part, owner, teacher)
    if mismatch is None:
        return
    assert owner is not None and teacher is not None
    choice = "" if owner.name == teacher.name else f"give teacher={owner.name}, or "
    raise UserError(f"{mismatch}: {choice}{remedy}")
