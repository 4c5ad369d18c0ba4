"""Statements that are counted instead of repeated: thousands of cells may fail for one reason. Owns the grouping."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

NUMBER = re.compile(r"0x[0-9a-fA-F]+|\d+(?:\.\d+)?")


@dataclass(frozen=True, slots=True)
class Grouped:
    """Statements that differ in their numbers only, counted."""

    key: tuple[str, ...]
    text: str
    """The first of them."""
    count: int
    alike: bool
    """Whether all of them are word for word the same."""


def shape(text: str) -> str:
    """A statement without its numbers: what makes two of them alike."""
    return NUMBER.sub("#", text)


def grouped(items: Iterable[tuple[str, ...]]) -> list[Grouped]:
    """Count statements, the last entry of each item, that have equal keys and differ in digits only; in order."""
    texts: dict[tuple[str, ...], list[str]] = {}
    for *key, text in items:
        texts.setdefault((*key, shape(text)), []).append(text)
    return [Grouped(key[:-1], found[0], len(found), len(set(found)) == 1) for key, found in texts.items()]
