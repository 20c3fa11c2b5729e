"""Plans beside the real steps that they predict, on the shipped teacher."""

import random
from dataclasses import replace

import numpy as np
import pytest
import torch
from entry import load_script
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from distill.planning.check import check
from distill.planning.control import adapter_subject
from distill.planning.hardware import CARDS, GIB, Machine, card
from distill.planning.one_step import one_step_subject
from distill.planning.operations import Record
from distill.planning.plan import groups, make_plan, temporary_run
from distill.planning.recorder import MetaRecorder
from distill.planning.report import Report, hours
from distill.planning.start import plan_start, require_memory, work
from distill.runtime.errors import UserError
from distill.teacher.load import load_teacher, require_latent
from sds3d.planning import text_to_3d_subject

aten = torch.ops.aten


def product(a, b, *_, **__):
    """A sparse product is none to count: the field's table is read with it."""
    return 2 * a.shape[0] * a.shape[1] * b.shape[1] if a.layout == torch.strided else 0


product._get_raw = True
FORMULAS = {
    aten.mm: product,
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: (
        lambda _, q, k, v, *__, **___: 2 * sdpa_flop_count(q, k, v)
    ),
}
SMALL_SCENE = ["prompt=a red teapot", "run.steps=20", "text_to_3d.views=2", "scene.render.samples=24"]


def subject_of(script: str, *arguments: str):
    config = load_script(script, ["run.device=cpu", *arguments])
    if script == "train_controlnet":
        return adapter_subject(config.teacher, config.adapter, config.run)
    return one_step_subject(config) if script == "distill_one_step" else text_to_3d_subject(config)


def real_flops(subject) -> list[float]:
    """Of each job of a subject on the CPU, by torch's own counter."""
    with temporary_run(subject.run) as run:
        trial = subject.prepare(run, require_latent(load_teacher(subject.teacher)))
        trial.warm_up()
        counts = []
        for job in trial.jobs:
            if job.count > 0:
                with FlopCounterMode(display=False, custom_mapping=FORMULAS) as counter:
                    job.step()
                counts.append(float(counter.get_total_flops()))
    return counts


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("distill_one_step", ["method=dmd2", "distill.batch=4"]),
        ("distill_one_step", ["method=sid", "distill.batch=4"]),
        ("distill_one_step", ["method=consistency", "distill.batch=4"]),
        ("train_controlnet", ["adapter.batch=4"]),
        ("text_to_3d", [*SMALL_SCENE, "objective=sds"]),
        ("text_to_3d", [*SMALL_SCENE, "objective=sds_pixels"]),
        ("text_to_3d", [*SMALL_SCENE, "objective=vsd"]),
    ],
    ids=lambda value: value if isinstance(value, str) else value[-1],
)
def test_work_of_a_step_equals_the_real_one(script, arguments):
    few = ["distill.monitor.captions=4"] if script == "distill_one_step" else []
    subject = subject_of(script, *arguments, *few)
    plan = make_plan(subject, torch.float32)
    real = real_flops(subject)
    assert len(real) == len(plan.phases)
    for phase, flops in zip(plan.phases, real, strict=True):
        # without networks, rays count alone: their samples differ from scene to scene
        tolerance = 0.05 if phase.record.samples else 0.3
        assert phase.record.flops == pytest.approx(flops, rel=tolerance), phase.name


def test_nothing_random_changes():
    torch.manual_seed(3)
    expected = torch.rand(1), random.Random(3).random()
    torch.manual_seed(3)
    random.seed(3)
    np.random.seed(3)
    make_plan(subject_of("distill_one_step", "method=sid", "distill.batch=2"), torch.float32)
    assert torch.equal(torch.rand(1), expected[0]) and random.random() == expected[1]


def test_half_precision_and_checkpointing_need_less_memory():
    arguments = ["method=sid", "distill.batch=64"]
    full = make_plan(subject_of("distill_one_step", *arguments), torch.float32)
    half = make_plan(subject_of("distill_one_step", *arguments), torch.bfloat16)
    again = [*arguments, "run.gradient_checkpointing=true"]
    recomputed = make_plan(subject_of("distill_one_step", *again), torch.float32)
    activations = [plan.peak - plan.weights - plan.states for plan in (full, half, recomputed)]
    assert activations[1] < 0.8 * activations[0] and activations[2] < 0.8 * activations[0]
    assert half.weights < full.weights and recomputed.flops > 1.1 * full.flops


def test_steps_of_equal_work_are_measured_once():
    assert groups(range(10), lambda step: step < 3) == [(2, 3), (9, 7)]


