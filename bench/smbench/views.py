"""What the reports of operation recipes show, as values: points, comparisons over groups, reasons with counts.

Pure selections from an Analysis. Owns no format and no statistics: templates format, `stats` and `analysis` compute.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Analysis, Comparison, Row, bandwidth
from smbench.cell import AxisValue
from smbench.machines import Machines
from smbench.recipe import MeasureRow
from smbench.result import UNTESTED, Measurement, Status
from smbench.statements import Grouped, grouped, shape
from smbench.stats import Summary

TELLING: Mapping[str, tuple[int, ...]] = {
    "hidden_size": (1024, 4096, 11008, 32000, 128256),
    "batch": (1, 16, 56),
}
"""Values that a compact table shows, where the plan has them, beside the smallest and the largest."""
FEW = 3
"""An axis with no more values than this is shown whole."""

Axes = Mapping[str, AxisValue]


@dataclass(frozen=True, slots=True)
class Situation:
    """Cells of one provider that ended alike."""

    provider: str
    status: Status
    subjects: list[str]
    reason: Grouped


@dataclass(frozen=True, slots=True)
class Versus:
    """One line of a summary table: a provider against others over a group of points."""

    group: Axes
    points: int
    """Planned points of the group, with or without numbers."""
    comparisons: Mapping[str, Comparison | None]
    """By what it is compared with, in the order of the columns."""


@dataclass(frozen=True, slots=True)
class Share:
    """A part of the wall clock."""

    name: str
    seconds: float
    fraction: float | None
    """Of the whole; None when the whole is zero."""


@dataclass(frozen=True, slots=True)
class Plot:
    """One figure of the report."""

    kind: str
    """`duration`, `speedup` or `published`."""
    file: str
    """Name in `figures/`."""
    measure: MeasureRow
    subjects: tuple[str, ...]


@dataclass(frozen=True)
class View:
    """An analysis, asked the questions of a report."""

    analysis: Analysis

    @property
    def machines(self) -> Machines:
        """Where it was measured."""
        return Machines(self.analysis.environments)

    @property
    def providers(self) -> list[str]:
        """The providers of the profile, in its order."""
        return self.analysis.profile.providers

    def title(self, provider: str) -> str:
        """How reports call a provider."""
        return self.analysis.recipe.providers[provider].title

    def titles(self, providers: Iterable[str]) -> list[str]:
        """The titles of several providers."""
        return [self.title(provider) for provider in providers]

    def of_selection(self, selection: str) -> list[str]:
        """The profile's providers whose launch parameters come from `selection`."""
        return [name for name in self.providers if self.analysis.recipe.providers[name].selection == selection]

    @property
    def tuned(self) -> str | None:
        """Our kernels with tuned configurations, where the profile has them."""
        return next(iter(self.of_selection("tuned")), None)

    @property
    def default(self) -> str | None:
        """Our kernels with the default configuration, where the profile has them."""
        return next(iter(self.of_selection("default")), None)

    @property
    def peers(self) -> list[str]:
        """Everybody else's implementations, the baseline among them."""
        chosen = [*self.of_selection("library"), *self.of_selection("library-tuned")]
        return [name for name in self.providers if name in chosen]

    @cached_property
    def best(self) -> str | None:
        """The provider that conclusions are about: ours tuned if it has any number, else ours default."""
        return next((p for p in (self.tuned, self.default) if p and any(row.summaries for row in self.rows(p))), None)

    @cached_property
    def headline(self) -> MeasureRow:
        """The measure that summaries show: the recipe's, or the first one where the profile does not have that."""
        measures = self.analysis.profile.measure
        return next((m for m in measures if m.name == self.analysis.recipe.headline), measures[0])

    @property
    def measures(self) -> list[MeasureRow]:
        """All measures, the headline first."""
        return [self.headline, *(m for m in self.analysis.profile.measure if m is not self.headline)]

    @cached_property
    def _rows(self) -> Mapping[tuple[str, str], list[Row]]:
        found: dict[tuple[str, str], list[Row]] = {}
        for row in self.analysis.rows:
            found.setdefault((row.cell.subject, row.cell.provider), []).append(row)
        return found

    def rows(
        self,
        provider: str,
        subject: str | None = None,
        keep: Callable[[Axes], bool] | None = None,
    ) -> list[Row]:
        """A provider's rows, of one operation or all, where `keep` agrees to the axes."""
        subjects = [subject] if subject is not None else self.analysis.subjects()
        rows = [row for name in subjects for row in self._rows.get((name, provider), [])]
        return [row for row in rows if keep is None or keep(row.cell.axes)]

    @property
    def planned(self) -> int:
        """How many cells the plan has."""
        return len(self.analysis.rows)

    @property
    def reached(self) -> int:
        """How many cells have a result of any status."""
        return sum(row.result is not None for row in self.analysis.rows)

    @property
    def timed(self) -> int:
        """How many cells have a number."""
        return sum(bool(row.summaries) for row in self.analysis.rows)

    def count(self, rows: Iterable[Row], *statuses: Status) -> int:
        """How many of the rows have one of the statuses."""
        return sum(row.status in statuses for row in rows)

    def points(self, subject: str) -> list[Axes]:
        """The distinct points of an operation, in plan order."""
        return self._points.get(subject, [])

    @cached_property
    def _points(self) -> Mapping[str, list[Axes]]:
        found: dict[str, dict[tuple[tuple[str, AxisValue], ...], Axes]] = {}
        for (name, _), rows in self._rows.items():
            for row in rows:
                found.setdefault(name, {}).setdefault(row.cell.point[1], row.cell.axes)
        return {name: list(points.values()) for name, points in found.items()}

    def values(self, subject: str) -> Mapping[str, list[AxisValue]]:
        """Every axis of an operation with the values that it takes, in plan order."""
        return self._values.get(subject, {})

    @cached_property
    def _values(self) -> Mapping[str, Mapping[str, list[AxisValue]]]:
        found: dict[str, dict[str, dict[AxisValue, None]]] = {}
        for subject, points in self._points.items():
            for point in points:
                for axis, value in point.items():
                    found.setdefault(subject, {}).setdefault(axis, {})[value] = None
        return {subject: {axis: list(values) for axis, values in axes.items()} for subject, axes in found.items()}

    def varying(self, subject: str) -> list[str]:
        """The axes that take more than one value, the hidden size last: it is the x axis of every figure."""
        axes = [axis for axis, values in self.values(subject).items() if len(values) > 1 and axis != "hidden_size"]
        # seq_len before batch, whatever the order in the recipe
        return [*sorted(axes, key=lambda axis: (axis == "batch", axes.index(axis))), "hidden_size"]

    def fixed(self, subject: str) -> Mapping[str, AxisValue]:
        """The axes that take one value, with it."""
        varying = self.varying(subject)
        return {axis: values[0] for axis, values in self.values(subject).items() if axis not in varying}

    def telling_points(self, subject: str) -> list[Axes]:
        """The few points of an operation that a compact table shows, sorted by the varying axes."""
        shown = {axis: set(telling(axis, values)) for axis, values in self.values(subject).items()}
        chosen = [p for p in self.points(subject) if all(value in shown[axis] for axis, value in p.items())]
        order = self.varying(subject)
        return sorted(chosen, key=lambda point: [_sort_key(point.get(axis, "")) for axis in order])

    def summary(self, subject: str, provider: str, point: Axes, measure: str) -> Summary | None:
        """The number in a table, None where there is none."""
        row = self.analysis.row(subject, provider, **point)
        return row.summary(measure) if row else None

    def status(self, subject: str, provider: str, point: Axes) -> Status | None:
        """How the cell ended, None where the plan has no such cell."""
        row = self.analysis.row(subject, provider, **point)
        return row.status if row else None

    @property
    def rivals(self) -> list[str]:
        """The providers that have any number."""
        return [name for name in self.providers if any(row.summaries for row in self.rows(name))]

    def ratio(self, subject: str, provider: str, others: Sequence[str], point: Axes, measure: str) -> float | None:
        """Time of the fastest of the others over this provider's at a point; None where one of them has no number."""
        row = self.analysis.row(subject, provider, **point)
        other = self.analysis.fastest(row, others, measure) if row else None
        return self.analysis.speedup(row, measure, other.cell.provider) if row and other else None

    def versus(
        self,
        provider: str,
        subject: str,
        measure: str,
        against: Mapping[str, Sequence[str]],
        by: Sequence[str] = (),
        keep: Callable[[Axes], bool] | None = None,
    ) -> list[Versus]:
        """One line for each combination of the axes `by`, in plan order; `against` maps a column to its providers."""
        groups: dict[tuple[AxisValue, ...], list[Row]] = {}
        for row in self.rows(provider, subject, keep):
            groups.setdefault(tuple(row.cell.axes[axis] for axis in by), []).append(row)
        return [
            Versus(
                dict(zip(by, key, strict=True)),
                len(rows),
                {column: self.analysis.compare(rows, names, measure) for column, names in against.items()},
            )
            for key, rows in sorted(groups.items(), key=lambda item: [_sort_key(value) for value in item[0]])
        ]

    def wins(self, subject: str, measure: str) -> Mapping[str, int]:
        """How often each provider has the lowest median of all at a point."""
        found = dict.fromkeys(self.providers, 0)
        for point in self.points(subject):
            row = self.analysis.row(subject, self.providers[0], **point)
            winner = self.analysis.fastest(row, self.providers, measure) if row else None
            if winner:
                found[winner.cell.provider] += 1
        return found

    def compared_points(self, subject: str, measure: str) -> int:
        """How many points of an operation have a number of at least one provider."""
        return sum(self.wins(subject, measure).values())

    def missing(self, subject: str, points: Sequence[Axes]) -> list[Grouped]:
        """Why numbers are missing from a table of these points; keys are provider and status."""
        rows = [self.analysis.row(subject, provider, **point) for point in points for provider in self.providers]
        return grouped((row.cell.provider, row.status, row.reason or "") for row in rows if row and not row.summaries)

    def situations(self, *statuses: Status) -> list[Situation]:
        """The cells of some statuses, by provider, status and reason, over all operations; in plan order."""
        found: dict[tuple[str, ...], list[Row]] = {}
        for row in self.analysis.rows:
            if row.status in statuses:
                reason = shape(row.reason or "")
                found.setdefault((row.cell.provider, row.status, reason), []).append(row)
        return [
            Situation(
                rows[0].cell.provider,
                rows[0].status,
                list(dict.fromkeys(row.cell.subject for row in rows)),
                Grouped((), rows[0].reason or "", len(rows), len({row.reason for row in rows}) == 1),
            )
            for rows in found.values()
        ]

    def untested(self) -> list[Situation]:
        """Every situation without a checked result."""
        return self.situations(*UNTESTED)

    def findings(self) -> list[Grouped]:
        """The integrity findings; keys are guard, severity and remedy."""
        return grouped((f.guard, f.severity, f.remedy, f.message) for f in self.analysis.findings)

    def shares(self) -> list[Share]:
        """Where the wall clock of all sessions went, the largest part first, `other` last."""
        split = self.analysis.time_split()
        parts = [(name, seconds) for name, seconds in split.items() if name != "wall"]
        wall = split["wall"]
        return [
            Share(name, seconds, seconds / wall if wall else None)
            for name, seconds in sorted(parts, key=lambda part: (part[0] == "other", -part[1]))
        ]

    def harness(self) -> Share:
        """The wall clock outside kernels and compilation: what a rental pays for our own work."""
        split = self.analysis.time_split()
        seconds = max(0.0, split["wall"] - split["kernels"] - split["compile"])
        return Share("harness", seconds, seconds / split["wall"] if split["wall"] else None)

    def wall_s(self) -> float:
        """Wall clock of all sessions."""
        return self.analysis.time_split()["wall"]

    def calls_per_sample(self, measure: str) -> tuple[int, int] | None:
        """Fewest and most calls that a sample of this measure is the mean of, None where nothing was timed."""
        return _range(m.calls_per_sample for m in self._measurements(measure))

    def sample_counts(self, measure: str) -> tuple[int, int] | None:
        """Fewest and most samples behind a median, None where nothing was timed."""
        return _range(s.n for row in self.analysis.rows if (s := row.summary(measure)))

    def above_bandwidth(self, measure: str) -> tuple[int, int] | None:
        """How many medians imply more bytes per second than the device's memory has, of how many; None if unknown."""
        peak = self.analysis.device.memory_bandwidth_bytes_per_s if self.analysis.device else None
        if peak is None:
            return None
        rates = [bandwidth(row.result.work, row.summary(measure)) for row in self.analysis.rows if row.result]
        known = [rate for rate in rates if rate is not None]
        return sum(rate > peak for rate in known), len(known)

    def memory_bound_s(self, row: Row) -> float | None:
        """The least bytes of a call at the device's peak bandwidth, None where either is unknown."""
        peak = self.analysis.device.memory_bandwidth_bytes_per_s if self.analysis.device else None
        work = row.result.work if row.result else None
        return work.bytes / peak if work and peak else None

    def plots(self) -> list[Plot]:
        """The figures that the numbers allow, in the order that the report shows them."""
        found = []
        for measure in self.measures:
            for subject in self.analysis.subjects():
                rows = [row for provider in self.providers for row in self.rows(provider, subject)]
                if any(row.summary(measure.name) for row in rows):
                    found.append(Plot("duration", f"{subject}_{slug(measure.name)}.png", measure, (subject,)))
        for measure in self.measures:
            if self.best and any(
                self.ratio(row.cell.subject, self.best, self.peers, row.cell.axes, measure.name)
                for row in self.rows(self.best)
            ):
                name = f"speedup_{slug(measure.name)}.png"
                found.append(Plot("speedup", name, measure, tuple(self.analysis.subjects())))
        return found

    def _measurements(self, measure: str) -> Iterable[Measurement]:
        return (
            measurement
            for row in self.analysis.rows
            if row.result and row.summaries
            for measurement in row.result.measurements
            if measurement.name == measure
        )


def telling(axis: str, values: Sequence[AxisValue]) -> list[AxisValue]:
    """The values of an axis that a compact table shows, in their order: the ends and the known telling ones."""
    numbers = [value for value in values if isinstance(value, int)]
    if len(values) <= FEW or axis not in TELLING or not numbers:
        return list(values)
    wanted = {min(numbers), max(numbers), *TELLING[axis]}
    return [value for value in values if value in wanted]


def slug(name: str) -> str:
    """A name that is safe as part of a file name."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name) or "-"


def _sort_key(value: AxisValue) -> tuple[bool, AxisValue]:
    return isinstance(value, str), value


def _range(numbers: Iterable[int]) -> tuple[int, int] | None:
    found = list(numbers)
    return (min(found), max(found)) if found else None
