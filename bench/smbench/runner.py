"""Runs a plan in a folder: workers, time limits, statuses, interruptions. Owns the order of things, not the measuring.

Cells of one group share a worker process, since starting one costs seconds and a kernel microseconds; a cell that
breaks its process (crash, hang) is given its status and the rest goes on in a fresh one. Every result is on the disk
before the next one is looked at, so that stopping anywhere loses at most the cell at hand.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from smbench import models, stacks
from smbench.errors import UsageError
from smbench.plan import Plan, Planned
from smbench.result import Environment, Result, Session, Status
from smbench.runfolder import Appender, create, load
from smbench.workerprocess import WORKER_MODULE, Refused, WorkerProcess, WorkerStopped

MOST_STARTS_WITHOUT_RESULT = 2
"""A worker that dies this often before its first cell will not do better a third time."""

OnResult = Callable[[Result], None]


class WorkerCannotStart(Exception):
    """No worker came up; the message carries its last words. Exit code 1: nothing is wrong with what was asked."""


@dataclass(slots=True)
class _Tally:
    """What a session adds up to."""

    started_at: str
    began: float
    worker_start_s: float = 0.0
    compile_s: float = 0.0
    workers: int = 0
    results: int = 0
    price_per_hour: float | None = None
    timer_checks: list[Mapping[str, Any]] = field(default_factory=list)

    def session(self, ended: Literal["finished", "interrupted", "failed"]) -> Session:
        return Session(
            started_at=self.started_at,
            wall_s=time.monotonic() - self.began,
            worker_start_s=self.worker_start_s,
            compile_s=self.compile_s,
            workers=self.workers,
            results=self.results,
            ended=ended,
            price_per_hour=self.price_per_hour,
            timer_checks=tuple(self.timer_checks),
        )


def run(
    plan: Plan,
    folder: Path,
    on_result: OnResult,
    on_warning: Callable[[str], None],
    worker_command: Sequence[str] | None = None,
    price_per_hour: float | None = None,
    trace: str | None = None,
) -> None:
    """Measure every cell of a plan that has no result in the folder or was skipped. The caller holds the folder's lock.

    `worker_command` stands for the plan's own choice of a Python for each stack; `price_per_hour` is what the machine
    costs, in the caller's currency; `trace` names a profiler that one more repetition of each batch runs under.

    KeyboardInterrupt passes through after the session is recorded; OSError when the disk is full, with all results
    that were appended intact; UsageError when the worker refuses the request; WorkerCannotStart when none comes up.
    """
    cells = [entry.cell for entry in plan.entries]
    create(folder, plan.recipe_text, plan.recipe.name, plan.profile_name, cells)
    with Appender(folder) as appender:
        if appender.set_aside:
            on_warning(appender.set_aside)
        before = load(folder)
        known = {environment.environment_id for environment in before.environments}
        session = _RunSession(plan, folder, appender, on_result, on_warning, known, worker_command, trace)
        session.tally.price_per_hour = price_per_hour
        ended: Literal["finished", "interrupted", "failed"] = "failed"
        try:
            done = {cell_id: result.status for cell_id, result in before.results.items()}
            session.measure([entry for entry in plan.entries if _is_missing(entry, done.get(entry.cell.cell_id))])
            ended = "finished"
        except KeyboardInterrupt:
            ended = "interrupted"
            raise
        finally:
            # nothing done is nothing to record: a repeated command leaves a finished folder as it was
            if session.tally.results:
                appender.append(session.tally.session(ended))


class _RunSession:
    """One invocation of `run`."""

    def __init__(
        self,
        plan: Plan,
        folder: Path,
        appender: Appender,
        on_result: OnResult,
        on_note: Callable[[str], None],
        known_environments: set[str],
        worker_command: Sequence[str] | None,
        trace: str | None,
    ) -> None:
        self._plan = plan
        self._folder = folder
        self._appender = appender
        self._on_result = on_result
        self._on_note = on_note
        self._known = known_environments
        self._worker_command = worker_command
        self._trace = trace
        self._last_words = "none"
        self.tally = _Tally(_now(), time.monotonic())

    def measure(self, missing: Sequence[Planned]) -> None:
        for entry in missing:
            if entry.unsupported:
                self._record(_without_number(entry, "unsupported", entry.unsupported))
            elif entry.skipped:
                self._record(_without_number(entry, "skipped", entry.skipped))
        runnable = sorted((entry for entry in missing if entry.runs), key=lambda entry: entry.group)
        for name in dict.fromkeys(str(entry.cell.axes["model"]) for entry in runnable if entry.job):
            python = next(entry.python for entry in runnable if entry.cell.axes.get("model") == name)
            if done := models.prepare(self._plan.models[name], python):
                self._on_note(done)
        for _, members in itertools.groupby(runnable, key=lambda entry: entry.group):
            self._measure_group(list(members))

    def _measure_group(self, waiting: list[Planned]) -> None:
        """Worker after worker until every cell of the group has a result."""
        fruitless = 0
        while waiting:
            done = self._one_worker(waiting)
            waiting = [entry for entry in waiting if entry.cell.cell_id not in done]
            fruitless = 0 if done else fruitless + 1
            if fruitless == MOST_STARTS_WITHOUT_RESULT:
                raise WorkerCannotStart(
                    f"the worker stopped {fruitless} times before its first result; its last words: {self._last_words}"
                )

    def _one_worker(self, waiting: Sequence[Planned]) -> set[str]:
        """Run one process over the waiting cells; the cell_ids that got a result."""
        entries = {entry.cell.cell_id: entry for entry in waiting}
        began = time.monotonic()
        self.tally.workers += 1
        done: set[str] = set()
        at_hand: Planned | None = None
        environment_id: str | None = None
        started_at, compiled_s = _now(), 0.0
        request = self._request(waiting)
        command = self._worker_command or (str(waiting[0].python), *WORKER_MODULE)
        with WorkerProcess(self._folder, request, waiting[0].interpreted, command) as worker:
            try:
                for event in worker.events(self._plan.profile.time_limit_s):
                    match event["event"]:
                        case "ready":
                            self.tally.worker_start_s += time.monotonic() - began
                            self.tally.timer_checks += event["timer_checks"]
                            environment_id = self._remember(event)
                        case "compiled":
                            if event["done"] == 0:
                                self._on_note(f"compiling {event['of']} kernels on all cores, before they are timed")
                            self.tally.compile_s += event["seconds"] - compiled_s
                            compiled_s = event["seconds"]
                        case "start":
                            at_hand, started_at = entries[event["cell_id"]], _now()
                        case "result":
                            self._record(_result(entries[event["cell_id"]], event, environment_id))
                            at_hand = None
                            done.add(event["cell_id"])
                        case "died":
                            # a process of its own ran the cell, so that the worker itself lives on
                            entry = entries[event["cell_id"]]
                            self._record(
                                _without_number(entry, event["status"], event["reason"], environment_id, started_at)
                            )
                            at_hand = None
                            done.add(event["cell_id"])
            except Refused as refusal:
                raise UsageError(f"recipe {self._plan.recipe.name!r}: " + "; ".join(refusal.errors)) from refusal
            except WorkerStopped as stopped:
                self._last_words = stopped.reason
                if at_hand is not None:
                    result = _without_number(at_hand, stopped.status, stopped.reason, environment_id, started_at)
                    self._record(result)
                    done.add(at_hand.cell.cell_id)
        return done

    def _request(self, entries: Sequence[Planned]) -> dict[str, Any]:
        profile = self._plan.profile
        return {
            "kind": self._plan.recipe.kind,
            "device": profile.device,
            "logs": str((self._folder / "logs").resolve()),
            "folder": str(self._folder.resolve()),
            "time_limit_s": profile.time_limit_s,
            "trace": self._trace,
            # whatever engine a server is of, its load client is vLLM's
            "client_python": str(stacks.here().python("vllm")),
            "measures": [row.model_dump(exclude={"title"}) for row in profile.measure],
            "jobs": [
                {
                    "cell_id": entry.cell.cell_id,
                    "subject": entry.cell.subject,
                    "provider": entry.cell.provider,
                    "axes": dict(entry.cell.axes),
                    "seed": entry.cell.seed,
                    "untimed_reason": entry.untimed,
                    **({"engine": entry.job.request} if entry.job else {}),
                }
                for entry in entries
            ],
        }

    def _remember(self, ready: Mapping[str, Any]) -> str:
        environment = Environment(environment_id=ready["environment_id"], environment=ready["environment"])
        if environment.environment_id not in self._known:
            self._known.add(environment.environment_id)
            self._appender.append(environment)
        return environment.environment_id

    def _record(self, result: Result) -> None:
        self._appender.append(result)
        self.tally.results += 1
        self._on_result(result)


def _result(entry: Planned, event: Mapping[str, Any], environment_id: str | None) -> Result:
    """The stored form of a worker's result; one that breaks the rules of its status counts as a crash."""
    fields = {key: value for key, value in event.items() if key not in ("event", "cell_id")}
    try:
        return Result(cell_id=entry.cell.cell_id, cell=entry.cell, environment_id=environment_id, **fields)
    except ValidationError as error:
        fault = error.errors()[0]
        where = ".".join(str(part) for part in fault["loc"])
        reason = f"the worker's result breaks its format: {where}: {fault['msg']}"
        return _without_number(entry, "crashed", reason, environment_id)


def _without_number(
    entry: Planned,
    status: Literal["unsupported", "skipped", "oom", "timeout", "crashed"],
    reason: str,
    environment_id: str | None = None,
    started_at: str | None = None,
) -> Result:
    return Result(
        cell_id=entry.cell.cell_id,
        cell=entry.cell,
        status=status,
        reason=reason,
        environment_id=environment_id,
        started_at=started_at or _now(),
    )


def _is_missing(entry: Planned, status: Status | None) -> bool:
    """Whether a cell still needs a result: one that was skipped does as soon as its stack is here."""
    return status is None or (status == "skipped" and entry.skipped is None)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")
