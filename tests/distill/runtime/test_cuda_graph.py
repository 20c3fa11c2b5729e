"""A captured loss and its gradients equal the eager ones, for every later input."""

import pytest
import torch
from torch import nn

from distill.runtime.cuda_graph import GraphedLoss


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs need a CUDA device")
def test_a_replay_equals_an_eager_pass() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(6, 16), nn.SiLU(), nn.Linear(16, 3)).cuda()
    parameters = list(network.parameters())

    def loss(inputs: list[torch.Tensor]) -> torch.Tensor:
        x, target = inputs
        return (network(x) + network(2 * x) - target).square().mean()  # each parameter used twice

    graphed = GraphedLoss(loss, parameters)
    optimizer = torch.optim.SGD(parameters, lr=0.1)
    for step in range(3):
        generator = torch.Generator().manual_seed(step)
        inputs = [torch.randn(5, size, generator=generator).cuda() for size in (6, 3)]
        expected = loss(inputs)
        gradients = torch.autograd.grad(expected, parameters)

        torch.testing.assert_close(graphed(inputs), expected.detach())
        for parameter, gradient in zip(parameters, gradients, strict=True):
            torch.testing.assert_close(parameter.grad, gradient)
        optimizer.step()  # the next replay reads the new weights

    with pytest.raises(ValueError, match="differ from those of the captured graph"):
        graphed([torch.zeros(4, 6).cuda(), torch.zeros(4, 3).cuda()])
