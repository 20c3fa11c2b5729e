"""How often the host waits for the device in one step of a training: each wait leaves a GPU idle."""

import pytest

from simulated_cuda import cases
from simulated_cuda.session import DeviceProcess, ScriptResult


def run(device: DeviceProcess, script: str, name: str, *arguments: str) -> ScriptResult:
    result = device.run(script, *arguments, f"run.directory=outputs/waits/{name}")
    assert result.code == 0, result.errors
    return result


def assert_waits(result: ScriptResult, step: int, most: int) -> None:
    phase = result.step(step)
    assert phase.waits <= most, phase.table


# the step that is counted is neither the first, which fills caches, nor the last, which shows a preview
STEADY = (
    "run.steps=5",
    "run.trackers=[]",
    "run.checkpoint_every=100",
    "run.preview_every=100",
    "run.plan=false",
)
VIEWS = ("prompt=a red teapot", *cases.EXPORT, *STEADY)


def test_score_distillation(device: DeviceProcess) -> None:
    result = run(device, "text_to_3d", "sds", cases.TINY, *VIEWS, *cases.NO_REFINEMENT)
    assert_waits(result, 2, 6)


def test_score_distillation_under_mesh_control(device: DeviceProcess) -> None:
    control = ("control=depth", "control.mesh=mesh.glb", "text_to_3d.views=2")
    result = run(device, "text_to_3d", "control", *VIEWS, *cases.NO_REFINEMENT, *control)
    assert_waits(result, 2, 12)


def test_sdedit_refinement_round(device: DeviceProcess) -> None:
    stage = "text_to_3d.stages.sdedit_refinement"
    size = (f"{stage}.views=4", f"{stage}.strengths=[0.5]", f"{stage}.start=0.4", "text_to_3d.views=2")
    orientation = "text_to_3d.stages.orientation=null"
    result = run(device, "text_to_3d", "sdedit", cases.TINY, *VIEWS, *size, orientation)
    assert_waits(result, 2, 40)
    assert_waits(result, 3, 6)


@pytest.mark.parametrize("method", ["dmd2", "consistency"])
def test_one_step_cycle(device: DeviceProcess, method: str) -> None:
    size = ("distill.batch=4", "distill.monitor.every=0", "distill.critic_diagnostics.every=0")
    result = run(device, "distill_one_step", method, cases.TINY, *STEADY, *size, f"method={method}")
    assert_waits(result, 2, 2)


def test_adapter_step(device: DeviceProcess) -> None:
    size = (
        "adapter.batch=2",
        "adapter.validate_every=100",
        "adapter.validation.samples=2",
        "condition=depth",
    )
    result = run(device, "train_controlnet", "adapter", cases.TINY, *STEADY, *size)
    assert_waits(result, 2, 2)
