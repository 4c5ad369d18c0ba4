"""Measures operation cells: inputs, correctness gate, timing, one result each. Owns the order of these steps.

The gate comes first and last: a number exists only if the output was right before timing and, on other inputs and
through a replayed graph, after it.
"""

from __future__ import annotations

import gc
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TextIO

import torch

from smbench.memorysnapshot import SUFFIX
from smbench.worker.compilations import Compilations
from smbench.worker.gate import Truth, Verdict, examine, replace_integers, restore
from smbench.worker.memory import weigh
from smbench.worker.timing import Flush, Spec, Timing, capture, measure, measure_pass, measure_wall
from smbench_kernels.op import Inputs, Op, Passes, Point, Prepared, UnsupportedPoint, Work
from smbench_kernels.registry import op as find_op

CHECK_SEED = 7919
"""Added to a cell's seed for the inputs of the second round."""
MUCH_MEMORY = 0.25
"""Part of a device's memory beyond which what earlier cells left is looked for."""
COLD_WINDOW_S = 150e-6
"""A cold graph holds as many calls as fill about this time, so that the flush does not dominate the wall clock."""
SET_BYTES = 4 << 30
"""Most memory for the distinct buffer sets of a cold measurement."""


@dataclass(frozen=True, slots=True)
class Job:
    """One cell of a request."""

    cell_id: str
    subject: str
    provider: str
    axes: Point
    seed: int
    untimed_reason: str | None
    """Why the cell is only verified; None where it is timed."""


@dataclass(slots=True)
class _Data:
    """Inputs of the point at hand, shared by the providers that run it one after the other."""

    key: tuple[Any, ...]
    truths: list[Truth]
    redrawn: Truth | None
    """The second inputs with other integers, where the operation can draw them."""
    place: Callable[[Inputs], Inputs]
    """The operation's own, bound to the point."""
    sets: list[Inputs] = field(default_factory=list)

    def buffers(self, count: int) -> list[Inputs]:
        """`count` copies of the inputs, each in memory of its own. UnsupportedPoint where there is no such memory."""
        while len(self.sets) < count:
            self.sets.append(self.place(self.truths[0].inputs))
        return self.sets[:count]


