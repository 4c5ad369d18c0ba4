"""Serves the cells of a request whose subject is an engine: each in a process of its own, one after the other.

Owns the order of cells, what is left behind between two of them, and what a cell's end means. The engine is imported
once, before the first cell, and every cell is forked from there: importing takes an engine 10 to 20 s, and a fork of it
milliseconds. Does not own what happens in a cell (`enginecell`).
"""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from smbench.identity import environment_id
from smbench.worker import enginecell, sharegpt
from smbench.worker.cellprocess import CellProcess, Say, last_words, tail
from smbench.worker.engines import Driver, driver
from smbench.worker.processes import adopt_orphans, end_descendants, kernel_memory_kills
from smbench.worker.tracing import Tracing, nothing

MEMORY_SLACK_BYTES = 256 << 20
"""A GPU counts as free again with this much more in use than before the first cell."""
MEMORY_WAIT_S = 30.0
MEMORY_POLL_S = 0.1
ONLINE = "online"
"""The workload whose cells are servers under a load client (`online`)."""
LOG_TAIL_BYTES = 20_000
"""How much of a dead cell's log is searched for the words of an allocator."""


class Events(Protocol):
    """The stream to the host."""

    def emit(self, event: str, **fields: Any) -> None: ...


def serve_cells(request: dict[str, Any], events: Events) -> int:
    """Answer a request: every job gets its `result`, or `died` with the reason; the exit code of the worker.

    With `alone` in the request this is the process of one cell, started by another worker.
    """
    jobs: list[dict[str, Any]] = request["jobs"]
    if request.get("alone"):
        _alone(request, events)
        return 0
    if faults := refusals(jobs):
        events.emit("refused", errors=faults)
        return 2
    adopt_orphans()
    name = jobs[0]["engine"]["engine"]
    logs = Path(request["logs"])
    logs.mkdir(parents=True, exist_ok=True)
    batches = [job for job in jobs if job["subject"] != ONLINE]
    # servers are programs of their own, which import the engine themselves
    broken = _preload(driver(name), request["device"], batches) if batches else None
    facts, forked = _environment(request["device"], logs)
    if not forked:
        sys.stderr.write(
            f"a fork sees no GPU once {name} is imported: every cell is a new program that imports it again\n"
        )
    events.emit("ready", environment_id=environment_id(facts), environment=facts, timer_checks=[])
    cells = _Cells(events, logs, forked, request, _used_bytes(logs) if request["device"] == "cuda" else None)
    for job in batches:
        events.emit("start", cell_id=job["cell_id"])
        if broken is not None:
            events.emit("died", cell_id=job["cell_id"], status="crashed", reason=broken)
        else:
            cells.serve(job)
    if loads := [job for job in jobs if job["subject"] == ONLINE]:
        from smbench.worker import online

        online.serve_cells(loads, request, events)
    events.emit("done")
    return 0


def _alone(request: Mapping[str, Any], events: Events) -> None:
    """The one cell of this program."""

    def say(event: str, fields: Mapping[str, Any]) -> None:
        events.emit(event, **fields)

    (job,) = request["jobs"]
    if request.get("recorded"):
        enginecell.record(job, say)
    else:
        enginecell.run(job, say, imported=False, trace=_trace(request))


def _trace(request: Mapping[str, Any]) -> Tracing | None:
    """The profiler that was asked for, and where traces go."""
    tool = request.get("trace")
    return None if tool is None else Tracing(str(tool), Path(request["folder"]))


def refusals(jobs: Sequence[Mapping[str, Any]]) -> list[str]:
    """What makes the request impossible as a whole: unknown or several engines, unknown settings, no prompts."""
    faults: dict[str, None] = {}
    names = list(dict.fromkeys(job["engine"]["engine"] for job in jobs))
    if len(names) > 1:
        faults[f"one worker serves one engine, and the request has {', '.join(names)}"] = None
    for job in jobs:
        try:
            known = driver(job["engine"]["engine"]).SETTINGS
        except KeyError as error:
            faults[str(error.args[0])] = None
            continue
        for key in job["engine"]["settings"].keys() - known.keys():
            at = f"providers.{job['provider']}.settings.{key}"
            faults[f"{at}: unknown setting of engine {names[0]!r}; known: {', '.join(known) or 'none'}"] = None
    for file in {job["engine"]["sharegpt"] for job in jobs if job["axes"].get("dataset") == "sharegpt"}:
        try:
            # read once: cells are forked from here
            sharegpt.questions(Path(file))
        except (sharegpt.NotShareGpt, OSError) as error:
            faults[str(error)] = None
    return list(faults)


