"""Classification of images: zero-shot by CLIP, and by logistic regression on pixels or on CLIP's features."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.data.folders import CaptionedImages
from distill.evaluation.clip import ClipScorer
from distill.evaluation.judge_columns import label_of
from distill.evaluation.labels import fill_caption
from distill.runtime.errors import UserError

SMALLEST_DEVIATION = 0.05  # of a feature, relative to that of all numbers
MOST_PIXELS = 32  # a side, of what a regression on pixels reads


@dataclass(frozen=True)
class Labelled:
    """Images (N, 3, H, W) in [0, 1] and the number of the class (N,) of each."""

    images: Tensor
    classes: Tensor


def classes_of(data: CaptionedImages, column: str) -> list[str]:
    """The different labels in a column, sorted; numbers by value. Raises `UserError` for fewer than two."""
    labels = {label for row in data.rows if (label := label_of(row, column, ())) is not None}
    if len(labels) < 2:
        raise UserError(f"column {column} has {len(labels)} labels: classification needs two or more")
    return sorted(labels, key=lambda label: (len(label), label) if label.isdecimal() else (0, label))


def labelled(data: CaptionedImages, column: str, labels: Sequence[str]) -> Labelled:
    """The images whose label is one of `labels`. Raises `UserError` where there are none."""
    numbers = {label: number for number, label in enumerate(labels)}
    numbers_of_rows = [numbers.get(label_of(row, column, ()) or "") for row in data.rows]
    indices = [index for index, number in enumerate(numbers_of_rows) if number is not None]
    if not indices:
        raise UserError(f"no image has a {column} of {', '.join(labels)}")
    classes = torch.tensor([number for number in numbers_of_rows if number is not None])
    return Labelled(data.select(indices).composite(slice(None)), classes)


def logistic_regression(features: Tensor, classes: Tensor, count: int, penalty: float = 1e-3) -> Tensor:
    """Weights (D + 1, count) of multinomial logistic regression on features (N, D), the last row a bias.

    The mean cross-entropy plus penalty / 2 times the squared weights without the bias, which is convex, is
    minimised by L-BFGS from zero.
    """
    from scipy.optimize import minimize

    inputs = torch.cat([features, torch.ones(len(features), 1)], 1).double()

    def objective(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weights = torch.from_numpy(flat).view(-1, count).requires_grad_(True)
        loss = F.cross_entropy(inputs @ weights, classes) + penalty / 2 * weights[:-1].square().sum()
        (gradient,) = torch.autograd.grad(loss, weights)
        return float(loss.detach()), gradient.flatten().numpy()

    start = np.zeros(inputs.shape[1] * count)
    result = minimize(objective, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return torch.from_numpy(result.x).view(-1, count).float()


def fitted_accuracy(train: Tensor, train_classes: Tensor, test: Tensor, test_classes: Tensor) -> float:
    """The accuracy on test features (M, D) of a regression on train features (N, D), both standardised."""
    # what hardly varies in training would decide a test image that differs
    mean, deviation = train.mean(0), train.std(0).clamp_min(SMALLEST_DEVIATION * train.std())
    count = int(max(train_classes.max(), test_classes.max())) + 1
    weights = logistic_regression((train - mean) / deviation, train_classes, count)
    logits = (test - mean) / deviation @ weights[:-1] + weights[-1]
    return float((logits.argmax(1) == test_classes).float().mean())


def classification_figures(
    clip: ClipScorer, captions: Sequence[str], train: Labelled, test: Labelled
) -> dict[str, Any]:
    """Accuracies on test images, of zero-shot labels by class too.

    captions: one of each class, for zero-shot labels. `most_frequent` is the accuracy of one constant label.
    """
    zero_shot = clip.label_probabilities(test.images, captions).argmax(1)
    right = zero_shot == test.classes
    train_features, test_features = clip.image_features(train.images), clip.image_features(test.images)
    side = min(train.images.shape[-1], MOST_PIXELS)
    pixels = [F.adaptive_avg_pool2d(split.images, side).flatten(1) for split in (train, test)]
    return {
        "zero_shot": float(right.float().mean()),
        "regression_on_clip": fitted_accuracy(train_features, train.classes, test_features, test.classes),
        "regression_on_pixels": fitted_accuracy(pixels[0], train.classes, pixels[1], test.classes),
        "most_frequent": float(torch.bincount(test.classes).max() / len(test.classes)),
        "zero_shot_by_class": {
            caption: float(right[test.classes == number].float().mean())
            for number, caption in enumerate(captions)
            if bool((test.classes == number).any())
        },
    }


def captions_of(labels: Sequence[str], template: str, names: Mapping[str, str]) -> list[str]:
    """The caption of each label: the template with the label, or its name, in place of {}.

    Raises `UserError` for a template without {} and for names of labels that do not exist.
    """
    unknown = set(names) - set(labels)
    if "{}" not in template or "{" in template.replace("{}", "") or unknown:
        raise UserError(
            f"template {template!r} with names of {', '.join(sorted(unknown)) or 'no label'}: expected a "
            f"template with {{}}, and names of {', '.join(labels)}"
        )
    return [fill_caption(template.replace("{}", "{label}"), {"label": names.get(x, x)}) for x in labels]
