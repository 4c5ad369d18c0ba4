"""What the report of document 003's second half says beyond its tables of times: whole requests, files, figures.

Pure values from a View and the published numbers. Owns no words and no format: those are in the template. The block,
the copies and what was published have modules of their own.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.document_hstu_inference_block import Block, integer
from smbench.document_hstu_inference_published import MODEL, VARIANTS, Edition, Others
from smbench.document_hstu_inference_transfers import Transfers
from smbench.published import Published
from smbench.stats import Range, Summary
from smbench.views import Axes, Plot, View, slug

REQUEST = "hstu_request"
WITHOUT = "recompute"


@dataclass(frozen=True, slots=True)
class Total:
    """The document's number: one request at each length of history, added up."""

    seconds: float
    requests: int


@dataclass(frozen=True)
class HstuInference:
    """A run of the recipe of document 003's second half, asked for what its report claims."""

    view: View
    published: Published | None
    suspect: Published | None = None

    @cached_property
    def block(self) -> Block:
        """The block alone."""
        return Block(self.view)

    @cached_property
    def transfers(self) -> Transfers:
        """Copies, graphs, bookkeeping."""
        return Transfers(self.view)

    @cached_property
    def others(self) -> Others:
        """What was published."""
        return Others([file for file in (self.published, self.suspect) if file is not None])

    @cached_property
    def day(self) -> str | None:
        """The day of the first session; None before any."""
        sessions = self.view.analysis.sessions
        return sessions[0].started_at[:10] if sessions else None

    # -- whole requests

    @cached_property
    def family(self) -> Axes:
        """The axes of a request but batch, history and where its cache is: those of the plan's first."""
        points = self.view.points(REQUEST)
        free = ("batch", "total", "source")
        return {axis: value for axis, value in points[0].items() if axis not in free} if points else {}

    @cached_property
    def batches(self) -> list[AxisValue]:
        """Users of a request."""
        return sorted({point["batch"] for point in self.view.points(REQUEST)}, key=integer)

    @cached_property
    def lengths(self) -> list[AxisValue]:
        """Histories of the users that grow: those that are timed without a cache."""
        rows = self.view.rows(WITHOUT, REQUEST)
        return sorted({row.cell.axes["total"] for row in rows}, key=integer)

    @cached_property
    def variants(self) -> list[str]:
        """The providers of requests whose cache is on the device, and without one."""
        planned = [p for p in self.view.providers if p in VARIANTS and self.view.rows(p, REQUEST)]
        ran = [p for p in planned if self.view.count(self.view.rows(p, REQUEST), "ok", "verified")]
        return ran or planned

    @property
    def comparable(self) -> bool:
        """Whether sizes and lengths are the document's."""
        same = all(self.family.get(axis) == value for axis, value in MODEL.items())
        return same and [integer(n) for n in self.lengths] == list(range(256, 4097, 256))

    def row(self, provider: str, batch: AxisValue, total: AxisValue, source: str | None = None) -> Row | None:
        """A request; without a cache nothing is anywhere."""
        place = source or ("nowhere" if provider == WITHOUT else "device")
        own = {"batch": batch, "total": total, "source": place}
        return self.view.analysis.row(REQUEST, provider, **{**self.family, **own}) if self.family else None

    def number(self, provider: str, batch: AxisValue, total: AxisValue, source: str | None = None) -> Summary | None:
        """Its time."""
        row = self.row(provider, batch, total, source)
        return row.summary(self.view.headline.name) if row else None

    def ended(self, provider: str, batch: AxisValue, total: AxisValue) -> str | None:
        """How it ended."""
        row = self.row(provider, batch, total)
        return row.status if row else None

    def total(self, provider: str, batch: AxisValue) -> Total | None:
        """The sum of the medians over all lengths; None where one is missing."""
        found = [self.number(provider, batch, length) for length in self.lengths]
        known = [number.median for number in found if number]
        return Total(sum(known), len(known)) if known and len(known) == len(found) else None

    def speedup(self, provider: str, batch: AxisValue, against: str = WITHOUT) -> float | None:
        """Sum without a cache, or of another provider, over the sum with it."""
        mine, theirs = self.total(provider, batch), self.total(against, batch)
        return theirs.seconds / mine.seconds if mine and theirs else None

    def over_batches(self, provider: str, against: str = WITHOUT) -> Range | None:
        """The same over all batches."""
        return Range.of(self.speedup(provider, batch, against) for batch in self.batches)

    def telling(self) -> list[AxisValue]:
        """The lengths that a table of latencies shows: the ends and the middle."""
        if len(self.lengths) <= 4:
            return list(self.lengths)
        return [self.lengths[0], self.lengths[len(self.lengths) // 2 - 1], self.lengths[-1]]

    def published_total(self, edition: Edition, provider: str, batch: AxisValue) -> float | None:
        """A published sum."""
        return edition.numbers.get((VARIANTS[provider], batch))

    def published_speedup(
        self, edition: Edition, provider: str, batch: AxisValue, against: str = WITHOUT
    ) -> float | None:
        """The speed-up that follows from published sums."""
        mine, theirs = (self.published_total(edition, name, batch) for name in (provider, against))
        return theirs / mine if mine and theirs else None

    def published_over_batches(self, edition: Edition, provider: str, against: str = WITHOUT) -> Range | None:
        """The same over all published batches."""
        batches = dict.fromkeys(key[1] for key in edition.numbers)
        return Range.of(self.published_speedup(edition, provider, batch, against) for batch in batches)

    def slower_graphs(self) -> tuple[int, int]:
        """At how many requests and points of the block a graph is clearly slower than single kernels, of how many."""
        pairs = [
            (self.number("cache-graph", batch, length), self.number("cache", batch, length))
            for batch in self.batches
            for length in self.lengths
        ]
        pairs += [
            (self.block.number("cache-graph", line), self.block.number("cache", line)) for line in self.block.lines
        ]
        known = [(graph, eager) for graph, eager in pairs if graph and eager]
        return sum(graph.ci_low > eager.ci_high for graph, eager in known), len(known)

    def objections(self, guard: str) -> int:
        """How many findings a guard has of this run."""
        return sum(finding.guard == guard for finding in self.view.analysis.findings)

    # -- files

    def plots(self) -> list[Plot]:
        """The figures that the numbers allow."""
        found, measure = [], self.view.headline
        if any(self.total(provider, batch) for provider in self.variants for batch in self.batches):
            found.append(Plot("requests", f"requests_{slug(measure.name)}.png", measure, (REQUEST,)))
        if any(self.number(p, batch, n) for p in self.variants for batch in self.batches for n in self.lengths):
            found.append(Plot("latency", f"latency_{slug(measure.name)}.png", measure, (REQUEST,)))
        if self.block.best:
            found.append(Plot("block", f"block_{slug(measure.name)}.png", measure, ("hstu_block",)))
        if self.transfers.copied:
            found.append(Plot("transfers", f"transfers_{slug(measure.name)}.png", measure, ("hstu_block", REQUEST)))
        return found

    def draw(self, plot: Plot) -> bytes:
        """The PNG of one of `plots`."""
        # matplotlib takes most of a second to import, and who checks a report draws nothing
        from smbench import figures_hstu_inference

        return figures_hstu_inference.draw(plot, self)

    def records(self) -> Mapping[str, bytes]:
        """CSV files: every time with its distribution, every count."""
        tables = {f"times_{slug(self.view.headline.name)}.csv": self._times(), "counts.csv": self._counts()}
        return {name: _csv(lines) for name, lines in tables.items() if len(lines) > 1}

    @cached_property
    def _axes(self) -> list[str]:
        return list(dict.fromkeys(axis for row in self.view.analysis.rows for axis in row.cell.axes))

    def _times(self) -> list[list[object]]:
        names = ["median", "low", "high", "p10", "p90", "p99"]
        lines: list[list[object]] = [
            ["operation", "provider", *self._axes, *(f"{name}_ms" for name in names), "samples", "flops", "bytes"]
        ]
        for row in self.view.analysis.rows:
            if (s := row.summary(self.view.headline.name)) and row.result:
                times = [f"{value * 1e3:.5f}" for value in (s.median, s.ci_low, s.ci_high, s.p10, s.p90, s.p99)]
                work = row.result.work
                lines.append([*self._place(row), *times, s.n, *((work.flops, work.bytes) if work else ("", ""))])
        return lines

    def _counts(self) -> list[list[object]]:
        rows = [row for row in self.view.analysis.rows if row.result and row.result.counts]
        names = list(dict.fromkeys(name for row in rows if row.result for name in row.result.counts))
        lines: list[list[object]] = [["operation", "provider", *self._axes, *names]]
        return lines + [[*self._place(r), *(r.result.counts.get(n, "") for n in names)] for r in rows if r.result]

    def _place(self, row: Row) -> list[object]:
        return [row.cell.subject, row.cell.provider, *(row.cell.axes.get(axis, "") for axis in self._axes)]


def _csv(lines: Sequence[Sequence[object]]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue().encode()
