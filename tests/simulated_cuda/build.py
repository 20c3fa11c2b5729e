"""Builds the device's library and nerfacc's kernels with the system's compiler, each once for its sources.

The results lie in the user's cache folder, by a hash of the sources, torch, Python and the compiler.
"""

import fcntl
import hashlib
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial
from pathlib import Path

HERE = Path(__file__).resolve().parent
FLAGS = ("-O1", "-w", "-fPIC")
LIBRARIES = ("c10", "torch_cpu", "torch")


class Unavailable(Exception):
    """The device cannot be built here; says why."""


def libraries() -> tuple[Path, Path | None]:
    """The device's library, and nerfacc's kernels as a Python module (None without nerfacc).

    Raises `Unavailable` where they cannot be built.
    """
    native = sorted((HERE / "native").iterdir())
    nerfacc = package_folder("nerfacc")
    jobs = [partial(_cached, "libsimulated_cuda.so", native, _build_device)]
    if nerfacc is not None:
        sources = [*sorted((HERE / "nerfacc_kernels").iterdir()), nerfacc / "cuda" / "csrc" / "grid.cu"]
        jobs.append(partial(_cached, "simulated_nerfacc.so", sources, partial(_build_nerfacc, nerfacc)))
    with ThreadPoolExecutor(2) as pool:
        device, *kernels = pool.map(lambda job: job(), jobs)
    return device, kernels[0] if kernels else None


def package_folder(name: str) -> Path | None:
    """Where a package is installed, without importing it."""
    spec = importlib.util.find_spec(name)
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


@cache
def torch_folder() -> Path:
    """The folder of a CPU-only torch. Raises `Unavailable` for another build."""
    folder = package_folder("torch")
    if folder is None:
        raise Unavailable("torch is not installed")
    version = runpy.run_path(str(folder / "version.py"))
    if version.get("cuda") or version.get("hip"):
        raise Unavailable(f"torch {version['__version__']} has a real device's kernels")
    return folder


@cache
def compiler() -> str:
    """Raises `Unavailable` where there is none, or no headers of Python."""
    names = [os.environ["CXX"]] if "CXX" in os.environ else ["g++", "clang++"]
    name = next(filter(None, map(shutil.which, names)), None)
    if name is None or sys.platform != "linux":
        raise Unavailable("a C++ compiler on Linux is needed (g++ or clang++)")
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        raise Unavailable("Python's headers are needed (python3-dev)")
    return name


def _cached(name: str, sources: Sequence[Path], build: Callable[[Path, Path], None]) -> Path:
    """The library `name`, built by `build(working folder, result)` unless an earlier process has done so."""
    cache_home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(cache_home) / "sds3d" / "simulated_cuda"
    path = folder / _digest(sources) / name
    if path.is_file():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with (path.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not path.is_file():
            with tempfile.TemporaryDirectory(dir=path.parent) as work:
                build(Path(work), Path(work) / name)
                (Path(work) / name).rename(path)
    return path


def _digest(sources: Sequence[Path]) -> str:
    version = subprocess.run([compiler(), "--version"], capture_output=True).stdout
    digest = hashlib.sha256(version + str(torch_folder()).encode() + sys.version.encode())
    for source in (torch_folder() / "version.py", Path(__file__), *sources):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _build_device(work: Path, result: Path) -> None:
    sources = sorted((HERE / "native").glob("*.cpp"))
    objects = [work / f"{source.stem}.o" for source in sources]
    for source, compiled in zip(sources, objects):
        _compile(source, compiled, ["-std=c++20"])
    _link(objects, result, LIBRARIES)


def _build_nerfacc(package: Path, work: Path, result: Path) -> None:
    """nerfacc's own traversal of occupancy grids, csrc/grid.cu, for the host's compiler."""
    sources, include = package / "cuda" / "csrc", work / "include"
    shutil.copytree(sources / "include", include)
    shutil.copy(HERE / "nerfacc_kernels" / "utils_cuda.cuh", include)
    (include / "cuda_runtime.h").write_text('#include "utils_cuda.cuh"\n')
    vectors = include / "utils_math.cuh"  # its own vector types are for compilers other than CUDA's
    vectors.write_text(vectors.read_text().replace("#ifndef __CUDACC__", "#if 0"))
    code = (sources / "grid.cu").read_text()
    code = re.sub(r"#include <(ATen/cuda|c10/util/MaybeOwned|curand)[^>]*>\n", "", code)
    code = code.replace("at::cuda::CUDAStream stream = at::cuda::getCurrentCUDAStream();", "")
    code = code.replace("<<<blocks, threads, 0, stream>>>", "")
    module = (HERE / "nerfacc_kernels" / "module.inc").read_text()
    (work / "grid.cpp").write_text(f'#include "include/utils_cuda.cuh"\n{code}\n{module}')
    paths = [f"-I{path}" for path in (sysconfig.get_path("include"), work, include)]
    # in C++20 its `lerp` collides with the standard library's
    flags = ["-std=c++17", *paths, f"-DTORCH_EXTENSION_NAME={result.stem}"]
    _compile(work / "grid.cpp", work / "grid.o", flags)
    _link([work / "grid.o"], result, (*LIBRARIES, "torch_python"))


def _compile(source: Path, result: Path, flags: Sequence[str]) -> None:
    headers = torch_folder() / "include"
    include = [f"-I{headers}", f"-I{headers / 'torch' / 'csrc' / 'api' / 'include'}"]
    _run([*FLAGS, *flags, *include, "-c", str(source), "-o", str(result)])


def _link(objects: Sequence[Path], result: Path, names: Sequence[str]) -> None:
    lib = torch_folder() / "lib"
    search = [f"-L{lib}", f"-Wl,-rpath,{lib}", *(f"-l{name}" for name in names)]
    _run(["-shared", *map(str, objects), *search, "-o", str(result)])


def _run(arguments: Sequence[str]) -> None:
    result = subprocess.run([compiler(), *arguments], capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or [result.stderr[-500:]]
        raise Unavailable(f"{compiler()} failed: {errors[0]}")
