"""Adapters: no effect before training, only they are trained, equal to diffusers' pipeline; conditions."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import script
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from distill.control.adapter import (
    ControlOptions,
    controlled,
    controlled_student,
    load_adapter,
    make_adapter,
    save_adapter,
)
from distill.control.conditions import (
    adapter_input,
    condition_images,
    edges,
    listed_images,
    scribbles,
    soft_edges,
    straight_lines,
)
from distill.control.network import Control
from distill.control.train import AdapterOptions, AdapterTrainer
from distill.core.identity import TeacherIdentity
from distill.core.noise import PredictionType
from distill.core.sampling import sample_ode
from distill.core.score import Guided
from distill.core.views import POSE, POSE_DIM
from distill.data.folders import CaptionedImages
from distill.data.latents import LatentCache
from distill.evaluation.judge import Judge, save_judge
from distill.evaluation.judge_columns import JudgeOptions
from distill.objectives.critic import Critic
from distill.objectives.options import CriticOptions
from distill.one_step.folder import load_student, save_student
from distill.one_step.student import Student, StudentOptions
from distill.runtime.errors import UserError
from distill.runtime.images import save_png
from distill.runtime.run import Run, RunOptions
from distill.runtime.shipped import SHIPPED
from distill.teacher.denoiser import UNetDenoiser
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from sds3d.text_to_3d.prompts import VIEWS
from sds3d.world.shapes import COLOURS, OBJECTS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def random_adapter(teacher: LatentDiffusionTeacher, seed: int) -> ControlNetModel:
    """An adapter whose zero convolutions are not zero."""
    adapter = make_adapter(teacher)
    with torch.no_grad():
        for name, value in adapter.named_parameters():
            if "controlnet_" in name or name.startswith("controlnet_cond_embedding.conv_out"):
                value.copy_(0.2 * random(*value.shape, seed=seed))
    return adapter.eval().requires_grad_(False)


def disc(count: int = 1) -> Tensor:
    """A white disc on black, (count, 3, 64, 64)."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    inside = ((rows - 32) ** 2 + (columns - 28) ** 2 < 300).float()
    return inside.expand(count, 3, 64, 64).clone()


def test_untrained_adapter_leaves_the_teacher_bit_for_bit(tiny_teacher: LatentDiffusionTeacher) -> None:
    x_t, t = random(2, *tiny_teacher.latent_shape), torch.tensor([700, 20])
    conditioning = tiny_teacher.encode_text(["a red cube", "a blue duck"])
    with torch.no_grad():
        eps = tiny_teacher.predict(x_t, t, conditioning).eps
        untrained = controlled(tiny_teacher, [Control(make_adapter(tiny_teacher), disc())])
        assert torch.equal(untrained.predict(x_t, t, conditioning).eps, eps)
        trained = controlled(tiny_teacher, [Control(random_adapter(tiny_teacher, 1), disc())])
        assert float((trained.predict(x_t, t, conditioning).eps - eps).abs().max()) > 1e-3
        assert torch.equal(tiny_teacher.predict(x_t, t, conditioning).eps, eps)  # not changed by its copies
    assert trained.latent_shape == tiny_teacher.latent_shape and trained.resolution == 64


def test_a_multi_view_teacher_keeps_cameras_and_groups(multi_view_teacher_folder: Path) -> None:
    """An adapter that knows no cameras adds to a U-Net that is conditioned on them."""
    teacher = load_latent_diffusion(str(multi_view_teacher_folder))
    x_t, t = random(4, *teacher.latent_shape), torch.tensor([700, 700, 20, 20])
    text = teacher.encode_text(["a red cube", "a red cube", "a blue duck", "a blue duck"])
    posed = text.with_extras(**{POSE: random(4, POSE_DIM, seed=2)}).grouped(2)
    adapter = random_adapter(teacher, 1)
    with torch.no_grad():
        untrained = controlled(teacher, [Control(make_adapter(teacher), disc())])
        assert untrained.conditioned_on_cameras
        assert torch.equal(untrained.predict(x_t, t, posed).eps, teacher.predict(x_t, t, posed).eps)
        trained = controlled(teacher, [Control(adapter, disc())])
        eps = trained.predict(x_t, t, posed).eps
        assert float((eps - teacher.predict(x_t, t, posed).eps).abs().max()) > 1e-3
        assert float((eps - trained.predict(x_t, t, text).eps).abs().max()) > 1e-4  # without cameras

        output = adapter(x_t, t, encoder_hidden_states=text.embedding, controlnet_cond=disc(4))
        expected = teacher.network(
            x_t,
            t,
            **teacher.network.view_conditions(posed, torch.float32),
            down_block_additional_residuals=tuple(output.down_block_res_samples),
            mid_block_additional_residual=output.mid_block_res_sample,
        ).sample
        torch.testing.assert_close(trained.denoiser.output(x_t, t, posed), expected)


