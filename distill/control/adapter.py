"""Adapters: `diffusers.ControlNetModel`s whose zero convolutions add to the skips of a frozen U-Net.

Zhang, Rao, Agrawala 2023, arXiv:2302.05543: y = F(x; frozen) + Z(F(x + Z(c); copy)), section 3.1.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from diffusers import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from distill.core.identity import TeacherIdentity, check_teacher, recorded_teacher, teacher_record
from distill.core.noise import NoiseSchedule
from distill.core.teacher import Denoiser, Teacher
from distill.data.images import load_image
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.files import atomic_folder, read_json, write_json
from distill.runtime.precision import Precision
from distill.runtime.shipped import names, resolve
from distill.teacher.denoiser import DiffusersDenoiser, UNetDenoiser
from distill.teacher.pipeline import LatentTeacher

AnyTeacher = TypeVar("AnyTeacher", bound=Teacher)
CONDITION_FILE = "condition.json"  # marks an adapter's folder and names its condition
# Channels of the condition encoder, each after the first at half the resolution.
CONDITION_CHANNELS = (16, 32, 48, 64)
SHAPE = ("in_channels", "block_out_channels", "layers_per_block", "cross_attention_dim")  # the U-Net's
STOCK_CHANNELS, STOCK_RESOLUTION = (16, 32, 96, 256), 512  # of the published adapters of Stable Diffusion


def make_adapter(teacher: LatentTeacher) -> ControlNetModel:
    """An untrained adapter: a float32 copy of the encoder half of the teacher's U-Net, zero convolutions.

    Raises `UserError` for a teacher without a U-Net.
    """
    if not isinstance(teacher.denoiser, UNetDenoiser):
        raise UserError(
            f"adapters are made of a U-Net, and the teacher {teacher.name_or_path} has a "
            f"{type(teacher.network).__name__}: give a teacher of Stable Diffusion 1.x, 2.x or XL"
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
class Control:
    """An adapter with its images (N, 3, H, W) in [0, 1], its weight, and its range of the denoising.

    `start` and `end` are fractions of the denoising, which at time t is 1 - (t + 1) / T, as in
    `StableDiffusionControlNetPipeline`. A batch of k N samples, as of guidance, repeats the images.
    """

    adapter: ControlNetModel
    images: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise UserError(
                f"a control from {self.start} to {self.end}: "
                "expected fractions of the denoising, 0 <= start < end <= 1"
            )

    @property
    def always(self) -> bool:
        """Whether its range is the whole denoising."""
        return self.start == 0 and self.end == 1

    def weights(self, t: Tensor, num_train_timesteps: int) -> Tensor:
        """The weight (B, 1, 1, 1) at times t (B,): 0 outside its range."""
        fraction = 1 - (t + 1).double() / num_train_timesteps
        active = (fraction >= self.start - 1e-6) & (fraction < self.end - 1e-6)
        return (self.weight * active).float()[:, None, None, None]

    def batch_images(self, count: int) -> Tensor:
        """Images (count, 3, H, W). Raises `UserError` where count is not a multiple of their number."""
        if count % len(self.images):
            raise UserError(
                f"{len(self.images)} control images for a batch of {count}: expected one, or one a sample"
            )
        return self.images.repeat(count // len(self.images), 1, 1, 1)


@dataclass(frozen=True)
class ControlOptions:
    """An adapter, the file of its condition image, and where it acts."""

    adapter: str  # silhouette, depth, or a folder of train_controlnet.py
    image: str  # the condition, for example a white silhouette on black
    weight: float = 1.0
    start: float = 0.0  # the range of the denoising, as fractions; 0 is pure noise
    end: float = 1.0

    def build(self, teacher: Teacher) -> Control:
        """The control, loaded. Raises `UserError` for an invalid adapter or image."""
        adapter, _ = load_adapter(self.adapter, teacher)
        image = load_image(self.image, teacher.resolution).to(teacher.device)
        return Control(adapter, image, self.weight, self.start, self.end)


def residuals(
    controls: Sequence[Control], x_t: Tensor, t: Tensor, num_train_timesteps: int, inputs: Mapping[str, Any]
) -> list[Tensor]:
    """Sums over the controls to be added to a U-Net's skips and, last, to its middle block.

    inputs: what the U-Net is conditioned on, in its own words. Empty where no control is active at t.
    """
    total: list[Tensor] = []
    for control in controls:
        weights = control.weights(t, num_train_timesteps).to(x_t.device)
        if not control.always and not weights.any():  # only a range waits for the device
            continue
        adapter, dtype = control.adapter, control.adapter.dtype
        images = control.batch_images(len(x_t)).to(x_t.device, dtype)
        own = tree_map(partial(Tensor.to, dtype=dtype), dict(inputs))
        output = adapter(x_t.to(dtype), t, controlnet_cond=images, **own)
        outputs = [*output.down_block_res_samples, output.mid_block_res_sample]
        weighted = [value * weights.to(value.dtype) for value in outputs]
        total = [a + b for a, b in zip(total, weighted, strict=True)] if total else weighted
    return total


@final
class ControlledUnet(nn.Module):
    """A U-Net with controls, called as the U-Net is, and equal to it bit for bit where none is active.

    The controls are no part of the module: its parameters, a copy and a LoRA are the U-Net's alone, and a
    copy shares the adapters.
    """

    def __init__(self, unet: Any, schedule: NoiseSchedule, controls: Sequence[Control]) -> None:
        super().__init__()
        self.unet, self.schedule, self.controls = unet, schedule, list(controls)
        self.config = unet.config

    def __deepcopy__(self, memo: dict[int, Any]) -> "ControlledUnet":
        return ControlledUnet(copy.deepcopy(self.unet, memo), self.schedule, self.controls)

    @property
    def dtype(self) -> torch.dtype:
        """That of the U-Net."""
        return self.unet.dtype

    @property
    def device(self) -> torch.device:
        """That of the U-Net."""
        return self.unet.device

    @property
    def peft_config(self) -> Mapping[str, Any]:
        """The U-Net's LoRAs by name; empty without any."""
        return getattr(self.unet, "peft_config", {})

    def add_adapter(self, config: Any, adapter_name: str) -> None:
        """Add a LoRA to the U-Net."""
        self.unet.add_adapter(config, adapter_name=adapter_name)

    def delete_adapters(self, adapter_name: str) -> None:
        """Delete a LoRA of the U-Net."""
        self.unet.delete_adapters(adapter_name)

    def enable_adapters(self) -> None:
        """Activate the U-Net's LoRA."""
        self.unet.enable_adapters()

    def disable_adapters(self) -> None:
        """Deactivate the U-Net's LoRA."""
        self.unet.disable_adapters()

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the U-Net's activations in the backward pass."""
        self.unet.enable_gradient_checkpointing()

    def forward(
        self,
        x_t: Tensor,
        t: Tensor,
        encoder_hidden_states: Tensor,
        timestep_cond: Tensor | None = None,
        added_cond_kwargs: dict[str, Tensor] | None = None,
    ) -> UNet2DConditionOutput:
        """x_t (B, C, h, w), t (B,), text embeddings (B, L, D), features (B, F) of a guidance scale.

        added_cond_kwargs: pooled embeddings and time ids of Stable Diffusion XL.
        """
        inputs: dict[str, Any] = {"encoder_hidden_states": encoder_hidden_states}
        if added_cond_kwargs is not None:
            inputs["added_cond_kwargs"] = added_cond_kwargs
        added = residuals(self.controls, x_t, t, self.schedule.num_train_timesteps, inputs)
        inputs["timestep_cond"] = timestep_cond
        if not added:
            return self.unet(x_t, t, **inputs)
        *down, middle = (value.to(self.dtype) for value in added)
        return self.unet(
            x_t,
            t,
            **inputs,
            down_block_additional_residuals=tuple(down),
            mid_block_additional_residual=middle,
        )


