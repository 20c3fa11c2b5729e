"""The optimiser whose updates are orthogonal matrices."""

from copy import deepcopy

import pytest
import torch
from torch import nn

from distill.runtime.muon import RMS, Muon, is_matrix, orthogonalize


def test_singular_values_move_to_one_and_singular_vectors_stay() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(3, 24, 40, generator=generator)
    for batch in (matrices, matrices.mT, matrices * 1e-4):
        result = orthogonalize(batch)
        u, _, vh = torch.linalg.svd(batch, full_matrices=False)
        values = u.mT @ result @ vh.mT  # diagonal if the singular vectors are kept
        diagonal = values.diagonal(dim1=1, dim2=2)
        assert ((diagonal > 0.65) & (diagonal < 1.25)).all()
        assert (values - torch.diag_embed(diagonal)).abs().max() < 1e-4


def test_first_update_is_orthogonal_and_of_the_stated_size() -> None:
    weight = nn.Parameter(torch.zeros(32, 16, 3, 3))
    optimizer = Muon([weight], lr=0.1)
    weight.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    expected = -0.1 * RMS * 144**0.5 * orthogonalize(weight.grad.flatten(1)[None])[0]
    torch.testing.assert_close(weight.detach().flatten(1), expected)
    assert weight.detach().square().mean().sqrt().item() == pytest.approx(0.1 * RMS, rel=0.2)


def test_batched_shapes_are_updated_as_one_by_one() -> None:
    torch.manual_seed(2)
    shapes = [(16, 20), (16, 20), (20, 16), (16, 4, 5, 1)]
    together = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    apart = [nn.Parameter(weight.detach().clone()) for weight in together]
    optimizers = [Muon(together, lr=0.01), *(Muon([weight], lr=0.01) for weight in apart)]
    for _ in range(3):
        for one, other in zip(together, apart, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other in zip(together, apart, strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_no_matrix_is_updated_as_by_adamw() -> None:
    torch.manual_seed(3)
    shapes = [(40,), (3, 64), (64, 3, 1, 1)]
    ours = [nn.Parameter(torch.randn(shape)) for shape in shapes]
    theirs = [nn.Parameter(weight.detach().clone()) for weight in ours]
    assert not any(map(is_matrix, ours)) and is_matrix(torch.zeros(16, 4, 2, 2))
    optimizer, reference = (
        Muon(ours, 0.02, weight_decay=0.1),
        torch.optim.AdamW(theirs, 0.02, weight_decay=0.1),
    )
    for _ in range(5):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape)
            other.grad = one.grad.clone()
        optimizer.step()
        reference.step()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_a_saved_state_goes_on_as_before() -> None:
    torch.manual_seed(5)
    gradients = [[torch.randn(16, 16), torch.randn(16)] for _ in range(4)]

    def advance(optimizer: Muon, weights: list[nn.Parameter], steps: slice) -> None:
        for step in gradients[steps]:
            for weight, gradient in zip(weights, step, strict=True):
                weight.grad = gradient
            optimizer.step()

    weights = [nn.Parameter(torch.zeros(16, 16)), nn.Parameter(torch.zeros(16))]
    optimizer = Muon(weights, lr=0.1)
    advance(optimizer, weights, slice(2))
    resumed = [nn.Parameter(weight.detach().clone()) for weight in weights]
    second = Muon(resumed, lr=0.3)
    second.load_state_dict(deepcopy(optimizer.state_dict()))
    advance(optimizer, weights, slice(2, 4))
    advance(second, resumed, slice(2, 4))
    for weight, other in zip(weights, resumed, strict=True):
        torch.testing.assert_close(weight, other)
