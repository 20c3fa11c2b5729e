"""Presets describe themselves; a wrong name, script or combination is one sentence."""

from pathlib import Path

import pytest

from distill.runtime.errors import UserError
from distill.runtime.experiment import check_mixture, experiment_body, find_experiment, load_experiments

FULL = """
experiment:
  script: text_to_3d
  summary: a scene
  paper: arXiv:2209.14988
  hardware: one card
  memory_gib: 12
  hours: 1.5
  verified: nothing
objective: {weight: one}
run: {steps: 100}
"""
TWIN = """
defaults: [full, override /objective: sds, _self_]
experiment: {hardware: two cores, hours: 0.05, verified: all of it}
run: {steps: 5}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "full.yaml").write_text(FULL)
    (tmp_path / "twin.yaml").write_text(TWIN)
    return tmp_path


def test_a_twin_inherits_the_description(folder: Path) -> None:
    full, twin = load_experiments(folder).values()
    assert (full.name, full.duration, twin.name, twin.duration) == ("full", "1.5 h", "twin", "3 min")
    assert (twin.paper, twin.hardware, twin.memory_gib) == (full.paper, "two cores", 12.0)
    assert str(full).startswith("full: a scene (arXiv:2209.14988); expected: 12 GiB and 1.5 h on one card;")


def test_the_body_is_what_the_presets_set_themselves(folder: Path) -> None:
    assert experiment_body(folder, "twin") == {"objective": {"weight": "one"}, "run": {"steps": 5}}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("  hours: 0", "hours 0.0"),
        ("  summary: ''", "summary is ''"),
        ("  gpus: 8", "full.yaml: experiment.gpus is not an option"),
        ("  paper: null", "full.yaml: experiment.paper is None"),
    ],
)
def test_a_description_is_validated(folder: Path, line: str, message: str) -> None:
    key = line.split(":")[0]
    lines = [other for other in FULL.splitlines() if not other.startswith(f"{key}:")]
    (folder / "full.yaml").write_text("\n".join(lines).replace("experiment:\n", f"experiment:\n{line}\n"))
    with pytest.raises(UserError, match="full") as error:
        load_experiments(folder)
    assert message in str(error.value)


def test_presets_belong_to_a_script_and_those_built_on_it(folder: Path) -> None:
    experiments = load_experiments(folder)
    assert find_experiment("full", ["bench", "text_to_3d"], experiments) is experiments["full"]
    with pytest.raises(UserError, match=r"run python scripts/text_to_3d.py experiment=full"):
        find_experiment("full", ["train_controlnet"], experiments)
    with pytest.raises(UserError, match="'ful': expected one of full, twin"):
        find_experiment("ful", ["text_to_3d"], experiments)
    with pytest.raises(UserError, match="'ful': train_controlnet.py has no experiments"):
        find_experiment("ful", ["train_controlnet"], experiments)


def test_a_group_that_the_preset_changes_cannot_be_chosen_anew() -> None:
    check_mixture("full", {"run": {"steps": 5}}, {"objective": "csd"})
    with pytest.raises(UserError, match="objective=csd cannot be combined with experiment=full"):
        check_mixture("full", {"objective": {"weight": "one"}}, {"objective": "csd"})
