"""What took the time in a trace of torch's profiler: names, calls, time. Owns how that form is read.

The form: Chrome's trace events. A complete event (`ph` is X) has a name, a category, a beginning `ts` and a length
`dur` in microseconds; events of one thread nest. Kernels and copies of a GPU have categories of their own, operators
of the processor are `cpu_op`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

ON_A_GPU = ("kernel", "gpu_memcpy", "gpu_memset")
ON_A_PROCESSOR = "cpu_op"
KEPT = 20
"""Names that a result keeps, the ones with the most time."""
LONGEST_NAME = 200
"""Characters of a name that are kept: templates have hundreds."""


def longest(events: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The kernels with the most time; of a run without a GPU the operators, each without what it called.

    Records of `result.Kernel`. Empty where the trace has neither.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    times = [(str(e["name"]), float(e["dur"])) for e in complete if e.get("cat") in ON_A_GPU]
    return ranked(times or _own_times([e for e in complete if e.get("cat") == ON_A_PROCESSOR]), 1e-6)


def ranked(times: Iterable[tuple[str, float]], unit_s: float) -> list[dict[str, Any]]:
    """Calls of the same name put together, those with the most time first."""
    calls: dict[str, int] = defaultdict(int)
    total: dict[str, float] = defaultdict(float)
    for name, time in times:
        calls[name[:LONGEST_NAME]] += 1
        total[name[:LONGEST_NAME]] += time
    return shares([(name, calls[name], time * unit_s) for name, time in total.items()])


def shares(rows: Iterable[tuple[str, int, float]]) -> list[dict[str, Any]]:
    """Name, calls and seconds as records, those with the most time first."""
    found = sorted(rows, key=lambda row: (-row[2], row[0]))
    whole = sum(seconds for _, _, seconds in found)
    return [
        {"name": name, "calls": calls, "device_s": seconds, "share": min(1.0, seconds / whole) if whole else 0.0}
        for name, calls, seconds in found[:KEPT]
    ]


def _own_times(events: Sequence[Mapping[str, Any]]) -> list[tuple[str, float]]:
    """Each event's length without those of the events that lie within it, by thread."""
    threads: dict[tuple[Any, Any], list[Mapping[str, Any]]] = defaultdict(list)
    for event in events:
        threads[event.get("pid"), event.get("tid")].append(event)
    found: list[tuple[str, float]] = []
    for members in threads.values():
        # the outer one of two that begin together is the longer one
        members.sort(key=lambda event: (float(event["ts"]), -float(event["dur"])))
        open_events: list[int] = []
        ends: list[float] = []
        own: list[float] = []
        for event in members:
            begin, length = float(event["ts"]), float(event["dur"])
            while open_events and ends[open_events[-1]] <= begin:
                open_events.pop()
            if open_events:
                own[open_events[-1]] -= length
            open_events.append(len(own))
            own.append(length)
            ends.append(begin + length)
        found += [(str(event["name"]), max(0.0, time)) for event, time in zip(members, own, strict=True)]
    return found
