"""Other projects' whole layers beside ours at equal definition: times, ratios, memory. Pure values, no words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.document_hstu_layer_attention import QUIET
from smbench.result import Memory
from smbench.stats import Range, Summary
from smbench.views import Axes, View

LAYER, LAYER_SILU_U = "hstu_layer", "hstu_layer_silu_u"
DEFINITIONS = {LAYER: "u, v, q, k", LAYER_SILU_U: "u"}
"""The operations that are a layer, and what SiLU is applied to in each."""
OURS = "fused"
"""What other projects' layers are compared with: our fastest, nothing computed twice."""
DEFINITION = "torch"
UNTRIED = ("unsupported", "skipped")


@dataclass(frozen=True, slots=True)
class Line:
    """A layer of one of the definitions."""

    operation: str
    provider: str

    @property
    def silu(self) -> str:
        """What it applies SiLU to."""
        return DEFINITIONS[self.operation]


@dataclass(frozen=True)
class Peers:
    """A run, asked for other projects' whole layers."""

    view: View
    family: Axes
    """The axes of the layer's table, but the length."""
    lengths: Sequence[AxisValue]
    measure: str
    """Of a whole step."""

    @cached_property
    def theirs(self) -> list[Line]:
        """The layers of other projects that are more than a reason in the list of what was not tested."""
        libraries = [provider for provider in self.view.of_selection("library") if provider != DEFINITION]
        lines = [Line(operation, provider) for operation in DEFINITIONS for provider in libraries]
        return [line for line in lines if any(self.ended(line, n) not in (None, *UNTRIED) for n in self.lengths)]

    @cached_property
    def lines(self) -> list[Line]:
        """The same, those of each definition after ours of it."""
        found = []
        for operation in DEFINITIONS:
            of_operation = [line for line in self.theirs if line.operation == operation]
            ours = Line(operation, OURS)
            planned = any(self.row(ours, length) for length in self.lengths)
            found += [ours] * bool(of_operation and planned) + of_operation
        return found

    def row(self, line: Line, length: AxisValue) -> Row | None:
        """A cell of the table."""
        return self.view.analysis.row(line.operation, line.provider, **self.family, seq_len=length)

    def number(self, line: Line, length: AxisValue) -> Summary | None:
        """The time of a whole step."""
        row = self.row(line, length)
        return row.summary(self.measure) if row else None

    def ended(self, line: Line, length: AxisValue) -> str | None:
        """How that cell ended."""
        row = self.row(line, length)
        return row.status if row else None

    def ratio(self, line: Line, length: AxisValue) -> float | None:
        """Their time over ours of the same definition."""
        mine, theirs = self.number(Line(line.operation, OURS), length), self.number(line, length)
        return theirs.median / mine.median if mine and theirs else None

    def least(self, length: AxisValue) -> float | None:
        """The ratio of the peer that comes closest to ours, each held against its own definition."""
        return min((ratio for line in self.theirs if (ratio := self.ratio(line, length))), default=None)

    def least_over_lengths(self) -> Range | None:
        """The range of `least`."""
        return Range.of(ratio for length in self.lengths if (ratio := self.least(length)))

    def memory(self, line: Line, length: AxisValue) -> Memory | None:
        """What a step took, None where it was not weighed or its output was wrong."""
        row = self.row(line, length)
        usable = row is not None and row.status in ("ok", "verified")
        return row.result.memory if usable and row and row.result else None

    def weighed(self) -> bool:
        """Whether any memory of the table is known."""
        return any(self.memory(line, length) for line in self.lines for length in self.lengths)

    def failed(self) -> list[Row]:
        """The cells of theirs that were tried and have no number: wrong values above all."""
        rows = [self.row(line, length) for line in self.theirs for length in self.lengths]
        return [row for row in rows if row is not None and row.status not in QUIET]
