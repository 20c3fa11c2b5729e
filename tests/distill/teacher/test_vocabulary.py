"""The word-level tokenizer: one token a word, letters for the rest, the same after its files."""

from pathlib import Path

import pytest
from transformers import CLIPTokenizer

from distill.runtime.errors import UserError
from distill.teacher.vocabulary import build_tokenizer, check_prompt, load_words, save_vocabulary, words_of

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


def test_a_caption_is_its_words_and_padding() -> None:
    tokenizer, _ = build_tokenizer(TEXTS, max_length=12)
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
    assert load_words(tmp_path) == frozenset(words)


def test_a_folder_without_words_takes_any(tmp_path: Path) -> None:
    assert load_words(tmp_path) is None
    check_prompt("anything at all", None)


def test_prompts_are_checked() -> None:
    known = frozenset({"a", "red", "car"})
    check_prompt("A red car!", known)
    with pytest.raises(UserError, match=r"words 'zebra', 'hat' of 'a zebra hat': it knows a, car, red$"):
        check_prompt("a zebra hat", known)
    with pytest.raises(UserError, match=r"the word 'zebra' of"):
        check_prompt("red zebra", known)
    for empty in ("", "  "):
        with pytest.raises(UserError, match="prompt is empty"):
            check_prompt(empty, None)


def test_captions_without_words_are_refused() -> None:
    with pytest.raises(UserError, match="no words"):
        build_tokenizer(["", "!"])
