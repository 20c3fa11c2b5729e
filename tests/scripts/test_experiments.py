"""Presets on the command line: composed, described, free of repeats, refused where they do not belong."""

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import entry
import pytest
import yaml
from command_line import ROOT, script

from distill.runtime.config import as_mapping, build
from distill.runtime.experiment import load_experiments

CONFIGS = ROOT / "configs"
EXPERIMENTS = load_experiments(CONFIGS / "experiment")
REQUIRED = {"text_to_3d": ["prompt=a red teapot"], "optimise_image": ["prompt=a red teapot"]}
PRESET = """
# @package _global_
defaults: [{defaults}]
experiment:
  script: text_to_3d
  summary: a scene
  paper: none
  hardware: a card
  memory_gib: 1
  hours: 1
  verified: nothing
"""


def options_of(name: str, *arguments: str) -> Any:
    return entry.load_experiment(name, [*REQUIRED.get(EXPERIMENTS[name].script, []), *arguments])


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values that are no mappings, by dotted name."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def repeats(name: str, configs: Path, arguments: list[str]) -> list[str]:
    """A preset's own values that equal what they override. `configs` is a copy, in which its file is cut."""
    path = configs / "experiment" / f"{name}.yaml"
    values = yaml.safe_load(path.read_text())
    stays = ("defaults", "experiment")
    body = {key: value for key, value in values.items() if key not in stays}
    content = yaml.safe_dump({key: value for key, value in values.items() if key in stays})
    path.write_text(f"# @package _global_\n{content}")
    below = dict(leaves(as_mapping(entry.load_experiment(name, arguments))))
    return [key for key, value in leaves(body) if key in below and below[key] == value]


@pytest.fixture
def configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the configs, which `entry` reads."""
    folder = shutil.copytree(CONFIGS, tmp_path / "configs")
    (folder / "experiment").mkdir(exist_ok=True)
    monkeypatch.setattr(entry, "CONFIGS", folder)
    return folder


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_preset_builds_and_its_snapshot_restores_it(name: str) -> None:
    options = options_of(name, "run.steps=7")
    assert options.experiment == EXPERIMENTS[name] and options.run.steps == 7
    assert build(type(options), as_mapping(options)) == options
    assert options.run.directory.startswith(f"outputs/{name}/")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_preset_repeats_no_value_below_it(name: str, configs: Path) -> None:
    assert repeats(name, configs, REQUIRED.get(EXPERIMENTS[name].script, [])) == []


def test_repeats_of_a_preset_are_detected(configs: Path) -> None:
    """The default of a class, of a script's YAML and of a group; what a lower layer has changed is none."""
    body = "run: {steps: 750, seed: 0}\nobjective: {weight: sigma_squared, time: {until: 1.0, low: 0.1}}\n"
    preset = PRESET.format(defaults="override /objective: sds")
    (configs / "experiment" / "mine.yaml").write_text(preset + body)
    assert repeats("mine", configs, ["prompt=x"]) == ["run.steps", "run.seed", "objective.weight"]


def test_twins_take_over_what_they_build_on(configs: Path) -> None:
    full = PRESET.format(defaults="override /objective: csd") + "run: {steps: 100, log_every: 7}\n"
    (configs / "experiment" / "full.yaml").write_text(full)
    twin = "# @package _global_\ndefaults: [full, _self_]\nexperiment: {hours: 0.1}\nrun: {steps: 5}\n"
    (configs / "experiment" / "twin.yaml").write_text(twin)

    options = entry.load_experiment("twin", ["prompt=x"])
    assert (options.run.steps, options.run.log_every) == (5, 7) and len(options.objective.terms) == 2
    assert options.objective.terms[1].prompt == "unconditional" and options.experiment.duration == "6 min"
    chosen = entry.load_experiment("twin", ["prompt=x", "objective=vsd", "run.steps=9"])
    assert chosen.run.steps == 9 and chosen.objective.critic is not None


def test_presets_of_a_script_serve_those_built_on_it() -> None:
    assert entry.lineage("bench") == ["bench", "text_to_3d"]
    assert entry.lineage("doctor") == ["doctor"]


def test_mistakes_are_one_sentence() -> None:
    unknown = script("text_to_3d", "experiment=nonsense", "prompt=a red teapot", code=2)
    assert "experiment is 'nonsense': expected one of " in unknown and "tiny_dreamfusion" in unknown
    wrong = script("train_controlnet", "experiment=tiny_dreamfusion", code=2)
    assert "run python scripts/text_to_3d.py experiment=tiny_dreamfusion" in wrong
    assert "make_shapes.py has no experiments" in script("make_shapes", "experiment=nonsense", code=2)


def test_help_lists_the_presets() -> None:
    lines = script("bench", "--help").splitlines()
    own = [name for name, info in EXPERIMENTS.items() if info.script == "text_to_3d"]
    assert [name for name in own if not any(line.startswith(f"  {name} ") for line in lines)] == []
    assert not any(line.startswith("  experiment.") for line in lines)


def test_a_preset_without_its_teacher_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    arguments = ["experiment=sd15_dreamfusion", "prompt=a red teapot", f"run.directory={tmp_path / 'run'}"]
    message = script("text_to_3d", *arguments, code=2)
    assert str(tmp_path / "hub") in message and "`hf download stable-diffusion-v1-5/" in message
    assert not (tmp_path / "run").exists()


def test_the_description_is_printed_and_recorded(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    folders = [f"teacher={tiny_teacher_folder}", f"run.directory={tmp_path / 'run'}"]
    small = ["run.steps=1", "run.trackers=[]", "export.frames=2", "export.resolution=16"]
    arguments = ["experiment=tiny_dreamfusion", "prompt=a red teapot", *folders, *small]
    lines = script("text_to_3d", *arguments, "export.mesh.resolution=24").splitlines()

    assert lines[0] == f"experiment {EXPERIMENTS['tiny_dreamfusion']}"
    config, result = (
        json.loads((tmp_path / "run" / f"{name}.json").read_text()) for name in ("config", "result")
    )
    assert config["experiment"] == result["config"]["experiment"]
    assert config["experiment"]["name"] == "tiny_dreamfusion"
