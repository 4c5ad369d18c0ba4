"""A user's file of conversations in the form of ShareGPT, as prompts. Owns the form and which entries count.

The form: a JSON list of objects with a list `conversations` of turns, each `{"from": "human", "value": "..."}`. The
first human turn is the prompt. Nothing is ever downloaded, and no text of the file is stored: a result has its hash.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from smbench.workloads import SHORTEST_SHAREGPT

PEOPLE = ("human", "user")
"""How the form calls the one who asks."""


class NotShareGpt(ValueError):
    """The file does not have the form; the message names the file and what was expected."""


@functools.cache
def questions(file: Path) -> tuple[str, ...]:
    """The first human turn of every conversation that has one, in the file's order. NotShareGpt, OSError."""
    try:
        entries = json.loads(file.read_bytes())
    except ValueError as error:
        raise NotShareGpt(f"{file.name}: not valid JSON: {error}") from error
    if not isinstance(entries, list):
        raise NotShareGpt(f"{file.name}: holds no list of conversations, as the form of ShareGPT has it")
    found = tuple(words for entry in entries if (words := _question(entry)))
    if not found:
        raise NotShareGpt(
            f"{file.name}: none of its {len(entries)} entries has a turn from {' or '.join(PEOPLE)} in a list "
            "'conversations', as the form of ShareGPT has it"
        )
    return found


@functools.cache
def file_sha256(file: Path) -> str:
    """Of the file as it is."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def draw(file: Path, tokenize: Callable[[str], Sequence[int]], seed: int, count: int, longest: int) -> list[list[int]]:
    """Token ids of `count` questions of SHORTEST_SHAREGPT to `longest` tokens, in an order that the seed decides.

    NotShareGpt where the file has not so many.
    """
    words = questions(file)
    order = list(range(len(words)))
    random.Random(f"smbench sharegpt {seed}").shuffle(order)
    found: list[list[int]] = []
    for i in order:
        ids = list(tokenize(words[i]))
        if SHORTEST_SHAREGPT <= len(ids) <= longest:
            found.append(ids)
            if len(found) == count:
                return found
    raise NotShareGpt(
        f"{file.name}: {len(found)} of {len(words)} questions have {SHORTEST_SHAREGPT} to {longest} tokens of this "
        f"model, and the cell needs {count}: take a larger file, or a larger input_len"
    )


def _question(entry: Any) -> str | None:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    for turn in turns if isinstance(turns, list) else ():
        if isinstance(turn, dict) and turn.get("from") in PEOPLE:
            value = turn.get("value")
            return value if isinstance(value, str) and value.strip() else None
    return None
