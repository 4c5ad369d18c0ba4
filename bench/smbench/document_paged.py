"""What the report of document 001 says beyond tables of times: its own tables, what they mix, the field, the answer.

Pure values from a View and the published numbers. Owns no words and no format: those are in the template.
"""

from __future__ import annotations

import csv
import io
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.cell import AxisValue
from smbench.document_paged_effects import Effects
from smbench.document_paged_field import Field
from smbench.published import Published
from smbench.recipe import MeasureRow
from smbench.stats import Summary
from smbench.views import Axes, Plot, View, slug

SUBJECT = "paged_attention"
FAITHFUL = ("classic-v1", "classic-v2")
"""The document's algorithm, in the version that it most likely profiled first."""
DOCUMENT_MEASURE = "document"
MODES: Mapping[str, str] = {"table": "table", "contiguous": "contiguous", "same-block": "same_block"}
"""What the published file calls an address mode."""
ALLOCATORS: Mapping[str, str] = {"device": "normal", "managed": "uvm"}


@dataclass(frozen=True, slots=True)
class Column:
    """One column of a table of the document: where its numbers are."""

    header: str
    batch: AxisValue
    seq_len: AxisValue
    address: str = "table"
    memory: str = "device"


@dataclass(frozen=True, slots=True)
class DocumentTable:
    """A table under one of the document's headings."""

    title: str
    seq_len: AxisValue
    columns: Sequence[Column]
    batches: bool
    """It has the column `batch->`."""


