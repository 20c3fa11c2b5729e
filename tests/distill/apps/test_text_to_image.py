"""The teacher's tasks against diffusers' own pipelines, from the same noise, and what options may not say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import script
from conftest import save_tiny_teacher
from diffusers import (
    DPMSolverMultistepScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
)
from diffusers.pipelines.stable_diffusion import (
    pipeline_stable_diffusion_img2img,
    pipeline_stable_diffusion_inpaint,
)
from PIL import Image
from torch import Tensor

from distill.apps.text_to_image import (
    TextToImageOptions,
    compare_samplers,
    load_picture,
    text_rows,
    text_to_image,
)
from distill.control.adapter import make_adapter, save_adapter
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.runtime.errors import UserError
from distill.runtime.images import save_png
from distill.teacher.clip import caption_features, image_features
from distill.teacher.folder import load_clip
from distill.teacher.latent import Teacher

PROMPT = "a red cube"


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Teacher:
    """A tiny teacher with latents of four channels: diffusers inpaints with no others."""
    return Teacher.load(str(save_tiny_teacher(tmp_path_factory.mktemp("four") / "tiny", 4)))


@pytest.fixture
def posterior_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' pipelines draw from the VAE's posterior; ours take its mean, which is what the images are compared by."""
    for module in (pipeline_stable_diffusion_img2img, pipeline_stable_diffusion_inpaint):
        monkeypatch.setattr(
            module, "retrieve_latents", lambda encoded, generator=None: encoded.latent_dist.mean
        )


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blue square on grey, and a mask of its left half."""
    folder = tmp_path_factory.mktemp("picture")
    pixels = np.full((64, 64, 3), 180, np.uint8)
    pixels[20:44, 20:44] = (30, 60, 200)
    Image.fromarray(pixels).save(folder / "square.png")
    half = np.zeros((64, 64), np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save(folder / "left.png")
    return folder


def first_noise(teacher: Teacher, seed: int = 0) -> Tensor:
    return torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))


def stock(kind: type, teacher: Teacher, **given: object) -> Tensor:
    pipeline = kind.from_pretrained(teacher.place)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, guidance_scale=2.0, output_type="pt", **given).images.float()


def ours(teacher: Teacher, **given: object) -> Tensor:
    return text_to_image(teacher, TextToImageOptions((PROMPT,), count=1, guidance=2.0, steps=5, **given))[0]  # type: ignore[arg-type]


def square(picture: Path) -> Tensor:
    return (
        torch.from_numpy(np.asarray(Image.open(picture / "square.png")).copy()).permute(2, 0, 1)[None] / 255
    )


def test_image_to_image_is_the_stock_pipelines(four: Teacher, picture: Path, posterior_means: None) -> None:
    made = ours(four, image=str(picture / "square.png"), strength=0.6)
    source = torch.Generator().manual_seed(0)
    given = {"image": square(picture), "num_inference_steps": 5, "generator": source}
    torch.testing.assert_close(
        stock(StableDiffusionImg2ImgPipeline, four, strength=0.6, **given), made, atol=1e-3, rtol=0
    )
    assert (
        float((ours(four, image=str(picture / "square.png"), strength=0.2) - made).abs().max()) > 0.01
    )  # it sees the strength


def test_inpainting_is_the_stock_pipelines(four: Teacher, picture: Path, posterior_means: None) -> None:
    given = {"image": str(picture / "square.png"), "mask": str(picture / "left.png")}
    for strength in (1.0, 0.8):
        told = stock(
            StableDiffusionInpaintPipeline,
            four,
            image=square(picture),
            mask_image=Image.open(picture / "left.png"),
            strength=strength,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(0),
            height=64,
            width=64,
        )
        torch.testing.assert_close(told, ours(four, strength=strength, **given), atol=1e-3, rtol=0)


def test_the_shipped_teacher_paints_where_it_may(picture: Path) -> None:
    teacher = Teacher.load("shapes64")
    given = {"image": str(picture / "square.png"), "mask": str(picture / "left.png")}
    clean = load_picture(teacher, TextToImageOptions((PROMPT,), **given), 1)
    assert clean is not None and clean.mask is not None and clean.mask.mean() == 0.5
    with torch.no_grad():
        kept = teacher.decode(clean.clean)
    changed = (ours(teacher, strength=1.0, **given) - kept).abs()
    assert (
        changed[..., 44:].mean() < 0.08 < changed[..., :24].mean()
    )  # the decoder looks at all of the latents: not 0
    little, much = (ours(teacher, image=given["image"], strength=share) for share in (0.2, 1.0))
    assert (little - kept).square().mean() < 0.5 * (much - kept).square().mean()  # the less noise, the nearer


def test_dpm_solver_is_the_stock_pipelines(tiny_teacher: Teacher, tiny_teacher_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher_folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(tiny_teacher.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    noise = first_noise(tiny_teacher)
    told = pipeline(PROMPT, latents=noise, guidance_scale=2.0, num_inference_steps=5, output_type="pt").images
    torch.testing.assert_close(told.float(), ours(tiny_teacher, sampler="dpm"), atol=1e-3, rtol=0)
    assert float((ours(tiny_teacher, sampler="dpm") - ours(tiny_teacher)).abs().max()) > 1e-3


def test_mixed_prompts(tiny_teacher: Teacher) -> None:
    both = TextToImageOptions(("a red cube", "a blue duck"), count=1, steps=2)
    one, two = tiny_teacher.encode_text(both.prompts)
    assert torch.allclose(
        text_rows(tiny_teacher, replace(both, weights=(3.0, 1.0)))[0], 0.75 * one + 0.25 * two, atol=1e-6
    )
    way = text_rows(tiny_teacher, replace(both, interpolate=3))
    assert (
        torch.equal(way[0], one)
        and torch.equal(way[2], two)
        and torch.allclose(way[1], (one + two) / 2, atol=1e-6)
    )
    mixed, _ = text_to_image(tiny_teacher, replace(both, weights=(1.0, 1.0)))
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher.place)
    pipeline.set_progress_bar_config(disable=True)
    told = pipeline(
        prompt_embeds=((one + two) / 2)[None],
        negative_prompt_embeds=tiny_teacher.encode_text([""]),
        latents=first_noise(tiny_teacher),
        guidance_scale=3.0,
        num_inference_steps=2,
        output_type="pt",
    ).images
    torch.testing.assert_close(told.float(), mixed, atol=1e-3, rtol=0)


def test_a_sweep_is_each_guidance_from_the_same_noise(tiny_teacher: Teacher) -> None:
    options = TextToImageOptions((PROMPT, "a blue duck"), count=2, steps=2, sweep=(1.0, 4.0))
    images, _ = text_to_image(tiny_teacher, options)
    assert len(images) == 8
    alone, _ = text_to_image(tiny_teacher, replace(options, sweep=(), guidance=4.0))
    assert torch.allclose(images.view(2, 2, 2, 3, 64, 64)[:, 1].flatten(0, 1), alone, atol=1e-5)


def test_ranking_keeps_what_clip_finds_nearest() -> None:
    shipped = Teacher.load("shapes64")
    options = TextToImageOptions((PROMPT,), count=2, steps=4, guidance=1.0, candidates=3)
    kept, _ = text_to_image(shipped, options)
    every, _ = text_to_image(shipped, replace(options, count=6, candidates=1))
    clip = load_clip(shipped.place)
    with torch.no_grad():
        near = image_features(clip, every) @ caption_features(clip, shipped.tokenizer, [PROMPT])[0]
    assert torch.allclose(kept, every[near.argsort(descending=True)[:2]], atol=1e-5)


def test_labels_of_a_folder(tmp_path: Path) -> None:
    teacher = Teacher.load("shapes64")
    for name in ("a red cube", "a blue sphere"):
        image, _ = text_to_image(teacher, TextToImageOptions((name,), count=1, steps=8))
        save_png(tmp_path / "in" / f"{name.replace(' ', '_')}.png", image[0])
    given = ["a red cube", "a blue sphere", f"folder={tmp_path / 'in'}", f"output={tmp_path / 'labels.json'}"]
    script("label_images", *given)
    told = json.loads((tmp_path / "labels.json").read_text())
    assert told["a_red_cube.png"]["a red cube"] > 0.9 and told["a_blue_sphere.png"]["a blue sphere"] > 0.9
    assert "holds no images" in script("label_images", "a red cube", f"folder={tmp_path / 'none'}", code=2)
    assert "'dragon'" in script("label_images", "a red dragon", given[2], code=2)


def test_a_race_draws_by_each_sampler(tiny_teacher: Teacher) -> None:
    options = TextToImageOptions((PROMPT,), count=1, steps=3)
    images, table = compare_samplers(tiny_teacher, options, ["ddim", "dpm"])
    assert torch.equal(images[0], text_to_image(tiny_teacher, options)[0]) and len(table.splitlines()) == 3


def test_the_script_takes_pictures_and_adapters(
    tiny_teacher: Teacher, tiny_teacher_folder: Path, picture: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a", make_adapter(tiny_teacher), "silhouette", {})
    given = [f"teacher={tiny_teacher_folder}", PROMPT, "count=1", "steps=2", "guidance=2"]
    script(
        "sample",
        *given,
        f"controls=[{{adapter: {tmp_path / 'a'}, picture: {picture / 'left.png'}}}]",
        f"output={tmp_path / 'one'}",
    )
    script("sample", *given, f"output={tmp_path / 'two'}")
    one, two = (np.asarray(Image.open(tmp_path / name / "samples.png")) for name in ("one", "two"))
    assert np.array_equal(one, two)  # an untrained adapter says nothing
    told = script("sample", *given, "race=[ddim, dpm]", f"output={tmp_path / 'three'}")
    assert "ms an image" in told and Image.open(tmp_path / "three" / "samples.png").size == (64, 130)
    assert "cannot be read as an image" in script("sample", *given, f"image={__file__}", code=2)
    model = Guided(tiny_teacher, tiny_teacher.encode_text([""]), 2.0)
    latents = sample_ode(
        model, tiny_teacher.scheduler, tiny_teacher.encode_text([PROMPT]), first_noise(tiny_teacher), 2
    )
    with torch.no_grad():
        image = tiny_teacher.decode(latents)[0].permute(1, 2, 0).numpy()
    assert np.abs(image * 255 - two).max() <= 1.5


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mask": "m.png"}, "give image= too"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"strength": 0.01}, "one step at least"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 prompts"),
        ({"interpolate": 3}, "at least 2 prompts"),
        ({"candidates": 2, "sweep": (1.0,)}, "leave weights"),
    ],
    ids=str,
)
def test_options_that_cannot_be(given: dict[str, object], said: str) -> None:
    with pytest.raises(UserError, match=said):
        TextToImageOptions((PROMPT,), **given)  # type: ignore[arg-type]
