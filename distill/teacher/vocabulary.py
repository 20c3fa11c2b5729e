"""A word-level vocabulary in `CLIPTokenizer` format: every known word is one token, anything else falls to its letters."""

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from transformers import CLIPTokenizer

from distill.runtime.errors import UserError
from distill.runtime.files import read_json, write_json

START, END = "<|startoftext|>", "<|endoftext|>"
WORDS = "words.json"  # beside the tokenizer's files: the words that a prompt may have


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, punctuation dropped."""
    return re.findall(r"[a-z0-9]+", text.lower())


def build_tokenizer(texts: Iterable[str], max_length: int = 24) -> tuple[CLIPTokenizer, list[str]]:
    """A tokenizer in which each word of the texts is one token, and the words, most frequent first.

    Byte-pair encoding is trained until nothing is left to merge; the byte alphabet with and without the end-of-word mark
    keeps unknown letters from becoming the end token. Raises `UserError` for texts without words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    counts = Counter(word for text in texts for word in words_of(text))
    if not counts:
        raise UserError("the captions hold no words: a teacher cannot be trained on them")
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.BpeTrainer(
        vocab_size=100_000, min_frequency=0, end_of_word_suffix="</w>", show_progress=False
    )
    backend.train_from_iterator(sorted(counts), trainer)
    model = _model_of(backend)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([START, END, *letters, *(f"{letter}</w>" for letter in letters), *model["vocab"]])
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [
        tuple(pair) if not isinstance(pair, str) else tuple(pair.split(" ")) for pair in model["merges"]
    ]
    tokenizer = CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=max_length)
    words = [word for word, _ in counts.most_common()]
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise UserError(f"the words {split[:5]} do not become single tokens: write the captions without them")
    return tokenizer, words


def _model_of(backend: object) -> dict:
    import json

    return json.loads(backend.to_str())["model"]  # type: ignore[attr-defined]


def phrase(colour: str, name: str) -> str:
    """`an orange car`."""
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {name}"


def save_vocabulary(folder: Path | str, tokenizer: CLIPTokenizer, words: list[str]) -> None:
    """The tokenizer's files and the word list into a folder."""
    tokenizer.save_pretrained(folder)
    write_json(Path(folder) / WORDS, words)


def load_words(folder: Path | str) -> frozenset[str] | None:
    """The words a teacher knows; None where the folder states none (Stable Diffusion takes any)."""
    path = Path(folder) / WORDS
    return frozenset(read_json(path)) if path.is_file() else None


def check_prompt(prompt: str, words: frozenset[str] | None) -> None:
    """Raises `UserError` for an empty prompt or one with words that a closed vocabulary lacks."""
    if not prompt.strip():
        raise UserError("the prompt is empty: say what to make, for example 'a red teapot'")
    unknown = [] if words is None else [word for word in words_of(prompt) if word not in words]
    if unknown:
        raise UserError(
            f"the teacher does not know the word{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))} of {prompt!r}: "
            f"it knows {', '.join(sorted(words or ()))}"
        )
