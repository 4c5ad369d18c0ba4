"""Two sets of results side by side: what of them is comparable, and everything that a comparison shows. Pure.

Owns the rules of comparability. Does not own verdicts (`verdicts`), where results come from (`sides`), nor how a
comparison looks (`comparison`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smbench.cell import Cell
from smbench.guards import leaves_of
from smbench.result import Environment, Status
from smbench.stats import geometric_mean
from smbench.verdicts import (
    MARGIN,
    VERDICTS,
    Noise,
    Pair,
    Row,
    Shift,
    Timing,
    Verdict,
    noise_between,
    rows_of,
    shifts_of,
)

FOREIGN = ("published", "import")
"""Kinds of sides that state what they happen to state, and whose silence is no difference."""
PRECISION_AXES = ("dtype",)
"""Axes that say how exactly a cell computes: cells that differ in one of them alone are named as incomparable."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One cell of one side."""

    cell: Cell
    status: Status
    reason: str | None
    timings: Mapping[str, Timing]
    """By measurement name; empty where there is no number."""
    prompts: str | None = None
    """What tells the prompts of one cell from others: axes name a data set, and a user's file can be any. None where
    nobody says."""


@dataclass(frozen=True, slots=True)
class Side:
    """One of the things that are compared."""

    name: str
    kind: Literal["run", "bundle", "published", "import"]
    recipe: str
    profile: str | None
    protocol_version: int | None
    """None for published and imported numbers, which have none."""
    runs: int
    """How many repeats of the experiment it holds."""
    devices: frozenset[str]
    entries: Mapping[str, Entry]
    """By cell_id."""
    environments: Sequence[Environment]
    apart: Sequence[Incomparable] = ()
    """What `alignment` found to keep its cells from those of the first side, where one of the two is an import."""


@dataclass(frozen=True, slots=True)
class Incomparable:
    """Cells that would be one, but for one field."""

    field: str
    a: str
    b: str
    cells: tuple[Cell, ...]


@dataclass(frozen=True, slots=True)
class OneSided:
    """A cell that both sides have and only one has a number of."""

    cell: Cell
    a: Status
    b: Status
    reason: str
    """Why the other has none."""


@dataclass(frozen=True, slots=True)
class Group:
    """One line of the summary."""

    measurement: str
    subject: str
    provider: str
    cells: int
    geomean_ratio: float
    counts: Mapping[Verdict, int]


@dataclass(frozen=True, slots=True)
class Difference:
    """A fact of the environments that is not the same on both sides."""

    fact: str
    a: tuple[object, ...]
    b: tuple[object, ...]


@dataclass(frozen=True, slots=True)
class Comparison:
    """B against A."""

    a: Side
    b: Side
    margin: float
    rows: Sequence[Row]
    """In the order of A's plan."""
    incomparable: Sequence[Incomparable]
    one_sided: Sequence[OneSided]
    only_a: int
    only_b: int
    """Cells that only one side has planned."""
    noise: Sequence[Noise]
    shifts: Sequence[Shift]

    def counts(self) -> Mapping[Verdict, int]:
        """How many rows have each verdict."""
        return {verdict: sum(row.verdict == verdict for row in self.rows) for verdict in VERDICTS}

    def groups(self) -> list[Group]:
        """A line for each measurement, operation and provider, in the order of A's plan."""
        found: dict[tuple[str, str, str], list[Row]] = {}
        for name in self.measurements():
            for row in self.rows:
                if row.measurement == name:
                    found.setdefault((name, row.cell.subject, row.cell.provider), []).append(row)
        return [_group(*key, rows) for key, rows in found.items()]

    def measurements(self) -> list[str]:
        """The names of the measurements that were compared."""
        return list(dict.fromkeys(row.measurement for row in self.rows))

    def slower_than(self, limit: float) -> list[Row]:
        """Rows called slower whose whole interval lies beyond 1 + limit, the slowest first."""
        beyond = [row for row in self.rows if row.verdict == "slower" and (row.ci_low or 0.0) > 1 + limit]
        return sorted(beyond, key=lambda row: -row.ratio)

    def differences(self) -> list[Difference]:
        """The facts that differ between the environments, by path; beside others' numbers, those that they state."""
        a, b = (_facts(side.environments) for side in (self.a, self.b))
        stated = [facts for side, facts in ((self.a, a), (self.b, b)) if side.kind in FOREIGN] or [{**a, **b}]
        return [
            Difference(fact, tuple(a.get(fact, {}).values()), tuple(b.get(fact, {}).values()))
            for fact in sorted({fact for facts in stated for fact in facts})
            if a.get(fact, {}).keys() != b.get(fact, {}).keys()
        ]


