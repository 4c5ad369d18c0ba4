"""The glossary of document 004's report: each metric, what ours counts, what other tools call it. Owns their order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from smbench.metricnames import TOOLS, Name, Tool, names_of
from smbench.metrics import METRICS, Definition, Metric, definition_of
from smbench.workloads import MEASURES

REPORTED = (
    "prefill_latency",
    "decode_latency",
    "prefill_throughput",
    "decode_throughput",
    "overall_throughput",
    "output_throughput",
    "ttft",
    "tpot",
    "itl",
    "e2e_latency",
    "duration",
    "request_throughput",
    "input_throughput",
    "total_token_throughput",
    "goodput",
)
"""The metrics of the document's workloads, in the order of the glossary."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One metric of the glossary."""

    metric: Metric
    ways: Sequence[tuple[Definition, Sequence[str]]]
    """Our definitions, each with the workloads whose numbers have it; the first one alone where no workload differs."""
    names: Sequence[tuple[Tool, Name]]
    """What other tools call it."""


def entries(subjects: Sequence[str]) -> list[Entry]:
    """The glossary for some workloads."""
    return [_entry(METRICS[name], subjects) for name in REPORTED]


def _entry(metric: Metric, subjects: Sequence[str]) -> Entry:
    by_way: dict[str, list[str]] = {}
    for subject in subjects:
        if _has(subject, metric.name):
            by_way.setdefault(definition_of(subject, metric.name), []).append(subject)
    ways = [(metric.way(name), found) for name, found in by_way.items()]
    return Entry(metric, ways, [(TOOLS[name.tool], name) for name in names_of(metric.name)])


def _has(subject: str, metric: str) -> bool:
    """Whether a workload has such numbers: what it measures, and the rates that follow."""
    if metric == "output_throughput" or metric in MEASURES[subject]:
        return True
    if metric == "goodput":
        return subject == "online"
    of_batches = metric in ("prefill_throughput", "decode_throughput", "overall_throughput")
    of_loads = metric in ("request_throughput", "input_throughput", "total_token_throughput")
    return (of_batches and subject == "static_batch") or (of_loads and subject != "static_batch")
