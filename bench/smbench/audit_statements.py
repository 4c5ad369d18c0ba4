"""Audit rules from what a document states beside its numbers: definitions, expectations, settings, gaps, confounders.

Owns these rules. What is stated is data of the published file; nothing here knows a document.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from smbench.audit_bounds import device_numbers
from smbench.expression import evaluate, names
from smbench.guards import Finding
from smbench.metrics import METRICS
from smbench.observations import Dataset, Observation, coordinates, grouped, say
from smbench.published import UNSTATED, Published
from smbench.published_facts import Expectation, Quantity, matches, numbers_at

CONFOUNDED = 1.25
"""A quantity that changes by less than this factor along an axis is called constant."""
DISAGREE = 0.1
"""A point that is published twice with a larger relative difference earns a warning."""


def conventions(dataset: Dataset) -> Iterator[Finding]:
    """Derived figures are recomputed by every known reading of their name: which one did the document use?"""
    if dataset.declared is None:
        return
    tried: dict[tuple[str, str | None], list[Mapping[str, tuple[float, float]]]] = {}
    for row in grouped(dataset.observations, lambda seen: (seen.table, seen.index)):
        numbers = _row_numbers(dataset.declared, row)
        tolerances = {seen.metric: seen.tolerance for seen in row}
        for seen in row:
            column = dataset.declared.table[seen.table].columns[seen.column]
            results = _readings(seen, numbers, tolerances)
            if results:
                tried.setdefault((seen.metric, column.definition), []).append(results)
    for (metric, stated), rows in tried.items():
        yield from _convention(metric, stated, rows)


def _row_numbers(declared: Published, row: Sequence[Observation]) -> Mapping[str, float]:
    """What a definition may use: facts, coordinates, and the metrics that stand once in the row."""
    metrics = [seen.metric for seen in row]
    once = {seen.metric: seen.value for seen in row if metrics.count(seen.metric) == 1}
    return {**numbers_at(declared.numbers, row[0].at), **once}


def _readings(
    seen: Observation, numbers: Mapping[str, float], tolerances: Mapping[str, float]
) -> dict[str, tuple[float, float]]:
    """By definition: recomputed over published value, and the relative distance that rounding explains."""
    found = {}
    for name, formula in METRICS[seen.metric].definitions.items():
        if names(formula) <= numbers.keys():
            allowed = 1e-9 + sum(tolerances.get(used, 0.0) for used in {*names(formula), seen.metric})
            found[name] = (evaluate(formula, numbers) / seen.value, allowed)
    return found


def _convention(
    metric: str, stated: str | None, rows: Sequence[Mapping[str, tuple[float, float]]]
) -> Iterator[Finding]:
    definitions = METRICS[metric].definitions
    right = [name for name in definitions if all(name in row and abs(row[name][0] - 1) <= row[name][1] for row in rows)]
    if stated in right:
        return
    ratios = "; ".join(
        f"{name} ({definitions[name]}) gives {min(found):.4g} to {max(found):.4g} times the published figure"
        for name in definitions
        if (found := [row[name][0] for row in rows if name in row])
    )
    if right:
        said = f"the document says {stated}" if stated else "the document does not say what it counts"
        yield Finding(
            "conventions",
            "refuted" if stated else "warning",
            f"{metric}: all {len(rows)} figures are {' or '.join(right)} = {definitions[right[0]]}; {said}; {ratios}",
            "compare with figures of the same definition only",
        )
    else:
        yield Finding(
            "conventions",
            "warning",
            f"{metric}: no known definition reproduces all {len(rows)} figures: {ratios}",
            "ask for the formula; compare with nothing",
        )


def expectations(dataset: Dataset) -> Iterator[Finding]:
    """Ratios that the document claims, or that follow from what it says it measures, recomputed from its numbers."""
    for expected in dataset.declared.expectation if dataset.declared else ():
        pairs = _ratio_pairs(dataset, expected)
        for group in _by_table(pairs):
            failed = [(a, b) for a, b in group if not _holds(a, b, expected)]
            if not failed:
                continue
            worst = max(failed, key=lambda pair: _distance(pair[0].value / pair[1].value, expected))
            a, b = worst
            every = len(failed) == len(group)
            high = "" if expected.high is None else f" to {expected.high:g}"
            yield Finding(
                "expectations",
                "refuted" if expected.stated and every else "warning" if expected.stated or every else "note",
                f"{'claim' if expected.stated else 'expectation'}: {expected.text} (ratio {expected.low:g}{high}"
                f"{' or more' if expected.high is None else ''}): fails at {len(failed)} of {len(group)} points of "
                f"{dataset.table_name(a.table)}; the farthest: {a.label} / {b.label} = {a.shown} / {b.shown} = "
                f"{a.value / b.value:.3g}",
                "the sentence does not follow from the numbers; state where it holds",
            )


def agreement(dataset: Dataset) -> Iterator[Finding]:
    """A point that is published twice should read the same; where it does not, that is the spread at least."""
    groups = grouped(dataset.observations, lambda seen: (seen.metric, frozenset(seen.at.items())))
    differing: dict[tuple[int, int], list[tuple[float, Observation, Observation]]] = {}
    for first, *others in groups:
        for other in others:
            distance = abs(other.value / first.value - 1)
            if distance > first.tolerance + other.tolerance:
                differing.setdefault((first.table, other.table), []).append((distance, first, other))
    for (i, j), found in differing.items():
        distance, a, b = max(found, key=lambda entry: entry[0])
        yield Finding(
            "agreement",
            "warning" if distance > DISAGREE else "note",
            f"{len(found)} points stand in {dataset.table_name(i)} and in {dataset.table_name(j)} and differ by "
            f"{min(found, key=lambda entry: entry[0])[0]:.1%} to {distance:.1%}; the most: {a.label}: {a.shown} and "
            f"{b.shown}",
            "differences below this are within the spread of these measurements",
        )


def confounded(dataset: Dataset) -> Iterator[Finding]:
    """Something else changes along the axis that a table studies, so a trend along it has two causes."""
    if dataset.declared is None:
        return
    figures = device_numbers(dataset.device)
    for quantity in dataset.declared.quantity:
        curves = _curves(dataset, dataset.declared, quantity)
        moving = {key: curve for key, curve in curves.items() if _factor(curve) >= CONFOUNDED}
        if not moving:
            continue
        limit = figures.get(quantity.limit or "")
        said = [
            f"{say(_first(curve), quantity.unit)} to {say(_last(curve), quantity.unit)} at {key or 'every point'}"
            + _crossing(curve, quantity, limit)
            for key, curve in moving.items()
        ]
        values = sorted({value for curve in moving.values() for value in curve})
        yield Finding(
            "confounded",
            "warning",
            f"along {quantity.along} ({values[0]} to {values[-1]}) not only {quantity.along} changes, but also "
            f"{quantity.name}: {'; '.join(said)}",
            f"hold it constant, or vary it alone: times along {quantity.along} have more than one cause",
        )


def missing(dataset: Dataset) -> Iterator[Finding]:
    """Cells that should have a number and have none."""
    for gap in dataset.gaps:
        yield Finding(
            "missing",
            "warning",
            f"{gap.where}: {gap.count} of {gap.of} cells have no number: {gap.reason}",
            "no conclusion covers these points",
        )


def unstated(dataset: Dataset) -> Iterator[Finding]:
    """What the document leaves open, and what was inferred in its place."""
    declared = dataset.declared
    if declared is None:
        return
    entries = {"device": declared.device, **declared.versions, **declared.protocol}
    silent = [name for name, value in entries.items() if value == UNSTATED]
    if declared.device_basis == "inferred":
        silent.insert(0, "device")
    if not silent:
        return
    inferred: dict[str, object] = {**declared.inferred}
    if declared.device_basis == "inferred":
        inferred["device"] = declared.device
    said = [f"{name} (inferred: {inferred[name]})" if name in inferred else name for name in silent]
    yield Finding(
        "unstated",
        "note",
        f"the document does not state: {', '.join(said)}",
        "without these the numbers cannot be repeated exactly",
    )


def settings(dataset: Dataset) -> Iterator[Finding]:
    """Settings that the document states and its code has otherwise."""
    for table in dataset.declared.settings if dataset.declared else ():
        for item, value in table.rows:
            if item in table.found and table.found[item] != value:
                yield Finding(
                    "settings",
                    "warning",
                    f"{table.section}: {item} is stated as {value}, and {table.found[item]} in the source's code",
                    "take the code's value when repeating it",
                )


def tuned(dataset: Dataset) -> Iterator[Finding]:
    """Launch parameters that were searched for one problem and measured on another."""
    for entry in dataset.declared.tuned if dataset.declared else ():
        chosen = [seen for seen in dataset.observations if matches(dict(entry.where), seen.at)]
        other = [seen for seen in chosen if any(seen.at.get(name) != value for name, value in entry.at.items())]
        if other:
            measured = {name: other[0].at.get(name, "unknown") for name in entry.at}
            yield Finding(
                "tuned",
                "warning",
                f"{len(other)} of {len(chosen)} numbers of {coordinates(entry.where.items())} use parameters searched "
                f"at {coordinates(entry.at.items())}, and were measured at {coordinates(measured.items())}",
                "tune the very points that are measured",
            )


def _ratio_pairs(dataset: Dataset, expected: Expectation) -> list[tuple[Observation, Observation]]:
    chosen = [s for s in dataset.observations if s.metric == expected.metric and matches(expected.where, s.at)]
    below = {
        frozenset((name, value) for name, value in seen.at.items() if name not in expected.denominator): seen
        for seen in chosen
        if matches(dict(expected.denominator), seen.at)
    }
    pairs = []
    for seen in chosen:
        if matches(dict(expected.numerator), seen.at):
            key = frozenset((name, value) for name, value in seen.at.items() if name not in expected.numerator)
            if key in below:
                pairs.append((seen, below[key]))
    return pairs


def _by_table(
    pairs: Sequence[tuple[Observation, Observation]],
) -> list[list[tuple[Observation, Observation]]]:
    found: dict[int, list[tuple[Observation, Observation]]] = {}
    for pair in pairs:
        found.setdefault(pair[0].table, []).append(pair)
    return list(found.values())


def _holds(a: Observation, b: Observation, expected: Expectation) -> bool:
    ratio, allowed = a.value / b.value, a.tolerance + b.tolerance
    below = expected.high is None or ratio <= expected.high * (1 + allowed)
    return below and ratio >= expected.low * (1 - allowed)


def _distance(ratio: float, expected: Expectation) -> float:
    return max(expected.low / ratio, ratio / expected.high if expected.high else 0.0)


def _curves(dataset: Dataset, declared: Published, quantity: Quantity) -> dict[str, dict[int, float]]:
    """The quantity along the studied axis, by the other numbers that it depends on."""
    curves: dict[str, dict[int, float]] = {}
    used = names(quantity.formula) - {quantity.along}
    for seen in dataset.observations:
        at = seen.at.get(quantity.along)
        if not isinstance(at, int) or not matches(quantity.where, seen.at):
            continue
        key = coordinates((name, value) for name, value in seen.at.items() if name in used)
        value = evaluate(quantity.formula, numbers_at(declared.numbers, seen.at))
        curves.setdefault(key, {})[at] = value
    return curves


def _factor(curve: Mapping[int, float]) -> float:
    low, high = min(curve.values()), max(curve.values())
    return high / low if low > 0 else float("inf") if high > 0 else 1.0


def _first(curve: Mapping[int, float]) -> float:
    return curve[min(curve)]


def _last(curve: Mapping[int, float]) -> float:
    return curve[max(curve)]


def _crossing(curve: Mapping[int, float], quantity: Quantity, limit: float | None) -> str:
    if limit is None:
        return ""
    name = (quantity.limit or "").removeprefix("device_").removesuffix("_bytes")
    above = [value for value, amount in sorted(curve.items()) if amount > limit]
    if not above:
        return f" (within the {say(limit, quantity.unit)} of {name})"
    if len(above) == len(curve):
        return f" (beyond the {say(limit, quantity.unit)} of {name})"
    return f" (beyond the {say(limit, quantity.unit)} of {name} at {', '.join(map(str, above))} only)"
