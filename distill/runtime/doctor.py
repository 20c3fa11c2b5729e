"""What is installed here, and what will therefore be used."""

import importlib.util
from dataclasses import dataclass
from importlib import metadata

import torch

from distill.runtime.errors import UserError


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report; a missing optional part is no failure."""

    name: str
    good: bool
    text: str
    optional: bool = False


def examine() -> list[Finding]:
    """All findings, cheap ones first."""
    cuda = torch.cuda.is_available()
    where = (
        torch.cuda.get_device_name()
        if cuda
        else f"no GPU: everything runs on the CPU ({torch.get_num_threads()} threads)"
    )
    findings = [Finding("torch", True, torch.__version__), Finding("CUDA", cuda, where, optional=True)]
    findings += [_package(name) for name in ("diffusers", "transformers", "trimesh", "embreex", "nerfacc")]
    findings.append(_nerfacc_kernels(cuda))
    has_tcnn = importlib.util.find_spec("tinycudann") is not None
    used = "its hash encoding is used on CUDA" if has_tcnn else "not installed: the pure-torch twin is used"
    findings.append(Finding("tinycudann", has_tcnn and cuda, used, optional=True))
    findings.append(_ffmpeg())
    findings += [_teacher(), _judge()]
    return findings


def _package(name: str) -> Finding:
    try:
        return Finding(name, True, metadata.version(name))
    except metadata.PackageNotFoundError:
        return Finding(name, False, "not installed: run pip install -e .")


def _nerfacc_kernels(cuda: bool) -> Finding:
    if not cuda:
        return Finding(
            "nerfacc's CUDA part",
            False,
            "no GPU: its batched functions run on the CPU, with our own sampler",
            True,
        )
    try:
        from nerfacc.cuda import _backend

        return Finding(
            "nerfacc's CUDA part",
            _backend._C is not None,
            "built" if _backend._C else "built on first use (minutes)",
            True,
        )
    except (ImportError, OSError, AttributeError) as error:
        return Finding("nerfacc's CUDA part", False, f"unavailable ({error}): our own sampler is used", True)


def _ffmpeg() -> Finding:
    try:
        import imageio_ffmpeg

        return Finding("ffmpeg", True, imageio_ffmpeg.get_ffmpeg_exe())
    except (ImportError, RuntimeError) as error:
        return Finding("ffmpeg", False, f"no MP4 can be written ({error}): run pip install imageio-ffmpeg")


def _teacher() -> Finding:
    from distill.teacher.latent import Teacher

    try:
        teacher = Teacher.load("shapes64")
        return Finding(
            "teacher shapes64",
            True,
            f"loads: {teacher.resolution} px, knows {len(teacher.words or ())} words, {teacher.place}",
        )
    except UserError as error:
        return Finding("teacher shapes64", False, str(error))


def _judge() -> Finding:
    from distill.evaluation.judge import load_judge

    try:
        return Finding("judge judge64", True, f"loads: tells {', '.join(load_judge('judge64').labels)}")
    except UserError as error:
        return Finding("judge judge64", False, str(error))
