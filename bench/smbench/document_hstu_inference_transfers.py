"""What document 003 names as features and never ran: copies from and to the host, eviction, padding, bookkeeping.

Pure values from a View and the counts of its cells. Owns no words.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.document_hstu_inference_block import BLOCK, integer, spread
from smbench.stats import Summary
from smbench.views import Axes, View

REQUEST, BOOKKEEPING = "hstu_request", "hstu_bookkeeping"
SUBJECTS = (BLOCK, REQUEST)


@dataclass(frozen=True, slots=True)
class Copied:
    """One point whose cached tokens are on the host."""

    subject: str
    point: Axes
    provider: str
    """The fastest that copies beside the layers."""
    host: Summary
    device: Summary | None
    """The same point with the cache on the device, by the same provider."""
    before: Summary | None
    """Every copy before the first layer, by graphs like `host`."""
    nowhere: Summary | None
    """Nothing cached anywhere: the whole history computed, by whoever has no cache."""
    onload_bytes: float
    """A step."""
    onload_s: float | None
    """A step, on the stream of the copies."""
    offload_bytes: float
    offload_s: float | None
    evicted: float
    """Users evicted in a step."""

    @property
    def onload_rate(self) -> float | None:
        """Bytes a second of the copies themselves."""
        return self.onload_bytes / self.onload_s if self.onload_s else None

    @property
    def offload_rate(self) -> float | None:
        """The same to the host."""
        return self.offload_bytes / self.offload_s if self.offload_s else None

    @property
    def rate_by_difference(self) -> float | None:
        """Bytes over what copying before the layers adds to the time; None where it adds nothing."""
        added = self.before.median - self.device.median if self.before and self.device else 0.0
        return self.onload_bytes / added if added > 0 else None

    @property
    def over_longest(self) -> float | None:
        """Time of a step over the longer of computing and copying: 1 where one is hidden behind the other."""
        if self.device is None or self.onload_s is None:
            return None
        return self.host.median / max(self.device.median, self.onload_s)

    @property
    def over_bound(self) -> float | None:
        """Time of a step over the least that copies layer by layer allow.

        Nothing computes beside the copies of the first layer, and the last layer computes beside none: the longer of
        the two and one layer's part of the shorter one.
        """
        if self.device is None or self.onload_s is None:
            return None
        times = self.device.median, self.onload_s
        return self.host.median / (max(times) + min(times) / integer(self.point["layers"]))


@dataclass(frozen=True, slots=True)
class Graph:
    """One captured shape, over all cells that use it."""

    batch: int
    rows: int
    cells: int
    least_waste: float
    most_waste: float
    """Padded rows over all rows of the graph."""
    capture_s: tuple[float, float]
    memory_bytes: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Step:
    """The host's part of a step."""

    point: Axes
    summary: Summary | None
    status: str


@dataclass(frozen=True)
class Transfers:
    """A run, asked for what the document left out."""

    view: View

    @cached_property
    def copied(self) -> list[Copied]:
        """Every point with its cache on the host that has a time, block first."""
        found = []
        for subject in SUBJECTS:
            for point in self.view.points(subject):
                if point.get("source") == "host" and (line := self._copied(subject, point)):
                    found.append(line)
        return found

    def _copied(self, subject: str, point: Axes) -> Copied | None:
        provider = next((p for p in ("cache-graph", "cache") if self._number(subject, p, point)), None)
        row = self.view.analysis.row(subject, provider, **point) if provider else None
        if provider is None or row is None or row.result is None:
            return None
        host = row.summary(self.view.headline.name)
        assert host is not None
        counts = row.result.counts
        steps = max(1, counts.get("steps", 0))
        per_step = {name: counts.get(name, 0) / steps for name in counts}
        onload_ns, offload_ns = per_step.get("onload_ns"), per_step.get("offload_ns")
        whole = {"new": point["total"], "source": "device"} if subject == BLOCK else {"source": "nowhere"}
        return Copied(
            subject,
            point,
            provider,
            host,
            self._number(subject, provider, {**point, "source": "device"}),
            self._number(subject, "cache-graph-serial", point),
            self._number(subject, "recompute", {**point, **whole}),
            per_step.get("onloaded_bytes", 0.0),
            onload_ns * 1e-9 if onload_ns else None,
            per_step.get("offloaded_bytes", 0.0),
            offload_ns * 1e-9 if offload_ns else None,
            per_step.get("evicted_users", 0.0),
        )

    def _number(self, subject: str, provider: str, point: Axes) -> Summary | None:
        return self.view.summary(subject, provider, point, self.view.headline.name)

    def worth(self) -> tuple[int, int]:
        """At how many points with both the host is clearly faster than nowhere, of how many."""
        pairs = [(line.host, line.nowhere) for line in self.copied if line.nowhere]
        return sum(host.ci_high < nowhere.ci_low for host, nowhere in pairs), len(pairs)

    @property
    def has_serial(self) -> bool:
        """Whether any point was also timed with the copies first."""
        return any(line.before for line in self.copied)

    @cached_property
    def graphs(self) -> list[Graph]:
        """Every captured shape, the smallest first."""
        by_shape: dict[tuple[int, int], list[Row]] = {}
        for row in self.view.analysis.rows:
            config = row.result.selection.config if row.result and row.result.selection else {}
            if row.status in ("ok", "verified") and "GRAPH_ROWS" in config:
                by_shape.setdefault((config["GRAPH_BATCH"], config["GRAPH_ROWS"]), []).append(row)
        return [self._graph(shape, rows) for shape, rows in sorted(by_shape.items())]

    def _graph(self, shape: tuple[int, int], rows: Sequence[Row]) -> Graph:
        wastes = [waste(row.cell.axes, *shape) for row in rows]
        configs = [row.result.selection.config for row in rows if row.result and row.result.selection]
        capture = spread([config["CAPTURE_US"] for config in configs]) or (0, 0)
        memory = spread([config["CAPTURE_BYTES"] for config in configs]) or (0, 0)
        return Graph(*shape, len(rows), min(wastes), max(wastes), (capture[0] * 1e-6, capture[1] * 1e-6), memory)

    @cached_property
    def steps(self) -> list[Step]:
        """What steps cost the host."""
        return [
            Step(row.cell.axes, row.summary(self.view.headline.name), row.status)
            for row in self.view.analysis.rows
            if row.cell.subject == BOOKKEEPING
        ]

    def moved(self) -> dict[str, int]:
        """What all cells together moved and met, checks and warm-ups included."""
        found: dict[str, int] = {}
        for row in self.view.analysis.rows:
            if row.result and row.status in ("ok", "verified"):
                for name, value in row.result.counts.items():
                    found[name] = found.get(name, 0) + value
        return found


def waste(point: Axes, batch: int, rows: int) -> float:
    """Rows of a graph that a step does not have, over all of its rows."""
    new: AxisValue = point["total"] if point["source"] == "nowhere" else point["new"]
    used = integer(point["batch"]) * (integer(new) + integer(point["targets"]))
    return 1 - used / (batch * rows)
