"""One cell of an engine: start it, send its requests one after the other, compare its outputs, report. Owns the clock.

A number is the host's clock around one request. Nothing else happens inside that interval: prompts are drawn before,
outputs are compared after the last request. Does not own processes (`serving`) nor how an engine is driven (`engines`).
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

from smbench.worker import outputs, telemetry
from smbench.worker.cellprocess import Say
from smbench.worker.engines import Completion, Engine, UnsupportedByEngine, driver, setup_of
from smbench.worker.prompts import prompt

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


def run(job: Mapping[str, Any], say: Say, imported: bool) -> None:
    """Measure one cell and emit its `result`, with a `request` for each that is answered. Never raises for an engine.

    `imported` says that the engine was imported before this process began.
    """
    started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
    phases: dict[str, float] = {}
    result: dict[str, Any] = {"phases_s": phases}
    began = time.perf_counter()
    cell = _Cell(job, say, phases)
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
    say("result", {"cell_id": job["cell_id"], "started_at": started_at, **result})
    cell.close()


def first_line(error: BaseException) -> str:
    """What an exception says, in one line."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), "no message")


class _Cell:
    """A cell at work."""

    def __init__(self, job: Mapping[str, Any], say: Say, phases: dict[str, float]) -> None:
        self._job = job
        self._wanted = job["engine"]
        self._say = say
        self._phases = phases
        self._engine: Engine | None = None

    def measure(self, imported: bool) -> dict[str, Any]:
        """Everything in order; what the engine raises passes through."""
        chosen = driver(self._wanted["engine"])
        if not imported:
            with self._phase("import"):
                chosen.preload()
        setup = setup_of(self._job)
        with self._phase("inputs"):
            prompts = self._prompts()
        with self._phase("start"):
            self._engine = engine = chosen.start(setup)
        on_gpu = setup.device == "cuda"
        sampler = telemetry.open_telemetry() if on_gpu else telemetry.NullSampler("runs on the CPU")
        with sampler, self._phase("generate"):
            began = time.monotonic()
            served = [self._request(engine, tokens) for tokens in prompts]
            window = sampler.window(began, time.monotonic())
        memory = dict(engine.memory())
        output = None
        if self._wanted["compare"]:
            with self._phase("check"):
                counted = served[self._wanted["requests"]["warmup"] :]
                output = outputs.check(engine, setup, [(s.prompt, s.completion.token_ids) for s in counted[:COMPARED]])
        return {
            "serving": {
                "engine": self._wanted["engine"],
                "version": engine.version,
                "kernels": {role: dict(found) for role, found in engine.kernels.items()},
                "settings": dict(engine.settings),
                "requests": [entry.record() for entry in served],
                "memory": memory,
                "output": output,
            },
            "selection": {"source": "library", "config": {}, "kernels": {}},
            "work": self._wanted["work"].get("e2e_latency"),
            "telemetry": window,
            **self._outcome(served, output),
        }

    def close(self) -> None:
        """End the engine; what goes wrong then is only worth a line in the log, since the process ends too."""
        if self._engine is None:
            return
        try:
            self._engine.close()
        # the result is out already
        except Exception:  # noqa: BLE001
            traceback.print_exc(file=sys.stderr)

    def _prompts(self) -> list[list[int]]:
        """The prompts of all requests, warm-ups first."""
        counts, axes = self._wanted["requests"], self._job["axes"]
        return [
            prompt(self._job["seed"], self._wanted["model"]["vocabulary"], int(axes["input_len"]), index)
            for index in range(counts["warmup"] + counts["samples"])
        ]

    def _request(self, engine: Engine, tokens: Sequence[int]) -> Served:
        output_len = int(self._job["axes"]["output_len"])
        began = time.perf_counter()
        completion = engine.generate(tokens, output_len)
        e2e_s = time.perf_counter() - began
        # the host's watchdog sees that the cell is alive
        self._say("request", {"cell_id": self._job["cell_id"]})
        return Served(tokens, completion, e2e_s)

    def _outcome(self, served: Sequence[Served], output: Mapping[str, Any] | None) -> dict[str, Any]:
        if output is not None and not output["passed"]:
            return {"status": "incorrect", "reason": "; ".join(output["faults"])}
        if self._job["untimed_reason"] is not None:
            return {"status": "verified", "reason": self._job["untimed_reason"]}
        return {"status": "ok", "reason": None, "measurements": self._measurements(served)}

    def _measurements(self, served: Sequence[Served]) -> list[dict[str, Any]]:
        """A measure that the engine's clock does not give is left out: the request records say why."""
        warmup = self._wanted["requests"]["warmup"]
        rows = []
        for name in self._wanted["measures"]:
            values = [value for entry in served if (value := _value(name, entry)) is not None]
            if len(values) < len(served):
                sys.stderr.write(f"{name}: the engine does not tell when a request's first token was there\n")
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
