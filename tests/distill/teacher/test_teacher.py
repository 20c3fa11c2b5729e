"""The latent-diffusion teacher: its folder, stock Stable Diffusion folders, gradients, and errors."""

from pathlib import Path

import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from stable_diffusion import stock_pipeline
from torch import Tensor

from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.runtime.errors import UserError
from distill.teacher.folder import TeacherParts, load_clip, save_teacher
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from distill.teacher.vae import reconstruct

PROMPT = "a red teapot, front view"


def noise_for(teacher: LatentDiffusionTeacher, count: int = 1) -> Tensor:
    return torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))


def stock_image(pipeline: StableDiffusionPipeline, prompt: str, noise: Tensor) -> Tensor:
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        prompt, latents=noise, guidance_scale=3.0, num_inference_steps=4, output_type="np"
    ).images[0]
    return torch.from_numpy(image).permute(2, 0, 1)[None]


def our_image(teacher: LatentDiffusionTeacher, prompt: str, noise: Tensor) -> Tensor:
    model = Guided(teacher, teacher.encode_text([""]), 3.0)
    with torch.no_grad():
        return teacher.decode(sample_ode(model, teacher.scheduler, teacher.encode_text([prompt]), noise, 4))


def test_the_stock_pipeline_samples_the_same_image(
    tiny_teacher: LatentDiffusionTeacher, tiny_teacher_folder: Path
) -> None:
    pipeline = StableDiffusionPipeline.from_pretrained(
        tiny_teacher_folder, local_files_only=True
    )  # no dtype: as a user would
    noise = noise_for(tiny_teacher)
    ours = our_image(tiny_teacher, PROMPT, noise)
    torch.testing.assert_close(ours, stock_image(pipeline, PROMPT, noise), atol=1e-3, rtol=0)
    assert ours.shape == (1, 3, 64, 64) and float(ours.std()) > 0.01
    assert (
        float((ours - our_image(tiny_teacher, "a blue duck", noise)).abs().max()) > 2e-3
    )  # the comparison can see the prompt


def test_the_folder_holds_what_was_saved(
    tiny_teacher: LatentDiffusionTeacher, tiny_teacher_folder: Path
) -> None:
    assert tiny_teacher.latent_shape == (8, 8, 8) and tiny_teacher.resolution == 64
    assert (
        tiny_teacher.schedule.num_train_timesteps == 1000
        and float(tiny_teacher.schedule.alpha(torch.tensor([999]))) == 0
    )
    assert (
        tiny_teacher.vae.config.scaling_factor == 1.7
        and tiny_teacher.denoiser.prediction_type == "v_prediction"
    )
    assert {path.suffix for path in tiny_teacher_folder.rglob("*") if path.is_file()} <= {
        ".json",
        ".safetensors",
        ".txt",
    }
    clip = load_clip(tiny_teacher_folder)
    ids = tiny_teacher.tokenizer([PROMPT], padding="max_length", return_tensors="pt").input_ids
    with torch.no_grad():
        torch.testing.assert_close(
            clip.text_model(input_ids=ids).last_hidden_state, tiny_teacher.encode_text([PROMPT]).embedding
        )


def test_encoding_differentiates_the_image_and_nothing_else(tiny_teacher: LatentDiffusionTeacher) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    tiny_teacher.encode_images(images)[0].square().sum().backward()
    assert (
        images.grad is not None
        and float(images.grad[0].abs().mean()) > 0
        and float(images.grad[1].abs().max()) == 0
    )
    parts = (tiny_teacher.unet, tiny_teacher.vae, tiny_teacher.text_encoder)
    assert all(p.grad is None and not p.requires_grad for part in parts for p in part.parameters())
    assert not any(part.training for part in parts)


def test_encode_and_decode_are_the_autoencoder(tiny_teacher: LatentDiffusionTeacher) -> None:
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        latents = tiny_teacher.encode_images(images)
        raw = tiny_teacher.vae.encode(images * 2 - 1).latent_dist.mean
        torch.testing.assert_close(latents, 1.7 * raw)
        torch.testing.assert_close(tiny_teacher.decode(latents), reconstruct(tiny_teacher.vae, images))


def test_each_prompt_is_encoded_once(tiny_teacher: LatentDiffusionTeacher) -> None:
    rows: list[int] = []
    tiny_teacher.text_encoder.register_forward_hook(
        lambda module, inputs, output: rows.append(len(output.last_hidden_state))
    )
    first = tiny_teacher.encode_text(["a red cube", "a blue cube", "a red cube", ""]).embedding
    again = tiny_teacher.encode_text(["a blue cube", ""]).embedding
    assert sum(rows) == 3
    assert first[0].equal(first[2]) and again.equal(first[[1, 3]]) and not first[0].equal(first[1])
    tiny_teacher.encode_text(["a green cube"])
    assert sum(rows) == 4


def test_mistaken_prompts_raise(tiny_teacher: LatentDiffusionTeacher) -> None:
    with pytest.raises(UserError, match=r"unknown words 'zebra', 'hat' in 'a zebra hat': .* is a, .*teapot"):
        tiny_teacher.encode_text(["a red cube", "a zebra hat"])
    with pytest.raises(UserError, match="prompt is empty"):
        tiny_teacher.encode_text(["  "])


def test_guidance_is_one_call_a_step(tiny_teacher: LatentDiffusionTeacher) -> None:
    calls = []
    hook = tiny_teacher.unet.register_forward_hook(lambda *_: calls.append(1))
    try:
        with torch.no_grad():
            our_image(tiny_teacher, PROMPT, noise_for(tiny_teacher))
    finally:
        hook.remove()
    assert len(calls) == 4


