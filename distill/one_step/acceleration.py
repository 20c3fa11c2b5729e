"""Sharding, torch.compile and activation checkpointing of the networks of a distillation."""

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from distill.core.teacher import Teacher
from distill.one_step.methods.base import Method
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from distill.runtime.sharding import shard


def shard_networks(
    run: Run, teacher: Teacher, student: Student, method: Method, optimizer: torch.optim.Optimizer
) -> None:
    """Split all networks, and the optimizers' states, among the processes; `optimizer` is the student's.

    Raises `UserError` in float16, whose loss scale would differ between the processes.
    """
    if run.scaler is not None:
        raise UserError(
            "distill.shard needs gradients of one scale in all processes: "
            "give run.precision=bfloat16 or float32"
        )
    denoisers, lora = [student.denoiser, teacher.denoiser], list[nn.Parameter]()
    denoisers += [copy.denoiser for copy in method.copies]
    if method.critic is not None and method.critic.options.kind == "lora":
        lora = method.critic.parameters()
    elif method.critic is not None:
        denoisers.append(method.critic.denoiser)
    for denoiser in denoisers:
        shard(denoiser.network, [optimizer, *method.optimizers], lora)


def prepare_networks(run: Run, teacher: Teacher, student: Student, method: Method) -> None:
    """As the run's options say; call it once all networks have been copied.

    Raises `UserError` where activations cannot be recomputed.
    """
    critic = method.critic
    lora = critic is not None and critic.options.kind == "lora"
    if run.options.gradient_checkpointing:
        if lora and method.through_critic:  # it is no longer enabled when the backward pass recomputes
            raise UserError(
                "run.gradient_checkpointing cannot recompute a LoRA critic that the student's gradient "
                "passes through: give a critic of kind=copy, or leave checkpointing off"
            )
        # The teacher's takes effect only where a gradient passes through it, as in SiD.
        for denoiser in (student.denoiser, teacher.denoiser, *([] if critic is None else [critic.denoiser])):
            denoiser.enable_gradient_checkpointing()
    if not run.compiled:
        return
    student.denoiser.network.compile()
    if lora:
        return  # it shares the teacher's network, whose bottleneck hooks compiled code would skip
    teacher.denoiser.network.compile()
    if critic is not None:
        for block in _blocks(critic.denoiser.network):
            block.compile()


def _blocks(network: nn.Module) -> list[nn.Module]:
    """All of a U-Net but its bottleneck, which compiled code would not show to a discriminator's hooks."""
    if not isinstance(network, UNet2DConditionModel):
        return []
    return [*network.down_blocks, *network.up_blocks]
