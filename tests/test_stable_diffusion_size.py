"""One step of each kind of experiment at Stable Diffusion 1.5's exact size, with random weights, on a CPU.

Minutes and up to 20 GiB each: python -m pytest -m slow tests/test_stable_diffusion_size.py
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from entry import load_experiment
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from distill.control.train import AdapterTrainer
from distill.one_step.trainer import OneStep
from distill.planning.one_step import placeholder_data
from distill.planning.teachers import meta_teacher
from distill.runtime.machine import peak_memory
from distill.runtime.run import Run, RunOptions
from distill.teacher.latent import LatentDiffusionTeacher
from sds3d.text_to_3d.trainer import TextTo3d

pytestmark = pytest.mark.slow
TERA = 1e12
# TFLOP of one view at 512 pixels: one pass of the U-Net, the VAE's encoder, and the encoder's gradient
NFE, ENCODER, ENCODER_GRADIENT = 0.8035, 1.117, 1.151
NETWORKS = ("UNet2DConditionModel", "Encoder", "Decoder")


def initialise(module: nn.Module) -> None:
    """Move a module from the meta device to host memory, with weights that keep activations finite."""
    module.to_empty(device="cpu")
    for child in module.modules():
        if isinstance(child, nn.GroupNorm | nn.LayerNorm):
            child.reset_parameters()
        elif isinstance(weight := getattr(child, "weight", None), Tensor):
            nn.init.uniform_(weight, -1, 1).div_(weight[0].numel() ** 0.5)
            if isinstance(bias := getattr(child, "bias", None), Tensor):
                nn.init.zeros_(bias)
    for name, buffer in module.named_buffers():
        assert name.endswith("position_ids")
        buffer.copy_(torch.arange(buffer.shape[-1]))


@pytest.fixture
def teacher() -> LatentDiffusionTeacher:
    """Stable Diffusion 1.5 with random weights: 860, 84 and 123 million."""
    torch.manual_seed(0)
    teacher = meta_teacher("stable-diffusion-v1-5/stable-diffusion-v1-5", torch.float32)
    modules = (teacher.unet, teacher.vae, teacher.text_encoder)
    with torch.no_grad():
        for module in modules:
            initialise(module)
    assert [sum(p.numel() for p in module.parameters()) // 10**6 for module in modules] == [859, 83, 123]
    return teacher


def preset_run(options: RunOptions, directory: Path) -> Run:
    """A preset's run, on the CPU in float32."""
    options = replace(options, directory=str(directory), trackers=(), device="cpu", precision="float32")
    return Run(options, {}, "size")


def work(step: Callable[[], Any]) -> tuple[Any, float]:
    """What a step returns, and the TFLOP of the networks in it."""
    # torch counts no work of the CPU's fused attention
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        result = step()
    counts = counter.get_flop_counts()
    for name in NETWORKS:
        print(f"{name}: {sum(counts.get(name, {}).values()) / TERA:.3f} TFLOP", file=sys.stderr)
    print(f"total {counter.get_total_flops() / TERA:.3f} TFLOP, {peak_memory()}", file=sys.stderr)
    return result, sum(sum(counts.get(name, {}).values()) for name in NETWORKS) / TERA


def test_step_of_score_distillation(teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    """DreamFusion's preset does the work of the floor, and updates the scene by a finite gradient."""
    recipe = load_experiment("sd15_dreamfusion", ["prompt=a red teapot"])
    run = preset_run(recipe.run, tmp_path / "run")
    trainer = TextTo3d(run, teacher, recipe.scene, recipe.objective, recipe.text_to_3d)
    before = [parameter.detach().clone() for parameter in trainer.scene.parameters()]
    views, tflop = work(partial(trainer.update, 0))

    after = list(trainer.scene.parameters())
    assert views.rgb.shape == (1, 3, 64, 64)
    assert all(bool(parameter.isfinite().all()) for parameter in after)
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert tflop == pytest.approx(2 * NFE + ENCODER + ENCODER_GRADIENT, rel=0.005)
    assert peak_memory()["peak_memory_mib"] < 12 * 1024  # 8.6 with fused attention


def test_step_of_score_distillation_with_sdxl(tmp_path: Path) -> None:
    """SDXL's exact size in bfloat16: one step through its preset, to a finite scene that has changed."""
    torch.manual_seed(0)
    teacher = meta_teacher("stabilityai/stable-diffusion-xl-base-1.0", torch.bfloat16)
    modules = (teacher.network, teacher.vae, *teacher.text_encoders)
    with torch.no_grad():
        for module in modules:
            initialise(module)
    millions = [sum(p.numel() for p in module.parameters()) // 10**6 for module in modules]
    assert millions == [2567, 83, 123, 694]
    recipe = load_experiment("sdxl_dreamfusion", ["prompt=a red teapot", "run.gradient_checkpointing=false"])
    run = preset_run(recipe.run, tmp_path / "run")
    trainer = TextTo3d(run, teacher, recipe.scene, recipe.objective, recipe.text_to_3d)
    before = [parameter.detach().clone() for parameter in trainer.scene.parameters()]
    views = trainer.update(0)
    after = list(trainer.scene.parameters())
    assert views.rgb.shape == (1, 3, 64, 64)
    assert all(bool(parameter.isfinite().all()) for parameter in after)
    assert not all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert peak_memory()["peak_memory_mib"] < 22 * 1024


def test_step_of_an_adapter(teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    """ControlNet's preset, one image: its zero convolutions learn, the teacher stays as it is."""
    recipe = load_experiment("sd15_controlnet", [])
    run = preset_run(recipe.run, tmp_path / "run")
    conditions = torch.randint(0, 255, (8, 1, 512, 512), dtype=torch.uint8)
    options = replace(recipe.adapter, batch=1, accumulate=1)
    frozen = {name: value.clone() for name, value in list(teacher.unet.state_dict().items())[::50]}
    trainer = AdapterTrainer(run, teacher, placeholder_data(teacher, 8), conditions, "edges", options)
    zeros = [*trainer.adapter.controlnet_down_blocks, trainer.adapter.controlnet_mid_block]
    assert not any(bool(layer.weight.any()) for layer in zeros)
    loss = trainer.step(0)

    assert bool(loss.isfinite())
    assert all(bool(layer.weight.any()) and bool(layer.weight.isfinite().all()) for layer in zeros)
    now = teacher.unet.state_dict()
    assert all(torch.equal(value, now[name]) for name, value in frozen.items())
    assert peak_memory()["peak_memory_mib"] < 20 * 1024


def test_cycle_of_dmd2(
    teacher: LatentDiffusionTeacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DMD2's preset with one update of the critic and a batch of one: both networks change and stay finite.

    Adam's moments of both would not fit beside their weights and gradients here: plain gradient descent.
    """
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=1e-4)
    )
    recipe = load_experiment("sd15_dmd2", ["method.objective.critic.updates=1", "method.gan=null"])
    run = preset_run(recipe.run, tmp_path / "run")
    options = replace(recipe.distill, batch=1, accumulate=1)
    trainer = OneStep(run, teacher, placeholder_data(teacher, 1), recipe.method, options, None)
    critic = trainer.method.critic
    assert critic is not None
    networks = [trainer.student.denoiser.network, critic.denoiser.network]
    first = [next(network.parameters()) for network in networks]
    before = [value.detach().clone() for value in first]
    metrics, finite = trainer.cycle(0)

    assert finite and {"g", "critic"} <= metrics.keys()
    for network, value, old in zip(networks, first, before, strict=True):
        assert not torch.equal(value, old)
        assert all(bool(parameter.isfinite().all()) for parameter in network.parameters())
