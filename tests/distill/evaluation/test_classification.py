"""Zero-shot labels and logistic regression: closed forms, and the shipped CLIP on renders and on digits."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from command_line import script
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from distill.data.folders import CaptionedImages
from distill.data.sources.source import FolderOptions, ImageSource, Item, write_dataset
from distill.evaluation.classification import (
    captions_of,
    classes_of,
    fitted_accuracy,
    labelled,
    logistic_regression,
)
from distill.runtime.errors import UserError


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_regression_of_one_feature_is_the_log_odds() -> None:
    """Without a feature's variation the bias alone is left: logits differ by the log of the classes' odds."""
    classes = torch.tensor([0] * 30 + [1] * 10)
    weights = logistic_regression(torch.zeros(40, 1), classes, 2)
    assert float(weights[1, 0] - weights[1, 1]) == pytest.approx(np.log(3), abs=1e-4)
    assert not weights[0].any()


def test_the_gradient_of_the_penalised_loss_is_zero_at_the_minimum() -> None:
    features, classes = random(60, 3), (random(60, seed=1) > 0).long()
    weights = logistic_regression(features, classes, 2, penalty=0.1).double().requires_grad_(True)
    inputs = torch.cat([features, torch.ones(60, 1)], 1).double()
    loss = F.cross_entropy(inputs @ weights, classes) + 0.05 * weights[:-1].square().sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert float(gradient.abs().max()) < 1e-4
    assert weights[:-1].abs().max() > 1e-3


def test_separable_classes_are_learned_and_random_ones_are_not() -> None:
    features = random(300, 5)
    separable = (features[:, 0] > 0).long() + 2 * (features[:, 1] > 0).long()
    assert fitted_accuracy(features[:200], separable[:200], features[200:], separable[200:]) > 0.9
    unrelated = torch.randint(4, (300,), generator=torch.Generator().manual_seed(2))
    assert fitted_accuracy(features[:200], unrelated[:200], features[200:], unrelated[200:]) < 0.45


def test_what_does_not_vary_in_training_decides_nothing() -> None:
    """Constants that are inexact in floats, and other values of them in the test."""
    features = random(300, 3)
    classes = (features[:, 0] > 0).long()
    constants = torch.full((300, 20), 0.7)
    constants[200:] += 0.3 * random(100, 20, seed=3)
    both = torch.cat([features, constants], 1)
    assert fitted_accuracy(both[:200], classes[:200], both[200:], classes[200:]) > 0.9


def test_labels_and_captions() -> None:
    rows = [{"file_name": "x", "text": "", "digit": value} for value in (10, 9, 2, None)]
    data = CaptionedImages(torch.zeros(4, 3, 4, 4, dtype=torch.uint8), rows)
    assert classes_of(data, "digit") == ["2", "9", "10"]
    assert labelled(data, "digit", ["2", "9", "10"]).classes.tolist() == [2, 1, 0]
    assert captions_of(["2", "9"], "a {}", {"9": "nine"}) == ["a 2", "a nine"]
    assert captions_of(["airplane"], "a {}", {}) == ["an airplane"]
    for template, names in (("a", {}), ("a {} {x}", {}), ("a {}", {"7": "seven"})):
        with pytest.raises(UserError, match="expected a template with {}, and names of 2, 9"):
            captions_of(["2", "9"], template, names)
    with pytest.raises(UserError, match="column text has 0 labels"):
        classes_of(data, "text")
    with pytest.raises(UserError, match="no image has a digit of 3"):
        labelled(data, "digit", ["3"])


class Dots(ImageSource):
    """A red square or a blue one, of the label cube or sphere; rows with the other colour for its label."""

    licence = "none"

    def items(self, cache: Path) -> list[Item]:
        items = []
        for index in range(24):
            image = np.full((64, 64, 3), 180, np.uint8)
            image[20:44, 20:44] = (200, 20, 20) if index % 2 else (20, 20, 200)
            row = {"text": "x", "colour": "red" if index % 2 else "blue"}
            items.append(Item(image, row, "train" if index < 16 else "test"))
        return items


def test_the_script_compares_them(tmp_path: Path) -> None:
    """The shipped CLIP knows colours without training; captions of unknown words are refused."""
    write_dataset(Dots(), tmp_path / "data", FolderOptions(), tmp_path)
    arguments = [f"data={tmp_path / 'data'}", "column=colour", f"output={tmp_path / 'figures.json'}"]
    printed = script("classify", *arguments, "template=a {} cube")
    accuracies = dict(line.split() for line in printed.splitlines()[:4])
    names = ("zero_shot", "regression_on_clip", "regression_on_pixels")
    assert accuracies == {**dict.fromkeys(names, "1.000"), "most_frequent": "0.500"}
    message = script("classify", *arguments, "template=a {} zebra", code=2)
    assert "unknown word 'zebra'" in message


def test_nearest_images_are_of_the_queried_colour(tmp_path: Path) -> None:
    """By text and by image; an image of the data is nearest to itself."""
    write_dataset(Dots(), tmp_path / "data", FolderOptions(), tmp_path)
    names = [f"data={tmp_path / 'data'}", f"output={tmp_path / 'nearest.png'}"]
    script("nearest_images", "a red cube", "a blue cube", "count=3", *names)
    results = json.loads((tmp_path / "nearest.json").read_text())
    assert list(results) == ["a red cube", "a blue cube"]
    colours = [
        json.loads(line)["colour"]
        for line in (tmp_path / "data" / "test" / "metadata.jsonl").read_text().splitlines()
    ]
    for query, entries in results.items():
        indices = [int(Path(entry["file"]).stem) for entry in entries]
        assert len(entries) == 3 and {colours[index] for index in indices} == {query.split()[1]}
    assert Image.open(tmp_path / "nearest.png").size[0] > 3 * 64
    image = tmp_path / "data" / "test" / "000001.png"
    script("nearest_images", str(image), *names)
    (entries,) = json.loads((tmp_path / "nearest.json").read_text()).values()
    assert entries[0]["cosine"] == pytest.approx(1, abs=1e-3)
    for queries, expected in {
        (str(image), "a red cube"): "give texts alone, or files alone",
        ("missing.png",): "missing.png does not exist",
        ("a zebra",): "unknown word 'zebra'",
        ("a red cube", "count=0"): "count is 0",
    }.items():
        assert expected in script("nearest_images", *queries, *names, code=2)
