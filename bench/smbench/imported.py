"""What a result file of another tool says, as one record whatever the tool. Pure; owns the shape and its rules.

Does not read files (`importing`), nor say what may be compared (`alignment`). A number carries the metric and the
definition that it really has (`metrics`), in the metric's unit; what the file does not say is absent, never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import Field, FiniteFloat, StrictInt, StrictStr, model_validator

from smbench.cell import AxisValue
from smbench.metricnames import TOOLS
from smbench.metrics import METRICS
from smbench.result import Facts, Record

FORMAT = 1
"""Version of an import file. History: 1 = first."""
KIND = "smbench import"

Workload = Literal["static_batch", "offline", "online"]
Count = Annotated[StrictInt, Field(ge=0)]
Value = Annotated[FiniteFloat, Field(ge=0)]

MEDIAN_TOLERANCE = 1e-3
"""Relative difference up to which a stated median is the one of the samples: tools print some with few digits."""


class Measure(Record):
    """One metric of one run: its samples, where the file has them, and the statistics that the file states."""

    metric: str
    definition: str
    """What was counted: a definition of that metric."""
    samples: tuple[Value, ...] = ()
    """In the file's order. Empty where it has statistics only."""
    stated: Mapping[str, Value] = {}
    """`total` for a figure that is one of its kind, such as a throughput; else by statistic: `median`, `p99`."""

    @model_validator(mode="after")
    def _declared(self) -> Self:
        if self.metric not in METRICS:
            raise ValueError(f"unknown metric {self.metric!r}; known: {', '.join(METRICS)}")
        try:
            METRICS[self.metric].way(self.definition)
        except KeyError as error:
            raise ValueError(error.args[0]) from error
        if not self.samples and not self.stated:
            raise ValueError(f"{self.metric}: neither samples nor a statistic")
        return self

    def statistic(self, name: str) -> float | None:
        """A statistic: as the file states it, else of the samples; None where neither knows it."""
        if name in self.stated:
            return self.stated[name]
        if not self.samples:
            return None
        if name in ("median", "total"):
            return float(np.median(self.samples)) if name == "median" else None
        return float(np.mean(self.samples)) if name == "mean" else None

    def contradiction(self) -> str | None:
        """How the stated median and the samples disagree; None where they do not."""
        if not self.samples or "median" not in self.stated:
            return None
        found, stated = float(np.median(self.samples)), self.stated["median"]
        if abs(found - stated) <= MEDIAN_TOLERANCE * max(found, stated):
            return None
        unit = METRICS[self.metric].unit
        return f"{self.metric}: states a median of {stated:.6g} {unit}, and that of its samples is {found:.6g} {unit}"


class ImportedRun(Record):
    """One result of a file: one load, or one batch."""

    tool: str
    tool_version: str | None
    """None where the file does not say."""
    workload: Workload
    engine: str | None
    """What served, where the file or the user says; a tool's name for an interface is no engine."""
    model: str | None
    """Its name without the folder that it lay in."""
    axes: Mapping[str, AxisValue]
    """What was asked, by our names of axes, as far as it is said: `batch`, `input_len`, `request_rate`, …"""
    settings: Facts = Field(default_factory=dict)
    """What else the file says of how it measured, in the tool's own keys."""
    completed: Count | None = None
    """Requests; None where the file does not count them, as for all of these."""
    failed: Count | None = None
    prompt_tokens: Count | None = None
    completion_tokens: Count | None = None
    measures: tuple[Measure, ...]
    notes: tuple[str, ...] = ()
    """What a reader must know: what is missing, what was computed, what does not agree."""
    source: str
    """The file's name."""
    source_sha256: str
    position: Annotated[StrictInt, Field(ge=1)] = 1
    """Which result of the file it is."""

    @model_validator(mode="after")
    def _known(self) -> Self:
        if self.tool not in TOOLS:
            raise ValueError(f"unknown tool {self.tool!r}; known: {', '.join(TOOLS)}")
        keys = [(measure.metric, measure.definition) for measure in self.measures]
        if len(set(keys)) < len(keys):
            raise ValueError("a metric is there twice in one definition")
        return self

    def measure(self, metric: str, definition: str | None = None) -> Measure | None:
        """The measure of a metric, in that definition where one is given; None where there is none."""
        for measure in self.measures:
            if measure.metric == metric and definition in (None, measure.definition):
                return measure
        return None


class ImportFile(Record):
    """The file that `smbench import` writes."""

    kind: Literal["smbench import"]
    format: int
    smbench_version: StrictStr
    label: StrictStr
    """What the user calls it."""
    device: StrictStr | None
    """What it ran on, as the user says: none of the tools' files does."""
    runs: Annotated[tuple[ImportedRun, ...], Field(min_length=1)]
