"""Tables of published numbers: axes, columns, rows, missing cells, and how the document prints them.

Owns the schema of `[[table]]` and `[[settings]]`. Owns no conclusion and no rendering.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field, StrictFloat, model_validator

from smbench.cell import AxisValue
from smbench.metrics import METRICS
from smbench.recipe import Table

UNITS: Mapping[str, tuple[str, float]] = {
    "s": ("s", 1.0),
    "ms": ("s", 1e-3),
    "us": ("s", 1e-6),
    "GB/s": ("B/s", 1e9),
    "TFLOP/s": ("FLOP/s", 1e12),
    "token/s": ("token/s", 1.0),
}
"""Unit as published to the storage unit of its metric, and the factor between them."""

FIELD = re.compile(r"\{(\w+):(\d+)\.(\d+)\}")
"""A number in the pattern of a line: metric, width, decimals."""

Entry = AxisValue | StrictFloat


class Column(Table):
    """One measured column of a table."""

    metric: str
    """A name from `METRICS`."""
    unit: str
    """As published, a name from `UNITS`; as inferred where the document prints none."""
    at: dict[str, AxisValue]
    """Coordinates of this column alone, e.g. its provider."""
    digits: Annotated[int, Field(ge=0)] | None = None
    """Decimals that the document prints; None where it prints all that a float has."""
    definition: str | None = None
    """What the document says the metric counts, a name from `METRICS[…].definitions`; None where it is silent."""

    @property
    def factor(self) -> float:
        """Storage unit over published unit."""
        return UNITS[self.unit][1]

    @property
    def quantum(self) -> float:
        """The smallest difference that the printed digits can show, in the storage unit; 0 where all are there."""
        return 0.0 if self.digits is None else 10.0**-self.digits * self.factor

    @model_validator(mode="after")
    def _convertible(self) -> Self:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        if self.unit not in UNITS:
            raise ValueError(f"unknown unit {self.unit!r}; known: {', '.join(UNITS)}")
        metric = METRICS[self.metric]
        if UNITS[self.unit][0] != metric.unit:
            raise ValueError(f"{self.metric!r} is stored in {metric.unit}: {self.unit!r} cannot be")
        if self.definition is not None and self.definition not in metric.definitions:
            known = ", ".join(metric.definitions) or "none"
            raise ValueError(f"{self.metric!r} has no definition {self.definition!r}; known: {known}")
        return self


class Printed(Table):
    """One column as the document prints it: an axis, a value column or a constant."""

    header: str
    axis: str | None = None
    value: Annotated[int, Field(ge=0)] | None = None
    """Index into `columns`."""
    text: str | None = None
    """The same in every row; empty for a column that the document leaves blank."""
    labels: dict[str, str] = Field(default_factory=dict)
    """How the document writes a value of the axis, e.g. `1K` for 1024."""

    @model_validator(mode="after")
    def _one_content(self) -> Self:
        if sum(content is not None for content in (self.axis, self.value, self.text)) != 1:
            raise ValueError("exactly one of axis, value, text")
        return self


class Layout(Table):
    """`layout`: how the document prints the table."""

    section: str
    """The heading above it, as a path of headings."""
    form: Literal["table", "records", "lines"] = "table"
    """A Markdown table; JSON objects; lines of a log that other tables fill as well."""
    columns: list[Printed] = Field(default_factory=list)
    block: str | None = None
    """`lines`: the log, a name from `[block]`."""
    pattern: str | None = None
    """`lines`: a line, with `{metric:width.decimals}` where a number stands."""
    lines: list[int] = Field(default_factory=list)
    """`lines`: where the rows stand in the log, from 1."""


class Block(Table):
    """`[block.<name>]`: a log whose lines come from several tables."""

    section: str
    text: dict[str, str]
    """Lines without a measured number, by their place."""


class PublishedTable(Table):
    """`[[table]]`: each row holds the values of the axes, then a number or a name of `[missing]` for each column."""

    path: str
    """File or page of the source that holds it."""
    title: str = ""
    commit: str | None = None
    """Where it is another one than the file's."""
    at: dict[str, AxisValue]
    """Coordinates of the whole table."""
    axes: Annotated[list[str], Field(min_length=1)]
    columns: Annotated[list[Column], Field(min_length=1)]
    rows: Annotated[list[list[Entry]], Field(min_length=1)]
    read_off_plot: bool = False
    """The document shows a figure: the numbers were read off it, within `uncertainty`."""
    uncertainty: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Relative error of every value besides its rounding."""
    effective: dict[str, dict[str, AxisValue]] = Field(default_factory=dict)
    """By label of the first axis: the settings that the source's code really runs, where it is known."""
    layout: Layout | None = None
    """None where the document prints no such table: a figure, a data file."""

    @property
    def name(self) -> str:
        """What a finding calls it."""
        coordinates = ", ".join(f"{axis}={value}" for axis, value in self.at.items())
        return self.title or coordinates or self.path

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"axes: a name repeats: {', '.join(self.axes)}")
        if self.read_off_plot != (self.uncertainty > 0):
            raise ValueError("read_off_plot and an uncertainty above 0 come together")
        keys = set()
        for i, row in enumerate(self.rows):
            self._check_row(f"rows[{i}]", row)
            key = tuple(row[: len(self.axes)])
            if key in keys:
                raise ValueError(f"rows[{i}] repeats the point {self.coordinates(row)}")
            keys.add(key)
        labels = {str(row[0]) for row in self.rows}
        if unknown := sorted(self.effective.keys() - labels):
            raise ValueError(f"effective: no row is labelled {unknown[0]!r}")
        self._check_layout()
        return self

    def _check_row(self, where: str, row: Sequence[Entry]) -> None:
        if len(row) != len(self.axes) + len(self.columns):
            raise ValueError(f"{where} has {len(row)} entries, not {len(self.axes)} axes + {len(self.columns)} columns")
        if any(isinstance(entry, float) for entry in row[: len(self.axes)]):
            raise ValueError(f"{where}: the axes {', '.join(self.axes)} take integers and strings")
        for column, entry in zip(self.columns, row[len(self.axes) :], strict=True):
            # a string names a reason of [missing], which the whole file checks
            if isinstance(entry, str):
                continue
            if not math.isfinite(entry) or entry <= 0:
                raise ValueError(f"{where}: {entry!r} is not a positive number")
            if column.digits is not None and round(entry, column.digits) != entry:
                raise ValueError(f"{where}: {entry!r} has more than {column.digits} decimals")

    def _check_layout(self) -> None:
        layout = self.layout
        if layout is None:
            return
        if layout.form == "lines":
            metrics = [column.metric for column in self.columns]
            if layout.block is None or layout.pattern is None or len(layout.lines) != len(self.rows):
                raise ValueError("layout: lines need a block, a pattern and one line number for each row")
            if sorted(field[0] for field in FIELD.findall(layout.pattern)) != sorted(metrics):
                raise ValueError(f"layout.pattern: one {{metric:width.decimals}} for each of {', '.join(metrics)}")
            return
        for i, printed in enumerate(layout.columns):
            if printed.axis is not None and printed.axis not in self.axes:
                raise ValueError(f"layout.columns[{i}]: unknown axis {printed.axis!r}; known: {', '.join(self.axes)}")
        shown = sorted(printed.value for printed in layout.columns if printed.value is not None)
        if shown != list(range(len(self.columns))):
            raise ValueError(f"layout.columns: each of the {len(self.columns)} value columns once, not {shown}")

    def coordinates(self, row: Sequence[Entry]) -> dict[str, AxisValue]:
        """The axis values of a row by name."""
        # a float cannot be an axis value: loading refuses it
        return {name: entry for name, entry in zip(self.axes, row, strict=False) if not isinstance(entry, float)}

    def missing(self) -> list[dict[str, AxisValue]]:
        """Combinations of the axis values that the table mentions for which it has no row."""
        keys = {tuple(row[: len(self.axes)]) for row in self.rows}
        values = [list(dict.fromkeys(row[i] for row in self.rows)) for i in range(len(self.axes))]
        return [self.coordinates(key) for key in itertools.product(*values) if key not in keys]

    def reasons(self) -> Iterator[tuple[int, str]]:
        """Every missing cell: index of its row, and the name of its reason."""
        for i, row in enumerate(self.rows):
            for entry in row[len(self.axes) :]:
                if isinstance(entry, str):
                    yield i, entry


class Settings(Table):
    """`[[settings]]`: a table of the document that states how it measured."""

    section: str
    headers: Annotated[list[str], Field(min_length=2, max_length=2)]
    rows: Annotated[list[Annotated[list[str], Field(min_length=2, max_length=2)]], Field(min_length=1)]
    """Item and value, as printed."""
    found: dict[str, str] = Field(default_factory=dict)
    """By item: what the source's code really has, where that is another value."""

    @model_validator(mode="after")
    def _known_items(self) -> Self:
        if unknown := sorted(self.found.keys() - {item for item, _ in self.rows}):
            raise ValueError(f"found: no row is called {unknown[0]!r}")
        return self
