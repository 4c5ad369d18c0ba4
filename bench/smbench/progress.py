"""Progress of a run on the terminal: a bar with the time left, or plain lines where nobody watches. Owns no result."""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Collection, Mapping
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from smbench.plan import Plan
from smbench.result import Result

LINE_PERIOD_S = 10.0
"""Plain lines come this often."""


class Progress:
    """Follows a run. As a context manager, since a bar must be taken off the terminal whatever happens."""

    def __init__(self, plan: Plan, done: Collection[str]) -> None:
        planned = {entry.cell.cell_id for entry in plan.entries}
        self._total = len(planned)
        self._done = len(planned.intersection(done))
        self._estimate_s = plan.estimate_s(done)
        self._counts: Counter[str] = Counter()
        self._began = self._last_line = time.monotonic()
        self._measured = 0
        self._console = Console(stderr=True, highlight=False)
        self._bar = Bar(
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("cells", total=self._total, completed=self._done)

    def __enter__(self) -> Self:
        resumed = f", {self._done} of them already measured" if self._done else ""
        _line(f"{self._total} cells{resumed}; about {_minutes(self._estimate_s)} to go")
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()
        if self._measured:
            _line(self._state())

    def advance(self, result: Result) -> None:
        """Count one result."""
        self._counts[result.status] += 1
        self._measured += 1
        self._bar.update(self._task, advance=1, description=result.cell.label()[:60])
        now = time.monotonic()
        if self._bar.disable and now - self._last_line > LINE_PERIOD_S:
            self._last_line = now
            left = self._total - self._done - self._measured
            rate_s = (now - self._began) / self._measured
            _line(f"{self._state()}; about {_minutes(left * rate_s)} left")

    def _state(self) -> str:
        counts = ", ".join(f"{count} {status}" for status, count in self._counts.items())
        return f"{self._done + self._measured} of {self._total} cells ({counts})"


class TuneProgress:
    """Follows a tuning session by plain lines."""

    def __init__(self, total: int) -> None:
        self._total = total
        self._counts: Counter[str] = Counter()
        self._began = self._last_line = time.monotonic()

    def __enter__(self) -> Self:
        _line(f"{self._total} points; what the journal has is not searched again; compiling first")
        return self

    def __exit__(self, *_: object) -> None:
        _line(self._state())

    def advance(self, event: Mapping[str, Any]) -> None:
        """Count one point, searched or compared with an exhaustive search."""
        self._counts[event["event"]] += 1
        now = time.monotonic()
        if now - self._last_line > LINE_PERIOD_S:
            self._last_line = now
            _line(self._state())

    def _state(self) -> str:
        checked = f", {self._counts['quality']} searched exhaustively" if self._counts["quality"] else ""
        return f"{self._counts['tuned']} points tuned{checked} in {_minutes(time.monotonic() - self._began)}"


def _line(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # noqa: T201 - plain lines are this module's product


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
