"""Result files of `vllm bench latency`. Read in vLLM 0.32.0; other versions have no `model_id`.

One batch, repeated: the time of each whole generate() call. The file does not say which batch.
"""

from __future__ import annotations

from collections.abc import Iterator

from smbench.imported import ImportedRun, Measure
from smbench.importing.content import Content, Fields, base_name

TOOL = "vllm-latency"
FORMAT = "vllm bench latency (JSON)"


def knows(keys: set[str]) -> bool:
    """Whether an object with these keys is a result of the tool."""
    return keys >= {"avg_latency", "latencies", "percentiles"}


def read(content: Content) -> Iterator[ImportedRun]:
    """Each result of the file."""
    for position, values in enumerate(content.objects, 1):
        fields = Fields(values, f"{content.name}: object {position}")
        samples = fields.numbers("latencies")
        if not samples:
            fields.fail("latencies", "at least one latency")
        stated = {"mean": fields.number("avg_latency")}
        percentiles = fields.part("percentiles")
        for key in percentiles.values:
            stated["median" if key == "50" else f"p{key}"] = percentiles.number(key)
        yield ImportedRun(
            tool=TOOL,
            tool_version=None,
            workload="static_batch",
            engine="vllm",
            model=base_name(fields.maybe_text("model_id")),
            axes={},
            measures=(Measure(metric="e2e_latency", definition="batch", samples=tuple(samples), stated=stated),),
            notes=("the file does not say batch, input_len and output_len",),
            source=content.name,
            source_sha256=content.sha256,
            position=position,
        )
