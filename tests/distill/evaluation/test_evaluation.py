"""Grading a teacher: the shares count what they say, samples depend on seed and place only, the report is complete."""

from typing import Any

import pytest
import torch
from torch import Tensor

from distill.data.folders import CaptionedImages
from distill.evaluation import teacher as evaluation
from distill.evaluation.judge import Judge, JudgeOptions
from distill.evaluation.teacher import EvaluationOptions, draw, evaluate_teacher, graded
from distill.runtime.errors import UserError
from distill.teacher.latent import Teacher
from distill.teacher.vocabulary import phrase

LABELS = {"object": ("cube", "duck"), "colour": ("blue", "orange"), "view": ("back", "front")}


def row(
    name: str, colour: str, view: str | None, has_front: bool, held_out: bool, text: str | None = None
) -> dict[str, Any]:
    told = phrase(colour, name) + (f", {view} view" if view else "")
    return {
        "text": told if text is None else text,
        "object": name,
        "colour": colour,
        "view": view or "",
        "has_front": has_front,
        "held_out": held_out,
        "relation": "",
    }


def test_shares_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        row("duck", "blue", "front", True, False),
        row("duck", "orange", "back", True, True),
        row("cube", "blue", "front", False, True),  # no front: its view does not count
        row("duck", "blue", "back", True, False, text="a blue duck"),  # its caption names no view
    ]
    told = {
        "object": ["duck", "duck", "cube", "cube"],
        "colour": ["blue"] * 4,
        "view": ["front", "front", "front", "back"],
    }
    monkeypatch.setattr(evaluation, "predict", lambda judge, images: told)
    judge: Any = None
    got = graded(judge, torch.zeros(4, 3, 8, 8), rows)
    assert got == {
        "object": 0.75,
        "colour": 0.75,
        "object_and_colour": 0.5,
        "view": 0.5,
        "held_out_combinations": 0.5,
    }


def test_a_sample_depends_on_its_place_not_on_the_batch(tiny_teacher: Teacher) -> None:
    prompts = ["a red cube", "a blue duck", "a red cube"]
    options = [EvaluationOptions(steps=2, batch=size, seed=seed) for size, seed in ((3, 0), (2, 0), (3, 1))]
    whole, parts, other = (draw(tiny_teacher, prompts, 3.0, each) for each in options)
    torch.testing.assert_close(whole, parts, atol=1e-3, rtol=0)
    assert float((whole - other).abs().mean()) > 1e-2 and float((whole[0] - whole[2]).abs().mean()) > 1e-2


def test_the_report_is_complete(tiny_teacher: Teacher) -> None:
    torch.manual_seed(0)
    judge = Judge(LABELS, JudgeOptions(width=8)).eval()
    rows = [
        row(
            ("cube", "duck")[i % 2],
            ("blue", "orange")[i // 2 % 2],
            ("back", "front")[i // 4],
            bool(i % 2),
            i == 3,
        )
        for i in range(8)
    ]
    pair = {**rows[0], "relation": "on top of"}
    images = (torch.rand(9, 4, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).byte()
    options = EvaluationOptions(samples=4, guidance=(1.0, 3.0), steps=1)
    figures, shown = evaluate_teacher(tiny_teacher, judge, CaptionedImages(images, [*rows, pair]), options)
    assert [sample["guidance"] for sample in figures["samples"]] == [1.0, 3.0] and shown.shape == (
        4,
        3,
        64,
        64,
    )
    assert figures["clip"]["retrieval_captions"] == 8 and figures["vae"]["psnr"] > 0
    assert (
        set(figures["frechet"]) == {"real_halves", "reconstructions"}
        and figures["frechet"]["reconstructions"] > 0
    )
    best = max(sample["object_and_colour"] for sample in figures["samples"])
    scale = next(sample["guidance"] for sample in figures["samples"] if sample["object_and_colour"] == best)
    texts = [each["text"] for each in rows[:4]]
    torch.testing.assert_close(shown, draw(tiny_teacher, texts, scale, options))


def test_mistakes(tiny_teacher: Teacher) -> None:
    judge: Any = None
    data = CaptionedImages(
        torch.zeros(2, 3, 64, 64, dtype=torch.uint8), [{"text": "x", "relation": "next to"}] * 2
    )
    with pytest.raises(UserError, match="no rows with one object"):
        evaluate_teacher(tiny_teacher, judge, data, EvaluationOptions())
    with pytest.raises(UserError, match="must be positive"):
        EvaluationOptions(steps=0)


def test_psnr_of_a_known_error(tiny_teacher: Teacher, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through the whole report: reconstructions off by 0.1 everywhere have 20 dB."""

    def shifted(vae: object, images: Tensor) -> Tensor:
        return images + 0.1

    monkeypatch.setattr(evaluation, "reconstruct", shifted)
    torch.manual_seed(0)
    images = (torch.rand(4, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 255).byte()
    rows = [row("duck", ("blue", "orange")[i % 2], "front", True, False) for i in range(4)]
    options = EvaluationOptions(samples=2, guidance=(1.0,), steps=1)
    figures, _ = evaluate_teacher(
        tiny_teacher, Judge(LABELS, JudgeOptions(width=8)).eval(), CaptionedImages(images, rows), options
    )
    assert figures["vae"]["psnr"] == pytest.approx(20, abs=1e-3)
