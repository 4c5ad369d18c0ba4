"""What guards look at and what they say. Owns these two values and the ways into the evidence; judges nothing."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from smbench.arch import Device
from smbench.recipe import Recipe
from smbench.result import Environment, Measurement, Result, Session, Work
from smbench.stats import Summary

BENIGN_REASONS = frozenset({"idle", "applications_clocks_setting"})
"""Clock-event reasons that do not slow a running kernel below its set clocks."""


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the guards look at."""

    recipe: Recipe
    device: Device | None
    """Physical peaks of the card, None where they are unknown."""
    results: Sequence[Result]
    summaries: Mapping[tuple[str, str], Summary]
    """By cell_id and measurement name."""
    environments: Sequence[Environment]
    sessions: Sequence[Session]


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a reader of the numbers must know."""

    guard: str
    severity: Literal["refuted", "warning", "note"]
    message: str
    """What was found, with its arithmetic."""
    remedy: str
    cell_id: str | None = None
    """The cell it is about; None where it is about the whole run."""
    about: tuple[str, ...] = ()
    """Labels of the published numbers that it is about; empty where it is about a run or no number in particular."""


def timed(evidence: Evidence) -> Iterator[tuple[Result, Measurement, Summary]]:
    """Every measurement with its cell and its summary."""
    for result in evidence.results:
        for measurement in result.measurements:
            yield result, measurement, evidence.summaries[result.cell_id, measurement.name]


def clocks_hz(result: Result) -> Sequence[float]:
    """The SM clocks that were seen while a cell ran; empty where none was read."""
    clocks: Sequence[float] = result.telemetry.get("sm_clock_hz", ())
    return clocks


def held_down(result: Result) -> list[str]:
    """What held the clocks down while a cell ran, as the driver says."""
    return [reason for reason in result.telemetry.get("throttle_reasons", ()) if reason not in BENIGN_REASONS]


def work_of(result: Result, measurement: Measurement) -> Work | None:
    """The least work of one sample: the measurement's own, else the cell's; None where nobody says.

    Measurements of an engine time different parts of a request, so the cell's work is no measurement's in particular.
    """
    return measurement.work or (result.work if result.cell.kind == "op" else None)
