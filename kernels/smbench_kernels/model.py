"""A time model of small, memory-bound kernels. Owns the constants; knows nothing of LoRA.

A kernel is a number of equal programs, each a chain of dependent rounds of loads. Latency is the chain's length times
the waves of resident programs; traffic is the slowest of device memory, L2 and lane operations on the multiprocessors
that have a program. Latency decides decode-sized work, with few bytes to hide it behind: it takes many programs with
many bytes in flight. The two overlap in part, which the root of the sum of their squares stands for. The figures are
orders of magnitude to rank configurations with, not predictions to publish.
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
REDUCE_BYTES_PER_S = 60e9
"""One program alone: some 24 KiB in flight at 0.4 us, the latency of the L2."""
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
    reduced_bytes: float = 0.0
    """Partial sums that one program adds at the end, where several programs share a result."""
    shared_bytes: int = 0
    """Shared memory of one program."""
    idle_programs: int = 0
    """Programs that end as soon as they know their index."""
    exchange_s: float = 0.0
    """What programs that share a result spend on handing it over, other than through memory."""


def seconds(plan: Plan, device: Mapping[str, float]) -> float:
    """Modelled time of one launch.

    `device` has `sm_count` and `memory_bytes_per_s`; `threads_per_sm` and `shared_bytes_per_sm` default to the least
    that sm80, sm86, sm89 and sm90 have.
    """
    sms = device["sm_count"]
    by_threads = int(device.get("threads_per_sm", 1536)) // plan.threads
    by_shared = int(device.get("shared_bytes_per_sm", 100 * 1024)) // max(1, plan.shared_bytes)
    per_sm = max(1, min(PROGRAMS_PER_SM, by_threads, by_shared))
    waves = math.ceil(plan.programs / (sms * per_sm))
    # the round before the first is the load of the index, on which every other load depends
    latency_s = waves * (1 + plan.rounds) * LATENCY_S
    busy_sms = min(sms, plan.programs)
    traffic_s = max(
        plan.device_bytes / device["memory_bytes_per_s"],
        plan.cache_bytes / (busy_sms * L2_BYTES_PER_S_PER_SM),
        plan.operations / (busy_sms * LANES_PER_S_PER_SM),
    )
    reduce_s = REDUCE_S + plan.reduced_bytes / REDUCE_BYTES_PER_S if plan.reduced_bytes else 0.0
    # an idle program takes a place for one load
    idle_s = plan.idle_programs / (sms * per_sm) * LATENCY_S
    shared_s = reduce_s + plan.exchange_s
    return LAUNCH_S + plan.programs * PROGRAM_S + idle_s + math.hypot(latency_s, traffic_s) + shared_s
