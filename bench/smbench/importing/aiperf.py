"""Result files of aiperf: profile_export_aiperf.json, its .csv twin, and the records of profile_export.jsonl.

Read in aiperf 0.13.0 (export schema 1.4).
Its `inter_token_latency` is a mean of each request, which is our tpot; our itl is its `inter_chunk_latency`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smbench.cell import AxisValue
from smbench.errors import CorruptError
from smbench.imported import ImportedRun, Measure
from smbench.importing.content import Content, Fields, base_name, common_length, rate_text, shown

TOOL = "aiperf"
FORMAT = "aiperf (profile_export_aiperf.json or .csv, profile_export.jsonl)"
SECONDS: Mapping[str, float] = {"ns": 1e-9, "us": 1e-6, "ms": 1e-3, "s": 1.0, "sec": 1.0, "seconds": 1.0}
RATES = ("requests/sec", "tokens/sec")

METRICS: Mapping[str, tuple[str, str, str]] = {
    "time_to_first_token": ("Time to First Token", "ttft", "first token"),
    "inter_token_latency": ("Inter Token Latency", "tpot", "after first token"),
    "inter_chunk_latency": ("Inter Chunk Latency", "itl", "per chunk"),
    "request_latency": ("Request Latency", "e2e_latency", "request"),
    "benchmark_duration": ("Benchmark Duration", "duration", "load"),
    "request_throughput": ("Request Throughput", "request_throughput", "of the load"),
    "input_token_throughput": ("Input Token Throughput", "input_throughput", "of the load"),
    "output_token_throughput": ("Output Token Throughput", "output_throughput", "of the load"),
    "total_token_throughput": ("Total Token Throughput", "total_token_throughput", "of the load"),
    "goodput": ("Goodput", "goodput", "of the load"),
}
"""Its key to its heading in tables, our metric and definition."""
_STATISTIC = re.compile(r"avg|min|max|std|p\d{1,2}|Value")
_RENAMED = {"avg": "mean", "p50": "median", "Value": "total"}
_COUNTS = {
    "completed": ("request_count", "Request Count"),
    "failed": ("error_request_count", "Error Request Count"),
    "prompt_tokens": ("total_isl", "Total Input Sequence Length"),
    "completion_tokens": ("total_osl", "Total Output Sequence Length"),
    "served_tokens": ("total_usage_completion_tokens", "Total Usage Completion Tokens"),
}
_HEADING = re.compile(r"(.+?)(?: \(([^()]+)\))?")
_LENGTHS = ("input_sequence_length", "output_sequence_length", "usage_completion_tokens")
_LENGTH_HEADINGS = {"Input Sequence Length": "input_len", "Usage Completion Tokens": "output_len"}
_BY_TOKENS = ("tpot", "output_throughput", "total_token_throughput")
"""Metrics that count output tokens."""


def knows(keys: set[str]) -> bool:
    """Whether an object with these keys is an export or a record of the tool."""
    return _is_record(keys) or ("request_latency" in keys and bool(keys & {"input_config", "aiperf_version"}))


def knows_rows(rows: Sequence[Sequence[str]]) -> bool:
    """Whether a table is an export of the tool."""
    return list(rows[0][:2]) in (["Metric", "avg"], ["Metric", "Value"])


def _is_record(keys: set[str]) -> bool:
    return {"metadata", "metrics"} <= keys and "benchmarks" not in keys


def read(content: Content) -> Iterator[ImportedRun]:
    """The one load of the file, or each of exports that follow one another."""
    if content.rows:
        yield _of_table(content)
    elif _is_record(set(content.objects[0])):
        yield _of_records(content)
    else:
        for position, values in enumerate(content.objects, 1):
            yield _of_export(Fields(values, f"{content.name}: object {position}"), content, position)


def _of_export(fields: Fields, content: Content, position: int) -> ImportedRun:
    measures = []
    for key, (_, metric, definition) in METRICS.items():
        part = fields.maybe_part(key)
        if part is not None:
            unit = part.maybe_text("unit") or ""
            measures.append(_measure(metric, definition, part, unit))
    config = fields.maybe_part("input_config")
    complete = fields.values.get("is_complete") is not False and fields.values.get("was_cancelled") is not True
    counts = {
        name: part.count("avg") for name, (key, _) in _COUNTS.items() if (part := fields.maybe_part(key)) is not None
    }
    measures, recounted = _recounted(measures, counts.get("completion_tokens"), counts.get("served_tokens"))
    return ImportedRun(
        tool=TOOL,
        tool_version=fields.maybe_text("aiperf_version"),
        workload="online",
        engine=None,
        model=base_name(_at(config, "models", "items", 0, "name") or _at(config, "endpoint", "model_names", 0)),
        axes=_axes(fields, config, counts),
        settings=fields.plain(("schema_version", "start_time", "end_time")),
        completed=counts.get("completed"),
        failed=counts.get("failed", 0),
        prompt_tokens=counts.get("prompt_tokens"),
        completion_tokens=counts.get("served_tokens", counts.get("completion_tokens")),
        measures=tuple(measures),
        notes=(*recounted, *(() if complete else ("the run was cancelled or did not end as it should",))),
        source=content.name,
        source_sha256=content.sha256,
        position=position,
    )


def _axes(fields: Fields, config: Fields | None, counts: Mapping[str, int]) -> dict[str, AxisValue]:
    concurrency = _at(config, "phases", -1, "concurrency") or _at(config, "loadgen", "concurrency")
    rate = _at(config, "phases", -1, "rate") or _at(config, "loadgen", "request_rate")
    stated: dict[str, Any] = {
        "num_prompts": counts["completed"] + counts.get("failed", 0) if "completed" in counts else None,
        "input_len": _equal(fields.maybe_part("input_sequence_length")),
        "output_len": _equal(
            fields.maybe_part("usage_completion_tokens") or fields.maybe_part("output_sequence_length")
        ),
        "request_rate": rate_text(rate) if rate else "inf" if concurrency else None,
        "max_concurrency": concurrency if isinstance(concurrency, int) else 0 if rate else None,
    }
    return {name: value for name, value in stated.items() if value is not None}


def _of_records(content: Content) -> ImportedRun:
    samples: dict[str, list[float]] = {}
    tokens: dict[str, list[float]] = {name: [] for name in _LENGTHS}
    failed = completed = 0
    for position, values in enumerate(content.objects, 1):
        record = Fields(values, f"{content.name}: object {position}")
        if not _is_record(set(values)):
            raise CorruptError(f"{record.where}: no record of aiperf, unlike the first: {shown(list(values))}")
        if record.part("metadata").values.get("benchmark_phase", "profiling") != "profiling":
            continue
        if values.get("error") is not None:
            failed += 1
            continue
        completed += 1
        metrics = record.part("metrics")
        for key in METRICS.keys() & metrics.values.keys():
            part = metrics.part(key)
            scale = _scale(part.maybe_text("unit") or "", part.where)
            several = isinstance(part.values.get("value"), list)
            numbers = part.numbers("value") if several else [part.number("value")]
            samples.setdefault(key, []).extend(number * scale for number in numbers)
        for key in tokens.keys() & metrics.values.keys():
            tokens[key].append(metrics.part(key).number("value"))
    prompts, outputs, served = tokens.values()
    measures, recounted = _recounted(
        [
            Measure(metric=metric, definition=definition, samples=tuple(samples[key]))
            for key, (_, metric, definition) in METRICS.items()
            if key in samples
        ],
        int(sum(outputs)),
        int(sum(served)) if len(served) == completed else None,
    )
    lengths = {
        "input_len": common_length(prompts),
        "output_len": common_length(served if len(served) == completed else outputs),
    }
    return ImportedRun(
        tool=TOOL,
        tool_version=None,
        workload="online",
        engine=None,
        model=None,
        axes={
            "num_prompts": completed + failed,
            **{name: value for name, value in lengths.items() if value is not None},
        },
        completed=completed,
        failed=failed,
        prompt_tokens=int(sum(prompts)),
        completion_tokens=int(sum(served if len(served) == completed else outputs)),
        measures=tuple(measures),
        notes=(*recounted, "records say neither the model nor how the load was sent"),
        source=content.name,
        source_sha256=content.sha256,
    )


def _of_table(content: Content) -> ImportedRun:
    """A first table with statistics in columns, then one with single values; both may be missing one another."""
    known = {heading: (metric, definition) for heading, metric, definition in METRICS.values()}
    measures: list[Measure] = []
    single: dict[str, str] = {}
    lengths: dict[str, int] = {}
    header: Sequence[str] = ()
    for number, row in enumerate(content.rows, 1):
        if not row or row[0] in ("Metric", "Endpoint"):
            header = row
            continue
        if header[:1] != ("Metric",):
            continue
        match = _HEADING.fullmatch(row[0])
        heading, unit = (match[1], match[2] or "") if match else (row[0], "")
        cells = Fields(
            {name: _cell(text) for name, text in zip(header[1:], row[1:], strict=False) if text},
            f"{content.name}: row {number}, {shown(row[0])}",
        )
        if header[1:2] == ("Value",):
            single[heading] = row[1] if len(row) > 1 else ""
        if heading in known:
            measures.append(_measure(*known[heading], cells, unit))
        if heading in _LENGTH_HEADINGS and (length := _equal(cells)) is not None:
            lengths[_LENGTH_HEADINGS[heading]] = length
    counts = {
        name: Fields({"Value": _cell(single[heading])}, f"{content.name}: {heading}").count("Value")
        for name, (_, heading) in _COUNTS.items()
        if heading in single
    }
    measures, recounted = _recounted(measures, counts.get("completion_tokens"), counts.get("served_tokens"))
    if not measures:
        raise CorruptError(f"{content.name}: a table of aiperf without any of {', '.join(known)}")
    return ImportedRun(
        tool=TOOL,
        tool_version=None,
        workload="online",
        engine=None,
        model=None,
        axes={"num_prompts": counts["completed"] + counts.get("failed", 0), **lengths}
        if "completed" in counts
        else dict(lengths),
        completed=counts.get("completed"),
        failed=counts.get("failed", 0),
        prompt_tokens=counts.get("prompt_tokens"),
        completion_tokens=counts.get("served_tokens", counts.get("completion_tokens")),
        measures=tuple(measures),
        notes=(*recounted, "the table has two decimals, and says neither the model nor how the load was sent"),
        source=content.name,
        source_sha256=content.sha256,
    )


def _recounted(
    measures: Sequence[Measure], counted: int | None, served: int | None
) -> tuple[list[Measure], tuple[str, ...]]:
    """The measures by their true definition, which is another one for other tokens than the server's; and a note."""
    if served is None:
        return list(measures), (
            "whether output tokens are the server's count or its own tokenizer's is not in the file",
        )
    if counted in (None, served):
        return list(measures), ()
    renamed = [
        measure.model_copy(update={"definition": "retokenized"}) if measure.metric in _BY_TOKENS else measure
        for measure in measures
    ]
    return renamed, (
        f"its tokenizer counts {counted} output tokens and the server {served}: no --use-server-token-count",
    )


