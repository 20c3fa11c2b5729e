"""Distances between sets of features and figures of images, against closed forms."""

import numpy as np
import pytest
import torch

from distill.evaluation.metrics import (
    Moments,
    frechet_distance,
    inception_score,
    moments,
    pixel_diversity,
    sample_diversity,
    saturation,
)
from distill.runtime.errors import UserError


def gaussian(mean: list[float], variances: list[float]) -> Moments:
    return Moments(torch.tensor(mean).double(), torch.diag(torch.tensor(variances)).double())


def test_frechet_distance_of_diagonal_gaussians_is_the_closed_form() -> None:
    a, b = gaussian([1.0, 2.0, 0.0], [4.0, 1.0, 9.0]), gaussian([0.0, 0.0, 0.0], [1.0, 16.0, 0.0])
    # |mean|^2 = 5; sum of (std_a - std_b)^2 = 1 + 9 + 9
    assert frechet_distance(a, b) == pytest.approx(24.0, rel=1e-12)


def test_frechet_distance_of_matrices_that_do_not_commute() -> None:
    a = Moments(torch.zeros(2).double(), torch.tensor([[2.0, 1.0], [1.0, 3.0]]).double())
    b = gaussian([0.0, 0.0], [1.0, 4.0])
    # in two dimensions tr M^(1/2) = (tr M + 2 det M^(1/2))^(1/2), with M = A B: tr 14, det 20
    expected = 5 + 5 - 2 * (14 + 2 * 20**0.5) ** 0.5
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_is_zero_on_equal_sets_and_symmetric_even_when_rank_deficient() -> None:
    generator = torch.Generator().manual_seed(0)
    one, two = torch.randn(20, 50, generator=generator), 1 + 2 * torch.randn(30, 50, generator=generator)
    a, b = moments(one), moments(two)
    assert frechet_distance(a, a) == pytest.approx(0.0, abs=1e-9)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-10)
    assert frechet_distance(a, b) > 50  # the means alone are 50 x 1 apart


def test_moments_are_those_of_torch_in_double() -> None:
    features = torch.rand(40, 5) * 100
    result = moments(features)
    assert result.mean.dtype == result.covariance.dtype == torch.float64
    torch.testing.assert_close(result.mean, features.double().mean(0))
    torch.testing.assert_close(result.covariance, torch.cov(features.double().T))


def test_bad_features_are_refused() -> None:
    with pytest.raises(UserError, match="at least 2"):
        moments(torch.rand(1, 4))
    with pytest.raises(UserError, match="NaN"):
        moments(torch.tensor([[0.0], [float("nan")]]))
    with pytest.raises(UserError, match="3 and 2"):
        frechet_distance(moments(torch.rand(9, 3)), moments(torch.rand(9, 2)))


def test_saturation_and_pixel_diversity_by_hand() -> None:
    pixels = torch.tensor([[1.0, 0.5, 0.0], [0.5, 0.5, 0.5]])
    images = pixels[:, :, None, None].expand(2, 3, 4, 4)
    assert saturation(images).tolist() == [1.0, 0.0]
    assert pixel_diversity(images) == pytest.approx((0.5 / 3) ** 0.5, rel=1e-5)  # differences .5, 0, .5
    assert pixel_diversity(images[:1]) == 0


def test_inception_score_is_the_number_of_clear_and_equal_classes() -> None:
    assert inception_score(torch.eye(4).repeat(5, 1)) == pytest.approx(4)
    assert inception_score(torch.full((7, 4), 0.25)) == pytest.approx(1)  # unclear images
    assert inception_score(torch.eye(4)[:1].repeat(9, 1)) == pytest.approx(1)  # all of one class
    one, other = 0.75, 0.25
    entropy = one * np.log(2 * one) + other * np.log(2 * other)
    assert inception_score(torch.tensor([[one, other], [other, one]])) == pytest.approx(np.exp(entropy))


def test_sample_diversity_is_within_captions() -> None:
    """Two captions far apart; samples at distance 1 and 3 from their caption's mean."""
    features = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [100.0, -3.0], [100.0, 3.0]])
    assert sample_diversity(features, 2) == pytest.approx(5**0.5)
