"""Result lines of sglang's `bench_offline_throughput`. Read in sglang 0.5.23. All prompts at once, one repetition."""

from __future__ import annotations

from collections.abc import Iterator

from smbench.imported import ImportedRun
from smbench.importing.content import Content, Fields, mean_length
from smbench.importing.statistics import totals

TOOL = "sglang-offline-throughput"
FORMAT = "sglang bench_offline_throughput (JSON lines)"
_TOTALS = {
    "total_latency": ("e2e_latency", "batch"),
    "request_throughput": ("request_throughput", "of the load"),
    "input_throughput": ("input_throughput", "of the load"),
    "output_throughput": ("output_throughput", "of the load"),
    "total_throughput": ("total_token_throughput", "of the load"),
}


def knows(keys: set[str]) -> bool:
    """Whether an object with these keys is a result of the tool."""
    return keys >= {"backend", "successful_requests", "total_latency", "total_output_tokens", "total_throughput"}


def read(content: Content) -> Iterator[ImportedRun]:
    """Each result of the file."""
    for position, values in enumerate(content.objects, 1):
        fields = Fields(values, f"{content.name}: object {position}")
        requests = fields.count("successful_requests")
        prompt_tokens, output_tokens = fields.count("total_input_tokens"), fields.count("total_output_tokens")
        lengths = {
            "input_len": mean_length(prompt_tokens, requests),
            "output_len": mean_length(output_tokens, requests),
        }
        yield ImportedRun(
            tool=TOOL,
            tool_version=None,
            workload="offline",
            engine="sglang",
            model=None,
            axes={"num_prompts": requests, **{name: value for name, value in lengths.items() if value is not None}},
            settings=fields.plain(("backend", "last_gen_throughput")),
            completed=requests,
            prompt_tokens=prompt_tokens,
            completion_tokens=output_tokens,
            measures=tuple(totals(fields, _TOTALS)),
            notes=("the file does not say model, version or parallelism",),
            source=content.name,
            source_sha256=content.sha256,
            position=position,
        )
