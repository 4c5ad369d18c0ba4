"""Ways of timing calls: CUDA-graph replay, events, host clock; cold and warm L2. Owns samples, not their meaning.

A sample is the time of one call: elapsed time divided by the calls inside. Every method returns warm-up and counted
samples raw; nothing is dropped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smbench_kernels.op import Passes

Call = Callable[[], None]

DIGITS = 11
"""Decimals of a stored sample: 10 ps, far below what any event resolves."""

FLUSH_FACTOR = 3
"""The flush reads this many times the L2's size: reading leaves clean lines, so no write-back falls into the sample."""


@dataclass(frozen=True, slots=True)
class Spec:
    """How to time: the `[[measure]]` row of a recipe."""

    name: str
    method: str
    l2: str
    calls: int
    replays: int
    warmup: int
    samples: int
    min_samples: int
    window_s: float
    part: str = "whole"
    """`whole` for a call, or which half of one: `forward` or `backward`."""


@dataclass(frozen=True, slots=True)
class Timing:
    """Raw samples, seconds per call, in the order they were taken."""

    calls_per_sample: int
    warmup_s: list[float]
    samples_s: list[float]
    busy_s: float
    """Device time from the first warm-up sample to the last sample, flushes included."""
    capture_s: float
    """Host time spent capturing graphs."""


class Flush:
    """Evicts the L2 by reading a buffer several times its size."""

    def __init__(self, device: torch.device) -> None:
        l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
        self._buffer = torch.zeros(FLUSH_FACTOR * l2_bytes // 4, dtype=torch.float32, device=device)
        self._sum = torch.empty((), dtype=torch.float32, device=device)

    def __call__(self) -> None:
        torch.sum(self._buffer, dim=0, out=self._sum)


def capture(calls: Sequence[Call], stream: torch.cuda.Stream) -> torch.cuda.CUDAGraph:
    """A graph of the calls in order. The calls must have run before, so that nothing is compiled inside."""
    graph = torch.cuda.CUDAGraph()
    # `torch.cuda.graph` would empty the allocator's cache at each capture, which costs more than the capture
    stream.synchronize()
    with torch.cuda.stream(stream):
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            for call in calls:
                call()
        finally:
            graph.capture_end()
    return graph


def measure(spec: Spec, calls: Sequence[Call], stream: torch.cuda.Stream, flush: Flush | None) -> Timing:
    """Time calls on a GPU. `calls` are the same work on distinct buffers; a warm L2 uses the first one only.

    Raises ValueError for a method that no GPU has, and whatever a call raises.
    """
    cold = spec.l2 == "cold"
    body = list(calls) if cold else [calls[0]] * spec.calls
    began = time.perf_counter()
    if spec.method == "graph":
        graph = capture(body, stream)
        once: Call = graph.replay
    elif spec.method == "event":

        def once() -> None:
            for call in body:
                call()
    else:
        raise ValueError(f"timing method {spec.method!r} is none of a GPU's: graph, event")
    capture_s = time.perf_counter() - began
    per_sample = len(body) * spec.replays
    eviction = flush if cold else None
    with torch.cuda.stream(stream):
        # the first sample tells how many fit the window, its flush included
        first, cost_s = sample(once, spec.replays, eviction, 1, stream)
        count = min(spec.samples, max(spec.min_samples, int(spec.window_s / max(cost_s, 1e-7))))
        rest, rest_s = sample(once, spec.replays, eviction, spec.warmup + count - 1, stream)
    times = [round(elapsed_s / per_sample, DIGITS) for elapsed_s in first + rest]
    return Timing(per_sample, times[: spec.warmup], times[spec.warmup :], cost_s + rest_s, capture_s)


def measure_wall(spec: Spec, call: Call) -> Timing:
    """Time a call by the host clock, for devices whose calls return when they are done."""
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < spec.warmup + spec.samples:
        start = time.perf_counter()
        for _ in range(spec.calls * spec.replays):
            call()
        end = time.perf_counter()
        times.append(round((end - start) / (spec.calls * spec.replays), DIGITS))
        if end - began > spec.window_s and len(times) >= spec.warmup + spec.min_samples:
            break
    busy_s = time.perf_counter() - began
    return Timing(spec.calls * spec.replays, times[: spec.warmup], times[spec.warmup :], busy_s, 0.0)


def measure_pass(spec: Spec, passes: Passes, stream: torch.cuda.Stream | None) -> Timing:
    """Time one half of a call: by events on a GPU, by the host's clock where there is no stream.

    What comes before a half lies outside its time; gradients are never reset in between, as PyTorch users' are not.
    """
    before, call = (passes.reset, passes.forward) if spec.part == "forward" else (passes.forward, passes.backward)
    began = time.perf_counter()
    if stream is None:
        taken = _wall_passes(spec, before, call)
    else:
        # the first sample tells how many fit the window, what comes before it included
        first, cost_s = _event_passes(before, call, 1, stream)
        count = min(spec.samples, max(spec.min_samples, int(spec.window_s / max(cost_s, 1e-7))))
        taken = first + _event_passes(before, call, spec.warmup + count - 1, stream)[0]
    busy_s = time.perf_counter() - began
    passes.reset()
    times = [round(elapsed_s, DIGITS) for elapsed_s in taken]
    return Timing(1, times[: spec.warmup], times[spec.warmup :], busy_s, 0.0)


def _event_passes(before: Call, call: Call, count: int, stream: torch.cuda.Stream) -> tuple[list[float], float]:
    """`count` samples of a half, all enqueued before the first is read, and the seconds of everything."""
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(3)) for _ in range(count)]
    with torch.cuda.stream(stream):
        for outset, start, end in marks:
            outset.record()
            before()
            start.record()
            call()
            end.record()
    stream.synchronize()
    return [_seconds(start, end) for _, start, end in marks], _seconds(marks[0][0], marks[-1][2]) if marks else 0.0


def _wall_passes(spec: Spec, before: Call, call: Call) -> list[float]:
    times: list[float] = []
    began = time.perf_counter()
    while len(times) < spec.warmup + spec.samples:
        before()
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
        if time.perf_counter() - began > spec.window_s and len(times) >= spec.warmup + spec.min_samples:
            break
    return times


def sample(
    once: Call, replays: int, flush: Flush | None, count: int, stream: torch.cuda.Stream
) -> tuple[list[float], float]:
    """Take `count` samples on the current stream; their elapsed seconds, and the device time of all with flushes.

    All samples are enqueued before the first is read: the device never waits for the host between them.
    """
    marks = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(3)) for _ in range(count)]
    for before, start, end in marks:
        before.record()
        if flush:
            flush()
        start.record()
        for _ in range(replays):
            once()
        end.record()
    stream.synchronize()
    elapsed = [_seconds(start, end) for _, start, end in marks]
    return elapsed, _seconds(marks[0][0], marks[-1][2]) if marks else 0.0


def _seconds(start: Any, end: Any) -> float:
    milliseconds: float = start.elapsed_time(end)
    return milliseconds * 1e-3
