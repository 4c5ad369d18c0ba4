"""Cells of the workload `online`: an engine's own server under a load client, one cell after the other.

Cells whose servers have the same command share one server while they follow each other; after a cell that went wrong
the next one gets a server of its own. Owns the order and what an ending means for a cell. Does not own the server
(`server`), the client (`loadclient`), what its file says (`loadresult`), nor what a server tells of itself
(`serverfacts`).
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from smbench.worker import byhand, loadclient, loadresult, loopback, sentprompts, serverfacts, telemetry, warden
from smbench.worker.cellprocess import last_words
from smbench.worker.enginecell import first_line
from smbench.worker.engines import Driver, ServeCommand, Setup, UnsupportedByEngine, driver, setup_of
from smbench.worker.gpumemory import Idle
from smbench.worker.processes import kernel_memory_kills
from smbench.worker.sentprompts import Sent
from smbench.worker.server import Server, ServerFailed, start
from smbench.worker.sharegpt import NotShareGpt

OWN_SHARE = 0.8
"""Of the host's limit for a silent cell: whoever waits here gives up first, and can say what for."""
TIME_LIMIT_S = 600.0
"""Where the request has no limit."""
MOST_MISMATCHES = 3


class Events(Protocol):
    """The stream to the host."""

    def emit(self, event: str, **fields: Any) -> None: ...


def serve_cells(jobs: Sequence[Mapping[str, Any]], request: Mapping[str, Any], events: Events) -> None:
    """Serve every cell: each gets `start`, `request` while it lives, and `result`. No server is left afterwards."""
    cells = _Cells(request, events)
    try:
        for job in jobs:
            events.emit("start", cell_id=job["cell_id"])
            events.emit("result", cell_id=job["cell_id"], **cells.serve(job))
    finally:
        cells.end_server()


@dataclass(frozen=True, slots=True)
class _Outcome:
    """What became of a load."""

    status: str
    reason: str
    load: dict[str, Any] | None = None
    turns: loadclient.Turns | None = None