@dataclass(frozen=True)
class Paged:
    """A run of the recipe of document 001, asked for what its report claims."""

    view: View
    published: Published | None

    @cached_property
    def measure(self) -> MeasureRow:
        """The measure of the document's tables: its own protocol, or the headline where the profile has it not."""
        measures = self.view.analysis.profile.measure
        return next((m for m in measures if m.name == DOCUMENT_MEASURE), self.view.headline)

    @cached_property
    def tabled(self) -> list[str]:
        """The providers that the document's tables are made for: those that have numbers in its layout."""
        ours = [name for name in (self.view.best,) if name]
        wanted = [*FAITHFUL, *ours, self.view.analysis.recipe.baseline]
        found = [name for name in dict.fromkeys(wanted) if name in self.view.providers and self._is_tabled(name)]
        return found[:-1] if len(found) > 1 and found[-1] == self.view.analysis.recipe.baseline else found

    def _is_tabled(self, provider: str) -> bool:
        rows = self.view.rows(provider, SUBJECT, lambda axes: axes["layout"] == "document")
        return any(row.summaries for row in rows)

    @cached_property
    def base(self) -> Axes:
        """The axes that all points in the document's layout share; empty where the plan has none."""
        points = [point for point in self.view.points(SUBJECT) if point["layout"] == "document"]
        first = points[0] if points else {}
        return {axis: value for axis, value in first.items() if all(point[axis] == value for point in points)}

    @cached_property
    def blocks(self) -> list[AxisValue]:
        """The block sizes of the document's tables."""
        points = [p for p in self.view.points(SUBJECT) if p["layout"] == "document" and p["memory"] == "device"]
        return sorted({integer(point["block_size"]) for point in points})

    @cached_property
    def single_lengths(self) -> list[AxisValue]:
        """Lengths at batch 1, the longest first."""
        return sorted({integer(s) for b, s in self._shapes if b == 1}, reverse=True)

    @cached_property
    def batches(self) -> list[AxisValue]:
        """Larger batches, the largest first, as in the document."""
        return sorted({integer(b) for b, _ in self._shapes if b != 1}, reverse=True)

    @cached_property
    def batch_length(self) -> AxisValue:
        """The length of the larger batches."""
        return next((s for b, s in self._shapes if b != 1), 0)

    @cached_property
    def _shapes(self) -> list[tuple[AxisValue, AxisValue]]:
        points = [p for p in self.view.points(SUBJECT) if p["layout"] == "document" and p["memory"] == "device"]
        return list(dict.fromkeys((point["batch"], point["seq_len"]) for point in points))

    def tables(self) -> list[DocumentTable]:
        """The document's six tables, in its order, as far as the plan has their shapes."""
        found = []
        if self.single_lengths:
            longest = self.single_lengths[0]
            uvm = [Column("uvm", 1, longest, memory="managed"), Column("normal", 1, longest)]
            found.append(DocumentTable("vllm", longest, uvm, False))
            for title, address in (("Without page table lookup", "contiguous"), ("Original vllm", "table")):
                columns = [
                    Column("b1 time [us]" if length == longest else str(length), 1, length, address)
                    for length in self.single_lengths
                ]
                found.append(DocumentTable(title, longest, columns, True))
        if self.batches:
            for title, address in (
                ("Without page table lookup", "contiguous"),
                ("Original vllm", "table"),
                ("No offset", "same-block"),
            ):
                columns = [Column(f"b{batch} time [us]", batch, self.batch_length, address) for batch in self.batches]
                found.append(DocumentTable(title, self.batch_length, columns, True))
        return found

    def number(self, provider: str, column: Column, block: AxisValue) -> Summary | None:
        """The measured number of a table's cell."""
        return self.view.summary(SUBJECT, provider, self.point(column, block), self.measure.name)

    def ended(self, provider: str, column: Column, block: AxisValue) -> str | None:
        """How that cell ended, None where the plan has no such cell."""
        return self.view.status(SUBJECT, provider, self.point(column, block))

    def point(self, column: Column, block: AxisValue) -> Axes:
        """The axes of a table's cell."""
        own = {"batch": column.batch, "seq_len": column.seq_len, "block_size": block}
        return {**self.base, "layout": "document", "memory": column.memory, "address": column.address, **own}

    def published_seconds(self, table: DocumentTable, column: Column, block: AxisValue) -> float | None:
        """The published number of a table's cell, None where the document has none."""
        key = (MODES[column.address], ALLOCATORS[column.memory], column.batch, column.seq_len, block)
        return self._published.get((table.title, *key))

    @cached_property
    def _published(self) -> Mapping[tuple[AxisValue, ...], float]:
        """By the table's title too: the document times some cases twice."""
        names = ("mode", "allocator", "batch", "seq_len", "block_size")
        found: dict[tuple[AxisValue, ...], float] = {}
        for table in self.published.table if self.published else ():
            title = table.title.partition(",")[0]
            for row in table.rows:
                for column, printed in zip(table.columns, row[len(table.axes) :], strict=True):
                    if not isinstance(printed, str):
                        at = {**table.at, **table.coordinates(row), **column.at}
                        found[title, *(at[name] for name in names)] = float(printed) * column.factor
        return found

    @cached_property
    def effects(self) -> Effects:
        """Lookup, layout, pool and cache, apart from each other."""
        return Effects(self.view, self.base, self._shapes, self.blocks, self.measure.name)

    @cached_property
    def field(self) -> Field:
        """Ours against other projects' kernels."""
        return Field(self.view, self.base)

    @cached_property
    def day(self) -> str | None:
        """The day of the first session, for the front matter; None before any."""
        sessions = self.view.analysis.sessions
        return sessions[0].started_at[:10] if sessions else None

    def plots(self) -> list[Plot]:
        """Time against block size: the document's modes, then the field."""
        found = []
        cells = itertools.product(self.tabled, self.tables(), self.blocks)
        if any(self.number(provider, column, block) for provider, t, block in cells for column in t.columns):
            found.append(Plot("modes", f"modes_{slug(self.measure.name)}.png", self.measure, (SUBJECT,)))
        if self.field.measured():
            found.append(Plot("field", f"field_{slug(self.view.headline.name)}.png", self.view.headline, (SUBJECT,)))
        return found

    def draw(self, plot: Plot) -> bytes:
        """The PNG of one of `plots`."""
        # matplotlib takes most of a second to import, and who checks a report draws nothing
        from smbench import figures_paged

        return figures_paged.draw(plot, self)

    def records(self) -> Mapping[str, bytes]:
        """A CSV of medians for each measure, a line for each cell that has a number."""
        return {
            f"times_{slug(measure.name)}.csv": self._csv(measure.name).encode()
            for measure in self.view.measures
            if any(row.summary(measure.name) for row in self.view.analysis.rows)
        }

    def _csv(self, measure: str) -> str:
        axes = list(self.view.values(SUBJECT))
        file = io.StringIO()
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["provider", *axes, "time_us", "low_us", "high_us"])
        for row in self.view.analysis.rows:
            summary = row.summary(measure)
            if summary:
                times = [f"{seconds * 1e6:.3f}" for seconds in (summary.median, summary.ci_low, summary.ci_high)]
                writer.writerow([row.cell.provider, *(row.cell.axes[axis] for axis in axes), *times])
        return file.getvalue()


def integer(value: AxisValue) -> int:
    """An axis value that is a number."""
    return value if isinstance(value, int) else 0
