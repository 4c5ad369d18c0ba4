"""The attention of document 003's layer alone: times, rates, and how its error moves with the length. Pure values."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.result import OutputError
from smbench.stats import Summary
from smbench.views import Axes, View

FORWARD = "hstu_attention_forward"
BACKWARD = "hstu_attention_backward"
DIRECTIONS = (FORWARD, BACKWARD)
OUTPUTS = {FORWARD: ("y",), BACKWARD: ("dq", "dk", "dv")}
QUIET = ("ok", "verified", "unsupported", "skipped")
"""How a cell ends, or has not yet, that a table says with a number, a word or a dash."""
GROWS = 1.5
"""An error that is this much larger at the longest than at the shortest length is said to grow."""


@dataclass(frozen=True, slots=True)
class Growth:
    """How a provider's error of one output moves from the shortest to the longest length."""

    provider: str
    output: str
    errors: Sequence[float | None]
    """Relative, by length."""

    @property
    def factor(self) -> float | None:
        """The last over the first, None where one is missing."""
        known = [error for error in self.errors if error]
        return known[-1] / known[0] if len(known) > 1 else None

    @property
    def grows(self) -> bool:
        """Whether it grows."""
        return self.factor is not None and self.factor > GROWS


@dataclass(frozen=True)
class Attention:
    """A run, asked for what it says of the attention alone."""

    view: View

    @cached_property
    def family(self) -> Axes:
        """The axes of its main table, but the length: those of the plan's first point of equal lengths."""
        points = [p for p in self.view.points(FORWARD) if p["lengths"] == "full"]
        return {axis: value for axis, value in points[0].items() if axis != "seq_len"} if points else {}

    @cached_property
    def lengths(self) -> list[AxisValue]:
        """The rows of the main table."""
        points = [p for p in self.view.points(FORWARD) if all(p[axis] == v for axis, v in self.family.items())]
        return sorted({point["seq_len"] for point in points}, key=lambda value: int(value))

    @cached_property
    def providers(self) -> list[str]:
        """The providers of the attention in this profile."""
        return [p for p in self.view.providers if self.view.rows(p, FORWARD) or self.view.rows(p, BACKWARD)]

    @cached_property
    def shown(self) -> list[str]:
        """Those of them that are more than a reason in the list of what was not tested."""
        return [p for p in self.providers if any(self._usable(row) for row in self._rows(p))]

    def _rows(self, provider: str) -> list[Row]:
        return [row for direction in DIRECTIONS for row in self.view.rows(provider, direction)]

    @staticmethod
    def _usable(row: Row | None) -> bool:
        return row is not None and row.status in ("ok", "verified")

    def row(self, direction: str, provider: str, length: AxisValue) -> Row | None:
        """A cell of the main table."""
        return self.view.analysis.row(direction, provider, **self.family, seq_len=length) if self.family else None

    def number(self, direction: str, provider: str, length: AxisValue) -> Summary | None:
        """Its time by the headline measure."""
        row = self.row(direction, provider, length)
        return row.summary(self.view.headline.name) if row else None

    def ended(self, direction: str, provider: str, length: AxisValue) -> str | None:
        """How it ended."""
        row = self.row(direction, provider, length)
        return row.status if row else None

    def flops_per_s(self, direction: str, provider: str, length: AxisValue) -> float | None:
        """Operations by the document's formula, over its time."""
        row, summary = self.row(direction, provider, length), self.number(direction, provider, length)
        work = row.result.work if row and row.result else None
        return work.flops / summary.median if work and summary else None

    def failed(self) -> list[Row]:
        """The cells of the main table that were tried and have no number: wrong values above all."""
        cells = [(d, p, n) for d in DIRECTIONS for p in self.shown for n in self.lengths]
        rows = [self.row(*cell) for cell in cells]
        return [row for row in rows if row is not None and row.status not in QUIET]

    def measured(self) -> bool:
        """Whether any number of the main table exists."""
        cells = [(d, p, n) for d in DIRECTIONS for p in self.providers for n in self.lengths]
        return any(self.number(*cell) for cell in cells)

    def further(self) -> list[tuple[str, Axes]]:
        """The points outside the main table that any provider has a number or a verdict at."""
        table = [{**self.family, "seq_len": length} for length in self.lengths]
        points = [(d, p) for d in DIRECTIONS for p in self.view.points(d) if dict(p) not in table]
        return [(d, p) for d, p in points if any(self._at(d, provider, p) for provider in self.shown)]

    def _at(self, direction: str, provider: str, point: Axes) -> bool:
        return self._usable(self.view.analysis.row(direction, provider, **point))

    # -- errors

    def growths(self) -> list[Growth]:
        """Relative errors by length, for every provider and output that has any."""
        found = []
        for provider in self.shown:
            for direction in DIRECTIONS:
                for output in OUTPUTS[direction]:
                    errors = [self._error(self.row(direction, provider, n), output) for n in self.lengths]
                    if any(error is not None for error in errors):
                        found.append(Growth(provider, output, errors))
        return found

    @staticmethod
    def _error(row: Row | None, output: str) -> float | None:
        if row is None or row.result is None or row.result.check is None:
            return None
        check = row.result.check
        of_output = check.outputs.get(output)
        return of_output.relative_error if of_output else check.relative_error if output == "y" else None

    def error_lines(self) -> list[list[object]]:
        """Every checked output of every operation with its errors, as lines of a table."""
        rows = [row for row in self.view.analysis.rows if row.result and row.result.check]
        axes = list(dict.fromkeys(axis for row in rows for axis in row.cell.axes))
        head = ["operation", "provider", *axes, "output", "relative_error", "elementwise_error", "status"]
        lines: list[list[object]] = [list(head)]
        for row in rows:
            assert row.result is not None and row.result.check is not None
            check = row.result.check
            whole = OutputError(relative_error=check.relative_error, elementwise_error=check.elementwise_error)
            for output, errors in (check.outputs or {"y": whole}).items():
                told = ["" if e is None else f"{e:.4g}" for e in (errors.relative_error, errors.elementwise_error)]
                values = [row.cell.axes.get(axis, "") for axis in axes]
                lines.append([row.cell.subject, row.cell.provider, *values, output, *told, row.status])
        return lines