def _measure(metric: str, definition: str, fields: Fields, unit: str) -> Measure:
    """The statistics below their names. A figure that stands alone is a total, under `avg` as under `Value`."""
    scale = _scale(unit, fields.where)
    stated = {
        _RENAMED.get(name, name): value * scale
        for name in fields.values
        if _STATISTIC.fullmatch(name) and (value := fields.maybe_number(name)) is not None
    }
    if not stated:
        fields.fail("avg", "a statistic")
    if stated.keys() <= {"mean", "total"}:
        stated = {"total": next(iter(stated.values()))}
    return Measure(metric=metric, definition=definition, stated=stated)


def _scale(unit: str, where: str) -> float:
    """The factor to our unit. CorruptError for a unit that is none of its."""
    if unit in RATES:
        return 1.0
    if unit not in SECONDS:
        raise CorruptError(f"{where}: unknown unit {shown(unit)!r}; known: {', '.join((*SECONDS, *RATES))}")
    return SECONDS[unit]


def _equal(fields: Fields | None) -> int | None:
    """A length that all requests had: its smallest and largest are one."""
    if fields is None or {"min", "max"} - fields.values.keys():
        return None
    low, high = fields.number("min"), fields.number("max")
    return int(low) if low == high and low == int(low) else None


def _cell(text: str) -> float | str:
    try:
        return float(text)
    except ValueError:
        return text


def _at(config: Fields | None, *path: str | int) -> Any:
    """What lies at a path of keys and indices of the configuration; None where it ends."""
    value: Any = config.values if config else None
    for step in path:
        if isinstance(step, str):
            value = value.get(step) if isinstance(value, dict) else None
        else:
            value = value[step] if isinstance(value, list) and value else None
    return value
