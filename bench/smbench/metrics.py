"""Which metrics exist, and what each of them counts. Nothing else may name a metric or a way of counting one.

Two numbers are of one kind where metric and definition are the same. A definition is the formula: which interval, or
what over what. It does not say who measured: a server's client and an engine's own clock may share one, and what else
sets two tools apart stands with their names in `metricnames`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal


@dataclass(frozen=True, slots=True)
class Definition:
    """One way of counting a metric."""

    name: str
    """Its id, together with the metric's name."""
    formula: str
    expression: str | None = None
    """The same as arithmetic over metrics and axes, where it is any: an audit recomputes figures with it."""


@dataclass(frozen=True)
class Metric:
    """A declared quantity. Storage is always in `unit`; a report may print it in another one."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    formula: str
    ways: tuple[Definition, ...]
    """The definitions in use, ours and those of others."""
    own: str | None = None
    """The definition that our numbers have, where that is not the first."""

    @property
    def definition(self) -> str:
        """Id of the definition that our numbers have, unless a workload's differs: see `definition_of`."""
        return self.own or self.ways[0].name

    @cached_property
    def definitions(self) -> Mapping[str, str]:
        """Definitions that are arithmetic: name to expression over metrics and axes."""
        return {way.name: way.expression for way in self.ways if way.expression is not None}

    def way(self, name: str) -> Definition:
        """The definition of that name. KeyError lists those that exist."""
        for way in self.ways:
            if way.name == name:
                return way
        raise KeyError(f"{self.name} has no definition {name!r}; known: {', '.join(way.name for way in self.ways)}")


def _arithmetic(name: str, expression: str) -> Definition:
    return Definition(name, expression, expression)


