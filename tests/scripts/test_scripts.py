"""Every script as a user runs it, on small sizes, and the messages of a user's mistakes."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from command_line import ROOT, script


@pytest.fixture(scope="module")
def run_directory(tiny_teacher_folder, tmp_path_factory) -> Path:
    """A text-to-3D run of two steps."""
    folder = tmp_path_factory.mktemp("run")
    small = [
        "run.steps=2",
        "run.trackers=[]",
        "export.frames=4",
        "export.resolution=32",
        "export.mesh.resolution=32",
    ]
    script(
        "text_to_3d",
        "prompt=a red teapot",
        "recipe=score_distillation",
        f"teacher={tiny_teacher_folder}",
        f"run.directory={folder}",
        *small,
    )
    return folder


def test_text_to_3d_writes_all_files(run_directory):
    for name in (
        "mesh.glb",
        "mesh.obj",
        "turntable.mp4",
        "turntable.gif",
        "renders.png",
        "contact_sheet.png",
        "scene/scene.safetensors",
    ):
        assert (run_directory / name).stat().st_size > 0, name
    result = json.loads((run_directory / "result.json").read_text())
    assert (
        result["prompt"] == "a red teapot" and result["seed"] == 0 and result["nfe"] == 16 + 2 * 480
    )  # steps, and two checks of the orientation
    assert -1 <= result["clip_score"] <= 1 and result["config"]["objective"]["terms"][1]["predict"] == "noise"
    assert result["run"]["steps"] == 2 and result["run"]["seconds"] > 0


@pytest.mark.parametrize(
    ("name", "arguments", "directory"),
    [
        (
            "optimise_image",
            ["prompt=a red teapot", "objective=csd"],
            "outputs/optimise_image/a-red-teapot-csd-seed0",
        ),
        ("distill_one_step", ["method=sid", "run.seed=3"], "outputs/one_step/sid-seed3"),
        ("text_to_3d", ["prompt=a blue torus"], "outputs/text_to_3d/a-blue-torus-seed0"),
    ],
)
def test_run_directories_name_the_experiment(name, arguments, directory):
    assert f"directory: {directory}\n" in script(name, *arguments, "--cfg", "job", "--resolve")


def test_export_again(run_directory, tmp_path):
    script(
        "export",
        f"run_directory={run_directory}",
        f"output={tmp_path}",
        "export.frames=3",
        "export.resolution=32",
        "export.mesh.resolution=24",
    )
    assert (tmp_path / "mesh.glb").exists()
    assert "neither a scene nor a checkpoint" in script(
        "export", f"run_directory={tmp_path / 'none'}", code=2
    )


def test_sample_with_animation(tiny_teacher_folder, tmp_path):
    arguments = [
        "prompts=[a red teapot, a blue torus]",
        "count=2",
        "steps=2",
        "animation=true",
        f"output={tmp_path}",
    ]
    script("sample", f"teacher={tiny_teacher_folder}", *arguments)
    assert {path.name for path in tmp_path.iterdir()} == {
        "samples.png",
        "denoising_x0.gif",
        "denoising_xt.gif",
        "000_00.png",
        "000_01.png",
        "001_00.png",
        "001_01.png",
    }


def test_world_judge_and_evaluation(tiny_teacher_folder, tmp_path):
    world = tmp_path / "world"
    script(
        "make_shapes",
        f"output={world}",
        "world.train=48",
        "world.validation=2",
        "world.test=12",
        "world.pairs=0",
        "world.supersample=1",
    )
    script(
        "train_judge",
        f"data={world}",
        f"run.directory={tmp_path / 'judge'}",
        "run.steps=2",
        "run.trackers=[]",
        "judge.batch=16",
    )
    small = ["evaluation.samples=4", "evaluation.steps=2", "evaluation.guidance=[2]"]
    folders = [
        f"teacher={tiny_teacher_folder}",
        f"judge={tmp_path / 'judge' / 'judge'}",
        f"data={world}",
        f"output={tmp_path / 'e'}",
    ]
    script("evaluate_teacher", *folders, *small)
    metrics = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert 0 <= metrics["samples"][0]["object_and_colour"] <= 1 and metrics["frechet"]["floor"] > 0


MISTAKES = [
    (["prompt=a red teapott"], "'teapott'"),
    (["prompt= "], "empty"),
    ([], "prompt is missing"),
    (["prompt=a red teapot", "nonsense=1"], "nonsense"),
    (["prompt=a red teapot", "export.fps=soon"], "export.fps is 'soon'"),
    (["prompt=a red teapot", "text_to_3d.views=0"], "views is 0"),
    (["prompt=a red teapot", "objective=nope"], "objective/nope"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES, ids=[message for _, message in MISTAKES])
def test_a_mistake_is_one_sentence(tiny_teacher_folder, tmp_path, arguments, message):
    folders = [f"teacher={tiny_teacher_folder}", f"run.directory={tmp_path / 'run'}"]
    folders.append("recipe=score_distillation")  # the teacher has no cameras
    assert message in script("text_to_3d", *folders, *arguments, code=2)
    assert not (tmp_path / "run").exists()  # no directory is left


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("guidance=inf", "guidance is inf: expected a finite number"),
        ("guidance=nan", "guidance is nan: expected a finite number"),
        ("sweep=[1, inf]", "sweep[1] is inf: expected a finite number"),
        ("steps=2000", "steps is 2000: expected 1 to 1000"),
        ("sampler=ddpm steps=1001", "steps is 1001: expected 1 to 1000"),
        ("sampler=dpm steps=1001", "steps is 1001: expected 1 to 1000"),
        ("count=1000000000000", "not enough memory"),
        ("student=shapes64 sweep=[1]", "sweep: a student"),
        ("student_guidance=2", "student_guidance is of a student"),
        ("student=shapes64 student_guidance=2", "shapes64 was trained at one"),
        ("compare_samplers=[euler]", "compare_samplers has 'euler'"),
    ],
)
def test_sampling_mistakes(tiny_teacher_folder, tmp_path, argument, message):
    folders = [f"teacher={tiny_teacher_folder}", f"output={tmp_path / 'samples'}"]
    arguments = [argument] if ", " in argument else argument.split()
    assert message in script("sample", "a red teapot", *folders, *arguments, code=2)
    assert not (tmp_path / "samples").exists()


def test_help_lists_groups_and_options():
    text = script("text_to_3d", "--help")
    assert "objective: csd, " in text and ", sds, " in text and "stages.sampled_views.strengths" in text
    changed = script("text_to_3d", "objective=csd", "run.steps=7", "--help")
    assert "coarse_until" in changed and "coarse_until" not in text  # of the recipe that it brings
    assert re.search(r"run.steps +=\s+7 ", changed) and re.search(r"objective.image +=\s+0.0 ", changed)


def test_help_into_a_closed_pipe_has_no_traceback():
    """As with `--help | head -1`."""
    command = [sys.executable, "scripts/text_to_3d.py", "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert b"Traceback" not in process.stderr.read()


def test_snapshot_holds_every_option_and_resumes(run_directory, tiny_teacher_folder):
    config = json.loads((run_directory / "config.json").read_text())
    assert config["scene"]["_target_"] == "sds3d.scene.nerf.NerfOptions"
    assert config["text_to_3d"]["camera"]["centre_jitter"] == 0.05 and config["export"]["fps"] == 24
    arguments = ["prompt=a red teapot", f"teacher={tiny_teacher_folder}", f"run.directory={run_directory}"]
    small = ["export.frames=4", "export.resolution=32", "export.mesh.resolution=32", "run.trackers=[]"]
    small.append("recipe=score_distillation")
    script("text_to_3d", *arguments, *small, "run.steps=2")
    message = script("text_to_3d", *arguments, *small, "run.steps=2", "text_to_3d.views=2", code=2)
    assert "text_to_3d.views (4 -> 2)" in message
