"""The sampling loop: an image depends on the seed and its position only, whatever the batch size."""

import torch

from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.evaluation.generate import generate, student_sampler, teacher_sampler
from distill.one_step.student import Student, StudentOptions
from distill.teacher.latent import LatentDiffusionTeacher

PROMPTS = ["a red cube", "a blue duck", "a red cube"]


def test_a_sample_depends_on_seed_and_position_only(tiny_teacher: LatentDiffusionTeacher) -> None:
    sampler = teacher_sampler(tiny_teacher, 2, 3.0)
    runs = [generate(tiny_teacher, PROMPTS, sampler, batch, seed) for batch, seed in ((3, 0), (2, 0), (3, 1))]
    whole, parts, other = (run.images for run in runs)
    torch.testing.assert_close(whole, parts, atol=1e-3, rtol=0)
    assert float((whole - other).abs().mean()) > 1e-2 and float((whole[0] - whole[2]).abs().mean()) > 1e-2
    assert all(run.unet_seconds > 0 and run.decoder_seconds > 0 for run in runs)


def test_samplers_state_their_nfe_and_match_direct_sampling(tiny_teacher: LatentDiffusionTeacher) -> None:
    noise = torch.randn(3, *tiny_teacher.latent_shape, generator=torch.Generator().manual_seed(5))
    cond = tiny_teacher.encode_text(PROMPTS)
    guided = teacher_sampler(tiny_teacher, 2, 3.0)
    with torch.no_grad():
        model = Guided(tiny_teacher, tiny_teacher.encode_text([""]), 3.0)
        direct = tiny_teacher.decode(sample_ode(model, tiny_teacher.scheduler, cond, noise, 2))
        assert torch.equal(generate(tiny_teacher, PROMPTS, guided, 3, 5).images, direct)
        student = Student.from_teacher(tiny_teacher, StudentOptions())
        direct = tiny_teacher.decode(student(noise, cond, torch.Generator()))
    one_step = student_sampler("student", student)
    assert torch.equal(generate(tiny_teacher, PROMPTS, one_step, 3, 5).images, direct)
    assert (guided.nfe, teacher_sampler(tiny_teacher, 2, 1.0).nfe, one_step.nfe) == (4, 2, 1)
