"""Checks of the installation: versions, GPU parts, ffmpeg and the shipped weights."""

import importlib.util
from dataclasses import dataclass
from importlib import metadata

import torch
from torch.utils.cpp_extension import CUDA_HOME

from distill.runtime.errors import UserError


@dataclass(frozen=True)
class CheckResult:
    """One line of the report; a missing optional component is no failure."""

    name: str
    passed: bool
    detail: str
    optional: bool = False

    @property
    def failed(self) -> bool:
        """Whether a required component is missing."""
        return not self.passed and not self.optional

    def __str__(self) -> str:
        status = "ok" if self.passed else "FAIL" if self.failed else "none"
        return f"{status:4}  {self.name:22} {self.detail}"


def check_installation() -> list[CheckResult]:
    """All results, fast checks first."""
    cuda = torch.cuda.is_available()
    cpu = f"no GPU: everything runs on the CPU ({torch.get_num_threads()} threads)"
    device = torch.cuda.get_device_name() if cuda else cpu
    has_tcnn = importlib.util.find_spec("tinycudann") is not None
    encoding = (
        "its hash encoding is used on CUDA" if has_tcnn else "not installed: pure torch is used instead"
    )
    return [
        CheckResult("torch", True, torch.__version__),
        CheckResult("CUDA", cuda, device, optional=True),
        *(_package(name) for name in ("diffusers", "transformers", "trimesh", "embreex", "nerfacc")),
        _nerfacc_kernels(cuda),
        CheckResult("tinycudann", has_tcnn and cuda, encoding, optional=True),
        _ffmpeg(),
        _teacher(),
        _judge(),
    ]


def _package(name: str) -> CheckResult:
    try:
        return CheckResult(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return CheckResult(name, False, "not installed: run pip install -e .")


def _nerfacc_kernels(cuda: bool) -> CheckResult:
    name = "nerfacc CUDA kernels"
    if not cuda:
        detail = "no GPU: nerfacc's batched functions run on the CPU, with the torch ray sampler"
        return CheckResult(name, False, detail, optional=True)
    try:  # looked for, not imported: nerfacc's own import would start a build
        built = importlib.util.find_spec("nerfacc.csrc") is not None
    except ImportError as error:
        return CheckResult(name, False, f"nerfacc cannot be imported ({error})", optional=True)
    if built:
        return CheckResult(name, True, "built with nerfacc", optional=True)
    if CUDA_HOME is None:
        return CheckResult(name, False, "no nvcc to build them: rays are sampled in torch", optional=True)
    return CheckResult(name, False, "built on first use (minutes)", optional=True)


def _ffmpeg() -> CheckResult:
    try:
        import imageio_ffmpeg

        return CheckResult("ffmpeg", True, imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        return CheckResult("ffmpeg", False, f"MP4 needs it ({error}): run pip install imageio-ffmpeg")


def _teacher() -> CheckResult:
    from distill.teacher.latent import load_latent_diffusion

    try:
        teacher = load_latent_diffusion("shapes64")
    except UserError as error:
        return CheckResult("teacher shapes64", False, str(error))
    vocabulary = f"a vocabulary of {len(teacher.vocabulary or ())} words"
    return CheckResult("teacher shapes64", True, f"loads: {teacher.resolution} px, {vocabulary}")


def _judge() -> CheckResult:
    from distill.evaluation.judge import load_judge

    try:
        return CheckResult(
            "judge judge64", True, f"loads: predicts {', '.join(load_judge('judge64').labels)}"
        )
    except UserError as error:
        return CheckResult("judge judge64", False, str(error))
