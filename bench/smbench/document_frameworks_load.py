"""Offline and online cells in numbers: percentiles of latencies, rates, goodput, and the client's own form of them.

Owns the statistics that the serving tables show and the limits of goodput. The formulas of rates are in `rates`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from smbench import guards_load, rates
from smbench.analysis import Row
from smbench.document_frameworks_cells import OFFLINE, counted_batches, load_of
from smbench.result import Load
from smbench.stats import Summary

QUANTILES = (50, 90, 99)
"""Percentiles that tables show, linear between two values as in every client that is read here."""
SHORT: Mapping[str, str] = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e_latency": "e2el"}
"""Latencies of a request and what `vllm bench serve` calls them."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Latencies that a request has to keep to count as good."""

    name: str
    ttft_s: float
    tpot_s: float
    source: str

    @property
    def by_metric(self) -> Mapping[str, float]:
        """Metric to seconds."""
        return {"ttft": self.ttft_s, "tpot": self.tpot_s}


LIMITS = (
    Limits("server", 2.0, 0.2, "MLPerf Inference 5.0, llama2-70b, scenario server"),
    Limits("interactive", 0.45, 0.04, "MLPerf Inference 5.0, llama2-70b, interactive"),
)
"""What goodput is stated against. Of other models there are other limits; these are the same for every run."""


@dataclass(frozen=True, slots=True)
class Spread:
    """Many values of one latency, seconds."""

    count: int
    mean: float
    median: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True)
class Online:
    """A server under one load."""

    row: Row
    load: Load
    spreads: Mapping[str, Spread]
    """By metric: ttft, tpot, itl, e2e_latency; absent what the client did not see."""
    rates: Mapping[str, float]
    """By metric."""
    goodput: Mapping[str, float]
    """Name of the limits to requests a second."""
    in_flight: float
    """Mean number of requests at a time, by Little's law."""
    kept_up: bool | None
    """Whether requests were completed as fast as they arrived; None where they came at once."""

    @property
    def share_good(self) -> Mapping[str, float]:
        """Name of the limits to the part of the completed requests that kept them."""
        throughput = self.rates["request_throughput"]
        return {name: good / throughput if throughput else 0.0 for name, good in self.goodput.items()}


@dataclass(frozen=True, slots=True)
class Offline:
    """Many prompts at once; rates are of the median repetition."""

    row: Row
    prompts: int
    prompt_tokens: int
    completion_tokens: int
    duration: Summary
    rates: Mapping[str, float]
    """By metric."""


def online(row: Row) -> Online | None:
    """The numbers of an online cell; None where it has none."""
    load = load_of(row)
    if load is None or not load.duration_s or not load.completed:
        return None
    values = latencies(load)
    limited = {name: values[name] for name in ("ttft", "tpot")}
    complete = all(len(series) == load.completed for series in limited.values())
    return Online(
        row,
        load,
        {name: _spread(series) for name, series in values.items() if series},
        rates.load_rates(load.duration_s, load.completed, load.prompt_tokens, load.completion_tokens),
        {limits.name: rates.goodput(load.duration_s, limited, limits.by_metric) for limits in LIMITS if complete},
        guards_load.concurrency(load),
        guards_load.kept_up(load),
    )


def offline(row: Row, warmup: int) -> Offline | None:
    """The numbers of an offline cell; None where it has none."""
    batches, duration = counted_batches(row, warmup), row.summary("e2e_latency")
    if row.cell.subject != OFFLINE or not batches or duration is None:
        return None
    prompts, first = batches[0].batch, batches[0]
    return Offline(
        row,
        prompts,
        first.prompt_tokens,
        first.completion_tokens,
        duration,
        rates.load_rates(duration.median, prompts, first.prompt_tokens, first.completion_tokens),
    )


def latencies(load: Load) -> Mapping[str, Sequence[float]]:
    """The values of a load by metric."""
    return {"ttft": load.ttft_s, "tpot": load.tpot_s, "itl": load.itl_s, "e2e_latency": load.e2e_s}


def _spread(values: Sequence[float]) -> Spread:
    median, p90, p99 = (float(value) for value in np.percentile(values, QUANTILES))
    return Spread(len(values), float(np.mean(values)), median, p90, p99)


def records(title: str, found: Sequence[Online]) -> bytes:
    """One line of JSON for each load of a provider, under the names of `vllm bench serve`; latencies in ms."""
    return "".join(json.dumps(_record(title, entry), ensure_ascii=False) + "\n" for entry in found).encode()


