"""The engines of a run: versions, kernels, settings and how those differ, weights, and what everything cost.

Owns what of an engine's own words a report shows. Does not own the engines' settings, nor what must be alike (guards).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from smbench.analysis import Analysis
from smbench.cell import Cell
from smbench.guards import leaves_of
from smbench.guards_engine import ALIKE, alike
from smbench.result import Result, Serving, Status
from smbench.statements import Grouped
from smbench.views import View, slug

SYNTHETIC = "synthetic:"
"""How the names of models with random weights begin."""


@dataclass(frozen=True, slots=True)
class Untested:
    """Cells of one provider without a number, that ended alike."""

    provider: str
    status: Status
    where: str
    """What they have of the axes that vary in the run; their workload, where there are several."""
    reason: Grouped


@dataclass(frozen=True, slots=True)
class Engine:
    """A provider as its engine describes itself."""

    provider: str
    engine: str
    versions: Sequence[str]
    cells: int
    linear: Sequence[str]
    """Implementations of linear layers, with the number of layers."""
    attention: Sequence[str]
    alike: Mapping[str, Sequence[str]]
    """What all engines are given alike, to its values in this provider's cells; empty where it does not say."""
    memory: Mapping[str, int]
    """Bytes and tokens that it reports: the most in any cell."""


@dataclass(frozen=True, slots=True)
class Differing:
    """A setting that is not the same in all cells of one engine."""

    engine: str
    name: str
    values: Mapping[str, Sequence[str]]
    """A value to the providers that have it."""


@dataclass(frozen=True, slots=True)
class Compared:
    """Comparisons of outputs that passed."""

    cells: int
    equal_tokens: int
    tokens: int
    nearest: tuple[float, float] | None
    """The difference of a log-probability that is nearest to its bound, with that bound; nats."""


@dataclass(frozen=True, slots=True)
class Part:
    """A part of the wall clock."""

    name: str
    seconds: float
    fraction: float | None


@dataclass(frozen=True, slots=True)
class Spent:
    """What the cells of a provider took."""

    provider: str
    cells: int
    serving_s: float
    around_s: float
    """Everything else of their processes: imports, start-up, comparison, shutdown."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Where the time of all sessions went, and what it cost."""

    wall_s: float
    serving_s: float
    """Requests, warm-ups included: the device is busy for no longer than this."""
    parts: Sequence[Part]
    """By the worker's phases, `other` last."""
    spent: Sequence[Spent]
    money: float | None
    """In the currency of the price; None where no session has one."""
    prices_per_hour: Sequence[float]

    @property
    def busy(self) -> float | None:
        """Share of the wall clock in which requests were served."""
        return self.serving_s / self.wall_s if self.wall_s else None


