"""What the numbers of a run of document 004 let one say: rankings, scaling, capacity, Pareto fronts. Pure values.

A ranking counts points; it is clear where the intervals of the first two do not overlap. Owns no sentence.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.document_frameworks_cells import Group
from smbench.document_frameworks_load import Online
from smbench.stats import geometric_mean

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Ranking:
    """Who is fastest by one measure over the points that several providers have."""

    measure: str
    points: int
    wins: Mapping[str, int]
    """Provider to points where its median is the lowest; the most first, only those with any."""
    clear: Mapping[str, int]
    """The same, where its interval lies below everybody else's."""

    @property
    def first(self) -> str:
        """The provider with most points."""
        return next(iter(self.wins))


@dataclass(frozen=True, slots=True)
class Scaling:
    """How a latency of a provider changes where one axis grows and all others stay."""

    provider: str
    measure: str
    axis: str
    low: AxisValue
    high: AxisValue
    ratio: float
    """Time at the high value over that at the low one, geometric mean."""
    points: int


@dataclass(frozen=True, slots=True)
class Capacity:
    """What one server reached over all of its loads."""

    provider: str
    best: Online
    """The load with most output tokens a second."""
    kept_up: Online | None
    """The highest rate that it kept up with; None where it did so with none."""
    fell_behind: Online | None
    """The lowest rate that it did not keep up with; None where there was none."""
    good: Mapping[str, Online]
    """Name of the limits to the load with most requests within them; only where there are any."""


@dataclass(frozen=True, slots=True)
class Front:
    """A provider's part in the loads that no other load beats in both throughput and latency."""

    provider: str
    own: int
    """Loads on its own front."""
    overall: int
    """Loads on the front of all providers together."""
    loads: int


def rankings(groups: Sequence[Group], measures: Sequence[str]) -> list[Ranking]:
    """A ranking for each measure that at least two providers have at some point."""
    found = []
    for measure in measures:
        wins: dict[str, int] = {}
        clear: dict[str, int] = {}
        points = 0
        for rows in _contests(groups):
            timed = sorted(
                ((summary, row.cell.provider) for row in rows if (summary := row.summary(measure))),
                key=lambda entry: entry[0].median,
            )
            if len(timed) < 2:
                continue
            points += 1
            first, provider = timed[0]
            wins[provider] = wins.get(provider, 0) + 1
            if all(first.ci_high < other.ci_low for other, _ in timed[1:]):
                clear[provider] = clear.get(provider, 0) + 1
        if points:
            ordered = dict(sorted(wins.items(), key=lambda entry: -entry[1]))
            found.append(Ranking(measure, points, ordered, clear))
    return found


def scalings(groups: Sequence[Group], axis: str, measures: Sequence[str]) -> list[Scaling]:
    """How each provider's latencies change from the smallest to the largest value of an axis of integers."""
    rows = [row for group in groups for row in group.rows if row.summaries]
    values = sorted({int(row.cell.axes[axis]) for row in rows})
    if len(values) < 2:
        return []
    low, high = values[0], values[-1]
    found = []
    for provider in dict.fromkeys(row.cell.provider for row in rows):
        mine = {_key(row, axis): row for row in rows if row.cell.provider == provider and row.cell.axes[axis] == low}
        for measure in measures:
            ratios = [
                b.median / a.median
                for row in rows
                if row.cell.provider == provider and row.cell.axes[axis] == high and (base := mine.get(_key(row, axis)))
                if (a := base.summary(measure)) and (b := row.summary(measure))
            ]
            if ratios:
                found.append(Scaling(provider, measure, axis, low, high, geometric_mean(ratios), len(ratios)))
    return found


def capacities(found: Sequence[Online]) -> list[Capacity]:
    """What each provider's server reached, in the order of the loads."""
    capacities = []
    for provider in dict.fromkeys(entry.row.cell.provider for entry in found):
        mine = [entry for entry in found if entry.row.cell.provider == provider]
        steady = [entry for entry in mine if entry.kept_up]
        behind = [entry for entry in mine if entry.kept_up is False]
        limits = dict.fromkeys(name for entry in mine for name in entry.goodput)
        best = {name: max(mine, key=lambda entry: entry.goodput.get(name, 0.0)) for name in limits}
        capacities.append(
            Capacity(
                provider,
                max(mine, key=lambda entry: entry.rates["output_throughput"]),
                max(steady, key=_rate, default=None),
                min(behind, key=_rate, default=None),
                {name: entry for name, entry in best.items() if entry.goodput.get(name, 0.0) > 0},
            )
        )
    return capacities


def fronts(found: Sequence[Online], latency: str) -> list[Front]:
    """Each provider's part in the fronts of output throughput against the median of a latency."""
    seen = [entry for entry in found if latency in entry.spreads]
    overall = set(map(id, front(seen, latency)))
    parts = []
    for provider in dict.fromkeys(entry.row.cell.provider for entry in seen):
        mine = [entry for entry in seen if entry.row.cell.provider == provider]
        shared = sum(id(entry) in overall for entry in mine)
        parts.append(Front(provider, len(front(mine, latency)), shared, len(mine)))
    return parts


def front(found: Sequence[Online], latency: str) -> list[Online]:
    """The loads that no other one beats: none has as much output a second at a lower median, by rising latency."""
    return pareto(found, lambda entry: (entry.spreads[latency].median, entry.rates["output_throughput"]))


def pareto(items: Sequence[T], place: Callable[[T], tuple[float, float]]) -> list[T]:
    """The items that no other one dominates: `place` gives what should be low and what should be high."""
    kept: list[T] = []
    highest = float("-inf")
    for item in sorted(items, key=lambda entry: (place(entry)[0], -place(entry)[1])):
        if place(item)[1] > highest:
            kept.append(item)
            highest = place(item)[1]
    return kept


def _contests(groups: Sequence[Group]) -> Iterable[list[Row]]:
    """The cells of each point, provider by provider."""
    for group in groups:
        for point in group.points:
            yield [row for provider in group.providers if (row := group.row(point, provider))]


def _key(row: Row, without: str) -> tuple[tuple[str, AxisValue], ...]:
    return tuple(sorted((name, value) for name, value in row.cell.axes.items() if name != without))


def _rate(entry: Online) -> float:
    return entry.load.request_rate or 0.0
