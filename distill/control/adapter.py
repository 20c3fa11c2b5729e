"""Adapters (ControlNet, arXiv:2302.05543): made of a teacher's network, given to it, saved and loaded."""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from diffusers import (
    ControlNetModel,
    FluxControlNetModel,
    SD3ControlNetModel,
    UNet2DConditionModel,
    UNet2DModel,
)

from distill.control.network import AdapterNetwork, Control, ControlledUnet
from distill.control.pixel import ControlledClassUnet, PixelControlNet, make_pixel_adapter
from distill.control.transformer import ControlledFlux, ControlledSD3, make_flux_adapter, make_sd3_adapter
from distill.core.identity import TeacherIdentity, check_teacher, recorded_teacher, teacher_record
from distill.core.teacher import Denoiser, Teacher
from distill.data.images import load_image
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_folder, read_json, write_json
from distill.runtime.precision import Precision
from distill.runtime.shipped import names, resolve
from distill.teacher.denoiser import DiffusersDenoiser
from distill.teacher.flow import FluxDenoiser, SD3Denoiser
from distill.teacher.pipeline import LatentTeacher, PipelineTeacher

AnyTeacher = TypeVar("AnyTeacher", bound=Teacher)
CONDITION_FILE = "condition.json"  # marks an adapter's folder and names its condition
# Channels of the condition encoder, each after the first at half the resolution.
CONDITION_CHANNELS = (16, 32, 48, 64)
MODELS = (ControlNetModel, SD3ControlNetModel, FluxControlNetModel, PixelControlNet)
CLASSES = {cls.__name__: cls for cls in MODELS}
# What the configs of an adapter and of its network, a U-Net or a transformer, must agree in.
UNET_SHAPE = (
    "in_channels",
    "block_out_channels",
    "layers_per_block",
    "cross_attention_dim",
    "num_class_embeds",
    "projection_class_embeddings_input_dim",
)
TRANSFORMER_SHAPE = ("in_channels", "attention_head_dim", "num_attention_heads", "pooled_projection_dim")
STOCK_CHANNELS, STOCK_RESOLUTION = (16, 32, 96, 256), 512  # of the published adapters of Stable Diffusion


