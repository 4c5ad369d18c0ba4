"""What a file of published numbers declares beside them, so that an audit can hold the numbers against it.

Owns the schema of the work a point needs, of features, derived quantities and expectations, all of them arithmetic over
the file's facts and a point's coordinates. Owns no verdict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, StrictFloat, StrictInt, model_validator

from smbench.cell import AxisValue
from smbench.expression import Formula, evaluate
from smbench.metrics import METRICS
from smbench.recipe import Table

Where = dict[str, AxisValue | list[AxisValue]]
"""Coordinates that a point must have; of a list, one."""

DEVICE_NUMBERS = ("device_memory_bytes", "device_l2_bytes")
"""Names that stand for the card's figures in a formula."""


class Phase(Table):
    """A part of what a point's time is spent on; parts follow each other."""

    name: str
    times: Formula = "1"
    bytes: Formula = "0"
    """The least that one of them moves to or from device memory."""
    flops: Formula = "0"


class WorkRow(Table):
    """`[[work]]`: the least work of the points that match."""

    where: Where
    metric: str
    """The metric whose time the work takes."""
    dtype: str
    """Precision of the matrix products, as in docker/archs.toml."""
    accumulate: Literal["float32", "float16"] = "float32"
    """Precision of their sums: some cards have a higher peak, or one that is not known, for float16."""
    phases: Annotated[list[Phase], Field(min_length=1)]


class Feature(Table):
    """`[[feature]]`: something that works only where a load exceeds a limit."""

    name: str
    needs: Formula
    """The load that the protocol reaches."""
    exceeds: Formula
    """The limit above which the feature does anything."""
    unit: str
    because: str
    """What the two numbers are, in our words."""


class Quantity(Table):
    """`[[quantity]]`: something besides the studied axis that a time may depend on."""

    name: str
    formula: Formula
    unit: str
    along: str
    """The axis that the document studies."""
    where: Where = Field(default_factory=dict)
    limit: str | None = None
    """A device figure that the quantity may cross."""

    @model_validator(mode="after")
    def _known_limit(self) -> Self:
        if self.limit is not None and self.limit not in DEVICE_NUMBERS:
            raise ValueError(f"limit: unknown figure {self.limit!r}; known: {', '.join(DEVICE_NUMBERS)}")
        return self


class Expectation(Table):
    """`[[expectation]]`: a ratio of two numbers at otherwise equal coordinates lies in a range."""

    text: str
    """What is expected, in our words."""
    stated: bool
    """The document states it; otherwise it follows from what the document says it measures."""
    metric: str
    where: Where = Field(default_factory=dict)
    numerator: dict[str, AxisValue]
    denominator: dict[str, AxisValue]
    low: Annotated[float, Field(gt=0)]
    high: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _comparable(self) -> Self:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        if self.numerator.keys() != self.denominator.keys() or self.numerator == self.denominator:
            raise ValueError("numerator and denominator give other values to the same coordinates")
        return self


class Tuned(Table):
    """`[[tuned]]`: the problem that the launch parameters of some points were searched for."""

    where: Where
    at: dict[str, AxisValue]


Fact = StrictInt | StrictFloat | Formula
"""A number, or a formula over the facts above it."""


@dataclass(frozen=True, slots=True)
class PhaseWork:
    """The work of one phase at one point, as numbers."""

    name: str
    times: float
    bytes: float
    flops: float


def resolved(facts: Mapping[str, Fact]) -> dict[str, float]:
    """The facts as numbers, in order: a formula may use those above it. ValueError names the fact."""
    found: dict[str, float] = {}
    for name, fact in facts.items():
        try:
            found[name] = evaluate(fact, found) if isinstance(fact, str) else float(fact)
        except ValueError as error:
            raise ValueError(f"facts.{name}: {error}") from error
    return found


def numbers_at(facts: Mapping[str, float], at: Mapping[str, AxisValue]) -> dict[str, float]:
    """What a formula may name at a point: the facts, and the coordinates that are integers."""
    return {**facts, **{name: float(value) for name, value in at.items() if isinstance(value, int)}}


def matches(where: Where, at: Mapping[str, AxisValue]) -> bool:
    """Whether a point has the coordinates."""
    return all(
        name in at and (at[name] in wanted if isinstance(wanted, list) else at[name] == wanted)
        for name, wanted in where.items()
    )


def phases_at(row: WorkRow, numbers: Mapping[str, float]) -> tuple[PhaseWork, ...]:
    """The phases of a point, as numbers. ValueError names the phase and the field."""
    phases = []
    for phase in row.phases:
        found = {}
        for field in ("times", "bytes", "flops"):
            try:
                found[field] = evaluate(getattr(phase, field), numbers)
            except ValueError as error:
                raise ValueError(f"phase {phase.name!r}: {field}: {error}") from error
            if found[field] < 0:
                raise ValueError(f"phase {phase.name!r}: {field} is negative: {found[field]:g}")
        phases.append(PhaseWork(name=phase.name, **found))
    return tuple(phases)
