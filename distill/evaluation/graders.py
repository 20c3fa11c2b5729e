"""The networks that grade images, each optional: a judge, CLIP, and the features of set distances."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from distill.evaluation.clip import ClipScorer, caption_retrieval, clip_score, load_clip_scorer, mean_cosine
from distill.evaluation.features import Extractor, extractor, judge_extractor
from distill.evaluation.judge import Judge, label_probabilities, load_judge, predict
from distill.evaluation.labels import LabelOptions, fractions, judge_accuracy
from distill.evaluation.metrics import inception_score, saturation
from distill.runtime.errors import UserError


@dataclass(frozen=True)
class Graders:
    """A figure whose grader is None is left out."""

    judge: Judge | None = None
    clip: ClipScorer | None = None
    extract: Extractor | None = None

    def features(self, images: Tensor) -> Tensor:
        """Features (N, D) of images (N, 3, H, W). Raises `UserError` where there is no extractor."""
        if self.extract is None:
            raise UserError("no judge and no CLIP to take features from: give features=, judge= or clip=")
        return self.extract(images)

    def accuracy(
        self, images: Tensor, rows: Sequence[Mapping[str, object]], labels: LabelOptions
    ) -> dict[str, float]:
        """The judge's accuracy on images against their rows (`judge_accuracy`); empty without a judge."""
        return {} if self.judge is None else judge_accuracy(self.judge, images, rows, labels)

    def inception_score(self, images: Tensor) -> dict[str, float]:
        """By the judge's attribute of most labels, in place of Inception's classes; empty without a judge."""
        if self.judge is None:
            return {}
        probabilities = label_probabilities(self.judge, images).values()
        return {"inception_score": inception_score(max(probabilities, key=lambda values: values.shape[1]))}

    def caption_retrieval(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """`clip_score`, and `caption_retrieval` among the captions of these images; empty without CLIP."""
        if self.clip is None:
            return {}
        features = self.clip.image_features(images)
        score = mean_cosine(self.clip, features, captions)
        return {"clip_score": score, **caption_retrieval(self.clip, features, captions)}

    def clip_figures(self, images: Tensor, captions: Sequence[str]) -> dict[str, float]:
        """`clip_score` of images and their captions; empty without CLIP."""
        return {} if self.clip is None else {"clip_score": clip_score(self.clip, images, captions)}


def load_graders(
    teacher: str,
    judge: str | None,
    clip: str | None = None,
    features: str | None = None,
    device: torch.device | str = "cpu",
) -> Graders:
    """Graders by name, loaded to `device` in float32. Without `features` they are the judge's, else CLIP's.

    teacher: whose own CLIP serves where `clip` is None. Raises `UserError` for a name that cannot be loaded.
    """
    loaded = None if judge is None else load_judge(judge, device)
    scorer = load_clip_scorer(teacher, clip, device)
    if features is not None:
        return Graders(loaded, scorer, extractor(features, device))
    if loaded is not None:
        return Graders(loaded, scorer, judge_extractor(loaded))
    return Graders(None, scorer, None if scorer is None else scorer.image_features)


def target_labels(prompt: str, judge: Judge) -> dict[str, str]:
    """The labels that a prompt names, by the judge's attributes: its words that are labels."""
    words = prompt.replace(",", " ").split()
    return {name: word for name, labels in judge.labels.items() for word in words if word in labels}


@torch.no_grad()
def grade_images(images: Tensor, prompts: Sequence[str], graders: Graders) -> dict[str, float]:
    """Figures of images (N, 3, H, W) against their prompts: CLIP score, the judge's accuracy, saturation.

    `judge_<attribute>`: the fraction predicted as its prompt names it, among the prompts that name it;
    for attributes that count unconditionally, as a prompt states no condition.
    """
    return {
        **graders.clip_figures(images, prompts),
        **({} if graders.judge is None else _prompt_accuracy(graders.judge, images, prompts)),
        "saturation": float(saturation(images).mean()),
    }


def _prompt_accuracy(judge: Judge, images: Tensor, prompts: Sequence[str]) -> dict[str, float]:
    predictions = predict(judge, images)
    targets = [target_labels(prompt, judge) for prompt in prompts]
    conditional = {attribute for attribute, _ in judge.options.only_if}
    return fractions(
        {
            f"judge_{name}": [
                predictions[name][i] == target[name] for i, target in enumerate(targets) if name in target
            ]
            for name in judge.labels
            if name not in conditional
        }
    )
