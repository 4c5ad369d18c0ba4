"""A time model of small, memory-bound kernels. Owns the constants; knows nothing of LoRA.

A kernel is a number of equal programs, each a chain of dependent rounds of loads. Its time is the longest of: the
chain's latency times the waves of resident programs, device memory traffic, L2 traffic, lane operations. The first
term is what decides decode-sized work: few bytes, so latency must be hidden by many programs and many bytes in flight.
The figures are orders of magnitude to rank configurations with, not predictions to publish.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

LAUNCH_S = 0.9e-6
"""A graph node of one program; 0.86 us measured on an H200."""
LATENCY_S = 0.7e-6
"""One load that misses the L2."""
REDUCE_S = 1.2e-6
"""Store partials, count the arrival, load the partials of the others: three trips to the L2."""
PROGRAM_S = 0.4e-9
"""Launching one more program."""
L2_BYTES_PER_S_PER_SM = 40e9
LANES_PER_S_PER_SM = 128 * 1.5e9
"""Scalar instructions: 128 lanes at a clock that every card of the field sustains."""
PROGRAMS_PER_SM = 16
"""Most resident programs, the least of sm80, sm86, sm89 and sm90."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What one launch does."""

    programs: int
    threads: int
    """Threads of one program."""
    rounds: float
    """Dependent rounds of loads in one program."""
    device_bytes: float
    """Bytes that must cross device memory once."""
    cache_bytes: float
    """Bytes that all programs load and store, repeated ones included."""
    operations: float
    """Lane instructions of all programs; 0 where the tensor cores do the work."""
    split: int
    """Programs that share one result; above 1 their partial sums are reduced."""


def seconds(plan: Plan, device: Mapping[str, float]) -> float:
    """Modelled time of one launch. `device` has sm_count, memory_bytes_per_s and, if known, threads_per_sm."""
    sms = device["sm_count"]
    per_sm = max(1, min(PROGRAMS_PER_SM, int(device.get("threads_per_sm", 1536)) // plan.threads))
    waves = math.ceil(plan.programs / (sms * per_sm))
    # the round before the first is the load of the LoRA index, on which every other load depends
    latency_s = waves * (1 + plan.rounds) * LATENCY_S
    busy_s = max(
        latency_s,
        plan.device_bytes / device["memory_bytes_per_s"] + LATENCY_S,
        plan.cache_bytes / (sms * L2_BYTES_PER_S_PER_SM),
        plan.operations / (sms * LANES_PER_S_PER_SM),
    )
    return LAUNCH_S + busy_s + plan.programs * PROGRAM_S + (REDUCE_S if plan.split > 1 else 0.0)
