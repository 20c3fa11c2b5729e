"""Teachers of pixels: what they are conditioned on, training, and their folders in stock diffusers."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from command_line import script
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel

from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.core.teacher import Teacher
from distill.data.folders import CaptionedImages, load_split
from distill.data.sources.source import FolderOptions, ImageSource, Item, write_dataset
from distill.evaluation.judge import load_judge, predict
from distill.one_step.student import Student, StudentOptions
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.contexts import ContextTeacher, parse_context
from distill.teacher.load import load_teacher
from distill.teacher.pixel_conditions import (
    ClassCondition,
    ContextCondition,
    NoCondition,
    PixelCondition,
    class_names,
    context_names,
)
from distill.teacher.pixel_networks import ClassChannelsUnet, ContextUnet
from distill.teacher.pixel_training import PixelTeacherOptions, pixel_cache, train_pixel_teacher
from distill.teacher.pixels import ClassTeacher
from distill.teacher.unet import UnetOptions, make_scheduler
from distill.teacher.view_training import ViewTrainingOptions

SMALL = UnetOptions(channels=(16, 32), heads=2, batch=8, learning_rate=2e-3, ema=0.9)
SHADES = ("dark", "middle", "bright")
LEVELS = torch.tensor([40, 120, 220]) / 255
CONDITIONS = {
    "class": ClassCondition(),
    "class_channels": ClassCondition(channels=4),
    "context": ContextCondition(),
    "context_unet": ContextCondition(context_unet=16),
}


def shades(count: int) -> CaptionedImages:
    """Images of 8 pixels in one of three greys, the class and the context."""
    labels = [index % 3 for index in range(count)]
    images = torch.tensor([40, 120, 220], dtype=torch.uint8)[labels][:, None, None, None]
    rows = [
        {
            "file_name": f"{i}.png",
            "text": SHADES[label],
            "label": label,
            "context": {name: float(name == SHADES[label]) for name in SHADES},
        }
        for i, label in enumerate(labels)
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
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """The folder of a teacher with a condition, after a short training; each is trained once."""
    base = tmp_path_factory.mktemp("shades")
    write_dataset(ShadesSource(), base / "data", FolderOptions(), base)
    folders: dict[str, Path] = {}

    def train(name: str, condition: PixelCondition, unet: UnetOptions = SMALL) -> Path:
        if name not in folders:
            options = PixelTeacherOptions(str(base / "data"), 8, unet=unet)
            data = load_split(options.data, "train", 8)
            run = Run(RunOptions(str(base / name), 150, trackers=()), {}, name)
            folders[name] = train_pixel_teacher(run, options, condition, data, condition.table(data))
        return folders[name]

    return train


def sampled_levels(teacher: Teacher, prompts: list[str], guidance: float = 1.5) -> torch.Tensor:
    """The mean grey (B,) of one sample of each prompt."""
    noise = torch.randn(len(prompts), *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    model = Guided(teacher, teacher.encode_text([""]), guidance)
    with torch.no_grad():
        latents = sample_ode(model, teacher.scheduler, teacher.encode_text(prompts), noise, 10)
    return teacher.decode(latents).mean((1, 2, 3))


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


def test_contexts_have_the_same_names_in_every_row() -> None:
    data = shades(4)
    assert context_names(data, "context") == list(SHADES)
    for wrong, message in (
        ([1.0, 0.0], r"2.png has the context \[1.0, 0.0\]: expected a mapping from names to numbers"),
        ({"dark": 1.0}, "2.png has the context of dark: expected dark, middle, bright, as the first row"),
        (dict.fromkeys(SHADES, "no"), "2.png: context.dark is 'no': expected a number"),
        ({"a, b": 1.0}, "2.png has the context of a, b: expected dark"),
    ):
        data.rows[2]["context"] = wrong
        with pytest.raises(UserError, match=message):
            context_names(data, "context")


def test_the_cache_holds_pixels_and_conditions() -> None:
    data = shades(6)
    cache = pixel_cache(data, ClassCondition().table(data), 1)
    assert cache.latents.shape == (6, 1, 8, 8)
    assert float(cache.latents_of(torch.tensor([2]))[0, 0, 0, 0]) == pytest.approx(
        2 * 220 / 255 - 1, abs=1e-3
    )
    assert cache.conditioning_of(torch.tensor([4])).embedding.tolist() == [[[1.0]]]
    assert cache.uncond.embedding.tolist() == [[[3.0]]]  # the class after the data's

    data.rows[5]["context"] = {"dark": 0.25, "middle": False, "bright": True}
    cache = pixel_cache(data, ContextCondition().table(data), 1)
    assert cache.num_captions == 4 and cache.uncond.embedding.tolist() == [[[0.0, 0.0, 0.0]]]
    assert cache.conditioning_of(torch.tensor([1, 5])).embedding.tolist() == [
        [[0.0, 1.0, 0.0]],
        [[0.25, 0.0, 1.0]],
    ]


@pytest.mark.parametrize("name", CONDITIONS)
def test_samples_have_the_shade_of_their_condition(name: str, trained: Callable[..., Path]) -> None:
    """By name, with guidance by the condition that stands for none."""
    teacher = load_teacher(str(trained(name, CONDITIONS[name])))
    assert isinstance(teacher, ClassTeacher if name.startswith("class") else ContextTeacher)
    levels = sampled_levels(teacher, list(SHADES))
    assert bool(((levels - LEVELS).abs() < 0.15).all()), levels


def test_a_prediction_of_x0_and_other_schedules_are_learned_too(trained: Callable[..., Path]) -> None:
    unet = replace(SMALL, prediction="sample", schedule="linear", beta_start=1e-3, beta_end=0.1)
    unet = replace(unet, timesteps=100, decay=1.0, decay_law="cosine")
    teacher = load_teacher(str(trained("sample", ClassCondition(), unet)))
    assert teacher.schedule.num_train_timesteps == 100
    levels = sampled_levels(teacher, list(SHADES))
    assert bool(((levels - LEVELS).abs() < 0.15).all()), levels


def test_an_unconditional_teacher_has_all_shades_as_samples(trained: Callable[..., Path]) -> None:
    teacher = load_teacher(str(trained("none", NoCondition())))
    levels = sampled_levels(teacher, ["0"] * 24, guidance=1.0)
    nearest = (levels[:, None] - LEVELS).abs().min(1)
    assert set(nearest.indices.tolist()) == {0, 1, 2}
    with pytest.raises(UserError, match="give one from 0 to 0"):
        teacher.encode_text(["bright"])


def test_classes_are_also_named_by_number(trained: Callable[..., Path]) -> None:
    teacher = load_teacher(str(trained("class", CONDITIONS["class"])))
    assert isinstance(teacher, ClassTeacher) and teacher.classes == 4 and teacher.null_class == 3
    by_name, by_number = teacher.encode_text(list(SHADES)), teacher.encode_text(["0", "1", "2"])
    assert torch.equal(by_name.embedding, by_number.embedding)
    with pytest.raises(UserError, match="give one from 0 to 3, or a name: dark, middle, bright"):
        teacher.encode_text(["purple"])


def test_prompts_of_contexts_are_names_with_weights() -> None:
    names = ["hero", "food", "side facing", "2 of hearts"]
    for prompt, expected in {
        "": [0, 0, 0, 0],
        "food": [0, 1, 0, 0],
        "hero, .6 side facing": [1, 0, 0.6, 0],
        "-0.5 food,2 of hearts": [0, -0.5, 0, 1],
        "3 2 of hearts": [0, 0, 0, 3],
    }.items():
        assert parse_context(prompt, names) == expected
    for prompt in ("dragon", "0.5 dragon", "food hero", "0.5"):
        with pytest.raises(UserError, match=f"the prompt '{prompt}' has .*of hero, food, side facing"):
            parse_context(prompt, names)


def test_stock_diffusers_loads_the_folders(trained: Callable[..., Path]) -> None:
    """Their networks make the same predictions; those of diffusers are in stock pipelines and models."""
    x_t, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1)), torch.tensor([900, 20])
    prompts = ["bright", "dark"]
    labels = {"class": torch.tensor([2, 0]), "context": torch.tensor([[0.0, 0, 1], [1, 0, 0]])}
    for name, condition in CONDITIONS.items():
        folder = trained(name, condition)
        teacher, stock = load_teacher(str(folder)), DDIMPipeline.from_pretrained(folder)
        given = labels[name.split("_")[0]]
        arguments = (x_t, t, None) if name == "context" else (x_t, t)
        with torch.no_grad():
            expected = stock.unet(*arguments, class_labels=given).sample
            output = teacher.denoiser.output(x_t, t, teacher.encode_text(prompts))
        torch.testing.assert_close(output, expected)
        plain = {"class": UNet2DModel, "context": UNet2DConditionModel}
        own = {"class_channels": ClassChannelsUnet, "context_unet": ContextUnet}
        assert type(stock.unet) is (plain | own)[name]


@pytest.mark.parametrize("name", ["class_channels", "context_unet"])
def test_networks_of_our_own_are_loaded_in_a_new_process(
    name: str, trained: Callable[..., Path], tmp_path: Path
) -> None:
    folder = trained(name, CONDITIONS[name])
    script("sample", f"teacher={folder}", "prompts=[dark]", "count=1", "steps=1", f"output={tmp_path}")
    assert (tmp_path / "samples.png").is_file()


def test_a_context_multiplies_features_and_time_is_added() -> None:
    """With a context embedding of 1 and a time embedding of 0 at both levels features are unchanged."""
    network = ContextUnet(sample_size=8, in_channels=1, out_channels=1, width=8, context_size=2).eval()
    x, t = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([3, 900])
    with torch.no_grad():
        for layer in [*network.contexts, *network.times]:
            layer[2].weight.zero_()
            layer[2].bias.fill_(1.0 if layer in network.contexts else 0.0)
        stem = network.stem(x)
        fine = network.down[0](stem)
        coarse = network.down[1](fine)
        features = network.up[0](torch.cat([network.mid_block(coarse), coarse], 1))
        expected = network.out(torch.cat([network.up[1](torch.cat([features, fine], 1)), stem], 1))
        torch.testing.assert_close(network(x, t, class_labels=torch.ones(2, 2)).sample, expected)
        network.contexts[0][2].bias.zero_()  # and with 0 the coarsest features have no effect
        changed = network(x, t, class_labels=torch.ones(2, 2)).sample
        features = network.up[0](torch.cat([torch.zeros_like(coarse), coarse], 1))
        expected = network.out(torch.cat([network.up[1](torch.cat([features, fine], 1)), stem], 1))
        torch.testing.assert_close(changed, expected)


def test_a_student_starts_from_it(trained: Callable[..., Path]) -> None:
    for name, condition in CONDITIONS.items():
        teacher = load_teacher(str(trained(name, condition)))
        student = Student.from_teacher(teacher, StudentOptions())
        noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(1))
        images = student(noise, teacher.encode_text(["dark", "bright"]), torch.Generator())
        assert images.shape == (2, 1, 8, 8) and bool(images.isfinite().all())


def test_the_shipped_teacher_draws_the_digits_asked_for() -> None:
    teacher, judge = load_teacher("digits28"), load_judge("digits28")
    prompts = [str(digit) for digit in range(10) for _ in range(4)]
    noise = torch.randn(40, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    model = Guided(teacher, teacher.encode_text([""]), 1.5)
    with torch.no_grad():
        latents = sample_ode(model, teacher.scheduler, teacher.encode_text(prompts), noise, 20)
    labels = predict(judge, teacher.decode(latents))["label"]
    assert sum(a == b for a, b in zip(labels, prompts, strict=True)) >= 38, labels


def test_the_schedule_is_that_of_the_options() -> None:
    options = UnetOptions(
        prediction="epsilon", zero_snr=False, schedule="linear", beta_start=1e-4, beta_end=0.02, timesteps=500
    )
    scheduler = make_scheduler(options)
    assert isinstance(scheduler, DDIMScheduler)
    torch.testing.assert_close(scheduler.betas, torch.linspace(1e-4, 0.02, 500))


def test_options_that_do_not_fit_are_refused() -> None:
    with pytest.raises(UserError, match="resolution 27 is not a multiple of 4, as 3 levels need"):
        PixelTeacherOptions(resolution=27)
    for change in ({"views": ViewTrainingOptions()}, {"prediction": "flow_prediction"}):
        with pytest.raises(UserError, match="has no views and predicts eps, v or x0"):
            PixelTeacherOptions(unet=replace(UnetOptions(), **change))  # type: ignore[arg-type]
    with pytest.raises(UserError, match="beta_start=0.5, beta_end=0.1, timesteps=1000: expected rising"):
        UnetOptions(beta_start=0.5, beta_end=0.1)


def test_rows_of_data_stand_for_prompts(trained: Callable[..., Path]) -> None:
    """Of classes their numbers, of contexts names with weights; captions where the column is missing."""
    row = {"text": "anything", "label": 2, "context": {"dark": 0.5, "middle": 0.0, "bright": True}}
    for name, expected in {"class": "2", "context": "0.5 dark, 1 bright"}.items():
        teacher = load_teacher(str(trained(name, CONDITIONS[name])))
        assert teacher.prompt_of(row) == expected
        assert teacher.prompt_of({"text": "dark"}) == "dark"
    vector = teacher.encode_text([teacher.prompt_of(row)]).embedding
    assert vector.tolist() == [[[0.5, 0.0, 1.0]]]
    assert load_teacher(str(trained("none", NoCondition()))).prompt_of(row) == "0"


def test_students_are_distilled_from_it_and_loaded(trained: Callable[..., Path], tmp_path: Path) -> None:
    """Two cycles of DMD2; the student's folder names its teacher, whose prompts it takes."""
    folder = trained("class", CONDITIONS["class"])
    small = ["run.steps=2", "distill.batch=4", "judge=null", "distill.monitor.every=0"]
    data, directory = f"data={folder.parents[1] / 'data'}", f"run.directory={tmp_path / 'run'}"
    script("distill_one_step", f"teacher={folder}", data, *small, directory)
    student = tmp_path / "run" / "student"
    script("sample", f"student={student}", "prompts=[dark]", "count=2", f"output={tmp_path / 'samples'}")
    assert (tmp_path / "samples" / "000_01.png").is_file()
    (student / "student.json").write_text("{}")
    message = script("sample", f"student={student}", "prompts=[dark]", code=2)
    assert "names no teacher, which the student" in message


def test_losses_and_evaluations_run_on_it(trained: Callable[..., Path], tmp_path: Path) -> None:
    """Two steps of score distillation; the samples of an evaluation are of the rows' contexts."""
    folder = trained("context", CONDITIONS["context"])
    teacher, directory = f"teacher={folder}", f"run.directory={tmp_path / 'image'}"
    script("optimise_image", teacher, "prompt=bright", "run.steps=2", directory)
    assert (tmp_path / "image" / "result.json").is_file()
    sizes = [f"evaluation.{key}=4" for key in ("samples", "captions", "each", "batch")]
    figures = script(
        "evaluate_generator", teacher, f"data={folder.parents[1] / 'data'}", "split=train", "steps=[4]",
        "judge=null", "labels=none", "features=shapes64", "evaluation.neighbours=1", *sizes,
        f"output={tmp_path / 'figures'}",
    )  # fmt: skip
    assert "frechet" in figures
