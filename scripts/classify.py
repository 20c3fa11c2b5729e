"""Labels of images: zero-shot by CLIP, beside a logistic regression on pixels and on CLIP's features.

python scripts/classify.py data=outputs/shapes64 column=object "template=a {}"
"""

from dataclasses import dataclass, field

from entry import entry

from distill.data.folders import load_split
from distill.evaluation.classification import captions_of, classes_of, classification_figures, labelled
from distill.evaluation.clip import load_text_scorer
from distill.runtime.files import write_json
from distill.runtime.machine import machine_info, pick_device


@dataclass(frozen=True, kw_only=True)
class Config:
    """A labelled data set, CLIP, and the captions that stand for labels."""

    data: str = "outputs/shapes64"  # a captioned image folder with the splits train and test
    column: str = "object"  # of the label in the rows
    clip: str = "shapes64"  # a teacher with its CLIP, or a CLIP model of transformers
    template: str = "a {}"  # of captions; {} is the label, or its name
    names: dict[str, str] = field(default_factory=dict)  # of labels that a caption calls otherwise
    resolution: int = 64
    train: int = 5000  # images of the regressions
    test: int = 2000
    output: str = "outputs/classification.json"
    device: str = "auto"  # auto: cuda when there is one


def main(config: Config) -> None:
    data = {
        split: load_split(config.data, split, config.resolution, limit)
        for split, limit in (("train", config.train), ("test", config.test))
    }
    labels = classes_of(data["train"], config.column)
    captions = captions_of(labels, config.template, config.names)
    clip = load_text_scorer(config.clip, captions, pick_device(config.device))
    train, test = (labelled(split, config.column, labels) for split in data.values())
    figures = classification_figures(clip, captions, train, test)
    for name in ("zero_shot", "regression_on_clip", "regression_on_pixels", "most_frequent"):
        print(f"{name:24} {figures[name]:.3f}")
    write_json(config.output, {**figures, "test": len(test.classes), "machine": machine_info()})
    print(f"written: {config.output}")


if __name__ == "__main__":
    entry("classify", Config, main)
