"""The table across engines of document 004: batch, requests, first token, throughput; every workload in one form."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from smbench.analysis import Row
from smbench.document_frameworks_load import Offline, Online
from smbench.document_frameworks_static import Case
from smbench.views import Axes


@dataclass(frozen=True, slots=True)
class Line:
    """One cell in the forms of the table; None where a workload has no such number."""

    row: Row
    batch: int
    """Prompts that are handed over together; of a server, the most at a time, or all."""
    requests: int
    """That the numbers are of, repetitions left out."""
    first_s: float | None
    """Time to first token: of a static batch its prefill, of a load the median."""
    output_rate: float
    """Output tokens a second."""


@dataclass(frozen=True, slots=True)
class Point:
    """One line of the table: a cell's axes without its engine."""

    subject: str
    axes: Axes
    batch: int
    requests: int
    lines: Mapping[str, Line]
    """By provider; absent where it has no number."""


def points(found: Iterable[Line]) -> list[Point]:
    """The lines by what they have in common, in their order."""
    together: dict[object, dict[str, Line]] = {}
    for line in found:
        together.setdefault(line.row.cell.point, {})[line.row.cell.provider] = line
    return [
        Point(first.row.cell.subject, first.row.cell.axes, first.batch, first.requests, lines)
        for lines in together.values()
        for first in [next(iter(lines.values()))]
    ]


def of_case(case: Case) -> Line:
    """A static batch."""
    return Line(
        case.row, case.batch, case.batch, case.prefill.median if case.prefill else None, case.rates["output_throughput"]
    )


def of_offline(entry: Offline) -> Line:
    return Line(entry.row, entry.prompts, entry.prompts, None, entry.rates["output_throughput"])


def of_online(entry: Online) -> Line:
    """A load."""
    first = entry.spreads.get("ttft")
    return Line(
        entry.row,
        entry.load.max_concurrency or entry.load.completed,
        entry.load.completed,
        first.median if first else None,
        entry.rates["output_throughput"],
    )
