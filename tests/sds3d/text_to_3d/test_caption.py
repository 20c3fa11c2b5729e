"""Pictures with a caption: recognition by CLIP, and the options of a run with a caption."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scene_fixtures import OPTIONS, SDS, run_options
from torch import Tensor

from distill.planning.plan import make_plan
from distill.runtime.errors import UserError
from sds3d.planning import text_to_3d_subject
from sds3d.text_to_3d import recipe as recipe_module
from sds3d.text_to_3d.caption import CaptionOptions, recognise, world_captions
from sds3d.text_to_3d.picture import CutOut
from sds3d.text_to_3d.recipe import TextTo3dRecipe, start_text_to_3d, with_caption


class TableClip:
    """Given embeddings of captions; every image has the first axis as its own."""

    def __init__(self, captions: dict[str, Tensor]) -> None:
        self.captions = captions

    def image_features(self, images: Tensor) -> Tensor:
        return torch.tensor([1.0, 0.0]).expand(len(images), -1)

    def text_features(self, captions: Sequence[str]) -> Tensor:
        return torch.stack([self.captions[caption] for caption in captions])


def test_the_nearest_caption_counts_if_it_is_near_enough() -> None:
    picture = CutOut(np.ones((40, 40, 3)), np.ones((40, 40)), "x").picture(16)
    captions = {"a red cube": torch.tensor([0.6, 0.8]), "a red sphere": torch.tensor([0.8, 0.6])}
    clip = TableClip(captions)
    assert recognise(clip, picture, list(captions), 0.79) == "a red sphere"  # type: ignore[arg-type]
    assert recognise(clip, picture, list(captions), 0.81) == ""  # type: ignore[arg-type]
    assert recognise(clip, picture, [], 0.0) == ""  # type: ignore[arg-type]


def test_captions_are_those_that_the_teacher_can_read() -> None:
    class Vocabulary:
        def check_prompt(self, prompt: str) -> None:
            if not set(prompt.split()) <= {"a", "red", "blue", "cube", "car"}:
                raise UserError("unknown words")

    captions = world_captions(Vocabulary())  # type: ignore[arg-type]
    assert sorted(captions) == ["a blue car", "a blue cube", "a red car", "a red cube"]


# The run


@pytest.fixture
def recipe(tmp_path: Path, multi_view_teacher_folder: Path) -> TextTo3dRecipe:
    """A run on a picture of a red square, without a prompt."""
    image = np.full((64, 64, 3), 200, np.uint8)
    image[12:52, 12:52] = 200, 30, 20
    Image.fromarray(image).save(tmp_path / "photo.png")
    return TextTo3dRecipe(
        prompt="",
        image=str(tmp_path / "photo.png"),
        teacher=str(multi_view_teacher_folder),
        run=run_options(tmp_path / "run", 9),
        text_to_3d=replace(OPTIONS, prompt="", views_per_group=3),
        caption=CaptionOptions(steps=5, views_per_group=2),
        objective=SDS,
    )


def test_a_recognised_picture_is_sampled_by_its_caption(
    recipe: TextTo3dRecipe, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(recipe_module, "recognise", lambda *args: "a red cube")
    changed = with_caption(recipe)
    assert "the picture shows a red cube, recognised by CLIP" in capsys.readouterr().out
    assert changed.prompt == changed.text_to_3d.prompt == "a red cube"
    assert changed.run.steps == 5 and changed.text_to_3d.views_per_group == 2
    assert list(changed.text_to_3d.stages) == ["sampled_views"]
    assert with_caption(changed) == changed and not capsys.readouterr().out


def test_a_prompt_is_the_caption(recipe: TextTo3dRecipe) -> None:
    """The run's own elevation is not estimated: it follows from the alignment."""
    prompted = replace(
        recipe, prompt="a red cube", text_to_3d=replace(recipe.text_to_3d, prompt="a red cube")
    )
    trainer = start_text_to_3d(prompted)
    assert trainer.reference is not None and trainer.reference.has_caption and not trainer.reference.active
    assert trainer.run.options.steps == 5 and trainer.reference.nfe == 0


def test_without_a_caption_the_picture_is_the_condition(
    recipe: TextTo3dRecipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_module, "recognise", lambda *args: "")
    assert with_caption(recipe) == recipe
    monkeypatch.setattr(recipe_module, "recognise", lambda *args: "a red cube")
    disabled = replace(recipe, caption=CaptionOptions(enabled=False))
    assert with_caption(disabled) == disabled
    assert with_caption(replace(recipe, image=None)) == replace(recipe, image=None)


def test_a_run_with_a_caption_is_planned(recipe: TextTo3dRecipe) -> None:
    """No row of a picture: with and without text, 20 steps of the first round and 10 of the second."""
    prompted = replace(
        recipe, prompt="a red cube", text_to_3d=replace(recipe.text_to_3d, prompt="a red cube")
    )
    plan = make_plan(text_to_3d_subject(with_caption(prompted)), torch.float32)
    assert plan.record.samples["U-Net"] == 48 * 2 * (20 + 10)


def test_a_cosine_out_of_range_is_refused() -> None:
    with pytest.raises(UserError, match=r"min_similarity is 2: a cosine in \[-1, 1\]"):
        CaptionOptions(min_similarity=2)
