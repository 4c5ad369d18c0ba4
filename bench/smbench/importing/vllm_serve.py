"""Result files of `vllm bench serve`, with and without --save-detailed, and appended ones. Read in vLLM 0.32.0.

A detailed file has the first token, the gaps and the lengths of each request, failed ones included; their latency is
not in files of older versions, where it is the first token plus the gaps. A file that is not detailed has statistics,
and in 0.32 the latencies as well.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smbench.cell import AxisValue
from smbench.imported import ImportedRun
from smbench.importing.content import Content, Fields, base_name, common_length, mean_length, rate_text
from smbench.importing.statistics import in_milliseconds, measures, totals

TOOL = "vllm-serve"
FORMAT = "vllm bench serve (JSON)"
_KEYS = {"model_id", "num_prompts", "duration", "completed", "total_input_tokens", "total_output_tokens"}
_STATISTICS = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2el": "e2e_latency"}
_DEFINITIONS = {"ttft": "first token", "tpot": "after first token", "itl": "per chunk", "e2e_latency": "request"}
_TOTALS = {
    "duration": ("duration", "load"),
    "request_throughput": ("request_throughput", "of the load"),
    "output_throughput": ("output_throughput", "of the load"),
    "total_token_throughput": ("total_token_throughput", "of the load"),
    "request_goodput": ("goodput", "of the load"),
}
_SETTINGS = ("date", "backend", "endpoint_type", "label", "burstiness", "ramp_up_strategy", "ramp_up_start_rps")
_CLIENT = "vllm bench serve"


def knows(keys: set[str]) -> bool:
    """Whether an object with these keys is a result of the tool."""
    return keys >= _KEYS


def read(content: Content) -> Iterator[ImportedRun]:
    """Each result of the file."""
    for position, values in enumerate(content.objects, 1):
        yield _run(Fields(values, f"{content.name}: object {position}"), content, position)


def _run(fields: Fields, content: Content, position: int) -> ImportedRun:
    completed = fields.count("completed")
    asked = fields.count("num_prompts")
    failed = fields.maybe_count("failed")
    samples, lengths, notes = _samples(fields, completed, asked)
    prompt_tokens, completion_tokens = fields.count("total_input_tokens"), fields.count("total_output_tokens")
    return ImportedRun(
        tool=TOOL,
        tool_version=_version(fields),
        workload="online",
        engine=None,
        model=base_name(fields.maybe_text("model_id")),
        axes=_axes(fields, asked, lengths, (completed, prompt_tokens, completion_tokens)),
        settings=fields.plain(_SETTINGS),
        completed=completed,
        failed=asked - completed if failed is None and asked >= completed else failed,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        # statistics of no request are zeros there
        measures=(
            *(measures(_DEFINITIONS, samples, in_milliseconds(fields, _STATISTICS)) if completed else ()),
            *(totals(fields, _TOTALS) if completed else ()),
        ),
        notes=tuple(notes),
        source=content.name,
        source_sha256=content.sha256,
        position=position,
    )


def _version(fields: Fields) -> str | None:
    """The version, where whoever ran the client had it written into the file, as our own runs do."""
    client = fields.maybe_text("client") or ""
    return client.removeprefix(_CLIENT).strip() or None if client.startswith(_CLIENT) else None


def _axes(
    fields: Fields, asked: int, lengths: Mapping[str, Sequence[float]], counted: tuple[int, int, int]
) -> dict[str, AxisValue]:
    completed, prompt_tokens, completion_tokens = counted
    stated: dict[str, Any] = {
        "num_prompts": asked,
        "input_len": common_length(lengths["input"]) if lengths else mean_length(prompt_tokens, completed),
        "output_len": common_length(lengths["output"]) if lengths else mean_length(completion_tokens, completed),
        "request_rate": rate_text(fields.values.get("request_rate")),
    }
    if "max_concurrency" in fields.values:
        stated["max_concurrency"] = fields.maybe_count("max_concurrency") or 0
    return {name: value for name, value in stated.items() if value is not None}


def _samples(
    fields: Fields, completed: int, asked: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], list[str]]:
    """Samples by metric, lengths of prompts and outputs, and what to note; empty where the file has none."""
    if "ttfts" not in fields.values:
        if "latencies" in fields.values and completed == asked:
            return {"e2e_latency": _whole(fields, "latencies", completed)}, {}, ["no samples but the whole latencies"]
        return {}, {}, ["statistics only: saved without --save-detailed"]
    ttfts, itls = fields.numbers("ttfts"), fields.series("itls")
    inputs, outputs = fields.numbers("input_lens"), fields.numbers("output_lens")
    ends = fields.numbers("latencies") if "latencies" in fields.values else None
    if len({len(ttfts), len(itls), len(inputs), len(outputs), *([len(ends)] if ends else [])}) > 1:
        fields.fail("ttfts", f"as many as itls, input_lens, output_lens and latencies: {len(itls)}, {len(inputs)}")
    good = fields.without_error(outputs)
    if len(good) != completed:
        fields.fail("output_lens", f"{completed} requests without an error, not {len(good)}")
    e2e = {i: ends[i] if ends else ttfts[i] + sum(itls[i]) for i in good}
    samples = {
        "ttft": [ttfts[i] for i in good],
        "tpot": [max(0.0, e2e[i] - ttfts[i]) / (outputs[i] - 1) for i in good if outputs[i] > 1],
        "itl": [gap for i in good for gap in itls[i]],
        "e2e_latency": list(e2e.values()),
    }
    notes = ["tpot was computed from latency, first token and output tokens"]
    if ends is None:
        notes.append("e2e_latency was computed as the first token and all gaps after it")
    return samples, {"input": [inputs[i] for i in good], "output": [outputs[i] for i in good]}, notes


def _whole(fields: Fields, key: str, count: int) -> list[float]:
    values = fields.numbers(key)
    if len(values) != count:
        fields.fail(key, f"one of each of {count} completed requests, not {len(values)}")
    return values
