"""Diagnostics against a teacher whose gradient's mean and noise are known in closed form."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.core.conditioning import Conditioning
from distill.core.noise import NoiseSchedule
from distill.objectives.algebra import ScoreDistillation
from distill.objectives.diagnostics import DiagnosticOptions, diagnose, save_diagnosis
from distill.objectives.options import ObjectiveOptions, Term, TimestepSampler
from distill.objectives.prompts import PromptConditionings
from distill.runtime.errors import UserError

Z, MEAN, STD, SCALE = 1.1, 0.3, 0.5, 4.0


def diagnosis_of(model: Any, terms: tuple[Term, ...], options: DiagnosticOptions) -> Any:
    time = TimestepSampler(0.1, (0.9, 0.5))
    loss = ScoreDistillation(model, ObjectiveOptions(terms, "one", time))
    latents = torch.full((4, 1, 16, 16), Z)
    means = {"conditional": MEAN, "unconditional": 0.0}
    outcome = loss(
        latents,
        PromptConditionings(
            {name: Conditioning(torch.full((1, 1, 1), mean)) for name, mean in means.items()}
        ),
        0.5,
        torch.Generator().manual_seed(1),
    )
    nfe = loss.nfe
    result = diagnose(loss, outcome, 0.5, options)
    assert loss.nfe == nfe  # not counted as the run's own
    return result


def test_signal_and_noise_are_their_closed_form(gaussian: Any, schedule: NoiseSchedule) -> None:
    """g = sigma alpha (z - m) / v + (sigma^2 / v - 1) eps."""
    diagnosis, x0 = diagnosis_of(
        gaussian(STD), (Term("teacher"), Term("noise", -1.0)), DiagnosticOptions(1, 4, 64)
    )
    assert diagnosis.t_fraction == pytest.approx(
        [0.1, 0.3, 0.5, 0.7]
    )  # the sampler's own range at half of the run
    for index, fraction in enumerate(diagnosis.t_fraction):
        t = torch.tensor([round(fraction * 999)])
        alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
        v = alpha**2 * STD**2 + sigma**2
        mean, noise = sigma * alpha * (Z - MEAN) / v, sigma**2 / v - 1
        assert diagnosis.signal_to_noise[index] == pytest.approx((mean / noise) ** 2, rel=0.15)
        expected = MEAN + alpha * STD**2 / v * (alpha * Z - alpha * MEAN)  # averaged over the noise
        assert float(x0[index].mean()) == pytest.approx(expected, abs=0.03)
    assert diagnosis.guidance_rms == [0.0] * 4


def test_guidance_and_denoising_are_separated(gaussian: Any, schedule: NoiseSchedule) -> None:
    diagnosis, _ = diagnosis_of(
        gaussian(STD), (Term("teacher", guidance=SCALE), Term("noise", -1.0)), DiagnosticOptions(1, 2, 4)
    )
    t = torch.tensor([round(0.1 * 999)])
    alpha, sigma = float(schedule.alpha(t)), float(schedule.sigma(t))
    expected = (SCALE - 1) * sigma * alpha * MEAN / (alpha**2 * STD**2 + sigma**2)
    assert diagnosis.guidance_rms[0] == pytest.approx(expected, rel=1e-4)
    assert diagnosis.denoising_rms[0] > 0


def test_a_gradient_without_noise_agrees_with_its_mean(gaussian: Any) -> None:
    terms = (Term("teacher"), Term("teacher", -1.0, "unconditional"))
    diagnosis, _ = diagnosis_of(gaussian(STD), terms, DiagnosticOptions(1, 2, 4))
    assert diagnosis.cosine == pytest.approx([1, 1], abs=1e-5)
    assert min(diagnosis.signal_to_noise) > 1e6


def test_files(tmp_path: Path, gaussian: Any) -> None:
    diagnosis, x0 = diagnosis_of(
        gaussian(STD), (Term("teacher"), Term("noise", -1.0)), DiagnosticOptions(1, 3, 2)
    )
    save_diagnosis(tmp_path, 7, diagnosis, x0.expand(3, 4, 3, 16, 16))
    folder = tmp_path / "diagnostics"
    assert json.loads((folder / "step_00000007.json").read_text())["t_fraction"] == diagnosis.t_fraction
    assert sorted(path.name for path in folder.iterdir()) == [
        "step_00000007.json",
        "step_00000007.png",
        "x0_00000007.png",
    ]
    with Image.open(folder / "x0_00000007.png") as strips, Image.open(folder / "step_00000007.png") as plot:
        assert strips.width > 3 * 16 and strips.height > 4 * 16 and plot.width > 500


def test_mistakes() -> None:
    with pytest.raises(UserError, match="at least 2 levels"):
        DiagnosticOptions(1, 1, 4)