def _record(title: str, entry: Online) -> dict[str, object]:
    load, axes = entry.load, entry.row.cell.axes
    serving = entry.row.result.serving if entry.row.result else None
    statistics: dict[str, float] = {}
    for metric, short in SHORT.items():
        if spread := entry.spreads.get(metric):
            for name, value in (
                ("mean", spread.mean),
                ("median", spread.median),
                ("p90", spread.p90),
                ("p99", spread.p99),
            ):
                statistics[f"{name}_{short}_ms"] = value * 1e3
    return {
        "provider": title,
        "backend": serving.engine if serving else None,
        "version": serving.version if serving else None,
        "model_id": axes["model"],
        "tensor_parallel": axes["tensor_parallel"],
        "num_prompts": axes["num_prompts"],
        "request_rate": axes["request_rate"],
        "max_concurrency": load.max_concurrency,
        "burstiness": load.burstiness,
        "duration": load.duration_s,
        "completed": load.completed,
        "failed": load.failed,
        "total_input_tokens": load.prompt_tokens,
        "total_output_tokens": load.completion_tokens,
        "request_throughput": entry.rates["request_throughput"],
        "output_throughput": entry.rates["output_throughput"],
        "total_token_throughput": entry.rates["total_token_throughput"],
        "request_goodput": dict(entry.goodput),
        **statistics,
    }


def serving_listing(entry: Online) -> str:
    """What `vllm bench serve` prints of a load, from the record."""
    load = entry.load
    lines = [_title("Serving Benchmark Result", "=")]
    lines += [_count("Successful requests:", load.completed), _count("Failed requests:", load.failed)]
    if load.max_concurrency is not None:
        lines.append(_count("Maximum request concurrency:", load.max_concurrency))
    if load.request_rate is not None:
        lines.append(_value("Request rate configured (RPS):", load.request_rate))
    lines += [
        _value("Benchmark duration (s):", load.duration_s),
        _count("Total input tokens:", load.prompt_tokens),
        _count("Total generated tokens:", load.completion_tokens),
        _value("Request throughput (req/s):", entry.rates["request_throughput"]),
        *(_value(f"Request goodput (req/s), {name}:", good) for name, good in entry.goodput.items()),
        _value("Output token throughput (tok/s):", entry.rates["output_throughput"]),
        _value("Total token throughput (tok/s):", entry.rates["total_token_throughput"]),
    ]
    for metric, title, short in (
        ("ttft", "Time to First Token", "TTFT"),
        ("tpot", "Time per Output Token (excl. 1st token)", "TPOT"),
        ("itl", "Inter-token Latency", "ITL"),
        ("e2e_latency", "End-to-end Latency", "E2EL"),
    ):
        if spread := entry.spreads.get(metric):
            lines += [
                _title(title, "-"),
                _value(f"Mean {short} (ms):", spread.mean * 1e3),
                _value(f"Median {short} (ms):", spread.median * 1e3),
                _value(f"P90 {short} (ms):", spread.p90 * 1e3),
                _value(f"P99 {short} (ms):", spread.p99 * 1e3),
            ]
    return "\n".join([*lines, "=" * 50])


def offline_listing(entry: Offline) -> str:
    """What sglang's offline benchmark prints, from the record."""
    return "\n".join(
        [
            _title("Offline Throughput Benchmark Result", "="),
            _count("Successful requests:", entry.prompts),
            _value("Benchmark duration (s):", entry.duration.median),
            _count("Total input tokens:", entry.prompt_tokens),
            _count("Total generated tokens:", entry.completion_tokens),
            _value("Request throughput (req/s):", entry.rates["request_throughput"]),
            _value("Input token throughput (tok/s):", entry.rates["input_throughput"]),
            _value("Output token throughput (tok/s):", entry.rates["output_throughput"]),
            _value("Total token throughput (tok/s):", entry.rates["total_token_throughput"]),
            "=" * 50,
        ]
    )


def _title(text: str, fill: str) -> str:
    return f"{f' {text} ' if fill == '=' else text:{fill}^50}"


def _count(name: str, count: int) -> str:
    return f"{name:<40} {count:<10}".rstrip()


def _value(name: str, value: float) -> str:
    return f"{name:<40} {value:<10.2f}".rstrip()
