"""benchmarks.json of guidellm, report version 2. Read in guidellm 0.8.1.

Each benchmark of a report is a load. The file holds every request, unless it was told to sample them; latencies are
taken from those, since the statistics of its token latencies weigh each request by its tokens. Its
`inter_token_latency_ms` is our tpot, its `time_per_output_token_ms` includes the first token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from smbench.cell import AxisValue
from smbench.errors import CorruptError
from smbench.imported import ImportedRun, Measure
from smbench.importing.content import Content, Fields, base_name, common_length, rate_text

TOOL = "guidellm"
FORMAT = "guidellm (benchmarks.json, report version 2)"
VERSION = 2
_LATENCIES = {
    "time_to_first_token_ms": ("ttft", "first token", 1e-3),
    "inter_token_latency_ms": ("tpot", "after first token", 1e-3),
    "time_per_output_token_ms": ("tpot", "all tokens", 1e-3),
    "request_latency": ("e2e_latency", "request", 1.0),
}
_WEIGHTED = ("inter_token_latency_ms", "time_per_output_token_ms")
_RATES = {
    "requests_per_second": "request_throughput",
    "output_tokens_per_second": "output_throughput",
    "tokens_per_second": "total_token_throughput",
}
_STATISTICS = {"mean": "mean", "median": "median", "std_dev": "std", "min": "min", "max": "max"}


def knows(keys: set[str]) -> bool:
    """Whether an object with these keys is a report of the tool."""
    return {"metadata", "benchmarks"} <= keys


def read(content: Content) -> Iterator[ImportedRun]:
    """Each benchmark of the report. CorruptError for another version of it."""
    position = 0
    for number, values in enumerate(content.objects, 1):
        report = Fields(values, f"{content.name}: object {number}")
        metadata = report.part("metadata")
        if metadata.count("version") != VERSION:
            raise CorruptError(
                f"{metadata.where}: version: report version {metadata.count('version')} of guidellm; known: {VERSION} "
                "(guidellm 0.8); export the run with that version again"
            )
        for benchmark in report.parts("benchmarks"):
            position += 1
            yield _run(benchmark, metadata, content, position)
    if position == 0:
        raise CorruptError(f"{content.name}: a report of guidellm without a benchmark")


def _run(fields: Fields, metadata: Fields, content: Content, position: int) -> ImportedRun:
    metrics, config = fields.part("metrics"), fields.part("config")
    counts = metrics.part("request_totals")
    completed, failed = counts.count("successful"), counts.count("errored")
    requests = fields.part("requests").parts("successful")
    measures, notes = _latencies(metrics, requests, completed)
    measures += _rates(metrics) if completed else []
    if completed:
        measures.append(Measure(metric="duration", definition="window", stated={"total": fields.number("duration")}))
    whole = len(requests) == completed
    prompts, outputs = (
        [number for request in requests if (number := request.maybe_number(key)) is not None]
        for key in ("prompt_tokens", "output_tokens")
    )
    incomplete = counts.count("incomplete")
    if incomplete:
        notes.append(f"{incomplete} requests were cut off by the end of the load: they are in no number")
    backend = config.maybe_part("backend")
    return ImportedRun(
        tool=TOOL,
        tool_version=metadata.maybe_text("guidellm_version"),
        workload="online",
        engine=None,
        model=base_name(backend.maybe_text("model")) if backend else None,
        axes=_axes(config, completed + failed + incomplete, prompts, outputs),
        settings={
            **({f"backend.{k}": v for k, v in backend.plain(("kind", "request_format")).items()} if backend else {}),
            **{f"strategy.{k}": v for k, v in config.part("strategy").plain(("type_",)).items()},
        },
        completed=completed,
        failed=failed,
        prompt_tokens=int(sum(prompts)) if whole else None,
        completion_tokens=int(sum(outputs)) if whole else None,
        measures=tuple(measures),
        notes=tuple(notes),
        source=content.name,
        source_sha256=content.sha256,
        position=position,
    )


def _latencies(metrics: Fields, requests: Sequence[Fields], completed: int) -> tuple[list[Measure], list[str]]:
    """Of the requests themselves where all are in the file; else the statistics that weigh every request alike."""
    measures = []
    whole = len(requests) == completed
    for key, (metric, definition, scale) in _LATENCIES.items():
        samples = [value * scale for request in requests if (value := request.maybe_number(key)) is not None]
        stated: dict[str, float] = {}
        if not whole and key not in _WEIGHTED:
            distribution = metrics.part(key).part("successful")
            stated = {name: distribution.number(own) * scale for own, name in _STATISTICS.items()}
        if (whole and samples) or stated:
            found = tuple(samples) if whole else ()
            measures.append(Measure(metric=metric, definition=definition, samples=found, stated=stated))
    if whole:
        return measures, []
    return measures, [f"the file holds {len(requests)} of {completed} requests: latencies are its statistics, no tpot"]


def _rates(metrics: Fields) -> list[Measure]:
    found = []
    for key, metric in _RATES.items():
        mean = metrics.part(key).part("successful").number("mean")
        # with a single event there is no rate, and a zero stands there
        if mean > 0:
            found.append(Measure(metric=metric, definition="rate over time", stated={"total": mean}))
    return found


def _axes(config: Fields, asked: int, prompts: Sequence[float], outputs: Sequence[float]) -> dict[str, AxisValue]:
    strategy = config.part("strategy")
    rate = strategy.maybe_number("rate")
    limit = strategy.maybe_count("max_concurrency")
    if strategy.maybe_text("type_") == "synchronous":
        limit = 1
    stated: dict[str, Any] = {
        "num_prompts": asked,
        "input_len": common_length(prompts),
        "output_len": common_length(outputs),
        "request_rate": rate_text(rate) if rate else "inf",
        "max_concurrency": limit or 0,
    }
    return {name: value for name, value in stated.items() if value is not None}
