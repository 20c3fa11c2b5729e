"""The documentation agrees with the code: commands, options, links, paths, tables and examples."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import shlex
import shutil
import subprocess
import sys
import typing
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import entry
import plan
import pytest
import torch
import yaml

from distill.apps.optimise_image import OptimiseImage, OptimiseImageOptions
from distill.core.sampling import sample_ode
from distill.data.images import load_image
from distill.data.latents import LatentCache
from distill.evaluation.graders import Graders
from distill.objectives.options import ObjectiveOptions
from distill.one_step.methods.base import MethodOptions
from distill.one_step.monitor import MonitorOptions
from distill.one_step.recipe import decoder, image_monitor
from distill.one_step.trainer import OneStep, OneStepOptions
from distill.runtime.config import build, defaults_of, fields_of
from distill.runtime.experiment import load_experiments
from distill.runtime.run import Run, RunOptions
from distill.teacher.clip import ClipOptions
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion
from distill.teacher.train import Steps, TeacherOptions, train_teacher
from distill.teacher.unet import UnetOptions
from distill.teacher.vae import VaeOptions
from sds3d.export.export import ExportOptions
from sds3d.export.texture import TextureOptions
from sds3d.scene.cameras import ring
from sds3d.scene.protocol import MeshOptions, build_scene_options, load_scene
from sds3d.text_to_3d.trainer import TextTo3d, TextTo3dOptions

ROOT = Path(__file__).parent.parent
CARDS = sorted((ROOT / "distill" / "weights").rglob("README.md"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *CARDS]
PLACEHOLDERS = {"CYCLES": "100", "objective=NAME": "objective=sds", "method=NAME": "method=dmd2"}
PLACEHOLDERS |= {"experiment=NAME": "experiment=tiny_dreamfusion"}
OTHERS = (".git", ".venv", "outputs")  # folders that are not of the project
README = (ROOT / "README.md").read_text()
LOSSES = (ROOT / "docs" / "losses.md").read_text()
EXTENDING = (ROOT / "docs" / "extending.md").read_text()
GPU = (ROOT / "docs" / "gpu.md").read_text()


def page_id(path: Path) -> str:
    return str(path.relative_to(ROOT))


def blocks(text: str, language: str) -> list[str]:
    """The fenced code blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def inline_code(text: str) -> list[str]:
    """Code between backticks, outside of fenced blocks."""
    return re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))


def heredocs(text: str) -> dict[str, str]:
    """The files that a page's shell blocks write with `cat > path <<'YAML'`, by path."""
    return dict(re.findall(r"cat > (\S+) <<'YAML'\n(.*?)\nYAML\n", text, re.DOTALL))


# The Python files of the extending page, by name.
MODULES = {block[2:].split(".py\n")[0]: block for block in blocks(EXTENDING, "python")}


def commands(text: str) -> list[list[str]]:
    """The words of every command of a script, with values for placeholders."""
    shell = re.sub(r"<<'YAML'\n.*?\nYAML\n", "\n", "\n".join(blocks(text, "bash")), flags=re.DOTALL)
    lines = [*shell.splitlines(), *(code for code in inline_code(text) if "scripts/" in code)]
    parsed = []
    for line in lines:
        for old, new in PLACEHOLDERS.items():
            line = line.replace(old, new)
        for command in re.split(r" && ", line):
            words = shlex.split(command, comments=True)
            if words and words[0] in ("python", "bash", "torchrun"):
                parsed.append(words)
    return parsed


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with the configs, and the files that the pages tell the reader to write; importable."""
    folder = tmp_path_factory.mktemp("checkout")
    shutil.copytree(ROOT / "configs", folder / "configs")
    for page in PAGES:
        for path, content in heredocs(page.read_text()).items():
            (folder / path).write_text(content + "\n")
    for name, code in MODULES.items():
        (folder / f"{name}.py").write_text(code)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(entry, "CONFIGS", folder / "configs")
        patch.syspath_prepend(folder)
        yield folder
    for name in MODULES:
        sys.modules.pop(name, None)


@cache
def entry_of(script: str) -> tuple[str, type, str | None] | None:
    """The arguments of a script's call of `entry`: config name, options class, positional option."""
    tree = ast.parse((ROOT / "scripts" / f"{script}.py").read_text())
    calls = [
        node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "entry"
    ]
    if not calls:
        return None
    name, cls = calls[0].args[0], calls[0].args[1]
    assert isinstance(name, ast.Constant) and isinstance(cls, ast.Name)
    named = {keyword.arg: ast.literal_eval(keyword.value) for keyword in calls[0].keywords}
    return str(name.value), getattr(importlib.import_module(script), cls.id), named.get("positional")


