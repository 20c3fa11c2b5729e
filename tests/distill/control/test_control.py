"""Adapters: silent before training, nothing else moves, the stock pipeline's image, several of them, conditions and their readings."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import script
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from PIL import Image
from torch import Tensor

from distill.control.adapter import (
    Control,
    controlled,
    controlled_student,
    load_adapter,
    make_adapter,
    save_adapter,
)
from distill.control.conditions import as_input, beside, edges, of_images, scribbles
from distill.control.train import AdapterOptions, AdapterTraining, adapter_loss
from distill.data.folders import CaptionedImages
from distill.data.latents import LatentCache
from distill.evaluation.control import ControlEvaluationOptions, teacher_sampler
from distill.evaluation.fidelity import fidelity, jump, line_f1, overlap, rank_correlation
from distill.evaluation.judge import Judge, JudgeOptions, save_judge
from distill.evaluation.probe import Probe, ProbeOptions, depth_loss
from distill.one_step.folder import load_student, save_student
from distill.one_step.student import Student, StudentOptions
from distill.runtime.errors import UserError
from distill.runtime.images import save_png
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import Teacher
from sds3d.text_to_3d.prompts import VIEWS
from sds3d.world.shapes import COLOURS, OBJECTS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def woken(teacher: Teacher, seed: int) -> ControlNetModel:
    """An adapter whose zero convolutions are not zero."""
    adapter = make_adapter(teacher)
    with torch.no_grad():
        for name, value in adapter.named_parameters():
            if "controlnet_" in name or name.startswith("controlnet_cond_embedding.conv_out"):
                value.copy_(0.2 * random(*value.shape, seed=seed))
    return adapter.eval()


def disc(count: int = 1) -> Tensor:
    """A white disc, (count, 3, 64, 64)."""
    rows, columns = torch.meshgrid(torch.arange(64), torch.arange(64), indexing="ij")
    inside = ((rows - 32) ** 2 + (columns - 28) ** 2 < 300).float()
    return inside.expand(count, 3, 64, 64).clone()


def test_an_untrained_adapter_leaves_the_teacher_bit_for_bit(tiny_teacher: Teacher) -> None:
    x_t, t = random(2, *tiny_teacher.latent_shape), torch.tensor([700, 20])
    states = tiny_teacher.encode_text(["a red cube", "a blue duck"])
    with torch.no_grad():
        plain = tiny_teacher.predict(x_t, t, states).eps
        silent = controlled(tiny_teacher, [Control(make_adapter(tiny_teacher), disc())])
        assert torch.equal(silent.predict(x_t, t, states).eps, plain)
        loud = controlled(tiny_teacher, [Control(woken(tiny_teacher, 1), disc())])
        assert float((loud.predict(x_t, t, states).eps - plain).abs().max()) > 1e-3
        assert torch.equal(
            tiny_teacher.predict(x_t, t, states).eps, plain
        )  # the teacher itself is left as it was


def test_only_the_adapter_moves_and_every_zero_convolution_learns(
    tiny_teacher: Teacher, tmp_path: Path
) -> None:
    latents, states = random(6, *tiny_teacher.latent_shape), tiny_teacher.encode_text(["a red cube", ""])
    cache = LatentCache(latents, states, torch.zeros(6, dtype=torch.long))
    run = Run(RunOptions(str(tmp_path), 2, trackers=()), {}, "adapter")
    training = AdapterTraining(
        run, tiny_teacher, cache, disc(6).mul(255).byte(), "silhouette", AdapterOptions(batch=3)
    )
    before = {name: value.clone() for name, value in tiny_teacher.unet.state_dict().items()}
    zero = [
        (name, value)
        for name, value in training.adapter.named_parameters()
        if "controlnet_down" in name or "controlnet_mid" in name or "cond_embedding.conv_out" in name
    ]
    assert len(zero) > 8 and not any(value.any() for _, value in zero)
    training.step(0)
    assert all(torch.equal(value, before[name]) for name, value in tiny_teacher.unet.state_dict().items())
    outer = [name for name, value in zero if not value.any()]
    assert outer == [
        name for name, _ in zero if "cond_embedding" in name
    ]  # behind the others it hears of the loss when they have opened
    training.step(1)
    assert all(value.any() for _, value in zero)
    batch = (
        latents[:2],
        random(2, *latents.shape[1:], seed=1),
        torch.tensor([500, 100]),
        states[:1].expand(2, -1, -1),
    )
    adapter_loss(tiny_teacher, training.adapter, batch, disc(2)).backward()
    assert all(value.grad is None for value in tiny_teacher.unet.parameters())


@pytest.mark.parametrize("count", [1, 2])
def test_the_stock_pipeline_draws_the_same_image(
    count: int, tiny_teacher: Teacher, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    """One adapter, and two with weights of their own, each for a part of the steps."""
    acting = [(0.8, 0.0, 1.0), (0.5, 0.25, 0.75)][:count]
    places = [tmp_path / f"a{number}" for number in range(count)]
    for number, place in enumerate(places):
        save_adapter(place, woken(tiny_teacher, number), "silhouette", {})
    loaded = [load_adapter(place)[0] for place in places]
    controls = [Control(adapter, disc(), *acts) for adapter, acts in zip(loaded, acting, strict=True)]
    noise, draw = (
        random(1, *tiny_teacher.latent_shape),
        teacher_sampler(tiny_teacher, ControlEvaluationOptions(steps=4, guidance=2.0)),
    )
    ours = tiny_teacher.decode(draw(controls, tiny_teacher.encode_text(["a red cube"]), noise))
    stock = [ControlNetModel.from_pretrained(place, torch_dtype=torch.float32) for place in places]
    pipeline = StableDiffusionControlNetPipeline.from_pretrained(
        tiny_teacher_folder, controlnet=stock if count > 1 else stock[0]
    )
    pipeline.set_progress_bar_config(disable=True)
    told = pipeline(
        "a red cube",
        image=[disc()] * count if count > 1 else disc(),
        latents=noise,
        num_inference_steps=4,
        guidance_scale=2.0,
        controlnet_conditioning_scale=[w for w, _, _ in acting] if count > 1 else acting[0][0],
        control_guidance_start=[s for _, s, _ in acting] if count > 1 else 0.0,
        control_guidance_end=[e for _, _, e in acting] if count > 1 else 1.0,
        output_type="pt",
    ).images
    torch.testing.assert_close(told.float(), ours, atol=1e-3, rtol=0)
    alone = tiny_teacher.decode(draw([], tiny_teacher.encode_text(["a red cube"]), noise))
    assert float((ours - alone).abs().max()) > 5e-3  # the comparison can see the adapters


def test_a_control_acts_in_its_share_only(tiny_teacher: Teacher) -> None:
    control = Control(make_adapter(tiny_teacher), disc(), 0.5, 0.25, 0.75)
    told = (
        control.weights(torch.tensor([999, 749, 499, 249]), 1000).flatten().tolist()
    )  # four trailing steps: 0, 1/4, 1/2, 3/4 done
    assert told == [0.0, 0.5, 0.5, 0.0]
    with pytest.raises(UserError, match="two shares of the denoising"):
        Control(control.adapter, disc(), 1.0, 0.8, 0.3)
    with pytest.raises(UserError, match="cannot serve a batch of 3"):
        Control(control.adapter, disc(2)).seen(3)


def test_conditions_made_of_an_image() -> None:
    images = torch.full((1, 4, 64, 64), 255, dtype=torch.uint8)
    images[:, :3] = (disc() * 200).byte()
    images[:, 3:] = (disc()[:, :1] * 255).byte()
    data = CaptionedImages(images, [{"file_name": "a.png", "text": "a disc"}])
    assert torch.equal(of_images("silhouette", "x", data), images[:, 3:])
    lines = edges(data.composite(slice(None)))
    ring = (lines[0, 0] > 0).nonzero().float() - torch.tensor([32.0, 28.0])
    assert (
        60 < len(ring) < 200 and float((ring.norm(dim=1) - 300**0.5).abs().max()) < 3
    )  # a circle where the disc ends
    assert (scribbles(data.composite(slice(None))) > 0).sum() > 2 * (lines > 0).sum()
    with pytest.raises(UserError, match="none of silhouette, edges, scribble, folder"):
        of_images("pose", "x", data)
    with pytest.raises(UserError, match="alpha channel"):
        of_images("silhouette", "x", CaptionedImages(images[:, :3], data.rows))


def test_a_folder_with_a_conditioning_column(tmp_path: Path) -> None:
    Image.fromarray(np.full((64, 64, 3), 77, np.uint8)).save(tmp_path / "c.png")
    data = CaptionedImages(
        torch.zeros(1, 3, 64, 64, dtype=torch.uint8),
        [{"file_name": "a.png", "text": "x", "conditioning_image": "c.png"}],
    )
    assert torch.equal(beside(tmp_path, data), torch.full((1, 3, 64, 64), 77, dtype=torch.uint8))
    with pytest.raises(UserError, match="a.png has no conditioning_image"):
        beside(tmp_path, CaptionedImages(data.images, [{"file_name": "a.png", "text": "x"}]))


def test_fidelity_by_hand() -> None:
    left, wide = torch.zeros(1, 1, 8, 8, dtype=torch.bool), torch.zeros(1, 1, 8, 8, dtype=torch.bool)
    left[..., :4], wide[..., :8] = True, True
    assert float(overlap(left, wide)) == 0.5 and float(overlap(left & ~left, left & ~left)) == 1.0
    ramp = torch.arange(64.0).reshape(1, 1, 8, 8)
    assert float(rank_correlation(ramp**3, ramp, wide)) == pytest.approx(1.0)
    assert float(rank_correlation(-ramp, ramp, wide)) == pytest.approx(-1.0)
    line, near, far = (torch.zeros(1, 1, 8, 8, dtype=torch.bool) for _ in range(3))
    line[..., 2], near[..., 3], far[..., 6] = True, True, True
    assert float(line_f1(near, line)) == pytest.approx(1.0) and float(line_f1(far, line)) == 0.0
    assert float(line_f1(near | far, line)) == pytest.approx(2 / 3)
    assert jump([0, 200, 400, 600], [0.3, 0.32, 0.8, 0.9]) == 400 and jump([0, 200], [0.3, 0.31]) is None


def test_depth_is_compared_where_both_have_an_object() -> None:
    """A probe that sees the upper half with depth falling to the right, and the condition's left half: the shared quarter counts."""

    class Fixed(Probe):
        def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
            rows, columns = torch.arange(64.0)[:, None].expand(64, 64), torch.arange(64.0).expand(64, 64)
            deep = torch.where(rows < 32, -columns, 1000.0)
            return (32 - rows - 0.5)[None, None].expand(len(images), 1, 64, 64), deep.expand(
                len(images), 1, 64, 64
            )

    picture = torch.zeros(1, 1, 64, 64, dtype=torch.uint8)
    picture[..., :32] = 200 - 2 * torch.arange(32, dtype=torch.uint8)
    told = fidelity("depth", torch.zeros(1, 3, 64, 64), picture, Fixed(ProbeOptions(width=4)))
    assert float(told["depth_correlation"]) == pytest.approx(1.0) and float(
        told["silhouette_iou"]
    ) == pytest.approx(1 / 3)


