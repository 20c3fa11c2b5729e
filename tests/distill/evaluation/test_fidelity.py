"""Control fidelity and the probe's depth loss, against values computed by hand."""

import pytest
import torch
from torch import Tensor

from distill.control.conditions import soft_edges, straight_lines
from distill.evaluation.fidelity import (
    correlation,
    emergence_step,
    fidelity,
    line_f1,
    mask_iou,
    rank_correlation,
)
from distill.evaluation.probe import Probe, ProbeOptions, depth_loss


def test_fidelity_by_hand() -> None:
    half, whole = torch.zeros(1, 1, 8, 8, dtype=torch.bool), torch.ones(1, 1, 8, 8, dtype=torch.bool)
    half[..., :4] = True
    empty = half & ~half
    assert float(mask_iou(half, whole)) == 0.5 and float(mask_iou(empty, empty)) == 1.0
    ramp = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert float(rank_correlation(ramp**3, ramp, whole)) == pytest.approx(1.0)
    assert float(rank_correlation(-ramp, ramp, whole)) == pytest.approx(-1.0)

    line, near, far = (torch.zeros(1, 1, 8, 8, dtype=torch.bool) for _ in range(3))
    line[..., 2], near[..., 3], far[..., 6] = True, True, True
    assert float(line_f1(near, line)) == pytest.approx(1.0) and float(line_f1(far, line)) == 0.0
    assert float(line_f1(near | far, line)) == pytest.approx(2 / 3)


def test_edges_and_lines_of_the_condition_itself_are_perfect() -> None:
    """And of another image they are not."""
    images = torch.zeros(2, 3, 64, 64)
    images[0, :, 10:40, 10:30] = 0.8
    images[1, :, 30:60, 20:60] = 0.8
    for condition, extract, figure in (
        ("soft_edges", soft_edges, "edge_correlation"),
        ("lines", straight_lines, "line_f1"),
    ):
        targets = extract(images)
        assert fidelity(condition, images, targets, None)[figure].tolist() == pytest.approx([1, 1])
        assert float(fidelity(condition, images, targets.flip(0), None)[figure].max()) < 0.4
    ramp = torch.arange(6.0).view(1, 1, 2, 3)
    assert float(correlation(ramp, 3 - 2 * ramp)) == pytest.approx(-1)
    assert float(correlation(ramp, torch.ones_like(ramp))) == 0.0


def test_emergence_step_is_the_first_one_halfway_to_the_best() -> None:
    assert emergence_step([0, 200, 400, 600], [0.3, 0.32, 0.8, 0.9]) == 400
    assert emergence_step([0, 200], [0.3, 0.31]) is None


def test_depth_is_compared_where_sample_and_condition_have_an_object() -> None:
    """Silhouettes that overlap in a quarter of the image, where both depths fall to the right."""

    class HalfProbe(Probe):
        """The object is the upper half, with depth falling to the right."""

        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            rows, columns = torch.arange(64.0)[:, None].expand(64, 64), torch.arange(64.0).expand(64, 64)
            depth = torch.where(rows < 32, -columns, 1000.0)
            logits = (32 - rows - 0.5)[None, None]
            return logits.expand(len(images), 1, 64, 64), depth.expand(len(images), 1, 64, 64)

    condition = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    condition[..., :32] = 200 - 2 * torch.arange(32, dtype=torch.uint8)
    figures = fidelity("depth", torch.zeros(1, 3, 64, 64), condition, HalfProbe(ProbeOptions(width=4)))
    assert float(figures["depth_correlation"]) == pytest.approx(1.0)
    assert float(figures["silhouette_iou"]) == pytest.approx(1 / 3)


def test_depth_loss_weights_a_shift_by_a_tenth() -> None:
    target = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:6, 2:6] = 1
    assert float(depth_loss(target, target, mask)) == 0
    shifts = torch.tensor([0.5, -0.3])[:, None, None, None]
    assert float(depth_loss(target + shifts, target, mask)) == pytest.approx(0.1 * 0.4, abs=1e-6)
    outside = 9 * (1 - mask)
    assert float(depth_loss(target + outside, target, mask)) == pytest.approx(0.0, abs=1e-6)
    stripes = torch.tensor([1.0, -1.0]).repeat(4)  # 1 from the mean; 2 at each of 12 of 16 inner neighbours
    assert float(depth_loss(target + stripes, target, mask)) == pytest.approx(1 + 2 * 12 / 16, abs=1e-5)
