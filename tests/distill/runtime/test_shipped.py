"""Shipped weights: the teacher, its student and adapters load by name, are small and follow their prompts."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline

from distill.control.adapter import load_adapter
from distill.evaluation.control import ControlEvaluationOptions, adapter_sampler
from distill.evaluation.directions import angular_error
from distill.evaluation.fidelity import fidelity, means
from distill.evaluation.generate import generate, student_sampler, teacher_sampler
from distill.evaluation.judge import load_judge, predict, read_directions
from distill.evaluation.probe import load_probe
from distill.one_step.folder import load_student, save_student
from distill.runtime.shipped import SHIPPED, WEIGHTS
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from sds3d.evaluation.views.objects import composite, named_objects
from sds3d.scene.cameras import orbit, ring
from sds3d.world.conditions import mesh_condition_images
from sds3d.world.raycast import RayCaster
from sds3d.world.shapes import COLOURS, OBJECTS, make_shape, noun_phrase


@pytest.fixture(scope="module")
def teacher() -> LatentDiffusionTeacher:
    """The one that the shipped student and adapters belong to."""
    return load_latent_diffusion("shapes64")


def test_weights_are_within_the_budget() -> None:
    """No folder above 20 MiB, all together below 60, and no symbolic link: archives may lose them."""
    assert not any(path.is_symlink() for path in WEIGHTS.rglob("*"))
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*")) < 60 * 2**20
    for folder in {WEIGHTS / name for names in SHIPPED.values() for name in names.values()}:
        assert (folder / "README.md").is_file()  # the model card
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 20 * 2**20


def test_teacher_generates_the_colour_of_the_prompt(teacher: LatentDiffusionTeacher) -> None:
    captions = [f"a {colour} sphere" for colour in ("red", "green", "blue") for _ in range(4)]
    images = generate(teacher, captions, teacher_sampler(teacher, 10, 3.0), 12).images
    centre = images[:, :, 24:40, 24:40].mean((2, 3))  # (12, 3): the largest channel is the colour's
    correct = centre.argmax(1).view(3, 4) == torch.arange(3)[:, None]
    assert correct.float().mean() >= 10 / 12


def test_teacher_with_cameras_shows_the_azimuth_that_is_given() -> None:
    """Of objects whose front and back differ, without a view word; read by a judge off renders too."""
    names = [name for name in ("car", "duck", "teapot", "robot") for _ in range(3)]
    azimuths = torch.tensor([0.0, 90.0, 180.0]).repeat(4)
    size = torch.ones(len(names))
    cameras = orbit(azimuths, 20 * size, 3 * size, 35 * size, 64)
    judge, teacher = load_judge("pairs64"), load_latent_diffusion("shapes64")

    views = [named_objects([name])[0].render(camera) for name, camera in zip(names, cameras.split(1))]
    real = angular_error(read_directions(judge, composite(torch.cat(views), 0.7))["azimuth"], azimuths)
    assert (real.abs() < 20).float().mean() > 0.9

    captions = [noun_phrase("red", name) for name in names]
    images = generate(teacher, captions, teacher_sampler(teacher, 12, 3.0, cameras.view_poses()), 12).images
    error = angular_error(read_directions(judge, images)["azimuth"], azimuths)
    assert (error.abs() < 30).float().mean() > 0.8
    assert predict(load_judge("judge64"), images)["object"] == names


def test_vae_reconstructs_an_image(teacher: LatentDiffusionTeacher) -> None:
    image = torch.full((1, 3, 64, 64), 0.8)
    image[:, :, 20:44, 20:44] = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    restored = teacher.decode(teacher.encode_images(image))
    assert (restored - image).square().mean() < 0.01


def test_student_generates_object_and_colour_in_one_step(teacher: LatentDiffusionTeacher) -> None:
    """Every object and colour, by the judge; its VAE and text encoder equal the teacher's, byte for byte."""
    student, parts = load_student("shapes64", teacher=teacher)
    assert len(student.timesteps) == 1
    modules: list[tuple[Any, Any]] = [(parts.vae, teacher.vae), (parts.text_encoder, teacher.text_encoder)]
    for module, expected in modules:
        state = expected.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    labels = [(name, colour) for name in OBJECTS for colour in COLOURS]
    captions = [noun_phrase(colour, name) for name, colour in labels]
    images = generate(parts, captions, student_sampler("student", student), 46).images
    predictions = predict(load_judge("judge64"), images)
    pairs = list(zip(predictions["object"], predictions["colour"], strict=True))
    assert sum(map(tuple.__eq__, pairs, labels)) / len(labels) > 0.9


def test_student_saved_whole_runs_in_a_stock_pipeline(tmp_path: Path) -> None:
    """One step without guidance gives our image of the same noise."""
    student, parts = load_student("shapes64")
    noise = torch.randn(1, *parts.latent_shape, generator=torch.Generator().manual_seed(1))
    prompt = "a red teapot"
    with torch.no_grad():
        ours = parts.decode(student(noise, parts.encode_text([prompt]), torch.Generator()))
    save_student(tmp_path / "student", student, parts)
    stock = StableDiffusionPipeline.from_pretrained(tmp_path / "student", dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    theirs = stock(prompt, latents=noise, num_inference_steps=1, guidance_scale=1, output_type="pt").images
    torch.testing.assert_close(theirs.float(), ours, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["silhouette", "depth"])
def test_adapter_controls_the_view_of_a_mesh(name: str, teacher: LatentDiffusionTeacher) -> None:
    """Captions without a view: samples match the mesh's condition with the adapter and not without it."""
    objects = ("teapot", "car", "rocket", "mug", "torus", "bunny")
    views = ring(7, elevation=30.0)
    casters = [RayCaster(make_shape(key).mesh) for key in objects]
    renders = [mesh_condition_images(caster, name, views)[[i]] for i, caster in enumerate(casters)]
    pictures = torch.cat(renders)
    adapter, condition = load_adapter(name, teacher)
    assert condition == name
    options, probe = ControlEvaluationOptions(steps=8, batch=len(objects)), load_probe("probe64")
    samplers = (
        adapter_sampler(teacher, adapter, pictures, options),
        teacher_sampler(teacher, options.steps, options.guidance),
    )
    captions = [noun_phrase("red", key) for key in objects]
    samples = [generate(teacher, captions, sampler, options.batch).images for sampler in samplers]
    controlled, uncontrolled = (means(fidelity(name, images, pictures, probe)) for images in samples)
    assert controlled["silhouette_iou"] > 0.85 > uncontrolled["silhouette_iou"] + 0.1
    if name == "depth":
        assert controlled["depth_correlation"] > 0.75 > uncontrolled["depth_correlation"] + 0.1
