"""Every script and every config on the simulated CUDA device: two steps of each, resume and export."""

import json
import math
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from distill.runtime.experiment import load_experiments
from simulated_cuda import cases
from simulated_cuda.session import HERE, ROOT, DeviceProcess, ScriptResult, environment

CONFIGS = ROOT / "configs"
EXPERIMENTS = load_experiments(CONFIGS / "experiment")


def names(folder: str) -> list[str]:
    """The configs of a group."""
    return sorted(path.stem for path in (CONFIGS / folder).glob("*.yaml"))


def scripts() -> list[str]:
    return sorted(path.stem for path in (ROOT / "scripts").glob("*.py") if path.stem not in cases.APART)


def ran(result: ScriptResult) -> ScriptResult:
    assert result.code == 0, f"{result.output}\n{result.errors}"
    return result


def assert_written(folder: Path, result: ScriptResult) -> None:
    """What a script says it has written is there: `written: folder: file, file; metrics`, or `file, file`."""
    for line in re.findall(r"^written: (.+)$", result.output, re.MULTILINE):
        root, *files = re.split("[,:;] ", line)
        assert list(folder.glob(root)), line
        folders = (folder, folder / root, (folder / root).parent)
        for name in files:
            if re.search(r"[\w*]\.[a-z]\w*$", name):
                assert any(list(parent.glob(name)) for parent in folders), f"{name} of {line}"


def assert_trained_in_single_precision(directory: Path) -> None:
    """All that a run trains, with its optimizers' moments, is float32 and finite, as are its results."""
    newest = sorted((directory / "checkpoints").glob("step_*.safetensors"))[-1]
    tensors = load_file(newest)
    half = {
        name: value.dtype for name, value in tensors.items() if value.dtype in (torch.bfloat16, torch.half)
    }
    assert not half, f"in half precision: {half}"
    assert all(value.isfinite().all() for value in tensors.values() if value.is_floating_point())
    assert_finite(json.loads((directory / "result.json").read_text()))


def assert_finite(value: object, path: str = "result") -> None:
    if isinstance(value, Mapping):
        for key, item in value.items():
            assert_finite(item, f"{path}.{key}")
    elif isinstance(value, list):
        for index, item in enumerate(value):
            assert_finite(item, f"{path}[{index}]")
    elif isinstance(value, float):
        assert math.isfinite(value), f"{path} is {value}"


@pytest.mark.parametrize("name", scripts())
def test_script(device: DeviceProcess, name: str) -> None:
    result = ran(device.run(name, *cases.SCRIPTS.get(name, [])))
    assert_written(device.folder, result)
    if name in cases.TRAINED:
        assert_trained_in_single_precision(device.folder / cases.TRAINED[name])


@pytest.mark.parametrize("config", [f"{group}/{name}" for group in cases.GROUPS for name in names(group)])
def test_config(device: DeviceProcess, config: str) -> None:
    group, name = config.split("/")
    directory = f"run.directory=outputs/{config}"
    arguments = [f"{group}={name}", directory, *cases.ARGUMENTS.get(config, [])]
    if config == "objective/dds":
        result = device.run("optimise_image", cases.TINY, *cases.OPTIMISE_IMAGE, *arguments)
    elif cases.GROUPS[group] == "distill_one_step":
        result = device.run("distill_one_step", cases.TINY, *cases.ONE_STEP, *arguments)
    else:
        result = device.run("text_to_3d", cases.TINY, *cases.TEXT_TO_3D, *cases.NO_REFINEMENT, *arguments)
    assert_written(device.folder, ran(result))
    assert_trained_in_single_precision(device.folder / "outputs" / config)


@pytest.mark.parametrize("recipe", names("recipe"))
def test_multi_view_teacher(device: DeviceProcess, recipe: str) -> None:
    directory = f"outputs/multi_view/{recipe}"
    arguments = ["teacher=multi_view", f"run.directory={directory}", *cases.RUN, *cases.EXPORT]
    arguments += cases.MULTI_VIEW[recipe]
    assert_written(device.folder, ran(device.run("text_to_3d", *arguments)))
    assert_trained_in_single_precision(device.folder / directory)


