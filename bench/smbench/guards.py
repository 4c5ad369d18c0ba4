"""Integrity checks over results: pure functions from evidence to findings. Owns the limits and the remedies.

A guard never changes a result. A finding of severity `refuted` turns the cell's status to `invalid` in the analysis, so
that no table shows its number; a `warning` stands beside the number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smbench.arch import Device
from smbench.recipe import Recipe
from smbench.result import Environment, Measurement, Result, Session
from smbench.stats import Summary

ROOFLINE_SLACK = 1.05
"""A cell may beat the datasheet's bound by this factor before it is refuted: clocks differ between boards."""
SPREAD_LIMIT = 0.05
"""(p90 − p10) / median above which a median is called unsteady."""
CLOCK_DROP_LIMIT = 0.10
"""Relative drop of the SM clock within a run above which cells are called throttled."""
TIMER_LIMIT = 0.02
"""Relative error of a kernel of known length above which the timer is not trusted."""
BENIGN_REASONS = frozenset({"idle", "applications_clocks_setting"})
"""Clock-event reasons that do not slow a running kernel below its set clocks."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the guards look at."""

    recipe: Recipe
    device: Device | None
    """Physical peaks of the card, None where they are unknown."""
    results: Sequence[Result]
    summaries: Mapping[tuple[str, str], Summary]
    """By cell_id and measurement name."""
    environments: Sequence[Environment]
    sessions: Sequence[Session]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a reader of the numbers must know."""

    guard: str
    severity: Literal["refuted", "warning", "note"]
    message: str
    """What was found, with its arithmetic."""
    remedy: str
    cell_id: str | None = None
    """The cell it is about; None where it is about the whole run."""


def correctness(evidence: Evidence) -> Iterator[Finding]:
    """No number on a red gate: every wrong output is named."""
    for result in evidence.results:
        if result.status == "incorrect":
            yield Finding(
                "correctness",
                "refuted",
                f"{result.cell.label()}: {result.reason}",
                "its time is withheld; compare the provider with the reference at this point",
                result.cell_id,
            )


def roofline(evidence: Evidence) -> Iterator[Finding]:
    """Nothing is faster than its bytes or its arithmetic allow. From a warm cache only what exceeds it must move."""
    device = evidence.device
    if device is None or device.memory_bandwidth_bytes_per_s is None:
        if any(m.method != "wall" for result in evidence.results for m in result.measurements):
            yield Finding(
                "roofline",
                "note",
                "the peak rates of this device are unknown, so no time was held against a physical bound",
                "add a row with a source to docker/archs.toml",
            )
        return
    for result, measurement, summary in _timed(evidence):
        if result.work is None:
            continue
        resident = (device.l2_bytes or 0) if measurement.l2 == "warm" else 0
        moved = max(0, result.work.bytes - resident)
        memory_s = moved / device.memory_bandwidth_bytes_per_s
        # at the clock that ran: a datasheet states the peak at a lower one than cards reach
        clock_hz = max(_clocks(result), default=None)
        peak = device.tensor_peak_flops_per_s(str(result.cell.axes.get("dtype")), clock_hz)
        compute_s = result.work.flops / peak if peak else 0.0
        bound_s = max(memory_s, compute_s)
        if summary.median * ROOFLINE_SLACK < bound_s:
            what = (
                f"{moved / 1e6:.2f} MB / {device.memory_bandwidth_bytes_per_s / 1e9:.0f} GB/s"
                if memory_s >= compute_s
                else f"{result.work.flops / 1e9:.2f} GFLOP / {(peak or 0) / 1e12:.0f} TFLOP/s"
            )
            yield Finding(
                "roofline",
                "refuted",
                f"{result.cell.label()}, {measurement.name}: {summary.median * 1e6:.2f} µs is less than the bound "
                f"{bound_s * 1e6:.2f} µs = {what}",
                "impossible on this device: look for skipped work, a cached output or a wrong byte count",
                result.cell_id,
            )


def selection(evidence: Evidence) -> Iterator[Finding]:
    """The configuration that a provider's name promises is the one that ran."""
    for result in evidence.results:
        if result.selection is None or result.status not in ("ok", "verified"):
            continue
        promised = evidence.recipe.providers[result.cell.provider].selection
        if not result.selection.source.startswith(promised):
            yield Finding(
                "selection",
                "refuted",
                f"{result.cell.label()}: promised a {promised} configuration, ran {result.selection.source!r}",
                "run `make tune RECIPE=…` on this device, then measure again",
                result.cell_id,
            )
    nearest = Counter(
        result.cell.provider
        for result in evidence.results
        if result.selection and result.selection.source.startswith("tuned-nearest")
    )
    for provider, count in nearest.items():
        yield Finding(
            "selection",
            "warning",
            f"{provider}: {count} cells ran the configuration of the nearest tuned point, not one tuned for them",
            "tune the very points that are measured: `make tune RECIPE=…`",
        )


