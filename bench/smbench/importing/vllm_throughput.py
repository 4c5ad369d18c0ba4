"""Result files of `vllm bench throughput`. Read in vLLM 0.32.0. All prompts at once, one repetition."""

from __future__ import annotations

from collections.abc import Iterator

from smbench.imported import ImportedRun
from smbench.importing.content import Content, Fields, base_name
from smbench.importing.statistics import totals

TOOL = "vllm-throughput"
FORMAT = "vllm bench throughput (JSON)"
_TOTALS = {
    "elapsed_time": ("e2e_latency", "batch"),
    "requests_per_second": ("request_throughput", "of the load"),
    "tokens_per_second": ("total_token_throughput", "of the load"),
}


def knows(keys: set[str]) -> bool:
    """Whether an object with these keys is a result of the tool."""
    return keys >= {"elapsed_time", "num_requests", "total_num_tokens", "requests_per_second", "tokens_per_second"}


def read(content: Content) -> Iterator[ImportedRun]:
    """Each result of the file."""
    for position, values in enumerate(content.objects, 1):
        fields = Fields(values, f"{content.name}: object {position}")
        requests = fields.count("num_requests")
        yield ImportedRun(
            tool=TOOL,
            tool_version=None,
            workload="offline",
            engine="vllm",
            model=base_name(fields.maybe_text("model_id")),
            axes={"num_prompts": requests},
            settings=fields.plain(("total_num_tokens",)),
            completed=requests,
            measures=tuple(totals(fields, _TOTALS)),
            notes=("prompt and output tokens are counted together only; the lengths are not said",),
            source=content.name,
            source_sha256=content.sha256,
            position=position,
        )
