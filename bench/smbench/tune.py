"""Tuning on the host's side: which points, the journal that lets it go on, the configuration files. Measures nothing.

A journal (one JSON line a point, fsynced) is the memory of a tuning run; the configuration files that providers read
are written from it at the end, and when it is interrupted.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from smbench_kernels import configs

from smbench.cell import AxisValue, canonical_json
from smbench.errors import UsageError
from smbench.plan import Plan
from smbench.runner import WorkerCannotStart
from smbench.workerprocess import WORKER, Refused, WorkerProcess, WorkerStopped

POINT_LIMIT_S = 600.0
"""Compiling everything ahead, or searching one point, never takes this long."""

TunedPoint = tuple[str, Mapping[str, AxisValue]]


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a tuning session did."""

    points: int
    """Points that have a configuration now."""
    searched: int
    """Points that this session searched."""
    wall_s: float
    compile_s: float
    binaries: int
    timed: int
    """Configurations that ran, of all that the spaces of the searched points hold."""
    candidates: int
    files: Sequence[Path]


def points_of(plan: Plan) -> list[TunedPoint]:
    """The distinct points that the plan measures with a tuned configuration. UsageError when there are none."""
    found: dict[str, TunedPoint] = {}
    for entry in plan.entries:
        if plan.recipe.providers[entry.cell.provider].selection == "tuned":
            found.setdefault(canonical_json([entry.cell.subject, entry.cell.axes]), (entry.cell.subject, entry.cell.axes))
    if not found:
        raise UsageError(
            f"recipe {plan.recipe.name!r}, profile {plan.profile_name!r}: no provider has selection 'tuned', "
            "so there is nothing to tune"
        )
    return list(found.values())


def tune(
    plan: Plan,
    folder: Path,
    device_name: str,
    memory_bytes_per_s: float | None,
    quality_points: int,
    on_point: Callable[[Mapping[str, Any]], None],
    worker_command: Sequence[str] = WORKER,
) -> Tuned:
    """Search every point that the folder's journal does not have, then write the configuration files.

    The caller holds the folder's lock. Whatever ends it early, finished points are kept in the journal and the files.
    """
    began = time.monotonic()
    points = points_of(plan)
    journal = Journal(folder / "journal.jsonl", device_name)
    missing = [point for point in points if _key(*point) not in journal.outcomes]
    searched: list[Mapping[str, Any]] = []
    compiled: Mapping[str, Any] = {"binaries": 0, "seconds": 0.0}
    request = {
        "device": "cuda",
        "measures": [],
        "seed": plan.recipe.seed,
        "memory_bytes_per_s": memory_bytes_per_s,
        "quality_points": quality_points,
        "points": [{"subject": subject, "axes": dict(axes)} for subject, axes in missing],
        "known": [outcome for outcome in journal.outcomes.values() if "config" in outcome],
    }
    try:
        if missing or quality_points:
            for event in _events(folder, request, worker_command):
                if event["event"] == "compiled":
                    compiled = event
                elif event["event"] in ("tuned", "quality"):
                    journal.append(event)
                    searched += [event] if event["event"] == "tuned" else []
                    on_point(event)
    finally:
        files = configs.save_tuned(device_name, list(journal.outcomes.values()))
    return Tuned(
        sum("config" in outcome for outcome in journal.outcomes.values()),
        len(searched),
        time.monotonic() - began,
        compiled["seconds"],
        compiled["binaries"],
        sum(outcome.get("timed", 0) for outcome in searched),
        sum(outcome.get("candidates", 0) for outcome in searched),
        files,
    )


class Journal:
    """Outcomes by point, on disk as they come. A torn last line is dropped: that point is searched again."""

    def __init__(self, path: Path, device_name: str) -> None:
        self._path = path
        self.outcomes: dict[str, Mapping[str, Any]] = {}
        self.qualities: list[Mapping[str, Any]] = []
        if path.exists():
            whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            path.write_bytes(b"".join(whole))
            for line in whole:
                self._take(json.loads(line), device_name)

    def append(self, event: Mapping[str, Any]) -> None:
        """Keep an outcome; it is on the disk when this returns."""
        self._take(event, None)
        with self._path.open("ab") as file:
            file.write((canonical_json(event) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def _take(self, event: Mapping[str, Any], device_name: str | None) -> None:
        if event["event"] == "tuned":
            self.outcomes[_key(event["subject"], event["axes"])] = event
        else:
            self.qualities.append(event)


def _events(folder: Path, request: Mapping[str, Any], command: Sequence[str]) -> Iterator[Mapping[str, Any]]:
    with WorkerProcess(folder, request, interpreted=False, command=command) as worker:
        try:
            yield from worker.events(POINT_LIMIT_S)
        except Refused as refusal:
            raise UsageError("; ".join(refusal.errors)) from refusal
        except WorkerStopped as stopped:
            raise WorkerCannotStart(stopped.reason) from stopped


def _key(subject: str, axes: Mapping[str, AxisValue]) -> str:
    return canonical_json([subject, dict(axes)])
