"""Published measurements as data: what a document or its repository printed, number by number.

Owns the format of `recipes/published/*.toml` and the conversion to storage units. Does not own our own results, and
draws no conclusion from either.
"""

from __future__ import annotations

import difflib
import itertools
import math
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError, model_validator

from smbench.cell import AxisValue
from smbench.errors import CorruptError, UsageError
from smbench.metrics import METRICS
from smbench.recipe import Table, explain

FORMAT = 1
"""Version of the file format. History: 1 = first."""

UNITS: Mapping[str, tuple[str, float]] = {
    "s": ("s", 1.0),
    "ms": ("s", 1e-3),
    "us": ("s", 1e-6),
    "GB/s": ("B/s", 1e9),
    "TFLOP/s": ("FLOP/s", 1e12),
}
"""Unit as published to the storage unit of its metric, and the factor between them."""

Scalar = StrictBool | StrictInt | StrictFloat | StrictStr


@dataclass(frozen=True, slots=True)
class Point:
    """One published number."""

    at: Mapping[str, AxisValue]
    """Every coordinate: `op`, `provider`, `config`, and the axes that a cell has, e.g. `batch`, `hidden_size`."""
    metric: str
    value: float
    """In the storage unit of the metric: a duration is in seconds."""
    printed: float
    """As published, in `unit`."""
    unit: str
    path: str
    """File of the source that holds it."""


class Source(Table):
    """`[source]`: where the numbers can be looked up."""

    repository: str
    commit: str
    licence: str
    """What the source states of its licence. Numbers are facts; its words and code are not taken."""


class Column(Table):
    """One measured column of a table."""

    metric: str
    """A name from `METRICS`."""
    unit: str
    """As published, a name from `UNITS`."""
    at: dict[str, AxisValue]
    """Coordinates of this column alone, e.g. its provider."""

    @model_validator(mode="after")
    def _convertible(self) -> Self:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        if self.unit not in UNITS:
            raise ValueError(f"unknown unit {self.unit!r}; known: {', '.join(UNITS)}")
        if UNITS[self.unit][0] != METRICS[self.metric].unit:
            raise ValueError(f"{self.metric!r} is stored in {METRICS[self.metric].unit}: {self.unit!r} cannot be")
        return self


class PublishedTable(Table):
    """`[[table]]`: each row holds the values of the axes, then one number for each column."""

    path: str
    at: dict[str, AxisValue]
    """Coordinates of the whole table."""
    axes: Annotated[list[str], Field(min_length=1)]
    columns: Annotated[list[Column], Field(min_length=1)]
    rows: Annotated[list[list[AxisValue | StrictFloat]], Field(min_length=1)]

    @model_validator(mode="after")
    def _well_formed(self) -> Self:
        if len(set(self.axes)) != len(self.axes):
            raise ValueError(f"axes: a name repeats: {', '.join(self.axes)}")
        keys = set()
        for i, row in enumerate(self.rows):
            if len(row) != len(self.axes) + len(self.columns):
                raise ValueError(
                    f"rows[{i}] has {len(row)} entries, not {len(self.axes)} axes + {len(self.columns)} columns"
                )
            if any(isinstance(entry, float) for entry in row[: len(self.axes)]):
                raise ValueError(f"rows[{i}]: the axes {', '.join(self.axes)} take integers and strings")
            for entry in row[len(self.axes) :]:
                if isinstance(entry, str) or not math.isfinite(entry) or entry <= 0:
                    raise ValueError(f"rows[{i}]: {entry!r} is not a positive number")
            key = tuple(row[: len(self.axes)])
            if key in keys:
                raise ValueError(f"rows[{i}] repeats the point {self.coordinates(row)}")
            keys.add(key)
        return self

    def coordinates(self, row: Sequence[AxisValue | float]) -> dict[str, AxisValue]:
        """The axis values of a row by name."""
        # a float cannot be an axis value: loading refuses it
        return {name: entry for name, entry in zip(self.axes, row, strict=False) if not isinstance(entry, float)}

    def missing(self) -> list[dict[str, AxisValue]]:
        """Combinations of the axis values that the table mentions for which it has no row."""
        keys = {tuple(row[: len(self.axes)]) for row in self.rows}
        values = [list(dict.fromkeys(row[i] for row in self.rows)) for i in range(len(self.axes))]
        return [self.coordinates(key) for key in itertools.product(*values) if key not in keys]


class Published(Table):
    """A whole file."""

    format: int
    document: str
    """Number of the document."""
    title: str
    device: str
    arch: str
    notes: list[str]
    """What a reader must know of all the numbers, in our words."""
    versions: dict[str, str]
    source: Source
    protocol: dict[str, Scalar]
    """How it was timed, in our words for methods and L2 states where they fit."""
    legend: dict[str, str]
    """What the document's labels stand for."""
    at: dict[str, AxisValue]
    """Coordinates of every number of the file."""
    table: Annotated[list[PublishedTable], Field(min_length=1)]

    @model_validator(mode="after")
    def _coordinates_once(self) -> Self:
        for i, table in enumerate(self.table):
            for j, column in enumerate(table.columns):
                names = [*self.at, *table.at, *table.axes, *column.at]
                for name in names:
                    if names.count(name) > 1:
                        raise ValueError(f"table[{i}].columns[{j}]: coordinate {name!r} is given twice")
        return self

    def points(self) -> Iterator[Point]:
        """Every number, row by row in the order of the file."""
        for table in self.table:
            for row in table.rows:
                at = {**self.at, **table.at, **table.coordinates(row)}
                for column, printed in zip(table.columns, row[len(table.axes) :], strict=True):
                    factor = UNITS[column.unit][1]
                    yield Point(
                        at={**at, **column.at},
                        metric=column.metric,
                        value=float(printed) * factor,
                        printed=float(printed),
                        unit=column.unit,
                        path=table.path,
                    )


def load(path: Path) -> Published:
    """The published numbers in a file. UsageError names file, key path and known keys; CorruptError: a newer format."""
    return parse(path.read_bytes(), path.name)


def parse(text: bytes, name: str) -> Published:
    """The published numbers in the bytes of a TOML file called `name`."""
    try:
        data = tomllib.loads(text.decode("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: not valid TOML: {error}") from error
    version = data.get("format")
    if isinstance(version, int) and version > FORMAT:
        raise CorruptError(f"{name}: format {version} is newer than this smbench reads ({FORMAT}); update smbench")
    try:
        return Published.model_validate(data)
    except ValidationError as error:
        raise UsageError("\n".join(explain(error, Published, name))) from error


def find(name: str, folder: Path) -> Path:
    """The file of published numbers by name. UsageError lists the names that exist and the nearest one."""
    known = names(folder)
    if name not in known:
        hint = difflib.get_close_matches(name, known, n=1)
        did_you_mean = f"; did you mean {hint[0]!r}?" if hint else ""
        raise UsageError(f"no published numbers {name!r}; known: {', '.join(known) or 'none'}{did_you_mean}")
    return folder / f"{name}.toml"


def names(folder: Path) -> list[str]:
    """Names of all files of published numbers in a folder."""
    return sorted(path.stem for path in folder.glob("*.toml"))