COMMANDS = sorted({shlex.join(words) for page in PAGES for words in commands(page.read_text())})
SCRIPTS = [command for command in COMMANDS if re.match(r"(python|torchrun .*) scripts/", command)]


def test_commands_are_found() -> None:
    assert len(SCRIPTS) > 60
    assert {path.stem for path in (ROOT / "scripts").glob("*.py")} - {"entry", "sweep", "arguments"} == {
        re.search(r"scripts/(\w+)\.py", command)[1]  # type: ignore[index]
        for command in SCRIPTS
    }


def assert_accepted(
    words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """That a script takes the options of a command that calls it."""
    script = next(i for i, word in enumerate(words) if word.startswith("scripts/"))
    arguments = entry_of(Path(words[script]).stem)
    if arguments is None:
        assert words[script + 1 :] == [], "this script takes no options"
        return
    name, cls, positional = arguments
    built: list[Any] = []
    if name == "plan":  # whose arguments are another script's options
        words[script + 1 :] = plan.separated(words[script + 1 :])
    monkeypatch.setattr(sys, "argv", words[script:])
    try:
        entry.entry(name, cls, built.append, positional)
    except SystemExit:
        pytest.fail(capsys.readouterr().err)
    assert "--help" in words or isinstance(built[0], cls)
    if name == "plan":
        plan.run_options(built[0])


@pytest.mark.parametrize("command", SCRIPTS)
def test_command_is_accepted_by_its_script(
    command: str, checkout: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert_accepted(shlex.split(command), monkeypatch, capsys)


def test_commands_that_reproduce_the_data_page_are_accepted(
    checkout: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a program in Python's place that records its arguments."""
    for folder in (
        "scripts",
        ".venv/bin",
        "outputs/emoji_clip/parts/clip",
        "outputs/emoji_clip/parts/tokenizer",
        "distill/weights/shapes64/vae",
    ):
        (tmp_path / folder).mkdir(parents=True)
    python, script = tmp_path / ".venv/bin/python", tmp_path / "scripts/reproduce_data.sh"
    python.write_text("#!/usr/bin/env bash\nprintf '%s\\0' \"$@\" >> calls; echo >> calls\n")
    python.chmod(0o755)
    shutil.copy(ROOT / "scripts/reproduce_data.sh", script)
    subprocess.run(["bash", script], check=True)
    calls = [call.rstrip("\0").split("\0") for call in (tmp_path / "calls").read_text().splitlines()]
    assert len(calls) > 30
    for words in calls:
        assert_accepted(words, monkeypatch, capsys)


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith("bash ")])
def test_shell_script_exists(command: str) -> None:
    _, script, *arguments = shlex.split(command)
    assert (ROOT / script).is_file()
    paths = [argument for argument in arguments if argument.startswith("tests/")]
    assert all((ROOT / path).exists() for path in paths)


def has_option(hint: Any, default: Any, keys: list[str]) -> bool:
    """Whether a type of options, or its default, has the option that the keys lead to."""
    if not keys or (isinstance(default, Mapping) and keys[0] not in default):
        return not keys
    if isinstance(default, Mapping):
        return has_option(type(default[keys[0]]), default[keys[0]], keys[1:])
    candidates = [type(default), hint, *typing.get_args(hint)]
    candidates += [
        subclass for cls in candidates if inspect.isabstract(cls) for subclass in cls.__subclasses__()
    ]
    for cls in [cls for cls in candidates if dataclasses.is_dataclass(cls) and isinstance(cls, type)]:
        fields = fields_of(cls)
        if keys[0] in fields:
            values = defaults_of(fields, default if type(default) is cls else None)
            return has_option(typing.get_type_hints(cls)[keys[0]], values.get(keys[0]), keys[1:])
    return False


def option_mentions(text: str) -> set[str]:
    """Dotted options in a page's inline code, with or without a value: `run.seed=1`, `text_to_3d.camera`."""
    words = [word for code in inline_code(text) for word in re.split(r"[ \"]+", code)]
    named = [re.match(r"([a-z_0-9]+(?:\.[a-z_0-9]+)+)(?:=.*)?$", word) for word in words]
    names = {match[1] for match in named if match}
    return {name for name in names if name.split(".")[-1] not in suffixes() or f"{name}=" in text}


@cache
def suffixes() -> set[str]:
    """Those of the project's files, and of files that its pages name."""
    rooms = [path for path in ROOT.iterdir() if path.is_dir() and path.name not in OTHERS]
    files = [*ROOT.iterdir(), *(path for room in rooms for path in room.rglob("*"))]
    return {path.suffix.removeprefix(".") for path in files if path.suffix} | {"gz"}


@cache
def option_holders() -> list[tuple[type, Any]]:
    """The options classes of the scripts, each with an instance whose values have options too, or None."""
    scripts = [
        entry_of(path.stem)
        for path in (ROOT / "scripts").glob("*.py")
        if path.stem not in ("entry", "sweep", "arguments")
    ]
    classes = [arguments[1] for arguments in scripts if arguments is not None]
    for path in (ROOT / "configs").rglob("*.yaml"):  # the subclasses that groups choose from are imported
        target = (yaml.safe_load(path.read_text()) or {}).get("_target_")
        if target is not None:
            importlib.import_module(target.rpartition(".")[0])
    # The stages of a recipe that is no default are options where it is chosen.
    recipe = entry.load_script("text_to_3d", ["prompt=x", "recipe=score_distillation"])
    return [*((cls, None) for cls in classes), (type(recipe), recipe)]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_options_exist(page: Path) -> None:
    hints = [typing.get_type_hints(cls) for cls, _ in option_holders()]
    groups = {key for options in hints for key, hint in options.items() if _nested(hint)}
    mentioned = {name for name in option_mentions(page.read_text()) if name.split(".")[0] in groups}
    missing = {
        name
        for name in mentioned
        if not any(has_option(*holder, name.split(".")) for holder in option_holders())
    }
    assert missing == set()


def _nested(hint: Any) -> bool:
    return any(dataclasses.is_dataclass(cls) for cls in (hint, *typing.get_args(hint)))


def anchors(path: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_links_and_paths_resolve(page: Path) -> None:
    text = page.read_text()
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if not path.startswith("http"):
            file = (page.parent / path).resolve() if path else page
            assert file.exists(), target
            assert not anchor or anchor in anchors(file), target
    rooms = ("distill/", "sds3d/", "scripts/", "configs/", "tests/", "docs/")
    paths = [word for code in inline_code(text) for word in code.split() if word.startswith(rooms)]
    written = heredocs(text)
    missing = [path for path in paths if not (ROOT / path).exists() and path not in written]
    assert [path for path in missing if not re.search(r"[<*A-Z]|my_", path)] == []


def test_readme_is_short_and_has_the_two_commands() -> None:
    lines = README.splitlines()
    assert len(lines) <= 140
    assert {'bash scripts/quickstart.sh "a red teapot"', "bash scripts/test.sh"} <= set(lines)


def test_tree_of_the_readme_lists_what_exists() -> None:
    (tree,) = re.findall(r"^## Layout\n\n```\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    listed, parent = set(), ""
    for indent, name in re.findall(r"^( *)(\S+)", tree, re.MULTILINE):
        parent = parent if indent else name
        listed.add(parent + name if indent else name)
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir()}
    assert all((ROOT / path).exists() for path in listed)
    assert {"distill/", "sds3d/", "configs/", "scripts/"} <= listed & folders


def test_every_page_is_in_the_table_of_contents() -> None:
    table = (ROOT / "docs" / "README.md").read_text()
    pages = {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert pages == set(re.findall(r"^\| \[(\S+)\]\(\1\)", table, re.MULTILINE))


def test_table_of_losses_states_every_loss_and_its_nfe() -> None:
    table = {name: int(nfe) for name, nfe in re.findall(r"^\| `(\w+)` .*\| (\d+) \|$", LOSSES, re.MULTILINE)}
    assert table == {
        path.stem: build(ObjectiveOptions, yaml.safe_load(path.read_text()), path.stem).cost()
        for path in (ROOT / "configs" / "objective").glob("*.yaml")
    }


def test_table_of_presets_is_that_of_the_files() -> None:
    expected = [
        f"| `{info.name}` | `{info.script}` | {info.summary} ({info.paper}) "
        f"| {info.memory_gib:g} GiB, {info.duration} on {info.hardware} | {info.verified} |"
        for info in load_experiments(ROOT / "configs" / "experiment").values()
    ]
    rows = [line for line in GPU.splitlines() if re.match(r"\| `\w+` \| `\w+` \|", line)]
    assert rows == expected, "\n".join(["the table should be", *expected])


def test_the_example_loss_is_valid() -> None:
    (content,) = heredocs(LOSSES).values()
    options = build(ObjectiveOptions, yaml.safe_load(content), "my_csd")
    assert [options.cost(progress) for progress in (0.0, 0.5, 1.0)] == [2, 3, 2]


def test_python_example_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With fewer steps and a coarse export."""
    (example,) = blocks(README, "python")
    changes = {"steps=300": "steps=2", "steps=25": "steps=2", '"outputs/': f'"{tmp_path}/'}
    for old, new in {**changes, "objective=objective)": "objective=objective, export=coarse)"}.items():
        assert old in example
        example = example.replace(old, new)
    coarse = ExportOptions(MeshOptions(24, views=4), TextureOptions(64), frames=2, resolution=16)
    monkeypatch.chdir(ROOT)
    exec(compile(example, "README.md", "exec"), {"coarse": coarse})
    assert (tmp_path / "teapot.png").is_file() and (tmp_path / "teapot" / "result.json").is_file()


@pytest.fixture
def examples(checkout: Path) -> dict[str, Any]:
    """The YAML files of the extending page, by name; its Python files are importable."""
    return {Path(path).stem: yaml.safe_load(content) for path, content in heredocs(EXTENDING).items()}


def example_run(folder: Path, steps: int) -> Run:
    return Run(RunOptions(str(folder), steps=steps, trackers=()), {}, "example")


def test_example_scene(examples: dict[str, Any], tmp_path: Path) -> None:
    scene = build_scene_options(examples["my_scene"]).build()
    with torch.no_grad():
        for grid in scene.parameters():
            grid.add_(torch.randn(grid.shape, generator=torch.Generator().manual_seed(0)))
    views = scene.render(ring(4))

    scene.rotate(1)
    assert torch.allclose(scene.render(ring(4)).rgb, views.rgb.roll(1, 0), atol=1e-4)
    scene.save(tmp_path / "scene")
    assert torch.equal(load_scene(tmp_path / "scene").render(ring(4)).rgb, scene.render(ring(4)).rgb)
    assert scene.extract_mesh(MeshOptions(resolution=32, views=4)).watertight


def test_example_teacher_scene_and_stage(examples: dict[str, Any], tmp_path: Path) -> None:
    """Score distillation turns the grey ball red, as the teacher's closed-form score demands."""
    teacher = importlib.import_module("my_teacher").ColourTeacher()
    symmetry = {"_target_": "my_stage.SymmetryOptions", "every": 5}
    values = {"prompt": "red", "views": 2, "stages": {"symmetry": symmetry, "sdedit_refinement": None}}
    options = build(TextTo3dOptions, values)
    objective = build(ObjectiveOptions, yaml.safe_load((ROOT / "configs/objective/sds.yaml").read_text()))
    scene_options = build_scene_options({**examples["my_scene"], "resolution": 16})
    scene = TextTo3d(example_run(tmp_path / "run", 30), teacher, scene_options, objective, options).train()

    views = scene.render(ring(4))
    red, green, blue = (views.rgb * views.opacity).sum((0, 2, 3)) / views.opacity.sum()
    assert red > green + 0.1 and red > blue + 0.1


def test_example_teacher_trains_and_samples(examples: dict[str, Any]) -> None:
    teacher = importlib.import_module("my_teacher").ColourTeacher()
    noise = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    conditioning = teacher.encode_text(["blue"] * 8)
    images = teacher.decode(sample_ode(teacher, teacher.scheduler, conditioning, noise, 20))
    assert torch.allclose(images.mean((0, 2, 3)), torch.tensor([0.2, 0.2, 0.8]), atol=0.02)

    copy, times = teacher.trainable_copy(), torch.full((8,), 900)
    copy.denoising_loss(teacher.encode_images(images), noise, times, conditioning).backward()
    assert all(value.grad is not None for value in copy.trainable_parameters())
    assert not any(value.requires_grad for value in teacher.denoiser.parameters())


def test_example_teacher_on_the_command_line(checkout: Path) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{checkout}{os.pathsep}{ROOT}"}
    script = [sys.executable, str(ROOT / "scripts" / "optimise_image.py"), "teacher=my_colours.yaml"]
    options = ["objective=sds", "prompt=red", "run.steps=60", "run.trackers=[]", "run.directory=run"]
    subprocess.run([*script, *options], cwd=checkout, env=environment, check=True)
    red, green, blue = load_image(checkout / "run" / "images.png", 64).mean((0, 2, 3)).tolist()
    assert red > green + 0.1 and red > blue + 0.1

    wrong = [sys.executable, str(ROOT / "scripts" / "train_controlnet.py"), "teacher=my_colours.yaml"]
    done = subprocess.run(wrong, cwd=checkout, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "is a ColourTeacher: a model of diffusers is needed here" in done.stderr


def test_example_method(examples: dict[str, Any], tmp_path: Path) -> None:
    """The student's error to the guided teacher's samples falls."""
    module = importlib.import_module("my_teacher")
    teacher, names = module.ColourTeacher(), list(module.COLOURS)
    caption = torch.arange(12) % len(names)
    conditioning = teacher.encode_text([*names, ""])
    noise = torch.randn(12, *teacher.latent_shape, generator=torch.Generator().manual_seed(0))
    latents = teacher.denoiser.network(conditioning.select(caption).embedding)[..., None, None] + 0.1 * noise
    cache = LatentCache(latents, conditioning, caption)

    graders = Graders(extract=lambda images: images.mean((2, 3)))
    monitoring = MonitorOptions(every=20, captions=6, real=12)
    options = OneStepOptions(learning_rate=0.05, warmup=1, monitor=monitoring)
    monitor = image_monitor(decoder(teacher), graders, cache, options.monitor)
    method = build(MethodOptions, examples["my_method"])
    trainer = OneStep(example_run(tmp_path / "run", 20), teacher, cache, method, options, monitor)

    batch, generator = trainer.micro_batch(0, 0)
    before = trainer.method.loss(trainer.student, batch, 0.0, generator).loss
    averaged, student = trainer.train()
    assert trainer.method.loss(student, batch, 1.0, generator).loss < before / 2
    assert trainer.method.cost(0.0) == 35 and averaged.timesteps == student.timesteps


def test_example_loss(examples: dict[str, Any], tiny_teacher: LatentDiffusionTeacher, tmp_path: Path) -> None:
    objective = build(ObjectiveOptions, examples["my_loss"])
    options = OptimiseImageOptions("a red teapot", particles=2)
    images = OptimiseImage(example_run(tmp_path / "run", 2), tiny_teacher, objective, options).train()
    assert images.shape == (2, 3, 64, 64) and objective.cost() == 3


def test_example_data_set(checkout: Path, tmp_path: Path) -> None:
    subprocess.run([sys.executable, checkout / "my_dataset.py"], cwd=tmp_path, check=True)
    options = TeacherOptions(
        str(tmp_path / "outputs" / "my_data"),
        steps=Steps(clip=1, hard_negatives=1, vae=1, unet=1),
        clip=ClipOptions(width=16, layers=1, text_width=16, text_layers=1, projection=8, batch=6),
        vae=VaeOptions(channels=(8, 8, 8, 8), latent_channels=3, batch=4),
        unet=UnetOptions(channels=(16, 16), heads=2, batch=4),
    )
    folder = train_teacher(RunOptions(str(tmp_path / "run"), steps=1, trackers=()), options)
    assert load_latent_diffusion(str(folder)).encode_text(["a red square"]).embedding.shape[0] == 1
