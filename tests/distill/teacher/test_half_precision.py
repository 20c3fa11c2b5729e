"""A teacher in half precision: float32 at every border, float32 in all that is trained beside it."""

from pathlib import Path
from typing import Literal

import pytest
import torch
from diffusers import AutoencoderKL
from precision_checks import HALF, tensors_of
from torch import Tensor

from distill.core.teacher import Denoiser
from distill.data.folders import CaptionedImages
from distill.data.latents import cache_latents
from distill.objectives.critic import Critic
from distill.objectives.options import CriticOptions
from distill.one_step.folder import load_student, save_student
from distill.one_step.student import Student, StudentOptions
from distill.teacher import pipeline
from distill.teacher.folder import original_parts
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion

PROMPTS = ["a red cube", "a blue sphere"]
TIMES = torch.tensor([20, 700])


@pytest.fixture(params=HALF, ids=["bfloat16", "float16"])
def teacher(request: pytest.FixtureRequest, tiny_teacher_folder: Path) -> LatentDiffusionTeacher:
    """The tiny teacher with weights of half precision."""
    return load_latent_diffusion(str(tiny_teacher_folder), dtype=request.param)


def images() -> Tensor:
    return torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(3))


def latents(teacher: LatentDiffusionTeacher, seed: int = 4) -> Tensor:
    return torch.randn(2, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))


def test_every_output_is_float32_and_near_the_float32_teachers(
    teacher: LatentDiffusionTeacher, tiny_teacher: LatentDiffusionTeacher
) -> None:
    """The whole surface of a teacher, each part fed with what the float32 one gives."""
    assert teacher.precision.dtype in HALF
    assert {p.dtype for p in teacher.unet.parameters()} == {teacher.precision.dtype}
    noisy, text = latents(teacher), tiny_teacher.encode_text(PROMPTS)

    def outputs(model: LatentDiffusionTeacher) -> dict[str, Tensor]:
        prediction = model.predict(noisy, TIMES, text)
        with model.denoiser.capture_mid_block() as features:
            loss = model.denoising_loss(latents(model, 5), noisy, TIMES, text)
        return {
            "embedding": model.encode_text(PROMPTS).embedding,
            "latents": model.encode_images(images()),
            "images": model.decode(noisy),
            "reconstructions": model.decode(model.encode_images(images())),
            "x0": prediction.x0,
            "eps": prediction.eps,
            "v": prediction.v,
            "loss": loss,
            "captured": features[0],
            "mid block": model.denoiser.mid_block_features(noisy, TIMES, text),
        }

    for (name, half), single in zip(outputs(teacher).items(), outputs(tiny_teacher).values(), strict=True):
        assert half.dtype == torch.float32, name
        error = (half - single).square().mean().sqrt() / single.square().mean().sqrt()
        assert 0 < error < 0.05, (name, float(error))


@pytest.mark.parametrize("part", ["encode_images", "decode", "predict"])
def test_gradients_are_float32(teacher: LatentDiffusionTeacher, part: str) -> None:
    value = (images() if part == "encode_images" else latents(teacher)).requires_grad_()
    if part == "predict":
        output = teacher.predict(value, TIMES, teacher.encode_text(PROMPTS)).x0
    else:
        output = getattr(teacher, part)(value)
    output.square().mean().backward()
    assert value.grad is not None and value.grad.dtype == torch.float32
    assert value.grad.isfinite().all() and value.grad.abs().max() > 0


def test_cached_latents_are_float32(teacher: LatentDiffusionTeacher) -> None:
    data = CaptionedImages((images() * 255).byte(), [{"text": prompt} for prompt in PROMPTS])
    conditioning = teacher.encode_text([*PROMPTS, ""])
    cache = cache_latents(teacher.encode_images, data, PROMPTS, conditioning)
    assert cache.latents.dtype == cache.conditioning.embedding.dtype == torch.float32


def trainable(kind: str, teacher: LatentDiffusionTeacher) -> list[torch.nn.Parameter]:
    if kind == "critic with cameras":
        return Critic(teacher, CriticOptions(camera=True), camera_dim=12).parameters()
    denoiser: Denoiser = {
        "copy": teacher.trainable_copy,
        "lora": lambda: teacher.denoiser.with_lora(2),
        "student": lambda: Student.from_teacher(teacher, StudentOptions()).denoiser,
    }[kind]()
    return denoiser.trainable_parameters()


@pytest.mark.parametrize("kind", ["copy", "lora", "student", "critic with cameras"])
def test_nothing_trained_is_in_half_precision(teacher: LatentDiffusionTeacher, kind: str) -> None:
    parameters = trainable(kind, teacher)
    assert parameters and {parameter.dtype for parameter in parameters} == {torch.float32}
    frozen = [p for p in teacher.unet.parameters() if not any(p is each for each in parameters)]
    assert {p.dtype for p in frozen} == {teacher.precision.dtype}


KINDS: tuple[Literal["lora", "copy"], ...] = ("lora", "copy")


