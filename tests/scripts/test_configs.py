"""Defaults have one source, the dataclasses: YAML repeats none, and Python and the command line agree."""

import dataclasses
import importlib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import arguments as words
import entry
import pytest
from command_line import ROOT
from omegaconf import OmegaConf

from distill.apps.optimise_image import OptimiseImageOptions
from distill.apps.score_field import ScoreFieldOptions
from distill.apps.text_to_image import TextToImageOptions
from distill.control.train import AdapterOptions
from distill.evaluation.control import ControlEvaluationOptions
from distill.evaluation.generator import GeneratorEvaluationOptions
from distill.evaluation.probe import ProbeOptions
from distill.evaluation.teacher import EvaluationOptions
from distill.one_step.points import PointOptions
from distill.one_step.regression import PairOptions
from distill.one_step.trainer import OneStepOptions
from distill.runtime.config import TARGET, as_mapping, build, defaults_of, fields_of, target_class
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.help import comments, help_lines
from distill.runtime.shipped import resolve
from distill.teacher.pixel_training import PixelTeacherOptions
from distill.teacher.tiny_autoencoder import TinyAutoencoderOptions
from distill.teacher.train import TeacherOptions
from distill.upscaler.network import UpscalerOptions
from sds3d.export.export import ExportOptions
from sds3d.scene.nerf import NerfOptions
from sds3d.text_to_3d.trainer import TextTo3dOptions
from sds3d.viewer import ViewerOptions
from sds3d.world.world import WorldOptions

SCRIPTS = sorted(
    path.stem
    for path in (ROOT / "scripts").glob("*.py")
    if path.stem not in ("entry", "sweep", "arguments", "doctor")
)
REQUIRED = {  # what a user must give
    "text_to_3d": ["prompt=a red teapot"],
    "optimise_image": ["prompt=a red teapot"],
    "sample": ["prompts=[a red teapot]"],
    "export": ["run_directory=x"],
    "view": ["run_directory=x"],
    "label_images": ["folder=x", "captions=[a]"],
    "nearest_images": ["queries=[a]"],
    "draw_curves": ["runs=[x]"],
    "evaluate_views": ["teacher=x"],
}
CHOICES = [  # every config of every group, on a script that chooses from it
    (script, f"{group}={name}")
    for script, group in [
        ("text_to_3d", "objective"),
        ("text_to_3d", "control"),
        ("text_to_3d", "scene"),
        ("text_to_3d", "input"),
        ("text_to_3d", "recipe"),
        ("distill_one_step", "method"),
        ("evaluate_teacher", "labels"),
        ("make_dataset", "source"),
        ("train_pixel_teacher", "conditioning"),
        ("train_judge", "attributes"),
    ]
    for name in entry.groups()[group]
]
NEEDED = dict.fromkeys(("control=depth", "control=silhouette"), ("control.mesh=x.obj",)) | {
    "source=sprites": ("source.images=x.npy", "source.contexts=y.npy"),
    "source=attributes": ("source.table=x.csv", "source.images=y"),
    "source=shards": ("source.shards=x.tar",),
    "source=huggingface": ("source.path=x",),
}
PROMPT = "a red teapot"
OPTIONS: dict[str, Mapping[str, object]] = {
    "text_to_3d": {
        "text_to_3d": TextTo3dOptions(PROMPT),
        "scene": NerfOptions(),
        "export": ExportOptions(),
        "control": None,
    },
    "optimise_image": {"optimise_image": OptimiseImageOptions(PROMPT)},
    "distill_one_step": {"distill": OneStepOptions()},
    "distill_points": {"points": PointOptions()},
    "draw_scores": {"scores": ScoreFieldOptions()},
    "make_pairs": {"pairs": PairOptions()},
    "make_shapes": {"world": WorldOptions()},
    "evaluate_teacher": {"evaluation": EvaluationOptions()},
    "evaluate_generator": {"evaluation": GeneratorEvaluationOptions()},
    "evaluate_control": {"evaluation": ControlEvaluationOptions()},
    "train_pixel_teacher": {"teacher": PixelTeacherOptions()},
    "train_upscaler": {"upscaler": UpscalerOptions()},
    "train_controlnet": {"adapter": AdapterOptions()},
    "train_probe": {"probe": ProbeOptions()},
    "train_teacher": {"teacher": TeacherOptions()},
    "train_tiny_autoencoder": {"autoencoder": TinyAutoencoderOptions()},
    "export": {"export": ExportOptions()},
    "view": {"viewer": ViewerOptions()},
}