def test_only_the_adapter_is_trained(tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    latents, conditioning = (
        random(6, *tiny_teacher.latent_shape),
        tiny_teacher.encode_text(["a red cube", ""]),
    )
    cache = LatentCache(latents, conditioning, torch.zeros(6, dtype=torch.long))
    run = Run(RunOptions(str(tmp_path), 2, trackers=()), {}, "adapter")
    conditions = disc(6).mul(255).byte()
    trainer = AdapterTrainer(run, tiny_teacher, cache, conditions, "silhouette", AdapterOptions(batch=3))
    before = {name: value.clone() for name, value in tiny_teacher.unet.state_dict().items()}
    zero = [
        (name, value)
        for name, value in trainer.adapter.named_parameters()
        if "controlnet_down" in name or "controlnet_mid" in name or "cond_embedding.conv_out" in name
    ]
    assert len(zero) > 8 and not any(value.any() for _, value in zero)

    trainer.step(0)
    assert all(torch.equal(value, before[name]) for name, value in tiny_teacher.unet.state_dict().items())
    # no gradient reaches the condition encoder while the zero convolutions after it are zero
    assert [name for name, value in zero if not value.any()] == [n for n, _ in zero if "cond_embedding" in n]
    trainer.step(1)
    assert all(value.any() for _, value in zero)
    assert all(value.grad is None for value in tiny_teacher.unet.parameters())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_adapter_loss_is_of_the_teachers_own_target(
    prediction_type: PredictionType, tiny_teacher: LatentDiffusionTeacher
) -> None:
    schedule = tiny_teacher.schedule
    tiny_teacher.denoiser = UNetDenoiser(tiny_teacher.unet, schedule, prediction_type)
    teacher = controlled(tiny_teacher, [Control(random_adapter(tiny_teacher, 1), disc())])
    latents, noise, t = random(2, *teacher.latent_shape), random(2, *teacher.latent_shape, seed=1), [500, 100]
    times, conditioning = torch.tensor(t), teacher.encode_text(["a red cube"]).expand(2)
    with torch.no_grad():
        loss = teacher.denoising_loss(latents, noise, times, conditioning)
        output = teacher.denoiser.output(schedule.add_noise(latents, noise, times), times, conditioning)
    velocity = schedule.velocity(latents, noise, times)
    targets = {"epsilon": noise, "v_prediction": velocity, "sample": latents}
    torch.testing.assert_close(loss, F.mse_loss(output, targets[prediction_type]))


def test_trainable_copy_of_a_controlled_teacher_leaves_the_adapters_frozen(
    tiny_teacher: LatentDiffusionTeacher,
) -> None:
    adapter = random_adapter(tiny_teacher, 1)
    teacher = controlled(tiny_teacher, [Control(adapter, disc())])
    denoiser = teacher.trainable_copy()
    assert len(list(denoiser.parameters())) == len(list(tiny_teacher.unet.parameters()))
    assert denoiser.network.controls[0].adapter is adapter
    inputs = (
        random(2, *teacher.latent_shape),
        torch.tensor([700, 20]),
        teacher.encode_text(["a red cube", ""]),
    )
    with torch.no_grad():
        torch.testing.assert_close(denoiser.predict(*inputs).eps, teacher.predict(*inputs).eps)
    denoiser.denoising_loss(inputs[0], random(*inputs[0].shape, seed=1), *inputs[1:]).backward()
    assert all(value.grad is None and not value.requires_grad for value in adapter.parameters())
    assert not any(value.requires_grad for value in tiny_teacher.unet.parameters())


@pytest.mark.parametrize("kind", ["lora", "copy"])
def test_critic_of_a_controlled_teacher_starts_equal_to_it(
    kind: str, tiny_teacher: LatentDiffusionTeacher
) -> None:
    teacher = controlled(tiny_teacher, [Control(random_adapter(tiny_teacher, 1), disc())])
    critic = Critic(teacher, CriticOptions(kind))  # type: ignore[arg-type]
    inputs = (
        random(2, *teacher.latent_shape),
        torch.tensor([700, 20]),
        teacher.encode_text(["a red cube", ""]),
    )
    with torch.no_grad():
        before = teacher.predict(*inputs).eps
    torch.testing.assert_close(critic.predict(*inputs).eps, before)
    critic.train_on(inputs[0], inputs[2], torch.Generator().manual_seed(0))
    assert float((critic.predict(*inputs).eps - before).abs().max()) > 1e-4
    with torch.no_grad():
        assert torch.equal(teacher.predict(*inputs).eps, before)


@pytest.mark.parametrize("count", [1, 2])
def test_images_are_those_of_the_diffusers_pipeline(
    count: int, tiny_teacher: LatentDiffusionTeacher, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    """One adapter, and two with weights of their own, each in a part of the steps."""
    ranges = [(0.8, 0.0, 1.0), (0.5, 0.25, 0.75)][:count]  # weight, start, end
    folders = [tmp_path / f"a{index}" for index in range(count)]
    for index, folder in enumerate(folders):
        save_adapter(folder, random_adapter(tiny_teacher, index), "silhouette", {})
    adapters = [load_adapter(folder)[0] for folder in folders]
    controls = [Control(adapter, disc(), *values) for adapter, values in zip(adapters, ranges, strict=True)]
    noise = random(1, *tiny_teacher.latent_shape)
    cond, uncond = tiny_teacher.encode_text(["a red cube"]), tiny_teacher.encode_text([""])

    def image(teacher: LatentDiffusionTeacher) -> Tensor:
        latents = sample_ode(Guided(teacher, uncond, 2.0), teacher.scheduler, cond, noise, 4)
        return teacher.decode(latents)

    stock = [ControlNetModel.from_pretrained(folder, torch_dtype=torch.float32) for folder in folders]
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        tiny_teacher_folder, controlnet=stock if count > 1 else stock[0]
    )
    pipeline.set_progress_bar_config(disable=True)
    weights, starts, ends = (list(values) for values in zip(*ranges, strict=True))
    expected = pipeline(
        "a red cube",
        image=[disc()] * count if count > 1 else disc(),
        latents=noise,
        num_inference_steps=4,
        guidance_scale=2.0,
        controlnet_conditioning_scale=weights if count > 1 else weights[0],
        control_guidance_start=starts if count > 1 else 0.0,
        control_guidance_end=ends if count > 1 else 1.0,
        output_type="pt",
    ).images
    result = image(controlled(tiny_teacher, controls))
    torch.testing.assert_close(expected.float(), result, atol=1e-3, rtol=0)
    assert float((result - image(tiny_teacher)).abs().max()) > 5e-3  # the adapters have an effect


def test_control_acts_in_its_range_only(tiny_teacher: LatentDiffusionTeacher) -> None:
    control = Control(make_adapter(tiny_teacher), disc(), 0.5, 0.25, 0.75)
    t = torch.tensor([999, 749, 499, 249])  # of four trailing steps: fractions 0, 1/4, 1/2, 3/4
    assert control.weights(t, 1000).flatten().tolist() == [0.0, 0.5, 0.5, 0.0]
    with pytest.raises(UserError, match="fractions of the denoising"):
        Control(control.adapter, disc(), 1.0, 0.8, 0.3)
    with pytest.raises(UserError, match="2 control images for a batch of 3"):
        control.repeated(disc(2), 3)


def test_conditions_derived_from_images() -> None:
    images = torch.full((1, 4, 64, 64), 255, dtype=torch.uint8)
    images[:, :3] = (disc() * 200).byte()
    images[:, 3:] = (disc()[:, :1] * 255).byte()
    data = CaptionedImages(images, [{"file_name": "a.png", "text": "a disc"}])
    assert torch.equal(condition_images("silhouette", "x", data), images[:, 3:])

    lines = edges(data.composite(slice(None)))
    points = (lines[0, 0] > 0).nonzero().float() - torch.tensor([32.0, 28.0])
    assert 60 < len(points) < 200  # a circle, the disc's outline
    assert float((points.norm(dim=1) - 300**0.5).abs().max()) < 3
    assert (scribbles(data.composite(slice(None))) > 0).sum() > 2 * (lines > 0).sum()
    with pytest.raises(UserError, match="none of silhouette, edges, scribble, soft_edges, lines, folder"):
        condition_images("pose", "x", data)
    with pytest.raises(UserError, match="alpha channel"):
        condition_images("silhouette", "x", CaptionedImages(images[:, :3], data.rows))


def test_soft_edges_are_strongest_on_the_outline() -> None:
    """The radius of their maximum is the disc's; twice the contrast is twice the strength."""
    strength = soft_edges(0.1 * disc())[0, 0].float()
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    radius = ((rows - 32) ** 2 + (columns - 28) ** 2).sqrt()
    near = (radius - 300**0.5).abs()
    assert float(strength[near < 1].min()) > 20 > 5 > float(strength[near > 10].max())
    ratio = soft_edges(0.2 * disc())[0, 0].float()[near < 1] / strength[near < 1]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 2.0), atol=0.1, rtol=0)