def test_the_depth_loss_forgives_most_of_a_shift() -> None:
    true, mask = random(2, 1, 8, 8), torch.zeros(2, 1, 8, 8)
    mask[:, :, 2:6, 2:6] = 1
    assert float(depth_loss(true, true, mask)) == 0
    shifts = torch.tensor([0.5, -0.3])[:, None, None, None]
    assert float(depth_loss(true + shifts, true, mask)) == pytest.approx(0.1 * 0.4, abs=1e-6)
    assert float(depth_loss(true + 9 * (1 - mask), true, mask)) == pytest.approx(
        0.0, abs=1e-6
    )  # outside nothing counts
    stripes = torch.tensor([1.0, -1.0]).repeat(4)  # 1 from the mean; 2 at each of 12 of 16 inner neighbours
    assert float(depth_loss(true + stripes, true, mask)) == pytest.approx(1 + 2 * 12 / 16, abs=1e-5)


def test_an_adapter_of_nowhere_is_one_sentence(tmp_path: Path, tiny_teacher: Teacher) -> None:
    with pytest.raises(UserError, match="is no adapter: give silhouette, depth"):
        load_adapter(tmp_path / "none")
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="something other than an adapter"):
        save_adapter(tmp_path, make_adapter(tiny_teacher), "depth", {})
    save_adapter(tmp_path / "a", make_adapter(tiny_teacher), "depth", {"depth_correlation": 0.5})
    assert load_adapter(tmp_path / "a")[1] == "depth"
    assert json.loads((tmp_path / "a" / "condition.json").read_text())["figures"] == {
        "depth_correlation": 0.5
    }
    assert as_input(torch.full((2, 1, 4, 4), 51, dtype=torch.uint8)).shape == (2, 3, 4, 4)


