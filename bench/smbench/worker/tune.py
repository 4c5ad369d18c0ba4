"""Finds launch parameters on the device at hand: compile ahead on all cores, then search point by point.

Owns the clock that the search asks: every candidate passes the correctness gate before it is timed, cold L2, by graph
replay. Owns no file: outcomes go to the host as events.
"""

from __future__ import annotations

import multiprocessing
import os
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from smbench.worker.gate import Truth, Verdict, examine, restore
from smbench.worker.timing import Flush, capture, sample
from smbench_kernels.op import Config, Inputs, Op, Point, Tunable, UnsupportedPoint
from smbench_kernels.registry import op as find_op
from smbench_kernels.tune import FINAL_SAMPLES, search

WINDOW_S = 100e-6
"""A graph holds as many calls, each on buffers of its own, as fill about this time."""
CALLS = 12
SET_BYTES = 2 << 30
HINTS = 3
"""Winners of the points before that a search tries first."""


@dataclass(slots=True)
class _Candidate:
    """A configuration that is right and captured, ready to be timed again."""

    replay: Callable[[], None]
    calls: int


class PointClock:
    """Times configurations of one point."""

    def __init__(
        self, op: Op, tunable: Tunable, point: Point, seed: int, stream: torch.cuda.Stream, flush: Flush
    ) -> None:
        self._op, self._tunable, self._point = op, tunable, point
        self._stream, self._flush = stream, flush
        self._truth = Truth.of(op, point, op.make_inputs(point, seed, stream.device))
        self._sets = [self._clone()]
        self._captured: dict[tuple[tuple[str, int], ...], _Candidate | None] = {}

    def __call__(self, config: Config, samples: int) -> float | None:
        """Median seconds over so many samples; None where the output is wrong or the configuration does not launch."""
        key = tuple(sorted(config.items()))
        if key not in self._captured:
            self._captured[key] = self._capture(config)
        candidate = self._captured[key]
        if candidate is None:
            return None
        elapsed, _ = sample(candidate.replay, 1, self._flush, samples + 1, self._stream)
        # the first replay of a burst finds an idle device
        return statistics.median(elapsed[1:]) / candidate.calls

    def _capture(self, config: Config) -> _Candidate | None:
        buffers = self._sets[0]
        restore(buffers, self._truth)
        try:
            prepared = self._tunable.prepare(self._point, buffers, config)
            verdict = Verdict(self._op.tolerance(self._point))
            examine(verdict, prepared.run, buffers, self._truth, "candidate")
        except (OutOfResources, UnsupportedPoint):
            return None
        if not verdict.passed:
            return None
        if len(self._sets) == 1:
            self._make_sets(prepared.run)
        calls = [self._tunable.prepare(self._point, buffers, config).run for buffers in self._sets]
        return _Candidate(capture(calls, self._stream).replay, len(calls))

    def _make_sets(self, run: Callable[[], None]) -> None:
        """Enough copies of the inputs, sized by the first configuration's time."""
        elapsed, _ = sample(run, 1, self._flush, 3, self._stream)
        by_time = max(1, round(WINDOW_S / max(min(elapsed), 1e-6)))
        set_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._truth.inputs.values())
        count = min(CALLS, by_time, max(1, SET_BYTES // max(1, set_bytes)))
        self._sets += [self._clone() for _ in range(count - 1)]

    def _clone(self) -> Inputs:
        return self._op.place(self._point, self._truth.inputs)


def tune(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Outcomes of a tuning request, point by point: `compiled` first, then a `tuned` for each point."""
    device = torch.device("cuda")
    stream = torch.cuda.Stream(device)
    flush = Flush(device)
    facts = device_facts(device, request.get("memory_bytes_per_s"))
    points = [(find_op(row["subject"]), row["axes"]) for row in request["points"]]
    began = time.perf_counter()
    count = _precompile(points, torch.cuda.get_device_capability(device))
    yield {"event": "compiled", "binaries": count, "seconds": time.perf_counter() - began}
    known = [(find_op(row["subject"]), row["axes"], row["config"]) for row in request["known"]]
    with torch.cuda.stream(stream):
        for op, axes in points:
            began = time.perf_counter()
            tunable = op.tuning()
            clock = PointClock(op, tunable, axes, request["seed"], stream, flush)
            # what won at the points before is likely to be good here
            hints = [config for other, _, config in known if other is op][-HINTS:]
            choice = search(axes, tunable, facts, clock, hints)
            outcome: dict[str, Any] = {"event": "tuned", "subject": op.name, "axes": dict(axes)}
            if choice:
                known.append((op, axes, choice.config))
                outcome |= {
                    "config": dict(choice.config),
                    "time_s": choice.time_s,
                    "candidates": choice.candidates,
                    "timed": choice.timed,
                }
            yield outcome | {"seconds": time.perf_counter() - began}
        drawn = random.Random(request["seed"]).sample(known, min(len(known), request["quality_points"]))
        for op, axes, kept in drawn:
            began = time.perf_counter()
            clock = PointClock(op, op.tuning(), axes, request["seed"], stream, flush)
            hints = [config for other, _, config in known if other is op and config is not kept][-HINTS:]
            choice = search(axes, op.tuning(), facts, clock, hints)
            if choice:
                found = quality(clock, op.tuning().space(axes), choice.config, kept)
                outcome = {"event": "quality", "subject": op.name, "axes": dict(axes), "timed": choice.timed, **found}
                yield outcome | {"seconds": time.perf_counter() - began}


def device_facts(device: torch.device, memory_bytes_per_s: float | None) -> Mapping[str, float]:
    """What Tunable.predict wants to know. The bandwidth is the table's, or measured by a copy where it is unknown."""
    properties = torch.cuda.get_device_properties(device)
    return {
        "sm_count": float(properties.multi_processor_count),
        "l2_bytes": float(properties.L2_cache_size),
        "memory_bytes_per_s": memory_bytes_per_s or _copy_bandwidth(device),
    }


def quality(clock: PointClock, space: Sequence[Config], searched: Config, kept: Config) -> dict[str, Any]:
    """How the search's choice times against the exhaustive best, on the same buffers and side by side.

    `searched` was found on this clock. `kept` is what an earlier search of the point left in the files, on buffers
    elsewhere in memory: its ratio holds what the place of buffers does to times as well as what the search missed.
    """
    screened = [(seconds, index) for index, config in enumerate(space) if (seconds := clock(config, 9))]
    finalists = [searched, kept, *(space[index] for _, index in sorted(screened)[:8])]
    times: list[list[float]] = [[] for _ in finalists]
    for turn in range(4):
        entries = list(enumerate(finalists))
        # there and back again, so that a drift of the clocks hits all alike
        for index, config in entries if turn % 2 == 0 else reversed(entries):
            seconds = clock(config, FINAL_SAMPLES)
            if seconds:
                times[index].append(seconds)
    medians = [statistics.median(values) for values in times]
    best_s = min(medians)
    return {
        "searched_s": medians[0],
        "kept_s": medians[1],
        "best_s": best_s,
        "ratio": medians[0] / best_s,
        "kept_ratio": medians[1] / best_s,
        "config": dict(searched),
        "best_config": dict(finalists[medians.index(best_s)]),
        "screened": [[index, seconds] for seconds, index in screened],
    }


def _precompile(points: Sequence[tuple[Op, Point]], capability: tuple[int, int]) -> int:
    """Fill Triton's cache by processes without a GPU, one a core; the number of binaries that the points need."""
    wanted: dict[str, tuple[str, Point, Config]] = {}
    for op, axes in points:
        tunable = op.tuning()
        for config in tunable.space(axes):
            wanted.setdefault(tunable.binary(axes, config), (op.name, axes, config))
    tasks = list(wanted.values())
    if not tasks:
        return 0
    workers = min(len(tasks), len(os.sched_getaffinity(0)))
    compute_capability = capability[0] * 10 + capability[1]
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        list(pool.map(_compile_one, tasks, [compute_capability] * len(tasks), chunksize=1))
    return len(tasks)


def _compile_one(task: tuple[str, Point, Config], compute_capability: int) -> None:
    name, axes, config = task
    find_op(name).tuning().precompile(axes, config, compute_capability)


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy far larger than the L2."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    elapsed, _ = sample(copy, 1, None, 6, torch.cuda.current_stream(device))
    return 2 * source.numel() * source.element_size() / statistics.median(elapsed[1:])