@pytest.fixture(scope="module", params=[False, True], ids=["sd1", "sd2"])
def stock(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[StableDiffusionPipeline, LatentDiffusionTeacher]:
    with torch.random.fork_rng():
        pipeline = stock_pipeline(request.param)
    folder = tmp_path_factory.mktemp("stock")
    pipeline.save_pretrained(folder)
    return pipeline, load_latent_diffusion(str(folder))


@torch.no_grad()
def test_stable_diffusion_predicts_as_its_unet(
    stock: tuple[StableDiffusionPipeline, LatentDiffusionTeacher],
) -> None:
    pipeline, teacher = stock
    x_t, t = noise_for(teacher, 2), torch.tensor([100, 900])
    conditioning = teacher.encode_text(["a cat", "a zebra in words no closed vocabulary has"])
    ids = pipeline.tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
    torch.testing.assert_close(conditioning.embedding[:1], pipeline.text_encoder(ids)[0])
    raw = pipeline.unet(x_t, t, encoder_hidden_states=conditioning.embedding).sample
    product = pipeline.scheduler.alphas_cumprod[t][:, None, None, None]
    velocity = pipeline.scheduler.config.prediction_type == "v_prediction"
    eps = product.sqrt() * raw + (1 - product).sqrt() * x_t if velocity else raw
    prediction = teacher.predict(x_t, t, conditioning)
    torch.testing.assert_close(prediction.eps, eps, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        prediction.x0, (x_t - (1 - product).sqrt() * eps) / product.sqrt(), atol=1e-4, rtol=1e-4
    )
    uncond = teacher.encode_text([""])
    eps_uncond = teacher.predict(x_t, t, uncond.expand(2)).eps
    guided = Guided(teacher, uncond, 7.5).predict(x_t, t, conditioning).eps
    torch.testing.assert_close(guided, eps_uncond + 7.5 * (eps - eps_uncond), atol=1e-3, rtol=0)
    assert float((guided - eps).abs().max()) > 1e-2


def test_stable_diffusion_samples_as_the_stock_pipeline(
    stock: tuple[StableDiffusionPipeline, LatentDiffusionTeacher],
) -> None:
    pipeline, teacher = stock
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, clip_sample=False)
    noise = noise_for(teacher)
    assert teacher.resolution == 64 and not teacher.scheduler.config.clip_sample
    theirs = stock_image(pipeline, "a cat", noise)
    errors = [
        float((our_image(teacher, prompt, noise) - theirs).abs().mean()) for prompt in ("a cat", "two dogs")
    ]
    assert errors[0] < 1e-4 and errors[1] > 10 * errors[0] and errors[1] > 1e-4


def test_no_clip_in_a_stock_folder(stock: tuple[StableDiffusionPipeline, LatentDiffusionTeacher]) -> None:
    with pytest.raises(UserError, match="has no clip folder"):
        load_clip(stock[1].name_or_path)


@pytest.mark.parametrize("name", ["/no/such/folder", "nobody-here/no-such-model", "no_such_name"])
def test_a_missing_teacher_is_one_sentence(name: str) -> None:
    with pytest.raises(UserError) as caught:
        load_latent_diffusion(name)
    message = str(caught.value)
    assert name in message and "shapes64" in message and "\n" not in message and len(message) < 500
    assert caught.value.__suppress_context__


def test_a_missing_hub_id_says_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As of a preset whose teacher has not been downloaded."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError) as caught:
        load_latent_diffusion("owner/model")
    message = str(caught.value)
    assert (
        str(Path("owner/model").absolute()) in message and str(tmp_path / "models--owner--model") in message
    )
    assert "HF_HUB_OFFLINE" in message and "`hf download owner/model`" in message and "\n" not in message


def test_a_folder_of_something_else_raises(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model_index.json"):
        load_latent_diffusion(str(tmp_path))
    (tmp_path / "model_index.json").write_text("{")
    with pytest.raises(UserError, match="model_index.json is not JSON"):
        load_latent_diffusion(str(tmp_path))


def test_saving_spares_a_foreign_folder(
    tmp_path: Path, tiny_teacher: LatentDiffusionTeacher, tiny_teacher_folder: Path
) -> None:
    clip = load_clip(tiny_teacher_folder)
    parts = TeacherParts(tiny_teacher.tokenizer, ["a"], clip, tiny_teacher.vae)
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something other than a teacher"):
        save_teacher(tmp_path, parts, tiny_teacher.unet, tiny_teacher.scheduler)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    for _ in range(2):  # a teacher is replaced
        save_teacher(tmp_path / "new", parts, tiny_teacher.unet, tiny_teacher.scheduler)
    assert load_latent_diffusion(str(tmp_path / "new")).vocabulary == {"a"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new", "thesis.txt"]


def test_saving_leaves_the_models_in_their_precision(
    tmp_path: Path, tiny_teacher: LatentDiffusionTeacher, tiny_teacher_folder: Path
) -> None:
    clip = load_clip(tiny_teacher_folder)
    parts = TeacherParts(tiny_teacher.tokenizer, ["a"], clip, tiny_teacher.vae)
    save_teacher(tmp_path / "new", parts, tiny_teacher.unet, tiny_teacher.scheduler)
    assert {p.dtype for part in (clip, tiny_teacher.vae, tiny_teacher.unet) for p in part.parameters()} == {
        torch.float32
    }
