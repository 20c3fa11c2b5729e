"""Backgrounds: the basis of the learned one, and what it can represent."""

import torch
from torch.nn import functional as F

from sds3d.scene.background import Background, BackgroundOptions, spherical_harmonics


def directions(count: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 3, generator=torch.Generator().manual_seed(0)), dim=-1)


def test_the_harmonics_are_orthonormal_on_the_sphere() -> None:
    values = spherical_harmonics(directions(400_000).double())
    gram = 4 * torch.pi * values.T @ values / len(values)
    torch.testing.assert_close(gram, torch.eye(9, dtype=torch.float64), atol=0.02, rtol=0)


def test_an_environment_of_two_colours_is_learned() -> None:
    torch.manual_seed(0)
    background = Background(BackgroundOptions("mlp"))
    rays = directions(500)
    target = torch.where(rays[:, 2:] > 0, torch.tensor([0.2, 0.4, 0.9]), torch.tensor([0.5, 0.4, 0.1]))
    optimizer = torch.optim.Adam(background.parameters(), 0.02)
    for _ in range(150):
        loss = (background(rays) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.1 * float((target - target.mean(0)).square().mean())
