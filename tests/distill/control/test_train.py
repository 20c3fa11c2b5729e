"""Training of adapters: accumulation, checkpointing, precision, a user's own data at another resolution."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import script
from diffusers import DDIMScheduler
from PIL import Image
from torch import Tensor

from distill.control.adapter import load_adapter, make_adapter
from distill.control.train import AdapterOptions, AdapterTrainer
from distill.data.latents import LatentCache
from distill.evaluation.fidelity import fidelity, has_figures
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.clip import ClipOptions, build_clip
from distill.teacher.folder import TeacherParts, save_teacher
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from distill.teacher.unet import UnetOptions, build_unet
from distill.teacher.vae import VaeOptions, build_vae
from distill.teacher.vocabulary import build_tokenizer

CAPTIONS = ["a red square", "a blue square"]


def trainer(
    teacher: LatentDiffusionTeacher,
    directory: Path,
    options: AdapterOptions,
    condition: str = "silhouette",
    **run_options: object,
) -> AdapterTrainer:
    """On 12 random latents with random condition images."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(12, *teacher.latent_shape, generator=generator)
    conditions = torch.randint(256, (12, 1, 64, 64), generator=generator, dtype=torch.uint8)
    conditioning = teacher.encode_text(["a red cube", ""]).apply(Tensor.float)
    cache = LatentCache(latents, conditioning, torch.zeros(12, dtype=torch.long))
    settings = RunOptions(str(directory), 3, trackers=(), **run_options)  # type: ignore[arg-type]
    return AdapterTrainer(Run(settings, {}, "adapter"), teacher, cache, conditions, condition, options)