class OpRunner:
    """Runs jobs one by one on one device."""

    def __init__(self, device: torch.device, specs: Sequence[Spec], log: TextIO, native: Path | None = None) -> None:
        """`native` is the folder for files that a library writes in its own form; None: they are not kept."""
        self._device = device
        self._specs = specs
        self._log = log
        self._native = native
        self._on_gpu = device.type == "cuda"
        self._much_bytes = MUCH_MEMORY * torch.cuda.mem_get_info(device)[1] if self._on_gpu else 0.0
        self.stream = torch.cuda.Stream(device) if self._on_gpu else None
        self._flush = Flush(device) if self._on_gpu and any(spec.l2 == "cold" for spec in specs) else None
        self._data: _Data | None = None
        self.compilations = Compilations()
        self.broken: str | None = None
        """Why this process can measure nothing more, once a fault has poisoned its device context."""

    def refusals(self, jobs: Sequence[Job]) -> list[str]:
        """What makes the request impossible as a whole, before anything is measured: unknown names and axes."""
        found: dict[str, None] = {}
        for job in jobs:
            try:
                op = find_op(job.subject)
            except KeyError as error:
                found[str(error.args[0])] = None
                continue
            if job.provider not in op.providers:
                known = ", ".join(op.providers)
                found[f"op {job.subject!r} has no provider {job.provider!r}; known: {known}"] = None
            for name in job.axes.keys() ^ op.axes.keys():
                what = "is missing" if name in op.axes else "is unknown"
                found[f"op {job.subject!r}: axis {name!r} {what}; its axes: {', '.join(op.axes)}"] = None
            for name in job.axes.keys() & op.axes.keys():
                axis, value = op.axes[name], job.axes[name]
                if axis.choices and value not in axis.choices:
                    found[f"op {job.subject!r}: {name} = {value!r} is none of {', '.join(axis.choices)}"] = None
                elif not axis.choices and not (isinstance(value, int) and value >= axis.minimum):
                    found[f"op {job.subject!r}: {name} = {value!r} is no integer of at least {axis.minimum}"] = None
        return list(found)

    def run(self, job: Job) -> dict[str, Any]:
        """The result of one cell, without what only the host knows. Never raises for what a provider does wrong."""
        phases: dict[str, float] = {}
        result: dict[str, Any] = {"phases_s": phases}
        began = time.perf_counter()
        compiled_before = self.compilations.count
        compile_before_s = self.compilations.seconds
        with self._on_stream():
            try:
                result |= self._measure(job, phases)
            except UnsupportedPoint as reason:
                result |= {"status": "unsupported", "reason": str(reason)}
            except torch.cuda.OutOfMemoryError as error:
                result |= {"status": "oom", "reason": str(error).splitlines()[0]}
                self._data = None
                torch.cuda.empty_cache()
            # whatever a provider raises is that cell's outcome, with its traceback in the log
            except Exception as error:  # noqa: BLE001
                traceback.print_exc(file=self._log)
                result |= {"status": "crashed", "reason": f"{type(error).__name__}: {_first_line(error)}"}
                self._find_out_if_broken()
        if self._data and result["status"] in ("incorrect", "crashed"):
            # what a provider did to buffers, integers included, is not for the next one to suffer from
            self._data.sets.clear()
        self._give_memory_back()
        result["compilations"] = self.compilations.count - compiled_before
        phases["compile"] = self.compilations.seconds - compile_before_s
        phases["total"] = time.perf_counter() - began
        # compilation happens inside the first call, which the check times
        phases["check"] = max(0.0, phases.get("check", 0.0) - phases["compile"])
        return result

    def _measure(self, job: Job, phases: dict[str, float]) -> dict[str, Any]:
        op = find_op(job.subject)
        with _phase(phases, "inputs"):
            data = self._inputs(op, job)
            buffers = data.buffers(1)[0]
            restore(buffers, data.truths[0])
        prepare = op.provider(job.provider)
        verdict = Verdict(op.tolerance(job.axes))
        with _phase(phases, "check"):
            # a mapping of its own: an entry that a provider replaces is no output
            prepared = prepare(job.axes, dict(buffers))
            prepared.begin()
            examine(verdict, prepared.run, buffers, data.truths[0], "first inputs", prepared.finish)
        work = op.work(job.axes, data.truths[0].inputs)
        weighed: dict[str, Any] = {}
        if verdict.passed and prepared.passes is not None:
            with _phase(phases, "memory"):
                restore(buffers, data.truths[0])
                examine(verdict, _in_halves(prepared.passes), buffers, data.truths[0], "by halves", prepared.finish)
                snapshot = self._native / f"{job.cell_id}{SUFFIX}" if self._native else None
                weighed = {"memory": weigh(prepared.passes, buffers, self.stream, snapshot)}
        timings: dict[str, Timing] = {}
        if verdict.passed and job.untimed_reason is None:
            timings = self._time(op, data, prepare, job.axes, prepared, phases)
        if verdict.passed:
            with _phase(phases, "check"):
                # captured before the inputs are there: work that is done while capturing, and not by the replay, shows
                replay = self._replayed(prepared)
                restore(buffers, data.truths[1])
                prepared.begin()
                examine(verdict, replay, buffers, data.truths[1], "second inputs", prepared.finish)
                if data.redrawn is not None:
                    self._examine_redrawn(verdict, prepare, job.axes, buffers, data.truths[0], data.redrawn)
        return {
            "check": verdict.record(),
            "work": _as_record(work),
            **weighed,
            "selection": {
                "source": prepared.config_source,
                "config": dict(prepared.config),
                "kernels": {name: dict(facts) for name, facts in prepared.kernels().items()},
            },
            "counts": dict(prepared.counts()),
            **self._outcome(op, job, data.truths[0].inputs, verdict, timings),
        }

    def _examine_redrawn(
        self,
        verdict: Verdict,
        prepare: Callable[[Point, Inputs], Prepared],
        point: Point,
        buffers: Inputs,
        first: Truth,
        redrawn: Truth,
    ) -> None:
        """Bind the provider anew to other integers: a result that ignores them, or makes too much of them, shows."""
        restore(buffers, redrawn)
        replace_integers(buffers, redrawn)
        try:
            prepared = prepare(point, dict(buffers))
            prepared.begin()
            examine(verdict, prepared.run, buffers, redrawn, "redrawn integers", prepared.finish)
        finally:
            # the next provider of the point gets the same buffers
            replace_integers(buffers, first)

    def _outcome(
        self, op: Op, job: Job, inputs: Inputs, verdict: Verdict, timings: Mapping[str, Timing]
    ) -> dict[str, Any]:
        if not verdict.passed:
            return {"status": "incorrect", "reason": "; ".join(verdict.faults)}
        if job.untimed_reason is not None:
            return {"status": "verified", "reason": job.untimed_reason}
        measurements = [
            {
                "name": spec.name,
                "method": spec.method,
                "l2": spec.l2,
                "calls_per_sample": timings[spec.name].calls_per_sample,
                "warmup_s": timings[spec.name].warmup_s,
                "samples_s": timings[spec.name].samples_s,
                "busy_s": timings[spec.name].busy_s,
                **(
                    {"work": _as_record(op.pass_work[spec.part](job.axes, inputs))} if spec.part in op.pass_work else {}
                ),
            }
            for spec in self._specs
            if spec.name in timings
        ]
        return {"status": "ok", "reason": None, "measurements": measurements}

    def _time(
        self,
        op: Op,
        data: _Data,
        prepare: Callable[[Point, Inputs], Prepared],
        point: Point,
        prepared: Prepared,
        phases: dict[str, float],
    ) -> dict[str, Timing]:
        timings: dict[str, Timing] = {}
        for spec in self._specs:
            if spec.part != "whole":
                # an operation without halves has nothing that this way of timing would time
                if spec.part in op.pass_work and prepared.passes is not None:
                    timings[spec.name] = measure_pass(spec, prepared.passes, self.stream)
                continue
            if spec.method == "wall":
                timings[spec.name] = measure_wall(spec, prepared.run)
                continue
            if spec.method == "graph" and not prepared.capturable:
                continue
            calls = [prepared.run]
            if spec.l2 == "cold":
                with _phase(phases, "inputs"):
                    sets = data.buffers(self._cold_sets(spec, data, timings))
                    others = [prepare(point, buffers) for buffers in sets[1:]]
                    for other in others:
                        other.begin()
                    calls += [other.run for other in others]
            assert self.stream is not None
            timings[spec.name] = measure(spec, calls, self.stream, self._flush)
            phases["capture"] = phases.get("capture", 0.0) + timings[spec.name].capture_s
        if not timings:
            raise UnsupportedPoint("none of the ways of timing that are asked for can time it")
        return timings

    def _cold_sets(self, spec: Spec, data: _Data, timings: Mapping[str, Timing]) -> int:
        """How many distinct buffer sets a cold measurement uses."""
        set_bytes = sum(t.numel() * t.element_size() for t in data.truths[0].inputs.values())
        by_memory = max(1, SET_BYTES // max(1, set_bytes))
        whole = {spec.name for spec in self._specs if spec.part == "whole"}
        known = [min(timing.samples_s) for name, timing in timings.items() if name in whole]
        by_time = max(1, round(COLD_WINDOW_S / known[0])) if known else spec.calls
        return min(spec.calls, by_memory, by_time)

    def _inputs(self, op: Op, job: Job) -> _Data:
        key = (op.name, tuple(sorted(job.axes.items())), job.seed)
        if self._data is None or self._data.key != key:
            # the old point's memory goes before the new one's comes
            self._data = None
            first = op.make_inputs(job.axes, job.seed, self._device)
            other = op.make_inputs(job.axes, job.seed + CHECK_SEED, self._device)
            # the second round changes the values but not the integer inputs, see `restore`
            second = {name: t if t.is_floating_point() else first[name] for name, t in other.items()}
            truths = [Truth.of(op, job.axes, inputs) for inputs in (first, second)]
            redrawn = None
            if op.redraw is not None:
                drawn = op.redraw(job.axes, second, job.seed + CHECK_SEED)
                redrawn = Truth.of(op, job.axes, drawn) if drawn is not None else None
            self._data = _Data(key, truths, redrawn, partial(op.place, job.axes))
        return self._data

    def _replayed(self, prepared: Prepared) -> Callable[[], None]:
        """One call, on a GPU through a captured graph: what is timed is what is checked."""
        if self.stream is None or not prepared.capturable:
            return prepared.run
        replay: Callable[[], None] = capture([prepared.run], self.stream).replay
        # of the whole device: stray work on another stream must land before the inputs are restored, not after
        torch.cuda.synchronize(self._device)
        return replay

    @contextmanager
    def _on_stream(self) -> Iterator[None]:
        if self.stream is None:
            yield
        else:
            with torch.cuda.stream(self.stream):
                yield

    def _give_memory_back(self) -> None:
        """Free what a cell left in reference cycles, once that is much: graphs keep all memory that was used in them.

        Not after every cell: a collection takes longer than many a cell.
        """
        if self._on_gpu and torch.cuda.memory_reserved(self._device) > self._much_bytes:
            gc.collect()
            torch.cuda.empty_cache()

    def _find_out_if_broken(self) -> None:
        """A fault such as an illegal address stays with the process: nothing after it would be worth reporting."""
        if self._on_gpu:
            try:
                torch.cuda.synchronize()
            except RuntimeError as error:
                self.broken = _first_line(error)


@contextmanager
def _phase(phases: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        phases[name] = phases.get(name, 0.0) + time.perf_counter() - began


def _in_halves(passes: Passes) -> Callable[[], None]:
    """A whole call by its halves."""

    def call() -> None:
        passes.reset()
        passes.forward()
        passes.backward()

    return call


def _as_record(work: Work) -> dict[str, int]:
    return {"bytes": work.bytes, "flops": work.flops}


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0]
