"""Teachers of other families than Stable Diffusion 1.x and 2.x: stock diffusers' images, losses, students."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from command_line import ROOT
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    FluxControlNetPipeline,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionXLControlNetPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from safetensors.torch import load_file
from scene_fixtures import OPTIONS, SDS, SMALL, run_options
from tiny_pipelines import MAKERS, clip_tokenizer, digits, make, text_config
from torch import Tensor
from transformers import CLIPTextModel

from distill.apps.text_to_image import TextToImageOptions, text_to_image
from distill.control.adapter import controlled, load_adapter, make_adapter, save_adapter
from distill.control.network import AdapterNetwork, Control
from distill.control.train import AdapterOptions, AdapterTrainer
from distill.core.conditioning import Conditioning
from distill.core.flow_scheduler import ode_scheduler, parameterisation
from distill.core.noise import FlowSchedule, NoiseSchedule
from distill.core.sampling import Img2ImgInit, sample_ode
from distill.core.score import Guided
from distill.core.teacher import Teacher
from distill.data.latents import LatentCache
from distill.one_step.folder import load_student
from distill.one_step.methods.base import MethodOptions
from distill.one_step.recipe import OneStepRecipe, run_one_step
from distill.one_step.trainer import OneStepOptions
from distill.runtime.config import build
from distill.runtime.errors import UserError
from distill.runtime.run import Run
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.load import load_teacher, require_latent, require_pipeline
from distill.teacher.pipeline import LatentTeacher
from distill.teacher.unet import UnetOptions, make_scheduler, train_unet
from distill.teacher.vae import VaeOptions, build_vae
from sds3d.text_to_3d.trainer import TextTo3d

PROMPT = {name: "a red cube" for name in MAKERS} | {"digits": "3"}
NULL = {"digits": 10}  # the class without a label


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("families")
    return {name: make(name, root / name) for name in MAKERS}


def source(folder: Path, **options: Any) -> str:
    """A YAML file that names a folder with options."""
    path = folder.parent / f"{folder.name}-{len(list(folder.parent.glob('*.yaml')))}.yaml"
    values = {"_target_": "distill.teacher.families.PipelineSource", "name_or_path": str(folder), **options}
    path.write_text(yaml.safe_dump(values))
    return str(path)


def data_of(name: str, folder: Path) -> Path:
    """A captioned folder of eight images, in the words of a family."""
    for split in ("train", "validation"):
        (folder / split).mkdir(parents=True)
        rows = []
        for index in range(8):
            image = np.random.default_rng(index).integers(0, 255, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(image).save(folder / split / f"{index}.png")
            rows.append(json.dumps({"file_name": f"{index}.png", "text": PROMPT[name]}))
        (folder / split / "metadata.jsonl").write_text("\n".join(rows))
    return folder


def teacher_name(folders: dict[str, Path], name: str) -> str:
    """What `teacher=` would be, at a size that is quick."""
    options = {"flux": {"resolution": 32}, "digits": {"null_class": 10}}.get(name)
    return str(folders[name]) if options is None else source(folders[name], **options)


def load(folders: dict[str, Path], name: str) -> Teacher:
    """A tiny teacher of a family."""
    return load_teacher(teacher_name(folders, name))


def noise(teacher: Teacher, count: int = 2) -> Tensor:
    return torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(1))


# The images of stock diffusers


def stock_images(name: str, folder: Path, latents: Tensor, steps: int, guidance: float) -> Tensor:
    """What the family's own pipeline draws (B, 3, H, W) from given noise."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": steps, "output_type": "np"}
    if name in ("sdxl", "deepfloyd"):
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
    if name == "sdxl":
        pipeline.scheduler.register_to_config(clip_sample=False)
    if name == "deepfloyd":  # else the pipeline leaves the predicted variance to the scheduler
        pipeline.scheduler.register_to_config(variance_type="fixed_small")
    prompts = [PROMPT[name]] * len(latents)
    if name == "flux":
        tokens = latents.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
        options |= {
            "height": 32,
            "width": 32,
            "true_cfg_scale": guidance,
            "negative_prompt": [""] * len(latents),
        }
        images = pipeline(prompts, latents=tokens.flatten(3).flatten(1, 2), **options).images
    elif name == "deepfloyd":
        pipeline.prepare_intermediate_images = lambda *arguments: latents
        images = pipeline(prompts, guidance_scale=guidance, **options).images
    else:
        images = pipeline(prompts, latents=latents, guidance_scale=guidance, **options).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
