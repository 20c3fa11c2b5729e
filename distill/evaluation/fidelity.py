"""How well samples obey their conditions: silhouettes by IoU, depth by rank correlation, edges by F1, read from the samples themselves."""

from collections.abc import Sequence

import torch
from scipy.ndimage import binary_dilation
from scipy.stats import spearmanr
from torch import Tensor

from distill.control.conditions import edges, scribbles
from distill.evaluation.probe import Probe


def overlap(told: Tensor, wanted: Tensor) -> Tensor:
    """Intersection over union (B,) of masks (B, 1, H, W); two empty ones agree."""
    shared, either = (told & wanted).sum((1, 2, 3)), (told | wanted).sum((1, 2, 3))
    return torch.where(either > 0, shared / either.clamp_min(1), 1.0)


def rank_correlation(told: Tensor, wanted: Tensor, where: Tensor) -> Tensor:
    """Spearman's correlation (B,) of pixels (B, 1, H, W) inside a mask; 0 where nothing varies."""
    found = [
        spearmanr(a[m].numpy(), b[m].numpy()).statistic if m.sum() > 2 else 0.0
        for a, b, m in zip(told, wanted, where, strict=True)
    ]
    return torch.tensor(found).nan_to_num(0.0)


def line_f1(told: Tensor, wanted: Tensor, reach: int = 1) -> Tensor:
    """F1 (B,) of lines (B, 1, H, W) bool, each allowed to be `reach` pixels off (as boundaries are scored in segmentation)."""
    square = torch.ones(1, 1, 2 * reach + 1, 2 * reach + 1, dtype=torch.bool).numpy()
    wide_told, wide_wanted = (
        torch.from_numpy(binary_dilation(lines.numpy(), square)) for lines in (told, wanted)
    )

    def share(lines: Tensor, within: Tensor) -> Tensor:
        return (lines & within).sum((1, 2, 3)) / lines.sum((1, 2, 3)).clamp_min(1)

    precision, recall = share(told, wide_wanted), share(wanted, wide_told)
    return 2 * precision * recall / (precision + recall).clamp_min(1e-9)


@torch.no_grad()
def fidelity(condition: str, samples: Tensor, pictures: Tensor, probe: Probe) -> dict[str, Tensor]:
    """Figures (B,) of samples (B, 3, H, W) in [0, 1] against their uint8 condition pictures, by what the condition says.

    silhouette: `silhouette_iou`; depth: the same and `depth_correlation`, where sample and condition both have an object;
    normals: `silhouette_iou`; edges and scribble: `line_f1`. Another condition has no figure.
    """
    if condition in ("edges", "scribble"):
        make, reach = (edges, 1) if condition == "edges" else (scribbles, 2)
        return {"line_f1": line_f1(make(samples) > 0, pictures[:, :1] > 0, reach)}
    if condition not in ("silhouette", "depth", "normals"):
        return {}
    logits, depth = (
        torch.cat(parts) for parts in zip(*(probe(part) for part in samples.split(128)), strict=True)
    )
    wanted = pictures.amax(1, keepdim=True) > (127 if condition == "silhouette" else 0)
    told = {"silhouette_iou": overlap(logits > 0, wanted)}
    if condition == "depth":
        told["depth_correlation"] = rank_correlation(depth, pictures.float(), wanted & (logits > 0))
    return told


def means(figures: dict[str, Tensor]) -> dict[str, float]:
    """The mean of each."""
    return {name: float(values.float().mean()) for name, values in figures.items()}


def jump(steps: Sequence[int], values: Sequence[float]) -> int | None:
    """Where a run learnt to obey: the first step past half the way from the first figure to the best; None where it did not rise by .05."""
    if not values or max(values) - values[0] < 0.05:
        return None
    half = (values[0] + max(values)) / 2
    return next(step for step, value in zip(steps, values, strict=True) if value >= half)