def test_straight_lines_leave_short_and_curved_edges_out() -> None:
    """A square has four, as long as its sides; a small disc has none."""
    square = torch.zeros(1, 3, 64, 64)
    square[..., 16:48, 20:44] = 1.0
    lines = straight_lines(square)[0, 0] > 0
    border = torch.zeros(64, 64, dtype=torch.bool)
    border[14:50, 18:46] = True
    border[19:45, 23:41] = False
    assert not (lines & ~border).any()
    assert 100 < int(lines.sum()) < 200  # the perimeter is 112, edges are up to two pixels wide
    dot = torch.zeros(1, 3, 64, 64)
    dot[..., 30:33, 30:33] = 1.0
    assert edges(dot).any() and not straight_lines(dot).any()


def test_conditions_of_a_conditioning_image_column(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 77, np.uint8)).save(tmp_path / "c.png")
    row = {"file_name": "a.png", "text": "x"}
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    data = CaptionedImages(images, [{**row, "conditioning_image": "c.png"}])
    assert torch.equal(listed_images(tmp_path, data), torch.full((1, 3, 64, 64), 77, dtype=torch.uint8))
    with pytest.raises(UserError, match="a.png has no conditioning_image"):
        listed_images(tmp_path, CaptionedImages(images, [row]))


def test_adapter_folders_and_their_errors(
    tmp_path: Path, tiny_teacher: LatentDiffusionTeacher, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="is no adapter: give silhouette, depth"):
        load_adapter(tmp_path / "none")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something other than an adapter"):
        save_adapter(tmp_path, make_adapter(tiny_teacher), "depth", {})
    save_adapter(tmp_path / "a", make_adapter(tiny_teacher), "depth", {"depth_correlation": 0.5})
    assert load_adapter(tmp_path / "a")[1] == "depth"
    monkeypatch.setitem(SHIPPED, "adapter", {name: str(tmp_path / "b") for name in ("depth", "silhouette")})
    save_adapter(tmp_path / "b", make_adapter(tiny_teacher), "depth", {}, also=("silhouette",))
    names = ("depth", "silhouette", tmp_path / "b")
    assert [load_adapter(name)[1] for name in names] == ["depth", "silhouette", "depth"]
    monkeypatch.undo()
    figures = json.loads((tmp_path / "a" / "condition.json").read_text())["figures"]
    assert figures == {"depth_correlation": 0.5}
    assert adapter_input(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)).shape == (2, 3, 4, 4)
    shipped, _ = load_adapter("silhouette")
    with pytest.raises(UserError, match="belongs to another teacher .*in_channels 16 and 8"):
        controlled(tiny_teacher, [Control(shipped, disc())])


