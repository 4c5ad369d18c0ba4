"""Prompts of token ids, drawn from a seed. Owns which tokens; every engine, chunk size and setting gets the same."""

from __future__ import annotations

import random

from smbench.workloads import SHARING


def prompt(seed: int, vocabulary: int, input_len: int, index: int) -> list[int]:
    """Request `index` of a cell: `input_len` ids, each of [0, vocabulary) alike.

    Depends on nothing but the arguments. Two indices share no prefix to speak of, so a prefix cache finds nothing.
    """
    return _draw(f"smbench prompt {seed} {vocabulary} {input_len} {index}", vocabulary, input_len)


def prompt_with_prefix(seed: int, vocabulary: int, input_len: int, index: int) -> list[int]:
    """The same, but for a first half that it has in common with the others of its group of SHARING."""
    shared = input_len // 2
    group = index // SHARING
    prefix = _draw(f"smbench prefix {seed} {vocabulary} {input_len} {group}", vocabulary, shared)
    return prefix + prompt(seed, vocabulary, input_len, index)[shared:]


def _draw(seed: str, vocabulary: int, count: int) -> list[int]:
    # a string seed goes through SHA-512, and so does not depend on the hash seed of the process
    draw = random.Random(seed)
    return [draw.randrange(vocabulary) for _ in range(count)]
