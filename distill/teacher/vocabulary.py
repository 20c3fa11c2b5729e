"""A word-level vocabulary in `CLIPTokenizer` format: each word of the captions is one token."""

import hashlib
import json
import re
import sys
import textwrap
from collections import Counter
from collections.abc import Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path

from transformers import CLIPTokenizer

from distill.runtime.errors import UserError
from distill.runtime.files import read_json, write_json

START, END, WORD_END = "<|startoftext|>", "<|endoftext|>", "</w>"
MOST_LISTED = 100  # words of a vocabulary in an error
VOCABULARY = "words.json"  # beside the tokenizer's files: the words allowed in prompts


def words_of(text: str) -> list[str]:
    """Lower-case words of a text, and single digits, as CLIP's tokenizer splits it; punctuation dropped."""
    return re.findall(r"[a-z]+|[0-9]", text.lower())


def build_tokenizer(texts: Iterable[str], context_length: int = 24) -> tuple[CLIPTokenizer, list[str]]:
    """A tokenizer in which each word of the texts is one token, and the words, most frequent first.

    Byte-pair encoding is trained until no pair is left to merge. The byte alphabet with and without the
    end-of-word mark keeps unknown letters from becoming the end token. The same texts give the same token
    ids in every process. Raises `UserError` for texts without words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    counts = Counter(word for text in texts for word in words_of(text))
    if not counts:
        raise UserError("the captions contain no words: a teacher cannot be trained on them")

    # The trainer numbers letters in the order of a randomly seeded hash map, and breaks ties between merges
    # by these numbers. Special tokens are numbered first and in order, which makes the merges reproducible.
    alphabet = sorted(set("".join(counts)))
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        min_frequency=0,
        end_of_word_suffix=WORD_END,
        show_progress=False,
        special_tokens=[*alphabet, *(letter + WORD_END for letter in alphabet)],
    )
    backend = Tokenizer(models.BPE(end_of_word_suffix=WORD_END))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(sorted(counts), trainer)
    model = json.loads(backend.to_str())["model"]

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys(
        [START, END, *letters, *(letter + WORD_END for letter in letters), *model["vocab"]]
    )
    vocab = {token: index for index, token in enumerate(tokens)}
    pairs = (pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"])
    tokenizer = CLIPTokenizer(
        vocab=vocab, merges=[tuple(pair) for pair in pairs], model_max_length=context_length
    )

    words = [word for word, _ in counts.most_common()]
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise UserError(f"the words {split[:5]} do not become single tokens: write the captions without them")
    return tokenizer, words


def tokenizer_fingerprint(tokenizer: CLIPTokenizer) -> str:
    """A hash of the token ids and the context length: weights trained with one tokenizer fit no other."""
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]


def save_vocabulary(folder: Path | str, tokenizer: CLIPTokenizer, vocabulary: Sequence[str]) -> None:
    """Write the tokenizer's files and the word list into a folder."""
    tokenizer.save_pretrained(folder)
    write_json(Path(folder) / VOCABULARY, list(vocabulary))


def load_vocabulary(folder: Path | str) -> frozenset[str] | None:
    """The words of a tokenizer folder; None where it lists none (Stable Diffusion accepts any text)."""
    path = Path(folder) / VOCABULARY
    return frozenset(read_json(path)) if path.is_file() else None


def check_prompt(prompt: str, vocabulary: frozenset[str] | None) -> None:
    """Raise `UserError` for an empty prompt, or for words outside a closed vocabulary."""
    if not prompt.strip():
        raise UserError("the prompt is empty: describe the object, for example 'a red teapot'")
    unknown = [] if vocabulary is None else [word for word in words_of(prompt) if word not in vocabulary]
    if unknown:
        raise UserError(
            f"unknown word{'s' * (len(unknown) > 1)} {', '.join(map(repr, unknown))} in {prompt!r}:"
            f" the teacher's vocabulary {_described(vocabulary or frozenset(), unknown)}"
        )


def _described(vocabulary: frozenset[str], unknown: Sequence[str]) -> str:
    """All words of a small vocabulary; of a large one those that are spelled alike."""
    if len(vocabulary) <= MOST_LISTED:
        return f"is {', '.join(sorted(vocabulary))}"
    words = [match for word in unknown for match in get_close_matches(word, sorted(vocabulary))]
    return f"has {len(vocabulary):,} words, the most similar {', '.join(dict.fromkeys(words)) or 'none'}"


def check_length(
    tokenizer: CLIPTokenizer, texts: str | Sequence[str], truncate: bool = False, remedy: str = "shorten it"
) -> None:
    """Raise `UserError` for the first text of more tokens, start and end included, than the context length.

    With `truncate` such a text is cut by the tokenizer, as in a stock pipeline: one warning line on stderr.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    lengths = [len(ids) for ids in tokenizer(texts, verbose=False).input_ids] if texts else []
    limit = tokenizer.model_max_length
    for text, length in zip(texts, lengths, strict=True):
        if length <= limit:
            continue
        excerpt = textwrap.shorten(text, 200, placeholder=" ...")
        message = f"{excerpt!r} has {length} tokens with start and end; the text encoder reads {limit}"
        if not truncate:
            raise UserError(f"{message}: {remedy}")
        print(f"warning: {message}, the rest is ignored", file=sys.stderr)
