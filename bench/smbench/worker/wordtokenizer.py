"""The tokenizer of a synthetic checkpoint: nearly every token is a word of its own, so that text stands for exact ids.

Servers take and give text, and random weights have no language. Here words are a, b, … z, aa, ab, … like the columns of
a spreadsheet, each with the space in front of it one token; nothing is added before or after. Text that is made of such
ids becomes these very ids again. The rest are two special tokens and the space and letters that words are built from.

It is a byte-level BPE tokenizer with Qwen2's names, since transformers 5 takes no other kind for a Qwen2 model: a merge
appends a letter to a shorter word, so that the longest word wins. Owns the files in Hugging Face's format
(`tokenizer.json` as the library `tokenizers` reads it); imports nothing, since who writes a checkpoint may not have it.
"""

from __future__ import annotations

import string
from collections.abc import Iterable, Mapping
from typing import Any

LETTERS = string.ascii_lowercase
SPACE = "Ġ"
"""A space, as byte-level tokenizers write it."""
BEGIN, END = "<|endoftext|>", "<|im_end|>"
"""What Qwen2.5 calls the tokens of bos_token_id and eos_token_id."""
LEAST = 2 + 1 + len(LETTERS) + 1
"""Tokens of the smallest vocabulary: special ones, space, letters, and one word."""


class Words:
    """The words of a vocabulary."""

    def __init__(self, vocabulary: int, bos: int, eos: int) -> None:
        """ValueError where the special tokens are not two, or the vocabulary is too small."""
        if vocabulary < LEAST or bos == eos or not max(bos, eos) < vocabulary:
            raise ValueError(
                f"a vocabulary of {vocabulary} with special tokens {bos} and {eos}: it takes {LEAST} or more tokens, "
                "two of them special"
            )
        free = (token for token in range(vocabulary) if token not in (bos, eos))
        self._tokens = {bos: BEGIN, eos: END}
        for symbol in (SPACE, *LETTERS):
            self._tokens[next(free)] = symbol
        self._words = {token: column(number) for number, token in enumerate(free, start=1)}
        self.ids = list(self._words)
        """The tokens that are words, in the order of their words."""
        self.vocabulary: Mapping[str, int] = {
            **{symbol: token for token, symbol in self._tokens.items()},
            **{SPACE + word: token for token, word in self._words.items()},
        }
        """All tokens as the tokenizer's file has them."""

    def text(self, tokens: Iterable[int]) -> str:
        """Text that becomes these tokens again. KeyError for a token that is no word."""
        return "".join(f" {self._words[token]}" for token in tokens)

    def merges(self) -> list[str]:
        """How words are built, shorter ones first."""
        return [f"{SPACE}{word[:-1]} {word[-1]}" for word in self._words.values()]


def column(number: int) -> str:
    """The name of a spreadsheet's column, counted from 1: a, b, … z, aa, ab, …"""
    name = ""
    while number:
        number, letter = divmod(number - 1, len(LETTERS))
        name = LETTERS[letter] + name
    return name


def files(vocabulary: int, bos: int, eos: int, context: int) -> Mapping[str, Mapping[str, Any]]:
    """Name to content of the two files of a tokenizer. ValueError where the vocabulary cannot be."""
    words = Words(vocabulary, bos, eos)
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    special = {bos: BEGIN, eos: END}
    bytes_alone = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": token, "content": special[token], **flags} for token in sorted(special)],
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r" ?\p{L}+"}, "behavior": "Isolated", "invert": False},
                bytes_alone,
            ],
        },
        "post_processor": None,
        "decoder": bytes_alone,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": dict(words.vocabulary),
            "merges": words.merges(),
        },
    }
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": BEGIN,
        "eos_token": END,
        # transformers adds those that are not given beyond the vocabulary
        "pad_token": BEGIN,
        "unk_token": BEGIN,
        "add_bos_token": False,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context,
    }
    return {"tokenizer.json": tokenizer, "tokenizer_config.json": config}
