"""Teachers of pixels conditioned on images: reduced, in part unknown, or by CLIP; and on texts by CLIP."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from command_line import script
from PIL import Image
from torch import Tensor

from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.core.teacher import Teacher
from distill.data.folders import PATH, CaptionedImages, load_split
from distill.data.images import load_image
from distill.data.latents import load_latents
from distill.data.prompts import load_prompts
from distill.data.sources.source import FolderOptions, ImageSource, Item, write_dataset
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.clip_conditions import ClipCondition, ClipEncoder, ClipTeacher
from distill.teacher.concatenation import ConcatenationTeacher, InpaintingCondition, LowResolutionCondition
from distill.teacher.load import load_teacher
from distill.teacher.pixel_conditions import PixelCondition
from distill.teacher.pixel_training import PixelTeacherOptions, pixel_cache, train_pixel_teacher
from distill.teacher.unet import UnetOptions

SMALL = UnetOptions(channels=(16, 32), heads=2, batch=8, learning_rate=2e-3, ema=0.9)
CONDITIONS: dict[str, PixelCondition] = {
    "low": LowResolutionCondition(4),
    "inpainting": InpaintingCondition(),
    "clip": ClipCondition(),
    "text": ClipCondition(source="text"),
}
NAMES = ("cube", "sphere", "cone")  # words of the shipped CLIP


class Shades(ImageSource):
    """Images of 8 pixels in one of three greys, with a name each."""

    @property
    def licence(self) -> str:
        return "none"

    def items(self, cache: Path) -> list[Item]:
        levels = torch.arange(24) % 3
        images = (40 + 80 * levels)[:, None, None, None].expand(-1, 8, 8, 3).to(torch.uint8).numpy()
        rows = [{"text": f"a {NAMES[level]}"} for level in levels]
        return [Item(image, row, "train") for image, row in zip(images, rows, strict=True)]


LEVELS = torch.tensor([40, 120, 200]) / 255


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a teacher with a condition, after a short training; each is trained once."""
    base = tmp_path_factory.mktemp("images")
    write_dataset(Shades(), base / "data", FolderOptions(), base)
    folders: dict[str, Path] = {}

    def train(name: str) -> Path:
        if name not in folders:
            options, condition = PixelTeacherOptions(str(base / "data"), 8, unet=SMALL), CONDITIONS[name]
            data = load_split(options.data, "train", 8)
            run = Run(RunOptions(str(base / name), 150, trackers=()), {}, name)
            folders[name] = train_pixel_teacher(run, options, condition, data, condition.table(data))
        return folders[name]

    return train


def data_of(folder: Path) -> Path:
    return folder.parents[1] / "data"


