"""torch.compile and activation checkpointing of the networks that an objective evaluates."""

from distill.core.teacher import Teacher
from distill.objectives.critic import Critic
from distill.runtime.run import Run


def prepare_networks(
    run: Run, teacher: Teacher, critic: Critic | None, compile_denoiser: bool = True
) -> None:
    """As the run's options say; call it once all networks have been copied.

    Checkpointing takes effect only where a gradient passes through: in the encoder of images, and in a
    critic's training.
    """
    if run.options.gradient_checkpointing:
        teacher.enable_gradient_checkpointing()
        if critic is not None:
            critic.denoiser.enable_gradient_checkpointing()
    # A LoRA is switched on and off inside the teacher's network, which compiled code would not follow.
    if run.compiled and compile_denoiser and (critic is None or critic.options.kind == "copy"):
        teacher.denoiser.network.compile()
