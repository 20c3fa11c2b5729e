"""Sweeps (--multirun) through hydra's launchers: every job is done, and a mistake ends its own job alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT

LAUNCHERS = {
    "basic": [],
    "joblib": ["hydra.launcher.n_jobs=2"],
    "submitit_local": [],
    "ray": ["hydra.launcher.workers=2"],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_sweep_of_prompts(launcher: str, tiny_teacher_folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "scripts" / "optimise_image.py"), "--multirun"]
    command += [f"hydra/launcher={launcher}", *LAUNCHERS[launcher], f"teacher={tiny_teacher_folder}"]
    (tmp_path / "prompts.txt").write_text("a red cube\n\na blue blob\na blue cube\na red cube\n")
    prompts = "prompt=a red cube,a blue blob,a blue cube" if launcher == "basic" else "prompt=@prompts.txt"
    command += [prompts, "run.seed=0,1", "run.steps=2", "run.trackers=[]"]
    command += ["optimise_image.particles=1", "optimise_image.frames=1"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 2, result.stderr[-3000:]
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("error: 2 jobs of the sweep failed, the first: ") and "unknown word 'blob'" in last
    assert "Traceback" not in result.stderr
    written = sorted(path.parent.name for path in (tmp_path / "outputs").glob("optimise_image/*/result.json"))
    names = [f"a-{colour}-cube-sds-seed{seed}" for colour in ("blue", "red") for seed in (0, 1)]
    assert written == names
    assert {path.name for path in tmp_path.iterdir()} == {"outputs", "prompts.txt"}  # hydra leaves nothing
