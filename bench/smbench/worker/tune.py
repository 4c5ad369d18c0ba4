"""Finds launch parameters on the device at hand: compile ahead on all cores, then search point by point.

Owns the clock that the search asks: every candidate passes the correctness gate before it is timed, cold L2, by graph
replay. Owns no file: outcomes go to the host as events.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from triton.runtime.errors import OutOfResources

from smbench.worker.gate import Truth, Verdict, examine, restore
from smbench.worker.precompile import Task, compile_all
from smbench.worker.timing import Flush, capture, sample
from smbench_kernels import configs, hardware
from smbench_kernels.op import Config, Inputs, Op, Point, Tunable, UnsupportedPoint
from smbench_kernels.registry import op as find_op
from smbench_kernels.tune import FINAL_SAMPLES, search

WINDOW_S = 100e-6
"""A graph holds as many calls, each on buffers of its own, as fill about this time."""
CALLS = 12
SET_BYTES = 2 << 30
HINTS = 3
"""Winners of the points before that a search tries first."""


@dataclass(frozen=True, slots=True)
class _Job:
    """A point to search."""

    op: Op
    provider: str | None
    """The provider over a library's kernel; None for our own."""
    axes: Point

    @property
    def tunable(self) -> Tunable:
        """Its search space."""
        return self.op.tuning(self.provider)

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Whether a known outcome is of the same kernel; its point may be another."""
        return row["subject"] == self.op.name and row.get("provider") == self.provider


@dataclass(slots=True)
class _Candidate:
    """A configuration that is right and captured, ready to be timed again."""

    replay: Callable[[], None]
    calls: Sequence[Callable[[], None]]
    """What the graph replays. They hold what it only has the addresses of, workspaces among it."""


class PointClock:
    """Times configurations of one point."""

    def __init__(
        self, op: Op, tunable: Tunable, point: Point, seed: int, stream: torch.cuda.Stream, flush: Flush
    ) -> None:
        self._op, self._tunable, self._point = op, tunable, point
        self._stream, self._flush = stream, flush
        self._truth = Truth.of(op, point, op.make_inputs(point, seed, stream.device))
        self._sets = [self._clone()]
        self._bound = [tunable.binding(point, self._sets[0])]
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
        return statistics.median(elapsed[1:]) / len(candidate.calls)

    def _capture(self, config: Config) -> _Candidate | None:
        buffers = self._sets[0]
        restore(buffers, self._truth)
        try:
            prepared = self._bound[0](config)
            prepared.begin()
            verdict = Verdict(self._op.tolerance(self._point))
            examine(verdict, prepared.run, buffers, self._truth, "candidate", prepared.finish)
        except (OutOfResources, UnsupportedPoint):
            return None
        # a library's kernel need not even compile with every choice of what it takes; ours does
        except Exception as error:
            if self._tunable.library is None:
                raise
            sys.stderr.write(f"{self._op.name} {dict(config)}: {type(error).__name__}: {error}\n")
            return None
        if not verdict.passed:
            return None
        if len(self._sets) == 1:
            self._make_sets(prepared.run)
        others = [bound(config) for bound in self._bound[1:]]
        for other in others:
            other.begin()
        calls = [prepared.run, *(other.run for other in others)]
        return _Candidate(capture(calls, self._stream).replay, calls)

    def _make_sets(self, run: Callable[[], None]) -> None:
        """Enough copies of the inputs, sized by the first configuration's time."""
        # by a graph: a library takes longer to launch a small kernel than that takes to run
        elapsed, _ = sample(capture([run], self._stream).replay, 1, self._flush, 3, self._stream)
        by_time = max(1, round(WINDOW_S / max(min(elapsed), 1e-6)))
        set_bytes = sum(tensor.numel() * tensor.element_size() for tensor in self._truth.inputs.values())
        count = min(CALLS, by_time, max(1, SET_BYTES // max(1, set_bytes)))
        self._sets += [self._clone() for _ in range(count - 1)]
        self._bound += [self._tunable.binding(self._point, buffers) for buffers in self._sets[1:]]

    def _clone(self) -> Inputs:
        return self._op.place(self._point, self._truth.inputs)


def tune(request: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    """Outcomes of a tuning request, point by point: `compiled` first, then a `tuned` for each point.

    An `untunable` names a provider whose library is not here. A point whose provider takes its parameters from other
    points has no outcome, nor has one that `known` holds for this very version of the library.
    """
    device = torch.device("cuda")
    stream = torch.cuda.Stream(device)
    flush = Flush(device)
    facts = device_facts(device, request.get("memory_bytes_per_s"))
    known: list[Mapping[str, Any]] = list(request["known"])
    jobs = [_Job(find_op(row["subject"]), row.get("provider"), row["axes"]) for row in request["points"]]
    libraries: dict[str | None, str | None] = {None: None}
    for provider, own in {job.provider: job for job in jobs if job.provider}.items():
        try:
            libraries[provider] = own.tunable.library() if own.tunable.library else None
        except UnsupportedPoint as reason:
            yield {"event": "untunable", "provider": provider, "reason": str(reason)}
    wanted = [job for job in jobs if job.provider in libraries and not _is_known(job, known, libraries[job.provider])]
    began = time.perf_counter()
    count = _precompile(wanted, torch.cuda.get_device_capability(device))
    yield {"event": "compiled", "binaries": count, "seconds": time.perf_counter() - began}
    with torch.cuda.stream(stream):
        for job in wanted:
            if not job.tunable.space(job.axes):
                continue
            began = time.perf_counter()
            outcome: dict[str, Any] = {"event": "tuned", "subject": job.op.name, "axes": dict(job.axes)}
            if job.provider is not None:
                outcome |= {"provider": job.provider, "library": libraries[job.provider]}
            try:
                clock = PointClock(job.op, job.tunable, job.axes, request["seed"], stream, flush)
                choice = search(job.axes, job.tunable, facts, clock, [*_hints(job, known), *_kept(job, device)])
            except UnsupportedPoint as reason:
                choice, outcome["reason"] = None, str(reason)
            if choice:
                outcome |= {
                    "config": dict(choice.config),
                    "time_s": choice.time_s,
                    "candidates": choice.candidates,
                    "timed": choice.timed,
                }
                known.append(outcome)
            yield outcome | {"seconds": time.perf_counter() - began}
        ours = [row for row in known if row.get("provider") is None]
        for row in random.Random(request["seed"]).sample(ours, min(len(ours), request["quality_points"])):
            began = time.perf_counter()
            job = _Job(find_op(row["subject"]), None, row["axes"])
            clock = PointClock(job.op, job.tunable, job.axes, request["seed"], stream, flush)
            choice = search(
                job.axes, job.tunable, facts, clock, _hints(job, [other for other in ours if other is not row])
            )
            if choice:
                found = quality(clock, job.tunable.space(job.axes), choice.config, row["config"])
                outcome = {"event": "quality", "subject": job.op.name, "axes": dict(job.axes), "timed": choice.timed}
                yield outcome | found | {"seconds": time.perf_counter() - began}


def _hints(job: _Job, known: Sequence[Mapping[str, Any]]) -> list[Config]:
    """What won at the points of the same kernel before: it is likely to be good here."""
    return [row["config"] for row in known if job.matches(row)][-HINTS:]


def _kept(job: _Job, device: torch.device) -> list[Config]:
    """What the files of this device hold for the point or the nearest one: a repeated search does not end worse.

    And what they hold for the parts of a call. A library's space is searched whole.
    """
    if job.provider is not None:
        return []
    parts = job.tunable.starts(job.axes, device) if job.tunable.starts else []
    try:
        return [configs.tuned_config(job.op.name, job.axes, device)[0], *parts]
    except UnsupportedPoint:
        return parts


def _is_known(job: _Job, known: Sequence[Mapping[str, Any]], library: str | None) -> bool:
    """Whether an outcome of a library's kernel is at hand; which of our own are wanted, the host has decided."""
    return job.provider is not None and any(
        job.matches(row) and row["axes"] == job.axes and row.get("library") == library for row in known
    )


def device_facts(device: torch.device, memory_bytes_per_s: float | None) -> Mapping[str, float]:
    """What Tunable.predict wants to know. The bandwidth is the table's, or measured by a copy where it is unknown."""
    return {**hardware.of(device).facts(), "memory_bytes_per_s": memory_bytes_per_s or _copy_bandwidth(device)}


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


def _precompile(jobs: Sequence[_Job], capability: tuple[int, int]) -> int:
    """Compile what the search of points may launch; the number of binaries that they need."""
    wanted: dict[str, Task] = {}
    for job in jobs:
        tunable, space = job.tunable, job.tunable.space(job.axes)
        if (refine := tunable.refine) and space:
            # a space may begin and end with different kernels, each with its own surroundings
            space = [*space, *refine(job.axes, space[0]), *refine(job.axes, space[-1])]
        for config in space:
            task = Task(job.op.name, job.provider, job.axes, config)
            wanted.setdefault(f"{job.provider} {tunable.binary(job.axes, config)}", task)
    return max(compile_all(list(wanted.values()), capability[0] * 10 + capability[1]), default=0)


def _copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written, of a copy far larger than the L2."""
    source = torch.empty(1 << 28, dtype=torch.float32, device=device).normal_()
    target = torch.empty_like(source)

    def copy() -> None:
        target.copy_(source)

    elapsed, _ = sample(copy, 1, None, 6, torch.cuda.current_stream(device))
    return 2 * source.numel() * source.element_size() / statistics.median(elapsed[1:])
