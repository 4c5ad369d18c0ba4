"""From stored records to what a report shows: statuses after the guards, summaries, comparisons. Pure; owns no format.

Everything that a template prints is computed here or in `stats` and `guards`; a template only formats.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.arch import Device
from smbench.cell import AxisValue, Cell
from smbench.guards import Evidence, Finding, examine
from smbench.recipe import Profile, Recipe
from smbench.result import Environment, Measurement, Result, Session, Status, Work
from smbench.stats import Summary, geometric_mean, summarize

Summaries = Mapping[tuple[str, str], Summary]
"""By cell_id and measurement name."""


@dataclass(frozen=True, slots=True)
class Row:
    """One planned cell with everything known of it."""

    cell: Cell
    status: Status
    reason: str | None
    result: Result | None
    """None where the cell was not reached yet."""
    summaries: Mapping[str, Summary]
    """By measurement name; empty unless the status is `ok`."""

    def summary(self, measure: str) -> Summary | None:
        """The summary of a measurement, None where there is no number."""
        return self.summaries.get(measure)


@dataclass(frozen=True, slots=True)
class Comparison:
    """How one provider's times relate to another's over the points that both have."""

    provider: str
    against: tuple[str, ...]
    """The other provider; of several, the fastest one at each point."""
    measure: str
    points: int
    geomean_speedup: float
    lowest: float
    highest: float
    faster: int
    """Points where it is faster and the two intervals do not overlap."""
    slower: int
    """Points where it is slower and the two intervals do not overlap."""

    @property
    def unclear(self) -> int:
        """Points whose intervals overlap."""
        return self.points - self.faster - self.slower


@dataclass(frozen=True)
class Analysis:
    """A run, ready to be rendered."""

    recipe: Recipe
    profile_name: str
    device: Device | None
    rows: Sequence[Row]
    """Every planned cell in plan order, measured or not."""
    findings: Sequence[Finding]
    environments: Sequence[Environment]
    sessions: Sequence[Session]

    @property
    def profile(self) -> Profile:
        """The profile that was run."""
        return self.recipe.profile[self.profile_name]

    @cached_property
    def _index(self) -> Mapping[tuple[str, tuple[tuple[str, AxisValue], ...], str], Row]:
        return {(*row.cell.point, row.cell.provider): row for row in self.rows}

    def row(self, subject: str, provider: str, **axes: AxisValue) -> Row | None:
        """The row of one operation, provider and complete set of axes, None where the plan has no such cell."""
        return self._index.get((subject, tuple(sorted(axes.items())), provider))

    def select(self, subject: str | None = None, provider: str | None = None, **axes: AxisValue) -> list[Row]:
        """The rows that match everything given, in plan order."""
        return [
            row
            for row in self.rows
            if subject in (None, row.cell.subject)
            and provider in (None, row.cell.provider)
            and all(row.cell.axes.get(name) == value for name, value in axes.items())
        ]

    def axis_values(self, axis: str, subject: str | None = None) -> list[AxisValue]:
        """The values that an axis takes, in plan order."""
        return list(dict.fromkeys(r.cell.axes[axis] for r in self.select(subject) if axis in r.cell.axes))

    def subjects(self) -> list[str]:
        """The operations, in plan order."""
        return list(self._subjects)

    @cached_property
    def _subjects(self) -> Sequence[str]:
        return list(dict.fromkeys(row.cell.subject for row in self.rows))

    def counts(self) -> Mapping[Status, int]:
        """How many cells ended in each status."""
        found: dict[Status, int] = {}
        for row in self.rows:
            found[row.status] = found.get(row.status, 0) + 1
        return found

    def speedup(self, row: Row, measure: str, against: str) -> float | None:
        """Duration of another provider at the same point over this row's, None where one of them has no number."""
        other = self._index.get((*row.cell.point, against))
        mine, theirs = row.summary(measure), other.summary(measure) if other else None
        return theirs.median / mine.median if mine and theirs else None

    def fastest(self, row: Row, providers: Sequence[str], measure: str) -> Row | None:
        """At this row's point, the row of the named provider with the lowest median; None where none has a number."""
        found: tuple[float, Row] | None = None
        for name in providers:
            other = self._index.get((*row.cell.point, name))
            theirs = other.summary(measure) if other else None
            if other and theirs and (found is None or theirs.median < found[0]):
                found = theirs.median, other
        return found[1] if found else None

    def compare(self, rows: Sequence[Row], against: str | Sequence[str], measure: str) -> Comparison | None:
        """One provider's rows against another provider, or the fastest of several, at the same points.

        None where no point has both numbers.
        """
        names = (against,) if isinstance(against, str) else tuple(against)
        ratios: list[float] = []
        faster = slower = 0
        for row in rows:
            other = self.fastest(row, names, measure)
            mine, theirs = row.summary(measure), other.summary(measure) if other else None
            if mine and theirs:
                ratios.append(theirs.median / mine.median)
                faster += mine.ci_high < theirs.ci_low
                slower += mine.ci_low > theirs.ci_high
        if not ratios:
            return None
        return Comparison(
            rows[0].cell.provider,
            names,
            measure,
            len(ratios),
            geometric_mean(ratios),
            min(ratios),
            max(ratios),
            faster,
            slower,
        )

    def measure_ratio(self, rows: Sequence[Row], numerator: str, denominator: str) -> tuple[int, float] | None:
        """How many rows have both measures, and the geometric mean of the ratio of their medians; None for no row.

        Two ways of timing are put against each other here to show what the choice does, never two providers.
        """
        pairs = [(row.summary(numerator), row.summary(denominator)) for row in rows]
        ratios = [over.median / under.median for over, under in pairs if over and under]
        return (len(ratios), geometric_mean(ratios)) if ratios else None

    def time_split(self) -> Mapping[str, float]:
        """Where the wall clock of all sessions went, in seconds; `kernels` is device time inside measurements.

        Keys: wall, kernels, compile, start, inputs, check, capture, other. `other` is what no phase accounts for.
        """
        return self._time_split

    @cached_property
    def _time_split(self) -> Mapping[str, float]:
        measured = [row.result for row in self.rows if row.result]
        phase = {
            name: sum(result.phases_s.get(name, 0.0) for result in measured)
            for name in ("inputs", "compile", "check", "capture")
        }
        phase["compile"] += sum(session.compile_s for session in self.sessions)
        kernels = sum(_busy_s(result) for result in measured)
        wall = sum(session.wall_s for session in self.sessions)
        start = sum(session.worker_start_s for session in self.sessions)
        known = kernels + start + sum(phase.values())
        return {"wall": wall, "kernels": kernels, "start": start, **phase, "other": max(0.0, wall - known)}


