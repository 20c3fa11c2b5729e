"""Rules of the code base, read from the sources: imports, forbidden constructs, names, file lengths."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = ("distill", "sds3d", "scripts")
FILES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "weights" not in path.parts
)
MODULES = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in FILES
    if path.parts[len(ROOT.parts)] != "scripts"
]
MODULES = [name.removesuffix(".__init__") for name in MODULES]
LONGEST = 350  # at 110 columns
NEVER = ("hydra", "omegaconf", "matplotlib", "nerfacc", "skimage", "imageio", "tinycudann", "datasets")
OPTIONAL = (*NEVER, "accelerate", "trimesh", "embreex", "diffusers")
IMPORT = """
import importlib, json, sys, torch
modules, never, optional = json.loads(sys.argv[1])
import distill, sds3d, sds3d.scene.nerf, sds3d.scene.renderer
light = [name for name in optional if name in sys.modules]
for name in modules:
    importlib.import_module(name)
everywhere = [name for name in never if name in sys.modules]
print(json.dumps([light, everywhere, torch.cuda.is_initialized()]))
"""


def _nodes(path: Path) -> Iterator[ast.AST]:
    return ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))


def _imports(path: Path) -> set[str]:
    """The top-level packages that a file imports, anywhere in it, relative imports made absolute."""
    breaches = set()
    for node in _nodes(path):
        if isinstance(node, ast.Import):
            breaches |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            breaches.add(
                (node.module or "").split(".")[0] if node.level == 0 else path.relative_to(ROOT).parts[0]
            )
    return breaches


def _typed(bag: ast.arg) -> bool:
    """Whether keywords are names of one kind of thing (`**parts: Stateful`), not a bag of anything."""
    return bag.annotation is not None and ast.unparse(bag.annotation) not in ("Any", "object")


def _breaches(path: Path) -> list[str]:
    """What a file does that no file may: star imports, bare excepts, pickles, bags of untyped keywords."""
    breaches = []
    for node in _nodes(path):
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names):
            breaches.append(f"{node.lineno}: star import")
        if isinstance(node, ast.ExceptHandler) and node.type is None:
            breaches.append(f"{node.lineno}: bare except")
        if isinstance(node, ast.Attribute) and ast.unparse(node) in ("torch.save", "torch.load"):
            breaches.append(f"{node.lineno}: {ast.unparse(node)}")
        if (
            isinstance(node, ast.ImportFrom)
            and node.module == "torch"
            and {a.name for a in node.names} & {"save", "load"}
        ):
            breaches.append(f"{node.lineno}: torch.save or torch.load")
        if isinstance(node, ast.arguments) and node.kwarg is not None and not _typed(node.kwarg):
            breaches.append(f"{node.kwarg.lineno}: **{node.kwarg.arg}")
    return breaches


def _name(path: Path) -> str:
    return str(path.relative_to(ROOT))


def test_the_sources_are_found() -> None:
    assert {"distill/runtime/errors.py", "sds3d/world/world.py", "scripts/entry.py"} <= {
        _name(path) for path in FILES
    }
    assert {"distill", "distill.teacher", "sds3d.world.world"} <= set(MODULES)


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_file_keeps_the_laws(path: Path) -> None:
    imports, package = _imports(path), path.relative_to(ROOT).parts[0]
    assert not imports & {"torchvision", "pickle", "dill", "joblib", "cloudpickle", "tests"}
    if package == "distill":
        assert not imports & {"sds3d", "scripts", "entry"}, "distill knows nothing of 3D"
    if package != "scripts":
        assert not imports & {"hydra", "omegaconf", "scripts"}, "hydra stops at scripts/"
    assert _breaches(path) == []
    assert len(path.read_text(encoding="utf-8").splitlines()) < LONGEST


@pytest.mark.parametrize("path", sorted((ROOT / "tests").rglob("*.py")), ids=_name)
def test_tests_import_no_tests(path: Path) -> None:
    assert "tests" not in _imports(path)


@pytest.mark.parametrize(
    "source",
    [
        "from os import *",
        "try:\n    pass\nexcept:\n    pass",
        "torch.save(1)",
        "from torch import load",
        "def f(**bag): pass",
        "def f(**bag: Any): pass",
    ],
)
def test_breaches_are_seen(source: str, tmp_path: Path) -> None:
    (tmp_path / "bad.py").write_text(source, encoding="utf-8")
    assert len(_breaches(tmp_path / "bad.py")) == 1


def test_modules_import_without_a_gpu_and_without_what_is_optional() -> None:
    """One process imports them all: the scene and the renderer first, with nothing heavy, then everything."""
    hidden = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", IMPORT, json.dumps([MODULES, NEVER, OPTIONAL])]
    done = subprocess.run(command, cwd=ROOT, env=hidden, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    light, everywhere, initialised = json.loads(done.stdout.splitlines()[-1])
    assert light == [], "import sds3d.scene.nerf, sds3d.scene.renderer"
    assert everywhere == [], "importing every module"
    assert not initialised


# Words that are no terms of the field as names: participles and idioms that say neither what a value is nor
# its role.
VAGUE = set(
    """
    told made seen drawn asked known bound free judged wanted shown found said begun way off behind
    spread shaped painted kept look looks place share located film facing redraw redrawn watched forget
    follow follower answers parted away toward combined distillable meter lag jump strip race some move
    soften relight cover captioned distilled timelaw noiselaw one_time unetscore watch noted matching
    followed pace worse by_teacher onewordapart hard take_over ways teacher_only ask around descend
    image_moves entropy_from straight_target away_from
    """.split()  # noqa: SIM905 - a list of fifty literals is hard to read
)


def _assigned_names(path: Path) -> Iterator[tuple[int, str]]:
    """The names that a file defines: variables, arguments, attributes, functions and classes."""
    for node in _nodes(path):
        if isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg


def _keys(value: object) -> Iterator[str]:
    """All mapping keys of a parsed YAML file."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _keys(item)
    elif isinstance(value, list):
        for item in value:
            yield from _keys(item)


@pytest.mark.parametrize("path", [*FILES, *sorted((ROOT / "tests").rglob("*.py"))], ids=_name)
def test_names_are_terms_of_the_field(path: Path) -> None:
    vague = [f"{line}: {name}" for line, name in _assigned_names(path) if name.lower().strip("_") in VAGUE]
    assert vague == []


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=_name)
def test_config_keys_are_terms_of_the_field(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert [key for key in _keys(yaml.safe_load(text)) if key in VAGUE] == []
    assert max(map(len, text.splitlines())) <= 110


def test_vague_names_are_detected(tmp_path: Path) -> None:
    path = tmp_path / "vague.py"
    path.write_text("def f(told):\n    self.kept = 1\n    for seen in told: pass\nclass Look: pass\n")
    assert {name.lower() for _, name in _assigned_names(path)} & VAGUE == {"told", "kept", "seen", "look"}
    assert list(_keys({"a": [{"race": 1}]})) == ["a", "race"]