class _Cells:
    """What the cells of a request share: above all a server."""

    def __init__(self, request: Mapping[str, Any], events: Events) -> None:
        self._events = events
        self._logs = Path(request["logs"])
        self._logs.mkdir(parents=True, exist_ok=True)
        self._folder = Path(request["folder"])
        self._limit_s = OWN_SHARE * float(request.get("time_limit_s") or TIME_LIMIT_S)
        self._client = Path(request.get("client_python") or sys.executable)
        self._idle = Idle(request["device"])
        self._server: Server | None = None
        self._shared: ServeCommand | None = None
        """The server's command without its port."""
        self._imported = False
        if request["device"] == "cpu":
            # one thread where the user says nothing, as for cells without a server
            os.environ.setdefault("OMP_NUM_THREADS", "1")

    def serve(self, job: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of a cell's result. Never raises for an engine, a server or a client."""
        started_at = datetime.now(UTC).isoformat(timespec="milliseconds")
        began = time.perf_counter()
        phases: dict[str, float] = {}
        try:
            result = _Cell(self, job, phases).measure()
        except UnsupportedByEngine as error:
            result = {"status": "unsupported", "reason": str(error)}
        except ServerFailed as failed:
            result = {"status": failed.status, "reason": failed.reason}
        except NotShareGpt as error:
            result = {"status": "unsupported", "reason": str(error)}
        # whatever else goes wrong is that cell's outcome, with its traceback in the worker's log
        except Exception as error:  # noqa: BLE001
            traceback.print_exc(file=sys.stderr)
            result = {"status": "crashed", "reason": f"{type(error).__name__}: {first_line(error)}"}
        if result["status"] not in ("ok", "verified"):
            # what shape such a server is in nobody knows
            self.end_server()
        phases["total"] = time.perf_counter() - began
        return {"started_at": started_at, "phases_s": phases, **result}

    def server(self, job: Mapping[str, Any], setup: Setup) -> Server:
        """The server of a cell, ready: the one that runs, if it is the same and lives. ServerFailed where none is."""
        chosen = driver(job["engine"]["engine"])
        if not self._imported:
            # the first time the engine may be imported, which sets variables of its own: they are none of the command's
            _command(chosen, setup, 0)
            self._imported = True
        command = _command(chosen, setup, 0)
        if self._server is not None and self._shared == command and self._server.ready():
            return self._server
        self.end_server()
        self._server = start(
            lambda port: _command(chosen, setup, port),
            self._logs / f"{job['cell_id']}.server.log",
            self._limit_s,
            lambda: self.beat(job),
        )
        self._shared = command
        return self._server

    def end_server(self) -> None:
        """End the server that runs, and wait until the device is as it was before."""
        if self._server is not None:
            self._server.stop()
            self._server = self._shared = None
            self._idle.wait()

    def beat(self, job: Mapping[str, Any]) -> None:
        """Let the host's watchdog see that the cell lives."""
        self._events.emit("request", cell_id=job["cell_id"])

    def run(self, job: Mapping[str, Any], load: loadclient.Load, server: Server, folder: Path) -> loadclient.Run:
        """The load client's run, with `folder` for its files."""
        return loadclient.run(
            self._client,
            load,
            server,
            folder,
            Path(job["engine"]["model"]["path"]),
            self.client_log(job),
            self._limit_s,
            lambda: self.beat(job),
        )

    def client_log(self, job: Mapping[str, Any]) -> Path:
        """Where the client's words go."""
        return self._logs / f"{job['cell_id']}.client.log"

    @property
    def limit_s(self) -> float:
        """How long anything may be silent."""
        return self._limit_s

    @property
    def folder(self) -> Path:
        """The run folder."""
        return self._folder


def _command(chosen: Driver, setup: Setup, port: int) -> ServeCommand:
    """The command of a cell's server with all that its environment has beyond this process's."""
    before = dict(os.environ)
    try:
        # some look into the engine to name its arguments, and so import it here; some choose a kernel by a variable
        os.environ.update(chosen.ENVIRONMENT)
        command = chosen.serve_command(setup, loopback.HOST, port)
        changed = {name: value for name, value in os.environ.items() if before.get(name) != value}
    finally:
        os.environ.clear()
        os.environ.update(before)
    return dataclasses.replace(command, environment={**chosen.ENVIRONMENT, **changed, **command.environment})


class _Cell:
    """A cell at work."""

    def __init__(self, cells: _Cells, job: Mapping[str, Any], phases: dict[str, float]) -> None:
        self._cells = cells
        self._job = job
        self._wanted = job["engine"]
        self._phases = phases

    def measure(self) -> dict[str, Any]:
        """Everything in order; what server and engine raise passes through."""
        setup = setup_of(self._job)
        with self._phase("inputs"):
            sent = sentprompts.of(self._job)
        with self._phase("start"):
            server = self._cells.server(self._job, setup)
        facts = serverfacts.told(server)
        with self._phase("probe"):
            facts["probes"], fault = self._probe(server, sent, setup)
        if fault is not None:
            return {"status": "incorrect", "reason": fault, **self._serving(server, facts, sent, None)}
        on_gpu = setup.device == "cuda"
        sampler = telemetry.open_telemetry() if on_gpu else telemetry.NullSampler("runs on the CPU")
        with sampler, self._phase("load"):
            began = time.monotonic()
            outcome = self._load(server, sent)
            window = sampler.window(began, time.monotonic())
        if outcome.turns is not None:
            facts["load_client"] = dataclasses.asdict(outcome.turns)
        result = {**self._serving(server, facts, sent, outcome.load), "telemetry": window}
        if outcome.status != "ok" or outcome.load is None:
            return {**result, "status": outcome.status, "reason": outcome.reason}
        if self._job["untimed_reason"] is not None:
            return {**result, "status": "verified", "reason": self._job["untimed_reason"]}
        rows = loadresult.measurements(outcome.load, self._wanted["measures"], self._wanted["work"])
        return {**result, "status": "ok", "reason": None, "measurements": rows}

    def _probe(self, server: Server, sent: Sent, setup: Setup) -> tuple[list[dict[str, Any]], str | None]:
        """Ask the same twice: how the server counts, and whether it remembers; what is wrong with that, or None."""
        found: list[dict[str, Any]] = []
        for _ in range(2):
            try:
                probe = serverfacts.probe(server, sent.prompts[0], setup.output_len, self._cells.limit_s)
            except loopback.NoAnswer as error:
                # the load will tell how many requests fail
                sys.stderr.write(f"{self._job['cell_id']}: a request before the load failed: {error}\n")
                return found, None
            self._cells.beat(self._job)
            found.append(dataclasses.asdict(probe))
            asked = (sent.lengths[0] if sent.exact else probe.prompt_tokens, setup.output_len)
            if (probe.prompt_tokens, probe.completion_tokens) != asked:
                return found, (
                    f"the server counts {probe.prompt_tokens} prompt and {probe.completion_tokens} generated tokens, "
                    f"{asked[0]} and {asked[1]} were asked"
                )
        if found[1]["cached_tokens"] and not setup.prefix_caching:
            return found, (
                f"the server took {found[1]['cached_tokens']} of {found[1]['prompt_tokens']} prompt tokens from a "
                "cache of prefixes, which was to be off"
            )
        return found, None

    def _load(self, server: Server, sent: Sent) -> _Outcome:
        """Run the client and judge how it ended."""
        axes = self._job["axes"]
        load = loadclient.Load(
            prompts=sent.prompts,
            output_len=int(axes["output_len"]),
            request_rate=str(axes["request_rate"]),
            max_concurrency=int(axes["max_concurrency"]),
            warmups=int(self._wanted["requests"]["warmup"]),
            seed=int(self._job["seed"]),
        )
        kills_before = kernel_memory_kills()
        with tempfile.TemporaryDirectory(prefix="smbench-load-") as private:
            run = self._cells.run(self._job, load, server, Path(private))
            answers, fault = self._answers(run, len(load.prompts))
        found = None if answers is None else self._record(answers)
        if run.ending == "silent":
            return _Outcome(
                "timeout",
                f"no request was done within {self._cells.limit_s:g} s, {run.done} of {len(load.prompts)} were before; "
                f"the server{server.quoted() or ' said nothing'}",
                found,
            )
        if run.ending == "server died":
            out_of_memory = server.out_of_memory() or kernel_memory_kills() != kills_before
            return _Outcome(
                "oom" if out_of_memory else "crashed", self._death(server, run, found, len(sent.prompts)), found
            )
        if run.file is None and loadclient.is_missing(self._cells.client_log(self._job)):
            return _Outcome(
                "skipped", "the load client, vllm bench serve, is not here; make stack STACK=vllm installs it"
            )
        if answers is None or found is None:
            return _Outcome("crashed", f"{fault}: … {last_words(self._cells.client_log(self._job))}")
        return dataclasses.replace(self._judged(answers, found, sent), turns=run.turns)

    def _answers(self, run: loadclient.Run, count: int) -> tuple[loadresult.Answers | None, str]:
        """What the client's file says; the fault where it has none, or none that can be believed."""
        if run.file is None:
            return None, f"the load client ended with no result ({warden.cause(run.code)})"
        try:
            return loadresult.read(run.file, count), ""
        except loadresult.NotALoad as error:
            return None, str(error)

    def _record(self, answers: loadresult.Answers) -> dict[str, Any]:
        """The load record, with the client's file in its place."""
        sha256 = loadresult.keep(answers, self._cells.folder, self._job["cell_id"])
        return loadresult.load(answers, loadclient.version(answers.native), self._job["cell_id"], sha256)

    def _death(self, server: Server, run: loadclient.Run, found: Mapping[str, Any] | None, count: int) -> str:
        """What a dead server leaves."""
        counts = (
            f"{run.done} of {count} requests were done"
            if found is None
            else f"{found['completed']} of {count} requests were completed and {found['failed']} failed"
        )
        return f"the server died during the load, {counts} ({server.cause()})"

    def _judged(self, answers: loadresult.Answers, found: dict[str, Any], sent: Sent) -> _Outcome:
        """A load that was run to its end: whether every request was what was asked."""
        if found["failed"]:
            kinds = ", ".join(f"{kind} {count}" for kind, count in answers.kinds.items())
            return _Outcome("incorrect", f"{found['failed']} of {len(sent.prompts)} requests failed: {kinds}", found)
        asked = sent.lengths if sent.exact else answers.prompt_tokens
        if wrong := answers.mismatches(asked, int(self._job["axes"]["output_len"])):
            shown = "; ".join(wrong[:MOST_MISMATCHES])
            return _Outcome(
                "incorrect", f"{len(wrong)} of {len(sent.prompts)} requests are not what was asked: {shown}", found
            )
        return _Outcome("ok", "", found)

    def _serving(
        self, server: Server, facts: Mapping[str, Any], sent: Sent, load: Mapping[str, Any] | None
    ) -> dict[str, Any]:
        """What is stored of the server, whatever became of the load."""
        command, axes = server.command, self._job["axes"]
        warmups = int(self._wanted["requests"]["warmup"])
        settings = {
            **command.settings,
            "prompts_sent_as": sent.form,
            "server": facts,
            "server_command": byhand.server(command, Path(self._wanted["model"]["path"]), server.port),
            "client_command": byhand.client(axes, command.model, int(self._job["seed"]), warmups),
        }
        return {
            "serving": {
                "engine": self._wanted["engine"],
                "version": command.version,
                "kernels": serverfacts.kernels(server.log, facts),
                "settings": settings,
                "memory": serverfacts.memory(server.log),
                "prompts": sent.record,
                "load": load,
            },
            "selection": {"source": "library", "config": {}, "kernels": {}},
            "work": self._wanted["work"].get("e2e_latency"),
        }

    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._phases[name] = self._phases.get(name, 0.0) + time.perf_counter() - began
