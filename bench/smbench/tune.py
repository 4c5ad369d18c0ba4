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

from smbench.cell import AxisValue
from smbench.errors import UsageError
from smbench.identity import canonical_json
from smbench.plan import Plan
from smbench.runner import WorkerCannotStart
from smbench.workerprocess import WORKER, Refused, WorkerProcess, WorkerStopped
from smbench_kernels import configs

POINT_LIMIT_S = 600.0
"""Compiling everything ahead, or searching one point, never takes this long."""

METHOD = "cold L2, CUDA graph of calls on distinct buffers, median; model-ordered screening, then successive halving"
"""What the files say of how their times were taken."""

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
    """Kernels that the search spaces need, compiled ahead on all cores."""
    timed: int
    """Configurations that ran, of all that the spaces of the searched points hold."""
    candidates: int
    files: Sequence[Path]
    qualities: Sequence[Mapping[str, Any]]
    """Points at which the choice was compared with an exhaustive search."""

    def summary(self) -> dict[str, Any]:
        """JSON-able, the ratios of the quality check sorted."""
        fields = {name: getattr(self, name) for name in ("points", "searched", "wall_s", "compile_s", "binaries")}
        return {
            **fields,
            "timed": self.timed,
            "candidates": self.candidates,
            "files": [path.name for path in self.files],
            "quality_ratios": sorted(entry["ratio"] for entry in self.qualities),
            "kept_ratios": sorted(entry["kept_ratio"] for entry in self.qualities),
        }

    def lines(self) -> list[str]:
        """The summary in words."""
        said = [
            f"{self.searched} points searched in {self.wall_s:.1f} s, {self.compile_s:.1f} s of them compiling "
            f"{self.binaries} kernels; {self.timed} of {self.candidates} configurations ran",
            f"{self.points} points have a configuration: {', '.join(path.name for path in self.files)}",
        ]
        for what, key in (("the search", "ratio"), ("what the files held", "kept_ratio")):
            ratios = sorted(entry[key] for entry in self.qualities)
            if ratios:
                within = sum(ratio <= 1.02 for ratio in ratios)
                said.append(
                    f"{what} against the exhaustive best of {len(ratios)} random points: {within} within 2 %, "
                    f"median {ratios[len(ratios) // 2]:.3f}, worst {ratios[-1]:.3f}"
                )
        return said


def points_of(plan: Plan) -> list[TunedPoint]:
    """The distinct points that the plan measures with a tuned configuration. UsageError when there are none."""
    found: dict[str, TunedPoint] = {}
    for entry in plan.entries:
        if plan.recipe.providers[entry.cell.provider].selection == "tuned":
            found.setdefault(
                canonical_json([entry.cell.subject, entry.cell.axes]), (entry.cell.subject, entry.cell.axes)
            )
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
    configs_root: Path | None = None,
    worker_command: Sequence[str] = WORKER,
) -> Tuned:
    """Search every point that the folder's journal does not have, then write the configuration files.

    The caller holds the folder's lock. Whatever ends it early, finished points are kept in the journal and the files.
    """
    began = time.monotonic()
    points = points_of(plan)
    journal = Journal(folder / "journal.jsonl")
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
                if event["event"] == "ready":
                    journal.triton = event["environment"]["libraries"].get("triton", "unknown")
                elif event["event"] == "compiled":
                    compiled = event
                elif event["event"] in ("tuned", "quality"):
                    journal.append(event)
                    searched += [event] if event["event"] == "tuned" else []
                    on_point(event)
    finally:
        files = write_configurations(device_name, journal, configs_root or configs.ROOT)
    return Tuned(
        sum("config" in outcome for outcome in journal.outcomes.values()),
        len(searched),
        time.monotonic() - began,
        compiled["seconds"],
        compiled["binaries"],
        sum(outcome.get("timed", 0) for outcome in searched),
        sum(outcome.get("candidates", 0) for outcome in searched),
        files,
        journal.qualities,
    )


class Journal:
    """Outcomes by point, on disk as they come. A torn last line is dropped: that point is searched again."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self.triton = "unknown"
        """Version of Triton that compiled the candidates."""
        self.outcomes: dict[str, Mapping[str, Any]] = {}
        self.qualities: list[Mapping[str, Any]] = []
        if path.exists():
            whole = [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"\n")]
            path.write_bytes(b"".join(whole))
            for line in whole:
                self._take(json.loads(line))

    def append(self, event: Mapping[str, Any]) -> None:
        """Keep an outcome; it is on the disk when this returns."""
        entry = {**event, "triton": self.triton}
        self._take(entry)
        with self._path.open("ab") as file:
            file.write((canonical_json(entry) + "\n").encode())
            file.flush()
            os.fsync(file.fileno())

    def _take(self, event: Mapping[str, Any]) -> None:
        self.triton = event["triton"]
        if event["event"] == "tuned":
            self.outcomes[_key(event["subject"], event["axes"])] = event
        else:
            self.qualities.append(event)


def write_configurations(device_name: str, journal: Journal, root: Path) -> list[Path]:
    """Bring a journal's outcomes into the files that providers read; entries of other points stay."""
    files = []
    for op in sorted({outcome["subject"] for outcome in journal.outcomes.values()}):
        path = configs.path_of(device_name, op, root)
        entries = {_key(op, entry.point): entry for entry in configs.load(path).entries} if path.exists() else {}
        for key, outcome in journal.outcomes.items():
            if outcome["subject"] == op and "config" in outcome:
                entries[key] = configs.Entry(
                    outcome["axes"], outcome["config"], outcome["time_s"], outcome["candidates"]
                )
        tuned = configs.Tuned(op, device_name, journal.triton, METHOD, list(entries.values()))
        configs.save(path, tuned)
        files.append(path)
    return files


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
