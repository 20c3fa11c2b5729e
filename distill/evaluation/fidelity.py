"""How well samples follow their conditions: silhouettes by IoU, depth by rank correlation, edges by F1."""

from collections.abc import Sequence

import torch
from scipy.ndimage import binary_dilation
from scipy.stats import spearmanr
from torch import Tensor

from distill.control.conditions import edges, scribbles, soft_edges, straight_lines
from distill.evaluation.probe import Probe, predict_geometry

# How the lines of a sample are extracted, and how many pixels they may be off.
LINES = {"edges": (edges, 1), "scribble": (scribbles, 2), "lines": (straight_lines, 2)}
GEOMETRY = ("silhouette", "depth", "normals", "segmentation")  # whose figures need a probe
SOFT_EDGES = "soft_edges"


def mask_iou(prediction: Tensor, target: Tensor) -> Tensor:
    """Intersection over union (B,) of masks (B, 1, H, W) bool; 1 where both are empty."""
    intersection, union = (prediction & target).sum((1, 2, 3)), (prediction | target).sum((1, 2, 3))
    return torch.where(union > 0, intersection / union.clamp_min(1), 1.0)


def rank_correlation(prediction: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Spearman's correlation (B,) of pixels (B, 1, H, W) inside a mask; 0 where either is constant."""
    correlations = [
        spearmanr(p[m].numpy(), t[m].numpy()).statistic if m.sum() > 2 else 0.0
        for p, t, m in zip(prediction, target, mask, strict=True)
    ]
    return torch.tensor(correlations).nan_to_num(0.0)


def correlation(images: Tensor, others: Tensor) -> Tensor:
    """Pearson's correlation (B,) of pixels (B, C, H, W); 0 where either image is constant."""
    pairs = torch.stack([images.flatten(1).double(), others.flatten(1).double()])
    pairs -= pairs.mean(2, keepdim=True)
    norms = pairs.norm(dim=2).prod(0)
    return torch.where(norms > 0, pairs.prod(0).sum(1) / norms.clamp_min(1e-12), 0.0)


def line_f1(prediction: Tensor, target: Tensor, tolerance: int = 1) -> Tensor:
    """F1 (B,) of lines (B, 1, H, W) bool, matched within `tolerance` pixels as in boundary benchmarks."""
    side = 2 * tolerance + 1
    square = torch.ones(1, 1, side, side, dtype=torch.bool).numpy()

    def matched(lines: Tensor, others: Tensor) -> Tensor:
        near = torch.from_numpy(binary_dilation(others.numpy(), square))
        return (lines & near).sum((1, 2, 3)) / lines.sum((1, 2, 3)).clamp_min(1)

    precision, recall = matched(prediction, target), matched(target, prediction)
    return 2 * precision * recall / (precision + recall).clamp_min(1e-9)


def has_figures(condition: str, probe: Probe | None) -> bool:
    """Whether `fidelity` has a figure of a condition."""
    return condition in (*LINES, SOFT_EDGES) or (condition in GEOMETRY and probe is not None)


def fidelity(
    condition: str, samples: Tensor, condition_images: Tensor, probe: Probe | None
) -> dict[str, Tensor]:
    """Figures (B,) of samples (B, 3, H, W) in [0, 1] against their condition images, uint8.

    silhouette, normals and segmentation: `silhouette_iou`; depth: that and `depth_correlation`, where both
    sample and condition have an object; edges, scribble and lines: `line_f1`; soft_edges: `edge_correlation`.
    Other conditions have no figure, and without a probe only lines and edges have one.
    """
    if condition == SOFT_EDGES:
        return {"edge_correlation": correlation(soft_edges(samples), condition_images[:, :1])}
    if condition in LINES:
        extract, tolerance = LINES[condition]
        return {"line_f1": line_f1(extract(samples) > 0, condition_images[:, :1] > 0, tolerance)}
    if condition not in GEOMETRY or probe is None:
        return {}
    silhouette, depth = predict_geometry(probe, samples)
    target = condition_images.amax(1, keepdim=True) > (127 if condition == "silhouette" else 0)
    figures = {"silhouette_iou": mask_iou(silhouette, target)}
    if condition == "depth":
        figures["depth_correlation"] = rank_correlation(depth, condition_images.float(), target & silhouette)
    return figures


def means(figures: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each."""
    return {name: float(values.float().mean()) for name, values in figures.items()}


def emergence_step(steps: Sequence[int], values: Sequence[float]) -> int | None:
    """When control fidelity emerges: the first step halfway from the first value of a figure to its best.

    None where it rises by less than 0.05.
    """
    if not values or max(values) - values[0] < 0.05:
        return None
    half = (values[0] + max(values)) / 2
    return next(step for step, value in zip(steps, values, strict=True) if value >= half)
