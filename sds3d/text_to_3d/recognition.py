"""What a picture shows, in words: CLIP's nearest caption, where it is near enough."""

from collections.abc import Sequence

import torch

from distill.core.teacher import Teacher
from distill.evaluation.clip import ClipScorer
from distill.runtime.errors import UserError
from sds3d.text_to_3d.picture import Picture
from sds3d.world.shapes import COLOURS, OBJECTS, noun_phrase

GREYS = (0.3, 0.6, 0.9)  # backgrounds whose embeddings are averaged


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
