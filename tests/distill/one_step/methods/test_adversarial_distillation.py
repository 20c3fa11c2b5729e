"""LADD: its hinge losses by hand, which networks they reach, and what is real to the heads."""

import pytest
import torch
from torch import Tensor

from distill.one_step.methods.adversarial_distillation import (
    AdversarialDistillation,
    AdversarialDistillationOptions,
    block_features,
)
from distill.one_step.methods.base import Batch, MethodContext, MicroBatch
from distill.one_step.regression import Pairs
from distill.one_step.student import Student, StudentOptions
from distill.runtime.errors import UserError
from distill.teacher.latent import LatentDiffusionTeacher


def batch_of(teacher: LatentDiffusionTeacher) -> Batch:
    source = torch.Generator().manual_seed(0)
    real, noise = (torch.randn(4, *teacher.latent_shape, generator=source) for _ in range(2))
    return Batch(teacher.encode_text(["a red cube"] * 4), teacher.encode_text([""]), real, noise)


def method_of(
    teacher: LatentDiffusionTeacher, pairs: Pairs | None = None
) -> tuple[AdversarialDistillation, Student, Batch]:
    batch, student = batch_of(teacher), Student.from_teacher(teacher, StudentOptions())
    options = AdversarialDistillationOptions(pairs=None if pairs is None else "outputs/pairs")
    return options.build(MethodContext(teacher, student, batch, pairs=pairs)), student, batch


def test_every_transformer_block_has_a_head(tiny_teacher: LatentDiffusionTeacher) -> None:
    method, _, batch = method_of(tiny_teacher)
    blocks = [m for m in tiny_teacher.unet.modules() if type(m).__name__ == "Transformer2DModel"]
    t = torch.tensor([5] * 4)
    features = block_features(tiny_teacher.denoiser, batch.noise, t, batch.conditioning)
    assert len(method.heads) == len(blocks) == len(features) > 1
    assert [head.convolution.in_channels for head in method.heads] == [value.shape[1] for value in features]
    logits = method.logits(batch.real, batch.conditioning, torch.Generator().manual_seed(0))
    assert logits.shape == (4, len(blocks))
    assert not tiny_teacher.unet._forward_hooks and not any(block._forward_hooks for block in blocks)


def test_hinge_losses_by_hand(tiny_teacher: LatentDiffusionTeacher, monkeypatch: pytest.MonkeyPatch) -> None:
    method, student, batch = method_of(tiny_teacher)
    table = {"real": torch.tensor([[0.5, 3.0]]), "generated": torch.tensor([[-4.0, 0.25]])}

    def logits(latents: Tensor, *args: object) -> Tensor:
        return table["real" if latents is batch.real else "generated"]

    monkeypatch.setattr(method, "logits", logits)
    outcome = method.loss(student, batch, 0.0, torch.Generator().manual_seed(0))
    assert float(outcome.loss) == pytest.approx((4.0 - 0.25) / 2)
    loss = method.discriminator_loss(MicroBatch(outcome, batch, torch.Generator()))
    assert float(loss) == pytest.approx((0.5 + 0.0) / 2 + (0.0 + 1.25) / 2)


def test_the_student_learns_by_its_loss_and_the_heads_by_theirs(tiny_teacher: LatentDiffusionTeacher) -> None:
    """The teacher's network takes no gradient from either."""
    method, student, batch = method_of(tiny_teacher)
    tiny_teacher.unet.requires_grad_(True)
    generator = torch.Generator().manual_seed(0)
    outcome = method.loss(student, batch, 0.0, generator)
    outcome.loss.backward()
    assert all(p.grad is None for p in [*method.heads.parameters(), *tiny_teacher.unet.parameters()])
    assert max(float(p.grad.abs().max()) for p in student.parameters() if p.grad is not None) > 0

    before = [parameter.clone() for parameter in method.heads.parameters()]
    gradients = [None if p.grad is None else p.grad.clone() for p in student.parameters()]
    metrics = method.update_critic([MicroBatch(outcome, batch, generator)], 0.0)
    assert float(metrics["discriminator"]) > 0
    assert all(p.grad is None for p in tiny_teacher.unet.parameters())
    for value, parameter in zip(gradients, student.parameters(), strict=True):
        assert (value is None and parameter.grad is None) or torch.equal(value, parameter.grad)
    assert any(not torch.equal(a, b) for a, b in zip(before, method.heads.parameters(), strict=True))


def test_heads_learn_to_tell_real_from_generated(tiny_teacher: LatentDiffusionTeacher) -> None:
    method, student, batch = method_of(tiny_teacher)
    generator = torch.Generator().manual_seed(0)
    outcome = method.loss(student, batch, 0.0, generator)
    losses = [
        float(method.update_critic([MicroBatch(outcome, batch, generator)], 0.0)["discriminator"])
        for _ in range(30)
    ]
    assert sum(losses[-5:]) < 0.7 * sum(losses[:5])


def test_pairs_are_real_with_their_own_captions(tiny_teacher: LatentDiffusionTeacher) -> None:
    latents = torch.full((3, *tiny_teacher.latent_shape), 7.0)
    conditioning = tiny_teacher.encode_text(["a blue duck"])
    pairs = Pairs(torch.zeros_like(latents), latents, conditioning, torch.zeros(3, dtype=torch.long))
    method, student, batch = method_of(tiny_teacher, pairs)
    calls: list[tuple[Tensor, Tensor]] = []
    original = method.logits

    def logits(latents: Tensor, conditioning: object, generator: torch.Generator) -> Tensor:
        calls.append((latents, conditioning.embedding))  # type: ignore[attr-defined]
        return original(latents, conditioning, generator)  # type: ignore[arg-type]

    method.logits = logits  # type: ignore[method-assign,assignment]
    outcome = method.loss(student, batch, 0.0, torch.Generator().manual_seed(0))
    method.discriminator_loss(MicroBatch(outcome, batch, torch.Generator().manual_seed(0)))
    real, embedding = calls[1]
    assert bool((real == 7.0).all()) and len(real) == 4
    torch.testing.assert_close(embedding, conditioning.embedding.expand_as(embedding))


def test_options_out_of_range_are_refused() -> None:
    with pytest.raises(UserError, match="a width of at least 8"):
        AdversarialDistillationOptions(updates=0)