def config_class(script: str) -> type:
    return importlib.import_module(script).Config


def composed(script: str, *arguments: str) -> Any:
    """The config of a script and its arguments, as `entry` composes it."""
    name = script if (ROOT / "configs" / f"{script}.yaml").is_file() else "base"
    entry.register_resolvers(config_class(script))
    chosen = entry.chosen_groups(name)
    return entry.compose_config(name, [words.forced(words.quoted(a), chosen) for a in arguments])


def options_of(script: str, *arguments: str) -> Any:
    """The options that `entry` hands to the script's main."""
    config = composed(script, *REQUIRED.get(script, []), *arguments)
    return build(config_class(script), entry.values_of(config))


def repeated(cls: type, values: Mapping[str, Any], name: str = "", default: object = None) -> Iterator[str]:
    """The dotted names of values that equal the default they override."""
    cls = target_class(cls, values, name, default)
    fields, hints = fields_of(cls), typing.get_type_hints(cls)
    defaults = defaults_of(fields, default if type(default) is cls else None)
    for key, value in values.items():
        if key == TARGET:
            continue
        yield from _repeated(hints[key], value, f"{name}.{key}".lstrip("."), defaults.get(key, ...))


def _repeated(hint: Any, value: Any, name: str, default: object) -> Iterator[str]:
    if as_mapping(default) == value or (isinstance(default, float) and default == value):
        yield name
    elif isinstance(value, Mapping):
        for option in [hint, *typing.get_args(hint)]:
            if dataclasses.is_dataclass(option) and isinstance(default, Mapping):
                for key, item in value.items():
                    yield from _repeated(option, item, f"{name}.{key}", default.get(key, ...))
            elif dataclasses.is_dataclass(option):
                yield from repeated(typing.cast(type, option), value, name, default)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            if isinstance(item, Mapping):
                yield from _repeated(typing.get_args(hint)[0], item, f"{name}[{index}]", ...)


@pytest.mark.parametrize("script", SCRIPTS)
def test_yaml_repeats_no_default(script: str) -> None:
    values = OmegaConf.to_container(composed(script))
    assert list(repeated(config_class(script), values)) == []  # type: ignore[arg-type]


@pytest.mark.parametrize(("script", "choice"), CHOICES)
def test_group_repeats_no_default(script: str, choice: str) -> None:
    values = OmegaConf.to_container(composed(script, choice))
    assert list(repeated(config_class(script), values)) == []  # type: ignore[arg-type]


def test_repeated_defaults_are_detected() -> None:
    scene, terms = {"grid": {"decay": 0.9, "every": 8}}, [{"prompt": "conditional"}]
    values = {"scene": scene, "objective": {"terms": terms}, "teacher": "shapes64"}
    stages = {"stages": {"sampled_views": {"steps": 20, "guidance": 2.0}}}
    names = list(repeated(config_class("text_to_3d"), {**values, "text_to_3d": stages}))
    assert names == [
        "scene.grid.decay",
        "objective.terms[0].prompt",
        "teacher",
        "text_to_3d.stages.sampled_views.steps",
    ]


@pytest.mark.parametrize("script", OPTIONS)
def test_python_and_command_line_agree(script: str) -> None:
    config = options_of(script)
    assert {name: getattr(config, name) for name in OPTIONS[script]} == OPTIONS[script]


def test_sample_and_python_agree() -> None:
    config, options = options_of("sample"), TextToImageOptions((PROMPT,))
    assert {name: vars(config)[name] for name in vars(options)} == vars(options)


