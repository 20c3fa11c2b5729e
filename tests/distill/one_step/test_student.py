"""The student: its timesteps, rounding, initialisation from the teacher, and its folder in stock
diffusers.
"""

import json
from pathlib import Path

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel

from distill.core.noise import NoiseSchedule
from distill.one_step.folder import load_student, save_student
from distill.one_step.student import (
    Student,
    StudentOptions,
    describe_timestep,
    rounding_error,
    student_timesteps,
)
from distill.runtime.errors import UserError
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion


def noise(teacher: LatentDiffusionTeacher, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(seed))


def test_timesteps_follow_from_sigma_max(schedule: NoiseSchedule) -> None:
    (t,) = student_timesteps(schedule, StudentOptions(sigma_max=2.5))
    index = torch.tensor([t])
    ratio = float(schedule.sigma(index) / schedule.alpha(index))
    assert ratio == pytest.approx(2.5, rel=0.01) and 600 < t < 650
    assert student_timesteps(schedule, StudentOptions(sigma_max=None, steps=4)) == (999, 749, 499, 249)
    with pytest.raises(UserError, match="give a higher sigma_max or fewer steps"):
        student_timesteps(schedule, StudentOptions(sigma_max=0.1, steps=50))
    with pytest.raises(UserError, match="a sigma_max above 0"):
        StudentOptions(sigma_max=0.0)


def test_rounding_error_on_stable_diffusions_schedule(schedule: NoiseSchedule) -> None:
    """x0 = (x - sigma eps) / alpha has an error of .024 in bf16 at t = 999, of .004 at 625."""
    assert rounding_error(schedule, 999, "epsilon", torch.bfloat16) == pytest.approx(0.024, rel=0.1)
    assert rounding_error(schedule, 625, "epsilon", torch.bfloat16) == pytest.approx(0.004, rel=0.1)
    assert rounding_error(schedule, 999, "v_prediction", torch.bfloat16) < 0.002
    message = describe_timestep(schedule, StudentOptions(), "epsilon")
    assert "sigma / alpha 2.5" in message and "in bf16" in message and "in fp16" in message


def test_it_starts_equal_to_the_teacher_bit_for_bit(tiny_teacher: LatentDiffusionTeacher) -> None:
    student = Student.from_teacher(tiny_teacher, StudentOptions())
    x, text = noise(tiny_teacher, 2), tiny_teacher.encode_text(["a red cube", "a blue duck"])
    t = torch.full((2,), student.timesteps[0])
    assert torch.equal(student.predict_x0(x, 0, text), tiny_teacher.predict(x, t, text).x0)
    last = Student.from_teacher(tiny_teacher, StudentOptions(sigma_max=None, parameterisation="sample"))
    x0 = tiny_teacher.predict(x, torch.full((2,), 999), text).x0  # alpha is 0 there: x0 is -v
    torch.testing.assert_close(last.predict_x0(x, 0, text), x0, atol=1e-5, rtol=1e-4)
    assert last.denoiser.prediction_type == "sample"
    student.denoiser.network.conv_out.weight.data.zero_()
    assert float(tiny_teacher.unet.conv_out.weight.abs().sum()) > 0  # a copy


def test_two_steps_noise_its_own_x0_again(tiny_teacher: LatentDiffusionTeacher) -> None:
    student = Student.from_teacher(tiny_teacher, StudentOptions(steps=2))
    x, text = noise(tiny_teacher, 2), tiny_teacher.encode_text(["a red cube", "a blue duck"])
    with torch.no_grad():
        output = student(x, text, torch.Generator().manual_seed(3))
        first = student.predict(x, torch.full((2,), student.timesteps[0]), text).x0
        t = torch.full((2,), student.timesteps[1])
        again = tiny_teacher.schedule.add_noise(first, noise(tiny_teacher, 2, 3), t)
        assert torch.equal(output, student.predict(again, t, text).x0)
        assert not torch.allclose(output, first)


