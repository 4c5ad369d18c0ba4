"""Integrity checks of inference with a KV cache: times follow what is cached, and what is cached is attended to.

Owns what follows from the definition of a cache. The published benchmark of document 003 did not attend to cached
tokens, and its times did not depend on how many there were: either check would have shown it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from smbench.arch import Device
from smbench.cell import AxisValue
from smbench.findings import Evidence, Finding, clocks_hz, timed, work_of
from smbench.result import Result, Work
from smbench.stats import Summary

BLOCK = "hstu_block"
SUBJECTS = (BLOCK, "hstu_request")
VISIBLE = 0.05
"""Growth of a time, relative to it, above which added work is said to show."""
SHARE = 0.5
"""Of the growth that less work shows, what more work must show at least."""
EQUAL = 0.01
"""Relative distance within which nothing is said to have grown."""
STEADY = 0.5
"""Spread, (p90 − p10) / median, above which a time proves nothing, neither that it grows nor that it stays."""


@dataclass(frozen=True, slots=True)
class _Timed:
    """One time of the block."""

    result: Result
    total: int
    new: int
    summary: Summary
    needs: float
    """Least seconds at the peaks of the card, or operations where the card is unknown."""
    flops: int

    @property
    def said(self) -> str:
        """The point with its work and its time."""
        return f"{self.new} new of {self.total} tokens ({self.flops / 1e9:.4g} GFLOP) take {_ms(self.summary.median)}"


def sensitivity(evidence: Evidence) -> Iterator[Finding]:
    """With equally many new tokens the time grows with the cached ones, where so much work shows in it at all.

    Whether it shows is taken from the data: of a provider's points there must be one with no more work that takes
    clearly longer. A time that launches hold up, which nothing makes longer, is no fault; an unsteady time proves
    nothing, nor does one that launches may have held up, since a host is slower at some times than at others.
    """
    for group in _groups(evidence):
        held_s = _held_up(group, _whole(group))
        for flat in group:
            base = min((p for p in group if p.new == flat.new), key=lambda point: point.total)
            if base is flat:
                continue
            grown = flat.summary.p90 - base.summary.p10
            witness = _witness(group, base, flat, held_s)
            if witness and _is_flat(base, flat) and grown < SHARE * _rise(base, witness):
                yield Finding(
                    "sensitivity",
                    "refuted",
                    f"{flat.result.cell.label()}: the time does not grow with the cached tokens: {base.said}, "
                    f"{flat.said}, and {witness.said}, which is no more work",
                    "cached tokens are not attended to: check that the keys of a query are the cached and the new ones",
                    flat.result.cell_id,
                )
        yield from _unused(evidence, group)


def kv_accounting(evidence: Evidence) -> Iterator[Finding]:
    """Tokens attended to are those found cached and the new ones, and what should be cached was found."""
    silent: dict[str, int] = {}
    for result in evidence.results:
        if result.cell.subject not in SUBJECTS or result.status not in ("ok", "verified"):
            continue
        if not result.counts:
            silent[result.cell.provider] = silent.get(result.cell.provider, 0) + 1
        elif fault := _miscounted(result, evidence.recipe.baseline):
            yield Finding(
                "kv_accounting",
                "refuted",
                f"{result.cell.label()}: {fault}",
                "the provider did other work than its name says: look at its pages and at what it hands to kernels",
                result.cell_id,
            )
    for provider, cells in silent.items():
        yield Finding(
            "kv_accounting",
            "warning",
            f"{provider}: {cells} cells say nothing of the tokens that they attended to",
            "give `Prepared.counts`, so that a cache that is not used shows",
        )


def _groups(evidence: Evidence) -> Iterator[Sequence[_Timed]]:
    """The times of the block by provider, way of timing and all axes but the two lengths; cached on the device."""
    found: dict[tuple[object, ...], list[_Timed]] = {}
    for result, measurement, summary in timed(evidence):
        axes, work = result.cell.axes, work_of(result, measurement)
        if result.cell.subject != BLOCK or axes.get("source") != "device" or work is None or summary.spread > STEADY:
            continue
        others = tuple(sorted((name, value) for name, value in axes.items() if name not in ("total", "new")))
        point = _Timed(
            result,
            _integer(axes, "total"),
            _integer(axes, "new"),
            summary,
            _least(work, evidence.device, result),
            work.flops,
        )
        found.setdefault((result.cell.provider, measurement.name, others), []).append(point)
    yield from found.values()


def _least(work: Work, device: Device | None, result: Result) -> float:
    """Of the bytes and the operations, whichever takes longer at the peaks of the card."""
    peak = None
    if device is not None:
        clock_hz = max(clocks_hz(result), default=None)
        peak = device.tensor_peak_flops_per_s(str(result.cell.axes.get("dtype")), clock_hz)
    if device is None or peak is None or device.memory_bandwidth_bytes_per_s is None:
        return float(work.flops)
    return max(work.flops / peak, work.bytes / device.memory_bandwidth_bytes_per_s)


def _rise(low: _Timed, high: _Timed) -> float:
    """Seconds that nine of ten samples of one take longer than nine of ten of another."""
    return high.summary.p10 - low.summary.p90


def _is_flat(low: _Timed, high: _Timed) -> bool:
    """Whether one is not clearly longer. Less work may take longer where it is of another kind; that is no fault."""
    return high.summary.p10 <= (1 + EQUAL) * low.summary.p90


def _whole(group: Sequence[_Timed]) -> Sequence[_Timed]:
    """The points with nothing cached."""
    return [point for point in group if point.new == point.total]


def _held_up(points: Sequence[_Timed], whole: Sequence[_Timed]) -> float:
    """The longest time of `points` that their work does not explain, 0 where there is none.

    Points of `whole` have nothing cached and one kind of work. Where so much of it is done in clearly less time than as
    much or less takes elsewhere, something else held that up: launches, mostly.
    """
    held = [
        point.summary.p90
        for point in points
        if any(other.needs >= point.needs and _rise(other, point) >= VISIBLE * other.summary.median for other in whole)
    ]
    return max(held, default=0.0)


def _witness(group: Sequence[_Timed], base: _Timed, flat: _Timed, held_s: float) -> _Timed | None:
    """The point with no more work than `flat` that takes longest, if clearly longer than `base` for its work."""
    shown = [
        point
        for point in group
        if point.needs <= flat.needs
        and point.summary.p10 > held_s
        and _rise(base, point) >= VISIBLE * base.summary.median
    ]
    return max(shown, key=lambda point: _rise(base, point), default=None)


def _unused(evidence: Evidence, group: Sequence[_Timed]) -> Iterator[Finding]:
    """Providers with a cache that are as slow with it as without it, though less work is visibly faster."""
    provider = group[0].result.cell.provider
    if provider == evidence.recipe.baseline:
        return
    nothing_cached = _whole(group)
    # its other times are what is in question
    held_s = _held_up(nothing_cached, nothing_cached)
    for whole in nothing_cached:
        for part in group:
            if whole.summary.p10 <= held_s or part.total != whole.total or part.new == part.total:
                continue
            saved = whole.summary.p90 - part.summary.p10
            quick = [
                point
                for point in group
                if point.needs >= part.needs and _rise(point, whole) >= VISIBLE * whole.summary.median
            ]
            if any(point.new < point.total == part.total for point in quick):
                # the cache does gain there: what holds this point up is something else
                continue
            witness = max(quick, key=lambda point: _rise(point, whole), default=None)
            if witness and _is_flat(part, whole) and saved < SHARE * _rise(witness, whole):
                yield Finding(
                    "sensitivity",
                    "warning",
                    f"{provider} gains nothing from its cache: {whole.said}, {part.said}, and {witness.said}, which is "
                    "no less work",
                    "look whether cached tokens are computed again",
                )


def _miscounted(result: Result, baseline: str) -> str | None:
    """What of a cell's counts contradicts its point; None where all fits."""
    counts, axes = result.counts, result.cell.axes
    steps = counts.get("steps", 0)
    each = steps * _integer(axes, "batch")
    history, cached = each * _integer(axes, "total"), each * (_integer(axes, "total") - _integer(axes, "new"))
    source = None if result.cell.provider == baseline else axes.get("source")
    here, there, new = (counts.get(name, 0) for name in ("device_tokens", "host_tokens", "new_tokens"))
    attended = counts.get("attended_tokens", 0)
    point = f"{steps} steps × {axes['batch']} users × {axes['total']} tokens = {history}"
    if attended != history:
        return f"{attended} tokens were attended to, and {point}"
    if here + there + new != history:
        return f"{here} tokens found on the device + {there} on the host + {new} new ones are not {point}"
    wanted = {"device_tokens": cached if source == "device" else 0, "host_tokens": cached if source == "host" else 0}
    for name, expected in wanted.items():
        if counts.get(name, 0) != expected:
            place = name.removesuffix("_tokens")
            return f"{counts.get(name, 0)} tokens were found on the {place}, and {expected} are cached there"
    return None


def _integer(axes: Mapping[str, AxisValue], name: str) -> int:
    value = axes[name]
    return value if isinstance(value, int) else 0


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g} ms"
