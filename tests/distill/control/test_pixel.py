"""Adapters of teachers of pixels: of classes (`UNet2DModel`) and of contexts (`UNet2DConditionModel`)."""

from pathlib import Path

import pytest
import torch
from command_line import script
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DConditionModel, UNet2DModel
from torch import Tensor, nn

from distill.control.adapter import controlled, load_adapter, make_adapter, save_adapter
from distill.control.network import AdapterNetwork, Control
from distill.control.pixel import PixelControlNet, make_pixel_adapter
from distill.control.train import AdapterOptions, AdapterTrainer
from distill.data.latents import LatentCache
from distill.data.sources.source import FolderOptions, ImageSource, Item, write_dataset
from distill.one_step.student import Student, StudentOptions
from distill.runtime.errors import UserError
from distill.runtime.run import Run, RunOptions
from distill.teacher.contexts import ContextTeacher
from distill.teacher.pipeline import PipelineTeacher
from distill.teacher.pixel_networks import ContextUnet
from distill.teacher.pixels import CONDITIONING, ClassTeacher

BLOCKS = {
    "block_out_channels": (8, 16),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,
    "norm_num_groups": 4,
}


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def class_unet() -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(sample_size=8, in_channels=1, out_channels=1, num_class_embeds=4, **BLOCKS)


def class_teacher() -> ClassTeacher:
    return ClassTeacher(DDIMPipeline(class_unet(), DDIMScheduler()), "classes", null_class=3)


def context_teacher(network: nn.Module | None = None) -> ContextTeacher:
    torch.manual_seed(0)
    unet = network or UNet2DConditionModel(
        sample_size=8, in_channels=1, out_channels=1, mid_block_type="UNetMidBlock2D",
        class_embed_type="projection", projection_class_embeddings_input_dim=2, **BLOCKS,
    )  # fmt: skip
    return ContextTeacher(DDIMPipeline(unet, DDIMScheduler()), ["a", "b"], "contexts")


TEACHERS = {"class": (class_teacher, ["1", "2"]), "context": (context_teacher, ["a", "0.5 b"])}


def with_random_zeros(adapter: AdapterNetwork) -> AdapterNetwork:
    with torch.no_grad():
        for parameter in adapter.parameters():
            if not parameter.any():
                parameter.copy_(0.2 * random(*parameter.shape, seed=1))
    return adapter.eval().requires_grad_(False)


@pytest.mark.parametrize("kind", TEACHERS)
def test_an_untrained_adapter_changes_nothing_and_a_trained_one_does(kind: str) -> None:
    make, prompts = TEACHERS[kind]
    teacher, image = make(), random(2, 3, 8, 8, seed=2).sigmoid()
    x_t, t, conditioning = random(2, 1, 8, 8), torch.tensor([700, 20]), teacher.encode_text(prompts)
    with torch.no_grad():
        eps = teacher.predict(x_t, t, conditioning).eps
        adapter = make_adapter(teacher)
        untrained = controlled(teacher, [Control(adapter, image)])
        assert torch.equal(untrained.predict(x_t, t, conditioning).eps, eps)
        trained = controlled(teacher, [Control(with_random_zeros(adapter), image)])
        changed = trained.predict(x_t, t, conditioning).eps
        assert float((changed - eps).abs().max()) > 1e-3
        other = controlled(teacher, [Control(adapter, image.flip(0))]).predict(x_t, t, conditioning).eps
        assert float((changed - other).abs().max()) > 1e-4  # it reads the image
        late = controlled(teacher, [Control(adapter, image, start=0.9)]).predict(x_t, t, conditioning).eps
        torch.testing.assert_close(late[0], eps[0])  # outside of its range at t = 700
        torch.testing.assert_close(late[1], changed[1])
        assert torch.equal(teacher.predict(x_t, t, conditioning).eps, eps)  # no hook is left