def analyse(
    recipe: Recipe,
    profile_name: str,
    cells: Sequence[Cell],
    results: Mapping[str, Result],
    environments: Sequence[Environment],
    sessions: Sequence[Session],
    device: Device | None,
    summaries: Summaries | None = None,
) -> Analysis:
    """Join a plan's cells with their results (by cell_id), summarize the samples and let the guards look.

    A caller that does not keep the samples gives the `summaries` that it made of them.
    """
    planned = [results[cell.cell_id] for cell in cells if cell.cell_id in results]
    if summaries is None:
        summaries = summaries_of(planned)
    findings = examine(Evidence(recipe, device, planned, summaries, environments, sessions))
    refuted = {finding.cell_id: finding for finding in findings if finding.severity == "refuted"}
    rows = [_row(cell, results.get(cell.cell_id), summaries, refuted.get(cell.cell_id)) for cell in cells]
    return Analysis(recipe, profile_name, device, rows, findings, environments, sessions)


def summaries_of(results: Sequence[Result]) -> Summaries:
    """The summary of every measurement of some results."""
    keyed: list[tuple[tuple[str, str], Measurement]] = [
        ((result.cell_id, measurement.name), measurement) for result in results for measurement in result.measurements
    ]
    found = summarize([measurement.samples_s for _, measurement in keyed])
    return {key: summary for (key, _), summary in zip(keyed, found, strict=True)}


def _busy_s(result: Result) -> float:
    """Device time of a cell. The measures of an operation are taken one after another, those of requests are of one."""
    each = [measurement.busy_s for measurement in result.measurements]
    return max(each, default=0.0) if result.cell.kind == "engine" else sum(each)


def _row(cell: Cell, result: Result | None, summaries: Summaries, refuted: Finding | None) -> Row:
    if result is None:
        return Row(cell, "skipped", "not reached yet; the same command goes on", None, {})
    if refuted and result.status in ("ok", "verified"):
        return Row(cell, "invalid", f"{refuted.guard}: {refuted.message}", result, {})
    numbers = {m.name: summaries[cell.cell_id, m.name] for m in result.measurements}
    return Row(cell, result.status, result.reason, result, numbers)


def bandwidth(work: Work | None, summary: Summary | None) -> float | None:
    """Least bytes over median duration, B/s; None where either is unknown."""
    return work.bytes / summary.median if work and summary else None
