"""What other tools call our metrics, and where they count differently. Facts read in the tools' own sources.

A tool's name maps to the metric and the definition that it really has, whatever the name suggests: guidellm's
`time_per_output_token_ms` includes the first token, and its `inter_token_latency_ms` is everybody else's TPOT. A note
holds what sets a tool apart though the formula is the same. `importing` reads files by these rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tool:
    """A program that measures inference and writes what it found."""

    key: str
    command: str
    """How it is called."""
    read: str
    """The version and the file that its row was read in."""
    workload: str
    """What it does, as our workloads: `static_batch`, `offline` or `online`."""
    quantiles: str = "linear between the two nearest values"
    """How its percentiles fall between two values."""
    note: str = ""


@dataclass(frozen=True, slots=True)
class Name:
    """One metric of one tool."""

    tool: str
    metric: str
    own: str
    """The tool's own name; `*` stands for the statistic in it."""
    definition: str
    """Id of a definition of the metric."""
    note: str = ""
    """What the tool has otherwise, the definition being equal."""


TOOLS: Mapping[str, Tool] = {
    tool.key: tool
    for tool in (
        Tool(
            "vllm-serve",
            "vllm bench serve",
            "vLLM 0.32.0, benchmarks/serve.py, benchmarks/lib/endpoint_request_func.py",
            "online",
            note="a request waits for the client's own concurrency limit before its clock starts; "
            "a failed one is in no latency; without --save-detailed only the statistics are saved, and the latencies",
        ),
        Tool(
            "vllm-latency",
            "vllm bench latency",
            "vLLM 0.32.0, benchmarks/latency.py",
            "static_batch",
            note="one batch of random token ids by one generate() call: no phases, detokenization included; "
            "the file does not say batch, lengths or parallelism",
        ),
        Tool(
            "vllm-throughput",
            "vllm bench throughput",
            "vLLM 0.32.0, benchmarks/throughput.py",
            "offline",
            note="all prompts by one generate() call; prompt and output tokens only together",
        ),
        Tool(
            "sglang-serving",
            "python -m sglang.bench_serving",
            "sglang 0.5.23, benchmark/serving.py",
            "online",
            note="a chunk without text is none, so a first token that is no whole character counts with the next; "
            "prompt tokens are those of the data set, not of the server",
        ),
        Tool(
            "sglang-one-batch",
            "python -m sglang.bench_one_batch",
            "sglang 0.4.2.post2, bench_one_batch.py; 0.5.23, benchmark/one_batch.py",
            "static_batch",
            note="calls the model runner itself: no server, scheduler, chunked prefill or tokenizer; "
            "one run of a case; up to 0.4 every token of a prompt is token 1",
        ),
        Tool(
            "sglang-offline-throughput",
            "python -m sglang.bench_offline_throughput",
            "sglang 0.5.23, benchmark/offline_throughput.py",
            "offline",
            note="all prompts by one generate() call of the engine in the same process, unless --backend runtime",
        ),
        Tool(
            "aiperf",
            "aiperf profile",
            "aiperf 0.13.0, metrics/types/, exporters/, common/models/export_models.py (schema 1.4)",
            "online",
            note="a chunk without content is none; output tokens are what its own tokenizer finds in the text: "
            "where that is not the server's count, and without --use-server-token-count, the definition is retokenized",
        ),
        Tool(
            "guidellm",
            "guidellm run",
            "guidellm 0.8.1, benchmark/schemas/, schemas/base/request_stats.py (report version 2)",
            "online",
            quantiles="the smallest value that the share reaches, none in between",
            note="rates are distributions over time; its statistics of TPOT and ITL weigh a request by its tokens, "
            "so we take the requests themselves, which the file holds",
        ),
        Tool(
            "trtllm-bench",
            "trtllm-bench throughput|latency",
            "TensorRT-LLM, bench/dataclasses/reporting.py at 0249976, statistics.py at 3856265",
            "offline",
            quantiles="the value at floor(share × count), none in between: with an even count the upper one of the two",
            note="measured in the process of the engine, no HTTP; no reader here",
        ),
        Tool(
            "lmdeploy-profile",
            "python benchmark/profile_throughput.py, profile_pipeline_api.py",
            "lmdeploy 0.18.0, lmdeploy/profiler.py",
            "offline",
            note="measured in the process of the engine; a request that ended early counts in nothing; no reader here",
        ),
    )
}