@pytest.mark.parametrize("adapter", ["depth", "silhouette"])
def test_control_chooses_the_teacher_of_its_adapter(adapter: str) -> None:
    control = [f"control={adapter}", "control.mesh=x.obj"]
    config = options_of("text_to_3d", *control)
    assert config.control.adapter == adapter
    record = read_json(resolve("adapter", adapter) / "condition.json")["teacher"]
    assert config.teacher == record["name"]
    assert options_of("text_to_3d", *control, "teacher=mine").teacher == "mine"


@pytest.mark.parametrize(("script", "choice"), CHOICES)
def test_every_group_builds(script: str, choice: str) -> None:
    config = options_of(script, choice, *NEEDED.get(choice, ()))
    assert build(type(config), as_mapping(config)) == config  # the snapshot restores it


def test_one_override_changes_one_value() -> None:
    camera = options_of("text_to_3d", "text_to_3d.camera.centre_jitter=0.1").text_to_3d.camera
    assert camera == dataclasses.replace(TextTo3dOptions(PROMPT).camera, centre_jitter=0.1)
    stages = options_of("text_to_3d", "text_to_3d.stages.sampled_views.views=8").text_to_3d.stages
    assert stages == {
        name: dataclasses.replace(stage, views=8) for name, stage in TextTo3dOptions(PROMPT).stages.items()
    }
    assert options_of("text_to_3d", "control.mesh=x.obj").control.mesh == "x.obj"


def test_option_resolver_falls_back_to_the_dataclass() -> None:
    assert options_of("distill_one_step").run.directory == "outputs/one_step/dmd2-seed0"
    chosen = options_of("distill_one_step", "method=sid", "run.seed=3")
    assert chosen.run.directory == "outputs/one_step/sid-seed3"
    assert options_of("train_controlnet").run.directory == "outputs/controlnet/silhouette-seed0"
    assert options_of("ablate", "subject=particles").output == "outputs/ablation/particles"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_lists_every_option(script: str) -> None:
    cls = config_class(script)
    text = "\n".join(help_lines(cls, OmegaConf.to_container(composed(script))))  # type: ignore[arg-type]

    def names(cls: type, prefix: str = "") -> Iterator[str]:
        hints = typing.get_type_hints(cls)
        for key in fields_of(cls):
            yield f"{prefix}{key}"
            if dataclasses.is_dataclass(hints[key]):
                yield from names(typing.cast(type, hints[key]), f"{prefix}{key}.")

    assert [name for name in names(cls) if name not in text] == []


def test_help_shows_default_type_and_comment() -> None:
    lines = list(help_lines(config_class("text_to_3d"), {"run": {"steps": 7}}))
    (steps,) = [line for line in lines if line.startswith("  run.steps ")]
    assert steps.split("=", 1)[1].split()[:2] == ["7", "int;"]
    assert any(line.startswith("  text_to_3d.stages.sampled_views.strengths ") for line in lines)
    assert comments(TextTo3dOptions)["view_words"].startswith("view-dependent prompts")


@pytest.mark.parametrize(
    ("argument", "forced"),
    [
        ("objective=csd", "objective=csd"),
        ("objective.clip=1", "++objective.clip=1"),
        ("scene=hash", "++scene=hash"),  # not among the chosen groups
        ("++a=1", "++a=1"),
        ("~control", "~control"),
        ("hydra.verbose=true", "hydra.verbose=true"),
        ("hydra/launcher=joblib", "hydra/launcher=joblib"),
        ("--multirun", "--multirun"),
    ],
)
def test_forced(argument: str, forced: str) -> None:
    assert words.forced(argument, ["objective"]) == forced


