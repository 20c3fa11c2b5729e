"""What comes with the package: the teacher loads from its name, is small enough, and does what its text asks."""

import pytest
import torch

from distill.shipped import SHIPPED, WEIGHTS
from distill.teacher.evaluation import EvaluationOptions, draw
from distill.teacher.frozen import Teacher


@pytest.fixture(scope="module")
def teacher() -> Teacher:
    return Teacher.load("shapes64")


@pytest.mark.parametrize("name", SHIPPED["teacher"])
def test_weights_are_within_the_budget(name: str) -> None:
    assert sum(path.stat().st_size for path in (WEIGHTS / name).rglob("*")) < 40 * 2**20
    assert (WEIGHTS / name / "README.md").is_file()  # the model card


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