METRICS: Mapping[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric(
            "duration",
            "s",
            "lower",
            "of an operation: device time of one call, sample time / calls per sample, headline = median; of a load: "
            "its wall clock",
            (
                Definition("call", "device time of one call"),
                Definition("load", "from sending the first request of a load to the end of its last one"),
                Definition("window", "the measured part of a load, without the warm-up and cool-down cut off its ends"),
            ),
        ),
        Metric(
            "bandwidth",
            "B/s",
            "higher",
            "least bytes a call must move / duration",
            (Definition("least bytes", "least bytes a call must move / duration of a call"),),
        ),
        Metric(
            "throughput",
            "FLOP/s",
            "higher",
            "floating-point operations of the definition / duration",
            (Definition("operations", "floating-point operations of the definition / duration of a call"),),
        ),
        Metric(
            "roofline_fraction",
            "1",
            "higher",
            "max(bytes / peak bandwidth, FLOP / peak FLOP/s) / duration",
            (Definition("roofline", "least time by the device's peaks / duration of a call"),),
        ),
        Metric(
            "speedup",
            "1",
            "higher",
            "duration of the baseline provider / duration, same point, same measurement",
            (Definition("baseline", "duration of the baseline / duration"),),
        ),
        Metric(
            "prefill_latency",
            "s",
            "lower",
            "from handing a batch of prompts to its first tokens",
            (Definition("whole batch", "from handing over a batch of prompts to the first token of every one"),),
        ),
        Metric(
            "decode_latency",
            "s",
            "lower",
            "one decode step of a whole batch",
            (
                Definition(
                    "one step",
                    "one decode step of a whole batch, waited for by the host; output_len - 1 steps, headline = median",
                ),
            ),
        ),
        Metric(
            "e2e_latency",
            "s",
            "lower",
            "from handing over a request, or a batch run as one, to its last token",
            (
                Definition("request", "from sending a request to its last token"),
                Definition("batch", "wall clock from handing over all prompts to the last token of the last one"),
                Definition(
                    "sum of phases", "prefill_latency + the sum of all decode steps; what lies between is not in"
                ),
            ),
        ),
        Metric(
            "ttft",
            "s",
            "lower",
            "time to first token: from handing over a request to its first token",
            (Definition("first token", "from sending a request to the arrival of its first token"),),
        ),
        Metric(
            "tpot",
            "s",
            "lower",
            "time per output token: (e2e_latency - ttft) / (output_len - 1)",
            (
                Definition("after first token", "(e2e_latency - ttft) / (output tokens - 1), a value for each request"),
                Definition(
                    "after first chunk",
                    "(e2e_latency - ttft) / (output tokens - tokens of the first chunk), by request",
                ),
                Definition("all tokens", "e2e_latency / output tokens: the wait for the first token is in it"),
                Definition("retokenized", "as after first token, with the tokens that the client's tokenizer finds"),
            ),
        ),
        Metric(
            "itl",
            "s",
            "lower",
            "inter-token latency: the gaps between what arrives one after the other, of all requests together",
            (
                Definition("per chunk", "gap between successive streamed chunks, however many tokens a chunk has"),
                Definition("per token", "gap between chunks / tokens of the later one, counted once for each token"),
            ),
        ),
        Metric(
            "prefill_throughput",
            "token/s",
            "higher",
            "prompt tokens / prefill_latency",
            (
                _arithmetic("prompt tokens", "input_len * batch / prefill_latency"),
                _arithmetic("prompts", "batch / prefill_latency"),
            ),
        ),
        Metric(
            "decode_throughput",
            "token/s",
            "higher",
            "new tokens / decode_latency",
            (
                _arithmetic("tokens of the batch", "batch / decode_latency"),
                _arithmetic("tokens of one sequence", "1 / decode_latency"),
            ),
        ),
        Metric(
            "overall_throughput",
            "token/s",
            "higher",
            "tokens / e2e_latency; which tokens differs between tools",
            (
                _arithmetic("output tokens", "output_len * batch / e2e_latency"),
                _arithmetic("input and output tokens", "(input_len + output_len) * batch / e2e_latency"),
                _arithmetic("input tokens", "input_len * batch / e2e_latency"),
                _arithmetic("requests", "batch / e2e_latency"),
            ),
            own="input and output tokens",
        ),
        Metric(
            "output_throughput",
            "token/s",
            "higher",
            "generated tokens / time; of a static batch beside overall_throughput, which counts the prompt as well",
            (
                Definition("of the load", "output tokens of completed requests / duration"),
                _arithmetic("of the batch", "output_len * batch / e2e_latency"),
                Definition("rate over time", "mean of the rate over time, from the first to the last token event"),
                Definition("retokenized", "as of the load, with the tokens that the client's tokenizer finds"),
            ),
        ),
        Metric(
            "input_throughput",
            "token/s",
            "higher",
            "prompt tokens / duration",
            (Definition("of the load", "prompt tokens of completed requests / duration"),),
        ),
        Metric(
            "total_token_throughput",
            "token/s",
            "higher",
            "prompt and generated tokens / duration",
            (
                Definition("of the load", "(prompt + output tokens of completed requests) / duration"),
                Definition("rate over time", "mean of the rate over time, from the first to the last token event"),
                Definition("retokenized", "as of the load, with the tokens that the client's tokenizer finds"),
            ),
        ),
        Metric(
            "request_throughput",
            "request/s",
            "higher",
            "completed requests / duration",
            (
                Definition("of the load", "completed requests / duration"),
                Definition("rate over time", "mean of the rate over time, from the first to the last completion"),
            ),
        ),
        Metric(
            "goodput",
            "request/s",
            "higher",
            "completed requests that kept every stated limit / duration",
            (Definition("of the load", "completed requests with each stated latency within its limit / duration"),),
        ),
    )
}

OWN_DEFINITIONS: Mapping[str, Mapping[str, str]] = {
    "online": {"duration": "load"},
    "offline": {"e2e_latency": "batch", "duration": "load"},
    "static_batch": {"e2e_latency": "sum of phases", "output_throughput": "of the batch"},
}
"""Workload to what our numbers of it count, where that is not the metric's `definition`."""


@dataclass(frozen=True, slots=True)
class Statistic:
    """How the many values of a metric become one figure."""

    name: str
    meaning: str


STATISTICS: tuple[Statistic, ...] = (
    Statistic("median", "the middle value, between the two middle ones where there are two; the headline"),
    Statistic("mean", "sum / count"),
    Statistic("std", "standard deviation of the values themselves, not of their mean: divided by their count"),
    Statistic("p<N>", "percentile, linear between the two nearest values, as numpy does; p50 is the median"),
    Statistic("min, max", "smallest and largest value"),
)


def definition_of(subject: str, metric: str) -> str:
    """Id of the definition that our numbers of a workload, or of an operation, have. KeyError: no such metric."""
    return OWN_DEFINITIONS.get(subject, {}).get(metric, METRICS[metric].definition)
