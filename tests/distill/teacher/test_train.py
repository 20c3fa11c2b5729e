"""The whole training at tiny size: a folder that loads, resumed without training again, and mistakes told at once."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.clip import ClipOptions
from distill.teacher.latent import Teacher
from distill.teacher.train import Steps, TeacherOptions, train_teacher
from distill.teacher.unet import UnetOptions
from distill.teacher.vae import VaeOptions

COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}


def write_folder(folder: Path) -> Path:
    """Coloured squares on a transparent ground."""
    for split, count in (("train", 12), ("validation", 4)):
        place = folder / split
        place.mkdir(parents=True)
        rows = []
        for number in range(count):
            name = list(COLOURS)[number % 3]
            image = Image.new("RGBA", (16, 16))
            image.paste((*COLOURS[name], 255), (4, 2 + number % 4, 12, 12))
            image.save(place / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "text": f"a {name} square"})
        (place / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(data: Path) -> TeacherOptions:
    return TeacherOptions(
        str(data),
        resolution=16,
        steps=Steps(clip=3, hard=2, vae=4, unet=5),
        clip=ClipOptions(width=16, layers=1, patch=8, text_width=16, text_layers=1, projection=8, batch=6),
        vae=VaeOptions(factor=4, channels=(8, 8, 8), latent_channels=3, batch=4),
        unet=UnetOptions(channels=(16, 16), heads=2, batch=4),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    teacher = Teacher.load(str(folder))
    parts = {"text": teacher.text_encoder, "vae": teacher.vae, "unet": teacher.unet}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def carried(directory: Path) -> RunOptions:
    return RunOptions(str(directory), 1, trackers=(), log_every=1)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TeacherOptions]:
    """A directory in which a teacher was trained without a cut, and of what."""
    place = tmp_path_factory.mktemp("trained")
    chosen = options(write_folder(place / "data"))
    assert train_teacher(carried(place / "out"), chosen) == place / "out" / "teacher"
    return place / "out", chosen


@pytest.fixture
def steps(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Training steps done, by part."""
    done: Counter[str] = Counter()
    log = Run.log

    def count(run: Run, **figures: Any) -> None:
        done[run.label] += 1
        log(run, **figures)

    monkeypatch.setattr(Run, "log", count)
    return done


def test_trains_a_folder_that_loads(trained: tuple[Path, TeacherOptions]) -> None:
    out, _ = trained
    results = {
        part: json.loads((out / part / "result.json").read_text()) for part in ("clip", "hard", "vae", "unet")
    }
    assert [result["run"]["steps"] for result in results.values()] == [3, 2, 4, 5]
    teacher = Teacher.load(str(out / "teacher"))
    assert teacher.resolution == 16 and teacher.latent_shape == (3, 4, 4)
    assert teacher.words == {"a", "red", "green", "blue", "square"}
    assert teacher.vae.config.scaling_factor == pytest.approx(results["vae"]["scaling_factor"])
    assert teacher.encode_text(["a red square", ""]).shape == (2, 24, 16)


def test_does_not_train_twice(trained: tuple[Path, TeacherOptions], steps: Counter[str]) -> None:
    out, chosen = trained
    first = weights(out / "teacher")
    assert train_teacher(carried(out), chosen) == out / "teacher" and not steps
    again = weights(out / "teacher")
    assert first.keys() == again.keys() and all(first[name].equal(again[name]) for name in first)


def test_a_training_cut_after_the_vae_goes_on(
    trained: tuple[Path, TeacherOptions], steps: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, chosen = trained

    def cut(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("distill.teacher.train.prepare", cut)
        train_teacher(carried(tmp_path), chosen)
    assert steps == {"clip": 3, "hard": 2, "vae": 4}
    steps.clear()
    one, whole = weights(train_teacher(carried(tmp_path), chosen)), weights(out / "teacher")
    assert steps == {"unet": 5}
    assert all(one[name].equal(whole[name]) for name in whole)  # a cut alters nothing


def test_another_config_in_the_same_place_is_refused(trained: tuple[Path, TeacherOptions]) -> None:
    out, chosen = trained
    with pytest.raises(UserError, match=r"clip.image_to_text"):
        train_teacher(carried(out), replace(chosen, clip=replace(chosen.clip, image_to_text=0.3)))


@pytest.mark.parametrize("resolution", [20, 12])
def test_a_resolution_that_does_not_fit_is_refused(resolution: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"resolution {resolution}"):
        replace(options(tmp_path), resolution=resolution)


def test_missing_data_is_told_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        train_teacher(carried(tmp_path / "out"), options(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["parts", "teacher"])
def test_reuse_trains_the_unet_only(
    trained: tuple[Path, TeacherOptions], steps: Counter[str], tmp_path: Path, folder: str
) -> None:
    out, chosen = trained
    own = weights(train_teacher(carried(tmp_path), replace(chosen, reuse=str(out / folder))))
    assert steps == {"unet": 5}
    first = weights(out / "teacher")
    assert all(own[name].equal(first[name]) for name in first if not name.startswith("unet."))


def test_reuse_of_what_cannot_serve_is_told(trained: tuple[Path, TeacherOptions], tmp_path: Path) -> None:
    out, chosen = trained
    with pytest.raises(UserError, match="no tokenizer and VAE"):
        train_teacher(carried(tmp_path), replace(chosen, reuse=str(tmp_path)))
    rows = Path(chosen.data) / "train" / "metadata.jsonl"
    strange = tmp_path / "data" / "train"
    strange.mkdir(parents=True)
    (strange / "metadata.jsonl").write_text(rows.read_text().replace("square", "lozenge"))
    for image in rows.parent.glob("*.png"):
        (strange / image.name).write_bytes(image.read_bytes())
    with pytest.raises(UserError, match="lozenge"):
        train_teacher(
            carried(tmp_path / "out"), replace(chosen, data=str(tmp_path / "data"), reuse=str(out / "parts"))
        )


def test_a_finished_unet_is_trained_on(
    trained: tuple[Path, TeacherOptions], steps: Counter[str], tmp_path: Path
) -> None:
    """One step from a finished U-Net stays near it, as one from a random start does not."""
    out, chosen = trained
    slow = replace(
        chosen,
        reuse=str(out / "teacher"),
        steps=replace(chosen.steps, unet=1),
        unet=replace(chosen.unet, learning_rate=1e-5),
    )
    first = weights(out / "teacher")
    names = [name for name in first if name.startswith("unet.")]
    for on, near in ((True, True), (False, False)):
        own = weights(train_teacher(carried(tmp_path / str(on)), replace(slow, reuse_unet=on)))
        assert all(torch.allclose(own[name], first[name], atol=1e-3) for name in names) is near
    with pytest.raises(UserError, match="has another size"):
        train_teacher(
            carried(tmp_path / "wide"),
            replace(slow, reuse_unet=True, unet=replace(slow.unet, channels=(32, 16))),
        )
    with pytest.raises(UserError, match="holds no U-Net"):
        train_teacher(carried(tmp_path / "none"), replace(slow, reuse=str(out / "parts"), reuse_unet=True))
    with pytest.raises(UserError, match=r"give teacher.reuse"):
        replace(chosen, reuse_unet=True)