@pytest.mark.parametrize(
    "options", [StudentOptions(), StudentOptions(steps=2), StudentOptions(sigma_max=None, steps=4)], ids=str
)
def test_stock_diffusers_samples_the_same_image(
    options: StudentOptions, tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    student = Student.from_teacher(tiny_teacher, options)
    with torch.no_grad():
        student.denoiser.network.conv_out.weight.mul_(1.5)  # no longer the teacher
    folder = tmp_path / "student"
    save_student(folder, student, tiny_teacher)
    again, parts = load_student(folder)
    assert again.timesteps == student.timesteps
    x, prompts = noise(tiny_teacher, 2), ["a red cube"] * 2
    generator = torch.Generator().manual_seed(0)
    torch.randn(2, *tiny_teacher.latent_shape, generator=generator)  # the pipeline's latents come first
    with torch.no_grad():
        ours = parts.decode(again(x, parts.encode_text(prompts), generator))
    own = DiffusionPipeline.from_pretrained(folder, custom_pipeline="pipeline", trust_remote_code=True)
    stock = StableDiffusionPipeline.from_pretrained(folder)
    for pipeline, options_ in (
        (own, {}),
        (stock, {"num_inference_steps": options.steps, "guidance_scale": 1.0}),
    ):
        pipeline.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipeline(prompts, generator=generator, output_type="pt", **options_).images
        torch.testing.assert_close(images.float(), ours, atol=2e-5, rtol=0)
    assert float(ours.std()) > 0.01


def test_a_multi_view_teachers_student_is_a_stock_unet(
    multi_view_teacher_folder: Path, tmp_path: Path
) -> None:
    teacher = load_latent_diffusion(str(multi_view_teacher_folder))
    student = Student.from_teacher(teacher, StudentOptions())
    save_student(tmp_path / "s", student, teacher)
    again, parts = load_student(tmp_path / "s", teacher=teacher)
    x, text = noise(teacher, 1), teacher.encode_text(["a red cube"])
    with torch.no_grad():
        torch.testing.assert_close(again.predict_x0(x, 0, text), student.predict_x0(x, 0, text))
    assert type(parts.unet) is UNet2DConditionModel


def test_a_folder_without_the_teachers_parts_reads_them_from_the_teacher(
    tiny_teacher: LatentDiffusionTeacher, multi_view_teacher_folder: Path, tmp_path: Path
) -> None:
    """It holds no symbolic link and little beside the U-Net; saved whole again, it is for stock diffusers."""
    student = Student.from_teacher(tiny_teacher, StudentOptions(steps=2))
    save_student(tmp_path / "whole", student, tiny_teacher)
    save_student(tmp_path / "part", student, tiny_teacher, whole=False)
    assert sorted(path.name for path in (tmp_path / "part").iterdir()) == [
        *("pipeline.py", "scheduler", "student.json", "unet")
    ]
    (expected, whole), (again, parts) = (load_student(tmp_path / name) for name in ("whole", "part"))
    prompts, x = ["a red cube", "a blue duck"], noise(tiny_teacher, 2)
    images = []
    for model, teacher in ((expected, whole), (again, parts)):
        with torch.no_grad():
            latents = model(x, teacher.encode_text(prompts), torch.Generator().manual_seed(0))
            images.append(teacher.decode(latents))
    assert torch.equal(*images)
    assert parts.identity == tiny_teacher.identity and again.timesteps == student.timesteps
    with pytest.raises(UserError, match="is not in the vocabulary|unknown"):
        parts.encode_text(["a xylophone"])

    save_student(tmp_path / "copy", again, parts)
    names = {str(path.relative_to(tmp_path / "whole")) for path in (tmp_path / "whole").rglob("*")}
    assert {str(path.relative_to(tmp_path / "copy")) for path in (tmp_path / "copy").rglob("*")} == names
    StableDiffusionPipeline.from_pretrained(tmp_path / "copy")

    facts = json.loads((tmp_path / "part" / "student.json").read_text())
    other = {**facts["teacher"], "name": str(multi_view_teacher_folder)}
    (tmp_path / "part" / "student.json").write_text(json.dumps({"teacher": other}))
    with pytest.raises(UserError, match="as it was before its weights changed"):
        load_student(tmp_path / "part")
    (tmp_path / "part" / "student.json").write_text("{}")
    with pytest.raises(UserError, match="lacks vae, text_encoder, tokenizer: copy the whole folder"):
        load_student(tmp_path / "part")


def test_a_folder_of_something_else_is_left_alone(
    tiny_teacher: LatentDiffusionTeacher, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="holds something other than a student"):
        save_student(tmp_path, Student.from_teacher(tiny_teacher, StudentOptions()), tiny_teacher)
    with pytest.raises(UserError, match="is no student"):
        load_student(tiny_teacher_folder)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_the_folder_is_replaced_whole(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    for steps in (1, 2):
        save_student(
            tmp_path / "s", Student.from_teacher(tiny_teacher, StudentOptions(steps=steps)), tiny_teacher
        )
    assert (
        json.loads((tmp_path / "s" / "scheduler" / "scheduler_config.json").read_text())[
            "original_inference_steps"
        ]
        == 2
    )
    assert [path.name for path in tmp_path.iterdir()] == ["s"]
