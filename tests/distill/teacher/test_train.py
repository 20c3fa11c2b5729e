"""The whole training at tiny size: a folder that loads, bit-identical resumption, errors before training."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from precision_checks import assert_float32_checkpoints

from distill.data.folders import load_split
from distill.runtime.errors import UserError
from distill.runtime.precision import PrecisionName
from distill.runtime.run import Run, RunOptions
from distill.teacher.clip import ClipOptions
from distill.teacher.latent import load_latent_diffusion
from distill.teacher.train import Steps, TeacherOptions, train_teacher
from distill.teacher.unet import UnetOptions
from distill.teacher.vae import VaeOptions
from distill.teacher.view_training import ViewTrainingOptions
from distill.teacher.vocabulary import words_of

PATHS = os.pathsep.join(map(str, (Path(__file__).parents[3], Path(__file__).parents[2])))
PARTS = ("clip", "hard_negatives", "vae", "unet")
# words enough that a tokenizer with random ties would differ in every process
CAPTION = "a {} square on top of an orange teapot from the other side"
COLOURS = {"red": (230, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 230)}


def write_folder(folder: Path) -> Path:
    """Coloured squares on a transparent background."""
    for split, count in (("train", 12), ("validation", 4)):
        path = folder / split
        path.mkdir(parents=True)
        rows = []
        for number in range(count):
            name = list(COLOURS)[number % 3]
            image = Image.new("RGBA", (16, 16))
            image.paste((*COLOURS[name], 255), (4, 2 + number % 4, 12, 12))
            image.save(path / f"{number}.png")
            rows.append({"file_name": f"{number}.png", "text": CAPTION.format(name)})
        (path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def options(data: Path) -> TeacherOptions:
    return TeacherOptions(
        str(data),
        resolution=16,
        steps=Steps(clip=3, hard_negatives=4, vae=4, unet=5),
        clip=ClipOptions(width=16, layers=1, patch=8, text_width=16, text_layers=1, projection=8, batch=6),
        vae=VaeOptions(factor=4, channels=(8, 8, 8), latent_channels=3, batch=4),
        unet=UnetOptions(channels=(16, 16), heads=2, batch=4),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    teacher = load_latent_diffusion(str(folder))
    parts = {"text": teacher.text_encoder, "vae": teacher.vae, "unet": teacher.unet}
    return {
        f"{part}.{name}": value
        for part, module in parts.items()
        for name, value in module.state_dict().items()
    }


def run_options(directory: Path) -> RunOptions:
    return RunOptions(str(directory), 1, trackers=(), log_every=1, checkpoint_every=2)


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, TeacherOptions]:
    """The directory of an uninterrupted training, and its options."""
    path = tmp_path_factory.mktemp("trained")
    chosen = options(write_folder(path / "data"))
    assert train_teacher(run_options(path / "out"), chosen) == path / "out" / "teacher"
    return path / "out", chosen


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
    out, chosen = trained
    results = {part: json.loads((out / part / "result.json").read_text()) for part in PARTS}
    assert [result["run"]["steps"] for result in results.values()] == [3, 4, 4, 5]
    teacher = load_latent_diffusion(str(out / "teacher"))
    assert teacher.resolution == 16 and teacher.latent_shape == (3, 4, 4)
    assert teacher.vocabulary == {*COLOURS, *words_of(CAPTION)}
    assert teacher.vae.config.scaling_factor == pytest.approx(results["vae"]["scaling_factor"])
    images = load_split(chosen.data, "validation", 16).composite(slice(None))
    error = (teacher.decode(teacher.encode_images(images)).clamp(0, 1) - images).square().mean()
    assert results["vae"]["validation_psnr"] == pytest.approx(-10 * float(error.log10()), abs=0.1)
    assert teacher.encode_text(["a red square", ""]).embedding.shape == (2, 24, 16)


def test_does_not_train_twice(trained: tuple[Path, TeacherOptions], steps: Counter[str]) -> None:
    out, chosen = trained
    first = weights(out / "teacher")
    assert train_teacher(run_options(out), chosen) == out / "teacher" and not steps
    assert_equal(weights(out / "teacher"), first)


def test_a_training_interrupted_after_the_vae_resumes(
    trained: tuple[Path, TeacherOptions], steps: Counter[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, chosen = trained

    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("distill.teacher.train.load_training_cache", interrupt)
        train_teacher(run_options(tmp_path), chosen)
    assert steps == {"clip": 3, "hard_negatives": 4, "vae": 4}
    steps.clear()
    resumed = weights(train_teacher(run_options(tmp_path), chosen))
    assert steps == {"unet": 5}
    assert_equal(resumed, weights(out / "teacher"))


@pytest.mark.parametrize(("part", "step"), [(part, step) for part in PARTS for step in (1, 2, 3)])
def test_an_interrupted_part_resumes_bit_for_bit(
    trained: tuple[Path, TeacherOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    part: str,
    step: int,
) -> None:
    """Within a step: before the first checkpoint, just after it, and one step later."""
    out, chosen = trained
    log = Run.log

    def interrupt(run: Run, **figures: Any) -> None:
        log(run, **figures)
        if (run.label, run.step) == (part, min(step, run.options.steps - 1)):
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Run, "log", interrupt)
        train_teacher(run_options(tmp_path), chosen)
    assert not (tmp_path / part / "result.json").exists()
    assert_equal(weights(train_teacher(run_options(tmp_path), chosen)), weights(out / "teacher"))


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_mixed_precision_trains_float32_weights_and_resumes_bit_for_bit(
    trained: tuple[Path, TeacherOptions],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    precision: PrecisionName,
) -> None:
    """Interrupted once in every part, after its first checkpoint; loss scaling included."""
    out, chosen = trained
    full, cut = (
        replace(run_options(tmp_path / name), precision=precision, keep=9) for name in ("full", "cut")
    )
    expected = weights(train_teacher(full, chosen))
    for part in PARTS:
        assert_float32_checkpoints(tmp_path / "full" / part)
    single = weights(out / "teacher")
    near = [torch.allclose(value, single[name], atol=0.05) for name, value in expected.items()]
    assert 0.9 * len(near) < sum(near) and any(
        not value.equal(single[name]) for name, value in expected.items()
    )

    log = Run.log
    interrupted: list[str] = []

    def interrupt(run: Run, **figures: Any) -> None:
        log(run, **figures)
        if run.step == 2 and run.label not in interrupted:
            interrupted.append(run.label)
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "log", interrupt)
    for _ in PARTS:
        with pytest.raises(KeyboardInterrupt):
            train_teacher(cut, chosen)
    assert_equal(weights(train_teacher(cut, chosen)), expected)
    assert tuple(interrupted) == PARTS


def test_gradient_checkpointing_changes_no_weight(
    trained: tuple[Path, TeacherOptions], tmp_path: Path
) -> None:
    out, chosen = trained
    checkpointed = replace(run_options(tmp_path), gradient_checkpointing=True)
    assert_equal(weights(train_teacher(checkpointed, chosen)), weights(out / "teacher"))


def train_until_killed(directory: str, part: str, step: str, data: str) -> None:
    """Train and send SIGKILL to this process within a step of a part."""
    log = Run.log

    def kill(run: Run, **figures: Any) -> None:
        log(run, **figures)
        if (run.label, run.step) == (part, int(step)):
            os.kill(os.getpid(), signal.SIGKILL)

    setattr(Run, "log", kill)  # noqa: B010
    train_teacher(run_options(Path(directory)), options(Path(data)))


def test_a_training_killed_in_each_part_ends_with_the_same_weights(
    trained: tuple[Path, TeacherOptions], tmp_path: Path
) -> None:
    """SIGKILL between checkpoints, each time resumed by a new process."""
    out, chosen = trained
    kills = [("clip", "2"), ("hard_negatives", "1"), ("hard_negatives", "3"), ("vae", "3"), ("unet", "3")]
    for part, step in kills:
        command = [sys.executable, __file__, str(tmp_path), part, step, chosen.data]
        process = subprocess.run(
            command, env={**os.environ, "PYTHONPATH": PATHS}, capture_output=True, text=True
        )
        assert process.returncode == -signal.SIGKILL, process.stderr
        assert not (tmp_path / part / "result.json").exists()
    assert_equal(weights(train_teacher(run_options(tmp_path), chosen)), weights(out / "teacher"))


def test_a_run_with_another_tokenizer_is_refused(
    trained: tuple[Path, TeacherOptions], tmp_path: Path
) -> None:
    """The captions have changed: the embeddings of a checkpoint belong to other words."""
    out, chosen = trained
    shutil.copytree(out, tmp_path / "out")
    shutil.copytree(chosen.data, tmp_path / "data")
    rows = tmp_path / "data" / "train" / "metadata.jsonl"
    rows.write_text(rows.read_text().replace("square", "tile"))
    with pytest.raises(UserError, match="tokenizer"):
        train_teacher(run_options(tmp_path / "out"), replace(chosen, data=str(tmp_path / "data")))


def test_a_caption_longer_than_the_context_raises(
    trained: tuple[Path, TeacherOptions], tmp_path: Path
) -> None:
    _, chosen = trained
    shutil.copytree(chosen.data, tmp_path / "data")
    rows = tmp_path / "data" / "train" / "metadata.jsonl"
    rows.write_text(rows.read_text().replace("a red square", "a red square" + " square" * 25, 1))
    long = replace(chosen, data=str(tmp_path / "data"))
    with pytest.raises(
        UserError, match=r"'a red square square .* has 40 tokens .* reads 24: .*context_length"
    ):
        train_teacher(run_options(tmp_path / "out"), long)
    assert not (tmp_path / "out").exists()

    wide = replace(long, clip=replace(long.clip, context_length=40))
    teacher = load_latent_diffusion(str(train_teacher(run_options(tmp_path / "out"), wide)))
    assert teacher.encode_text(["a red square"]).embedding.shape == (1, 40, 16)


def test_another_config_in_the_same_directory_is_refused(trained: tuple[Path, TeacherOptions]) -> None:
    out, chosen = trained
    with pytest.raises(UserError, match=r"clip.image_to_text"):
        train_teacher(run_options(out), replace(chosen, clip=replace(chosen.clip, image_to_text=0.3)))


@pytest.mark.parametrize("resolution", [20, 12])
def test_a_resolution_that_does_not_fit_is_refused(resolution: int, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"resolution {resolution}"):
        replace(options(tmp_path), resolution=resolution)


def test_missing_data_raises_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        train_teacher(run_options(tmp_path / "out"), options(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["parts", "teacher"])
def test_reuse_trains_the_unet_only(
    trained: tuple[Path, TeacherOptions], steps: Counter[str], tmp_path: Path, folder: str
) -> None:
    out, chosen = trained
    result = weights(train_teacher(run_options(tmp_path), replace(chosen, reuse=str(out / folder))))
    assert steps == {"unet": 5}
    first = weights(out / "teacher")
    assert all(result[name].equal(first[name]) for name in first if not name.startswith("unet."))


def test_another_vae_and_snapshots(trained: tuple[Path, TeacherOptions], tmp_path: Path) -> None:
    """CLIP is reused, the VAE is of another factor; the U-Net is saved on the way, each time a teacher."""
    out, chosen = trained
    vae = replace(chosen.vae, factor=2, channels=chosen.vae.channels[:2])
    unet = replace(chosen.unet, snapshot_every=2)
    changed = replace(chosen, reuse=str(out / "parts"), new_vae=True, vae=vae, unet=unet)
    folder = train_teacher(run_options(tmp_path), changed)
    teacher, first = load_latent_diffusion(str(folder)), weights(out / "teacher")
    assert teacher.latent_shape[1:] == (8, 8) and teacher.resolution == 16
    final = weights(folder)
    assert all(final[name].equal(first[name]) for name in first if name.startswith("text."))
    snapshots = sorted((tmp_path / "unet" / "snapshots").iterdir())
    assert [path.name for path in snapshots] == ["000002", "000004", "000005"]
    early, last = weights(snapshots[0]), weights(snapshots[-1])
    assert_equal(last, final)
    assert not all(early[name].equal(final[name]) for name in final if name.startswith("unet."))
    with pytest.raises(UserError, match="one of reuse_unet, continue_vae and new_vae"):
        replace(changed, reuse_unet=True)
    with pytest.raises(UserError, match="new_vae starts from a finished teacher"):
        replace(changed, reuse=None)


def test_reuse_of_an_unsuitable_folder_raises(trained: tuple[Path, TeacherOptions], tmp_path: Path) -> None:
    out, chosen = trained
    with pytest.raises(UserError, match="no tokenizer and VAE"):
        train_teacher(run_options(tmp_path), replace(chosen, reuse=str(tmp_path)))
    rows = Path(chosen.data) / "train" / "metadata.jsonl"
    shutil.copytree(rows.parent, tmp_path / "data" / "train")
    reused = replace(chosen, data=str(tmp_path / "data"), reuse=str(out / "parts"))
    for noun, message in (("lozenge", "lozenge"), ("square " * 30, r"has 44 tokens .* without reuse")):
        text = rows.read_text().replace("square", noun)
        (tmp_path / "data" / "train" / "metadata.jsonl").write_text(text)
        with pytest.raises(UserError, match=message):
            train_teacher(run_options(tmp_path / "out"), reused)


def test_a_finished_unet_is_fine_tuned(
    trained: tuple[Path, TeacherOptions], steps: Counter[str], tmp_path: Path
) -> None:
    """One step from a finished U-Net stays near it; one from a random initialisation does not."""
    out, chosen = trained
    slow = replace(
        chosen,
        reuse=str(out / "teacher"),
        steps=replace(chosen.steps, unet=1),
        unet=replace(chosen.unet, learning_rate=1e-5),
    )
    first = weights(out / "teacher")
    names = [name for name in first if name.startswith("unet.")]
    for reuse_unet in (True, False):
        fine_tuning = replace(slow, reuse_unet=reuse_unet)
        result = weights(train_teacher(run_options(tmp_path / str(reuse_unet)), fine_tuning))
        near = all(torch.allclose(result[name], first[name], atol=1e-3) for name in names)
        assert near is reuse_unet
    channels = list(chosen.unet.channels)
    for other, remedy in (
        (replace(slow.unet, channels=(32, 16)), f"channels={channels}"),
        (replace(slow.unet, layers=3), f"layers={chosen.unet.layers}"),
        (replace(slow.unet, views=ViewTrainingOptions()), "views=null"),
    ):
        with pytest.raises(
            UserError, match=re.escape(f"other sizes than the options: give 'teacher.unet.{remedy}'")
        ):
            train_teacher(run_options(tmp_path / "wide"), replace(slow, reuse_unet=True, unet=other))
    assert not (tmp_path / "wide").exists()
    with pytest.raises(UserError, match="holds no U-Net"):
        train_teacher(
            run_options(tmp_path / "none"), replace(slow, reuse=str(out / "parts"), reuse_unet=True)
        )
    with pytest.raises(UserError, match=r"give teacher.reuse"):
        replace(chosen, reuse_unet=True)


if __name__ == "__main__":
    train_until_killed(*sys.argv[1:])
