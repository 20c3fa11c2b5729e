"""What comes with the package: the teacher loads from its name, is small enough, and does what its text asks."""

import pytest
import torch
from diffusers import StableDiffusionPipeline

from distill.control.adapter import load_adapter
from distill.evaluation.control import ControlEvaluationOptions, images_of, teacher_sampler
from distill.evaluation.fidelity import fidelity, means
from distill.evaluation.judge import load_judge, predict
from distill.evaluation.probe import load_probe
from distill.evaluation.teacher import EvaluationOptions, draw
from distill.one_step.folder import load_student
from distill.runtime.shipped import SHIPPED, WEIGHTS, resolve
from distill.teacher.latent import Teacher
from distill.teacher.vocabulary import phrase
from sds3d.scene.cameras import ring
from sds3d.world.conditions import mesh_pictures
from sds3d.world.shapes import COLOURS, OBJECTS, make_shape


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.load("shapes64")


def test_weights_are_within_the_budget() -> None:
    """A student's VAE and text encoder are links to its teacher's: whole they are 20 MB at most, and the package 40."""
    assert sum(path.lstat().st_size for path in WEIGHTS.rglob("*")) < 40 * 2**20
    for folder in (WEIGHTS / place for kind in ("teacher", "student") for place in SHIPPED[kind].values()):
        assert (folder / "README.md").is_file()  # the model card
        assert sum(path.stat().st_size for path in folder.rglob("*")) < 20 * 2**20


def test_teacher_draws_the_colour_it_is_asked_for(teacher: Teacher) -> None:
    captions = [f"a {colour} sphere" for colour in ("red", "green", "blue") for _ in range(4)]
    images = draw(teacher, captions, 3.0, EvaluationOptions(steps=10, batch=12))
    centre = images[:, :, 24:40, 24:40].mean((2, 3))  # (12, 3): the channel that stands out is the colour's
    told = centre.argmax(1).view(3, 4)
    assert (told == torch.arange(3)[:, None]).float().mean() >= 10 / 12


def test_reconstructions_keep_the_picture(teacher: Teacher) -> None:
    image = torch.full((1, 3, 64, 64), 0.8)
    image[:, :, 20:44, 20:44] = torch.tensor([0.8, 0.1, 0.1])[:, None, None]
    restored = teacher.decode(teacher.encode_images(image))
    assert (restored - image).square().mean() < 0.01


def test_the_student_draws_what_it_is_asked_for_in_one_call(teacher: Teacher) -> None:
    """Every object and colour, by the judge; its parts are the teacher's, byte for byte."""
    student, parts = load_student("shapes64")
    assert len(student.times) == 1
    for mine, its in ((parts.vae, teacher.vae), (parts.text_encoder, teacher.text_encoder)):
        assert all(torch.equal(value, its.state_dict()[name]) for name, value in mine.state_dict().items())
    asked = [(name, colour) for name in OBJECTS for colour in COLOURS]
    states = parts.encode_text([phrase(colour, name) for name, colour in asked])
    source = torch.Generator().manual_seed(0)
    noise = torch.randn(len(asked), *parts.latent_shape, generator=source)
    with torch.no_grad():
        images = torch.cat(
            [
                parts.decode(student(n, s, source))
                for n, s in zip(noise.split(46), states.split(46), strict=True)
            ]
        )
    told = predict(load_judge("judge64"), images)
    right = [
        told["object"][i] == name and told["colour"][i] == colour for i, (name, colour) in enumerate(asked)
    ]
    assert sum(right) / len(right) > 0.9


def test_the_student_is_a_stock_pipelines_folder() -> None:
    """One step without guidance gives our image of the same noise."""
    student, parts = load_student("shapes64")
    noise = torch.randn(1, *parts.latent_shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours = parts.decode(student(noise, parts.encode_text(["a red teapot"]), torch.Generator()))
    stock = StableDiffusionPipeline.from_pretrained(resolve("student", "shapes64"), dtype=torch.float32)
    stock.set_progress_bar_config(disable=True)
    told = stock(
        "a red teapot", latents=noise, num_inference_steps=1, guidance_scale=1, output_type="pt"
    ).images
    torch.testing.assert_close(told.float(), ours, atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", ["silhouette", "depth"])
def test_an_adapter_makes_the_teacher_obey_its_picture(name: str, teacher: Teacher) -> None:
    """Meshes from a side the caption does not tell: with the adapter the sample is where the picture says, without it is not."""
    kinds = ("teapot", "car", "rocket", "mug", "torus", "bunny")
    views = ring(7, elevation=30.0)
    pictures = torch.cat(
        [mesh_pictures(make_shape(kind).mesh, name, views)[i : i + 1] for i, kind in enumerate(kinds)]
    )
    adapter, condition = load_adapter(name)
    assert condition == name
    options, probe = ControlEvaluationOptions(steps=8, batch=len(kinds)), load_probe("probe64")
    draw, texts = teacher_sampler(teacher, options), [phrase("red", kind) for kind in kinds]
    kept, free = (
        means(fidelity(name, images_of(draw, teacher, net, texts, pictures, options), pictures, probe))
        for net in (adapter, None)
    )
    assert kept["silhouette_iou"] > 0.85 > free["silhouette_iou"] + 0.1
    if name == "depth":
        assert kept["depth_correlation"] > 0.75 > free["depth_correlation"] + 0.1
