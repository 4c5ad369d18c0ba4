"""Tuning on the host's side: which points, the journal that lets it go on, the configuration files. Measures nothing.

A journal (one JSON line a point, fsynced) is the memory of a tuning run; the configuration files that providers read
are written from it at the end, and when it is interrupted. Searched are our own kernels and, where a recipe wants its
opponents at their best, those of libraries (`selection = "library-tuned"`), by a worker of the library's own stack.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from smbench.cell import AxisValue
from smbench.errors import UsageError
from smbench.identity import canonical_json
from smbench.plan import Plan
from smbench.runner import WorkerCannotStart
from smbench.stacks import OWN
from smbench.workerprocess import WORKER_MODULE, Refused, WorkerProcess, WorkerStopped
from smbench_kernels import configs

POINT_LIMIT_S = 600.0
"""Compiling everything ahead, or searching one point, never takes this long."""

METHOD = "cold L2, CUDA graph of calls on distinct buffers, median; model-ordered screening, then successive halving"
"""What the files say of how their times were taken."""
LIBRARY_METHOD = METHOD.replace("model-ordered screening", "all configurations screened")
"""The same of a library's kernels, none of whose configurations is left out by a model of ours."""


@dataclass(frozen=True, slots=True)
class TunedPoint:
    """A point of an operation whose launch parameters are searched."""

    subject: str
    axes: Mapping[str, AxisValue]
    provider: str | None = None
    """The provider over a library's kernel; None for our own."""
    python: Path = OWN
    """What runs the worker that can search it."""

    @property
    def key(self) -> str:
        """What tells points apart."""
        return _key(self.subject, self.provider, self.axes)

    def row(self) -> dict[str, Any]:
        """As a request has it."""
        return {"subject": self.subject, "provider": self.provider, "axes": dict(self.axes)}


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
    refusals: Mapping[str, str] = field(default_factory=dict)
    """By provider, why none of its points could be searched."""

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
            *(f"{provider} was not searched: {reason}" for provider, reason in self.refusals.items()),
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
    """The distinct points that the plan measures with a tuned configuration, ours first. UsageError if there are none.

    A library that is not here is left out: its cells would not run either.
    """
    found: dict[str, TunedPoint] = {}
    for wanted in ("tuned", "library-tuned"):
        for entry in plan.entries:
            cell = entry.cell
            if plan.recipe.providers[cell.provider].selection != wanted:
                continue
            if wanted == "tuned":
                point = TunedPoint(cell.subject, cell.axes)
            elif entry.runs:
                point = TunedPoint(cell.subject, cell.axes, cell.provider, entry.python)
            else:
                continue
            found.setdefault(point.key, point)
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
    worker_command: Sequence[str] | None = None,
) -> Tuned:
    """Search every point that the folder's journal does not have, then write the configuration files.

    The caller holds the folder's lock. Whatever ends it early, finished points are kept in the journal and the files.
    `worker_command` stands for the Python of each stack. A worker searches a library's point again that the journal has
    for another version of it: only the worker knows the version.
    """
    began = time.monotonic()
    points = points_of(plan)
    journal = Journal(folder / "journal.jsonl")
    missing = [point for point in points if point.provider or point.key not in journal.outcomes]
    searched: list[Mapping[str, Any]] = []
    compiled: list[Mapping[str, Any]] = []
    refusals: dict[str, str] = {}
    pythons = list(dict.fromkeys([*(point.python for point in missing), *([OWN] if quality_points else [])]))
    try:
        for python in pythons:
            request = {
                "device": "cuda",
                "measures": [],
                "seed": plan.recipe.seed,
                "memory_bytes_per_s": memory_bytes_per_s,
                "quality_points": quality_points if python == OWN else 0,
                "points": [point.row() for point in missing if point.python == python],
                "known": [outcome for outcome in journal.outcomes.values() if "config" in outcome],
            }
            for event in _events(folder, request, worker_command or (str(python), *WORKER_MODULE)):
                if event["event"] == "ready":
                    journal.triton = event["environment"]["libraries"].get("triton", "unknown")
                elif event["event"] == "compiled":
                    compiled.append(event)
                elif event["event"] == "untunable":
                    refusals[event["provider"]] = event["reason"]
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
        sum(event["seconds"] for event in compiled),
        sum(event["binaries"] for event in compiled),
        sum(outcome.get("timed", 0) for outcome in searched),
        sum(outcome.get("candidates", 0) for outcome in searched),
        files,
        journal.qualities,
        refusals,
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
            self.outcomes[_key(event["subject"], event.get("provider"), event["axes"])] = event
        else:
            self.qualities.append(event)


def write_configurations(device_name: str, journal: Journal, root: Path) -> list[Path]:
    """Bring a journal's outcomes into the files that providers read; entries of other points stay."""
    files = []
    kernels = {(outcome["subject"], outcome.get("library")) for outcome in journal.outcomes.values()}
    for op, library in sorted(kernels, key=lambda kernel: (kernel[0], kernel[1] or "")):
        path = configs.path_of(device_name, op, root, library)
        known = configs.load(path).entries if path.exists() else ()
        entries = {canonical_json(dict(entry.point)): entry for entry in known}
        for outcome in journal.outcomes.values():
            if (outcome["subject"], outcome.get("library")) == (op, library) and "config" in outcome:
                entries[canonical_json(dict(outcome["axes"]))] = configs.Entry(
                    outcome["axes"], outcome["config"], outcome["time_s"], outcome["candidates"]
                )
        method = LIBRARY_METHOD if library else METHOD
        tuned = configs.Tuned(op, device_name, journal.triton, method, list(entries.values()), library)
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


def _key(subject: str, provider: str | None, axes: Mapping[str, AxisValue]) -> str:
    return canonical_json([subject, provider, dict(axes)])
