"""Critics start equal to the teacher, learn the generated latents, and leave the teacher bit for bit as it
was.
"""

from typing import Literal

import pytest
import torch
from torch import Tensor

from distill.core.conditioning import Conditioning
from distill.core.noise import PredictionType
from distill.objectives.critic import Critic
from distill.objectives.options import CriticOptions
from distill.runtime.errors import UserError
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion

KINDS: tuple[Literal["lora", "copy"], ...] = ("lora", "copy")


def inputs(teacher: LatentDiffusionTeacher, count: int = 3) -> tuple[Tensor, Tensor, Conditioning]:
    x_t = torch.randn(count, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    return (
        x_t,
        torch.tensor([10, 500, 900])[:count],
        teacher.encode_text(["a red cube", "a blue sphere", ""][:count]),
    )


@pytest.mark.parametrize("kind", KINDS)
def test_starts_as_the_teacher_and_never_changes_it(
    kind: Literal["lora", "copy"], tiny_teacher: LatentDiffusionTeacher
) -> None:
    x_t, t, text = inputs(tiny_teacher)
    before = tiny_teacher.predict(x_t, t, text).eps
    critic = Critic(tiny_teacher, CriticOptions(kind, updates=3, learning_rate=1e-2))
    assert torch.equal(tiny_teacher.predict(x_t, t, text).eps, before)
    torch.testing.assert_close(critic.predict(x_t, t, text).eps, before)
    critic.train_on(x_t, text, torch.Generator().manual_seed(1))
    assert float((critic.predict(x_t, t, text).eps - before).abs().max()) > 1e-3
    assert torch.equal(tiny_teacher.predict(x_t, t, text).eps, before)  # bit for bit


def test_a_lora_trains_few_numbers_and_shares_the_rest(tiny_teacher: LatentDiffusionTeacher) -> None:
    whole = sum(value.numel() for value in tiny_teacher.unet.parameters())
    critic = Critic(tiny_teacher, CriticOptions(rank=2))
    assert 0 < sum(value.numel() for value in critic.parameters()) < whole / 5
    assert critic.denoiser.network is tiny_teacher.unet
    own = {id(value) for value in critic.parameters()}
    assert not any(value.requires_grad for value in tiny_teacher.unet.parameters() if id(value) not in own)


def test_a_new_critic_replaces_the_last(tiny_teacher: LatentDiffusionTeacher) -> None:
    """Several critics, one after the other, on one teacher: each starts equal to it, and trains."""
    x_t, t, text = inputs(tiny_teacher)
    before = tiny_teacher.predict(x_t, t, text).eps
    sizes = []
    for rank in (2, 4, 4):
        critic = Critic(tiny_teacher, CriticOptions(rank=rank, updates=2, learning_rate=1e-2))
        torch.testing.assert_close(critic.predict(x_t, t, text).eps, before)
        critic.train_on(x_t, text, torch.Generator().manual_seed(1))
        assert float((critic.predict(x_t, t, text).eps - before).abs().max()) > 1e-3
        assert torch.equal(tiny_teacher.predict(x_t, t, text).eps, before)
        sizes.append(sum(value.numel() for value in critic.parameters()))
    assert sizes[1] == sizes[2] == 2 * sizes[0]  # nothing of the last remains


@pytest.mark.parametrize("kind", KINDS)
def test_learns_the_generated_latents(
    kind: Literal["lora", "copy"], tiny_teacher: LatentDiffusionTeacher
) -> None:
    """On one latent over and over, the critic's denoising of it beats the teacher's."""
    latent = torch.full((8, *tiny_teacher.latent_shape), 0.7)
    text = tiny_teacher.encode_text(["a red cube"] * 8)
    torch.manual_seed(0)  # a LoRA is initialised at random
    critic = Critic(tiny_teacher, CriticOptions(kind, updates=80, learning_rate=5e-3))
    critic.train_on(latent, text, torch.Generator().manual_seed(0))
    t, noise = torch.full((8,), 400), torch.randn(latent.shape, generator=torch.Generator().manual_seed(9))
    x_t = critic.schedule.add_noise(latent, noise, t)
    errors = [
        float((model.predict(x_t, t, text).x0 - latent).square().mean()) for model in (tiny_teacher, critic)
    ]
    assert errors[1] < 0.8 * errors[0], errors


def test_a_camera_is_one_more_token(tiny_teacher: LatentDiffusionTeacher) -> None:
    critic = Critic(tiny_teacher, CriticOptions(camera=True), camera_dim=12)
    _, _, text = inputs(tiny_teacher)
    count, length, dim = text.embedding.shape
    batch = text.with_extras(camera=torch.eye(3, 12))
    embedding = critic._with_camera(batch).embedding
    assert embedding.shape == (count, length + 1, dim)
    assert torch.equal(embedding[:, :-1], text.embedding)
    assert float((embedding[0, -1] - embedding[1, -1]).detach().abs().max()) > 1e-3

    dropped = critic._with_camera(batch, torch.tensor([True, False, True])).embedding
    assert float(dropped[[0, 2], -1].detach().abs().max()) == 0
    assert torch.equal(dropped[1], embedding[1])
    with pytest.raises(UserError, match="needs the camera of each sample"):
        critic.predict(*inputs(tiny_teacher))
    with pytest.raises(UserError, match="set objective.critic.camera=false"):
        Critic(tiny_teacher, CriticOptions(camera=True))


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_copy_is_trained_on_its_own_parameterisation(
    prediction_type: PredictionType, tiny_teacher: LatentDiffusionTeacher
) -> None:
    """The denoising loss is the error of eps, v or x0, whichever the network predicts."""
    denoiser = UNetDenoiser(tiny_teacher.unet, tiny_teacher.schedule, prediction_type)
    latents, t, text = inputs(tiny_teacher)
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    x_t = tiny_teacher.schedule.add_noise(latents, noise, t)
    output = tiny_teacher.unet(x_t, t, encoder_hidden_states=text.embedding).sample
    alpha, sigma = tiny_teacher.schedule.alpha(t), tiny_teacher.schedule.sigma(t)
    targets = {"epsilon": noise, "v_prediction": alpha * noise - sigma * latents, "sample": latents}
    expected = (output - targets[prediction_type]).square().mean()
    torch.testing.assert_close(denoiser.trainable_copy().denoising_loss(latents, noise, t, text), expected)


def test_a_trainable_copy_is_independent_and_has_no_lora(tiny_teacher: LatentDiffusionTeacher) -> None:
    names = {name for name, _ in tiny_teacher.unet.named_parameters()}
    Critic(tiny_teacher, CriticOptions("lora"))
    copy = tiny_teacher.trainable_copy()
    parameters = dict(copy.network.named_parameters())
    assert {name.replace(".base_layer", "") for name in parameters} == names
    assert all(p.requires_grad and p.dtype == torch.float32 for p in parameters.values())
    own = {p.data_ptr() for p in tiny_teacher.unet.parameters()}
    assert not own & {p.data_ptr() for p in parameters.values()}


@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_critic_is_the_same(kind: Literal["lora", "copy"], tiny_teacher_folder: object) -> None:
    """Two updates in one go, and one, saved, restored, and one more, give the same critic."""
    predictions = []
    for broken in (False, True):
        teacher = load_latent_diffusion(str(tiny_teacher_folder))
        x_t, t, text = inputs(teacher)
        torch.manual_seed(0)  # a LoRA is initialised at random
        critic, generator = Critic(teacher, CriticOptions(kind)), torch.Generator().manual_seed(1)
        critic.train_on(x_t, text, generator)
        if broken:
            state = critic.state_dict()
            teacher = load_latent_diffusion(str(tiny_teacher_folder))
            critic = Critic(teacher, CriticOptions(kind))
            critic.load_state_dict(state)
        critic.train_on(x_t, text, generator)
        predictions.append(critic.predict(x_t, t, text).eps)
    assert torch.equal(*predictions)
