"""Evidence in a run for how it cures the defects of document 000. Owns counts only; the words are in the template."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.views import Axes, View

WIDE_HIDDEN_SIZE = 102656
"""From here on a later report has sgmv_expand failing with triton 3.0.0."""


@dataclass(frozen=True, slots=True)
class Counted:
    """So many of so many."""

    count: int
    of: int


@dataclass(frozen=True)
class Defects:
    """A run, asked for evidence."""

    view: View

    @property
    def _ours(self) -> list[Row]:
        return [row for p in (self.view.default, self.view.tuned) if p for row in self.view.rows(p)]

    def tuned_sources(self) -> Mapping[str, Counted]:
        """Of the tuned cells that ran: how many had a configuration tuned for that very point, how many another's."""
        rows = [row for row in self.view.rows(self.view.tuned)] if self.view.tuned else []
        ran = [row.result.selection for row in rows if row.result and row.result.selection]
        return {
            source: Counted(sum(selection.source.startswith(source) for selection in ran), len(ran))
            for source in ("tuned-exact", "tuned-nearest")
        }

    def timed_of(self, subjects: Sequence[str]) -> Counted:
        """Cells with a number, of those planned for some operations."""
        rows = [row for row in self.view.analysis.rows if row.cell.subject in subjects]
        return Counted(sum(bool(row.summaries) for row in rows), len(rows))

    def refuted(self, guard: str) -> int:
        """Cells that a guard refuted."""
        return sum(f.guard == guard and f.severity == "refuted" for f in self.view.analysis.findings)

    def axis(self, name: str) -> list[AxisValue]:
        """The values that an axis takes in this run."""
        return self.view.analysis.axis_values(name)

    def checked(self) -> Counted:
        """Cells whose output passed the comparison with the reference, of all that ran one."""
        checks = [row.result.check for row in self.view.analysis.rows if row.result and row.result.check]
        return Counted(sum(check.passed for check in checks), len(checks))

    def check_rounds(self) -> tuple[int, int] | None:
        """Fewest and most sets of fresh inputs behind a passed check."""
        rounds = [r.result.check.rounds for r in self.view.analysis.rows if r.result and r.result.check]
        return (min(rounds), max(rounds)) if rounds else None

    def worst_error(self) -> tuple[float, float] | None:
        """The relative error closest to its bound among passed checks, with that bound."""
        checks = [row.result.check for row in self.view.analysis.rows if row.result and row.result.check]
        errors = [
            (check.relative_error / check.relative_bound, check.relative_error, check.relative_bound)
            for check in checks
            if check.passed and check.relative_error is not None
        ]
        return max(errors)[1:] if errors else None

    def longest(self) -> Mapping[str, Counted]:
        """Each provider at the longest sequences of sgmv: cells that passed the check, of those planned."""
        lengths = [value for value in self.axis("seq_len") if isinstance(value, int)]
        return {
            provider: self._passed([row for row in self.view.rows(provider) if _longest(row, max(lengths))])
            for provider in self.view.providers
            if lengths
        }

    def widest(self, family: str) -> int:
        """The largest hidden size that is planned for `bgmv` or `sgmv`."""
        rows = [row for row in self.view.analysis.rows if row.cell.subject.startswith(family)]
        return max((integer(row.cell.axes, "hidden_size") for row in rows), default=0)

    def wide(self) -> Counted:
        """Our cells at the widest hidden sizes that passed the check, of those that were planned."""
        return self._passed([row for row in self._ours if integer(row.cell.axes, "hidden_size") >= WIDE_HIDDEN_SIZE])

    def split_accumulation(self) -> Counted:
        """Our shrink cells whose configuration splits the sum over several programs, of those that ran."""
        ran = [
            row.result.selection.config
            for row in self._ours
            if row.cell.subject.endswith("_shrink") and row.result and row.result.selection
        ]
        return Counted(sum(config.get("SPLIT_K", 1) > 1 for config in ran), len(ran))

    def all_drawn(self) -> Counted:
        """Points with at least as many indices as adapters, so that every adapter is used; of all points."""
        points = [(subject, p) for subject in self.view.analysis.subjects() for p in self.view.points(subject)]
        full = [
            integer(point, "batch") * (integer(point, "seq_len") if subject.startswith("bgmv") else 1)
            >= integer(point, "num_loras")
            for subject, point in points
        ]
        return Counted(sum(full), len(full))

    def hidden_sizes(self) -> Counted:
        """Hidden sizes in the figures, of those planned: every one is plotted."""
        planned = self.axis("hidden_size")
        seen = {row.cell.axes["hidden_size"] for row in self.view.analysis.rows if row.summaries}
        return Counted(len(seen), len(planned))

    def _passed(self, rows: Sequence[Row]) -> Counted:
        return Counted(self.view.count(rows, "ok", "verified"), len(rows))


def integer(axes: Axes, name: str) -> int:
    value = axes.get(name, 0)
    return value if isinstance(value, int) else 0


def _longest(row: Row, length: int) -> bool:
    return row.cell.subject.startswith("sgmv") and row.cell.axes.get("seq_len") == length