def controlled(teacher: AnyTeacher, controls: Sequence[Control]) -> AnyTeacher:
    """A teacher of the same parts, whose predictions are conditioned on the controls too.

    Raises `UserError` for a teacher without a U-Net.
    """
    controlled_teacher = copy.copy(teacher)
    controlled_teacher.denoiser = _controlled_denoiser(teacher.denoiser, controls)
    return controlled_teacher


def controlled_student(student: Student, controls: Sequence[Control]) -> Student:
    """A student conditioned on adapters of its teacher, from whose U-Net it was initialised."""
    return student.with_denoiser(_controlled_denoiser(student.denoiser, controls))


def _controlled_denoiser(denoiser: Denoiser, controls: Sequence[Control]) -> DiffusersDenoiser:
    if not isinstance(denoiser, UNetDenoiser):
        raise UserError(f"adapters need a U-Net, not a {type(denoiser).__name__}: leave the controls out")
    for control in controls:
        _check_shape(control.adapter, denoiser.network)
    return denoiser.with_network(ControlledUnet(denoiser.network, denoiser.schedule, controls))


def _check_shape(adapter: ControlNetModel, unet: Any) -> None:
    ours, theirs = (
        {name: _plain(config[name]) for name in SHAPE} for config in (adapter.config, unet.config)
    )
    different = [f"{name} {ours[name]} and {theirs[name]}" for name in SHAPE if ours[name] != theirs[name]]
    if different:
        raise UserError(
            f"the adapter belongs to another teacher (its own and this one's {', '.join(different)}): "
            "give the teacher that it was trained on"
        )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value  # a list in a folder's JSON


def save_adapter(
    folder: Path | str,
    adapter: ControlNetModel,
    condition: str,
    figures: dict[str, float],
    teacher: TeacherIdentity | None = None,
) -> None:
    """Write `ControlNetModel`'s own folder in fp16, with its condition and the teacher that it belongs to.

    An older adapter is replaced.
    """
    facts = {"condition": condition, "figures": figures, **teacher_record(teacher)}
    with atomic_folder(folder, CONDITION_FILE, "an adapter") as temporary:
        copy.deepcopy(adapter).half().save_pretrained(temporary)
        write_json(temporary / CONDITION_FILE, facts)


def load_adapter(name_or_path: Path | str, teacher: Teacher | None = None) -> tuple[ControlNetModel, str]:
    """A shipped adapter or one of a folder, frozen, and its condition ("" where unknown).

    It has the device and the precision of the teacher (or of a student's parts) that it is for, by default
    float32 on the CPU. Raises `UserError` where there is none, and for one that belongs to another teacher.
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
        precision, owner = teacher.precision, recorded_teacher(facts, str(path))
        remedy = "train one (scripts/train_controlnet.py)"
        check_teacher(f"adapter {name_or_path}", owner, teacher.identity, remedy)
    adapter = ControlNetModel.from_pretrained(folder, dtype=precision.dtype).eval().requires_grad_(False)
    adapter = adapter.to(precision.device, memory_format=torch.channels_last)
    return adapter, facts.get("condition", "")