def make_adapter(teacher: PipelineTeacher) -> AdapterNetwork:
    """An untrained adapter: a float32 copy of the encoder half of the teacher's U-Net, zero convolutions.

    Of a transformer, of its first blocks. Raises `UserError` for a teacher of which there are no adapters.
    """
    if isinstance(teacher.network, UNet2DModel):
        return make_pixel_adapter(teacher.network).float().to(teacher.device)
    if isinstance(teacher.denoiser, SD3Denoiser):
        return make_sd3_adapter(teacher.network).float().to(teacher.device)
    if isinstance(teacher.denoiser, FluxDenoiser):
        return make_flux_adapter(teacher.network).float().to(teacher.device)
    if not isinstance(teacher.network, UNet2DConditionModel):
        raise UserError(
            f"there are no adapters of a {type(teacher.network).__name__}, which {teacher.name_or_path} has: "
            "give a teacher of Stable Diffusion 1.x, 2.x, XL or 3, Flux, or one of pixels with a U-Net of "
            "diffusers"
        )
    levels = (teacher.resolution // teacher.latent_shape[1]).bit_length()
    if levels > len(CONDITION_CHANNELS):
        raise UserError(
            f"the VAE downsamples by {2 ** (levels - 1)}: adapters are made for a factor of at most "
            f"{2 ** (len(CONDITION_CHANNELS) - 1)}"
        )
    stock = teacher.resolution >= STOCK_RESOLUTION
    channels = (STOCK_CHANNELS if stock else CONDITION_CHANNELS)[:levels]
    adapter = ControlNetModel.from_unet(teacher.network, conditioning_embedding_out_channels=channels)
    return adapter.float().to(teacher.device, memory_format=torch.channels_last)


@dataclass(frozen=True)
class ControlOptions:
    """An adapter, the file of its condition image, and where it acts."""

    adapter: str  # silhouette, depth, or a folder of train_controlnet.py
    image: str  # the condition, for example a white silhouette on black
    weight: float = 1.0
    start: float = 0.0  # the range of the denoising, as fractions; 0 is pure noise
    end: float = 1.0
    any_teacher: bool = False  # also an adapter that was trained on another teacher of the same shape

    def build(self, teacher: Teacher) -> Control:
        """The control, loaded. Raises `UserError` for an invalid adapter or image."""
        adapter, _ = load_adapter(self.adapter, teacher, self.any_teacher)
        image = load_image(self.image, teacher.resolution).to(teacher.device)
        return Control(adapter, image, self.weight, self.start, self.end)


def controlled(teacher: AnyTeacher, controls: Sequence[Control]) -> AnyTeacher:
    """A teacher of the same parts, whose predictions are conditioned on the controls too.

    Raises `UserError` for a teacher of which there are no adapters, and for those of another one.
    """
    controlled_teacher = copy.copy(teacher)
    controlled_teacher.denoiser = _controlled_denoiser(teacher.denoiser, controls, teacher)
    return controlled_teacher


def controlled_student(student: Student, controls: Sequence[Control]) -> Student:
    """A student conditioned on adapters of its teacher, from whose U-Net it was initialised."""
    return student.with_denoiser(_controlled_denoiser(student.denoiser, controls))


def _controlled_denoiser(
    denoiser: Denoiser, controls: Sequence[Control], teacher: Teacher | None = None
) -> DiffusersDenoiser:
    transformer = isinstance(denoiser, (SD3Denoiser, FluxDenoiser)) and teacher is not None
    unet = isinstance(denoiser.network, (UNet2DConditionModel, UNet2DModel))
    if not isinstance(denoiser, DiffusersDenoiser) or not (transformer or unet):
        raise UserError(f"there are no adapters of a {type(denoiser).__name__}: leave the controls out")
    network, schedule = denoiser.network, denoiser.schedule
    for control in controls:
        _check_shape(control.adapter, network)
    if isinstance(network, UNet2DModel):
        return denoiser.with_network(ControlledClassUnet(network, schedule, controls))
    if not transformer:
        return denoiser.with_network(ControlledUnet(network, schedule, controls))
    assert isinstance(teacher, LatentTeacher)
    controlled_class = ControlledSD3 if isinstance(denoiser, SD3Denoiser) else ControlledFlux
    shift = teacher.latent_mean * teacher.vae.config.scaling_factor
    return denoiser.with_network(controlled_class(network, schedule, controls, teacher.encode_images, shift))


def _check_shape(adapter: AdapterNetwork, network: Any) -> None:
    names = UNET_SHAPE if "block_out_channels" in network.config else TRANSFORMER_SHAPE
    ours, theirs = (
        {name: _plain(config.get(name)) for name in names}
        for config in (adapter.config.get("unet", adapter.config), network.config)
    )
    different = [f"{name} {ours[name]} and {theirs[name]}" for name in names if ours[name] != theirs[name]]
    if different:
        raise UserError(
            f"the adapter belongs to another teacher (its own and this one's {', '.join(different)}): "
            "give the teacher that it was trained on"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # a list in a folder's JSON


def save_adapter(
    folder: Path | str,
    adapter: AdapterNetwork,
    condition: str,
    figures: dict[str, float],
    teacher: TeacherIdentity | None = None,
    also: Sequence[str] = (),
) -> None:
    """Write the adapter's own folder of diffusers in fp16, with its condition and its teacher's identity.

    also: further conditions that it reads. An older adapter is replaced.
    """
    facts = {"condition": condition, "also": list(also), "figures": figures, **teacher_record(teacher)}
    with atomic_folder(folder, CONDITION_FILE, "an adapter") as temporary:
        copy.deepcopy(adapter).half().save_pretrained(temporary)
        write_json(temporary / CONDITION_FILE, facts)


def load_adapter(
    name_or_path: Path | str, teacher: Teacher | None = None, any_teacher: bool = False
) -> tuple[AdapterNetwork, str]:
    """A shipped adapter or one of a folder, frozen, and its condition ("" where unknown).

    Of an adapter of several conditions the one that it is named by, if it is. It has the device and the
    precision of the teacher (or of a student's parts) that it is for, by default float32 on the CPU. Raises
    `UserError` where there is none, and for one that belongs to another teacher, unless `any_teacher`.
    """
    folder = resolve("adapter", name_or_path)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name_or_path} is no adapter: give {names('adapter')}, or a folder of train_controlnet.py"
        )
    path = folder / CONDITION_FILE
    facts = read_json(path) if path.is_file() else {}  # adapters made elsewhere have none
    precision = Precision(torch.device("cpu"), torch.float32)
    if teacher is not None:
        precision = teacher.precision
        if not any_teacher:
            owner, remedy = recorded_teacher(facts, str(path)), "train one (scripts/train_controlnet.py)"
            check_teacher(f"adapter {name_or_path}", owner, teacher.identity, remedy)
    name = read_json(folder / "config.json").get("_class_name")
    if name not in CLASSES:
        raise UserError(f"{folder} holds a {name}: expected one of {', '.join(CLASSES)}")
    adapter = CLASSES[name].from_pretrained(folder, dtype=precision.dtype).eval().requires_grad_(False)
    if adapter.config.get("conditioning_embedding_channels") or adapter.config.get("num_mode"):
        raise UserError(
            f"{folder} has an image encoder of its own, or several conditions in one: expected an adapter of "
            "Flux that reads one condition's latents"
        )
    adapter = adapter.to(precision.device, memory_format=torch.channels_last)
    condition = name_or_path if name_or_path in facts.get("also", ()) else facts.get("condition", "")
    return adapter, str(condition)
