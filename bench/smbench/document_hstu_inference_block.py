"""The block of layers in the report of document 003's second half: times by cached length, bounds, the claims.

Pure values from a View. Owns no words.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.document_hstu_inference_published import MODEL
from smbench.findings import held_down
from smbench.stats import Range, Summary
from smbench.views import Axes, View

BLOCK = "hstu_block"
WITHOUT = "recompute"
CLAIM = (2048, 1920)
"""Tokens of history and how many of them are cached in the document's statement on the block."""


@dataclass(frozen=True, slots=True)
class Line:
    """One point of the block."""

    batch: AxisValue
    total: AxisValue
    new: AxisValue

    @property
    def cached(self) -> int:
        """Tokens of each history that are cached."""
        return integer(self.total) - integer(self.new)


@dataclass(frozen=True)
class Block:
    """A run, asked for its block."""

    view: View

    @cached_property
    def family(self) -> Axes:
        """The axes of the document's figures but batch, total and new: those of most of the plan's points."""
        counted: Counter[tuple[tuple[str, AxisValue], ...]] = Counter()
        for point in self.view.points(BLOCK):
            if point["source"] == "device":
                key = tuple((axis, value) for axis, value in point.items() if axis not in ("batch", "total", "new"))
                counted[key] += 1
        return dict(counted.most_common(1)[0][0]) if counted else {}

    @cached_property
    def lines(self) -> list[Line]:
        """The points of the family: batch by batch, histories from short to long, the fewest cached first."""
        found = {
            (p["batch"], p["total"], p["new"])
            for p in self.view.points(BLOCK)
            if all(p[axis] == value for axis, value in self.family.items())
        }
        ordered = sorted(found, key=lambda key: (integer(key[0]), integer(key[1]), -integer(key[2])))
        return [Line(*key) for key in ordered]

    @cached_property
    def batches(self) -> list[AxisValue]:
        """The batches of the family."""
        return list(dict.fromkeys(line.batch for line in self.lines))

    def of_batch(self, batch: AxisValue) -> list[Line]:
        """The points of one batch."""
        return [line for line in self.lines if line.batch == batch]

    @property
    def shown(self) -> list[AxisValue]:
        """Batches with histories of several lengths, as in the document's figures."""
        return [batch for batch in self.batches if len({line.total for line in self.of_batch(batch)}) > 1]

    @property
    def cached_providers(self) -> list[str]:
        """The providers with a cache that ran at any point of the family; all that are planned where none did."""
        planned = [p for p in self.view.providers if p != WITHOUT and any(self.row(p, line) for line in self.lines)]
        ran = [p for p in planned if any(self.ended(p, line) in ("ok", "verified") for line in self.lines)]
        return ran or planned

    @property
    def best(self) -> str | None:
        """The provider with a cache that figures and statements are of: the last one that has numbers."""
        return next((p for p in reversed(self.cached_providers) if any(self.number(p, x) for x in self.lines)), None)

    @property
    def comparable(self) -> bool:
        """Whether sizes are the document's."""
        return all(self.family.get(axis) == value for axis, value in MODEL.items())

    def row(self, provider: str, line: Line) -> Row | None:
        """A cell of the family. Without a cache nothing depends on what could have been cached."""
        new = line.total if provider == WITHOUT else line.new
        own = {"batch": line.batch, "total": line.total, "new": new}
        return self.view.analysis.row(BLOCK, provider, **{**self.family, **own}) if self.family else None

    def number(self, provider: str, line: Line) -> Summary | None:
        """Its time."""
        row = self.row(provider, line)
        return row.summary(self.view.headline.name) if row else None

    def ended(self, provider: str, line: Line) -> str | None:
        """How it ended."""
        row = self.row(provider, line)
        return row.status if row else None

    def speedup(self, provider: str, line: Line, against: str = WITHOUT) -> float | None:
        """Time without a cache, or of another provider, over the time with it."""
        mine, theirs = self.number(provider, line), self.number(against, line)
        return theirs.median / mine.median if mine and theirs else None

    def bound_s(self, line: Line) -> float | None:
        """The least time of a point's own operations and bytes at the card's peaks; None where they are unknown."""
        rows = [self.row(provider, line) for provider in self.cached_providers]
        work = next((row.result.work for row in rows if row and row.result and row.result.work), None)
        device = self.view.analysis.device
        if work is None or device is None or device.memory_bandwidth_bytes_per_s is None:
            return None
        peak = device.tensor_peak_flops_per_s(str(self.family.get("dtype")))
        return max(work.bytes / device.memory_bandwidth_bytes_per_s, work.flops / peak) if peak else None

    def share(self, provider: str, line: Line) -> float | None:
        """Of the bound: that over the time."""
        number, bound = self.number(provider, line), self.bound_s(line)
        return bound / number.median if number and bound else None

    def held_down(self, line: Line) -> list[str]:
        """What held the clocks down in the cell that the share is of; the bound's peaks know nothing of it."""
        row = self.row(self.best, line) if self.best else None
        return held_down(row.result) if row and row.result else []

    @property
    def limits(self) -> list[str]:
        """The same of all points of the family."""
        return sorted({reason for line in self.lines for reason in self.held_down(line)})

    def claimed(self, batch: AxisValue, length: int = CLAIM[0]) -> Line | None:
        """The point of the document's statement; of another history the one of which most is cached."""
        lines = [line for line in self.of_batch(batch) if line.total == length and line.cached]
        return max(lines, key=lambda line: line.cached, default=None)

    @property
    def longest(self) -> int:
        """The longest history of the family."""
        return max((integer(line.total) for line in self.lines), default=0)

    def statement_lengths(self) -> list[int]:
        """Histories that speed-ups are stated for: the document's where planned, and the longest."""
        return sorted({n for n in (CLAIM[0], self.longest) if any(self.claimed(batch, n) for batch in self.batches)})

    def graphs(self) -> Range | None:
        """Time by kernels one by one over time by CUDA graph, at all points of the family."""
        return Range.of(self.speedup("cache-graph", line, "cache") for line in self.lines)

    def growth(self, provider: str, batch: AxisValue) -> tuple[Line, Line] | None:
        """At the fewest new tokens of a batch: the shortest and the longest history that have numbers."""
        known = [line for line in self.of_batch(batch) if self.number(provider, line)]
        fewest = min((integer(line.new) for line in known), default=0)
        same = sorted((line for line in known if line.new == fewest), key=lambda line: integer(line.total))
        return (same[0], same[-1]) if len(same) > 1 else None

    def further(self) -> list[Axes]:
        """The points outside the family whose cache is on the device."""
        return [
            point
            for point in self.view.points(BLOCK)
            if point["source"] == "device" and any(point[axis] != value for axis, value in self.family.items())
        ]

    def difference(self, point: Axes) -> str:
        """In what a point differs from the family."""
        return ", ".join(f"{axis} {point[axis]}" for axis, value in self.family.items() if point[axis] != value)

    def at(self, provider: str, point: Axes) -> Summary | None:
        """The time at any point."""
        return self.view.summary(BLOCK, provider, point, self.view.headline.name)

    def like(self, point: Axes) -> Line:
        """The point of the family with the same lengths."""
        return Line(point["batch"], point["total"], point["new"])


def integer(value: AxisValue) -> int:
    """An axis value that is a number."""
    return value if isinstance(value, int) else 0


def spread(values: Sequence[int]) -> tuple[int, int] | None:
    """Least and most."""
    return (min(values), max(values)) if values else None
