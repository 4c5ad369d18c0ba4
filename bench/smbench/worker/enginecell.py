"""One cell of an engine: start it, send its requests or batches, compare its outputs, report. Owns order and clock.

A number is the host's clock around one request, or of one batch. Nothing else happens inside that interval: prompts
are drawn before, outputs are compared after the last one, and a profiler comes last. Does not own processes
(`serving`), how an engine is driven (`engines`), nor the load on a server (`online`).
"""

from __future__ import annotations

import hashlib
import re
import sys
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from smbench.worker import batches, datasets, outputs, telemetry, tracing
from smbench.worker.batches import Repetition
from smbench.worker.cellprocess import Say
from smbench.worker.engines import Completion, Engine, Setup, UnsupportedByEngine, driver, setup_of
from smbench.worker.prompts import prompt
from smbench.worker.tracing import Tracing

OUT_OF_MEMORY = re.compile(
    r"out of memory|OutOfMemoryError|MemoryError|No available memory for the cache blocks"
    r"|is larger than the available KV cache memory|less than desired GPU memory utilization"
    r"|[Nn]ot enough memory|can't allocate memory|Cannot allocate memory"
)
"""How allocators and engines say that memory does not suffice: CUDA, torch, vLLM, sglang, the C library."""
COMPARED = 2
"""Requests whose outputs are compared, the first ones that count."""


@dataclass(frozen=True, slots=True)
class Served:
    """One request and its answer."""

    prompt: Sequence[int]
    completion: Completion
    e2e_s: float

    def record(self) -> dict[str, Any]:
        """As it is stored."""
        told = self.completion
        return {
            "prompt_tokens": told.prompt_tokens,
            "completion_tokens": len(told.token_ids),
            "finish_reason": told.finish_reason,
            "cached_tokens": told.cached_tokens,
            "e2e_s": self.e2e_s,
            "ttft_s": told.ttft_s,
            "output_sha256": hashlib.sha256(" ".join(map(str, told.token_ids)).encode()).hexdigest(),
        }


def run(job: Mapping[str, Any], say: Say, imported: bool, trace: Tracing | None = None) -> None:
    """Measure one cell and emit its `result`, with a `request` for each that is answered. Never raises for an engine.

    `imported` says that the engine was imported before this process began; `trace` asks for a profile of one more
    repetition, before which the result is said as `measured`: a profiler may take the process with it.
    """
    started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    phases: dict[str, float] = {}
    result: dict[str, Any] = {"phases_s": phases}
    began = time.perf_counter()
    cell = _Cell(job, say, phases, trace)
    try:
        result |= cell.measure(imported)
    except UnsupportedByEngine as error:
        result |= {"status": "unsupported", "reason": str(error)}
    # whatever an engine raises is that cell's outcome, with its traceback in the log
    except Exception as error:  # noqa: BLE001
        traceback.print_exc(file=sys.stderr)
        words = f"{type(error).__name__}: {first_line(error)}"
        said = "".join(traceback.format_exception(error))
        result |= {"status": "oom" if OUT_OF_MEMORY.search(said) else "crashed", "reason": words}
    phases["total"] = time.perf_counter() - began
    told = {"cell_id": job["cell_id"], "started_at": started_at, **result}
    if trace is not None and trace.tool == "torch" and "serving" in told:
        say("measured", told)
        told["serving"]["trace"] = cell.traced()
        phases["total"] = time.perf_counter() - began
    say("result", told)
    cell.close()


def record(job: Mapping[str, Any], say: Say) -> None:
    """Start the cell's engine, warm it up, and run one repetition for a profiler that watches this program.

    Emits `recorded` with its seconds. What the engine raises passes through: there is nothing to save.
    """
    from torch.cuda import profiler

    cell = _Cell(job, say, {}, None)
    engine, work = cell.warmed_up()
    began = time.perf_counter()
    profiler.start()
    work.run(engine, 1, False)
    profiler.stop()
    say("recorded", {"cell_id": job["cell_id"], "repetition_s": time.perf_counter() - began})
    cell.close()


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


