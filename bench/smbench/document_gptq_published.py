"""The published numbers of document 002, card by card, with what the audit found marked on them. Owns no verdict."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench import audit
from smbench.arch import Device
from smbench.document_gptq_cells import E2E
from smbench.findings import Finding
from smbench.observations import Dataset, Observation, of_published
from smbench.published import Published

MARKED = ("refuted", "warning")
"""Severities that a number is marked for."""
MARLIN_LABEL, EXLLAMA_LABEL, SGLANG_LABEL = "vllm-gptq_marlin", "vllm-gptq", "sglang"
"""Columns of the document's prefill tables."""


@dataclass(frozen=True, slots=True)
class Mark:
    """What a rule of the audit found in the numbers of a card; a table shows its number in brackets."""

    number: int
    card: str
    rule: str
    severity: str
    count: int
    """Findings of this rule."""
    message: str
    """The first of them."""
    about: frozenset[str]
    """Labels of the numbers."""


@dataclass(frozen=True, slots=True)
class Shown:
    """A published number as a table has it."""

    seconds: float
    marks: tuple[int, ...]


@dataclass(frozen=True)
class Card:
    """The numbers of one file, which is one card."""

    published: Published
    device: Device | None
    """The card's figures, None where they are unknown."""
    first_mark: int
    """Number of its first mark, so that marks of several cards differ."""

    @property
    def name(self) -> str:
        """The card, under the name that NVML reports."""
        return self.published.device

    @cached_property
    def dataset(self) -> Dataset:
        """The numbers as an audit sees them."""
        return of_published(self.name, self.published, self.device)

    @cached_property
    def marks(self) -> Sequence[Mark]:
        """What the audit found in numbers of this card, a mark for each rule."""
        by_rule: dict[tuple[str, str], list[Finding]] = {}
        for finding in audit.examine(self.dataset):
            if finding.severity in MARKED and finding.about:
                by_rule.setdefault((finding.guard, finding.severity), []).append(finding)
        return [
            Mark(
                number,
                self.name,
                rule,
                severity,
                len(found),
                found[0].message,
                frozenset(label for finding in found for label in finding.about),
            )
            for number, ((rule, severity), found) in enumerate(by_rule.items(), start=self.first_mark)
        ]

    @property
    def chunks(self) -> list[int]:
        """The chunk sizes of its prefill table, largest first."""
        return sorted({chunk for chunk, _ in self.sweep}, reverse=True)

    @property
    def columns(self) -> list[str]:
        """The columns of its prefill table."""
        return list(dict.fromkeys(provider for _, provider in self.sweep))

    @cached_property
    def sweep(self) -> Mapping[tuple[int, str], Observation]:
        """The prefill table: chunk size and column to the number."""
        return {
            (int(seen.at["chunk_tokens"]), str(seen.at["provider"])): seen
            for seen in self._requests
            if seen.at.get("scheduling") == "chunked"
        }

    @cached_property
    def whole(self) -> Mapping[str, Observation]:
        """The table of the default scheduler: label to the number."""
        return {str(s.at["method"]): s for s in self._requests if s.at.get("scheduling") == "whole prompts"}

    @cached_property
    def decoding(self) -> Mapping[str, Observation]:
        """The decoding table: label to the number."""
        return {str(seen.at["method"]): seen for seen in self._requests if seen.at.get("scheduling") == "unstated"}

    def times(self, column: str) -> dict[int, float]:
        """A column of the prefill table: chunk size to seconds."""
        return {chunk: seen.value for (chunk, provider), seen in self.sweep.items() if provider == column}

    def method(self, *words: str) -> Observation | None:
        """The first number of the decoding table whose label has all of the words."""
        return next((seen for label, seen in self.decoding.items() if all(word in label for word in words)), None)

    def shown(self, seen: Observation | None) -> Shown | None:
        """A number with its marks, None for none."""
        if seen is None:
            return None
        return Shown(seen.value, tuple(mark.number for mark in self.marks if seen.label in mark.about))

    def refuted(self, seen: Sequence[Observation]) -> int:
        """How many of some numbers the audit calls impossible."""
        labels = {label for mark in self.marks if mark.severity == "refuted" for label in mark.about}
        return sum(entry.label in labels for entry in seen)

    @property
    def _requests(self) -> list[Observation]:
        return [seen for seen in self.dataset.observations if seen.metric == E2E]


def cards(published: Sequence[Published], devices: Mapping[str, Device | None]) -> list[Card]:
    """The files as cards, their marks numbered through."""
    found: list[Card] = []
    for entry in published:
        first = 1 + sum(len(card.marks) for card in found)
        found.append(Card(entry, devices.get(entry.device), first))
    return found