def test_the_adapter_is_the_encoder_half_of_the_network() -> None:
    """With zero convolutions of the identity it returns the network's own skips and middle block."""
    network, skips, middle = class_unet(), [], []
    adapter = make_pixel_adapter(network)
    with torch.no_grad():
        for zero in (*adapter.zero_down, adapter.zero_mid):
            zero.weight.copy_(torch.eye(zero.in_channels)[:, :, None, None])
    for block in network.up_blocks:
        block.register_forward_pre_hook(lambda module, inputs: skips.extend(reversed(inputs[1])))
    network.mid_block.register_forward_hook(lambda module, inputs, output: middle.append(output))
    x_t, t, labels = random(2, 1, 8, 8), torch.tensor([700, 20]), torch.tensor([1, 2])
    with torch.no_grad():
        network(x_t, t, class_labels=labels)
        output = adapter(x_t, t, controlnet_cond=torch.zeros(2, 3, 8, 8), class_labels=labels)
    torch.testing.assert_close(output.mid_block_res_sample, middle[0])
    for ours, theirs in zip(output.down_block_res_samples, reversed(skips), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_residuals_are_added_where_the_decoder_reads_them() -> None:
    """As in `UNet2DConditionModel`: adding minus a skip makes the decoder read zeros in its place."""
    teacher = class_teacher()
    adapter = make_pixel_adapter(teacher.network)
    with torch.no_grad():
        for zero in adapter.zero_down:
            zero.weight.copy_(-torch.eye(zero.in_channels)[:, :, None, None])
    inputs_of_resnets: list[Tensor] = []
    for block in teacher.network.up_blocks:  # before those of the control, so read what resnets get
        for resnet in block.resnets:
            resnet.register_forward_pre_hook(lambda module, inputs: inputs_of_resnets.append(inputs[0]))
    model = controlled(teacher, [Control(adapter, torch.zeros(1, 3, 8, 8))])
    with torch.no_grad():
        model.predict(random(2, 1, 8, 8), torch.tensor([700, 20]), teacher.encode_text(["1", "2"]))
    widths = [skip.out_channels for skip in reversed(adapter.zero_down)]
    assert len(inputs_of_resnets) == len(widths)
    for features, width in zip(inputs_of_resnets, widths, strict=True):
        torch.testing.assert_close(features[:, -width:], torch.zeros_like(features[:, -width:]))
        assert features[:, :-width].any()


def test_the_last_residual_is_added_to_the_middle_block() -> None:
    """Minus the middle block's own output: the decoder starts from zeros, with skips as they are."""
    teacher = class_teacher()
    adapter = make_pixel_adapter(teacher.network)
    with torch.no_grad():
        adapter.zero_mid.weight.copy_(-torch.eye(adapter.zero_mid.in_channels)[:, :, None, None])
    inputs_of_first: list[Tensor] = []
    first = teacher.network.up_blocks[0].resnets[0]
    first.register_forward_pre_hook(lambda module, inputs: inputs_of_first.append(inputs[0]))
    model = controlled(teacher, [Control(adapter, torch.zeros(1, 3, 8, 8))])
    with torch.no_grad():
        model.predict(random(2, 1, 8, 8), torch.tensor([700, 20]), teacher.encode_text(["1", "2"]))
    features, skip = inputs_of_first[0].split(adapter.zero_mid.out_channels, 1)
    torch.testing.assert_close(features, torch.zeros_like(features))
    assert skip.any()


@pytest.mark.parametrize("kind", TEACHERS)
def test_folders_and_training(kind: str, tmp_path: Path) -> None:
    """Two steps change the adapter alone; it is saved and loaded, and refused by another network."""
    make, prompts = TEACHERS[kind]
    teacher = make()
    cache = LatentCache(random(4, 1, 8, 8), teacher.encode_text([*prompts, ""]), torch.tensor([0, 1, 0, 1]))
    conditions = (255 * random(4, 1, 8, 8).sigmoid()).byte()
    options = RunOptions(str(tmp_path / "run"), 2, trackers=(), gradient_checkpointing=True)
    run = Run(options, {}, "adapter")
    trainer = AdapterTrainer(run, teacher, cache, conditions, "edges", AdapterOptions(batch=3))
    before = {name: value.clone() for name, value in teacher.network.state_dict().items()}
    adapter = trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in teacher.network.state_dict().items())
    assert adapter.state_dict()[zero_weight(adapter)].any()

    save_adapter(tmp_path / "adapter", adapter, "edges", {})
    loaded, condition = load_adapter(tmp_path / "adapter", teacher)
    assert condition == "edges" and type(loaded) is type(adapter)
    image = random(1, 3, 8, 8).sigmoid()
    x_t, t, conditioning = random(1, 1, 8, 8), torch.tensor([700]), teacher.encode_text(prompts[:1])
    with torch.no_grad():
        expected, output = (
            controlled(teacher, [Control(own, image)]).predict(x_t, t, conditioning).eps
            for own in (adapter, loaded)
        )
        torch.testing.assert_close(output, expected, atol=2e-3, rtol=0)  # fp16 in the folder
        student = Student.from_teacher(teacher, StudentOptions())
        assert student(x_t, conditioning, torch.Generator()).shape == x_t.shape
    other = TEACHERS["context" if kind == "class" else "class"][0]()
    with pytest.raises(UserError, match="belongs to another teacher .*num_class_embeds"):
        controlled(other, [Control(loaded, image)])


