"""Audit rules from the numbers alone: copies, labels that name one thing, times that ignore what they should depend on.

Owns these rules and their limits. A rule computes how likely its pattern is by chance, or how far it is from it.
"""

from __future__ import annotations

import itertools
import statistics
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from smbench.audit_bounds import floor_s
from smbench.cell import AxisValue
from smbench.guards import Finding
from smbench.observations import Dataset, Observation, coordinates, grouped, say, without

ALIKE = 0.05
"""Numbers within this relative distance could be equal by chance: results of one quantity on one machine often are."""
SAME = 0.01
"""The same for one workload on two systems that may well be one."""
PAIRS = 10
"""Fewest pairs that a rate of ties is read from."""
COPY_LENGTH = 3
"""Fewest equal numbers in a row that can be called a copy."""
COPY_CHANCE = 1e-3
"""Expected number of chance runs below which a run is called a copy."""
TIE_CHANCE = 0.2
"""Expected number of chance ties in a table below which a tie is worth a note."""
FLAT = 0.01
"""Relative spread within which times count as equal, besides their own tolerance."""
GROWTH = 0.1
"""Added work counts where it needs at least this share of the time that did not grow."""
EFFECT = 0.05
"""Relative effect of a setting that shows it was applied."""
SLICE = 20
"""Fewest pairs in a slice that its median effect is read from."""
CURVE = 4
"""Fewest points of a curve that has a shape."""
REVERSAL = 0.05
"""A step back along an axis that is larger than this is worth a note."""
OUTLIER = 0.25
"""Relative distance of one number from others that agree within OUTLIER_PEERS."""
OUTLIER_PEERS = 0.1


@dataclass(frozen=True, slots=True)
class Run:
    """Equal numbers in a row in two series."""

    first: Sequence[Observation]
    second: Sequence[Observation]


def copied(dataset: Dataset) -> Iterator[Finding]:
    """The same numbers in the same order in two places, for configurations that differ."""
    for group in grouped(dataset.observations, lambda seen: seen.metric):
        series = grouped(group, lambda seen: (seen.table, seen.column))
        for run in _runs(series):
            length = len(run.first)
            chance = _tie_chance(group, run)
            places = _alignments([len(entries) for entries in series], length)
            expected = places * chance**length
            if expected < COPY_CHANCE:
                values = ", ".join(seen.shown for seen in run.first)
                yield Finding(
                    "copied",
                    "warning",
                    f"{length} numbers in a row ({values}) stand in two places: from {run.first[0].label} to "
                    f"{run.first[-1].label}, and from {run.second[0].label} to {run.second[-1].label}; by chance one "
                    f"expects {places} places × {chance:.2g}^{length} = {expected:.1g} such runs",
                    "one of the two was not measured: ask for the log, or measure again",
                    about=tuple(seen.label for seen in (*run.first, *run.second)),
                )


def one_configuration(dataset: Dataset) -> Iterator[Finding]:
    """Rows whose labels differ and that ran the same settings, or read the same."""
    tables = dataset.declared.table if dataset.declared else []
    for i, table in enumerate(tables):
        rows = grouped((s for s in dataset.observations if s.table == i), lambda seen: seen.index)
        labelled = [row for row in rows if isinstance(row[0].row[table.axes[0]], str)]
        near = sum(_near(a, b) for a, b in itertools.combinations(labelled, 2))
        for a, b in itertools.combinations(labelled, 2):
            names = [str(row[0].row[table.axes[0]]) for row in (a, b)]
            settings = [table.effective.get(name) for name in names]
            equal = [seen.value for seen in a] == [seen.value for seen in b]
            read = f"both read {', '.join(seen.shown for seen in a)}" if equal else "they read differently"
            if settings[0] is not None and settings[0] == settings[1]:
                yield Finding(
                    "one_configuration",
                    "warning",
                    f"{table.name}: {names[0]!r} and {names[1]!r} are one configuration "
                    f"({coordinates(settings[0].items())}), and {read}",
                    "the labels promise a comparison that was not made; log the settings that ran",
                    about=tuple(seen.label for seen in (*a, *b)),
                )
            elif equal and None in settings:
                chance = [min(1.0, seen.quantum / (2 * ALIKE * seen.value)) for seen in a]
                expected = near * _product(chance)
                if 0 < expected < TIE_CHANCE:
                    yield Finding(
                        "one_configuration",
                        "note",
                        f"{table.name}: {names[0]!r} and {names[1]!r} {read}; by chance one expects "
                        f"{near} alike pairs × {_product(chance):.2g} = {expected:.1g} such pairs",
                        "check that the two labels are two configurations",
                    )


