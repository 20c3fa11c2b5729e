"""torch.compile and activation checkpointing of the networks of a distillation."""

from diffusers import UNet2DConditionModel
from torch import nn

from distill.core.teacher import Teacher
from distill.objectives.critic import Critic
from distill.one_step.student import Student
from distill.runtime.run import Run


def prepare_networks(run: Run, teacher: Teacher, student: Student, critic: Critic | None) -> None:
    """As the run's options say; call it once all networks have been copied."""
    if run.options.gradient_checkpointing:
        # The teacher's too: it takes effect only where a gradient passes through it, as in SiD.
        for denoiser in (student.denoiser, teacher.denoiser, *([] if critic is None else [critic.denoiser])):
            denoiser.enable_gradient_checkpointing()
    if not run.compiled:
        return
    student.denoiser.network.compile()
    if critic is not None:
        for block in _blocks(critic.denoiser.network):
            block.compile()
    if critic is None or critic.options.kind == "copy":
        teacher.denoiser.network.compile()


def _blocks(network: nn.Module) -> list[nn.Module]:
    """All of a U-Net but its bottleneck, which compiled code would not show to a discriminator's hooks."""
    if not isinstance(network, UNet2DConditionModel):
        return []
    return [*network.down_blocks, *network.up_blocks]