def test_roofline():
    with MetaRecorder() as recorder, recorder.measured() as record:
        a = torch.empty(4096, 4096, device="meta", dtype=torch.bfloat16)
        _ = a @ a
    (operation,) = (operation for _, _, operation in record.operations if operation.flops)
    h100 = card("h100")
    assert operation.flops == 2 * 4096**3
    assert h100.floor(record) == pytest.approx(operation.flops / 989.5e12)
    assert h100.seconds(operation) == pytest.approx(operation.flops / 989.5e12 / 0.6)
    slow = Machine("slow", 1e12, 1e12, 1.0, 0)  # bytes a second
    assert slow.seconds(operation) == pytest.approx(3 * 2 * 4096**2 / 0.8)
    assert Machine("here", 1, 1, 1, 0, measured={operation: 0.25}).seconds(operation) == 0.25


def test_dense_rates_of_the_cards():
    """Half of what the data sheets print with sparsity; TF32 is half of bf16 on all of them."""
    rates = {name: round(machine.half / 1e12) for name, machine in CARDS.items()}
    assert rates == {"h100": 990, "h200": 990, "a100": 312, "4090": 165}
    assert all(machine.single == pytest.approx(machine.half / 2, rel=0.01) for machine in CARDS.values())
    with pytest.raises(UserError, match="machine is 'tpu': expected here or one of h100, h200, a100, 4090"):
        card("tpu")


def test_report_of_a_plan_that_does_not_fit():
    plan = make_plan(subject_of("distill_one_step", "method=sid", "distill.batch=2"), torch.bfloat16)
    report = Report(plan, card("4090"), "distill.batch")
    text, values = str(report), report.as_json()
    assert "student, backward" in text and "3000 steps on 4090" in text and report.fits
    assert sum(row["tflop"] for row in values["components"]) == pytest.approx(plan.flops / 1e12)
    assert values["floor_seconds"] < values["seconds"]
    tiny = Report(plan, replace(card("4090"), memory=GIB), "distill.batch")
    assert not tiny.fits and tiny.advice.endswith("does not fit into 1.0 GiB: try distill.batch")
    assert hours(7200) == "2 h" and hours(120) == "2 min" and hours(5) == "5 s"


def test_a_run_without_memory_is_stopped_before_it_starts(monkeypatch):
    config = load_script("distill_one_step", ["method=sid", "distill.batch=64", "run.device=cpu"])
    subject = one_step_subject(config)
    plan = plan_start(subject, config)
    assert plan is not None and plan.peak > 2**27
    monkeypatch.setattr("distill.planning.start.available_memory", lambda device: 2.0**27)
    with pytest.raises(UserError, match=r"needs about .* GiB on cpu and 0\.1 GiB are free: try .*distill"):
        require_memory(plan, torch.device("cpu"), config)
    unplanned = replace(subject, run=replace(subject.run, plan=False))
    assert plan_start(unplanned, config) is None


def test_what_cannot_be_planned_starts_nevertheless(capsys):
    config = load_script("distill_one_step", ["teacher=an/unknown-model", "run.device=cpu"])
    assert plan_start(one_step_subject(config), config) is None
    assert not capsys.readouterr().err


def test_work_of_a_finished_run():
    plan = make_plan(subject_of("train_controlnet", "adapter.batch=2", "run.steps=10"), torch.float32)
    values = work(plan, 2.0, card("a100"))
    assert values["tflop"] == pytest.approx(plan.flops / 1e12, rel=1e-3)
    assert values["tflops_per_second"] == pytest.approx(values["tflop"] / 2, rel=1e-3)
    assert values["fraction_of_peak"] == pytest.approx(values["floor_seconds"] / 2, rel=1e-3)
    assert "floor_seconds" not in work(plan, 2.0, None)


def test_records_add_up():
    with MetaRecorder() as recorder, recorder.measured() as record:
        a = torch.empty(8, 8, device="meta")
        _ = a @ a
    assert (record.scaled(2.5) + record + Record()).flops == 3.5 * record.flops


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dmd2", "sid"])
def test_memory_is_within_a_quarter_of_the_measured(name):
    """In a process of its own, whose peak is that of the run."""
    subject = subject_of("distill_one_step", f"method={name}", "distill.batch=256", "distill.monitor.every=0")
    plan = make_plan(subject, torch.float32)
    predicted, measured = check(subject, plan, card("a100"), torch.device("cpu")).memory
    assert predicted == pytest.approx(measured, rel=0.25)
