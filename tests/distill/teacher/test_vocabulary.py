"""The word-level tokenizer: one token a word, letters for other text, reproducible ids, limits on prompts."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from distill.runtime.errors import UserError
from distill.teacher.latent import LatentDiffusionTeacher
from distill.teacher.vocabulary import (
    build_tokenizer,
    check_length,
    check_prompt,
    load_vocabulary,
    save_vocabulary,
    tokenizer_fingerprint,
    words_of,
)

TEXTS = [
    "a red teapot, front view",
    "a red car",
    "an orange cone on top of a cube",
    "the teapot from the side",
]


def test_words() -> None:
    assert words_of("A red Teapot, front-view 2!") == ["a", "red", "teapot", "front", "view", "2"]


def test_every_word_is_one_token_of_its_own() -> None:
    tokenizer, words = build_tokenizer(TEXTS)
    assert set(words) == set(words_of(" ".join(TEXTS))) and words[0] == "a"  # most frequent first
    ids = [tokenizer(word).input_ids for word in words]
    assert all(len(i) == 3 and i[0] == tokenizer.bos_token_id and i[2] == tokenizer.eos_token_id for i in ids)
    assert len({i[1] for i in ids}) == len(words)
    assert max(i[1] for i in ids) < len(tokenizer)


def test_the_same_texts_give_the_same_token_ids() -> None:
    """The trainer's hash maps are seeded at random, each anew: eight builds would give eight vocabularies."""
    builds = [build_tokenizer(TEXTS)[0] for _ in range(8)]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in builds}) == 1
    assert len({str(tokenizer.backend_tokenizer.to_str()) for tokenizer in builds}) == 1  # merges too
    others = build_tokenizer([*TEXTS, "a blue car"])[0], build_tokenizer(TEXTS, context_length=12)[0]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in (builds[0], *others)}) == 3


def test_a_caption_is_its_words_and_padding() -> None:
    tokenizer, _ = build_tokenizer(TEXTS, context_length=12)
    single = {word: tokenizer(word).input_ids[1] for word in ("a", "red", "car")}
    ids = tokenizer("A  red car", padding="max_length").input_ids
    assert ids[:5] == [
        tokenizer.bos_token_id,
        single["a"],
        single["red"],
        single["car"],
        tokenizer.eos_token_id,
    ]
    assert len(ids) == 12
    assert len(tokenizer("red " * 40, truncation=True).input_ids) == 12


def test_digits_are_words_of_their_own() -> None:
    """As CLIP's tokenizer splits them; a caption such as "keycap 10" is made of words that it knows."""
    assert words_of("1st of 10") == ["1", "st", "of", "1", "0"]
    tokenizer, words = build_tokenizer(["1st of 10"])
    assert set(words) == {"1", "st", "of", "0"} and len(tokenizer("10 of 1st").input_ids) == 7


def test_of_a_large_vocabulary_the_similar_words_are_named() -> None:
    pairs = {f"{first}{second}" for first in "abcdefghijk" for second in "lmnopqrstu"}
    vocabulary = frozenset(pairs | {"zebra"})
    with pytest.raises(UserError, match="unknown word 'zebras' in 'zebras': .* has 111 words, .* zebra$"):
        check_prompt("zebras", vocabulary)


@pytest.mark.parametrize("text", ["zebra", "teapots", "été", "red, !?"])
def test_unknown_text_falls_to_letters_not_to_the_end_token(text: str) -> None:
    tokenizer, _ = build_tokenizer(TEXTS)
    ids = tokenizer(text).input_ids
    assert len(ids) > 3 and tokenizer.eos_token_id not in ids[1:-1]
    assert tokenizer.unk_token_id not in ids[1:-1]


def test_files_hold_the_same_tokenizer_and_words(tmp_path: Path) -> None:
    tokenizer, words = build_tokenizer(TEXTS)
    save_vocabulary(tmp_path, tokenizer, words)
    again = CLIPTokenizer.from_pretrained(tmp_path)
    for text in (*TEXTS, "", "zebra"):
        assert again(text, padding="max_length").input_ids == tokenizer(text, padding="max_length").input_ids
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert load_vocabulary(tmp_path) == frozenset(words)


def test_a_folder_without_words_accepts_any(tmp_path: Path) -> None:
    assert load_vocabulary(tmp_path) is None
    check_prompt("anything at all", None)


def test_prompts_are_checked() -> None:
    vocabulary = frozenset({"a", "red", "car"})
    check_prompt("A red car!", vocabulary)
    with pytest.raises(UserError, match=r"words 'zebra', 'hat' in 'a zebra hat': .* is a, car, red$"):
        check_prompt("a zebra hat", vocabulary)
    with pytest.raises(UserError, match=r"unknown word 'zebra' in"):
        check_prompt("red zebra", vocabulary)
    for empty in ("", "  "):
        with pytest.raises(UserError, match="prompt is empty"):
            check_prompt(empty, None)


def test_long_texts_raise_or_warn(capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer, _ = build_tokenizer(TEXTS, context_length=6)
    check_length(tokenizer, [])
    check_length(tokenizer, ["", "a red", "a red red car"])  # 4 words, the start and the end
    with pytest.raises(UserError, match=r"'a red red red car' has 7 tokens .* reads 6: use fewer words$"):
        check_length(tokenizer, ["a red car", "a red red red car"], remedy="use fewer words")
    with pytest.raises(UserError, match=r"^'red, red, red car' has 8 tokens"):  # a comma is one too
        check_length(tokenizer, "red, red, red car")
    with pytest.raises(UserError) as error:
        check_length(tokenizer, "red " * 5000)
    assert len(str(error.value)) < 400
    assert capsys.readouterr().err == ""

    check_length(tokenizer, ["a red car", "a red red red car"], truncate=True)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 'a red red red car' has 7 tokens")


def test_a_teacher_checks_the_length_of_prompts(
    tiny_teacher: LatentDiffusionTeacher, capsys: pytest.CaptureFixture[str]
) -> None:
    """An error where there is a vocabulary; without one (Stable Diffusion) truncation with a warning."""
    long = "a red cube" + " cube" * 20
    with pytest.raises(UserError, match=r"'a red cube cube .* has 25 tokens .* reads 24: shorten it"):
        tiny_teacher.encode_text(["a red cube", long])
    tiny_teacher.encode_text([long.removesuffix(" cube")])
    tiny_teacher.vocabulary = None
    assert len(tiny_teacher.encode_text([long, "a red cube", long])) == 3
    tiny_teacher.encode_text([long])
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("warning: 'a red cube cube")


def test_captions_without_words_are_refused() -> None:
    with pytest.raises(UserError, match="no words"):
        build_tokenizer(["", "!"])
