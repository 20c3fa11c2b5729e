"""Ablations: equal NFE, intervals by hand, resuming, the report; losses on a mixture against theory."""

import base64
import csv
import io
import json
import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from command_line import ROOT
from PIL import Image

from distill.core.noise import NoiseSchedule
from distill.evaluation.ablation.particles import ParticleOptions, run_particles
from distill.evaluation.ablation.plan import (
    AblationOptions,
    Cell,
    coverage,
    interval,
    plan,
    run_cells,
    summarise,
    with_guidance,
)
from distill.evaluation.ablation.report import markdown, save_report
from distill.evaluation.html import bars
from distill.evaluation.metrics import divergence_from, wasserstein_2
from distill.objectives.options import ObjectiveOptions
from distill.runtime.config import build
from distill.runtime.errors import UserError

OBJECTIVES = ROOT / "configs" / "objective"


def load(name: str) -> ObjectiveOptions:
    return build(ObjectiveOptions, yaml.safe_load((OBJECTIVES / f"{name}.yaml").read_text()), name)


def test_every_loss_has_the_same_nfe(tmp_path: Path) -> None:
    losses = {name: load(name) for name in ("sds", "ism", "sdi", "vsd", "sds_bridge")}
    cells = list(plan(AblationOptions(("a cube", "b"), seeds=(0, 1), budget=440), losses, tmp_path))
    assert len(cells) == 5 * 2 * 2 and len({cell.directory for cell in cells}) == 20
    nfe = [sum(cell.objective.cost(i / cell.steps) for i in range(cell.steps)) for cell in cells]
    assert min(nfe) >= 438 and max(nfe) <= 442
    assert {cell.loss: cell.steps for cell in cells} == {
        "sds": 220,
        "ism": 55,
        "sdi": 20,
        "vsd": 73,
        "sds_bridge": 220,
    }


def test_guidance_scales_replace_those_of_guided_terms() -> None:
    changed = with_guidance(load("sds"), 30.0)
    assert [term.guidance for term in changed.terms] == [30.0, 1.0] and with_guidance(
        load("sds"), None
    ) == load("sds")
    with pytest.raises(UserError, match="no guided term"):
        with_guidance(load("csd"), 30.0)


