"""Presets: what each file of configs/experiment/ states of the run that it describes."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from distill.runtime.config import build
from distill.runtime.errors import UserError


@dataclass(frozen=True, kw_only=True)
class ExperimentInfo:
    """What a preset states of itself, chosen by experiment=NAME; recorded with the run, changes nothing."""

    name: str  # of its file in configs/experiment/
    script: str  # that runs it
    summary: str  # what it trains, in a few words
    paper: str  # whose recipe it is
    hardware: str  # that memory_gib and hours refer to
    memory_gib: float  # peak: of the accelerator, or of the process where the hardware is a CPU
    hours: float  # of the whole run
    verified: str  # what of it has been run, on what, and with which result

    def __post_init__(self) -> None:
        for key in ("script", "summary", "paper", "hardware", "verified"):
            if not vars(self)[key].strip() or "\n" in vars(self)[key]:
                raise UserError(f"experiment {self.name}: {key} is {vars(self)[key]!r}: expected one line")
        if min(self.memory_gib, self.hours) <= 0:
            raise UserError(
                f"experiment {self.name}: memory_gib is {self.memory_gib} and hours {self.hours}: "
                "expected numbers above 0"
            )

    @property
    def duration(self) -> str:
        """The expected time, in hours or minutes."""
        return f"{self.hours:g} h" if self.hours >= 1 else f"{self.hours * 60:.0f} min"

    def __str__(self) -> str:
        cost = f"{self.memory_gib:g} GiB and {self.duration} on {self.hardware}"
        return f"{self.name}: {self.summary} ({self.paper}); expected: {cost}; run so far: {self.verified}"


def load_experiments(folder: Path) -> dict[str, ExperimentInfo]:
    """The presets of a folder by name. Raises `UserError` for one that does not describe itself."""
    names = sorted(path.stem for path in folder.glob("*.yaml"))
    return {
        name: build(ExperimentInfo, {**_info_values(folder, name), "name": name}, f"{name}.yaml: experiment")
        for name in names
    }


def find_experiment(
    name: str, scripts: Collection[str], experiments: Mapping[str, ExperimentInfo]
) -> ExperimentInfo:
    """The preset of that name. Raises `UserError` where none of `scripts`, a script and its bases, runs it.

    The first of `scripts` is the one that the user has called.
    """
    own = [key for key, info in experiments.items() if info.script in scripts]
    called = next(iter(scripts))
    if name not in experiments:
        expected = f"expected one of {', '.join(own)}" if own else f"{called}.py has no experiments"
        raise UserError(f"experiment is {name!r}: {expected}")
    info = experiments[name]
    if name not in own:
        raise UserError(
            f"experiment {name} does not belong to {called}.py: "
            f"run python scripts/{info.script}.py experiment={name}"
        )
    return info


def preset_lines(experiments: Mapping[str, ExperimentInfo], scripts: Collection[str]) -> list[str]:
    """One line for each preset of `scripts`, after a title; none where there is no preset."""
    lines = []
    for name, info in experiments.items():
        if info.script in scripts:
            cost = f"{info.memory_gib:g} GiB, {info.duration} on {info.hardware}"
            lines.append(f"  {name:20} {info.summary} ({info.paper}); {cost}")
    return ["\npresets, experiment=NAME:", *lines] if lines else []


def check_mixture(name: str, body: Mapping[str, Any], groups: Mapping[str, str]) -> None:
    """Raise `UserError` where a preset sets options within a group that the user has chosen anew.

    `body` holds the preset's own values by option, `groups` the configs that the command line chooses.
    """
    for group, choice in groups.items():
        if group in body:
            raise UserError(
                f"{group}={choice} cannot be combined with experiment={name}, which sets options within "
                f"{group}: set single options instead ({group}.key=value), or leave one of them out"
            )


def experiment_body(folder: Path, name: str) -> dict[str, Any]:
    """The top-level values that a preset and those it builds on set themselves, `experiment` left out."""
    values = _read(folder, name)
    bodies = [experiment_body(folder, parent) for parent in _parents(values)] + [values]
    merged = {key: value for body in bodies for key, value in body.items()}
    return {key: value for key, value in merged.items() if key not in ("defaults", "experiment")}


def _info_values(folder: Path, name: str) -> dict[str, Any]:
    values = _read(folder, name)
    inherited = [_info_values(folder, parent) for parent in _parents(values)]
    return {key: value for part in [*inherited, values.get("experiment", {})] for key, value in part.items()}


def _parents(values: Mapping[str, Any]) -> list[str]:
    """The presets that a preset builds on: those that its defaults list names without a group."""
    return [entry for entry in values.get("defaults", []) if isinstance(entry, str) and entry != "_self_"]


def _read(folder: Path, name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((folder / f"{name}.yaml").read_text(encoding="utf-8"))
    return values