def test_a_picture_brings_its_defaults() -> None:
    chosen = ["input", "objective"]
    assert entry.with_implied(["image=a.png"], chosen) == ["input=image", "image=a.png"]
    assert entry.with_implied(["image=a.png"], ["objective"]) == ["image=a.png"]
    assert entry.with_implied(["image=a.png", "input=prompt"], chosen) == ["image=a.png", "input=prompt"]
    assert entry.with_implied(["image=null", "suite=tiny"], chosen) == ["image=null", "suite=tiny"]
    assert entry.with_implied(["suite=images"], chosen)[0] == "input=image"

    chosen = ["input", "recipe"]  # and an option of the objective its recipe
    stage = "text_to_3d.stages.sdedit_refinement"
    for argument in ("objective=csd", "++objective.clip=1", "experiment=tiny_vsd", f"{stage}=null"):
        implied = ["recipe=score_distillation", argument]
        assert entry.with_implied([argument], chosen) == implied
        assert entry.with_implied([argument], ["input"]) == [argument]
    unrelated = ["control=none", "text_to_3d.stages.sampled_views.views=8"]
    assert entry.with_implied(unrelated, chosen) == unrelated

    config = entry.load_script("text_to_3d", ["image=some/a photo.png", "text_to_3d.views=6"])
    assert config.run.directory == "outputs/image_to_3d/a-photo-seed0" and config.prompt == ""
    assert config.text_to_3d.views == 6 and config.text_to_3d.views_per_group == 3
    assert list(config.text_to_3d.stages) == ["score_distillation", "orientation", "sdedit_refinement"]
    sampled = entry.load_script("text_to_3d", ["image=a.png", "recipe=sampled_views"])
    assert sampled.text_to_3d.stages == TextTo3dOptions("x").stages
    assert config.objective.teacher.guidance == 5.0 and config.objective.image
    other = entry.load_script("text_to_3d", ["image=a.png", "objective=csd", "prompt=a red duck"])
    assert other.prompt == "a red duck" and not other.objective.image
    plain = entry.load_script("text_to_3d", ["prompt=a red duck"])
    assert plain.image is None and plain.text_to_3d == TextTo3dOptions("a red duck")


def test_arguments_without_a_name() -> None:
    assert words.named(["a red cube", "x=1", "a duck"], "prompts") == [
        "x=1",
        'prompts=["a red cube", "a duck"]',
    ]
    assert words.named(["a red cube"], None) == ["a red cube"]
    assert words.quoted("prompt=a red teapot") == 'prompt="a red teapot"'
    assert words.quoted("prompts=[a red teapot]") == "prompts=[a red teapot]"
    assert words.quoted("prompt=a cube,a duck", sweep=True) == 'prompt="a cube","a duck"'
    assert words.quoted("prompt='a cube, a duck',x", sweep=True) == "prompt='a cube, a duck',x"


def test_lines_of_a_file_are_the_values_of_a_sweep(tmp_path: Path) -> None:
    path = tmp_path / "prompts.txt"
    path.write_text('a red cube, please\n\n a "blue" duck\na red cube, please\n')
    expected = 'prompt="a red cube, please","a \\"blue\\" duck"'
    assert words.quoted(f"prompt=@{path}", sweep=True) == expected
    assert words.quoted(f"prompt=@{path}") == f"prompt=@{path}"
    path.write_text("\n")
    with pytest.raises(UserError, match="has no lines: give a text file with a value on each line"):
        words.quoted(f"prompt=@{path}", sweep=True)
    with pytest.raises(UserError, match="cannot be read"):
        words.quoted(f"prompt=@{tmp_path / 'other'}", sweep=True)


NO_NETWORK = {
    "draw_curves",
    "draw_scores",
    "make_dataset",
    "make_shapes",
    "plan",
    "save_student",
}  # nothing is computed on a device, or on one that its options describe
ON_CPU = {"distill_points"}  # in float64
FLOAT32_ONLY = {"classify", "export", "nearest_images"}  # graders and scenes


@pytest.mark.parametrize("script", [name for name in SCRIPTS if name not in NO_NETWORK | ON_CPU])
def test_every_script_lets_its_user_choose_device_and_precision(script: str) -> None:
    """In the options of its run, else in its own; each is documented."""
    cls, names = config_class(script), {"device", "precision"}
    options = typing.get_type_hints(cls)["run"] if "run" in fields_of(cls) else cls
    names -= {"precision"} if script in FLOAT32_ONLY else set()
    assert names <= fields_of(options).keys()
    assert names <= comments(options).keys()
    defaults = defaults_of(fields_of(options), None)
    assert {defaults[name] for name in names} == {"auto"}
