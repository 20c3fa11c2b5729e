"""CLIP: the loss against a slow reference, the bound of the temperature, hard negatives, learning a toy."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from distill.data.folders import CaptionedImages
from distill.runtime.run import Run, RunOptions
from distill.teacher import clip as module
from distill.teacher.clip import (
    ClipOptions,
    augment,
    build_clip,
    caption_features,
    contrastive_loss,
    hard_negative_stage,
    image_features,
    pixel_values,
    text_features,
    tokenize,
    train_clip,
)
from distill.teacher.folder import text_encoder_of
from distill.teacher.hard_negatives import HardNegatives
from distill.teacher.vocabulary import build_tokenizer

COLOURS = {"red": (0.9, 0.1, 0.1), "green": (0.1, 0.8, 0.1), "blue": (0.1, 0.1, 0.9)}
PROMPTS = [f"a {name} square" for name in COLOURS]
TINY = ClipOptions(width=32, layers=1, patch=8, text_width=32, text_layers=1, projection=16, batch=12)


def toy(count: int) -> CaptionedImages:
    generator = torch.Generator().manual_seed(0)
    images = torch.full((count, 3, 16, 16), 0.5) + 0.05 * torch.randn(count, 3, 16, 16, generator=generator)
    for number, image in enumerate(images):
        image[:, 3:13, 3:13] = torch.tensor(list(COLOURS.values())[number % 3])[:, None, None]
    return CaptionedImages(
        (images.clamp(0, 1) * 255).byte(), [{"text": PROMPTS[number % 3]} for number in range(count)]
    )


def slow_loss(image: Tensor, text: Tensor, captions: list[str], scale: float, weight: float) -> float:
    """One row at a time: minus the mean log-probability of the positives."""
    total = 0.0
    for queries, keys, part in ((image, text, weight), (text, image, 1 - weight)):
        for i in range(len(captions)):
            logits = [scale * float(queries[i] @ keys[j]) for j in range(len(captions))]
            norm = torch.tensor(logits).logsumexp(0).item()
            positives = [j for j in range(len(captions)) if captions[j] == captions[i]]
            total -= part * sum(logits[j] - norm for j in positives) / len(positives) / len(captions)
    return total


@pytest.mark.parametrize("weight", [0.5, 1.0, 0.25])
@pytest.mark.parametrize("captions", [list("abcd"), list("aaab"), list("aaaa")])
def test_loss_equals_the_slow_reference(captions: list[str], weight: float) -> None:
    generator = torch.Generator().manual_seed(0)
    image, text = (
        F.normalize(torch.randn(4, 5, generator=generator, dtype=torch.float64), dim=-1) for _ in range(2)
    )
    same = torch.tensor([[float(a == b) for a in captions] for b in captions], dtype=torch.float64)
    loss = contrastive_loss(image, text, same, torch.tensor(2.0, dtype=torch.float64), weight)
    expected = slow_loss(image, text, captions, float(torch.tensor(2.0).exp()), weight)
    assert float(loss) == pytest.approx(expected, abs=1e-5)


def test_the_two_directions_differ() -> None:
    """Otherwise the comparison above would not detect a swapped weight."""
    generator = torch.Generator().manual_seed(0)
    image, text = (F.normalize(torch.randn(4, 5, generator=generator), dim=-1) for _ in range(2))
    forward, backward = (
        contrastive_loss(image, text, torch.eye(4), torch.tensor(2.0), weight) for weight in (1.0, 0.0)
    )
    assert abs(float(forward - backward)) > 0.05


def test_features_equal_those_of_transformers() -> None:
    tokenizer, _ = build_tokenizer(PROMPTS)
    model = build_clip(TINY, tokenizer, 16).eval()
    images, ids = torch.rand(3, 3, 16, 16), tokenize(tokenizer, PROMPTS)
    with torch.no_grad():
        output = model(input_ids=ids, pixel_values=pixel_values(model, images))
        logits = text_features(model, ids) @ image_features(model, images).T * model.logit_scale.exp()
        torch.testing.assert_close(output.logits_per_text, logits, atol=1e-4, rtol=1e-4)
        states = text_encoder_of(model)(ids).last_hidden_state
        torch.testing.assert_close(states, model.text_model(input_ids=ids).last_hidden_state)
    assert ids.shape == (3, tokenizer.model_max_length)


def test_pooling_is_at_the_end_of_the_caption_not_of_the_padding() -> None:
    """transformers pools at the end token of the config: a wrong id would pool all captions alike."""
    tokenizer, _ = build_tokenizer(PROMPTS)
    model = build_clip(TINY, tokenizer, 16).eval()
    ids = tokenize(tokenizer, [PROMPTS[0]])
    with torch.no_grad():
        out = model.text_model(input_ids=ids)
    torch.testing.assert_close(out.pooler_output[0], out.last_hidden_state[0, 4])  # start, three words, end


def test_augment_mirrors_only_on_request() -> None:
    images = torch.zeros(200, 3, 16, 16)
    images[:, 0, :, :8] = 1.0  # red on the left
    for mirror, expected in ((False, 0.0), (True, 0.5)):
        changed = augment(images, torch.Generator().manual_seed(1), mirror)
        mirrored = changed[:, 0, :, :4].mean((1, 2)) < changed[:, 0, :, -4:].mean((1, 2))
        assert float(mirrored.float().mean()) == pytest.approx(expected, abs=0.1)
        assert float(changed.min()) >= 0 and float(changed.max()) <= 1


def test_further_negatives_count_in_the_image_direction_only() -> None:
    generator = torch.Generator().manual_seed(0)
    image, text, negatives = (F.normalize(torch.randn(n, 5, generator=generator), dim=-1) for n in (4, 4, 3))
    eye, log_scale = torch.eye(4), torch.tensor(2.0)
    same = torch.cat([eye, torch.zeros(4, 3)], 1)
    same[1, 5] = 1  # one of them is the caption of image 1
    logits = log_scale.exp() * image @ torch.cat([text, negatives]).T
    expected = -sum((logits[i].log_softmax(0) * same[i]).sum() / same[i].sum() for i in range(4)) / 4
    torch.testing.assert_close(
        contrastive_loss(image, torch.cat([text, negatives]), same, log_scale, 1.0), expected
    )
    without = contrastive_loss(image, text, eye, log_scale, 0.0)
    torch.testing.assert_close(
        contrastive_loss(image, torch.cat([text, negatives]), same, log_scale, 0.0), without
    )


def test_learns_a_toy_and_classifies_it(tmp_path: Path) -> None:
    data = toy(24)
    tokenizer, _ = build_tokenizer(PROMPTS)
    run = Run(RunOptions(str(tmp_path), 40, trackers=()), {}, "clip")
    model = train_clip(run, data, tokenizer, TINY)
    assert not model.training
    with torch.no_grad():
        similar = (
            image_features(model, data.composite(slice(None)))
            @ caption_features(model, tokenizer, PROMPTS, batch=2).T
        )
    assert similar.argmax(1).tolist() == [number % 3 for number in range(24)]


def test_the_temperature_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hot(*arguments: object) -> torch.nn.Module:
        model = build_clip(*arguments)  # type: ignore[arg-type]
        model.logit_scale.data.fill_(9.0)
        return model

    monkeypatch.setattr(module, "build_clip", hot)
    tokenizer, _ = build_tokenizer(PROMPTS)
    model = train_clip(Run(RunOptions(str(tmp_path), 1, trackers=()), {}, "clip"), toy(12), tokenizer, TINY)
    assert float(model.logit_scale.detach().exp()) == pytest.approx(100, rel=1e-3)


def test_hard_negatives_are_one_word_apart() -> None:
    texts = [
        f"{a} {b} car, {c} view"
        for a in ("red", "blue")
        for b in ("big", "old", "low")
        for c in ("front", "back", "side")
    ]
    texts += ["a lonely caption of its own"]
    tokenizer, _ = build_tokenizer(texts)
    ids = tokenize(tokenizer, texts)
    hard_negatives = HardNegatives(ids)
    samples = hard_negatives.sample(torch.arange(len(texts)), 400, torch.Generator().manual_seed(0))
    assert samples.shape == (19, 400)
    distance = (ids[samples] != ids[:, None]).sum(-1)
    assert bool((distance[:-1] == 1).all())
    assert samples[-1].unique().numel() == 19  # without a neighbour: any caption
    for i, row in enumerate(samples[:-1]):
        assert set(row.tolist()) == {j for j in range(18) if int((ids[i] != ids[j]).sum()) == 1}
    colour_rate = (ids[samples[:-1]] != ids[:-1, None])[..., 1].float().mean()  # 2 choices beside 3 and 3
    assert float(colour_rate) == pytest.approx(math.log(2) / math.log(2 * 3 * 3), abs=0.02)


def test_hard_negatives_separate_the_captions(tmp_path: Path) -> None:
    """Both towers learn: the toy is classified, and captions that differ in one word are less similar."""
    data = toy(24)
    tokenizer, _ = build_tokenizer(PROMPTS)
    torch.manual_seed(0)
    model = build_clip(TINY, tokenizer, 16)
    before = caption_features(model, tokenizer, PROMPTS)
    model = hard_negative_stage(
        Run(RunOptions(str(tmp_path), 60, trackers=()), {}, "hard_negatives"), model, data, tokenizer, TINY
    )
    assert not model.training
    after = caption_features(model, tokenizer, PROMPTS)
    assert float((after @ after.T).triu(1).max()) < float(
        (before @ before.T)[~torch.eye(3, dtype=torch.bool)].min()
    )
    with torch.no_grad():
        similar = image_features(model, data.composite(slice(None))) @ after.T
    assert similar.argmax(1).tolist() == [number % 3 for number in range(24)]


def test_omitting_padding_changes_nothing() -> None:
    tokenizer, _ = build_tokenizer([*PROMPTS, "red"])
    model = build_clip(TINY, tokenizer, 16).eval()
    with torch.no_grad():
        texts = [PROMPTS[0], "red", " ".join(["red"] * 40)]
        batched = caption_features(model, tokenizer, texts)
        single = torch.cat([caption_features(model, tokenizer, [text]) for text in texts])
    torch.testing.assert_close(batched, single)