def samples(teacher: Teacher, prompts: list[str]) -> Tensor:
    """One sample (1, 8, 8) of each prompt."""
    noise = torch.randn(len(prompts), *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    model = Guided(teacher, teacher.encode_text([""]), 1.5)
    with torch.no_grad():
        latents = sample_ode(model, teacher.scheduler, teacher.encode_text(prompts), noise, 10)
    return teacher.decode(latents)[:, :1]


@pytest.mark.parametrize("name", ["low", "inpainting", "clip"])
def test_samples_are_of_the_image(name: str, trained: Callable[[str], Path]) -> None:
    """The prompts are files; the mean of a sample is the picture's grey, also where it was not known."""
    folder = trained(name)
    teacher = load_teacher(str(folder))
    rows = load_split(data_of(folder), "train", 8).rows[:3]
    images = samples(teacher, [teacher.prompt_of(row) for row in rows])
    torch.testing.assert_close(images[:, 0, 2:6, 2:6].mean((1, 2)), LEVELS, atol=0.15, rtol=0)
    assert teacher.latent_shape == (1, 8, 8)
    assert isinstance(teacher, ClipTeacher if name == "clip" else ConcatenationTeacher)


def test_samples_are_of_the_text(trained: Callable[[str], Path]) -> None:
    teacher = load_teacher(str(trained("text")))
    prompts = [f"a {name}" for name in NAMES]
    assert [teacher.prompt_of({"text": prompt, PATH: "x"}) for prompt in prompts] == prompts
    torch.testing.assert_close(samples(teacher, prompts).mean((1, 2, 3)), LEVELS, atol=0.15, rtol=0)
    with pytest.raises(UserError, match="unknown word 'zebra'"):
        teacher.encode_text(["a zebra"])


def test_latents_of_a_data_set_have_the_maps_of_their_images(trained: Callable[[str], Path]) -> None:
    """What students and adapters of such a teacher are trained on."""
    folder = trained("low")
    teacher = load_teacher(str(folder))
    cache = load_latents(teacher, data_of(folder))
    maps = cache.conditioning_of(torch.arange(3)).embedding
    torch.testing.assert_close(maps.mean((1, 2, 3)), 2 * LEVELS - 1, atol=1e-3, rtol=0)
    torch.testing.assert_close(
        cache.latents_of(torch.arange(3)).mean((1, 2, 3)), 2 * LEVELS - 1, atol=1e-3, rtol=0
    )
    assert not cache.uncond.embedding.any()


def test_cached_maps_are_of_the_condition(trained: Callable[[str], Path]) -> None:
    """Another factor in the same folder has other maps; images and texts other vectors."""
    folder = trained("low")
    teacher = load_teacher(str(folder))
    assert isinstance(teacher, ConcatenationTeacher)
    before = teacher.fingerprint()
    teacher.condition = LowResolutionCondition(2)
    assert teacher.fingerprint() != before
    image, text = (load_teacher(str(trained(name))) for name in ("clip", "text"))
    assert image.fingerprint() != text.fingerprint()


def test_streamed_prompts_and_pairs_are_of_the_files(trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = trained("low")
    teacher, data = load_teacher(str(folder)), data_of(folder)
    prompts = load_prompts(teacher, data, images=False)
    maps = prompts.conditioning_of(torch.arange(3)).embedding
    torch.testing.assert_close(maps.mean((1, 2, 3)), 2 * LEVELS - 1, atol=1e-3, rtol=0)
    sizes = ["pairs.count=2", "pairs.steps=2", "pairs.batch=2"]
    script("make_pairs", f"teacher={folder}", f"data={data}", *sizes, f"output={tmp_path / 'pairs'}")


def test_reduced_images(tmp_path: Path) -> None:
    """A file of the reduced size is taken as it is, a larger one is reduced as in training."""
    image = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(0))
    Image.fromarray((image * 255).byte().numpy()).save(tmp_path / "large.png")
    large = load_image(tmp_path / "large.png", 8)
    condition = LowResolutionCondition(4)
    expected = condition.maps_of(large, torch.zeros(1))[0]
    assert float((expected[0, 0, 0] - (2 * large[0, 0, :4, :4].mean() - 1)).abs()) < 1e-6
    assert torch.equal(condition.read(str(tmp_path / "large.png"), 8), expected)
    small = ((expected + 1) / 2 * 255).round().byte().permute(1, 2, 0).numpy()
    Image.fromarray(small).save(tmp_path / "small.png")
    torch.testing.assert_close(condition.read(str(tmp_path / "small.png"), 8), expected, atol=5e-3, rtol=0)
    with pytest.raises(UserError, match="factor is 3: expected a divisor of 8 pixels"):
        LowResolutionCondition(3).read(str(tmp_path / "large.png"), 8)


def test_unknown_rectangles(tmp_path: Path) -> None:
    """Each image has its own, within the sizes asked for; colours are zero inside, exact outside."""
    images = torch.rand(50, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    condition = InpaintingCondition(0.5)
    maps = condition.maps_of(images, torch.arange(50))
    mask = maps[:, 3]
    assert torch.equal(mask, mask.bool().float())
    sizes = torch.stack([(mask == 0).any(2).sum(1), (mask == 0).any(1).sum(1)])
    assert 7 <= int(sizes.min()) < 11 and 13 < int(sizes.max()) <= 16
    assert torch.equal((mask == 0).sum((1, 2)), sizes.prod(0))  # a rectangle
    torch.testing.assert_close(maps[:, :3], (2 * images - 1) * mask[:, None])
    assert torch.equal(condition.maps_of(images[7:8], torch.tensor([7]))[0], maps[7])
    with pytest.raises(UserError, match="largest is 0.2"):
        InpaintingCondition(0.2)


def test_data_with_transparency_are_refused() -> None:
    """Their files, as prompts, would be completed where they are transparent."""
    images = torch.zeros(2, 4, 8, 8, dtype=torch.uint8)
    data = CaptionedImages(images, [{"file_name": "x.png", "text": "x"}] * 2)
    with pytest.raises(UserError, match="write the data with folder.background=1"):
        InpaintingCondition().table(data)
    images[:, 3] = 255
    assert len(InpaintingCondition().table(CaptionedImages(images, data.rows)).rows) == 3  # opaque
    assert len(LowResolutionCondition(4).table(data).rows) == 3


def test_transparent_pixels_are_unknown_or_the_centre_of_an_opaque_image(tmp_path: Path) -> None:
    pixels = torch.full((8, 8, 4), 200, dtype=torch.uint8)
    pixels[:, :3, 3] = 0
    pixels[:, 3:, 3] = 255
    Image.fromarray(pixels.numpy(), "RGBA").save(tmp_path / "part.png")
    part = InpaintingCondition().read(str(tmp_path / "part.png"), 8)
    assert not part[:, :, :3].any() and bool((part[3, :, 3:] == 1).all())
    torch.testing.assert_close(part[:3, :, 3:], torch.full((3, 8, 5), 2 * 200 / 255 - 1))
    Image.fromarray(pixels[..., :3].contiguous().numpy()).save(tmp_path / "whole.png")
    whole = InpaintingCondition().read(str(tmp_path / "whole.png"), 8)
    pixels[..., 3] = 255
    Image.fromarray(pixels.numpy(), "RGBA").save(tmp_path / "opaque.png")
    assert torch.equal(InpaintingCondition().read(str(tmp_path / "opaque.png"), 8), whole)
    assert int((whole[3] == 0).sum()) == 16 and not whole[:, 2:6, 2:6].any()


def test_the_cache_has_an_image_a_row() -> None:
    shades = Shades().items(Path())
    images = torch.stack([torch.from_numpy(item.image) for item in shades]).permute(0, 3, 1, 2)  # type: ignore[arg-type]
    data = CaptionedImages(images, [{"file_name": "x.png", **item.row} for item in shades])
    cache = pixel_cache(data, LowResolutionCondition(2).table(data), 1)
    dropped = torch.arange(24) == 5
    rows = cache.conditioning_of(torch.arange(24), dropped).embedding
    assert rows.shape == (24, 3, 4, 4) and not rows[5].any()
    torch.testing.assert_close(
        rows[:, 0, 0, 0], torch.where(dropped, 0.0, cache.latents_of(torch.arange(24))[:, 0, 0, 0])
    )


def test_vectors_of_clip_have_a_mean_square_of_one() -> None:
    encoder = ClipEncoder.load("shapes64")
    vectors = encoder.of_images(torch.rand(3, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(vectors.square().mean(1), torch.ones(3))
    torch.testing.assert_close(encoder.of_texts(["a red cube"]).square().mean(), torch.tensor(1.0))
    with pytest.raises(UserError, match="has no CLIP: give a shipped teacher"):
        ClipEncoder.load("digits28")


def test_what_is_no_image_is_refused(trained: Callable[[str], Path], tmp_path: Path) -> None:
    folder = trained("low")
    with pytest.raises(UserError, match="the prompt is 'a cube', but .* takes image files"):
        load_teacher(str(folder)).encode_text(["a cube"])
    message = script("sample", f"teacher={folder}", "prompts=[nothing.png]", f"output={tmp_path}", code=2)
    assert "nothing.png does not exist" in message
