"""Prompts of token ids, drawn from a seed. Owns which tokens; every engine, chunk size and setting gets the same."""

from __future__ import annotations

import random


def prompt(seed: int, vocabulary: int, input_len: int, index: int) -> list[int]:
    """Request `index` of a cell: `input_len` ids, each of [0, vocabulary) alike.

    Depends on nothing but the arguments. Two indices share no prefix to speak of, so a prefix cache finds nothing.
    """
    # a string seed goes through SHA-512, and so does not depend on the hash seed of the process
    draw = random.Random(f"smbench prompt {seed} {vocabulary} {input_len} {index}")
    return [draw.randrange(vocabulary) for _ in range(input_len)]