def trained(*arguments: object, **run_options: object) -> dict[str, Tensor]:
    """The weights after three steps."""
    task = trainer(*arguments, **run_options)  # type: ignore[arg-type]
    for step in range(3):
        task.step(step)
    return {name: value.detach().clone() for name, value in task.adapter.named_parameters()}


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def test_silhouettes_in_place_of_depth_images(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    """About half of the images are reduced, white where they were not black; the others stay."""
    options = AdapterOptions(batch=8, accumulate=4, silhouettes=0.5)
    task = trainer(tiny_teacher, tmp_path / "a", options, condition="depth")
    task.conditions[:, :, :, :32] = 0
    images = torch.cat([batch.images for batch in task.batches(0)])
    white = ((images == 0) | (images == 1)).flatten(1).all(1)
    assert len(images) == 32 and 8 <= int(white.sum()) <= 24
    assert bool((images[..., :32] == 0).all()) and bool((images[white][..., 40:] == 1).float().mean() > 0.99)
    plain = trainer(tiny_teacher, tmp_path / "b", replace(options, silhouettes=0.0), condition="depth")
    plain.conditions[:, :, :, :32] = 0
    unreduced = torch.cat([batch.images for batch in plain.batches(0)])
    assert torch.equal(images[~white], unreduced[~white])
    assert torch.equal(images[white], (unreduced[white] > 0).float())
    with pytest.raises(UserError, match="images of silhouette have no silhouette to be reduced to"):
        trainer(tiny_teacher, tmp_path / "c", options)
    with pytest.raises(UserError, match="silhouettes is 1: expected a fraction"):
        AdapterOptions(silhouettes=1.0)


def test_accumulated_batches_are_one_batch(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    """Same times, noise, dropped captions and rows, to the rounding that Adam's first steps magnify."""
    options = AdapterOptions(batch=6, learning_rate=1e-4)
    whole = trained(tiny_teacher, tmp_path / "a", options)
    parts = trained(tiny_teacher, tmp_path / "b", replace(options, batch=2, accumulate=3))
    other = trained(tiny_teacher, tmp_path / "c", replace(options, batch=2))
    means = [
        sum(float((whole[name] - weights[name]).abs().mean()) for name in whole) / len(whole)
        for weights in (parts, other)
    ]
    assert means[0] < 1e-6 < 1e-5 < means[1]


def test_checkpointing_recomputes_the_same(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    options = AdapterOptions(batch=4)
    plain = trained(tiny_teacher, tmp_path / "a", options)
    task = trainer(tiny_teacher, tmp_path / "b", options, gradient_checkpointing=True)
    assert task.adapter.is_gradient_checkpointing and tiny_teacher.unet.is_gradient_checkpointing
    checkpointed = trained(tiny_teacher, tmp_path / "c", options, gradient_checkpointing=True)
    assert largest_difference(plain, checkpointed) < 1e-6


def test_half_precision_trains_float32_weights(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    """A bf16 teacher: the adapter's weights and Adam's moments are float32, its loss near that of float32."""
    options = AdapterOptions(batch=4)
    losses = []
    for dtype, precision in ((torch.float32, "float32"), (torch.bfloat16, "bfloat16")):
        teacher = load_latent_diffusion(str(tiny_teacher_folder), dtype=dtype)
        task = trainer(teacher, tmp_path / precision, options, precision=precision)
        losses.append(float(task.step(0)))
        task.step(1)
        moments = [value for state in task.optimizer.state.values() for value in state.values()]
        assert {value.dtype for value in (*task.adapter.parameters(), *moments)} == {torch.float32}
        assert teacher.unet.dtype == dtype
    assert losses[1] != losses[0] and losses[1] == pytest.approx(losses[0], rel=0.02)


def test_a_constant_rate(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    task = trainer(tiny_teacher, tmp_path, AdapterOptions(batch=2, learning_rate=1e-3, final_lr_scale=1.0))
    task.train()
    assert task.optimizer.param_groups[0]["lr"] == 1e-3


def test_adapters_of_512_pixels_have_the_published_shape(tiny_teacher: LatentDiffusionTeacher) -> None:
    assert make_adapter(tiny_teacher).config.conditioning_embedding_out_channels == (16, 32, 48, 64)
    tiny_teacher.unet.register_to_config(sample_size=64)
    assert tiny_teacher.resolution == 512
    assert make_adapter(tiny_teacher).config.conditioning_embedding_out_channels == (16, 32, 96, 256)


def test_photographs_have_no_figure_without_a_probe() -> None:
    images = torch.zeros(1, 3, 64, 64)
    assert fidelity("silhouette", images, torch.zeros(1, 1, 64, 64, dtype=torch.uint8), None) == {}
    assert [has_figures(condition, None) for condition in ("edges", "depth", "folder")] == [
        True,
        False,
        False,
    ]


def save_eps_teacher(folder: Path) -> Path:
    """A teacher shaped as Stable Diffusion: 128 x 128 images, 4 channels, eps, its schedule."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer, vocabulary = build_tokenizer(CAPTIONS)
        small = ClipOptions(width=32, layers=1, patch=16, text_width=32, text_layers=1, projection=16)
        clip = build_clip(small, tokenizer, 128)
        vae = build_vae(VaeOptions(channels=(8, 8, 8, 8), latent_channels=4), 128)
        unet = build_unet(UnetOptions(channels=(16, 32), heads=2), 4, 16, small.text_width)
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1
        )
        save_teacher(folder, TeacherParts(tokenizer, vocabulary, clip, vae), unet, scheduler)
    return folder


def write_photographs(folder: Path, split: str, count: int) -> None:
    """Opaque images of several sizes with a column `conditioning_image`, as data sets for diffusers have."""
    (folder / split).mkdir(parents=True)
    rows = []
    for index in range(count):
        pixels = np.random.default_rng(index).integers(0, 255, (140 + index, 160, 3), np.uint8)
        Image.fromarray(pixels).save(folder / split / f"{index}.png")
        Image.fromarray(255 - pixels).save(folder / split / f"{index}_c.png")
        names = {"file_name": f"{index}.png", "conditioning_image": f"{index}_c.png"}
        rows.append(json.dumps({**names, "text": CAPTIONS[index % 2]}))
    (folder / split / "metadata.jsonl").write_text("\n".join(rows))


def test_a_folder_of_photographs_trains_an_adapter(tmp_path: Path) -> None:
    """At 128 pixels, without a probe; without a validation split there are no previews."""
    teacher = save_eps_teacher(tmp_path / "teacher")
    write_photographs(tmp_path / "data", "train", 5)
    arguments = [f"teacher={teacher}", f"data={tmp_path / 'data'}", "condition=folder", "probe=null"]
    arguments += ["run.steps=2", "run.trackers=[]", "adapter={batch: 2, accumulate: 2, validate_every: 1}"]
    arguments += ["adapter.validation={samples: 2, steps: 2}", "run.gradient_checkpointing=true"]
    assert "fidelity.png" not in script("train_controlnet", *arguments, f"run.directory={tmp_path / 'a'}")
    assert not (tmp_path / "a" / "previews").exists()

    write_photographs(tmp_path / "data", "validation", 3)
    script("train_controlnet", *arguments, f"run.directory={tmp_path / 'b'}")
    (*_, last) = sorted((tmp_path / "b" / "previews").iterdir())
    assert Image.open(last).size[0] > 256
    first, second = (load_adapter(tmp_path / name / "adapter") for name in "ab")
    assert first[1] == "folder"
    assert largest_difference(dict(first[0].named_parameters()), dict(second[0].named_parameters())) == 0
