"""What document 001 measures in one: lookup, order of blocks, pool with repetition, cache. Owns their separation.

Each effect is a ratio of two times that differ in one thing only. Pure values; owns no words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.cell import AxisValue
from smbench.stats import Summary
from smbench.views import Axes, View

SUBJECT = "paged_attention"
DOCUMENT_SIZES = 32
"""The document's largest block."""
WORD_AXES = ("layout", "memory", "address")


@dataclass(frozen=True, slots=True)
class Ratio:
    """Time over time, and whether the two intervals are apart."""

    value: float
    clear: bool


@dataclass(frozen=True, slots=True)
class Apart:
    """One line: a point of the document, its effects one by one. None where one of the two numbers is missing."""

    batch: AxisValue
    seq_len: AxisValue
    block: AxisValue
    lookup: Ratio | None
    """With the table over with computed addresses, the blocks in order both times."""
    scatter: Ratio | None
    """Blocks in random order over in order, with the table both times."""
    pool: Ratio | None
    """The document's pool with repetition over as many blocks as are needed, in random order, both by the table."""
    cache: Ratio | None
    """From a cold L2 over from a warm one, blocks in random order."""
    kv_bytes: int | None
    """Distinct bytes of keys and values that the document's layout touches."""


@dataclass(frozen=True, slots=True)
class Span:
    """The least and the greatest of some ratios."""

    low: float
    high: float
    count: int
    clear: int
    """How many of them are clear."""


@dataclass(frozen=True)
class Effects:
    """A run, asked for one effect at a time."""

    view: View
    base: Axes
    shapes: Sequence[tuple[AxisValue, AxisValue]]
    """Batch and length of the document's tables."""
    blocks: Sequence[AxisValue]
    measure: str
    """The document's."""

    def lines(self, provider: str) -> list[Apart]:
        """The effects at every point of the document, where any is known."""
        found = [
            self._apart(provider, batch, seq_len, block) for batch, seq_len in self.shapes for block in self.blocks
        ]
        return [line for line in found if line.lookup or line.scatter or line.pool]

    def _apart(self, provider: str, batch: AxisValue, seq_len: AxisValue, block: AxisValue) -> Apart:
        headline = self.view.headline.name
        warm = next((m.name for m in self.view.analysis.profile.measure if (m.method, m.l2) == ("graph", "warm")), None)

        def at(layout: str, address: str = "table", measure: str = headline) -> Summary | None:
            own = {"batch": batch, "seq_len": seq_len, "block_size": block, "layout": layout, "address": address}
            return self._number(provider, own, measure)

        return Apart(
            batch,
            seq_len,
            block,
            lookup=ratio(at("ordered"), at("ordered", "contiguous")),
            scatter=ratio(at("fair"), at("ordered")),
            pool=ratio(at("document"), at("fair")),
            cache=ratio(at("fair"), at("fair", measure=warm)) if warm and warm != headline else None,
            kv_bytes=self._kv_bytes(provider, batch, seq_len, block),
        )

    def _number(self, provider: str, own: Axes, measure: str) -> Summary | None:
        return self.view.summary(SUBJECT, provider, {**self._words, **self.base, "memory": "device", **own}, measure)

    @cached_property
    def _words(self) -> Axes:
        return {"layout": "document", "memory": "device", "address": "table"}

    def _kv_bytes(self, provider: str, batch: AxisValue, seq_len: AxisValue, block: AxisValue) -> int | None:
        own = {"batch": batch, "seq_len": seq_len, "block_size": block, "layout": "document"}
        point = {**self._words, **self.base, "memory": "device", **own}
        row = self.view.analysis.row(SUBJECT, provider, **point)
        return row.result.work.bytes if row and row.result and row.result.work else None

    def by_block(self, provider: str, layout: str, measure: str) -> Mapping[tuple[AxisValue, AxisValue], Span]:
        """By batch and length: the slowest block size of the document over the fastest, at one layout."""
        found = {}
        for batch, seq_len in self.shapes:
            times = [
                self._number(
                    provider,
                    {"batch": batch, "seq_len": seq_len, "block_size": block, "layout": layout, "address": "table"},
                    measure,
                )
                for block in self.blocks
                if isinstance(block, int) and block <= DOCUMENT_SIZES
            ]
            known = [summary for summary in times if summary]
            if len(known) > 1:
                slow, fast = max(known, key=_median), min(known, key=_median)
                apart = ratio(slow, fast)
                clear = int(apart is not None and apart.clear)
                found[batch, seq_len] = Span(1.0, slow.median / fast.median, len(known), clear)
        return found

    def lookup(self, provider: str) -> Span | None:
        """The lookup over all points of the document, cold."""
        return span([line.lookup for line in self.lines(provider)])

    def scatter(self, provider: str) -> Span | None:
        """Blocks in random order, over all points of the document, cold."""
        return span([line.scatter for line in self.lines(provider)])

    def pool(self, provider: str) -> Span | None:
        """The document's pool, over all its points, cold."""
        return span([line.pool for line in self.lines(provider)])

    def managed_kinds(self) -> list[AxisValue]:
        """The kinds of managed memory that have a number."""
        points = [row for row in self.view.analysis.rows if row.summaries and row.cell.axes["memory"] != "device"]
        return list(dict.fromkeys(row.cell.axes["memory"] for row in points))

    def managed(self, provider: str, kind: AxisValue, measure: str) -> Span | None:
        """A kind of managed memory over device memory, over all points that have both."""
        rows = self.view.rows(provider, SUBJECT, lambda axes: axes["memory"] == kind)
        pairs = [
            ratio(
                row.summary(measure),
                self.view.summary(SUBJECT, provider, {**row.cell.axes, "memory": "device"}, measure),
            )
            for row in rows
        ]
        return span(pairs)


def ratio(over: Summary | None, under: Summary | None) -> Ratio | None:
    """The ratio of two medians, None where one is missing."""
    if over is None or under is None:
        return None
    clear = over.ci_low > under.ci_high or over.ci_high < under.ci_low
    return Ratio(over.median / under.median, clear)


def span(ratios: Sequence[Ratio | None]) -> Span | None:
    """Least and greatest of the known ratios, None of none."""
    known = [found for found in ratios if found]
    if not known:
        return None
    values = [found.value for found in known]
    return Span(min(values), max(values), len(known), sum(found.clear for found in known))


def _median(summary: Summary) -> float:
    return summary.median