@pytest.mark.parametrize("kind", KINDS)
def test_a_critic_keeps_updates_that_half_precision_would_round_away(
    teacher: LatentDiffusionTeacher, kind: Literal["lora", "copy"]
) -> None:
    """Its weights, and Adam's moments, are float32 after a training step: steps of 1e-6 are not lost."""
    critic = Critic(teacher, CriticOptions(kind, camera=True, learning_rate=1e-6), camera_dim=12)
    text = teacher.encode_text(PROMPTS).with_extras(camera=torch.randn(2, 12))
    before = [parameter.detach().clone() for parameter in critic.parameters()]
    scaler = teacher.precision.scaler()
    loss = critic.train_on(latents(teacher), text, torch.Generator().manual_seed(0), scaler)
    assert loss.dtype == torch.float32 and loss.isfinite()
    changed = [not torch.equal(a, b) for a, b in zip(before, critic.parameters(), strict=True)]
    # A LoRA's first factors have no gradient while the second ones are zero.
    assert sum(changed) > 0.45 * len(changed)
    state = tensors_of(critic.state_dict())
    assert {value.dtype for value in state.values()} == {torch.float32}
    prediction = critic.predict(latents(teacher), TIMES, text)
    assert prediction.x0.dtype == prediction.eps.dtype == torch.float32


def test_a_critic_computes_in_the_teachers_precision(teacher: LatentDiffusionTeacher) -> None:
    critic = Critic(teacher, CriticOptions("copy"))
    dtypes: list[torch.dtype] = []
    critic.denoiser.network.conv_in.register_forward_hook(lambda *call: dtypes.append(call[-1].dtype))
    critic.predict(latents(teacher), TIMES, teacher.encode_text(PROMPTS))
    critic.train_on(latents(teacher), teacher.encode_text(PROMPTS), torch.Generator())
    assert set(dtypes) == {teacher.precision.dtype}


def test_gradient_checkpointing_changes_no_gradient(tiny_teacher: LatentDiffusionTeacher) -> None:
    """Of the encoder and decoder of images, and of a denoiser in training."""
    text = tiny_teacher.encode_text(PROMPTS)

    def gradients() -> list[Tensor]:
        pixels, values = images().requires_grad_(), latents(tiny_teacher).requires_grad_()
        tiny_teacher.encode_images(pixels).square().sum().backward()
        tiny_teacher.decode(values).square().sum().backward()
        copied = tiny_teacher.trainable_copy()
        copied.denoising_loss(latents(tiny_teacher, 5), values.detach(), TIMES, text).backward()
        parameters = [p.grad for p in copied.trainable_parameters() if p.grad is not None]
        assert pixels.grad is not None and values.grad is not None
        return [pixels.grad, values.grad, *parameters]

    before = gradients()
    tiny_teacher.enable_gradient_checkpointing()
    assert tiny_teacher.vae.is_gradient_checkpointing and tiny_teacher.unet.is_gradient_checkpointing
    for one, other in zip(before, gradients(), strict=True):
        assert torch.equal(one, other)


def test_text_embeddings_are_cached_up_to_a_size(
    tiny_teacher: LatentDiffusionTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    colours = ("red", "blue", "green", "yellow", "purple")
    prompts = [f"a {colour} cube" for colour in colours]
    alone = [tiny_teacher.encode_text([prompt]).embedding for prompt in prompts]
    monkeypatch.setattr(pipeline, "TEXT_CACHE_BYTES", 2 * alone[0].nbytes)
    together = tiny_teacher.encode_text(prompts).embedding
    torch.testing.assert_close(together, torch.cat(alone))
    assert list(tiny_teacher._conditionings) == prompts[-2:]
    assert torch.equal(tiny_teacher.encode_text(prompts[:1]).embedding, alone[0])


def test_a_students_folder_has_the_teachers_vae_bit_for_bit(
    teacher: LatentDiffusionTeacher, tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    save_student(tmp_path / "student", Student.from_teacher(teacher, StudentOptions()), teacher)
    saved = load_student(tmp_path / "student")[1]
    for part, original in ((saved.vae, tiny_teacher.vae), (saved.text_encoder, tiny_teacher.text_encoder)):
        weights, expected = part.state_dict(), original.state_dict()
        assert weights.keys() == expected.keys()
        assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


def test_weights_that_fp16_would_round_stay_float32(
    tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    """As those of Stable Diffusion's VAE."""
    with torch.no_grad():
        tiny_teacher.vae.post_quant_conv.bias.fill_(1 / 3)
    save_student(tmp_path / "student", Student.from_teacher(tiny_teacher, StudentOptions()), tiny_teacher)
    vae = AutoencoderKL.from_pretrained(tmp_path / "student" / "vae", dtype=torch.float32)
    assert torch.equal(vae.post_quant_conv.bias, tiny_teacher.vae.post_quant_conv.bias)


def test_a_teacher_without_a_folder_gives_its_own_parts(teacher: LatentDiffusionTeacher) -> None:
    teacher.name_or_path = ""
    _, vae = original_parts(teacher)
    assert vae is not teacher.vae and vae.dtype == teacher.precision.dtype