def sensitivity(dataset: Dataset) -> Iterator[Finding]:
    """A time that stays while the work behind it grows: something of the input is not used."""
    for column in dataset.series():
        if not all(seen.work for seen in column):
            continue
        for axis in _numeric_axes(column):
            pairs = [pair for curve in _curves(column, axis) if (pair := _grown(curve, dataset))]
            flat = [pair for pair in pairs if _is_flat(*pair)]
            if len(pairs) >= 2 and len(flat) == len(pairs):
                yield _ignored(dataset, axis, flat)


def _ignored(dataset: Dataset, axis: str, flat: Sequence[tuple[Observation, Observation]]) -> Finding:
    low, high = max(flat, key=lambda pair: _added(pair, dataset) / pair[0].value)
    others = coordinates(without(high.row, axis))
    work = f"{say(_flops(low), 'FLOP')} to {say(_flops(high), 'FLOP')}"
    known = dataset.device is not None
    added = f", {say(_added((low, high), dataset), 's')} more at peak" if known else ""
    return Finding(
        "sensitivity",
        "refuted" if known and dataset.certain else "warning",
        f"{_series_name(dataset, low)}: the time does not depend on {axis}: at {others} it is {low.shown} for "
        f"{axis}={low.row[axis]} and {high.shown} for {axis}={high.row[axis]}, while the work grows from {work}{added}"
        f"; so in all {len(flat)} groups where the work grows enough to be seen",
        f"part of the input is ignored: assert that the output changes with {axis}, then measure again",
    )


def effect(dataset: Dataset) -> Iterator[Finding]:
    """A setting that changes times in some slices and none in others was not applied there; or it changes nothing."""
    for factor in _factors(dataset):
        levels = dict.fromkeys(seen.at[factor] for seen in dataset.observations if factor in seen.at)
        if len(levels) != 2:
            continue
        pairs = _pairs(dataset, factor, list(levels))
        families: dict[tuple[object, ...], list[tuple[Observation, Observation]]] = {}
        for pair in pairs:
            families.setdefault((pair[0].metric, *_labels(pair[0], factor)), []).append(pair)
        for family in families.values():
            yield from _no_effect(family, factor)
            for axis in _numeric_axes([a for a, _ in family]):
                yield from _partial_effect(family, factor, axis)


def _no_effect(family: Sequence[tuple[Observation, Observation]], factor: str) -> Iterator[Finding]:
    largest = max(abs(a.value / b.value - 1) for a, b in family)
    if len(family) > COPY_LENGTH and 0 < largest <= FLAT:
        a, b = family[0]
        yield Finding(
            "effect",
            "note",
            f"{_place(a, factor)}: {factor} {a.at[factor]} and {b.at[factor]} differ by at most {largest:.1%} at all "
            f"{len(family)} points",
            f"either {factor} makes no difference under this load, or it was not applied",
        )


def _partial_effect(family: Sequence[tuple[Observation, Observation]], factor: str, axis: str) -> Iterator[Finding]:
    slices: dict[AxisValue, list[float]] = {}
    for a, b in family:
        slices.setdefault(a.at[axis], []).append(a.value / b.value)
    slices = {value: ratios for value, ratios in slices.items() if len(ratios) >= SLICE}
    effects = {value: statistics.median(ratios) for value, ratios in slices.items()}
    none = [value for value, median in effects.items() if abs(median - 1) <= FLAT]
    clear = [value for value, median in effects.items() if abs(median - 1) >= EFFECT]
    if none and len(clear) * 2 >= len(effects):
        a, b = family[0]
        yield Finding(
            "effect",
            "note",
            f"{_place(a, factor)}: {factor} {a.at[factor]} and {b.at[factor]} do not differ in the median at {axis} "
            f"{', '.join(map(str, none))}, and do elsewhere; median ratio of their times by {axis}: "
            + ", ".join(f"{value}: {median:.3f}" for value, median in effects.items()),
            f"the setting may not have been applied there: log which {factor} ran",
        )


