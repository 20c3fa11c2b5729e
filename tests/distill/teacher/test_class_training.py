"""A class-conditional teacher of pixels: names, cache, training, and its folder in stock diffusers."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline

from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.data.folders import CaptionedImages, load_split
from distill.data.sources.source import FolderOptions, ImageSource, Item, write_dataset
from distill.one_step.student import Student, StudentOptions
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.class_training import ClassTeacherOptions, class_names, pixel_cache, train_class_teacher
from distill.teacher.load import load_teacher
from distill.teacher.pixels import ClassTeacher
from distill.teacher.unet import UnetOptions
from distill.teacher.view_training import ViewTrainingOptions

SMALL = UnetOptions(channels=(16, 32), heads=2, batch=8, learning_rate=2e-3, ema=0.9)
SHADES = ("dark", "middle", "bright")


def shades(count: int) -> CaptionedImages:
    """Images of 8 pixels in one of three greys, the class."""
    labels = [index % 3 for index in range(count)]
    images = torch.tensor([40, 120, 220], dtype=torch.uint8)[labels][:, None, None, None]
    rows = [
        {"file_name": f"{i}.png", "text": SHADES[label], "label": label} for i, label in enumerate(labels)
    ]
    return CaptionedImages(images.expand(-1, 3, 8, 8).clone(), rows)


class ShadesSource(ImageSource):
    """The same as a source."""

    licence = "none"

    def items(self, cache: Path) -> list[Item]:
        data = shades(24)
        images = data.images.permute(0, 2, 3, 1).numpy()
        return [Item(image, row, "train") for image, row in zip(images, data.rows, strict=True)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A teacher after a short training."""
    base = tmp_path_factory.mktemp("classes")
    write_dataset(ShadesSource(), base / "data", FolderOptions(), base)
    options = ClassTeacherOptions(str(base / "data"), 8, unet=SMALL)
    run = Run(RunOptions(str(base / "run"), 150, trackers=()), {}, "classes")
    return train_class_teacher(run, options, load_split(options.data, "train", 8), list(SHADES))


def test_names_are_captions_that_all_images_of_a_class_share() -> None:
    data = shades(6)
    assert class_names(data, "label") == list(SHADES)
    data.rows[3]["text"] = "another dark one"
    assert class_names(data, "label") == ["0", "middle", "bright"]
    data.rows[0]["label"] = 5
    assert class_names(data, "label") == ["another dark one", "middle", "bright", "3", "4", "dark"]
    for wrong in (None, -1, "7", 1.5, True):
        data.rows[2]["label"] = wrong
        with pytest.raises(UserError, match=r"2.png has the label .*: expected a class, a number from 0 on"):
            class_names(data, "label")


def test_the_cache_holds_pixels_and_classes() -> None:
    cache = pixel_cache(shades(6), "label", 3, 1)
    assert cache.latents.shape == (6, 1, 8, 8)
    assert float(cache.latents_of(torch.tensor([2]))[0, 0, 0, 0]) == pytest.approx(
        2 * 220 / 255 - 1, abs=1e-3
    )
    assert cache.conditioning_of(torch.tensor([4])).embedding.tolist() == [[[1.0]]]
    assert cache.uncond.embedding.tolist() == [[[3.0]]]  # the class after the data's


def test_samples_have_the_shade_of_their_class(folder: Path) -> None:
    """By number and by name, with guidance by the class that stands for none."""
    teacher = load_teacher(str(folder))
    assert isinstance(teacher, ClassTeacher) and teacher.classes == 4 and teacher.null_class == 3
    noise = torch.randn(6, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    prompts = [*SHADES, "0", "1", "2"]
    model = Guided(teacher, teacher.encode_text([""]), 1.5)
    with torch.no_grad():
        latents = sample_ode(model, teacher.scheduler, teacher.encode_text(prompts), noise, 10)
    levels = teacher.decode(latents).mean((1, 2, 3)).view(2, 3)
    expected = torch.tensor([40, 120, 220]) / 255
    assert bool(((levels - expected).abs() < 0.15).all()), levels
    with pytest.raises(UserError, match="give one from 0 to 3, or a name: dark, middle, bright"):
        teacher.encode_text(["purple"])


def test_stock_diffusers_loads_the_folder(folder: Path) -> None:
    """Its network makes the same prediction."""
    stock, teacher = DDIMPipeline.from_pretrained(folder), load_teacher(str(folder))
    x_t, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([900, 20])
    with torch.no_grad():
        expected = stock.unet(x_t, t, class_labels=torch.tensor([2, 0])).sample
        output = teacher.denoiser.output(x_t, t, teacher.encode_text(["bright", "dark"]))
    torch.testing.assert_close(output, expected)


def test_a_student_starts_from_it(folder: Path) -> None:
    teacher = load_teacher(str(folder))
    student = Student.from_teacher(teacher, StudentOptions())
    noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    images = student(noise, teacher.encode_text(["dark", "bright"]), torch.Generator())
    assert images.shape == (2, 1, 8, 8) and bool(images.isfinite().all())


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="resolution 27 is not a multiple of 4, as 3 levels need"):
        ClassTeacherOptions(resolution=27)
    for change in ({"views": ViewTrainingOptions()}, {"prediction": "flow_prediction"}):
        with pytest.raises(UserError, match="has no views and predicts eps or v"):
            ClassTeacherOptions(unet=replace(UnetOptions(), **change))  # type: ignore[arg-type]
