"""Text to image against diffusers' own pipelines from the same noise, comparisons, and invalid options."""

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

from distill.apps.comparisons import compare_formulations, compare_samplers
from distill.apps.sample import SampleOptions
from distill.apps.text_to_image import (
    TextToImageOptions,
    initial_batch,
    load_init,
    prompt_conditioning,
    rank_by_clip,
    text_to_image,
)
from distill.control.adapter import ControlOptions, make_adapter, save_adapter
from distill.core.samplers import parse_sampler
from distill.core.sampling import sample_heun, sample_ode
from distill.core.score import Guided
from distill.core.views import POSE
from distill.runtime.errors import UserError
from distill.runtime.images import image_grid, save_png
from distill.teacher.clip import caption_features, image_features
from distill.teacher.folder import load_clip
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion

PROMPT = "a red cube"
SHORT = TextToImageOptions((PROMPT,), count=1, steps=3)


@pytest.fixture(scope="module")
def four_channels(tmp_path_factory: pytest.TempPathFactory) -> LatentDiffusionTeacher:
    """A tiny teacher with latents of four channels: diffusers' inpainting takes no others."""
    return load_latent_diffusion(str(save_tiny_teacher(tmp_path_factory.mktemp("four") / "tiny", 4)))


@pytest.fixture
def posterior_means(monkeypatch: pytest.MonkeyPatch) -> None:
    """diffusers' pipelines sample the VAE's posterior; ours take its mean, so images can be compared."""
    for module in (pipeline_stable_diffusion_img2img, pipeline_stable_diffusion_inpaint):
        monkeypatch.setattr(
            module, "retrieve_latents", lambda encoded, generator=None: encoded.latent_dist.mean
        )


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A blue square on grey, square.png, and a mask of its left half, left.png."""
    folder = tmp_path_factory.mktemp("images")
    pixels = np.full((64, 64, 3), 180, np.uint8)
    pixels[20:44, 20:44] = (30, 60, 200)
    Image.fromarray(pixels).save(folder / "square.png")
    half = np.zeros((64, 64), np.uint8)
    half[:, :32] = 255
    Image.fromarray(half).save(folder / "left.png")
    return folder


def first_noise(teacher: LatentDiffusionTeacher, seed: int = 0) -> Tensor:
    return torch.randn(1, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))


def stock(kind: type, teacher: LatentDiffusionTeacher, **arguments: object) -> Tensor:
    """The image of a diffusers pipeline."""
    pipeline = kind.from_pretrained(teacher.name_or_path)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(PROMPT, guidance_scale=2.0, output_type="pt", **arguments).images.float()


def ours(teacher: LatentDiffusionTeacher, **arguments: object) -> Tensor:
    options = TextToImageOptions((PROMPT,), count=1, guidance=2.0, steps=5, **arguments)  # type: ignore[arg-type]
    return text_to_image(teacher, options).images


def square(folder: Path) -> Tensor:
    return torch.from_numpy(np.asarray(Image.open(folder / "square.png")).copy()).permute(2, 0, 1)[None] / 255


def test_image_to_image_equals_diffusers(
    four_channels: LatentDiffusionTeacher, image_folder: Path, posterior_means: None
) -> None:
    path = str(image_folder / "square.png")
    result = ours(four_channels, image=path, strength=0.6)
    arguments = {"image": square(image_folder), "strength": 0.6, "num_inference_steps": 5}
    generator = torch.Generator().manual_seed(0)
    expected = stock(StableDiffusionImg2ImgPipeline, four_channels, generator=generator, **arguments)
    torch.testing.assert_close(expected, result, atol=1e-3, rtol=0)
    weaker = ours(four_channels, image=path, strength=0.2)
    assert float((weaker - result).abs().max()) > 0.01


def test_inpainting_equals_diffusers(
    four_channels: LatentDiffusionTeacher, image_folder: Path, posterior_means: None
) -> None:
    paths = {"image": str(image_folder / "square.png"), "mask": str(image_folder / "left.png")}
    for strength in (1.0, 0.8):
        expected = stock(
            StableDiffusionInpaintPipeline,
            four_channels,
            image=square(image_folder),
            mask_image=Image.open(image_folder / "left.png"),
            strength=strength,
            num_inference_steps=5,
            generator=torch.Generator().manual_seed(0),
            height=64,
            width=64,
        )
        result = ours(four_channels, strength=strength, **paths)
        torch.testing.assert_close(expected, result, atol=1e-3, rtol=0)


def test_shipped_teacher_inpaints_inside_the_mask(image_folder: Path) -> None:
    teacher = load_latent_diffusion("shapes64")
    paths = {"image": str(image_folder / "square.png"), "mask": str(image_folder / "left.png")}
    init = load_init(teacher, TextToImageOptions((PROMPT,), **paths), 1)  # type: ignore[arg-type]
    assert init is not None and init.mask is not None and init.mask.mean() == 0.5
    with torch.no_grad():
        source = teacher.decode(init.clean)
    change = (ours(teacher, strength=1.0, **paths) - source).abs()
    # not 0 outside: the decoder's receptive field crosses the mask's edge
    assert change[..., 44:].mean() < 0.08 < change[..., :24].mean()
    weak, strong = (ours(teacher, image=paths["image"], strength=strength) for strength in (0.2, 1.0))
    assert (weak - source).square().mean() < 0.5 * (strong - source).square().mean()


def test_dpm_solver_equals_diffusers(tiny_teacher: LatentDiffusionTeacher, tiny_teacher_folder: Path) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher_folder)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(tiny_teacher.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        PROMPT, latents=first_noise(tiny_teacher), guidance_scale=2.0, num_inference_steps=5, output_type="pt"
    ).images
    result = ours(tiny_teacher, sampler="dpm")
    torch.testing.assert_close(expected.float(), result, atol=1e-3, rtol=0)
    assert float((result - ours(tiny_teacher)).abs().max()) > 1e-3


def test_mixed_and_interpolated_prompts(tiny_teacher: LatentDiffusionTeacher) -> None:
    options = TextToImageOptions(("a red cube", "a blue duck"), count=1, steps=2)
    first, second = tiny_teacher.encode_text(options.prompts).embedding
    weighted = prompt_conditioning(tiny_teacher, replace(options, weights=(3.0, 1.0))).embedding
    assert len(weighted) == 1
    assert torch.allclose(weighted[0], 0.75 * first + 0.25 * second, atol=1e-6)
    rows = prompt_conditioning(tiny_teacher, replace(options, interpolate=3)).embedding
    assert torch.equal(rows[0], first) and torch.equal(rows[2], second)
    assert torch.allclose(rows[1], (first + second) / 2, atol=1e-6)

    pipeline = StableDiffusionPipeline.from_pretrained(tiny_teacher.name_or_path)
    pipeline.set_progress_bar_config(disable=True)
    expected = pipeline(
        prompt_embeds=((first + second) / 2)[None],
        negative_prompt_embeds=tiny_teacher.encode_text([""]).embedding,
        latents=first_noise(tiny_teacher),
        guidance_scale=3.0,
        num_inference_steps=2,
        output_type="pt",
    ).images
    result = text_to_image(tiny_teacher, replace(options, weights=(1.0, 1.0))).images
    torch.testing.assert_close(expected.float(), result, atol=1e-3, rtol=0)


def test_sweep_is_each_guidance_from_the_same_noise(tiny_teacher: LatentDiffusionTeacher) -> None:
    options = TextToImageOptions((PROMPT, "a blue duck"), count=2, steps=2, sweep=(1.0, 4.0))
    images = text_to_image(tiny_teacher, options).images
    assert len(images) == 8
    single = text_to_image(tiny_teacher, replace(options, sweep=(), guidance=4.0)).images
    assert torch.allclose(images.view(2, 2, 2, 3, 64, 64)[:, 1].flatten(0, 1), single, atol=1e-5)


def test_candidates_are_ranked_by_clip(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    teacher = load_latent_diffusion("shapes64")
    options = TextToImageOptions((PROMPT,), count=2, steps=4, guidance=1.0, candidates=3)
    best = text_to_image(teacher, options).images
    candidates = text_to_image(teacher, replace(options, count=6, candidates=1)).images
    clip = load_clip(teacher.name_or_path)
    with torch.no_grad():
        scores = image_features(clip, candidates) @ caption_features(clip, teacher.tokenizer, [PROMPT])[0]
    assert torch.allclose(best, candidates[scores.argsort(descending=True)[:2]], atol=1e-5)
    tiny_teacher.name_or_path = str(tmp_path)  # no CLIP there
    with pytest.raises(UserError, match="no CLIP to rank with: give clip=, or set candidates=1"):
        rank_by_clip(tiny_teacher, best[None], options)
    ranked = rank_by_clip(tiny_teacher, candidates[None], replace(options, clip="shapes64"))
    assert torch.equal(ranked[0], candidates[scores.argsort(descending=True)[:2]])


def test_labels_of_a_folder(tmp_path: Path) -> None:
    teacher = load_latent_diffusion("shapes64")
    captions = ["a red cube", "a blue sphere"]
    for caption in captions:
        image = text_to_image(teacher, TextToImageOptions((caption,), count=1, steps=8)).images[0]
        save_png(tmp_path / "in" / f"{caption.replace(' ', '_')}.png", image)
    folder, output = f"folder={tmp_path / 'in'}", tmp_path / "labels.json"
    script("label_images", *captions, folder, f"output={output}")
    labels = json.loads(output.read_text())
    assert labels["a_red_cube.png"]["a red cube"] > 0.9
    assert labels["a_blue_sphere.png"]["a blue sphere"] > 0.9
    assert "holds no images" in script("label_images", "a red cube", f"folder={tmp_path / 'none'}", code=2)
    assert "'dragon'" in script("label_images", "a red dragon", folder, code=2)


def test_compared_samplers_have_steps_of_their_own(tiny_teacher: LatentDiffusionTeacher) -> None:
    images, table = compare_samplers(tiny_teacher, SHORT, ["ddim:2", "ddpm:5", "dpm"])
    expected = [("ddim", 2), ("ddpm", 5), ("dpm", 3)]
    for result, (sampler, steps) in zip(images, expected, strict=True):
        options = replace(SHORT, sampler=sampler, steps=steps)  # type: ignore[arg-type]
        assert torch.equal(result, text_to_image(tiny_teacher, options).images)
    rows = [line.split()[:3] for line in table.splitlines()[1:]]
    assert rows == [["ddim", "2", "4"], ["ddpm", "5", "10"], ["dpm", "3", "6"]]  # guidance counts twice
    with pytest.raises(UserError, match="steps is 1001: expected 1 to 1000"):
        compare_samplers(tiny_teacher, SHORT, ["ddpm:1001"])
    for text in ("euler", "ddim:", "ddim:0", "ddim:-3", "ddim:2.5"):
        with pytest.raises(UserError, match="for example ddpm:500"):
            parse_sampler(text, 3)


def test_images_larger_than_those_of_the_training(tiny_teacher: LatentDiffusionTeacher) -> None:
    """Of 96 pixels, from noise of 12 cells a side; sizes that the VAE cannot have are refused."""
    options = replace(SHORT, resolution=96)
    assert initial_batch(tiny_teacher, options)[1].shape[2:] == (12, 12)
    images = text_to_image(tiny_teacher, options).images
    assert images.shape == (1, 3, 96, 96) and bool(images.isfinite().all())
    own = text_to_image(tiny_teacher, replace(SHORT, resolution=64)).images
    assert torch.equal(own, text_to_image(tiny_teacher, SHORT).images)
    for side in (60, 4, 0):
        with pytest.raises(UserError, match=f"resolution is {side}: expected a multiple of 8"):
            text_to_image(tiny_teacher, replace(SHORT, resolution=side))


def test_nfe_of_an_image() -> None:
    assert replace(SHORT, guidance=1.0).nfe == replace(SHORT, guidance=0.0).nfe == 3
    assert replace(SHORT, steps=10, image="a.png", strength=0.35, candidates=2).nfe == 3 * 2 * 2


def test_animation_has_x0_and_x_t_of_every_step(tiny_teacher: LatentDiffusionTeacher) -> None:
    images, frames = text_to_image(tiny_teacher, replace(SHORT, animation=True))
    assert set(frames) == {"x0", "xt"} and len(frames["x0"]) == len(frames["xt"]) == 3
    with torch.no_grad():
        noise = tiny_teacher.decode(first_noise(tiny_teacher))
    torch.testing.assert_close(frames["xt"][0], image_grid(noise, 1))  # from the initial noise
    torch.testing.assert_close(frames["x0"][-1], images[0])  # to the image
    assert float((frames["xt"] - frames["x0"]).abs().amax((1, 2, 3)).min()) > 1e-3


def test_formulations_are_sampled_by_heun(tiny_teacher: LatentDiffusionTeacher) -> None:
    images, table = compare_formulations(tiny_teacher, SHORT, ["flow", "ve"])
    conditioning, noise = initial_batch(tiny_teacher, SHORT)
    model = Guided(tiny_teacher, tiny_teacher.encode_text([""]), SHORT.guidance)
    with torch.no_grad():
        expected = tiny_teacher.decode(sample_heun(model, conditioning, noise, 3, "flow"))
    assert torch.equal(images[0], expected)
    rmse = float((images[0] - images[1]).square().mean().sqrt())
    assert table.splitlines()[0].endswith("3 steps, 12 NFE an image")
    assert table.splitlines()[2].split()[:3] == ["flow,", "ve", f"{rmse:.4f}"]


def test_formulations_agree_for_the_shipped_teacher() -> None:
    options = TextToImageOptions(("a red teapot",), count=1, guidance=2.0)
    images, _ = compare_formulations(load_latent_diffusion("shapes64"), options, ["vp", "ve", "flow"])
    assert float(torch.pdist(torch.cat(images).flatten(1)).max() / images[0].numel() ** 0.5) < 0.03  # RMSE


def test_sample_script_takes_images_adapters_and_comparisons(
    tiny_teacher: LatentDiffusionTeacher, tiny_teacher_folder: Path, image_folder: Path, tmp_path: Path
) -> None:
    save_adapter(tmp_path / "a", make_adapter(tiny_teacher), "silhouette", {})
    arguments = [f"teacher={tiny_teacher_folder}", PROMPT, "count=1", "steps=2", "guidance=2"]
    control = f"{{adapter: {tmp_path / 'a'}, image: {image_folder / 'left.png'}}}"
    script("sample", *arguments, f"controls=[{control}]", f"output={tmp_path / 'one'}")
    script("sample", *arguments, f"output={tmp_path / 'two'}")
    one, two = (np.asarray(Image.open(tmp_path / name / "samples.png")) for name in ("one", "two"))
    assert np.array_equal(one, two)  # an untrained adapter has no effect
    model = Guided(tiny_teacher, tiny_teacher.encode_text([""]), 2.0)
    cond, noise = tiny_teacher.encode_text([PROMPT]), first_noise(tiny_teacher)
    latents = sample_ode(model, tiny_teacher.scheduler, cond, noise, 2)
    with torch.no_grad():
        image = tiny_teacher.decode(latents)[0].permute(1, 2, 0).numpy()
    assert np.abs(image * 255 - two).max() <= 1.5

    output = f"output={tmp_path / 'three'}"
    table = script("sample", *arguments, "compare_samplers=[ddim, ddpm:3]", output)
    assert "ms an image" in table and "ddpm           3" in table
    assert Image.open(tmp_path / "three" / "samples.png").size == (64, 130)
    table = script("sample", *arguments, "formulations=[vp, ve, flow]", output)
    assert "vp, flow" in table
    assert Image.open(tmp_path / "three" / "samples.png").size == (64, 196)

    assert "cannot be read as an image" in script("sample", *arguments, f"image={__file__}", code=2)
    error = script("sample", *arguments[:3], "steps=2000", code=2)
    assert "steps is 2000: expected 1 to 1000" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask": "m.png"}, "give image= too"),
        ({"strength": 0.0}, "strength is 0.0"),
        ({"image": "i.png", "strength": 0.01}, "at least one step"),
        ({"weights": (1.0, 2.0)}, "2 weights for 1 prompts"),
        ({"interpolate": 3}, "at least 2 prompts"),
        ({"candidates": 2, "sweep": (1.0,)}, "leave weights"),
        ({"formulations": ("vp",), "sweep": (1.0,)}, "sweep: not available with formulations"),
        ({"formulations": ("vp",), "candidates": 2}, "candidates: not available with formulations"),
        ({"compare_samplers": ("ddim", "heun")}, "compare_samplers has 'heun'"),
        ({"resolution": 128, "student": "shapes64"}, "resolution: a student generates"),
        ({"resolution": 128, "controls": (ControlOptions("depth", "a.png"),)}, "adapters read images of"),
        ({"student": "shapes64", "formulations": ("vp",)}, "formulations: a student generates"),
    ],
    ids=str,
)
def test_invalid_options(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        SampleOptions(prompts=(PROMPT,), **arguments)  # type: ignore[arg-type]


def test_cameras_give_one_image_each_of_one_object(
    multi_view_teacher_folder: Path, tiny_teacher: LatentDiffusionTeacher
) -> None:
    teacher = load_latent_diffusion(str(multi_view_teacher_folder))
    options = TextToImageOptions(("a red cube", "a blue cube"), azimuths=(0.0, 90.0, 180.0), steps=2)
    rows, noise = initial_batch(teacher, options)
    assert len(rows) == len(noise) == 6 and rows.views == 3
    expected = torch.tensor([0, torch.pi / 2, torch.pi]).repeat(2)
    torch.testing.assert_close(rows.extras[POSE][:, 0], expected)
    torch.testing.assert_close(
        rows.extras[POSE][:, 1:].unique(dim=0), torch.tensor([[0.349066, 3.0, 0.0, 0.0]])
    )
    assert initial_batch(teacher, replace(options, multi_view=False))[0].views == 1
    assert text_to_image(teacher, options).images.shape[0] == 6

    with pytest.raises(UserError, match="knows no cameras"):
        initial_batch(tiny_teacher, options)
    with pytest.raises(UserError, match="elevation 95"):
        replace(options, elevation=95.0)
    with pytest.raises(UserError, match="leave candidates"):
        replace(options, candidates=2)