def compare(a: Side, b: Side, margin: float = MARGIN) -> Comparison:
    """Put B against A. Sides of unlike protocol, method or precision give no row: `incomparable` names the field."""
    pairs: list[Pair] = []
    apart: dict[tuple[str, str, str], list[Cell]] = {}
    one_sided: list[OneSided] = []
    for cell_id in (cell_id for cell_id in a.entries if cell_id in b.entries):
        own, other = a.entries[cell_id], b.entries[cell_id]
        if own.timings and other.timings:
            for found in _pairs(own, other, a.protocol_version, b.protocol_version):
                if isinstance(found, Pair):
                    pairs.append(found)
                else:
                    apart.setdefault(found, []).append(own.cell)
        elif own.timings or other.timings:
            reason = (other if own.timings else own).reason or ""
            one_sided.append(OneSided(own.cell, own.status, other.status, reason))
    only_a, only_b = _unmatched(a, b), _unmatched(b, a)
    for key, cell in _near(only_a, only_b):
        apart.setdefault(key, []).append(cell)
    noise = noise_between(pairs, a.devices == b.devices)
    rows = rows_of(pairs, {entry.measurement: entry for entry in noise}, margin)
    return Comparison(
        a,
        b,
        margin,
        rows,
        [*(Incomparable(*key, tuple(cells)) for key, cells in apart.items()), *b.apart],
        one_sided,
        len(only_a),
        len(only_b),
        noise,
        shifts_of(rows) if a.devices == b.devices else [],
    )


def _pairs(a: Entry, b: Entry, protocol_a: int | None, protocol_b: int | None) -> Iterator[Pair | tuple[str, str, str]]:
    """The comparable numbers of a cell, and the field that keeps the others apart with its two values."""
    if protocol_a is not None and protocol_b is not None and protocol_a != protocol_b:
        yield "protocol_version", str(protocol_a), str(protocol_b)
        return
    if a.prompts and b.prompts and a.prompts != b.prompts:
        yield "prompts", a.prompts, b.prompts
        return
    common = [name for name in a.timings if name in b.timings]
    if not common:
        yield "measurement", ", ".join(a.timings), ", ".join(b.timings)
    for name in common:
        own, other = a.timings[name], b.timings[name]
        unlike = [field for field in ("metric", "method", "l2") if getattr(own, field) != getattr(other, field)]
        if own.definition and other.definition and own.definition != other.definition:
            unlike.append("definition")
        if unlike:
            yield unlike[0], getattr(own, unlike[0]), getattr(other, unlike[0])
        else:
            yield Pair(a.cell, name, own, other)


def _unmatched(side: Side, other: Side) -> list[Cell]:
    return [entry.cell for cell_id, entry in side.entries.items() if cell_id not in other.entries]


def _near(only_a: Sequence[Cell], only_b: Sequence[Cell]) -> Iterator[tuple[tuple[str, str, str], Cell]]:
    """Cells of A that would be cells of B but for the seed or a precision, with that field and its two values."""
    for field in ("seed", *PRECISION_AXES):
        there: dict[tuple[object, ...], str] = {}
        for cell in only_b:
            key, value = _without(cell, field)
            there.setdefault(key, value)
        for cell in only_a:
            key, value = _without(cell, field)
            if key in there:
                yield (field, value, there[key]), cell


def _without(cell: Cell, field: str) -> tuple[tuple[object, ...], str]:
    """Everything of a cell but one field, and that field."""
    seed = None if field == "seed" else cell.seed
    axes = tuple(sorted((name, value) for name, value in cell.axes.items() if name != field))
    value = cell.seed if field == "seed" else cell.axes.get(field, "absent")
    return (cell.kind, cell.subject, cell.provider, axes, seed), str(value)


def _group(measurement: str, subject: str, provider: str, rows: Sequence[Row]) -> Group:
    counts = {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}
    mean = geometric_mean([row.ratio for row in rows])
    return Group(measurement, subject, provider, len(rows), mean, counts)


def _facts(environments: Iterable[Environment]) -> dict[str, dict[str, object]]:
    """Every fact by its path, with its distinct values by how they read."""
    found: dict[str, dict[str, object]] = {}
    for environment in environments:
        for path, value in leaves_of(environment.environment):
            if path not in ("format", "missing"):
                found.setdefault(path, {})[str(value)] = value
    return found