def shape(dataset: Dataset) -> Iterator[Finding]:
    """Curves that turn back, and single numbers far from those beside them."""
    for table in grouped(dataset.observations, lambda seen: seen.table):
        for axis in _numeric_axes(table):
            curves = [curve for curve in _curves(table, axis) if len(curve) >= CURVE]
            outliers = [found for curve in curves for found in _outliers(curve)]
            turns = [turn for curve in curves if not _outliers(curve) and (turn := _turn(curve))]
            name = dataset.table_name(table[0].table)
            if turns:
                a, b = max(turns, key=lambda turn: abs(turn[1].value / turn[0].value - 1))
                yield Finding(
                    "shape",
                    "note",
                    f"{name}: {len(turns)} of {len(curves)} curves along {axis} turn back; the largest step: {a.shown} "
                    f"at {a.label}, {b.shown} at {axis}={b.row[axis]} ({b.value / a.value:.2f}×)",
                    "a change of algorithm, or an outlier: measure the neighbourhood",
                )
            if outliers:
                worst, others = max(outliers, key=lambda found: abs(found[0].value / found[1] - 1))
                yield Finding(
                    "shape",
                    "note",
                    f"{name}: {len(outliers)} of {sum(map(len, curves))} numbers stand apart from others that agree; "
                    f"the farthest: {worst.label}: {worst.shown}, the median beside it {say(others, 's')}",
                    "a first iteration or a disturbance: keep it out of a mean, and say so",
                )


def _runs(series: Sequence[Sequence[Observation]]) -> Iterator[Run]:
    """Every longest run of at least COPY_LENGTH equal numbers in two series, at configurations that all differ."""
    starts: dict[tuple[float, ...], list[tuple[int, int]]] = {}
    for i, entries in enumerate(series):
        for j in range(len(entries) - COPY_LENGTH + 1):
            starts.setdefault(tuple(seen.value for seen in entries[j : j + COPY_LENGTH]), []).append((i, j))
    done: set[tuple[int, int, int, int]] = set()
    for values, places in starts.items():
        if len(set(values)) < COPY_LENGTH:
            continue
        for (i, j), (k, m) in itertools.combinations(places, 2):
            if i == k or (i, j, k, m) in done:
                continue
            length = 0
            while (
                j + length < len(series[i])
                and m + length < len(series[k])
                and series[i][j + length].value == series[k][m + length].value
                and series[i][j + length].at != series[k][m + length].at
            ):
                done.add((i, j + length, k, m + length))
                length += 1
            if length >= COPY_LENGTH:
                yield Run(series[i][j : j + length], series[k][m : m + length])


def _tie_chance(group: Sequence[Observation], run: Run) -> float:
    """Chance that two alike numbers are equal: by their digits, or as often as it happens outside the run."""
    aligned = all(a.row == b.row for a, b in zip(run.first, run.second, strict=True))
    alike = SAME if aligned else ALIKE
    by_digits = max(seen.quantum / (2 * alike * seen.value) for seen in run.first)
    near, ties = _aligned_ties(group) if aligned else _near_ties(group)
    length = len(run.first)
    outside = max(0, near - length)
    # a rate over a handful of pairs is none
    rate = (max(0, ties - length) + 0.5) / (outside + 1) if outside >= PAIRS else 0.0
    return min(1.0, max(by_digits, rate, 0.5 / (near + 1)))


