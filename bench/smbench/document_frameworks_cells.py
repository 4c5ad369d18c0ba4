"""Which cells of a run the tables of document 004 show, and what they are called there. Owns no number."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.document_engines import Untested
from smbench.result import UNTESTED, Batch, Load, Serving, Status
from smbench.statements import Grouped, grouped, shape
from smbench.views import Axes, View

STATIC, OFFLINE, ONLINE = "static_batch", "offline", "online"

POINT: Mapping[str, tuple[str, ...]] = {
    STATIC: ("batch", "input_len", "output_len"),
    OFFLINE: ("dataset", "num_prompts", "input_len", "output_len"),
    ONLINE: ("dataset", "request_rate", "max_concurrency", "num_prompts", "input_len", "output_len"),
}
"""The axes that a table of a workload has for columns; the others are its setting."""
ORDER = ("model", "dtype", "tensor_parallel", "graphs", *POINT[ONLINE], "batch")
"""All axes, in the order in which sentences name them."""
WORDS: Mapping[str, Mapping[AxisValue, str]] = {
    "graphs": {"default": "the engine's own choice of graphs", "full": "full graphs", "eager": "eager"},
    "dataset": {"random": "random", "shared-prefix": "shared prefix", "sharegpt": "ShareGPT"},
}


COMMIT = re.compile(r"(?<=@)([0-9a-f]{8})[0-9a-f]{32}$")
"""A revision at the end of a model's name, its first digits caught."""


@dataclass(frozen=True, slots=True)
class Group:
    """Cells of one workload under one setting: a table."""

    subject: str
    setting: Axes
    """The axes that all of its cells share, those of `POINT` left out."""
    points: Sequence[Axes]
    """The distinct points, in plan order."""
    providers: Sequence[str]
    rows: Sequence[Row]

    def row(self, point: Axes, provider: str) -> Row | None:
        """The cell of a point and a provider, None where the plan has none."""
        wanted = {**self.setting, **point}
        return next((r for r in self.rows if r.cell.provider == provider and dict(r.cell.axes) == wanted), None)

    def of(self, provider: str) -> list[Row]:
        """A provider's cells, in plan order."""
        return [row for row in self.rows if row.cell.provider == provider]

    @property
    def measured(self) -> bool:
        """Whether any cell has a number."""
        return any(row.summaries for row in self.rows)


@dataclass(frozen=True)
class Cells:
    """The cells of a run, sorted into the document's tables."""

    view: View

    @cached_property
    def static(self) -> Sequence[Group]:
        """The document's `static single batch`."""
        return self._groups(STATIC)

    @cached_property
    def offline(self) -> Sequence[Group]:
        """The document's `offline`."""
        return self._groups(OFFLINE)

    @cached_property
    def online(self) -> Sequence[Group]:
        """Servers under load."""
        return self._groups(ONLINE)

    @property
    def groups(self) -> list[Group]:
        """All tables, in the document's order."""
        return [*self.static, *self.offline, *self.online]

    @property
    def subjects(self) -> list[str]:
        """The workloads of the run, in the document's order."""
        return [name for name in (STATIC, OFFLINE, ONLINE) if name in self.view.analysis.subjects()]

    def _groups(self, subject: str) -> list[Group]:
        found: dict[tuple[tuple[str, AxisValue], ...], list[Row]] = {}
        for row in self.view.analysis.select(subject):
            key = tuple((name, value) for name, value in row.cell.axes.items() if name not in POINT[subject])
            found.setdefault(tuple(sorted(key)), []).append(row)
        return [self._group(subject, dict(key), rows) for key, rows in found.items()]

    def _group(self, subject: str, setting: Axes, rows: Sequence[Row]) -> Group:
        points: dict[tuple[AxisValue, ...], Axes] = {}
        for row in rows:
            point = {name: row.cell.axes[name] for name in POINT[subject]}
            points.setdefault(tuple(point.values()), point)
        providers = [name for name in self.view.providers if any(row.cell.provider == name for row in rows)]
        return Group(subject, setting, list(points.values()), providers, rows)

    def heading(self, group: Group) -> str:
        """What tells a table from the others of its workload; empty where it is the only one."""
        others = [other.setting for other in self.groups if other.subject == group.subject]
        varying = [name for name in group.setting if len({setting[name] for setting in others}) > 1]
        return self.words({name: group.setting[name] for name in varying})

    def words(self, axes: Axes) -> str:
        """Axes in a sentence."""
        return ", ".join(word(name, axes[name]) for name in ORDER if name in axes)

    def told(self, row: Row) -> str:
        """What tells a cell from the others of its workload and provider."""
        varying = [name for name in row.cell.axes if len(self.view.analysis.axis_values(name, row.cell.subject)) > 1]
        return self.words({name: row.cell.axes[name] for name in varying})

    def missing(self, rows: Iterable[Row]) -> list[Grouped]:
        """Why numbers are missing from a table of these cells; keys are provider and status."""
        return grouped((row.cell.provider, row.status, row.reason or "") for row in rows if not row.summaries)

    def untested(self) -> list[Untested]:
        """Every situation without a checked result, by provider, workload, status and reason, in plan order."""
        rows = self.view.analysis.rows
        found: dict[tuple[str, str, Status, str], list[Row]] = {}
        for row in rows:
            if row.status in UNTESTED:
                key = (row.cell.provider, row.cell.subject, row.status, shape(row.reason or ""))
                found.setdefault(key, []).append(row)
        return [
            Untested(
                provider,
                status,
                self._where(subject, group),
                Grouped((), group[0].reason or "", len(group), len({row.reason for row in group}) == 1),
            )
            for (provider, subject, status, _), group in found.items()
        ]

    def _where(self, subject: str, rows: Sequence[Row]) -> str:
        """A workload, and the values that the cells have of its varying axes."""
        varying = [name for name in ORDER if len(self.view.analysis.axis_values(name, subject)) > 1]
        said = [subject]
        for name in varying:
            values = list(dict.fromkeys(row.cell.axes[name] for row in rows))
            if len(values) < len(self.view.analysis.axis_values(name, subject)):
                said.append(f"{name} {', '.join(map(str, values))}")
        return "; ".join(said)


def model_name(name: str) -> str:
    """A model without most of its revision; the report says it whole once."""
    return COMMIT.sub(r"\1", name)


def word(axis: str, value: AxisValue) -> str:
    """A value of an axis in a sentence."""
    if axis == "model":
        return model_name(str(value))
    if axis == "tensor_parallel":
        return "one device" if value == 1 else f"tensor parallel over {value} GPUs"
    if axis == "request_rate":
        return "all at once" if value == "inf" else f"{value} requests a second"
    if axis == "max_concurrency":
        return "no limit at a time" if value == 0 else f"{value} at a time"
    if axis in ("input_len", "output_len"):
        return f"{value} {'prompt' if axis == 'input_len' else 'output'} {'token' if value == 1 else 'tokens'}"
    if axis == "num_prompts":
        return f"{value} prompts"
    if axis == "batch":
        return f"batch {value}"
    return WORDS.get(axis, {}).get(value, str(value))


def serving_of(row: Row) -> Serving | None:
    """What the engine of a cell that has numbers said and did."""
    return row.result.serving if row.result and row.summaries else None


def counted_batches(row: Row, warmup: int) -> Sequence[Batch]:
    """The repetitions of a cell that count; empty where it has no number."""
    serving = serving_of(row)
    return serving.batches[warmup:] if serving else ()


def load_of(row: Row) -> Load | None:
    """What the load client saw of a cell that has numbers."""
    serving = serving_of(row)
    return serving.load if serving else None