@pytest.mark.parametrize("name", ["sdxl", "sd3", "flux", "deepfloyd"])
def test_images_of_the_stock_pipeline(name: str, guidance: float, folders: dict[str, Path]) -> None:
    teacher = load(folders, name)
    x_t = noise(teacher)
    expected = stock_images(name, folders[name], x_t, 4, guidance)
    model = Guided(teacher, teacher.encode_text([""]), guidance)
    conditioning = teacher.encode_text([PROMPT[name]]).expand(2)
    images = teacher.decode(sample_ode(model, teacher.scheduler, conditioning, x_t, 4))
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-4)
    assert (images[0] - images[1]).abs().max() > 0.01


def test_images_of_a_u_net_with_classes(folders: dict[str, Path]) -> None:
    """`DDIMPipeline` takes no class: its U-Net and scheduler in their own loop."""
    teacher, pipeline = load(folders, "digits"), DiffusionPipeline.from_pretrained(folders["digits"])
    x = x_t = noise(teacher)
    pipeline.scheduler.set_timesteps(5)
    for t in pipeline.scheduler.timesteps:
        output = pipeline.unet(x, t, class_labels=torch.tensor([3, 7])).sample
        x = pipeline.scheduler.step(output, t, x).prev_sample
    images = teacher.decode(sample_ode(teacher, teacher.scheduler, teacher.encode_text(["3", "7"]), x_t, 5))
    torch.testing.assert_close(images, (x / 2 + 0.5).clamp(0, 1).expand(-1, 3, -1, -1), rtol=0, atol=1e-5)


def test_a_flow_pipeline_draws_from_noised_latents_as_stock(folders: dict[str, Path]) -> None:
    """SDEdit: the noise of the first remaining step, and the steps from there on."""
    from diffusers import StableDiffusion3Img2ImgPipeline

    teacher = load(folders, "sd3")
    pipeline = StableDiffusion3Img2ImgPipeline.from_pretrained(folders["sd3"])
    pipeline.set_progress_bar_config(disable=True)
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(2))
    clean = teacher.encode_images(image)
    pipeline.prepare_latents = lambda image, timestep, *rest: pipeline.scheduler.scale_noise(
        clean, timestep, noise(teacher, 1)
    )
    options = {"strength": 0.5, "num_inference_steps": 6, "guidance_scale": 1.0, "output_type": "np"}
    expected = torch.from_numpy(pipeline(PROMPT["sd3"], image=image, **options).images).permute(0, 3, 1, 2)
    conditioning = teacher.encode_text([PROMPT["sd3"]])
    latents = sample_ode(
        teacher, teacher.scheduler, conditioning, noise(teacher, 1), 6, init=Img2ImgInit(clean, 0.5)
    )
    torch.testing.assert_close(teacher.decode(latents), expected, rtol=0, atol=2e-4)


# Schedules


