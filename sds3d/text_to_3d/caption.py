"""Pictures with a caption: what a picture shows in words, and what a run with these words does.

Views are sampled as from a prompt, from cameras relative to the object's own front, and the picture is
aligned to the scene that is fitted to them. So what the teacher knows of an object by its name also shows
where the picture hides it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch

from distill.core.teacher import Teacher
from distill.evaluation.clip import ClipScorer
from distill.runtime.errors import UserError
from sds3d.text_to_3d.picture import Picture
from sds3d.text_to_3d.stages.base import StageOptions
from sds3d.text_to_3d.trainer import default_stages
from sds3d.world.shapes import COLOURS, OBJECTS, noun_phrase

GREYS = (0.3, 0.6, 0.9)  # backgrounds whose embeddings are averaged


@dataclass(frozen=True)
class CaptionOptions:
    """When a picture has a caption, and what a run then has in place of its own `run` and `text_to_3d`.

    A prompt is the caption. Without one, CLIP's nearest of the world's single objects in its colours is, if
    it is near enough. With neither, the picture itself is the teacher's condition.
    """

    enabled: bool = True  # false: the picture is always the condition, with the prompt beside it
    min_similarity: float = 0.76  # cosine by the teacher's CLIP from which on a picture is recognised
    steps: int = 300
    views_per_group: int = 4
    group_layout: Literal["ring", "random"] = "ring"
    stages: dict[str, StageOptions] = field(default_factory=default_stages)

    def __post_init__(self) -> None:
        if not -1 <= self.min_similarity <= 1:
            raise UserError(
                f"caption.min_similarity is {self.min_similarity}: a cosine in [-1, 1] is expected"
            )


def world_captions(teacher: Teacher) -> list[str]:
    """The world's single objects in its colours, as far as the teacher's vocabulary has the words."""
    captions = []
    for caption in (noun_phrase(colour, name) for name in OBJECTS for colour in COLOURS):
        try:
            teacher.check_prompt(caption)
        except UserError:
            continue
        captions.append(caption)
    return captions


def recognise(clip: ClipScorer, picture: Picture, captions: Sequence[str], min_similarity: float) -> str:
    """The caption of a picture: that of the highest cosine by CLIP, empty if below `min_similarity`."""
    if not captions:
        return ""
    greys = torch.tensor(GREYS)[:, None].expand(-1, 3)
    cosines = (clip.image_features(picture.over(greys)) @ clip.text_features(captions).T).mean(0)
    best = int(cosines.argmax())
    return captions[best] if float(cosines[best]) >= min_similarity else ""