def zero_weight(adapter: AdapterNetwork) -> str:
    name = "zero_mid.weight" if isinstance(adapter, PixelControlNet) else "controlnet_mid_block.weight"
    assert name in adapter.state_dict()
    return name


def test_networks_without_adapters_are_named() -> None:
    network = ContextUnet(8, 1, 1, 8, 2)
    teacher: PipelineTeacher = context_teacher(network)
    with pytest.raises(UserError, match="no adapters of a ContextUnet, which contexts has"):
        make_adapter(teacher)
    with pytest.raises(UserError, match="Fourier or learned time"):
        make_pixel_adapter(UNet2DModel(time_embedding_type="fourier", **BLOCKS))


class Squares(ImageSource):
    """Light squares on dark, of classes 0 and 1."""

    @property
    def licence(self) -> str:
        return "none"

    def items(self, cache: Path) -> list[Item]:
        images = torch.zeros(8, 8, 8, 3, dtype=torch.uint8)
        images[:, 2:6, 2:6] = 255
        rows = [{"text": f"square {index % 2}", "label": index % 2} for index in range(8)]
        splits = ["train"] * 4 + ["validation"] * 2 + ["test"] * 2
        return [Item(*facts) for facts in zip(images.numpy(), rows, splits, strict=True)]


def test_scripts_train_and_evaluate_an_adapter_of_classes(tmp_path: Path) -> None:
    """Prompts are the rows' classes, not their captions."""
    write_dataset(Squares(), tmp_path / "data", FolderOptions(), tmp_path)
    teacher = tmp_path / "teacher"
    DDIMPipeline(class_unet(), DDIMScheduler()).save_pretrained(teacher)
    facts = '{"kind": "class", "names": ["zero", "one"], "column": "label", "null_class": 3}'
    (teacher / CONDITIONING).write_text(facts)
    names = [f"teacher={teacher}", f"data={tmp_path / 'data'}", "probe=null"]
    run = f"run.directory={tmp_path / 'run'}"
    script("train_controlnet", *names, "condition=edges", "run.steps=2", "adapter.batch=2", run)
    sizes = ["evaluation.samples=2", "evaluation.steps=2"]
    output = tmp_path / "figures"
    script(
        "evaluate_control", *names, "judge=null", f"adapter={tmp_path / 'run' / 'adapter'}", *sizes,
        f"output={output}",
    )  # fmt: skip
    assert len(list(output.glob("*.json"))) == 1
