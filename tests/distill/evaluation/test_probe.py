"""The probe in half precision, and on images in batches."""

from pathlib import Path

import pytest
import torch
from precision_checks import assert_float32_checkpoints

from distill.data.folders import CaptionedImages
from distill.evaluation.probe import Probe, ProbeOptions, predict_geometry, train_probe
from distill.runtime.precision import PrecisionName
from distill.runtime.run import Run, RunOptions


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_it_is_trained_in_half_precision_with_float32_weights(
    precision: PrecisionName, tmp_path: Path
) -> None:
    """A square in the corner becomes its silhouette."""
    images = torch.zeros(16, 4, 16, 16, dtype=torch.uint8)
    images[:, 1:, 4:12, 4:12] = 255
    data = CaptionedImages(images, [{"text": ""}] * len(images))
    options = RunOptions(str(tmp_path), 40, checkpoint_every=20, trackers=(), precision=precision)
    near = images[:, 3:].float() / 255
    probe = train_probe(Run(options, {}, "probe"), data, near, ProbeOptions(width=8, batch=8))
    assert_float32_checkpoints(tmp_path)
    silhouettes, _ = predict_geometry(probe, data.composite(slice(None)))
    assert (silhouettes == (near > 0.5)).float().mean() > 0.78  # 0.75 without an object


def test_geometry_of_a_batch_is_that_of_its_parts() -> None:
    probe, images = Probe(ProbeOptions(width=4)).eval(), torch.rand(5, 3, 16, 16)
    whole, parts = predict_geometry(probe, images), predict_geometry(probe, images, batch=2)
    assert whole[0].dtype == torch.bool and whole[1].shape == (5, 1, 16, 16)
    assert torch.equal(whole[0], parts[0])
    torch.testing.assert_close(whole[1], parts[1])
