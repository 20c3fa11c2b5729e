"""Critics: they start as the teacher, learn what is made, and leave the teacher bit for bit as it was."""

from typing import Literal

import pytest
import torch
from torch import Tensor

from distill.objectives.critic import Critic
from distill.objectives.options import CriticOptions
from distill.runtime.errors import UserError
from distill.teacher.latent import Teacher

KINDS: tuple[Literal["lora", "copy"], ...] = ("lora", "copy")


def asked(teacher: Teacher, count: int = 3) -> tuple[Tensor, Tensor, Tensor]:
    x_t = torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    return (
        x_t,
        torch.tensor([10, 500, 900])[:count],
        teacher.encode_text(["a red cube", "a blue sphere", ""][:count]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_teacher_and_never_changes_it(
    kind: Literal["lora", "copy"], tiny_teacher: Teacher
) -> None:
    x_t, t, text = asked(tiny_teacher)
    before = tiny_teacher.predict(x_t, t, text).eps
    critic = Critic(tiny_teacher, CriticOptions(kind, updates=3, learning_rate=1e-2))
    assert torch.equal(tiny_teacher.predict(x_t, t, text).eps, before)
    torch.testing.assert_close(critic.predict(x_t, t, text).eps, before)
    critic.train_on(x_t, text, None, torch.Generator().manual_seed(1))
    assert float((critic.predict(x_t, t, text).eps - before).abs().max()) > 1e-3
    assert torch.equal(tiny_teacher.predict(x_t, t, text).eps, before)  # bit for bit


def test_a_lora_trains_few_numbers_and_shares_the_rest(tiny_teacher: Teacher) -> None:
    whole = sum(value.numel() for value in tiny_teacher.unet.parameters())
    critic = Critic(tiny_teacher, CriticOptions(rank=2))
    assert 0 < sum(value.numel() for value in critic.parameters()) < whole / 5
    assert critic.unet is tiny_teacher.unet
    own = {id(value) for value in critic.parameters()}
    assert not any(value.requires_grad for value in tiny_teacher.unet.parameters() if id(value) not in own)


def test_a_new_critic_takes_the_place_of_the_last(tiny_teacher: Teacher) -> None:
    """A bench makes one after the other on one teacher: each starts as the teacher, and trains."""
    x_t, t, text = asked(tiny_teacher)
    before = tiny_teacher.predict(x_t, t, text).eps
    trained = []
    for rank in (2, 4, 4):
        critic = Critic(tiny_teacher, CriticOptions(rank=rank, updates=2, learning_rate=1e-2))
        torch.testing.assert_close(critic.predict(x_t, t, text).eps, before)
        critic.train_on(x_t, text, None, torch.Generator().manual_seed(1))
        assert float((critic.predict(x_t, t, text).eps - before).abs().max()) > 1e-3
        assert torch.equal(tiny_teacher.predict(x_t, t, text).eps, before)
        trained.append(sum(value.numel() for value in critic.parameters()))
    assert trained[1] == trained[2] == 2 * trained[0]  # nothing of the last is left


@pytest.mark.parametrize("kind", KINDS)
def test_learns_what_is_made(kind: Literal["lora", "copy"], tiny_teacher: Teacher) -> None:
    """On one latent over and over, the critic's denoising of it beats the teacher's."""
    latent = torch.full((8, *tiny_teacher.latent_shape), 0.7)
    text = tiny_teacher.encode_text(["a red cube"] * 8)
    torch.manual_seed(0)  # a LoRA starts at random
    critic = Critic(tiny_teacher, CriticOptions(kind, updates=80, learning_rate=5e-3))
    critic.train_on(latent, text, None, torch.Generator().manual_seed(0))
    t, noise = torch.full((8,), 400), torch.randn(latent.shape, generator=torch.Generator().manual_seed(9))
    x_t = critic.schedule.add_noise(latent, noise, t)
    errors = [
        float((model.predict(x_t, t, text).x0 - latent).square().mean()) for model in (tiny_teacher, critic)
    ]
    assert errors[1] < 0.8 * errors[0], errors


def test_a_camera_is_one_more_token(tiny_teacher: Teacher) -> None:
    critic = Critic(tiny_teacher, CriticOptions(camera=True))
    _, _, text = asked(tiny_teacher)
    poses = torch.eye(3, 12)
    told = critic.states(text, poses)
    assert told.shape == (3, text.shape[1] + 1, text.shape[2]) and torch.equal(told[:, :-1], text)
    assert float((told[0, -1] - told[1, -1]).detach().abs().max()) > 1e-3
    forgotten = critic.states(text, poses, torch.tensor([True, False, True]))
    assert float(forgotten[[0, 2], -1].detach().abs().max()) == 0 and torch.equal(forgotten[1], told[1])
    with pytest.raises(UserError, match="give poses"):
        critic.states(text, None)


@pytest.mark.parametrize("kind", KINDS)
def test_resumes_where_it_was(kind: Literal["lora", "copy"], tiny_teacher_folder: object) -> None:
    """Two updates in one go, and one, saved, restored, and one more, give the same critic."""
    told = []
    for broken in (False, True):
        teacher = Teacher.load(str(tiny_teacher_folder))
        x_t, t, text = asked(teacher)
        torch.manual_seed(0)  # a LoRA starts at random
        critic, generator = Critic(teacher, CriticOptions(kind)), torch.Generator().manual_seed(1)
        critic.train_on(x_t, text, None, generator)
        if broken:
            state = critic.state_dict()
            teacher = Teacher.load(str(tiny_teacher_folder))
            critic = Critic(teacher, CriticOptions(kind))
            critic.load_state_dict(state)
        critic.train_on(x_t, text, None, generator)
        told.append(critic.predict(x_t, t, text).eps)
    assert torch.equal(*told)
