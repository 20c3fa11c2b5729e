"""A teacher's identity: whatever path and precision; recorded with its parts, which fit no other teacher."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from distill.control.adapter import ControlOptions, load_adapter, make_adapter, save_adapter
from distill.control.network import Control
from distill.core.identity import TeacherIdentity, check_teacher, recorded_teacher, teacher_mismatch
from distill.evaluation.probe import Probe, ProbeOptions, load_probe, save_probe
from distill.one_step.folder import load_student, save_student
from distill.one_step.regression import PairOptions, load_pairs, make_pairs
from distill.one_step.student import GuidanceEmbedding, Student, StudentOptions
from distill.runtime.errors import UserError
from distill.runtime.files import read_json
from distill.runtime.images import save_png
from distill.runtime.shipped import SHIPPED, WEIGHTS, resolve
from distill.teacher.identity import identify
from distill.teacher.latent import LatentDiffusionTeacher, load_latent_diffusion

UNET = "unet/diffusion_pytorch_model.safetensors"
SHIPPED_PARTS = {"student": "student.json", "adapter": "condition.json"}


def changed(folder: Path, file: str, change: Callable[[Tensor], Tensor], target: Path) -> Path:
    """A copy of a teacher's folder in which the tensors of a file are changed."""
    shutil.copytree(folder, target)
    tensors = {name: change(value) for name, value in load_file(folder / file).items()}
    save_file(tensors, target / file, metadata={"format": "pt"})
    return target


@pytest.fixture
def other_teacher(tiny_teacher_folder: Path, tmp_path: Path) -> LatentDiffusionTeacher:
    """A teacher of the same shapes with another U-Net, in the folder `other`."""
    return load_latent_diffusion(
        str(changed(tiny_teacher_folder, UNET, lambda value: 1.01 * value, tmp_path / "other"))
    )


def test_identity_does_not_depend_on_path_and_precision(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    copy = tmp_path / "elsewhere"
    shutil.copytree(tiny_teacher_folder, copy)
    expected = load_latent_diffusion(str(tiny_teacher_folder)).identity
    assert expected is not None and expected.name == str(tiny_teacher_folder)
    for dtype in (torch.float32, torch.bfloat16):
        identity = load_latent_diffusion(str(copy), dtype=dtype).identity
        assert identity == TeacherIdentity(str(copy), expected.digest)


def test_float32_and_half_precision_files_have_one_digest(tiny_teacher_folder: Path, tmp_path: Path) -> None:
    noise = torch.Generator().manual_seed(0)
    fine = changed(
        tiny_teacher_folder,
        UNET,
        lambda value: value.float() + 1e-2 * torch.randn(value.shape, generator=noise),
        tmp_path / "float32",
    )
    coarse = changed(fine, UNET, Tensor.half, tmp_path / "half")
    assert identify("a", fine) == identify("a", coarse) != identify("a", tiny_teacher_folder)


def test_the_digest_is_of_the_unet_and_its_view_conditions(
    multi_view_teacher_folder: Path, tmp_path: Path
) -> None:
    digest = identify("a", multi_view_teacher_folder)
    files = ["vae/diffusion_pytorch_model.safetensors", UNET, "view_conditions/model.safetensors"]
    folders = [
        changed(multi_view_teacher_folder, file, lambda value: 1.01 * value, tmp_path / str(index))
        for index, file in enumerate(files)
    ]
    assert [identify("a", folder) == digest for folder in folders] == [True, False, False]


def test_an_unknown_teacher_is_not_compared(tmp_path: Path) -> None:
    assert identify("a", tmp_path) is None
    part = TeacherIdentity("a", "0")
    assert teacher_mismatch("part", part, None) is None and teacher_mismatch("part", None, part) is None


def test_a_mismatch_is_one_sentence() -> None:
    a, b, retrained = TeacherIdentity("a", "0"), TeacherIdentity("b", "1"), TeacherIdentity("a", "2")
    check_teacher("adapter x", a, TeacherIdentity("elsewhere/a", "0"), "train one")
    with pytest.raises(
        UserError, match="adapter x belongs to the teacher a, not to b: give teacher=a, or train"
    ):
        check_teacher("adapter x", a, b, "train one")
    with pytest.raises(UserError, match="the teacher a as it was before its weights changed: train one$"):
        check_teacher("adapter x", a, retrained, "train one")
    with pytest.raises(UserError, match=r"x\.json: teacher"):
        recorded_teacher({"teacher": {"name": "a"}}, "x.json")


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind in SHIPPED_PARTS for name in SHIPPED[kind]])
def test_every_shipped_part_names_its_teacher(kind: Any, name: str) -> None:
    path = resolve(kind, name) / SHIPPED_PARTS[kind]
    owner = recorded_teacher(read_json(path), str(path))
    assert owner is not None and owner == identify(str(WEIGHTS / owner.name), resolve("teacher", owner.name))


