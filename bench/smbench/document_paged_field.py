"""Our paged decode kernel against other projects': by shape and block size, clearly faster or slower. Pure values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Comparison, Row
from smbench.cell import AxisValue
from smbench.stats import Summary
from smbench.views import Axes, View

SUBJECT = "paged_attention"
SHAPE = ("heads", "kv_heads", "head_dim", "dtype", "batch", "seq_len", "lengths")
PLAIN: Axes = {"layout": "fair", "memory": "device", "address": "table"}


@dataclass(frozen=True, slots=True)
class Best:
    """The fastest number of some providers over some blocks."""

    provider: str
    block: AxisValue
    summary: Summary


@dataclass(frozen=True, slots=True)
class Line:
    """One shape: our times by block size, and the best that others do with a paged cache at any block size."""

    shape: Axes
    ours: Mapping[AxisValue, Summary | None]
    spread: float | None
    """Slowest block size over fastest, less 1."""
    peer: Best | None
    slowest_over_peer: float | None
    """Our time at our worst block size over that best."""
    unpaged: Summary | None
    """The baseline, which reads a contiguous cache."""
    bound_s: float | None
    """Least bytes at the card's peak bandwidth."""


@dataclass(frozen=True)
class Field:
    """A run, asked how ours does."""

    view: View
    base: Axes
    """The document's own shape, which is not part of this field."""

    @property
    def paged_peers(self) -> list[str]:
        """Other projects' kernels that read the paged cache."""
        return [name for name in self.view.peers if name != self.view.analysis.recipe.baseline]

    @cached_property
    def points(self) -> list[Axes]:
        """The plain points at other shapes than the document's."""
        return [
            point
            for point in self.view.points(SUBJECT)
            if all(point[axis] == value for axis, value in PLAIN.items())
            and (point["heads"], point["kv_heads"]) != (self.base.get("heads"), self.base.get("kv_heads"))
        ]

    def shapes(self, lengths: str = "equal") -> list[Axes]:
        """The distinct shapes with such lengths, in plan order."""
        found = [tuple(point[axis] for axis in SHAPE) for point in self.points if point["lengths"] == lengths]
        return [dict(zip(SHAPE, values, strict=True)) for values in dict.fromkeys(found)]

    def blocks(self, shape: Axes) -> list[AxisValue]:
        """The block sizes that a shape is planned with."""
        return [point["block_size"] for point in self.points if all(point[a] == v for a, v in shape.items())]

    @property
    def all_blocks(self) -> list[AxisValue]:
        """Block sizes that any shape of equal lengths is planned with."""
        return list(dict.fromkeys(p["block_size"] for p in self.points if p["lengths"] == "equal"))

    def number(self, provider: str, shape: Axes, block: AxisValue) -> Summary | None:
        """The headline number of a provider."""
        return self.view.summary(SUBJECT, provider, {**PLAIN, **shape, "block_size": block}, self.view.headline.name)

    def lines(self, lengths: str = "equal") -> list[Line]:
        """One line for each shape at which ours has a number."""
        found = [self._line(shape) for shape in self.shapes(lengths)]
        return [line for line in found if any(line.ours.values())]

    def _line(self, shape: Axes) -> Line:
        blocks = self.blocks(shape)
        best = self.view.best or ""
        ours = {block: self.number(best, shape, block) for block in blocks}
        times = [summary.median for summary in ours.values() if summary]
        peer = self._best(shape, blocks, self.paged_peers)
        unpaged = self._best(shape, blocks, [self.view.analysis.recipe.baseline])
        row = self.view.analysis.row(SUBJECT, best, **{**PLAIN, **shape, "block_size": blocks[0]})
        return Line(
            shape,
            ours,
            max(times) / min(times) - 1 if len(times) > 1 else None,
            peer,
            max(times) / peer.summary.median if times and peer else None,
            unpaged.summary if unpaged else None,
            self.view.memory_bound_s(row) if row else None,
        )

    def _best(self, shape: Axes, blocks: Sequence[AxisValue], providers: Sequence[str]) -> Best | None:
        found = [
            Best(provider, block, summary)
            for provider in providers
            for block in blocks
            if (summary := self.number(provider, shape, block))
        ]
        return min(found, key=lambda best: best.summary.median, default=None)

    def verdict(self) -> Comparison | None:
        """Ours against the fastest paged peer at each point of equal lengths."""
        return self.view.analysis.compare(self._ours("equal"), self.paged_peers, self.view.headline.name)

    def against(self, provider: str, lengths: str = "equal") -> Comparison | None:
        """Ours against one provider at each point that both have."""
        return self.view.analysis.compare(self._ours(lengths), provider, self.view.headline.name)

    def _ours(self, lengths: str) -> list[Row]:
        best = self.view.best
        rows = (
            [self.view.analysis.row(SUBJECT, best, **p) for p in self.points if p["lengths"] == lengths] if best else []
        )
        return [row for row in rows if row]

    def worst_spread(self) -> float | None:
        """The largest spread over block sizes of any shape."""
        return max((line.spread for line in self.lines() if line.spread is not None), default=None)

    def measured(self) -> bool:
        """Whether any provider has a number here."""
        return any(
            self.number(provider, {axis: point[axis] for axis in SHAPE}, point["block_size"])
            for point in self.points
            for provider in self.view.providers
        )
