"""What document 003 and its repository published on inference: which numbers, which of them are wrong, and why.

Pure values from the published files. Owns no words of the report; the rule that finds the fault is the audit's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench import arch, audit_patterns, resources
from smbench.cell import AxisValue
from smbench.findings import Finding
from smbench.observations import of_published
from smbench.published import Published

BLOCK, REQUESTS = "hstu_block", "hstu_inference"
MODEL: Mapping[str, AxisValue] = {
    **{"layers": 8, "embedding": 1024, "heads": 4, "head_dim": 256},
    **{"targets": 256, "dtype": "bfloat16"},
}
"""The document's sizes: only with them are times beside each other."""
VARIANTS: Mapping[str, str] = {"recompute": "none", "cache": "kv", "cache-graph": "kv_graph"}
"""Our providers by what the published file calls them."""


@dataclass(frozen=True, slots=True)
class Edition:
    """Numbers that were published together."""

    device: str
    name: str
    verdict: str
    """`faulty`, `corrected` or `suspect`."""
    numbers: Mapping[tuple[AxisValue, ...], float]
    """Of the block by batch, total and new tokens; of requests by variant and batch. Seconds."""


@dataclass(frozen=True)
class Others:
    """The files of published numbers that the recipe names, as far as it does."""

    files: Sequence[Published]

    @cached_property
    def blocks(self) -> list[Edition]:
        """Times of the block: the document's, then what its repository showed later."""
        found = []
        for published in self.files:
            for name in dict.fromkeys(p.at["edition"] for p in published.points() if p.at["op"] == BLOCK):
                verdict = "corrected" if name == "corrected" else "faulty" if name == "document" else "suspect"
                numbers: dict[tuple[AxisValue, ...], float] = {
                    (point.at["batch"], point.at["total_len"], point.at["new_len"]): point.value
                    for point in published.points()
                    if point.at["op"] == BLOCK and point.at["edition"] == name
                }
                found.append(Edition(published.device, str(name), verdict, numbers))
        return found

    @cached_property
    def requests(self) -> list[Edition]:
        """Sums over the document's 16 batches, end to end: with the faulty attention, and of 2026."""
        found = []
        for published in self.files:
            points = [point for point in published.points() if point.at["op"] == REQUESTS]
            for name in dict.fromkeys(point.at["edition"] for point in points):
                numbers: dict[tuple[AxisValue, ...], float] = {
                    (p.at["variant"], p.at["batch"]): p.value for p in points if p.at["edition"] == name
                }
                found.append(Edition(published.device, str(name), "faulty" if name == "document" else "later", numbers))
        return found

    def points(self, batch: AxisValue) -> list[tuple[AxisValue, AxisValue]]:
        """Total and new tokens of every published number of the block at a batch, the longest first in each history."""
        found = {(key[1], key[2]) for edition in self.blocks for key in edition.numbers if key[0] == batch}
        return sorted(found, key=lambda point: (int(point[0]), -int(point[1])))

    @cached_property
    def findings(self) -> list[Finding]:
        """What the audit says of times that do not follow the cached length."""
        table = arch.load(resources.archs_file())
        return [
            finding
            for published in self.files
            for finding in audit_patterns.sensitivity(
                of_published(published.title, published, table.device_named(published.device))
            )
        ]