def test_an_adapter_is_refused_by_another_teacher(
    tiny_teacher: LatentDiffusionTeacher, other_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    adapter = make_adapter(tiny_teacher)
    save_adapter(tmp_path / "a", adapter, "depth", {}, tiny_teacher.identity)
    save_png(tmp_path / "image.png", torch.zeros(3, 64, 64))
    options = ControlOptions(str(tmp_path / "a"), str(tmp_path / "image.png"))
    assert isinstance(options.build(tiny_teacher), Control)
    message = (
        "the adapter .*/a belongs to the teacher .*/tiny, not to .*/other: give teacher=.*/tiny, or train"
    )
    with pytest.raises(UserError, match=message):
        options.build(other_teacher)

    save_adapter(tmp_path / "b", adapter, "depth", {})  # as one made elsewhere: only shapes are compared
    assert load_adapter(tmp_path / "b", other_teacher)[1] == "depth"


@pytest.mark.parametrize("embedding", [None, GuidanceEmbedding(dim=8)], ids=["plain", "guidance"])
def test_a_student_takes_the_adapters_of_its_teacher(
    embedding: GuidanceEmbedding | None,
    tiny_teacher: LatentDiffusionTeacher,
    other_teacher: LatentDiffusionTeacher,
    tmp_path: Path,
) -> None:
    student = Student.from_teacher(tiny_teacher, StudentOptions(guidance_embedding=embedding))
    save_student(tmp_path / "s", student, tiny_teacher)
    loaded, parts = load_student(tmp_path / "s", teacher=tiny_teacher)
    assert parts.identity == tiny_teacher.identity and loaded.guidance == student.guidance
    for index, teacher in enumerate((tiny_teacher, other_teacher)):
        save_adapter(tmp_path / str(index), make_adapter(teacher), "depth", {}, teacher.identity)
    load_adapter(tmp_path / "0", parts)
    with pytest.raises(UserError, match="/other, not to .*/tiny"):
        load_adapter(tmp_path / "1", parts)
    with pytest.raises(UserError, match="the student .*/s belongs to the teacher .*/tiny, not to .*/other"):
        load_student(tmp_path / "s", teacher=other_teacher)

    facts = read_json(tmp_path / "s" / "student.json")
    facts.pop("teacher")  # as one of an earlier version
    (tmp_path / "s" / "student.json").write_text(json.dumps(facts))
    assert load_student(tmp_path / "s", teacher=other_teacher)[1].identity is None


def test_a_probe_for_another_teacher_is_reported(
    tiny_teacher: LatentDiffusionTeacher,
    other_teacher: LatentDiffusionTeacher,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    save_probe(Probe(ProbeOptions(width=4)), tmp_path / "p", {}, tiny_teacher.identity)
    capsys.readouterr()
    load_probe(tmp_path / "p", teacher=tiny_teacher)
    load_probe(tmp_path / "p")
    assert capsys.readouterr().err == ""
    load_probe(tmp_path / "p", teacher=other_teacher)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: the probe") and "/tiny, not to" in line and "train_probe.py" in line


def test_pairs_are_refused_by_another_teacher(
    tiny_teacher: LatentDiffusionTeacher, other_teacher: LatentDiffusionTeacher, tmp_path: Path
) -> None:
    make_pairs(tiny_teacher, ["a red cube"], tmp_path / "p", PairOptions(count=1, steps=1))
    assert len(load_pairs(tmp_path / "p", tiny_teacher).noise) == 1
    with pytest.raises(UserError, match="set of pairs .*/p belongs to the teacher .*/tiny, not to .*/other"):
        load_pairs(tmp_path / "p", other_teacher)
