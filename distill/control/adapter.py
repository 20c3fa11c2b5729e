"""A teacher seen through adapters: `diffusers.ControlNetModel`s whose zero convolutions add to its U-Net's skips.

Zhang, Rao, Agrawala 2023, arXiv:2302.05543: y = F(x; frozen) + Z(F(x + Z(c); copy)), section 3.1.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch
from diffusers import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput
from torch import Tensor, nn

from distill.core.noise import NoiseSchedule
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.files import read_json, replaced_folder, write_json
from distill.runtime.shipped import known, located
from distill.teacher.latent import Teacher, UNetDenoiser

MARK = "condition.json"  # beside the weights: what the adapter takes
# Of the condition's own convolutions, each but the first at half the resolution before; diffusers' own end at 256.
WIDTHS = (16, 32, 48, 64)


def make_adapter(teacher: Teacher) -> ControlNetModel:
    """A copy of the lower half of the teacher's U-Net that takes a picture, silent until it is trained."""
    halvings = (teacher.resolution // teacher.latent_shape[1]).bit_length()
    if halvings > len(WIDTHS):
        raise UserError(
            f"the VAE makes a latent of 1 in {2 ** (halvings - 1)} pixels a side: at most {2 ** (len(WIDTHS) - 1)} is expected"
        )
    made = ControlNetModel.from_unet(teacher.unet, conditioning_embedding_out_channels=WIDTHS[:halvings])
    return made.float().to(teacher.device, memory_format=torch.channels_last)


@dataclass(frozen=True)
class Control:
    """An adapter, its pictures (N, 3, H, W) in [0, 1], its weight, and the share of the denoising it acts in.

    Pictures belong to the items of a batch in turn: a batch of k N, such as guidance asks, repeats them. At time t the share
    done is 1 - (t + 1) / T, so that `start` and `end` mean what they mean in `StableDiffusionControlNetPipeline`.
    """

    adapter: ControlNetModel
    pictures: Tensor
    weight: float = 1.0
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        if not 0 <= self.start < self.end <= 1:
            raise UserError(
                f"a control acts from {self.start} to {self.end}: two shares of the denoising are expected, 0 <= start < end <= 1"
            )

    def weights(self, t: Tensor, steps: int) -> Tensor:
        """Its weight at times t (B,): (B, 1, 1, 1), 0 where it does not act."""
        done = 1 - (t + 1).double() / steps
        acts = (done >= self.start - 1e-6) & (done < self.end - 1e-6)
        return (self.weight * acts).float()[:, None, None, None]

    def seen(self, count: int) -> Tensor:
        """The pictures for a batch of `count`. Raises `UserError` where it is no multiple of theirs."""
        if count % len(self.pictures):
            raise UserError(
                f"{len(self.pictures)} control pictures cannot serve a batch of {count}: give one, or one an image"
            )
        return self.pictures.repeat(count // len(self.pictures), 1, 1, 1)


def residuals(
    controls: Sequence[Control], x_t: Tensor, t: Tensor, condition: Tensor, steps: int
) -> tuple[list[Tensor], Tensor] | None:
    """What controls add to the skips and to the middle of a U-Net, summed; None where none acts."""
    total: tuple[list[Tensor], Tensor] | None = None
    for control in controls:
        weights = control.weights(t, steps).to(x_t.device)
        if not weights.any():
            continue
        net = control.adapter
        seen = control.seen(len(x_t)).to(x_t.device, net.dtype)
        told = net(x_t.to(net.dtype), t, encoder_hidden_states=condition.to(net.dtype), controlnet_cond=seen)
        down, middle = told.down_block_res_samples, told.mid_block_res_sample
        scale = weights.to(middle.dtype)
        down, middle = [value * scale for value in down], middle * scale
        total = (
            (down, middle)
            if total is None
            else ([a + b for a, b in zip(total[0], down, strict=True)], total[1] + middle)
        )
    return total


@final
class ControlledUnet(nn.Module):
    """A U-Net with controls, called as the U-Net is; where none acts it is the U-Net, bit for bit."""

    def __init__(self, unet: Any, schedule: NoiseSchedule, controls: Sequence[Control]) -> None:
        super().__init__()
        self.unet, self.schedule, self.controls = unet, schedule, list(controls)

    @property
    def dtype(self) -> torch.dtype:
        """That of the U-Net."""
        return self.unet.dtype

    def forward(self, x_t: Tensor, t: Tensor, encoder_hidden_states: Tensor) -> UNet2DConditionOutput:
        """x_t (B, C, h, w), t (B,), text states (B, L, D)."""
        added = residuals(self.controls, x_t, t, encoder_hidden_states, self.schedule.num_train_timesteps)
        if added is None:
            return self.unet(x_t, t, encoder_hidden_states=encoder_hidden_states)
        return self.unet(
            x_t,
            t,
            encoder_hidden_states=encoder_hidden_states,
            down_block_additional_residuals=tuple(value.to(self.dtype) for value in added[0]),
            mid_block_additional_residual=added[1].to(self.dtype),
        )


def controlled(teacher: Teacher, controls: Sequence[Control]) -> Teacher:
    """The teacher seen through its controls: the same parts, another score. It obeys the teacher protocol, so every objective takes it."""
    seen = copy.copy(teacher)
    seen.score = UNetDenoiser(
        ControlledUnet(teacher.unet, teacher.schedule, controls),
        teacher.schedule,
        teacher.score.prediction_type,
    )
    return seen


def controlled_student(student: Student, controls: Sequence[Control]) -> Student:
    """A student seen through adapters of its teacher, whose U-Net it began as."""
    return Student(
        ControlledUnet(student.unet, student.schedule, controls),
        student.schedule,
        student.prediction_type,
        student.times,
    )


def save_adapter(
    folder: Path | str, adapter: ControlNetModel, condition: str, figures: dict[str, float]
) -> None:
    """Write `ControlNetModel`'s own folder in fp16, and what it is conditioned on; an older adapter in its place is replaced."""
    with replaced_folder(folder, MARK, "an adapter") as temporary:
        copy.deepcopy(adapter).half().save_pretrained(temporary)
        write_json(temporary / MARK, {"condition": condition, "figures": figures})


def load_adapter(name: Path | str, device: torch.device | str = "cpu") -> tuple[ControlNetModel, str]:
    """A shipped adapter or one of a folder, float32 and frozen, and what it is conditioned on; a folder of another's making says "".

    Raises `UserError` where there is none.
    """
    folder = located("adapter", name)
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{name} is no adapter: give {known('adapter')}, or a folder that train_controlnet.py wrote"
        )
    adapter = ControlNetModel.from_pretrained(folder, dtype=torch.float32).eval().requires_grad_(False)
    condition = read_json(folder / MARK)["condition"] if (folder / MARK).is_file() else ""
    return adapter.to(device, memory_format=torch.channels_last), condition
