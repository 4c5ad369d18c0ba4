"""Audit rules from physics: what a device cannot do, what a cache must have helped with, what a load never reached.

Owns these rules and their limits. Numbers come as observations; figures of a card from docker/archs.toml.
"""

from __future__ import annotations

from collections.abc import Iterator

from smbench.arch import Device
from smbench.expression import evaluate, names
from smbench.guards import Finding
from smbench.observations import Dataset, Observation, grouped, say
from smbench.published_facts import DEVICE_NUMBERS, PhaseWork

SLACK = 1.1
"""A number may beat its bound by this factor: it comes without the clock that ran, which may exceed the datasheet's."""


def floor_s(seen: Observation, device: Device, resident_bytes: float) -> float:
    """The least time that the work of a number takes; from a warm cache, what fits it need not be moved."""
    return sum(phase.times * _phase_s(phase, seen, device, resident_bytes)[0] for phase in seen.work)


def physics(dataset: Dataset) -> Iterator[Finding]:
    """No number is faster than bytes over bandwidth and operations over peak allow, phase by phase."""
    device = dataset.device
    # a run has a guard of its own for this, which knows the clock of every cell
    worked = [seen for seen in dataset.observations if seen.work] if dataset.declared else []
    if not worked:
        return
    if device is None or device.memory_bandwidth_bytes_per_s is None:
        yield Finding(
            "physics",
            "note",
            f"the peak rates of {dataset.device_name} are unknown, so {len(worked)} numbers were held against no bound",
            "add a row with a source to docker/archs.toml",
        )
        return
    for seen in worked:
        bound = floor_s(seen, device, _resident(seen, device))
        if seen.value * (1 + seen.tolerance) * SLACK < bound:
            inferred = "" if dataset.certain else " (the device is inferred)"
            yield Finding(
                "physics",
                "refuted" if dataset.certain else "warning",
                f"{seen.label}: {seen.shown} is impossible on {device.name}{inferred}: at least {say(bound, 's')} = "
                f"{_arithmetic(seen, device)}; that is {bound / seen.value:.2f} times as fast as the card can be",
                "another device, fewer tokens or skipped work: log the device and the token counts of every request",
                about=(seen.label,),
            )


def cache_rates(dataset: Dataset) -> Iterator[Finding]:
    """Rates above the memory's bandwidth come from a cache: such times say nothing of cold data."""
    device = dataset.device
    if device is None or device.memory_bandwidth_bytes_per_s is None:
        return
    peak = device.memory_bandwidth_bytes_per_s
    for group in grouped(dataset.observations, lambda seen: seen.l2):
        single = [seen for seen in group if len(seen.work) == 1 and seen.work[0].bytes > 0 and seen.l2 != "cold"]
        above = [seen for seen in single if seen.work[0].bytes / seen.value > peak]
        if not above:
            continue
        worst = max(above, key=lambda seen: seen.work[0].bytes / seen.value)
        moved = worst.work[0].bytes
        stated = "stated to be warm" if worst.l2 == "warm" else "not stated to be warm"
        cache = f"L2 of {say(device.l2_bytes, 'B')}" if device.l2_bytes else "L2 of unknown size"
        yield Finding(
            "cache_rates",
            "note" if worst.l2 == "warm" else "warning",
            f"{len(above)} of {len(single)} numbers imply more than the {say(peak, 'B/s')} of the memory; the most: "
            f"{worst.label}: {say(moved, 'B')} / {worst.shown} = {say(moved / worst.value, 'B/s')}: the data come from "
            f"the {cache}, which is {stated}",
            "read these as cache-hot times; measure with a cold cache beside them",
        )


def exercised(dataset: Dataset) -> Iterator[Finding]:
    """A feature that the workload never reaches is not measured by it, whatever the document says of it."""
    if dataset.declared is None:
        return
    figures = device_numbers(dataset.device)
    for feature in dataset.declared.feature:
        numbers = {**dataset.declared.numbers, **figures}
        unknown = sorted((names(feature.needs) | names(feature.exceeds)) - numbers.keys())
        if unknown:
            yield Finding(
                "exercised",
                "note",
                f"{feature.name}: {unknown[0]} of {dataset.device_name} is unknown, so whether it is exercised is too",
                "add a row with a source to docker/archs.toml",
            )
            continue
        needs, limit = evaluate(feature.needs, numbers), evaluate(feature.exceeds, numbers)
        if needs <= limit:
            yield Finding(
                "exercised",
                "warning",
                f"{feature.name} is never exercised: {feature.needs} = {say(needs, feature.unit)} does not exceed "
                f"{feature.exceeds} = {say(limit, feature.unit)} ({feature.because})",
                "no number here says anything about it: measure a load above the limit",
            )


def device_numbers(device: Device | None) -> dict[str, float]:
    """The figures of a card that a formula may name, where they are known."""
    known = {"device_memory_bytes": device.memory_bytes, "device_l2_bytes": device.l2_bytes} if device else {}
    return {name: float(known[name] or 0) for name in DEVICE_NUMBERS if known.get(name)}


def _resident(seen: Observation, device: Device) -> float:
    return 0.0 if seen.l2 == "cold" else float(device.l2_bytes or 0)


def _peak(seen: Observation, device: Device) -> float | None:
    """Peak of the matrix units for a number's precisions; None where it is unknown."""
    if seen.accumulate == "float16":
        return device.float16_accumulate_flops_per_s
    return device.tensor_peak_flops_per_s(seen.dtype)


def _phase_s(phase: PhaseWork, seen: Observation, device: Device, resident_bytes: float) -> tuple[float, bool]:
    """Least time of one of a phase, and whether its bytes, not its operations, decide."""
    bandwidth = device.memory_bandwidth_bytes_per_s
    memory_s = max(0.0, phase.bytes - resident_bytes) / bandwidth if bandwidth else 0.0
    peak = _peak(seen, device)
    compute_s = phase.flops / peak if peak else 0.0
    return max(memory_s, compute_s), memory_s >= compute_s


def _arithmetic(seen: Observation, device: Device) -> str:
    terms = []
    for phase in seen.work:
        resident = _resident(seen, device)
        seconds, by_bytes = _phase_s(phase, seen, device, resident)
        if by_bytes:
            rate = say(device.memory_bandwidth_bytes_per_s or 0, "B/s")
            what = f"{say(max(0.0, phase.bytes - resident), 'B')} / {rate}"
        else:
            what = f"{say(phase.flops, 'FLOP')} / {say(_peak(seen, device) or 0, 'FLOP/s')}"
        times = "" if phase.times == 1 else f"{phase.times:g} × "
        terms.append(f"{times}{phase.name} {say(seconds, 's')} ({what})")
    return " + ".join(terms)
