"""Trainings in several processes: two of gloo give the result of one, end together, resume as any number."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from command_line import ROOT, script
from safetensors.torch import load_file
from torch import Tensor

from distill.runtime.checkpoint import load_state

LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
RUN = ("run.trackers=[]", "run.checkpoint_every=1", "run.keep=4", "run.preview_every=100", "run.plan=false")


def torchrun(name: str, *arguments: str, code: int = 0) -> str:
    """A script in two processes; what it prints."""
    command = [*LAUNCHER, str(ROOT / "scripts" / f"{name}.py"), *arguments]
    result = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert (result.returncode == 0) == (code == 0), result.stderr[-3000:]
    return result.stdout + result.stderr


def vector(tensors: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.flatten().double() for _, value in sorted(tensors.items())])


def model(run: Path, step: int, part: str = "model") -> Tensor:
    """The weights of a run's checkpoint."""
    return vector(load_state(run / "checkpoints" / f"step_{step:08d}.safetensors")["parts"][part])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few groups of views with captions, and their geometry."""
    folder = tmp_path_factory.mktemp("world") / "data"
    small = ["world.train=48", "world.validation=8", "world.test=0", "world.views=4", "world.supersample=1"]
    script("make_shapes", f"output={folder}", *small, "world.assemblies=0.5", "world.pairs=0", "workers=1")
    return folder


def teacher_arguments(world: Path, teacher: Path, directory: Path, steps: int) -> list[str]:
    sizes = ["teacher.unet.channels=[16,32]", "teacher.unet.heads=2", "teacher.unet.batch=24"]
    return [
        f"teacher.data={world}",
        f"teacher.reuse={teacher}",
        "teacher.continue_vae=true",
        f"run.directory={directory}",
        f"teacher.steps.vae={steps}",
        f"teacher.steps.unet={steps}",
        "teacher.vae.channels=[8,8,16,16]",
        "teacher.vae.latent_channels=8",
        "teacher.vae.batch=6",
        "teacher.unet.views={width: 16}",
        *sizes,
        *RUN,
    ]


def test_vae_and_u_net_of_two_processes(multi_view_teacher_folder: Path, world: Path, tmp_path: Path) -> None:
    """In parts that are added up too: the same weights, to rounding; one process writes."""
    options = ["teacher.vae.accumulate=2", "teacher.unet.accumulate=2"]
    teacher, folders = multi_view_teacher_folder, (tmp_path / "one", tmp_path / "two")
    script("train_teacher", *teacher_arguments(world, teacher, folders[0], 3))
    output = torchrun("train_teacher", *teacher_arguments(world, teacher, folders[1], 3), *options)
    assert output.count("written: ") == 1
    for part in ("vae", "unet"):
        one, two = (model(folder / part, 3) for folder in folders)
        start = model(folders[0] / part, 1)
        # Adam makes steps of rounding errors, which differ between processors
        assert float((one - two).norm()) < 0.05 * float((one - start).norm()), part
    weights = "teacher/unet/diffusion_pytorch_model.safetensors"
    final = [vector(load_file(folder / weights)) for folder in folders]
    torch.testing.assert_close(final[0], final[1], rtol=0, atol=2e-2)


def test_a_killed_process_ends_all_and_any_number_resumes(
    multi_view_teacher_folder: Path, world: Path, tmp_path: Path
) -> None:
    arguments = teacher_arguments(world, multi_view_teacher_folder, tmp_path / "run", 400)
    arguments = [*arguments, "teacher.continue_vae=false"]
    job = subprocess.Popen(
        [*LAUNCHER, str(ROOT / "scripts" / "train_teacher.py"), *arguments],
        env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    )  # fmt: skip
    checkpoints = tmp_path / "run" / "unet" / "checkpoints"
    deadline = time.monotonic() + 200
    while not list(checkpoints.glob("step_*")) and time.monotonic() < deadline:
        time.sleep(0.2)
    worker = max(children(job.pid))
    os.kill(worker, signal.SIGKILL)
    output, _ = job.communicate(timeout=120)
    assert job.returncode != 0 and "SIGKILL" in output
    assert not any(Path(f"/proc/{pid}").exists() for pid in children(job.pid))

    step = max(int(path.stem[5:]) for path in checkpoints.glob("step_*.safetensors"))
    assert "written: " in script("train_teacher", *arguments, f"teacher.steps.unet={step + 2}")
    assert (checkpoints / f"step_{step + 2:08d}.safetensors").is_file()


def children(pid: int) -> list[int]:
    """The processes that a process has started."""
    pids = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        if int(fields[1]) == pid:
            pids.append(int(path.parent.name))
    return pids


def test_an_adapter_of_two_processes(tiny_teacher_folder: Path, world: Path, tmp_path: Path) -> None:
    arguments = [f"teacher={tiny_teacher_folder}", f"data={world}", "condition=edges", "probe=null"]
    arguments += ["run.steps=2", *RUN, "adapter.batch=2", "adapter.accumulate=2"]
    arguments += ["adapter.validation.samples=2", "adapter.validation.steps=2"]
    script("train_controlnet", *arguments, f"run.directory={tmp_path / 'one'}")
    output = torchrun("train_controlnet", *arguments, f"run.directory={tmp_path / 'two'}")
    assert output.count("written: ") == 1
    one, two = (model(tmp_path / name, 2, "adapter") for name in ("one", "two"))
    assert float((one - two).norm()) < 1e-4 * float(one.norm())


SCENE = [
    "scene.field.encoding.n_levels=2",
    "scene.render.samples=16",
    "export.frames=2",
    "export.texture.size=0",
]
SCENE += ["export.videos=[]", "export.mesh.resolution=16", "export.mesh.views=2", *RUN]


@pytest.mark.parametrize(
    ("recipe", "options"),
    [
        # with a critic, and its cameras
        ("score_distillation", ["objective=vsd", "run.steps=3", "text_to_3d.views_per_group=2"]),
        ("sampled_views", ["run.steps=4", "text_to_3d.stages.sampled_views.views=12"]),
    ],
)
def test_text_to_3d_of_two_processes(
    multi_view_teacher_folder: Path, tmp_path: Path, recipe: str, options: list[str]
) -> None:
    """Each renders and denoises its views: the same scene, to rounding; the first process exports."""
    arguments = ["prompt=a red cube", f"teacher={multi_view_teacher_folder}", f"recipe={recipe}", *options]
    arguments += ["text_to_3d.stages.orientation=null"] * (recipe == "score_distillation") + SCENE
    # Penalties at random points of the views are equal in expectation only; Adam's least epsilon would make
    # steps of rounding errors.
    arguments += [f"text_to_3d.regularizers.smooth_{name}=0" for name in ("density", "albedo")]
    arguments += ["text_to_3d.adam_epsilon=1e-3"]
    script("text_to_3d", *arguments, f"run.directory={tmp_path / 'one'}")
    output = torchrun("text_to_3d", *arguments, f"run.directory={tmp_path / 'two'}")
    assert output.count("written: ") == 1 and (tmp_path / "two" / "result.json").is_file()
    one, two = (model(tmp_path / name, 3, "scene") for name in ("one", "two"))
    start = model(tmp_path / "one", 1, "scene")
    assert float((one - two).norm()) < 0.05 * float((one - start).norm())


def test_views_that_cannot_be_split_equally(multi_view_teacher_folder: Path, tmp_path: Path) -> None:
    arguments = ["prompt=a red cube", f"teacher={multi_view_teacher_folder}", "text_to_3d.views=3", *SCENE]
    output = torchrun("text_to_3d", *arguments, f"run.directory={tmp_path / 'run'}", code=2)
    assert "text_to_3d.views is 3: 2 processes cannot split that equally, give a multiple of 2" in output


def test_other_scripts_run_in_one_process() -> None:
    output = torchrun("sample", "a red teapot", code=2)
    assert (
        "error: sample runs in one process: start it by python scripts/sample.py, without torchrun" in output
    )
