"""The student: when it is asked, what rounding does to it, that it starts as the teacher, and its folder through stock diffusers."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline

from distill.core.noise import NoiseSchedule
from distill.one_step.folder import load_student, save_student
from distill.one_step.student import Student, StudentOptions, chosen_time, rounding_error, student_times
from distill.runtime.errors import UserError
from distill.teacher.latent import Teacher


def noise(teacher: Teacher, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))


def test_times_are_told_by_the_level(schedule: NoiseSchedule) -> None:
    (t,) = student_times(schedule, StudentOptions(level=2.5))
    place = torch.tensor([t])
    assert (
        float(schedule.sigma(place) / schedule.alpha(place)) == pytest.approx(2.5, rel=0.01) and 600 < t < 650
    )
    assert student_times(schedule, StudentOptions(level=None, steps=4)) == (999, 749, 499, 249)
    with pytest.raises(UserError, match="give a higher level or fewer steps"):
        student_times(schedule, StudentOptions(level=0.1, steps=50))
    with pytest.raises(UserError, match="a level above 0"):
        StudentOptions(level=0.0)


def test_rounding_is_what_was_measured_on_stable_diffusion(schedule: NoiseSchedule) -> None:
    """shared/facts/score-losses.md: x0 = (x - sigma eps) / alpha errs by .024 in bf16 at t = 999, by .004 at 625."""
    assert rounding_error(schedule, 999, "epsilon", torch.bfloat16) == pytest.approx(0.024, rel=0.1)
    assert rounding_error(schedule, 625, "epsilon", torch.bfloat16) == pytest.approx(0.004, rel=0.1)
    assert rounding_error(schedule, 999, "v_prediction", torch.bfloat16) < 0.002
    said = chosen_time(schedule, StudentOptions(), "epsilon")
    assert "sigma / alpha 2.5" in said and "in bf16" in said and "in fp16" in said


def test_it_starts_as_the_teacher_bit_for_bit(tiny_teacher: Teacher) -> None:
    student = Student.of(tiny_teacher, StudentOptions())
    x, states = noise(tiny_teacher, 2), tiny_teacher.encode_text(["a red cube", "a blue duck"])
    t = torch.full((2,), student.times[0])
    assert torch.equal(student.clean(x, 0, states), tiny_teacher.predict(x, t, states).x0)
    last = Student.of(tiny_teacher, StudentOptions(level=None, parameterisation="sample"))
    whole = tiny_teacher.predict(x, torch.full((2,), 999), states).x0  # alpha is 0 there: x0 is -v
    torch.testing.assert_close(last.clean(x, 0, states), whole, atol=1e-5, rtol=1e-4)
    assert last.kind == "sample"
    student.unet.conv_out.weight.data.zero_()
    assert float(tiny_teacher.unet.conv_out.weight.abs().sum()) > 0  # a copy


def test_two_steps_are_its_own_answer_made_noisy_again(tiny_teacher: Teacher) -> None:
    student = Student.of(tiny_teacher, StudentOptions(steps=2))
    x, states = noise(tiny_teacher, 2), tiny_teacher.encode_text(["a red cube", "a blue duck"])
    with torch.no_grad():
        made = student(x, states, torch.Generator().manual_seed(3))
        first = student.predict(x, torch.full((2,), student.times[0]), states).x0
        t = torch.full((2,), student.times[1])
        again = tiny_teacher.schedule.add_noise(first, noise(tiny_teacher, 2, 3), t)
        assert torch.equal(made, student.predict(again, t, states).x0)
        assert not torch.allclose(made, first)


@pytest.mark.parametrize(
    "options", [StudentOptions(), StudentOptions(steps=2), StudentOptions(level=None, steps=4)], ids=str
)
def test_stock_diffusers_draws_the_same_image(
    options: StudentOptions, tiny_teacher: Teacher, tmp_path: Path
) -> None:
    student = Student.of(tiny_teacher, options)
    with torch.no_grad():
        student.unet.conv_out.weight.mul_(1.5)  # no longer the teacher
    folder = tmp_path / "student"
    save_student(folder, student, tiny_teacher)
    again, parts = load_student(folder)
    assert again.times == student.times
    x, prompts = noise(tiny_teacher, 2), ["a red cube"] * 2
    source = torch.Generator().manual_seed(0)
    torch.randn(
        2, *tiny_teacher.latent_shape, generator=source
    )  # the pipeline draws its latents from it first
    with torch.no_grad():
        ours = parts.decode(again(x, parts.encode_text(prompts), source))
    own = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
    stock = StableDiffusionPipeline.from_pretrained(folder)
    for pipeline, asked in (
        (own, {}),
        (stock, {"num_inference_steps": options.steps, "guidance_scale": 1.0}),
    ):
        pipeline.set_progress_bar_config(disable=True)
        told = pipeline(prompts, generator=torch.Generator().manual_seed(0), output_type="pt", **asked).images
        torch.testing.assert_close(told.float(), ours, atol=2e-5, rtol=0)
    assert float(ours.std()) > 0.01


def test_a_folder_of_something_else_is_left_alone(
    tiny_teacher: Teacher, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something other than a student"):
        save_student(tmp_path, Student.of(tiny_teacher, StudentOptions()), tiny_teacher)
    with pytest.raises(UserError, match="is no student"):
        load_student(tiny_teacher_folder)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_folder_is_replaced_whole(tiny_teacher: Teacher, tmp_path: Path) -> None:
    for steps in (1, 2):
        save_student(tmp_path / "s", Student.of(tiny_teacher, StudentOptions(steps=steps)), tiny_teacher)
    assert (
        json.loads((tmp_path / "s" / "scheduler" / "scheduler_config.json").read_text())[
            "original_inference_steps"
        ]
        == 2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
