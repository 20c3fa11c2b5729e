"""The simulated device itself, its parity with the CPU, and the tests marked `gpu`, in processes with it."""

import subprocess
import sys
from pathlib import Path

import pytest

from simulated_cuda.session import HERE, ROOT, DeviceProcess, environment, run_pytest


def gpu_files() -> list[str]:
    """The files with tests that need a CUDA device."""
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in files if "mark.gpu" in path.read_text() and HERE not in path.parents]


def assert_all_pass(result: subprocess.CompletedProcess[str]) -> None:
    summary = result.stdout.splitlines()[-1]
    assert result.returncode == 0 and " passed" in summary and "skipped" not in summary, result.stdout


def test_device_and_kernels() -> None:
    assert_all_pass(run_pytest(str(HERE / "checks"), "-o", "python_files=check_*.py", "-o", "addopts="))


def test_gpu_tests_run_on_it() -> None:
    assert_all_pass(run_pytest(*gpu_files(), "-m", "gpu and not slow"))


def test_a_process_that_dies_is_replaced_and_says_where(tmp_path: Path) -> None:
    (tmp_path / "die.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)")
    (tmp_path / "live.py").write_text("print('alive')")
    process = DeviceProcess(tmp_path)
    with pytest.raises(RuntimeError, match=r"(?s)^die.py ended .*Segmentation fault.*, line 2"):
        process.run("die.py")
    assert process.run("live.py").output == "alive\n"
    process.close()


def test_it_does_not_leak_into_other_processes() -> None:
    code = "import torch; assert not torch.cuda.is_available()"
    subprocess.run([sys.executable, "-c", code], check=True, env=environment())


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SIMULATED_CUDA_BFLOAT16": "0"}, "does not compute in bfloat16: use float16"),
        ({"CXX": "/no/such/compiler"}, "the simulated device is not available: a C++ compiler"),
    ],
)
def test_a_lesser_machine_is_one_sentence(variables: dict[str, str], expected: str) -> None:
    command = [sys.executable, str(HERE), "run", "sample", "prompts=[a red teapot]", "precision=bfloat16"]
    result = subprocess.run(command, cwd=ROOT, env=environment(**variables), capture_output=True, text=True)
    assert result.returncode and expected in result.stderr and "Traceback" not in result.stderr
    assert not result.stdout