@pytest.mark.parametrize("name", names("labels"))
def test_labels(device: DeviceProcess, name: str) -> None:
    judge = ["judge=null"] if name == "none" else []
    ran(device.run("evaluate_teacher", *cases.SCRIPTS["evaluate_teacher"], f"labels={name}", *judge))


def teacher_of(experiment: str) -> str:
    """The teacher of a preset, or of the one that it builds on."""
    config = yaml.safe_load((CONFIGS / "experiment" / f"{experiment}.yaml").read_text())
    bases = [base for base in config.get("defaults", ()) if base in names("experiment")]
    return config["teacher"] if "teacher" in config or not bases else teacher_of(bases[0])


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment(device: DeviceProcess, name: str) -> None:
    script, directory = EXPERIMENTS[name].script, f"outputs/experiment/{name}"
    arguments = [f"experiment={name}", f"run.directory={directory}", *cases.RUN]
    arguments += cases.EXPERIMENT.get(script, ())
    if not (ROOT / "distill" / "weights" / teacher_of(name)).is_dir():
        arguments += [cases.STOCK, *cases.STOCK_EXPERIMENT.get(script, ())]
    assert_written(device.folder, ran(device.run(script, *arguments)))
    assert_trained_in_single_precision(device.folder / directory)


RESUMED = {
    "text_to_3d": (*cases.TEXT_TO_3D, *cases.NO_REFINEMENT, "objective=vsd"),
    "distill_one_step": (*cases.ONE_STEP, "method=dmd2"),
    "train_controlnet": (*cases.ADAPTER, "condition=silhouette"),
}


@pytest.mark.parametrize("script", RESUMED)
def test_a_resumed_run_equals_an_uninterrupted_one(device: DeviceProcess, script: str) -> None:
    folder = device.folder / "outputs" / "resumed" / script
    arguments = (cases.TINY, *RESUMED[script], f"run.directory={folder.relative_to(device.folder)}")
    ran(device.run(script, *arguments))
    last = sorted((folder / "checkpoints").glob("step_*.safetensors"))[-1]
    first = load_file(last)
    last.unlink()
    ran(device.run(script, *arguments))
    second = load_file(last)
    different = [name for name, value in first.items() if not torch.equal(value, second[name])]
    assert first.keys() == second.keys() and not different


@pytest.mark.parametrize("plan", [True, False], ids=["predicted", "allocated"])
@pytest.mark.parametrize("script", ["text_to_3d", "distill_one_step"])
def test_too_little_memory_is_one_sentence(device: DeviceProcess, script: str, plan: bool) -> None:
    arguments = (*cases.SCRIPTS[script], "run.directory=outputs/no_memory", "run.overwrite=true")
    result = device.run(script, *arguments, f"run.plan={str(plan).lower()}", memory_gib=0.005)
    lines = [line for line in result.errors.splitlines() if "error" in line]
    assert result.code == 2 and len(lines) == 1 and re.search("GiB|memory", lines[0]), result.errors
    assert "Traceback" not in result.errors


def test_viewer_opens_a_scene_on_the_device(device: DeviceProcess) -> None:
    pytest.importorskip("viser")
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = f"viewer.port={server.getsockname()[1]}"
    script = [str(HERE), "run", "view", f"run_directory={cases.SCENE}", port]
    server = subprocess.Popen(
        [sys.executable, *script],
        cwd=device.folder,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        # A background job of a shell ignores it, and so would its children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert server.stdout is not None
    lines = iter(server.stdout.readline, "")
    assert any("open http" in line for line in lines)
    server.send_signal(signal.SIGINT)
    server.communicate(timeout=60)
    assert server.returncode in (0, 130)
