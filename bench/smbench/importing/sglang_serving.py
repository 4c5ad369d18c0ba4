"""Result lines of sglang's `bench_serving`, with and without --output-details. Read in sglang 0.5.23.

The last line of a file that several runs appended to is like the first. `inf` is written as a bare Infinity.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from smbench.cell import AxisValue
from smbench.imported import ImportedRun
from smbench.importing.content import Content, Fields, base_name, common_length, mean_length, rate_text
from smbench.importing.statistics import in_milliseconds, measures, totals

TOOL = "sglang-serving"
FORMAT = "sglang bench_serving (JSON lines)"
_KEYS = {"backend", "dataset_name", "duration", "completed", "total_input_tokens", "total_output_tokens"}
_STATISTICS = {"ttft": "ttft", "tpot": "tpot", "itl": "itl", "e2e_latency": "e2e_latency"}
_TOTALS = {
    "duration": ("duration", "load"),
    "request_throughput": ("request_throughput", "of the load"),
    "input_throughput": ("input_throughput", "of the load"),
    "output_throughput": ("output_throughput", "of the load"),
    "total_throughput": ("total_token_throughput", "of the load"),
}
_SETTINGS = ("tag", "backend", "dataset_name", "random_range_ratio", "sharegpt_output_len", "accept_length")
_SERVER = ("version", "dtype", "quantization", "attention_backend", "kv_cache_dtype", "chunked_prefill_size")
_PER_TOKEN = ("sglang", "sglang-native", "sglang-embedding")
_DATASETS = {"random-ids": "random", "generated-shared-prefix": "shared-prefix"}


def knows(keys: set[str]) -> bool:
    """Whether an object with these keys is a result of the tool."""
    return keys >= _KEYS and "model_id" not in keys


def read(content: Content) -> Iterator[ImportedRun]:
    """Each result of the file."""
    for position, values in enumerate(content.objects, 1):
        yield _run(Fields(values, f"{content.name}: object {position}"), content, position)


def _run(fields: Fields, content: Content, position: int) -> ImportedRun:
    completed = fields.count("completed")
    samples, lengths, failed, notes = _samples(fields, completed)
    prompt_tokens, completion_tokens = fields.count("total_input_tokens"), fields.count("total_output_tokens")
    server = fields.maybe_part("server_info")
    backend = fields.maybe_text("backend") or ""
    per_token = backend in _PER_TOKEN or bool(fields.maybe_number("accept_length"))
    definitions = {
        "ttft": "first token",
        "tpot": "after first token",
        "itl": "per token" if per_token else "per chunk",
        "e2e_latency": "request",
    }
    return ImportedRun(
        tool=TOOL,
        tool_version=None,
        workload="online",
        engine="sglang" if server and "version" in server.values else None,
        model=base_name(server.maybe_text("model_path")) if server else None,
        axes=_axes(fields, server, completed, failed, lengths, (prompt_tokens, completion_tokens)),
        settings={
            **fields.plain(_SETTINGS),
            **({f"server.{k}": v for k, v in server.plain(_SERVER).items()} if server else {}),
        },
        completed=completed,
        failed=failed,
        prompt_tokens=prompt_tokens,
        completion_tokens=completion_tokens,
        measures=(
            *(measures(definitions, samples, in_milliseconds(fields, _STATISTICS)) if completed else ()),
            *(totals(fields, _TOTALS) if completed else ()),
        ),
        notes=tuple(notes),
        source=content.name,
        source_sha256=content.sha256,
        position=position,
    )


def _axes(
    fields: Fields,
    server: Fields | None,
    completed: int,
    failed: int | None,
    lengths: Mapping[str, Sequence[float]],
    counted: tuple[int, int],
) -> dict[str, AxisValue]:
    dataset = fields.maybe_text("dataset_name")
    stated: dict[str, Any] = {
        "dataset": _DATASETS.get(dataset, dataset) if dataset else None,
        "num_prompts": None if failed is None else completed + failed,
        "input_len": common_length(lengths["input"]) if lengths else mean_length(counted[0], completed),
        "output_len": common_length(lengths["output"]) if lengths else mean_length(counted[1], completed),
        "request_rate": rate_text(fields.values.get("request_rate")),
        "tensor_parallel": server.maybe_count("tp_size") if server else None,
    }
    if "max_concurrency" in fields.values:
        stated["max_concurrency"] = fields.maybe_count("max_concurrency") or 0
    return {name: value for name, value in stated.items() if value is not None}


def _samples(
    fields: Fields, completed: int
) -> tuple[dict[str, list[float]], dict[str, list[float]], int | None, list[str]]:
    """Samples by metric, lengths, how many requests failed, and what to note."""
    if "ttfts" not in fields.values:
        note = "statistics only: written without --output-details; how many requests failed is not in the file"
        return {}, {}, None, [note]
    ttfts, itls = fields.numbers("ttfts"), fields.series("itls")
    inputs, outputs = fields.numbers("input_lens"), fields.numbers("output_lens")
    if len({len(ttfts), len(itls), len(inputs), len(outputs)}) > 1:
        fields.fail("ttfts", f"as many as itls, input_lens and output_lens: {len(itls)}, {len(inputs)}, {len(outputs)}")
    good = fields.without_error(outputs)
    if len(good) != completed:
        fields.fail("output_lens", f"{completed} requests without an error, not {len(good)}")
    samples = {"ttft": [ttfts[i] for i in good], "itl": [gap for i in good for gap in itls[i]]}
    lengths = {"input": [inputs[i] for i in good], "output": [outputs[i] for i in good]}
    return samples, lengths, len(outputs) - completed, ["the file has no latency of each request, so none of tpot"]