def test_the_scripts_train_probe_and_adapter_and_resume(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    world = tmp_path / "world"
    sizes = ["world.train=24", "world.validation=4", "world.test=8", "world.supersample=1"]
    script("make_shapes", f"output={world}", *sizes)
    probing = [
        f"data={world}",
        f"run.directory={tmp_path / 'p'}",
        "run.steps=2",
        "run.trackers=[]",
        "probe.batch=4",
        "probe.width=8",
    ]
    assert "has the depth of 0 of its 24 train images" in script("train_probe", *probing, code=2)
    assert not (tmp_path / "p").exists()
    script("make_shapes", f"output={world}", *sizes, "world.geometry=true")  # added to a world that has none
    script("train_probe", *probing)
    figures = json.loads((tmp_path / "p" / "probe" / "probe.json").read_text())["metrics"]
    assert set(figures) == {"silhouette_iou", "depth_correlation"}
    where = [
        f"teacher={tiny_teacher_folder}",
        f"data={world}",
        f"probe={tmp_path / 'p' / 'probe'}",
        "run.trackers=[]",
    ]
    small = [
        "adapter.batch=2",
        "adapter.validate_every=2",
        "adapter.validation={samples: 4, steps: 2}",
        "run.checkpoint_every=2",
        "run.log_every=1",
    ]
    for condition in ("depth", "edges"):
        script(
            "train_controlnet",
            *where,
            f"condition={condition}",
            f"run.directory={tmp_path / condition}",
            "run.steps=4",
            *small,
        )
        adapter, told = load_adapter(tmp_path / condition / "adapter")
        assert told == condition and any(value.any() for value in adapter.controlnet_mid_block.parameters())
        result = json.loads((tmp_path / condition / "result.json").read_text())
        assert set(result["fidelity"]) == set(result["learnt_to_obey_at"]) and result["fidelity"]
        assert (tmp_path / condition / "fidelity.png").is_file()
    (
        tmp_path / "depth" / "checkpoints" / "step_00000004.safetensors"
    ).unlink()  # as if killed after the second step
    again = [f"run.directory={tmp_path / 'depth'}", "condition=depth", "run.steps=4"]
    before = load_adapter(tmp_path / "depth" / "adapter")[0].state_dict()
    script("train_controlnet", *where, *again, *small)
    after = load_adapter(tmp_path / "depth" / "adapter")[0].state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not torch.equal(
        before["conv_in.weight"], Teacher.load(str(tiny_teacher_folder)).unet.conv_in.weight
    )
    save_judge(
        Judge({"object": OBJECTS, "colour": tuple(COLOURS), "view": VIEWS}, JudgeOptions(width=8)),
        tmp_path / "judge",
        {},
    )
    save_student(
        tmp_path / "s",
        Student.of(Teacher.load(str(tiny_teacher_folder)), StudentOptions()),
        Teacher.load(str(tiny_teacher_folder)),
    )
    given = [
        *where[:3],
        f"judge={tmp_path / 'judge'}",
        f"student={tmp_path / 's'}",
        "evaluation={samples: 6, steps: 2}",
    ]
    script(
        "evaluate_control", *given, f"adapter={tmp_path / 'depth' / 'adapter'}", f"output={tmp_path / 'e'}"
    )
    (path,) = (tmp_path / "e").glob("*.json")
    rows = {row["generator"]: row for row in json.loads(path.read_text())["rows"]}
    assert list(rows) == ["true images", "teacher", "teacher, adapter", "student", "student, adapter"]
    assert all(
        0 <= row["silhouette_iou"] <= 1 and abs(row["depth_correlation"]) <= 1 for row in rows.values()
    )


def test_the_sample_script_draws_a_student_through_an_adapter(tiny_teacher: Teacher, tmp_path: Path) -> None:
    save_student(tmp_path / "s", Student.of(tiny_teacher, StudentOptions()), tiny_teacher)
    save_adapter(tmp_path / "a", woken(tiny_teacher, 0), "silhouette", {})
    save_png(tmp_path / "disc.png", disc()[0])
    given = [f"student={tmp_path / 's'}", "a red cube", "count=1", f"output={tmp_path / 'o'}"]
    script("sample", *given, f"controls=[{{adapter: {tmp_path / 'a'}, picture: {tmp_path / 'disc.png'}}}]")
    drawn = np.asarray(Image.open(tmp_path / "o" / "samples.png"), dtype=np.float32)
    student, parts = load_student(tmp_path / "s")
    noise = torch.randn(1, *parts.latent_shape, generator=torch.Generator().manual_seed(0))
    seen = controlled_student(student, [Control(load_adapter(tmp_path / "a")[0], disc())])
    with torch.no_grad():
        images = [
            parts.decode(one(noise, parts.encode_text(["a red cube"]), torch.Generator()))[0]
            for one in (seen, student)
        ]
    wanted, plain = (255 * image.permute(1, 2, 0).numpy() for image in images)
    assert np.abs(drawn - wanted).max() <= 1.5 and np.abs(drawn - plain).max() > 3
    assert "sweep: a student draws from noise and a prompt, at once" in script(
        "sample", *given, "sweep=[1, 2]", code=2
    )
