"""A process with the simulated device, in a folder with data, teachers and a finished run."""

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import trimesh
from PIL import Image
from stable_diffusion import stock_pipeline

from simulated_cuda import cases
from simulated_cuda.build import Unavailable, libraries
from simulated_cuda.session import DeviceProcess


@pytest.fixture(scope="session", autouse=True)
def built() -> None:
    """Skips where the device cannot be built."""
    try:
        libraries()
    except Unavailable as reason:
        pytest.skip(f"the simulated device is not available: {reason}")


@pytest.fixture(scope="session")
def device(
    built: None,
    tmp_path_factory: pytest.TempPathFactory,
    tiny_teacher_folder: Path,
    multi_view_teacher_folder: Path,
    worker_id: str,
) -> Iterator[DeviceProcess]:
    """Works in a folder that all processes of a test run share."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "device"
    folder.mkdir(exist_ok=True)
    process = DeviceProcess(folder)
    with locked(folder / "lock"):
        if not (folder / "ready").exists():
            shutil.copytree(tiny_teacher_folder, folder / "tiny")
            shutil.copytree(multi_view_teacher_folder, folder / "multi_view")
            prepare(folder, process)
            (folder / "ready").touch()
    yield process
    process.close()


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def prepare(folder: Path, process: DeviceProcess) -> None:
    """The files that the cases name, beside the teachers."""
    with torch.random.fork_rng():
        stock_pipeline(False).save_pretrained(folder / "stable_diffusion")
    trimesh.creation.box((0.8, 0.6, 0.4)).export(folder / "mesh.glb")
    for script, arguments in cases.PREPARATION.items():
        result = process.run(script, *arguments)
        assert result.code == 0, f"{script}: {result.errors}"
    (image,) = (folder / cases.SCENE / "previews").glob("views_*.png")
    shutil.copy(image, folder / "image.png")
    (folder / "table.csv").write_text("file,Red\n000000.png,1\n000001.png,-1\n")
    picture = Image.new("RGB", (128, 128), (190, 190, 190))
    picture.paste((200, 30, 30), (36, 44, 92, 100))
    picture.save(folder / "picture.png")
