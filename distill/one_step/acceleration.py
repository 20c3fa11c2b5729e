"""torch.compile and activation checkpointing of the networks of a distillation."""

from diffusers import UNet2DConditionModel
from torch import nn

from distill.core.teacher import Teacher
from distill.one_step.methods.base import Method
from distill.one_step.student import Student
from distill.runtime.errors import UserError
from distill.runtime.run import Run


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
