"""The published numbers of document 004 beside this run's, and what the audit says of them. Owns no measured number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench import audit, rates
from smbench.findings import Finding
from smbench.observations import Dataset, Observation, of_published
from smbench.published import Published

BENCHMARK = "benchmark"
"""The stage of the numbers that count; the others are of the warm-up."""
RECORDS = "records"
"""Title of the table that holds the result file."""
AGREEMENT = 1e-6
"""Relative distance of two numbers that are called equal: both are printed with all of their digits."""
Point = tuple[int, int, int]
"""Batch, input and output length."""


@dataclass(frozen=True, slots=True)
class Printed:
    """One case of the document, in seconds and token/s."""

    point: Point
    prefill_s: float
    step_s: float | None
    total_s: float
    rates: Mapping[str, float]
    """By metric, computed here from the times."""
    stated: Mapping[str, float]
    """The rates that the document prints."""


@dataclass(frozen=True)
class Document004:
    """The file of published numbers."""

    published: Published

    @cached_property
    def dataset(self) -> Dataset:
        """The numbers as an audit sees them."""
        return of_published(self.published.title, self.published, None)

    @cached_property
    def findings(self) -> Sequence[Finding]:
        """What the audit found."""
        return audit.examine(self.dataset)

    @cached_property
    def cases(self) -> Mapping[Point, Printed]:
        """The cases of the result file, in its order."""
        found: dict[Point, dict[str, Observation]] = {}
        for seen in self.dataset.observations:
            if seen.at.get("stage") == BENCHMARK and RECORDS in self.dataset.table_name(seen.table):
                point = (int(seen.at["batch"]), int(seen.at["input_len"]), int(seen.at["output_len"]))
                found.setdefault(point, {})[seen.metric] = seen
        return {point: _printed(point, numbers) for point, numbers in found.items()}

    @property
    def agrees(self) -> bool:
        """Whether every printed rate is what the formulas make of the printed times."""
        return all(
            abs(case.rates[metric] - stated) <= AGREEMENT * stated
            for case in self.cases.values()
            for metric, stated in case.stated.items()
        )

    @property
    def version(self) -> str:
        """What ran, as far as it is known."""
        stated = self.published.versions.get("sglang", "unstated")
        inferred = self.published.inferred.get("sglang")
        return f"sglang {inferred}, inferred" if stated == "unstated" and inferred else f"sglang {stated}"

    def ratio(self, metric: str, longer: Point, shorter: Point) -> float | None:
        """How much longer one case took than another, by a latency; None where one has none."""
        a, b = (
            (self.cases[point] for point in (longer, shorter))
            if {longer, shorter} <= self.cases.keys()
            else (None, None)
        )
        if a is None or b is None:
            return None
        first, second = _latency(a, metric), _latency(b, metric)
        return first / second if first and second else None


def _printed(point: Point, numbers: Mapping[str, Observation]) -> Printed:
    batch, input_len, output_len = point
    value = {metric: seen.value for metric, seen in numbers.items()}
    prefill_s, step_s, total_s = value["prefill_latency"], value.get("decode_latency"), value["e2e_latency"]
    return Printed(
        point,
        prefill_s,
        step_s,
        total_s,
        rates.batch_rates(batch, input_len, output_len, prefill_s, step_s, total_s),
        {metric: number for metric, number in value.items() if metric.endswith("_throughput")},
    )


def _latency(case: Printed, metric: str) -> float | None:
    return {"prefill_latency": case.prefill_s, "decode_latency": case.step_s, "e2e_latency": case.total_s}[metric]