@dataclass(frozen=True)
class Engines:
    """What the engines of a run said."""

    view: View

    @property
    def _analysis(self) -> Analysis:
        return self.view.analysis

    def _served(self, provider: str | None = None) -> list[tuple[Result, Serving]]:
        return [
            (row.result, row.result.serving)
            for row in self._analysis.rows
            if row.result and row.result.serving and provider in (None, row.cell.provider)
        ]

    def models(self) -> list[str]:
        """The weights that were planned for, by their names in cells."""
        return [str(value) for value in self._analysis.axis_values("model")]

    def synthetic(self) -> bool:
        """Whether all weights are random."""
        return all(name.startswith(SYNTHETIC) for name in self.models())

    def compared(self) -> Compared | None:
        """The comparisons of outputs that passed, together; None where there was none."""
        checks = [
            s.output for r, s in self._served() if s.output and s.output.passed and r.status in ("ok", "verified")
        ]
        if not checks:
            return None
        errors = [(check.logprob_error, check.logprob_bound) for check in checks if check.logprob_error is not None]
        return Compared(
            len(checks),
            sum(check.equal_tokens for check in checks),
            sum(check.tokens for check in checks),
            max(errors, key=lambda entry: entry[0] / entry[1] if entry[1] else 0.0, default=None),
        )

    def references(self) -> list[str]:
        """What outputs were compared with."""
        return list(dict.fromkeys(serving.output.reference for _, serving in self._served() if serving.output))

    def engines(self) -> list[Engine]:
        """Every provider that served anything, in the order of the profile."""
        found = []
        for provider in self.view.providers:
            served = [serving for _, serving in self._served(provider)]
            if served:
                words = [alike(serving.settings) for serving in served]
                found.append(
                    Engine(
                        provider,
                        served[0].engine,
                        _distinct(serving.version for serving in served),
                        len(served),
                        _kernels(served, "linear"),
                        _kernels(served, "attention"),
                        {name: _distinct(w[name] for w in words if w[name] is not None) for name in ALIKE},
                        _most([serving.memory for serving in served]),
                    )
                )
        return found

    def differing(self) -> list[Differing]:
        """Settings that differ between cells of an engine, by engine and name; not those that an axis decides."""
        by_engine: dict[str, dict[str, list[tuple[Cell, object]]]] = {}
        for result, serving in self._served():
            for name, value in leaves_of(serving.settings):
                by_engine.setdefault(serving.engine, {}).setdefault(name, []).append((result.cell, value))
        found = []
        for engine, names in by_engine.items():
            for name, settings in sorted(names.items()):
                values: dict[str, dict[str, None]] = {}
                for cell, value in settings:
                    values.setdefault(_said(value), {})[cell.provider] = None
                if len(values) > 1 and not all(_is_an_axis(cell, value) for cell, value in settings):
                    found.append(Differing(engine, name, {value: list(names) for value, names in values.items()}))
        return found

    def settings_files(self) -> dict[str, bytes]:
        """`settings_<provider>.json` for each provider that served."""
        return {
            f"settings_{slug(provider)}.json": _settings_file(provider, served)
            for provider in self.view.providers
            if (served := self._served(provider))
        }

    def request_log(self) -> dict[str, bytes]:
        """`result.txt`, document 002's log of requests."""
        warmup = self._analysis.profile.measure[0].warmup
        log = [line for result, serving in self._served() for line in _log(result, serving, warmup)]
        return {"result.txt": ("\n".join(log) + "\n").encode()} if log else {}

    def cost(self) -> Cost | None:
        """Where time and money went; None before a session has ended."""
        sessions = self._analysis.sessions
        if not sessions:
            return None
        wall_s = sum(session.wall_s for session in sessions)
        phases: dict[str, float] = {"start of workers": sum(session.worker_start_s for session in sessions)}
        for row in self._analysis.rows:
            for name, seconds in (row.result.phases_s if row.result else {}).items():
                if name != "total":
                    phases[name] = phases.get(name, 0.0) + seconds
        parts = sorted(phases.items(), key=lambda part: -part[1])
        parts.append(("other", max(0.0, wall_s - sum(phases.values()))))
        priced = [session for session in sessions if session.price_per_hour is not None]
        return Cost(
            wall_s,
            sum(_serving_s(serving) for _, serving in self._served()),
            [Part(name, seconds, seconds / wall_s if wall_s else None) for name, seconds in parts],
            [spent for provider in self.view.providers if (spent := self._spent(provider))],
            sum(session.wall_s / 3600 * (session.price_per_hour or 0.0) for session in priced) if priced else None,
            list(dict.fromkeys(session.price_per_hour or 0.0 for session in priced)),
        )

    def _spent(self, provider: str) -> Spent | None:
        served = self._served(provider)
        if not served:
            return None
        serving_s = sum(_serving_s(serving) for _, serving in served)
        total_s = sum(result.phases_s.get("total", 0.0) for result, _ in served)
        return Spent(provider, len(served), serving_s, max(0.0, total_s - serving_s))


def _settings_file(provider: str, served: Sequence[tuple[Result, Serving]]) -> bytes:
    """What all cells of a provider share, and what each has besides."""
    leaves = [dict(leaves_of(serving.settings)) for _, serving in served]
    shared = {
        name: value for name, value in leaves[0].items() if all(name in e and e[name] == value for e in leaves[1:])
    }
    content = {
        "provider": provider,
        "engine": served[0][1].engine,
        "versions": _distinct(serving.version for _, serving in served),
        "settings": shared,
        "cells": [
            {
                "cell_id": result.cell_id,
                "axes": dict(result.cell.axes),
                "kernels": {role: dict(names) for role, names in serving.kernels.items()},
                "memory": dict(serving.memory),
                "settings": {name: value for name, value in own.items() if name not in shared},
            }
            for (result, serving), own in zip(served, leaves, strict=True)
        ],
    }
    return (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode()


def _log(result: Result, serving: Serving, warmup: int) -> list[str]:
    """What the document's script prints: a line for each request, then the mean of those that count."""
    latencies = [request.e2e_s for request in serving.requests]
    counted = latencies[warmup:]
    lines = [f"# {result.cell.label()}: {result.status}", *(f"{i} {s:.6f}" for i, s in enumerate(latencies))]
    return [*lines, *([f"avg_latency {sum(counted) / len(counted):.6f}"] if counted else []), ""]


def _serving_s(serving: Serving) -> float:
    """How long an engine was asked to serve: requests and batches one after the other, or a load."""
    each = [*(request.e2e_s for request in serving.requests), *(batch.e2e_s for batch in serving.batches)]
    return sum(each) + (serving.load.duration_s if serving.load else 0.0)


def _kernels(served: Sequence[Serving], role: str) -> list[str]:
    """A count of zero layers is that of an engine that cannot count them."""
    found = [entry for serving in served for entry in serving.kernels.get(role, {}).items()]
    return _distinct(f"{name} ({count} layers)" if count else name for name, count in found)


def _most(memories: Sequence[Mapping[str, int]]) -> dict[str, int]:
    names = dict.fromkeys(name for memory in memories for name in memory)
    return {name: max(memory.get(name, 0) for memory in memories) for name in names}


def _is_an_axis(cell: Cell, value: object) -> bool:
    """Whether a setting is what an axis of its cell says."""
    word = value.removeprefix("torch.") if isinstance(value, str) else value
    return any(type(word) is type(axis) and word == axis for axis in cell.axes.values())


def _said(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _distinct(values: Iterable[object]) -> list[str]:
    return list(dict.fromkeys(str(value) for value in values))
