"""Numbers as an audit sees them, from a document or from a run: coordinates, value, resolution, work.

Owns this common form. Owns no rule: those are in the audit modules.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from smbench.analysis import Analysis
from smbench.arch import Device
from smbench.cell import AxisValue
from smbench.metrics import METRICS
from smbench.published import Published
from smbench.published_facts import PhaseWork, matches, numbers_at, phases_at
from smbench.published_table import PublishedTable

At = Mapping[str, AxisValue]
Key = TypeVar("Key")
Cache = Literal["warm", "cold", "unknown"]

PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"), (1.0, ""), (1e-3, "m"), (1e-6, "µ"), (1e-9, "n"))


@dataclass(frozen=True, slots=True)
class Observation:
    """One number."""

    at: At
    """Every coordinate."""
    row: At
    """The coordinates that its row in the table adds, in the order of the table."""
    label: str
    """What a finding calls it."""
    metric: str
    value: float
    """In the storage unit of the metric."""
    quantum: float
    """The smallest difference that its digits can show, in the same unit; 0 where they show everything."""
    uncertainty: float
    """Relative error besides that."""
    table: int
    column: int
    index: int
    """Place of its row in the table."""
    l2: Cache
    work: tuple[PhaseWork, ...] = ()
    """The least that it needs; empty where nothing is known."""
    dtype: str = ""
    accumulate: str = "float32"

    @property
    def shown(self) -> str:
        """The value with its unit."""
        return say(self.value, METRICS[self.metric].unit)

    @property
    def tolerance(self) -> float:
        """Relative distance within which another number may be the same one."""
        return self.uncertainty + self.quantum / self.value


@dataclass(frozen=True, slots=True)
class Gap:
    """Cells of a table that should have a number and have none."""

    where: str
    reason: str
    count: int
    of: int


@dataclass(frozen=True)
class Dataset:
    """Everything that an audit looks at in one go."""

    name: str
    title: str
    device_name: str
    device: Device | None
    """Physical peaks, None where they are unknown."""
    certain: bool
    """Whether the device is known, and not inferred."""
    tables: Sequence[str]
    observations: Sequence[Observation]
    gaps: Sequence[Gap]
    declared: Published | None
    """What the file declares beside its numbers; None for a run."""

    def series(self) -> list[list[Observation]]:
        """The numbers of each column of each table, in the order of its rows."""
        return grouped(self.observations, lambda seen: (seen.table, seen.column))

    def table_name(self, index: int) -> str:
        """What a finding calls a table."""
        return self.tables[index]


def of_published(name: str, published: Published, device: Device | None) -> Dataset:
    """The numbers of a file in `recipes/published/`; `device` is the row of its card, None where that is unknown."""
    observations: list[Observation] = []
    gaps: list[Gap] = []
    for i, table in enumerate(published.table):
        observations += _of_table(published, i, table)
        gaps += _gaps(published, table)
    return Dataset(
        name,
        published.title,
        published.device,
        device,
        published.device_basis == "stated",
        [table.name for table in published.table],
        observations,
        gaps,
        published,
    )


def of_analysis(name: str, analysis: Analysis, device_name: str) -> Dataset:
    """The medians of a run: a table for each operation and measure, a column for each provider."""
    tables: dict[tuple[str, str], int] = {}
    columns = {provider: i for i, provider in enumerate(analysis.profile.providers)}
    caches: Mapping[str, Cache] = {m.name: m.l2 if m.l2 != "none" else "unknown" for m in analysis.profile.measure}
    observations: list[Observation] = []
    missing: Counter[tuple[str, str]] = Counter()
    for row in analysis.rows:
        work = row.result.work if row.result else None
        if not row.summaries and row.status != "verified":
            missing[row.cell.subject, row.status] += 1
        for measure, summary in row.summaries.items():
            table = tables.setdefault((row.cell.subject, measure), len(tables))
            observations.append(
                Observation(
                    at={"op": row.cell.subject, "provider": row.cell.provider, "measure": measure, **row.cell.axes},
                    row=row.cell.axes,
                    label=f"{row.cell.label()}, {measure}",
                    metric="duration",
                    value=summary.median,
                    quantum=0.0,
                    uncertainty=(summary.ci_high - summary.ci_low) / summary.median,
                    table=table,
                    column=columns[row.cell.provider],
                    index=len(observations),
                    l2=caches[measure],
                    work=(PhaseWork("call", 1.0, float(work.bytes), float(work.flops)),) if work else (),
                    dtype=str(row.cell.axes.get("dtype", "")),
                )
            )
    gaps = [
        Gap(subject, f"status {status}", count, sum(r.cell.subject == subject for r in analysis.rows))
        for (subject, status), count in missing.items()
    ]
    names = [f"{subject}, measure {measure}" for subject, measure in tables]
    return Dataset(name, analysis.recipe.title, device_name, analysis.device, True, names, observations, gaps, None)


def grouped(seen: Iterable[Observation], key: Callable[[Observation], Key]) -> list[list[Observation]]:
    """Observations with equal keys together, in order of appearance."""
    found: dict[Key, list[Observation]] = {}
    for observation in seen:
        found.setdefault(key(observation), []).append(observation)
    return list(found.values())


def without(at: At, *names: str) -> tuple[tuple[str, AxisValue], ...]:
    """Coordinates but the named ones, as a key."""
    return tuple((name, value) for name, value in sorted(at.items()) if name not in names)


def coordinates(at: Iterable[tuple[str, object]]) -> str:
    """Coordinates in a sentence."""
    return ", ".join(f"{name}={value}" for name, value in at)


def say(value: float, unit: str) -> str:
    """A number with its unit, four digits, e.g. `2.33 s`, `864 GB/s`."""
    if unit in ("1", "tokens", "token/s", "adapters"):
        return f"{value:.6g}" if unit == "1" else f"{value:.6g} {unit}"
    prefixes = PREFIXES if unit == "s" else PREFIXES[:5]
    # above a second, seconds are read best
    scale, prefix = next(
        ((scale, prefix) for scale, prefix in prefixes if value >= scale and not (unit == "s" and scale > 1)),
        (1.0, ""),
    )
    return f"{value / scale:.4g} {prefix}{unit}"


def _of_table(published: Published, index: int, table: PublishedTable) -> Iterator[Observation]:
    cache = published.protocol.get("l2")
    if cache not in ("warm", "cold"):
        cache = published.inferred.get("l2")
    l2: Cache = "warm" if cache == "warm" else "cold" if cache == "cold" else "unknown"
    for i, row in enumerate(table.rows):
        own = table.coordinates(row)
        for j, (column, entry) in enumerate(zip(table.columns, row[len(table.axes) :], strict=True)):
            if isinstance(entry, str):
                continue
            at = {**published.at, **table.at, **own, **column.at}
            work = next(
                (w for w in published.work if w.metric == column.metric and matches(w.where, at)),
                None,
            )
            yield Observation(
                at=at,
                row=own,
                label=f"{table.name}: {coordinates([*own.items(), *column.at.items()])}",
                metric=column.metric,
                value=float(entry) * column.factor,
                quantum=column.quantum,
                uncertainty=table.uncertainty,
                table=index,
                column=j,
                index=i,
                l2=l2,
                work=phases_at(work, numbers_at(published.numbers, at)) if work else (),
                dtype=work.dtype if work else "",
                accumulate=work.accumulate if work else "float32",
            )


def _gaps(published: Published, table: PublishedTable) -> Iterator[Gap]:
    for j, column in enumerate(table.columns):
        entries = [row[len(table.axes) + j] for row in table.rows]
        for name, missing in published.missing.items():
            count = entries.count(name)
            if count and missing.kind == "unmeasured":
                where = f"{table.name}, {coordinates(column.at.items()) or column.metric}"
                yield Gap(where, missing.reason, count, len(entries))