def test_interval_by_hand() -> None:
    """Three values: t at 97.5 % with two degrees of freedom is 4.3027."""
    mean, width = interval([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3) and width == pytest.approx(4.302653 * 1.5275252 / 3**0.5, rel=1e-5)
    assert math.isnan(interval([1.0])[1])


def test_finished_cells_are_not_run_again(tmp_path: Path) -> None:
    calls: list[str] = []

    def bench(cell: Cell) -> dict[str, float]:
        calls.append(cell.directory.name)
        if len(calls) == 2:
            raise RuntimeError("power cut")
        return {"score": float(cell.seed)}

    cells = list(plan(AblationOptions(("a",), seeds=(3, 4, 5), budget=10), {"sds": load("sds")}, tmp_path))
    with pytest.raises(RuntimeError, match="power cut"):
        run_cells(cells, bench)
    rows = run_cells(cells, bench)
    assert calls == ["a-seed3", "a-seed4", "a-seed4", "a-seed5"]
    assert [row["score"] for row in rows] == [3, 4, 5]
    assert [(row["steps"], row["nfe"]) for row in rows] == [(5, 10)] * 3


def test_the_report_holds_every_row(tmp_path: Path) -> None:
    rows = [
        {"loss": name, "guidance": g, "prompt": "a", "seed": s, "steps": 5, "score": s + len(name)}
        for name, g in (("sds", None), ("csd", 3.0))
        for s in (0, 2)
    ]
    Image.new("RGB", (4, 4)).save(tmp_path / "p.png")
    save_report(tmp_path, "A <bench>", rows, {"a & b": tmp_path / "p.png"}, {"machine": "x"})
    assert json.loads((tmp_path / "rows.json").read_text())["rows"] == rows
    with (tmp_path / "rows.csv").open() as file:
        assert [row["score"] for row in csv.DictReader(file)] == ["3", "5", "3", "5"]
    table = (tmp_path / "table.md").read_text()
    assert "| sds | own | 2 | 5 | 4 ± 13 |" in table and "| csd | 3 | 2 | 5 | 4 ± 13 |" in table
    page = (tmp_path / "index.html").read_text()
    assert page.count("<img") == 3 and "A &lt;bench&gt;" in page and "a &amp; b" in page
    assert markdown(summarise(rows)) == table


def test_a_missing_figure_is_a_dash(tmp_path: Path) -> None:
    """A mean is over the rows that have the figure: a torus has no front, and so no Janus rate."""
    names = {"guidance": None, "prompt": "a", "seed": 0, "steps": 5}
    rows: list[dict[str, object]] = [
        {"loss": "sds", **names, "score": 1.0},
        {"loss": "sds", **names, "score": 3.0, "janus": 0.5},
        {"loss": "csd", **names, "score": 2.0},
    ]
    assert markdown(summarise(rows)).splitlines()[2:] == [
        "| sds | own | 2 | 5 | 2 ± 13 | 0.5 |",
        "| csd | own | 1 | 5 | 2 | - |",
    ]
    save_report(tmp_path, "title", rows, {}, {})
    assert [row["janus"] for row in csv.DictReader((tmp_path / "rows.csv").open())] == ["", "0.5", ""]
    assert (tmp_path / "index.html").read_text().count("<img") == 3


def test_distances_by_hand() -> None:
    a = torch.tensor([[0.0, 0.0], [1.0, 0.0]])
    assert wasserstein_2(a, a.flip(0)) == 0
    assert wasserstein_2(a, a + torch.tensor([0.0, 2.0])) == pytest.approx(2)
    with pytest.raises(UserError, match="expected \\(N, D\\) twice"):
        wasserstein_2(a, a[:1])


def test_divergence_of_normals() -> None:
    """KL(N((1, 0), 1) | N(0, 1)) in two dimensions is 1/2."""
    points = torch.randn(
        3000, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64
    ) + torch.tensor([1.0, 0.0])
    log_density = -0.5 * points.square().sum(1) - math.log(2 * math.pi)
    assert divergence_from(points, log_density) == pytest.approx(0.5, abs=0.08)


def test_coverage_by_hand() -> None:
    means = torch.tensor([[0.0, 0.0], [1.0, 0.0], [2.0, 0.0]])
    weights = torch.tensor([0.5, 0.5, 0.0])
    points = torch.cat([means[:1].expand(90, 2), means[2:].expand(10, 2)])
    assert coverage(points, means, 0.1, weights) == 0.5  # one of the two modes with a weight
    assert coverage(means[:2], means, 0.1, weights) == 1.0


def test_sds_seeks_modes_and_a_critic_covers_the_density(tmp_path: Path, schedule: NoiseSchedule) -> None:
    """SDS collapses particles to points; a critic preserves their variance (ProlificDreamer, section 3.3)."""
    options = ParticleOptions(particles=64)
    rows = {}
    for name, budget in (("sds", 600), ("diff_instruct", 3000)):
        cells = plan(AblationOptions(("c0",), seeds=(0,), budget=budget), {name: load(name)}, tmp_path)
        (rows[name],) = run_cells(list(cells), lambda cell: run_particles(cell, options, schedule))
    assert float(str(rows["diff_instruct"]["kl"])) < 1.0 < float(str(rows["sds"]["kl"]))
    assert rows["diff_instruct"]["coverage"] == 1.0
    assert float(str(rows["diff_instruct"]["w2"])) < float(str(rows["sds"]["w2"]))


def test_long_labels_fit_into_a_plot() -> None:
    caption = "a green cone next to a yellow cylinder, as long as captions are"
    page = bars(
        "F-score", [f"{caption} {number}" for number in range(26)], [0.1 * number for number in range(26)]
    )
    (data,) = re.findall(r"base64,([^']+)", page)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(data))).convert("L"))
    edges = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert edges.min() == 255 and pixels[:, :200].min() < 100, (
        "nothing is cut off at the border, and the labels are there"
    )
