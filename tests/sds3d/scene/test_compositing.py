"""Rays rendered in chunks and recomputed in backward: equal to all at once, in less memory."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from distill.runtime.errors import UserError
from sds3d.scene.cameras import ring
from sds3d.scene.encoding import HashEncodingOptions
from sds3d.scene.field import FieldOptions
from sds3d.scene.nerf import BackgroundOptions, GridOptions, NeRF, NerfOptions, NerfViews
from sds3d.scene.regularizers import RegularizerOptions
from sds3d.scene.renderer import RenderOptions
from sds3d.scene.shading import PointLights

SIDE = 20
OPTIONS = NerfOptions(
    FieldOptions(
        HashEncodingOptions(n_levels=3, n_features_per_level=2, log2_hashmap_size=10, base_resolution=4), 8
    ),
    GridOptions(resolution=16),
    RenderOptions(samples=32),
    BackgroundOptions("mlp"),
)
ALL_TERMS = RegularizerOptions(orientation=1.0, sparsity=1.0, samples=500)
LIGHTS = PointLights(torch.tensor([[3.0, 1.0, 1.0], [0.0, 3.0, 2.0]]), 0.1, 0.9, False)


def nerf(rays_per_chunk: int | None) -> NeRF:
    """The same scene for every size of chunks."""
    torch.manual_seed(0)
    scene = replace(OPTIONS, render=replace(OPTIONS.render, rays_per_chunk=rays_per_chunk)).build()
    scene.field.encoding.table.data.normal_()
    scene.background.mlp[-1].weight.data.normal_()
    scene.update(0)
    return scene


def rendered(scene: NeRF, lights: PointLights | None, normals: bool = True) -> NerfViews:
    generator = torch.Generator().manual_seed(1)
    return scene.render(ring(2, resolution=SIDE), None, generator, True, normals, lights)


def gradients(scene: NeRF, views: NerfViews) -> list[Tensor]:
    """Of losses on all that is rendered, on gradients by target, and of every regularizer."""
    weight = torch.rand(views.rgb.shape, generator=torch.Generator().manual_seed(2))
    density_rgb, albedo_rgb = views.split_gradients()
    assert views.normal is not None
    loss = (weight * (views.rgb + density_rgb * 2 + albedo_rgb * 3 + views.normal)).sum()
    loss = loss + views.depth.mean() + views.opacity.square().mean()
    loss = loss + scene.regularization(views, ALL_TERMS, 0.75, torch.Generator().manual_seed(3))
    return list(torch.autograd.grad(loss, list(scene.parameters())))


@pytest.mark.parametrize("lights", [None, LIGHTS], ids=["albedo", "lit"])
@pytest.mark.parametrize("chunk", [1, 64, 333])
def test_chunks_equal_the_whole(chunk: int, lights: PointLights | None) -> None:
    if chunk == 1:
        chunk = SIDE**2  # a view each
    whole, parts = nerf(None), nerf(chunk)
    expected, views = rendered(whole, lights), rendered(parts, lights)
    for name in ("rgb", "opacity", "depth", "normal"):
        torch.testing.assert_close(vars(views)[name], vars(expected)[name], rtol=1e-5, atol=1e-6)
    assert expected.rays is not None and views.rays is not None
    for name in ("weights", "points", "ray_indices", "depth_variance", "albedo_rgb"):
        torch.testing.assert_close(vars(views.rays)[name], vars(expected.rays)[name], rtol=1e-5, atol=1e-6)
    for ours, theirs in zip(gradients(parts, views), gradients(whole, expected), strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3 * float(theirs.abs().max()))


def saved_bytes(scene: NeRF) -> int:
    """What a render stores for its backward pass."""
    stored: dict[int, int] = {}

    def pack(value: Tensor) -> Tensor:
        storage = value.untyped_storage()
        stored[storage.data_ptr()] = storage.nbytes()
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        rendered(scene, LIGHTS, normals=False)
    return sum(stored.values())


def test_chunks_store_no_activations() -> None:
    assert saved_bytes(nerf(64)) < 0.1 * saved_bytes(nerf(None))


def test_no_chunks_without_need_and_none_of_no_rays() -> None:
    assert saved_bytes(nerf(2 * SIDE**2)) == saved_bytes(nerf(None))
    with pytest.raises(UserError, match="rays_per_chunk is 0"):
        RenderOptions(rays_per_chunk=0)


def test_empty_chunks_are_rendered() -> None:
    scene = nerf(16)  # the corners of the image meet no occupied cell
    with torch.no_grad():
        scene.field.mlp[-1].bias[0] = -100.0
    scene.grid.density_ema.zero_()
    scene.update(0)
    views = rendered(scene, None, normals=False)
    assert views.opacity.max() < 1e-3
    views.rgb.sum().backward()