class _Cell:
    """A cell at work."""

    def __init__(self, job: Mapping[str, Any], say: Say, phases: dict[str, float], trace: Tracing | None) -> None:
        self._job = job
        self._wanted = job["engine"]
        self._say = say
        self._phases = phases
        self._trace = trace
        self._engine: Engine | None = None
        self._served: _Requests | _Batches | None = None
        self._warmup = int(self._wanted["requests"]["warmup"])
        self._repetitions = self._warmup + int(self._wanted["requests"]["samples"])

    def measure(self, imported: bool) -> dict[str, Any]:
        """Everything in order; what the engine raises passes through."""
        chosen = driver(self._wanted["engine"])
        if not imported:
            with self._phase("import"):
                chosen.preload()
        setup = setup_of(self._job)
        with self._phase("inputs"):
            work = self._work(setup)
        with self._phase("start"):
            self._engine = engine = chosen.start(setup)
        on_gpu = setup.device == "cuda"
        sampler = telemetry.open_telemetry() if on_gpu else telemetry.NullSampler("runs on the CPU")
        with sampler, self._phase("generate"):
            began = time.monotonic()
            for index in range(self._repetitions):
                work.run(engine, index)
                # the host's watchdog sees that the cell is alive
                self._say("request", {"cell_id": self._job["cell_id"]})
            window = sampler.window(began, time.monotonic())
        memory = dict(engine.memory())
        output = None
        if self._wanted["compare"]:
            with self._phase("check"):
                output = outputs.check(engine, setup, work.compared(self._warmup))
        self._served = work
        return {
            "serving": {
                "engine": self._wanted["engine"],
                "version": engine.version,
                "kernels": {role: dict(found) for role, found in engine.kernels.items()},
                "settings": dict(engine.settings),
                **work.record(self._warmup),
                "memory": memory,
                "output": output,
            },
            "selection": {"source": "library", "config": {}, "kernels": {}},
            "work": self._wanted["work"].get("e2e_latency"),
            "telemetry": window,
            **self._outcome(work, output),
        }

    def traced(self) -> dict[str, Any]:
        """One more repetition under torch's profiler, after the cell was measured."""
        trace, engine, work = self._trace, self._engine, self._served
        assert trace is not None and engine is not None and work is not None
        # the watchdog waits as long for it as for any other
        self._say("request", {"cell_id": self._job["cell_id"]})
        with self._phase("trace"):
            return tracing.take(
                trace.folder, self._job["cell_id"], engine, lambda: work.run(engine, self._repetitions, False)
            )

    def warmed_up(self) -> tuple[Engine, _Requests | _Batches]:
        """The running engine after a first repetition, and the work that has one more."""
        chosen = driver(self._wanted["engine"])
        chosen.preload()
        setup = setup_of(self._job)
        self._repetitions = 2
        work = self._work(setup)
        self._engine = engine = chosen.start(setup)
        work.run(engine, 0, False)
        return engine, work

    def close(self) -> None:
        """End the engine; what goes wrong then is only worth a line in the log, since the process ends too."""
        if self._engine is None:
            return
        try:
            self._engine.close()
        # the result is out already
        except Exception:  # noqa: BLE001
            traceback.print_exc(file=sys.stderr)

    def _work(self, setup: Setup) -> _Requests | _Batches:
        """What the cell asks its engine, all prompts drawn."""
        # a profiler gets prompts of its own, which no cache of prefixes has seen
        count = self._repetitions + (self._trace is not None)
        if setup.workload == "generate":
            return _Requests(self._job, count)
        return _Batches(self._job, count, stepwise=setup.workload == "static_batch")

    def _outcome(self, work: _Requests | _Batches, output: Mapping[str, Any] | None) -> dict[str, Any]:
        if output is not None and not output["passed"]:
            return {"status": "incorrect", "reason": "; ".join(output["faults"])}
        if self._job["untimed_reason"] is not None:
            return {"status": "verified", "reason": self._job["untimed_reason"]}
        return {"status": "ok", "reason": None, "measurements": self._measurements(work)}

    def _measurements(self, work: _Requests | _Batches) -> list[dict[str, Any]]:
        """A measure that the engine's clock does not give is left out: the stored records say why."""
        warmup = self._warmup
        rows = []
        for name in self._wanted["measures"]:
            values = work.values(name)
            if len(values) < self._repetitions:
                sys.stderr.write(f"{name}: {work.silence}\n")
                continue
            samples = values[warmup:]
            rows.append(
                {
                    "name": name,
                    "method": "wall",
                    "l2": "none",
                    "calls_per_sample": 1,
                    "warmup_s": values[:warmup],
                    "samples_s": samples,
                    "busy_s": sum(samples),
                    "work": self._wanted["work"].get(name),
                }
            )
        return rows

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - began