_PER_LOAD = "duration of the client's loop, until every request is answered"
_RECOUNTED = "where its tokenizer's count of the text is not the server's"
_SGLANG_END = "until the stream has ended ([DONE]), not until the last token"

NAMES: Sequence[Name] = (
    Name("vllm-serve", "ttft", "*_ttft_ms, ttfts", "first token", "to the first chunk with a choice, with text or not"),
    Name("vllm-serve", "tpot", "*_tpot_ms", "after first token", "of requests with more than one token"),
    Name("vllm-serve", "itl", "*_itl_ms, itls", "per chunk"),
    Name("vllm-serve", "e2e_latency", "*_e2el_ms, latencies", "request", "until the last chunk with a choice"),
    Name("vllm-serve", "duration", "duration", "load", _PER_LOAD),
    Name("vllm-serve", "request_throughput", "request_throughput", "of the load"),
    Name("vllm-serve", "output_throughput", "output_throughput", "of the load"),
    Name("vllm-serve", "total_token_throughput", "total_token_throughput", "of the load"),
    Name("vllm-serve", "goodput", "request_goodput", "of the load", "a request of one token has TPOT 0"),
    Name("vllm-latency", "e2e_latency", "latencies, avg_latency, percentiles", "batch"),
    Name("vllm-throughput", "e2e_latency", "elapsed_time", "batch", "one repetition"),
    Name("vllm-throughput", "request_throughput", "requests_per_second", "of the load"),
    Name("vllm-throughput", "total_token_throughput", "tokens_per_second", "of the load"),
    Name("sglang-serving", "ttft", "*_ttft_ms, ttfts", "first token", "to the first chunk with text"),
    Name("sglang-serving", "tpot", "*_tpot_ms", "after first token", _SGLANG_END),
    Name("sglang-serving", "itl", "*_itl_ms, itls", "per chunk", "backends of an OpenAI interface: mean over chunks"),
    Name("sglang-serving", "itl", "*_itl_ms, itls", "per token", "backends sglang and sglang-native; and with "
         "speculative decoding, where the counts are those of the tokenizer"),
    Name("sglang-serving", "e2e_latency", "*_e2e_latency_ms", "request", _SGLANG_END),
    Name("sglang-serving", "duration", "duration", "load", _PER_LOAD),
    Name("sglang-serving", "request_throughput", "request_throughput", "of the load"),
    Name("sglang-serving", "input_throughput", "input_throughput", "of the load"),
    Name("sglang-serving", "output_throughput", "output_throughput", "of the load"),
    Name("sglang-serving", "total_token_throughput", "total_throughput", "of the load"),
    Name("sglang-one-batch", "prefill_latency", "prefill_latency", "whole batch", "its own slots and batch included"),
    Name("sglang-one-batch", "prefill_throughput", "prefill_throughput", "prompt tokens"),
    Name("sglang-one-batch", "decode_latency", "median_decode_latency", "one step"),
    Name("sglang-one-batch", "decode_throughput", "median_decode_throughput", "tokens of the batch"),
    Name("sglang-one-batch", "e2e_latency", "total_latency", "sum of phases"),
    Name("sglang-one-batch", "overall_throughput", "overall_throughput", "input and output tokens"),
    Name("sglang-offline-throughput", "e2e_latency", "total_latency", "batch", "one repetition"),
    Name("sglang-offline-throughput", "request_throughput", "request_throughput", "of the load"),
    Name("sglang-offline-throughput", "input_throughput", "input_throughput", "of the load"),
    Name("sglang-offline-throughput", "output_throughput", "output_throughput", "of the load"),
    Name("sglang-offline-throughput", "total_token_throughput", "total_throughput", "of the load"),
    Name("aiperf", "ttft", "time_to_first_token", "first token", "to the first chunk with content"),
    Name("aiperf", "tpot", "inter_token_latency", "after first token",
         "with --per-chunk-usage: after first chunk, which its files do not say of a value"),
    Name("aiperf", "tpot", "inter_token_latency", "retokenized", _RECOUNTED),
    Name("aiperf", "output_throughput", "output_token_throughput", "retokenized", _RECOUNTED),
    Name("aiperf", "total_token_throughput", "total_token_throughput", "retokenized", _RECOUNTED),
    Name("aiperf", "itl", "inter_chunk_latency", "per chunk"),
    Name("aiperf", "e2e_latency", "request_latency", "request", "until the last chunk with content"),
    Name("aiperf", "duration", "benchmark_duration", "load", "from the first request to the last response"),
    Name("aiperf", "request_throughput", "request_throughput", "of the load"),
    Name("aiperf", "input_throughput", "input_token_throughput", "of the load"),
    Name("aiperf", "output_throughput", "output_token_throughput", "of the load"),
    Name("aiperf", "total_token_throughput", "total_token_throughput", "of the load"),
    Name("aiperf", "goodput", "goodput", "of the load"),
    Name("guidellm", "ttft", "time_to_first_token_ms", "first token"),
    Name("guidellm", "tpot", "inter_token_latency_ms", "after first token", "called inter-token latency there"),
    Name("guidellm", "tpot", "time_per_output_token_ms", "all tokens"),
    Name("guidellm", "e2e_latency", "request_latency", "request", "until the response is read, with its usage"),
    Name("guidellm", "duration", "duration", "window"),
    Name("guidellm", "request_throughput", "requests_per_second", "rate over time"),
    Name("guidellm", "output_throughput", "output_tokens_per_second", "rate over time"),
    Name("guidellm", "total_token_throughput", "tokens_per_second", "rate over time"),
    Name("trtllm-bench", "ttft", "avg_ttft_ms, ttft_percentiles", "first token", "by the engine's clock"),
    Name("trtllm-bench", "tpot", "avg_tpot_ms, tpot_percentiles", "after first token", "0 for a request of one token"),
    Name("trtllm-bench", "e2e_latency", "avg_request_latency_ms, request_latency_percentiles_ms", "request"),
    Name("trtllm-bench", "duration", "total_latency_ms", "load", "from the first request's start to the last end"),
    Name("trtllm-bench", "request_throughput", "request_throughput_req_s", "of the load"),
    Name("trtllm-bench", "output_throughput", "system_output_throughput_tok_s", "of the load"),
    Name("trtllm-bench", "total_token_throughput", "system_total_throughput_tok_s", "of the load"),
    Name("lmdeploy-profile", "ttft", "mean_ttft_ms", "first token", "ts[1] - ts[0] of what the engine yields"),
    Name("lmdeploy-profile", "tpot", "mean_tpot_ms", "after first chunk",
         "(ts[-1] - ts[1]) / (ns[-1] - ns[1]); the whole latency over all tokens where nothing was streamed"),
    Name("lmdeploy-profile", "itl", "mean_itl_ms", "per chunk", "`Tokens per Tick` beside it says how many"),
    Name("lmdeploy-profile", "e2e_latency", "mean_e2e_latency_ms", "request"),
    Name("lmdeploy-profile", "duration", "duration", "load"),
    Name("lmdeploy-profile", "request_throughput", "request_throughput", "of the load"),
    Name("lmdeploy-profile", "input_throughput", "input_throughput", "of the load"),
    Name("lmdeploy-profile", "output_throughput", "output_throughput", "of the load"),
)  # fmt: skip


def names_of(metric: str) -> list[Name]:
    """What each tool calls a metric, in the order of `TOOLS`; one may have several definitions of it, or none."""
    return [name for name in NAMES if name.metric == metric]


def names_in(tool: str) -> list[Name]:
    """Every metric of a tool. KeyError for a tool that is no key of `TOOLS`."""
    if tool not in TOOLS:
        raise KeyError(f"unknown tool {tool!r}; known: {', '.join(TOOLS)}")
    return [name for name in NAMES if name.tool == tool]
