"""Which metrics exist. One row declares name, unit, direction and formula; nothing else may name a metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True, slots=True)
class Metric:
    """A declared quantity. Storage is always in `unit`; a report may print it in another one."""

    name: str
    unit: str
    better: Literal["lower", "higher"]
    formula: str
    definitions: Mapping[str, str] = field(default_factory=dict)
    """Where the name alone does not say what is counted: the readings in use, as expressions over metrics and axes."""


METRICS = {
    metric.name: metric
    for metric in (
        Metric("duration", "s", "lower", "device time of one call: sample time / calls per sample; headline = median"),
        Metric("bandwidth", "B/s", "higher", "least bytes a call must move / duration"),
        Metric("throughput", "FLOP/s", "higher", "floating-point operations of the definition / duration"),
        Metric("roofline_fraction", "1", "higher", "max(bytes / peak bandwidth, FLOP / peak FLOP/s) / duration"),
        Metric("speedup", "1", "higher", "duration of the baseline provider / duration, same point, same measurement"),
        Metric("prefill_latency", "s", "lower", "from handing a batch of prompts to its first tokens"),
        Metric("decode_latency", "s", "lower", "one decode step of a whole batch"),
        Metric("e2e_latency", "s", "lower", "from handing over a request, or a batch run as one, to its last token"),
        Metric("ttft", "s", "lower", "time to first token: from handing over a request to its first token"),
        Metric("tpot", "s", "lower", "time per output token: (e2e_latency - ttft) / (output_len - 1)"),
        Metric(
            "prefill_throughput",
            "token/s",
            "higher",
            "prompt tokens / prefill_latency",
            {"prompt tokens": "input_len * batch / prefill_latency", "prompts": "batch / prefill_latency"},
        ),
        Metric(
            "decode_throughput",
            "token/s",
            "higher",
            "new tokens / decode_latency",
            {"tokens of the batch": "batch / decode_latency", "tokens of one sequence": "1 / decode_latency"},
        ),
        Metric(
            "overall_throughput",
            "token/s",
            "higher",
            "tokens / e2e_latency; which tokens differs between tools",
            {
                "output tokens": "output_len * batch / e2e_latency",
                "input and output tokens": "(input_len + output_len) * batch / e2e_latency",
                "input tokens": "input_len * batch / e2e_latency",
                "requests": "batch / e2e_latency",
            },
        ),
    )
}