def _near_ties(group: Sequence[Observation]) -> tuple[int, int]:
    """How many pairs of numbers are alike, and how many of them are equal."""
    distinct = {frozenset(seen.at.items()): seen for seen in group}.values()
    values = sorted(seen.value for seen in distinct)
    near = sum(bisect_right(values, value * (1 + ALIKE)) - i - 1 for i, value in enumerate(values))
    return near, sum(count * (count - 1) // 2 for count in Counter(values).values())


def _aligned_ties(group: Sequence[Observation]) -> tuple[int, int]:
    """The same for pairs at equal coordinates of their rows, which name what two series have in common."""
    near = ties = 0
    for entries in grouped(group, lambda seen: frozenset(seen.row.items())):
        one, equal = _near_ties(entries)
        near, ties = near + one, ties + equal
    return near, ties


def _alignments(lengths: Sequence[int], length: int) -> int:
    """In how many places a run of a length could stand in two series."""
    starts = [max(0, entries - length + 1) for entries in lengths]
    return (sum(starts) ** 2 - sum(start**2 for start in starts)) // 2


def _near(a: Sequence[Observation], b: Sequence[Observation]) -> bool:
    return len(a) == len(b) and all(
        max(x.value, y.value) <= (1 + ALIKE) * min(x.value, y.value) for x, y in zip(a, b, strict=True)
    )


def _product(numbers: Sequence[float]) -> float:
    product = 1.0
    for number in numbers:
        product *= number
    return product


def _numeric_axes(seen: Sequence[Observation]) -> list[str]:
    """The axes of rows that take several integers."""
    names = dict.fromkeys(name for entry in seen for name in entry.row)
    values = {name: {entry.row.get(name) for entry in seen} for name in names}
    return [name for name, found in values.items() if len(found) > 1 and all(isinstance(v, int) for v in found)]


def _series_name(dataset: Dataset, seen: Observation) -> str:
    """The table, and what its column adds."""
    columns = {other.column for other in dataset.observations if other.table == seen.table}
    own = [(name, value) for name, value in seen.at.items() if name == "provider" and len(columns) > 1]
    return ", ".join([dataset.table_name(seen.table), *([coordinates(own)] if own else [])])


def _curves(seen: Sequence[Observation], axis: str) -> list[list[Observation]]:
    """The numbers of a table along an axis, one curve for each column and each choice of the other axes."""
    groups = grouped(seen, lambda entry: (entry.column, without(entry.row, axis)))
    # the axis is numeric, see _numeric_axes
    return [sorted(group, key=lambda entry: int(entry.row[axis])) for group in groups]


def _grown(curve: Sequence[Observation], dataset: Dataset) -> tuple[Observation, Observation] | None:
    """The ends of a curve, where the work that one has more should show in the time."""
    low, high = curve[0], curve[-1]
    if low is high:
        return None
    if dataset.device is None or dataset.device.memory_bandwidth_bytes_per_s is None:
        return (low, high) if _flops(high) > (1 + 2 * GROWTH) * _flops(low) else None
    return (low, high) if _added((low, high), dataset) >= GROWTH * low.value else None


def _added(pair: tuple[Observation, Observation], dataset: Dataset) -> float:
    """The least time that the added work takes at the peaks of the card; without a card, relative to the time."""
    low, high = pair
    if dataset.device is None:
        return low.value * (_flops(high) / _flops(low) - 1) if _flops(low) else 0.0
    return floor_s(high, dataset.device, 0.0) - floor_s(low, dataset.device, 0.0)


def _is_flat(low: Observation, high: Observation) -> bool:
    tolerance = low.tolerance + high.tolerance + FLAT
    return abs(high.value / low.value - 1) <= tolerance


def _flops(seen: Observation) -> float:
    return sum(phase.times * phase.flops for phase in seen.work)


def _factors(dataset: Dataset) -> list[str]:
    """The coordinates whose values are words."""
    found = dict.fromkeys(
        name for seen in dataset.observations for name, value in seen.at.items() if isinstance(value, str)
    )
    return list(found)


def _labels(seen: Observation, factor: str) -> tuple[tuple[str, AxisValue], ...]:
    """The coordinates in words, without a factor."""
    return tuple((name, value) for name, value in seen.at.items() if isinstance(value, str) and name != factor)


def _place(seen: Observation, factor: str) -> str:
    return coordinates(_labels(seen, factor)) or seen.metric


def _pairs(dataset: Dataset, factor: str, levels: Sequence[AxisValue]) -> list[tuple[Observation, Observation]]:
    """Numbers that differ in one factor only, its two levels in order."""
    known: dict[tuple[str, frozenset[tuple[str, AxisValue]]], Observation] = {}
    for seen in dataset.observations:
        # a point may stand in two tables: the first one is as good as the second
        known.setdefault((seen.metric, frozenset(seen.at.items())), seen)
    found = []
    for seen in dataset.observations:
        if seen.at.get(factor) == levels[0]:
            other = known.get((seen.metric, frozenset({**seen.at, factor: levels[1]}.items())))
            if other:
                found.append((seen, other))
    return found


def _turn(curve: Sequence[Observation]) -> tuple[Observation, Observation] | None:
    """The largest step against the direction of a curve, where it has one."""
    rise = curve[-1].value - curve[0].value
    steps = [
        (a, b)
        for a, b in itertools.pairwise(curve)
        if (b.value - a.value) * rise < 0 and abs(b.value / a.value - 1) > REVERSAL + a.tolerance + b.tolerance
    ]
    return max(steps, key=lambda step: abs(step[1].value / step[0].value - 1), default=None)


def _outliers(curve: Sequence[Observation]) -> list[tuple[Observation, float]]:
    """Numbers far from the median of a curve whose other numbers all agree with it; with that median."""
    middle = statistics.median(seen.value for seen in curve)
    apart = [seen for seen in curve if abs(seen.value / middle - 1) > OUTLIER]
    agree = [seen for seen in curve if abs(seen.value / middle - 1) <= OUTLIER_PEERS]
    return [(seen, middle) for seen in apart] if len(apart) == 1 and len(agree) == len(curve) - 1 else []
