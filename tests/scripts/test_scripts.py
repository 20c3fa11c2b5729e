"""Every script and every config, as a user runs them, small; and what a user's mistakes look like."""

import json
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
        f"teacher={tiny_teacher_folder}",
        f"run.directory={folder}",
        *small,
    )
    return folder


def test_text_to_3d_leaves_everything(run_directory):
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
        result["prompt"] == "a red teapot" and result["seed"] == 0 and result["forwards"] == 16 + 2 * 480
    )  # steps, and twice facing
    assert -1 <= result["clip_score"] <= 1 and result["config"]["objective"]["terms"][1]["predict"] == "noise"
    assert result["run"]["steps"] == 2 and result["run"]["seconds"] > 0


@pytest.mark.parametrize(
    ("name", "given", "directory"),
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
def test_runs_are_named_after_what_they_do(name, given, directory):
    assert f"directory: {directory}\n" in script(name, *given, "--cfg", "job", "--resolve")


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
        "denoising.gif",
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
    where = [
        f"teacher={tiny_teacher_folder}",
        f"judge={tmp_path / 'judge' / 'judge'}",
        f"data={world}",
        f"output={tmp_path / 'e'}",
    ]
    script("evaluate_teacher", *where, *small)
    figures = json.loads((tmp_path / "e" / "evaluation.json").read_text())
    assert 0 <= figures["samples"][0]["object_and_colour"] <= 1 and figures["frechet"]["real_halves"] > 0


MISTAKES = [
    (["prompt=a red teapott"], "'teapott'"),
    (["prompt= "], "empty"),
    ([], "prompt is missing"),
    (["prompt=a red teapot", "nonsense=1"], "nonsense"),
    (["prompt=a red teapot", "export.fps=soon"], "export.fps is 'soon'"),
    (["prompt=a red teapot", "text_to_3d.views=0"], "views is 0"),
    (["prompt=a red teapot", "objective=nope"], "objective/nope"),
]


@pytest.mark.parametrize(("arguments", "told"), MISTAKES, ids=[told for _, told in MISTAKES])
def test_a_mistake_is_one_sentence(tiny_teacher_folder, tmp_path, arguments, told):
    where = [f"teacher={tiny_teacher_folder}", f"run.directory={tmp_path / 'run'}"]
    assert told in script("text_to_3d", *where, *arguments, code=2)
    assert not (tmp_path / "run").exists()  # nothing is left behind


def test_help_is_readable():
    told = script("text_to_3d", "--help")
    assert "objective: csd, " in told and ", sds, " in told and "coarse_until" in told


def test_configs_build_the_options_they_name():
    from hydra import compose, initialize_config_dir
    from omegaconf import OmegaConf

    from distill.evaluation.judge import JudgeOptions
    from distill.runtime.config import build
    from distill.teacher.train import TeacherOptions
    from sds3d.world.world import WorldOptions

    cases = {
        "make_shapes": ("world", WorldOptions),
        "train_teacher": ("teacher", TeacherOptions),
        "train_judge": ("judge", JudgeOptions),
    }
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        for name, (group, options) in cases.items():
            values = OmegaConf.to_container(compose(name))
            build(options, values[group], group)
            assert set(values[group]) == set(options.__dataclass_fields__), (
                f"{name}.yaml must show every option"
            )
