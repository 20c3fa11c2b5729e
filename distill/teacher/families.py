"""The families of teachers in diffusers folders, by the pipeline class that model_index.json names."""

import importlib
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias, final

import torch

from distill.core.identity import TeacherIdentity
from distill.core.teacher import Teacher, TeacherSource
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.precision import resolve_precision
from distill.teacher.clip_conditions import load_clip_teacher
from distill.teacher.concatenation import ConcatenationTeacher, InpaintingCondition, LowResolutionCondition
from distill.teacher.contexts import ContextTeacher
from distill.teacher.flow import FluxTeacher, StableDiffusion3Teacher
from distill.teacher.identity import identify
from distill.teacher.latent import find_folder, load_latent_diffusion, loading_error
from distill.teacher.pipeline import LatentTeacher
from distill.teacher.pixels import CONDITIONING, ClassTeacher, IFTeacher
from distill.teacher.sdxl import StableDiffusionXLTeacher

STABLE_DIFFUSION = "StableDiffusionPipeline"
Family: TypeAlias = Callable[[Any, str, TeacherIdentity | None], Teacher]
FAMILIES: Mapping[str, Family] = {
    "StableDiffusionXLPipeline": StableDiffusionXLTeacher,
    "StableDiffusion3Pipeline": StableDiffusion3Teacher,
    "FluxPipeline": FluxTeacher,
    "IFPipeline": IFTeacher,
    "DDPMPipeline": ClassTeacher,
    "DDIMPipeline": ClassTeacher,
}


@final
@dataclass(frozen=True)
class PipelineSource(TeacherSource):
    """A diffusers folder or hub id with options, as a YAML file that `teacher=` names."""

    name_or_path: str
    resolution: int | None = None  # image side in pixels; null: the pipeline's default
    null_class: int | None = None  # of a network with classes: the one that stands for no label

    def build(self, device: torch.device, dtype: torch.dtype | None) -> Teacher:
        """As of every source."""
        return load_diffusers(self.name_or_path, device, dtype, self)


def load_diffusers(
    name_or_path: str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    source: PipelineSource | None = None,
) -> Teacher:
    """A shipped teacher, a diffusers folder or a hub id, of any family.

    Raises `UserError` where there is none, or one of a class that is not known.
    """
    folder = find_folder(name_or_path)
    name = pipeline_class(name_or_path, folder)
    if name == STABLE_DIFFUSION:
        _check_source(name, source)
        return load_latent_diffusion(name_or_path, device, dtype)
    if name not in FAMILIES:
        raise UserError(
            f"teacher {name_or_path!r} is a {name}: "
            f"expected one of {', '.join((STABLE_DIFFUSION, *FAMILIES))}"
        )
    dtype = resolve_precision("auto", torch.device(device)).dtype if dtype is None else dtype
    pipeline = _load_pipeline(name, name_or_path, folder, dtype).to(device)
    identity = identify(name_or_path, _network_folder(pipeline))
    teacher = build_teacher(name, pipeline, str(folder or name_or_path), identity, source)
    check_widths(teacher)
    return teacher


def build_teacher(
    name: str,
    pipeline: Any,
    path: str,
    identity: TeacherIdentity | None = None,
    source: PipelineSource | None = None,
) -> Teacher:
    """The teacher of a pipeline of the class `name`, with the options of its source. Raises `UserError`."""
    _check_source(name, source)
    if FAMILIES[name] is ClassTeacher:
        file = Path(path) / CONDITIONING
        facts = read_json(file) if file.is_file() else {"kind": "class", "names": [], "null_class": None}
        return _pixel_teacher(pipeline, facts, path, identity, source)
    if source is not None and source.resolution is not None:
        factor = pipeline.vae_scale_factor
        if source.resolution % (2 * factor):
            raise UserError(f"resolution is {source.resolution}: expected a multiple of {2 * factor}")
        pipeline.default_sample_size = source.resolution // factor
    return FAMILIES[name](pipeline, path, identity)