class _Requests:
    """Requests one after the other, each of one prompt."""

    silence = "the engine does not tell when a request's first token was there"

    def __init__(self, job: Mapping[str, Any], repetitions: int) -> None:
        axes, vocabulary = job["axes"], job["engine"]["model"]["vocabulary"]
        self._output_len = int(axes["output_len"])
        self._prompts = [prompt(job["seed"], vocabulary, int(axes["input_len"]), i) for i in range(repetitions)]
        self._done: list[Served] = []

    def run(self, engine: Engine, index: int, keep: bool = True) -> None:
        """Send a request."""
        tokens = self._prompts[index]
        began = time.perf_counter()
        completion = engine.generate(tokens, self._output_len)
        e2e_s = time.perf_counter() - began
        if keep:
            self._done.append(Served(tokens, completion, e2e_s))

    def record(self, first_counted: int) -> dict[str, Any]:
        """Fields of the stored record."""
        return {"requests": [entry.record() for entry in self._done]}

    def compared(self, first_counted: int) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Prompts and what was generated, whose outputs are compared."""
        return [(s.prompt, s.completion.token_ids) for s in self._done[first_counted:][:COMPARED]]

    def values(self, measure: str) -> list[float]:
        """What is known of a measure, of each request in order."""
        return [value for entry in self._done if (value := _value(measure, entry)) is not None]


class _Batches:
    """Repetitions of a batch that is handed over at once."""

    silence = "the engine does not show the steps of a batch"

    def __init__(self, job: Mapping[str, Any], repetitions: int, stepwise: bool) -> None:
        self._output_len = int(job["axes"]["output_len"])
        self._drawn = datasets.draw(job, repetitions)
        self._stepwise = stepwise
        self._done: list[Repetition] = []

    def run(self, engine: Engine, index: int, keep: bool = True) -> None:
        """Run a repetition."""
        done = batches.run(engine, self._drawn.repetitions[index], self._output_len, self._stepwise)
        if keep:
            self._done.append(done)

    def record(self, first_counted: int) -> dict[str, Any]:
        """Fields of the stored record."""
        return {
            "batches": [entry.record() for entry in self._done],
            "prompts": self._drawn.record(first_counted),
            "step_clock": self._done[0].answer.step_clock,
        }

    def compared(self, first_counted: int) -> list[tuple[Sequence[int], Sequence[int]]]:
        """Prompts and what was generated, whose outputs are compared."""
        return batches.compared(self._done, first_counted)

    def values(self, measure: str) -> list[float]:
        """What is known of a measure, of each repetition in order."""
        return [value for entry in self._done if (value := entry.value(measure)) is not None]


def _value(measure: str, served: Served) -> float | None:
    """One sample of a measure; None where the engine has no clock of its own, or generated a single token."""
    ttft_s, generated = served.completion.ttft_s, len(served.completion.token_ids)
    if measure == "e2e_latency":
        return served.e2e_s
    if measure == "ttft":
        return ttft_s
    if measure == "tpot":
        return None if ttft_s is None or generated < 2 else (served.e2e_s - ttft_s) / (generated - 1)
    raise KeyError(f"unknown measure {measure!r}; known: e2e_latency, ttft, tpot")