@dataclass(frozen=True, slots=True)
class _Cells:
    """What all cells of a request share."""

    events: Events
    logs: Path
    forked: bool
    request: Mapping[str, Any]
    idle_bytes: int | None
    """GPU memory in use before the first cell; None without a GPU, or where nobody can tell."""

    def serve(self, job: Mapping[str, Any]) -> None:
        """One cell from its process's beginning to the last of its traces."""
        kills_before = kernel_memory_kills()
        log = self.logs / f"{job['cell_id']}.log"
        request_file = self.logs / f"{job['cell_id']}.request.json"
        process = self._process(job, log, request_file)
        asked = _trace(self.request)
        recorded = asked is not None and asked.tool == "nsys"
        result: dict[str, Any] | None = None
        measured: dict[str, Any] | None = None
        for event in process.events():
            if event["event"] == "request":
                self.events.emit("request", cell_id=job["cell_id"])
            elif event["event"] == "result":
                result = {key: value for key, value in event.items() if key != "event"}
                if not recorded:
                    self.events.emit("result", **result)
            elif event["event"] == "measured":
                measured = {key: value for key, value in event.items() if key != "event"}
        request_file.unlink(missing_ok=True)
        if left := end_descendants():
            sys.stderr.write(f"{log.stem}: ended {left} processes that the cell left behind\n")
        if result is None and measured is not None:
            # the numbers were there before the profiler took the process with it
            died = nothing("torch.profiler", f"the cell's process died under the profiler ({process.cause()})")
            result = {**measured, "serving": {**measured["serving"], "trace": died}}
            self.events.emit("result", **result)
        elif result is None:
            status, reason = _death(process, kills_before)
            self.events.emit("died", cell_id=job["cell_id"], status=status, reason=reason)
        if self.idle_bytes is not None:
            # the driver takes back a dead process's memory a while after its end
            used = _used_bytes(self.logs, until=self.idle_bytes + MEMORY_SLACK_BYTES)
            if used is not None and used > self.idle_bytes + MEMORY_SLACK_BYTES:
                sys.stderr.write(f"{used} bytes of the GPU stay in use, {self.idle_bytes} were before the first cell\n")
        if asked is not None and recorded and result is not None:
            self.events.emit("result", **self._recorded(asked, job, result))

    def _recorded(self, asked: Tracing, job: Mapping[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        """A result with a recording by nsys, for which the cell runs once more, now that its own process is gone."""
        if result["status"] not in ("ok", "verified"):
            return result
        from smbench.worker import nsys

        trace = nsys.take(asked, self.request, job, self.logs)
        end_descendants()
        return {**result, "serving": {**result["serving"], "trace": trace}}

    def _process(self, job: Mapping[str, Any], log: Path, request_file: Path) -> CellProcess:
        if self.forked:
            return CellProcess.fork(
                log, lambda say: enginecell.run(job, say, imported=True, trace=_trace(self.request))
            )
        alone = {**self.request, "alone": True, "jobs": [job]}
        request_file.write_text(json.dumps(alone), encoding="utf-8")
        return CellProcess.start(log, [sys.executable, "-m", "smbench.worker", str(request_file)])


def _preload(chosen: Driver, device: str, jobs: Sequence[Mapping[str, Any]]) -> str | None:
    """Import the engine, and the reference where some cell is compared; why it cannot be had, None where it can."""
    os.environ.update(chosen.ENVIRONMENT)
    if device == "cpu":
        # one thread where the user says nothing: the same for every engine, and steady where cores are shared
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    try:
        chosen.preload()
        if any(job["engine"]["compare"] for job in jobs):
            driver("transformers").preload()
    # a broken installation raises whatever it likes, and is this engine's fault alone
    except Exception as error:  # noqa: BLE001
        traceback.print_exc(file=sys.stderr)
        return f"the engine cannot be imported: {type(error).__name__}: {enginecell.first_line(error)}"
    return None


def _environment(device: str, logs: Path) -> tuple[dict[str, Any], bool]:
    """The environment record, and whether forked children can use the GPU: taken in one, since it initializes CUDA."""

    def take(say: Say) -> None:
        from smbench.worker import environment

        facts = environment.capture()
        # whoever forks after CUDA was touched gets children that cannot use a device: torch raises, or sees none
        seen = device != "cuda" or facts["gpu"].get("sm_count") is not None
        say("environment", {"facts": facts, "seen": seen})

    for event in _events_of_fork(logs / "environment.log", take):
        if event["seen"]:
            return event["facts"], True
    alone = subprocess.run(
        [sys.executable, "-m", "smbench.worker.environment"], stdout=subprocess.PIPE, check=True, text=True
    )
    facts = json.loads(alone.stdout)
    facts.pop("environment_id")
    return facts, device != "cuda"


def _used_bytes(logs: Path, until: float = math.inf) -> int | None:
    """GPU memory in use, once it is at most `until` or a limit of time has passed; None where nobody can tell.

    Read in a child, so that nothing of NVML is open here when a cell is forked.
    """

    def take(say: Say) -> None:
        from smbench.nvml import NvmlUnavailable, instant, open_gpu

        try:
            gpu = open_gpu()
        except NvmlUnavailable as error:
            sys.stderr.write(f"{error}\n")
            return
        deadline = time.monotonic() + MEMORY_WAIT_S
        used = instant(gpu).get("memory_used_bytes")
        while used is not None and used > until and time.monotonic() < deadline:
            time.sleep(MEMORY_POLL_S)
            used = instant(gpu).get("memory_used_bytes")
        say("used", {"bytes": used})

    return next((event["bytes"] for event in _events_of_fork(logs / "memory.log", take)), None)


def _events_of_fork(log: Path, take: Callable[[Say], None]) -> list[dict[str, Any]]:
    """The events of a short child, once it has ended; its words go to the worker's own log."""
    events = list(CellProcess.fork(log, take).events())
    sys.stderr.write(tail(log, LOG_TAIL_BYTES))
    log.unlink(missing_ok=True)
    return events


def _death(process: CellProcess, kills_before: int | None) -> tuple[str, str]:
    """Status and reason of a cell whose process ended without a result."""
    cause, words = process.cause(), last_words(process.log)
    said = f": … {words}" if words else ""
    if cause == "killed by SIGKILL" and kills_before is not None and kernel_memory_kills() != kills_before:
        return "oom", f"the kernel killed the cell's process for want of memory{said}"
    if re.search(enginecell.OUT_OF_MEMORY, tail(process.log, LOG_TAIL_BYTES)):
        return "oom", f"the cell's process ended out of memory ({cause}){said}"
    return "crashed", f"the cell's process died ({cause}){said}"