def _pixel_teacher(
    pipeline: Any,
    facts: Mapping[str, Any],
    path: str,
    identity: TeacherIdentity | None,
    source: PipelineSource | None,
) -> Teacher:
    """A teacher trained here, by the kind of its condition; or of classes, made elsewhere."""
    kind = facts["kind"]
    if kind in ("class", "none"):
        null_class = facts["null_class"] if source is None else source.null_class
        return ClassTeacher(pipeline, path, identity, null_class, facts["names"], facts.get("column"))
    if source is not None and source.null_class is not None:
        raise UserError(f"null_class is {source.null_class}, but {path} has no classes: leave it out")
    if kind == "context":
        return ContextTeacher(pipeline, facts["names"], path, identity, facts["column"])
    if kind == "clip":
        return load_clip_teacher(pipeline, facts, path, identity)
    if kind == "low_resolution":
        return ConcatenationTeacher(pipeline, LowResolutionCondition(facts["factor"]), path, identity)
    if kind == "inpainting":
        return ConcatenationTeacher(pipeline, InpaintingCondition(facts["largest"]), path, identity)
    raise UserError(f"{path}/{CONDITIONING} has the kind {kind!r}: it was written by a newer version")


def _check_source(name: str, source: PipelineSource | None) -> None:
    """Raise `UserError` for options that a family has not."""
    if source is None:
        return
    has_classes, fixed_size = FAMILIES.get(name) is ClassTeacher, name in (STABLE_DIFFUSION, "IFPipeline")
    if source.null_class is not None and not has_classes:
        raise UserError(f"null_class is {source.null_class}, but a {name} has no classes: leave it out")
    if source.resolution is not None and (has_classes or fixed_size):
        raise UserError(f"resolution is {source.resolution}, but a {name} has its own: leave it out")


def pipeline_class(name_or_path: str, folder: Path | None) -> str:
    """The class that the folder's model_index.json names, or the hub's. Raises `UserError`."""
    if folder is not None:
        name = read_json(folder / "model_index.json").get("_class_name")
    else:
        from diffusers import DiffusionPipeline

        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it warns of an option that it sets itself
                name = DiffusionPipeline.load_config(name_or_path).get("_class_name")
        except (OSError, ValueError) as error:
            raise loading_error(name_or_path, None, error) from None
    return str(name)


def _load_pipeline(name: str, name_or_path: str, folder: Path | None, dtype: torch.dtype) -> Any:
    from diffusers import DiffusionPipeline
    from diffusers.utils import logging

    importlib.import_module("distill.teacher.pixel_networks")  # diffusers loads imported modules' classes
    logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": dtype, "local_files_only": folder is not None}
    if name == "IFPipeline":
        options |= dict.fromkeys(("safety_checker", "feature_extractor", "watermarker"))
        options["requires_safety_checker"] = False
    try:
        return DiffusionPipeline.from_pretrained(str(folder or name_or_path), **options)
    except (OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise loading_error(name_or_path, folder, error) from None


def _network_folder(pipeline: Any) -> Path:
    """The folder that diffusers loaded the pipeline's network from, of a hub id in the hub's cache."""
    network = pipeline.components.get("transformer") or pipeline.unet
    return Path(network.config["_name_or_path"]).parent


def check_widths(teacher: Teacher) -> None:
    """Raise `UserError` where a pipeline's parts do not belong together: text encoder, network and VAE."""
    if not isinstance(teacher, LatentTeacher):
        return
    network = teacher.denoiser
    text = teacher.encode_text(["a"]).embedding.shape[-1]
    if text != network.embedding_dim:
        raise UserError(
            f"the text embeddings of teacher {teacher.name_or_path} have {text} numbers, and its "
            f"{type(network.network).__name__} reads {network.embedding_dim}: its parts are of two models"
        )