def clocks(evidence: Evidence) -> Iterator[Finding]:
    """Clocks stayed up, and nothing held them down."""
    highest = max((max(_clocks(result)) for result in evidence.results if _clocks(result)), default=0.0)
    slow = [r for r in evidence.results if _clocks(r) and min(_clocks(r)) < (1 - CLOCK_DROP_LIMIT) * highest]
    if slow:
        lowest = min(min(_clocks(result)) for result in slow)
        yield Finding(
            "clocks",
            "warning",
            f"{len(slow)} of {len(evidence.results)} cells saw an SM clock more than {CLOCK_DROP_LIMIT:.0%} under the "
            f"run's highest ({lowest / 1e6:.0f} against {highest / 1e6:.0f} MHz)",
            "let the card cool, check its power limit, measure again",
        )
    reasons = Counter(
        reason
        for result in evidence.results
        for reason in result.telemetry.get("throttle_reasons", ())
        if reason not in BENIGN_REASONS
    )
    for reason, count in reasons.items():
        yield Finding(
            "clocks",
            "warning",
            f"{count} cells ran while the clocks were held down by {reason}",
            "power and thermal limits belong to the card and its host: state them beside the numbers",
        )


def idle(evidence: Evidence) -> Iterator[Finding]:
    """Nobody else was on the card."""
    busy = [result for result in evidence.results if result.telemetry.get("other_processes")]
    if busy:
        yield Finding(
            "idle",
            "warning",
            f"{len(busy)} cells ran while other processes held the GPU",
            "stop them (`smbench doctor` lists how many) and measure again",
        )


def spread(evidence: Evidence) -> Iterator[Finding]:
    """Samples of one cell agree."""
    unsteady: dict[str, list[float]] = {}
    total: Counter[str] = Counter()
    for _, measurement, summary in _timed(evidence):
        total[measurement.name] += 1
        if summary.spread > SPREAD_LIMIT:
            unsteady.setdefault(measurement.name, []).append(summary.spread)
    for name, spreads in unsteady.items():
        yield Finding(
            "spread",
            "warning",
            f"{name}: {len(spreads)} of {total[name]} medians have (p90 − p10) / median above {SPREAD_LIMIT:.0%}, "
            f"the worst {max(spreads):.0%}",
            "read their intervals, not their medians; a quiet machine narrows them",
        )


def timer(evidence: Evidence) -> Iterator[Finding]:
    """A kernel of known length is timed at that length."""
    for session in evidence.sessions:
        for check in session.timer_checks:
            error = check["measured_s"] / check["expected_s"] - 1
            if abs(error) > TIMER_LIMIT:
                yield Finding(
                    "timer",
                    "warning",
                    f"{check['method']}: a kernel of {check['expected_s'] * 1e6:.1f} µs was timed at "
                    f"{check['measured_s'] * 1e6:.1f} µs ({error:+.1%})",
                    "times by this method are off by as much on this machine",
                )


def environment(evidence: Evidence) -> Iterator[Finding]:
    """All numbers of a run come from one machine and one set of software."""
    if len(evidence.environments) > 1:
        yield Finding(
            "environment",
            "warning",
            f"results of {len(evidence.environments)} different environments are in this run; they differ in "
            + "; ".join(_differences(evidence.environments)),
            "measure in one environment, in a fresh folder (`OUT=`), before comparing providers",
        )
    if any(entry.environment.get("source", {}).get("dirty") for entry in evidence.environments):
        yield Finding(
            "environment",
            "note",
            "the source checkout had uncommitted changes when this was measured",
            "commit first, so that others can get the same code",
        )


def sessions(evidence: Evidence) -> Iterator[Finding]:
    """Every result belongs to a session that ended, so that the wall clock is known."""
    recorded = sum(session.results for session in evidence.sessions)
    if recorded < len(evidence.results):
        yield Finding(
            "sessions",
            "note",
            f"{len(evidence.results) - recorded} of {len(evidence.results)} results were made by sessions that were "
            "killed before they could record their wall clock",
            "their numbers are whole; what the rental paid for is more than the report's time split says",
        )


GUARDS: Mapping[str, Callable[[Evidence], Iterator[Finding]]] = {
    "correctness": correctness,
    "roofline": roofline,
    "selection": selection,
    "clocks": clocks,
    "idle": idle,
    "spread": spread,
    "timer": timer,
    "environment": environment,
    "sessions": sessions,
}
"""Every guard by name, in the order that reports print."""


def examine(evidence: Evidence) -> list[Finding]:
    """The findings of all guards."""
    return [finding for guard in GUARDS.values() for finding in guard(evidence)]


def _timed(evidence: Evidence) -> Iterator[tuple[Result, Measurement, Summary]]:
    for result in evidence.results:
        for measurement in result.measurements:
            yield result, measurement, evidence.summaries[result.cell_id, measurement.name]


def _clocks(result: Result) -> Sequence[float]:
    clocks: Sequence[float] = result.telemetry.get("sm_clock_hz", ())
    return clocks


def _differences(environments: Sequence[Environment]) -> list[str]:
    """`key: a | b` for every leaf that is not the same in all environments."""
    leaves = [dict(leaves_of(entry.environment)) for entry in environments]
    keys = sorted({key for leaf in leaves for key in leaf})
    return [
        f"{key}: " + " | ".join(str(leaf.get(key, "absent")) for leaf in leaves)
        for key in keys
        if len({str(leaf.get(key)) for leaf in leaves}) > 1
    ]


def leaves_of(tree: object, path: str = "") -> Iterator[tuple[str, object]]:
    """Every value of a tree of mappings that is none itself, with the keys that lead to it, joined by dots."""
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from leaves_of(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, tree