def test_an_adapter_of_another_teacher_is_taken_on_request(
    tmp_path: Path, tiny_teacher: LatentDiffusionTeacher
) -> None:
    """Where its shape fits: what transfers can be seen."""
    owner = TeacherIdentity("another", "0" * 16)
    save_adapter(tmp_path / "a", random_adapter(tiny_teacher, 1), "depth", {}, owner)
    with pytest.raises(UserError, match="another.*train one"):
        load_adapter(tmp_path / "a", tiny_teacher)
    save_png(tmp_path / "disc.png", disc()[0])
    options = ControlOptions(str(tmp_path / "a"), str(tmp_path / "disc.png"), any_teacher=True)
    teacher = controlled(tiny_teacher, [options.build(tiny_teacher)])
    x_t, t, text = (
        random(1, *tiny_teacher.latent_shape),
        torch.tensor([500]),
        tiny_teacher.encode_text(["a red cube"]),
    )
    with torch.no_grad():
        change = teacher.predict(x_t, t, text).eps - tiny_teacher.predict(x_t, t, text).eps
    assert float(change.abs().max()) > 1e-3


def test_scripts_train_probe_and_adapter_resume_and_evaluate(
    tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    world, probe = tmp_path / "world", tmp_path / "p" / "probe"
    sizes = ["world.train=24", "world.validation=4", "world.test=8", "world.supersample=1"]
    script("make_shapes", f"output={world}", *sizes)
    probe_options = ["run.steps=2", "run.trackers=[]", "probe.batch=4", "probe.width=8"]
    train_probe = [f"data={world}", f"run.directory={tmp_path / 'p'}", *probe_options]
    assert "has the depth of 0 of its 24 train images" in script("train_probe", *train_probe, code=2)
    assert not (tmp_path / "p").exists()

    script("make_shapes", f"output={world}", *sizes, "world.geometry=true")  # added to a world without it
    script("train_probe", *train_probe)
    figures = json.loads((probe / "probe.json").read_text())["metrics"]
    assert set(figures) == {"silhouette_iou", "depth_correlation"}

    inputs = [f"teacher={tiny_teacher_folder}", f"data={world}", f"probe={probe}"]
    small = [
        "run.trackers=[]",
        "run.steps=4",
        "adapter.batch=2",
        "adapter.validate_every=2",
        "adapter.validation={samples: 4, steps: 2}",
        "run.checkpoint_every=2",
        "run.log_every=1",
    ]
    for condition in ("depth", "edges"):
        directory = f"run.directory={tmp_path / condition}"
        script("train_controlnet", *inputs, f"condition={condition}", directory, *small)
        adapter, trained_on = load_adapter(tmp_path / condition / "adapter")
        assert trained_on == condition
        assert any(value.any() for value in adapter.controlnet_mid_block.parameters())
        result = json.loads((tmp_path / condition / "result.json").read_text())
        assert set(result["fidelity"]) == set(result["emergence_step"]) and result["fidelity"]
        assert (tmp_path / condition / "fidelity.png").is_file()

    # resumed from the second step, as after a kill
    (tmp_path / "depth" / "checkpoints" / "step_00000004.safetensors").unlink()
    before = load_adapter(tmp_path / "depth" / "adapter")[0].state_dict()
    script("train_controlnet", *inputs, "condition=depth", f"run.directory={tmp_path / 'depth'}", *small)
    after = load_adapter(tmp_path / "depth" / "adapter")[0].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    teacher = load_latent_diffusion(str(tiny_teacher_folder))
    assert not torch.equal(before["conv_in.weight"], teacher.unet.conv_in.weight)

    attributes = {"object": OBJECTS, "colour": tuple(COLOURS), "view": VIEWS}
    save_judge(Judge(attributes, JudgeOptions(tuple(attributes), width=8)), tmp_path / "judge", {})
    save_student(tmp_path / "s", Student.from_teacher(teacher, StudentOptions()), teacher)
    graded = [f"judge={tmp_path / 'judge'}", f"student={tmp_path / 's'}", f"output={tmp_path / 'e'}"]
    sizes = [f"adapter={tmp_path / 'depth' / 'adapter'}", "evaluation={samples: 6, steps: 2}"]
    script("evaluate_control", *inputs, *graded, *sizes)
    (path,) = (tmp_path / "e").glob("*.json")
    rows = {row["generator"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["true images", "teacher", "teacher, adapter", "student", "student, adapter"]
    assert all(0 <= row["silhouette_iou"] <= 1 for row in rows.values())
    assert all(abs(row["depth_correlation"]) <= 1 for row in rows.values())


def test_sample_script_with_a_student_and_an_adapter(
    tiny_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    save_student(tmp_path / "s", Student.from_teacher(tiny_teacher, StudentOptions()), tiny_teacher)
    save_adapter(tmp_path / "a", random_adapter(tiny_teacher, 0), "silhouette", {})
    save_png(tmp_path / "disc.png", disc()[0])
    arguments = [f"student={tmp_path / 's'}", "a red cube", "count=1", f"output={tmp_path / 'o'}"]
    control = f"{{adapter: {tmp_path / 'a'}, image: {tmp_path / 'disc.png'}}}"
    script("sample", *arguments, f"controls=[{control}]")
    result = np.asarray(Image.open(tmp_path / "o" / "samples.png"), dtype=np.float32)

    student, parts = load_student(tmp_path / "s")
    with_adapter = controlled_student(student, [Control(load_adapter(tmp_path / "a")[0], disc())])
    noise, conditioning = random(1, *parts.latent_shape), parts.encode_text(["a red cube"])

    def pixels(model: Student) -> np.ndarray:
        with torch.no_grad():
            image = parts.decode(model(noise, conditioning, torch.Generator()))[0]
        return 255 * image.permute(1, 2, 0).numpy()

    assert np.abs(result - pixels(with_adapter)).max() <= 1.5
    assert np.abs(result - pixels(student)).max() > 3
    error = script("sample", *arguments, "sweep=[1, 2]", code=2)
    assert "sweep: a student generates from noise and a prompt only" in error
