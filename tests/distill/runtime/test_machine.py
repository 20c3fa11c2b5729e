"""Devices by name, and what is chosen with them."""

from pathlib import Path

import pytest
import torch

from distill.runtime import doctor, machine
from distill.runtime.errors import UserError
from distill.runtime.machine import pick_device
from distill.runtime.precision import pick_precision
from distill.runtime.run import Run, RunOptions


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A machine with two CUDA devices; what is asked of matrix products."""
    chosen: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch, "set_float32_matmul_precision", chosen.append)
    return chosen


@pytest.mark.parametrize("name", ["gpu", "mps", "meta", "cuda:x", ""])
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="expected auto, cpu, cuda or cuda:N"):
        pick_device(name)


def test_cuda_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="'cuda', but torch sees no CUDA"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")


def test_a_gpu_that_does_not_exist_is_refused(two_gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"'cuda:7'; this machine has cuda:0 to cuda:1"):
        pick_device("cuda:7")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"'auto' \(cuda:2, by this process's LOCAL_RANK\)"):
        pick_device("auto")
    assert not two_gpus


def test_each_process_has_its_own_gpu_and_tf32(two_gpus: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert pick_device("auto") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("auto") == torch.device("cuda:1") and pick_device("cuda") == torch.device("cuda")
    assert two_gpus == ["high"] * 3
    assert pick_device("cpu") == torch.device("cpu") and len(two_gpus) == 3


def test_precision_by_the_names_of_options() -> None:
    precision = pick_precision("cpu", "bfloat16")
    assert precision.device == torch.device("cpu") and precision.dtype == torch.bfloat16
    assert precision.name == "bfloat16" and pick_precision("cpu", "auto").name == "float32"


def test_a_deterministic_run_asks_for_deterministic_algorithms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[bool] = []
    monkeypatch.setattr(
        torch, "use_deterministic_algorithms", lambda mode, warn_only: calls.append(warn_only)
    )
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(machine.os, "environ", {})
    Run(RunOptions(str(tmp_path / "run"), trackers=()), {}, "default")
    assert not calls
    options = RunOptions(str(tmp_path / "deterministic"), trackers=(), deterministic=True)
    Run(options, {}, "deterministic")
    assert calls == [True] and torch.backends.cudnn.deterministic and not torch.backends.cudnn.benchmark
    assert machine.os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_the_doctor_builds_no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a GPU and without a compiler, or before the first use, the report is a line without a build."""
    monkeypatch.setattr("torch.utils.cpp_extension.load", lambda *arguments, **options: pytest.fail("built"))
    for home, detail in ((None, "no nvcc"), ("/usr/local/cuda", "built on first use")):
        monkeypatch.setattr(doctor, "CUDA_HOME", home)
        result = doctor._nerfacc_kernels(cuda=True)
        assert detail in result.detail and not result.failed