def test_flow_schedule_is_the_linear_path_at_unit_variance() -> None:
    schedule = FlowSchedule(1000)
    t = torch.tensor([0, 249, 999])
    alpha, sigma = schedule.alpha(t).flatten().double(), schedule.sigma(t).flatten().double()
    torch.testing.assert_close(alpha.square() + sigma.square(), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(sigma / (alpha + sigma), torch.tensor([0.001, 0.25, 1.0]).double())
    for name in ("alpha", "sigma"):
        exact, fractional = (vars(FlowSchedule)[name](schedule, times) for times in (t, t.float()))
        torch.testing.assert_close(exact, fractional)
    between = schedule.sigma(torch.tensor([249.5])) / schedule.alpha(torch.tensor([249.5]))
    assert float(between) == pytest.approx(0.2505 / 0.7495)
    assert schedule.time_of(torch.tensor(250.5)).item() == 249.5
    assert NoiseSchedule(torch.tensor([0.9, 0.5])).time_of(torch.tensor(0.6)).item() == 1


def test_velocity_of_a_flow_network_is_its_own_target(folders: dict[str, Path]) -> None:
    """eps - x0 at (1 - s) x0 + s eps and timestep T s: the loss is 0 where the network returns it."""
    teacher = load(folders, "sd3")
    clean, eps = noise(teacher), torch.randn(2, *teacher.latent_shape)
    t = torch.tensor([99, 799])
    x_t = teacher.schedule.add_noise(clean, eps, t)
    x, timestep = teacher.denoiser.network_input(x_t, t)
    s = torch.tensor([0.1, 0.8])[:, None, None, None]
    torch.testing.assert_close(x, (1 - s) * clean + s * eps, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(timestep, torch.tensor([100.0, 800.0]))
    prediction = teacher.predict(x_t, t, teacher.encode_text([PROMPT["sd3"]]).expand(2))
    output = teacher.network(
        x,
        encoder_hidden_states=teacher.encode_text([PROMPT["sd3"]]).embedding.expand(2, -1, -1),
        pooled_projections=teacher.encode_text([PROMPT["sd3"]]).extras["pooled"].expand(2, -1),
        timestep=timestep,
    ).sample
    torch.testing.assert_close(prediction.flow, output, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(prediction.x_t, x_t)


# Objectives, students, critics


@pytest.mark.parametrize("name", MAKERS)
def test_score_distillation_to_a_finite_scene(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    teacher = load(folders, name)
    options = replace(OPTIONS, prompt=PROMPT[name], view_words=False)
    task = TextTo3d(Run(run_options(tmp_path, 2), {}, "t"), teacher, SMALL, SDS, options)
    before = {key: value.clone() for key, value in task.scene.state_dict().items()}
    scene = task.train()
    changed = [key for key, value in scene.state_dict().items() if not torch.equal(value, before[key])]
    assert changed and all(value.isfinite().all() for value in scene.state_dict().values())


@pytest.mark.parametrize("name", MAKERS)
def test_bottleneck_and_gradients(name: str, folders: dict[str, Path]) -> None:
    """What discriminators and students need: features of the middle, the same alone and captured; a copy."""
    teacher = load(folders, name)
    x_t, t = noise(teacher), torch.tensor([300, 700])
    conditioning = teacher.encode_text([PROMPT[name]]).expand(2)
    alone = teacher.denoiser.mid_block_features(x_t, t, conditioning)
    with teacher.denoiser.capture_mid_block() as captured:
        teacher.predict(x_t, t, conditioning)
    assert alone.ndim == 4 and len(alone) == 2 and torch.equal(alone, captured[0])
    copy = teacher.trainable_copy()
    assert torch.equal(copy.predict(x_t, t, conditioning).x0, teacher.predict(x_t, t, conditioning).x0)
    copy.denoising_loss(noise(teacher), torch.randn_like(x_t), t, conditioning).backward()
    gradients = [parameter.grad for parameter in copy.trainable_parameters() if parameter.grad is not None]
    assert gradients and not any(value.requires_grad for value in teacher.network.parameters())


@pytest.mark.parametrize(
    ("name", "critic"),
    [*((name, "copy") for name in MAKERS), ("sdxl", "lora"), ("sd3", "lora"), ("flux", "lora")],
)
def test_two_cycles_of_dmd2(name: str, critic: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """With its GAN on the critic's bottleneck; the student's weights are written."""
    values = yaml.safe_load((ROOT / "configs" / "method" / "dmd2.yaml").read_text())
    values["objective"]["critic"]["kind"] = critic
    options = {"batch": 2, "monitor": {"every": 0}}
    teacher = load(folders, name)
    recipe = OneStepRecipe(
        teacher=teacher_name(folders, name),
        data=str(data_of(name, tmp_path / "data")),
        judge=None,
        run=run_options(tmp_path / "run", 2),
        method=build(MethodOptions, values, "dmd2"),
        distill=build(OneStepOptions, options),
    )
    run_one_step(recipe)
    student = load_file(tmp_path / "run" / "student" / "student.safetensors")
    before = teacher.network.state_dict()
    assert any(not torch.equal(value, before[key]) for key, value in student.items())
    assert all(value.isfinite().all() for value in student.values())
    again, parts = load_student(tmp_path / "run" / "student", teacher=teacher)
    assert parts is teacher and len(again.timesteps) == 1
    loaded = again.denoiser.network.state_dict()  # type: ignore[attr-defined]
    assert all(torch.equal(loaded[key].float(), value.float()) for key, value in student.items())


# Adapters


def random_adapter(teacher: LatentTeacher, folder: Path) -> AdapterNetwork:
    """An adapter of random weights, saved and loaded."""
    adapter = make_adapter(teacher)
    with torch.no_grad():  # zero convolutions would hide it
        for parameter in adapter.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    save_adapter(folder, adapter, "edges", {}, teacher.identity)
    loaded, condition = load_adapter(folder, teacher)
    assert condition == "edges"
    return loaded


@pytest.mark.parametrize(
    ("name", "guidance", "pooled"),
    [("sdxl", 3.0, True), ("sd3", 3.0, True), ("sd3", 1.0, False), ("flux", 1.0, True)],
)
def test_an_adapter_draws_as_the_stock_pipeline(
    name: str,
    guidance: float,
    pooled: bool,
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The stock pipelines of transformers draw the condition's latents at random: here their mean."""
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mean)
    teacher = require_latent(load(folders, name))
    image = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    adapter, x_t = random_adapter(teacher, tmp_path / "adapter"), noise(teacher, 1)
    if not pooled:  # as published adapters of Stable Diffusion 3, whose latents are not shifted either
        adapter.register_to_config(force_zeros_for_pooled_projection=True)
    expected = stock_control(name, folders[name], adapter, image, x_t, guidance)

    both = controlled(teacher, [Control(adapter, image, 0.7)])
    model = Guided(both, teacher.encode_text([""]), guidance)
    conditioning = teacher.encode_text([PROMPT[name]])
    images = teacher.decode(sample_ode(model, teacher.scheduler, conditioning, x_t, 4))
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-4)
    without = teacher.decode(
        sample_ode(Guided(teacher, model.uncond, guidance), teacher.scheduler, conditioning, x_t, 4)
    )
    assert (images - without).abs().max() > 0.005


def stock_control(
    name: str, folder: Path, adapter: AdapterNetwork, image: Tensor, x_t: Tensor, guidance: float
) -> Tensor:
    """What the family's own pipeline of adapters draws at a weight of 0.7."""
    parts = DiffusionPipeline.from_pretrained(folder).components
    array = image.permute(0, 2, 3, 1).numpy()  # tensors would not be brought to [-1, 1]
    options: dict[str, Any] = {"num_inference_steps": 4, "output_type": "np"}
    options |= {"controlnet_conditioning_scale": 0.7, "latents": x_t}
    if name == "sdxl":
        pipeline = StableDiffusionXLControlNetPipeline(**parts, controlnet=adapter, add_watermarker=False)
        pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config)
        pipeline.scheduler.register_to_config(clip_sample=False)
        options |= {"image": image, "guidance_scale": guidance}
    elif name == "sd3":
        pipeline = StableDiffusion3ControlNetPipeline(**parts, controlnet=adapter)
        options |= {"control_image": array, "guidance_scale": guidance}
    else:
        pipeline = FluxControlNetPipeline(**parts, controlnet=adapter)
        tokens = x_t.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 1, 3, 5)
        options |= {"latents": tokens.flatten(3).flatten(1, 2), "control_image": array}
        options |= {"guidance_scale": 3.5, "height": 32, "width": 32}
    pipeline.set_progress_bar_config(disable=True)
    return torch.from_numpy(pipeline(PROMPT[name], **options).images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("name", ["sd3", "flux"])
def test_an_adapter_of_a_transformer_learns(name: str, folders: dict[str, Path], tmp_path: Path) -> None:
    """Untrained it changes nothing; updates lower the loss of its batch, and leave the teacher as it is."""
    teacher = require_latent(load(folders, name))
    before = {key: value.clone() for key, value in teacher.network.state_dict().items()}
    config = dict(teacher.network.config)
    images = torch.rand(8, 3, 32, 32, generator=torch.Generator().manual_seed(3))
    conditioning = Conditioning.cat([teacher.encode_text([PROMPT[name]]), teacher.encode_text([""])])
    cache = LatentCache(teacher.encode_images(images), conditioning, torch.zeros(8, dtype=torch.long))
    options = AdapterOptions(batch=4, learning_rate=1e-2)
    run = Run(run_options(tmp_path / "run", 12), {}, "adapter")
    trainer = AdapterTrainer(run, teacher, cache, (images * 255).byte(), "edges", options)
    batch = next(trainer.batches(0))
    plain = teacher.denoising_loss(batch.latents, batch.noise, batch.t, batch.conditioning)
    assert torch.equal(trainer.loss(batch), plain)
    trainer.train()
    assert float(trainer.loss(batch)) < 0.98 * float(plain)
    assert all(torch.equal(value, before[key]) for key, value in teacher.network.state_dict().items())
    assert dict(teacher.network.config) == config


def test_an_adapter_of_another_family(folders: dict[str, Path], tmp_path: Path) -> None:
    sd3, flux = (require_latent(load(folders, name)) for name in ("sd3", "flux"))
    control = Control(make_adapter(sd3), torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="the adapter belongs to another teacher"):
        controlled(flux, [control])
    pixels = Control(make_adapter(require_pipeline(load(folders, "digits"))), torch.zeros(1, 3, 32, 32))
    with pytest.raises(UserError, match="the adapter belongs to another teacher"):
        controlled(flux, [pixels])


# Bad input


def edited(folder: Path, target: Path, file: str, **values: Any) -> Path:
    """A copy of a pipeline's folder with other values in one of its JSON files."""
    shutil.copytree(folder, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
    return target


def test_an_unknown_class_lists_the_known_ones(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = edited(folders["sd3"], tmp_path / "audio", "model_index.json", _class_name="AudioLDMPipeline")
    with pytest.raises(UserError, match="is a AudioLDMPipeline: expected one of StableDiffusionPipeline, "):
        load_teacher(str(folder))


def test_missing_parts_and_parts_of_other_models_raise(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(folders["sdxl"], tmp_path / "partial")
    shutil.rmtree(folder / "text_encoder_2")
    with pytest.raises(UserError, match="partial lacks text_encoder_2: copy"):
        load_teacher(str(folder))
    other = shutil.copytree(folders["sdxl"], tmp_path / "other")
    text_encoder = CLIPTextModel(text_config(clip_tokenizer(), 32, 32))
    text_encoder.save_pretrained(other / "text_encoder")
    with pytest.raises(
        UserError, match="have 64 numbers, and its UNet2DConditionModel reads 56: its parts are"
    ):
        load_teacher(str(other))
    damaged = shutil.copytree(folders["sd3"], tmp_path / "damaged")
    (damaged / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"cut short")
    with pytest.raises(UserError, match="damaged' cannot be loaded"):
        load_teacher(str(damaged))


def test_options_that_a_family_has_not_raise(folders: dict[str, Path], tmp_path: Path) -> None:
    for name, options, message in (
        ("sd3", {"null_class": 3}, "null_class is 3, but a StableDiffusion3Pipeline has no classes"),
        ("digits", {"resolution": 64}, "resolution is 64, but a DDIMPipeline has its own"),
        ("flux", {"resolution": 30}, "resolution is 30: expected a multiple of 4"),
        ("digits", {"null_class": 11}, "null_class is 11: expected a class from 0 to 10"),
    ):
        with pytest.raises(UserError, match=message):
            load_teacher(source(folders[name], **options))


def test_prompts_of_a_network_with_classes(folders: dict[str, Path], tmp_path: Path) -> None:
    teacher = load_teacher(str(folders["digits"]))
    assert teacher.encode_text(["3", "10"]).embedding.flatten().tolist() == [3.0, 10.0]
    for prompt in ("11", "a red cube", "-1"):
        with pytest.raises(UserError, match="takes numbers of classes: give one from 0 to 10"):
            teacher.encode_text([prompt])
    with pytest.raises(UserError, match="has 11 classes, and which one stands for no label is not known"):
        teacher.encode_text([""])
    digits(tmp_path / "none", classes=None)
    unconditional = load_teacher(str(tmp_path / "none"))
    assert unconditional.encode_text(["", "0"]).embedding.flatten().tolist() == [0.0, 0.0]
    x_t, t = noise(unconditional, 1), torch.tensor([5])
    assert unconditional.predict(x_t, t, unconditional.encode_text(["0"])).x0.isfinite().all()


# A flow teacher of our own


def test_a_trained_flow_is_a_teacher_like_any_other(tmp_path: Path) -> None:
    """Its folder names the stock scheduler; a U-Net trained as a flow learns a constant image."""
    options = UnetOptions(channels=(16,), heads=2, prediction="flow_prediction", learning_rate=3e-3, batch=16)
    scheduler = ode_scheduler(make_scheduler(options))
    image = torch.linspace(-1, 1, 4 * 8 * 8).view(1, 4, 8, 8)
    conditioning = Conditioning(torch.zeros(2, 3, 16))
    cache = LatentCache(image.expand(16, -1, -1, -1).contiguous(), conditioning, torch.zeros(16).long())
    vae = build_vae(VaeOptions(channels=(8, 8, 16, 16), latent_channels=4), 64)
    run = Run(run_options(tmp_path / "run", 150), {}, "flow")
    denoiser = UNetDenoiser(train_unet(run, cache, vae, options), *parameterisation(scheduler))
    noisy = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    samples = sample_ode(denoiser, scheduler, conditioning.select(slice(0, 1)).expand(4), noisy, 10)
    assert (samples - image).square().mean() < 0.1 * (noisy - image).square().mean()
    assert type(make_scheduler(options)) is FlowMatchEulerDiscreteScheduler


def test_samplers_that_a_flow_has_not(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="sampler is dpm, but .* is a flow: give sampler=ddim"):
        text_to_image(load(folders, "sd3"), TextToImageOptions((PROMPT["sd3"],), sampler="dpm"))
