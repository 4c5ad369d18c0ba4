"""Published measurements as data: what a document or its repository printed, number by number.

Owns the format of `recipes/published/*.toml` and the conversion to storage units. Does not own our own results, and
draws no conclusion from either.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, StrictBool, StrictFloat, StrictInt, StrictStr, ValidationError, model_validator

from smbench.cell import AxisValue
from smbench.errors import CorruptError, UsageError
from smbench.expression import evaluate
from smbench.faults import explain
from smbench.published_facts import (
    DEVICE_NUMBERS,
    Expectation,
    Fact,
    Feature,
    Quantity,
    Tuned,
    WorkRow,
    matches,
    numbers_at,
    phases_at,
    resolved,
)
from smbench.published_table import UNITS, Block, Column, PublishedTable, Settings
from smbench.recipe import Table

__all__ = ["UNITS", "Column", "Point", "Published", "PublishedTable", "find", "load", "names", "parse"]

FORMAT = 2
"""Version of the file format. History: 1 = first; 2 = missing cells, printed layout, facts that an audit uses."""

UNSTATED = "unstated"
"""What stands where the document is silent."""

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
    uncertainty: float = 0.0
    """Relative error of a number read off a plot, 0 for a printed one."""


class Source(Table):
    """`[source]`: where the numbers can be looked up."""

    repository: str
    commit: str
    licence: str
    """What the source states of its licence. Numbers are facts; its words and code are not taken."""


class Missing(Table):
    """`[missing.<name>]`: why a table has cells without a number."""

    reason: str
    kind: Literal["unmeasured", "inapplicable"]
    """A gap in what was measured, or a cell that cannot have a number."""


class Published(Table):
    """A whole file: the numbers of one document, or of one device where a document has several."""

    format: int
    document: str
    """Number of the document."""
    title: str
    device: str
    """Under the name that NVML reports, or `unstated`."""
    device_basis: Literal["stated", "inferred", "unstated"] = "stated"
    arch: str
    notes: list[str]
    """What a reader must know of all the numbers, in our words."""
    versions: dict[str, str]
    source: Source
    protocol: dict[str, Scalar]
    """How it was timed, our words for methods and L2 states where they fit; `unstated` where the document is silent."""
    inferred: dict[str, Scalar] = Field(default_factory=dict)
    """The same keys, and others: what is most likely, where the document is silent. A note says on what basis."""
    legend: dict[str, str]
    """What the document's labels stand for."""
    at: dict[str, AxisValue]
    """Coordinates of every number of the file."""
    missing: dict[str, Missing] = Field(default_factory=dict)
    """The reasons that cells of a table may name."""
    facts: dict[str, Fact] = Field(default_factory=dict)
    """Numbers of the model and the workload, for the formulas below; a formula may use the facts above it."""
    work: list[WorkRow] = Field(default_factory=list)
    feature: list[Feature] = Field(default_factory=list)
    quantity: list[Quantity] = Field(default_factory=list)
    expectation: list[Expectation] = Field(default_factory=list)
    tuned: list[Tuned] = Field(default_factory=list)
    settings: list[Settings] = Field(default_factory=list)
    block: dict[str, Block] = Field(default_factory=dict)
    table: Annotated[list[PublishedTable], Field(min_length=1)]

    @model_validator(mode="after")
    def _tables_fit(self) -> Self:
        for i, table in enumerate(self.table):
            for j, column in enumerate(table.columns):
                names = [*self.at, *table.at, *table.axes, *column.at]
                for name in names:
                    if names.count(name) > 1:
                        raise ValueError(f"table[{i}].columns[{j}]: coordinate {name!r} is given twice")
            for row, reason in table.reasons():
                if reason not in self.missing:
                    known = ", ".join(self.missing) or "none"
                    what = f"{reason!r} is not a positive number"
                    raise ValueError(f"table[{i}].rows[{row}]: {what}, and no reason of [missing]: {known}")
            if table.layout and table.layout.block is not None and table.layout.block not in self.block:
                known = ", ".join(self.block) or "none"
                raise ValueError(f"table[{i}].layout.block: unknown block {table.layout.block!r}; known: {known}")
        return self

    @model_validator(mode="after")
    def _formulas_have_numbers(self) -> Self:
        points = list(self.points())
        for where, compute in self._computations(points):
            try:
                compute()
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error
        return self

    def _computations(self, points: Sequence[Point]) -> Iterator[tuple[str, Callable[[], object]]]:
        """Every formula at every point that it is for, with the key that holds it."""
        device = dict.fromkeys(DEVICE_NUMBERS, 1.0)
        for i, feature in enumerate(self.feature):
            for formula in (feature.needs, feature.exceeds):
                yield f"feature[{i}]", partial(evaluate, formula, {**self.numbers, **device})
        for i, row in enumerate(self.work):
            found = [point for point in points if point.metric == row.metric and matches(row.where, point.at)]
            if not found:
                raise ValueError(f"work[{i}].where: no {row.metric} has these coordinates")
            for point in found:
                yield f"work[{i}]", partial(phases_at, row, numbers_at(self.numbers, point.at))
        for i, quantity in enumerate(self.quantity):
            found = [point for point in points if quantity.along in point.at and matches(quantity.where, point.at)]
            if not found:
                raise ValueError(f"quantity[{i}]: no number has the axis {quantity.along!r} and these coordinates")
            for point in found:
                yield f"quantity[{i}]", partial(evaluate, quantity.formula, numbers_at(self.numbers, point.at))

    @cached_property
    def numbers(self) -> Mapping[str, float]:
        """The facts as numbers."""
        return resolved(self.facts)

    def points(self) -> Iterator[Point]:
        """Every number, row by row in the order of the file; a missing cell has none."""
        for table in self.table:
            for row in table.rows:
                at = {**self.at, **table.at, **table.coordinates(row)}
                for column, printed in zip(table.columns, row[len(table.axes) :], strict=True):
                    if isinstance(printed, str):
                        continue
                    yield Point(
                        at={**at, **column.at},
                        metric=column.metric,
                        value=float(printed) * column.factor,
                        printed=float(printed),
                        unit=column.unit,
                        path=table.path,
                        uncertainty=table.uncertainty,
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
