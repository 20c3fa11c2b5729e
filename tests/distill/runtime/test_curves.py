"""Curves of runs, read from what they log."""

import json
from pathlib import Path

import numpy as np
import pytest
from command_line import script
from PIL import Image

from distill.runtime.curves import differing_parts, draw_curves, read_curves
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions


def logged(directory: Path, scale: float) -> Path:
    run = Run(RunOptions(str(directory), 6, log_every=2, trackers=()), {}, "run")
    for step in run.steps():
        run.log(loss=scale / (step + 1), gap=-scale)
    return directory


def test_they_hold_every_logged_number(tmp_path: Path) -> None:
    curves = read_curves(logged(tmp_path / "a", 6.0))
    assert set(curves) >= {"loss", "gap"} and curves["loss"][0] == curves["gap"][0]
    assert curves["loss"][0][-1] == 6 and curves["loss"][1][-1] == pytest.approx(1.0, abs=0.3)
    with pytest.raises(UserError, match="give the directory of a run that has logged something"):
        read_curves(tmp_path)


def test_the_picture_has_a_panel_for_each_metric(tmp_path: Path) -> None:
    runs = [str(logged(tmp_path / name, scale)) for name, scale in (("a", 6.0), ("b", 2.0))]
    output = tmp_path / "curves.png"
    script("draw_curves", *runs, "metrics=[loss]", f"output={output}")
    one = np.asarray(Image.open(output))
    draw_curves({run: read_curves(run) for run in runs}, ["loss", "gap"], output)
    assert np.asarray(Image.open(output)).shape[1] == 2 * one.shape[1] and one.std() > 5
    with pytest.raises(UserError, match="no run has logged psnr: there are"):
        draw_curves({run: read_curves(run) for run in runs}, ["psnr"], output)


def test_labels_are_what_the_paths_do_not_share() -> None:
    snapshots = ["outputs/factor1/unet/snapshots", "outputs/factor2/unet/snapshots"]
    assert differing_parts(snapshots) == ["factor1", "factor2"]
    assert differing_parts(["a/x/y", "b/y"]) == ["a/x", "b"]
    assert differing_parts(["a", "a/b"]) == ["a", "a/b"]
    assert differing_parts(["outputs/a"]) == ["outputs/a"]


def test_figures_of_snapshots_are_curves_too(tmp_path: Path) -> None:
    for step, frechet in ((100, 5.0), (20, 9.0)):
        folder = tmp_path / f"{step:06d}" / "figures"
        folder.mkdir(parents=True)
        row = {"generator": "teacher", "frechet": frechet, "config": {"a": 1}}
        (folder / "teacher.json").write_text(json.dumps(row))
        (folder / "real-images.json").write_text('{"retrieval_top1": 0.5}')
    curves = read_curves(tmp_path)
    assert curves == {"frechet": ([20, 100], [9.0, 5.0])}
    (tmp_path / "000100" / "figures" / "other.json").write_text('{"frechet": 4.0}')
    assert read_curves(tmp_path)["frechet, other"] == ([100], [4.0])
    one, two = ({name: curves} for name in ("one", "two"))
    draw_curves(one | two, ["frechet"], tmp_path / "a.png", [1.0, 8.0], "work")
    with pytest.raises(UserError, match="1 scales for 2 runs"):
        draw_curves(one | two, ["frechet"], tmp_path / "a.png", [1.0])
