"""Result files of sglang's `bench_one_batch`: JSON lines, and the same objects spread over lines as document 004 has.

Read in sglang 0.4.2.post2 and 0.5.23, whose keys are the same. The file says nothing of model, machine or version. Ours
of this form (`onebatch`) hold static batches of any engine, and their `run_name` says model and parallelism.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from smbench.imported import ImportedRun, Measure
from smbench.importing.content import Content, Fields

TOOL = "sglang-one-batch"
FORMAT = "sglang bench_one_batch (JSON lines, or objects one after the other)"
_AXES = {"batch_size": "batch", "input_len": "input_len", "output_len": "output_len"}
_MEASURES = {
    "prefill_latency": ("prefill_latency", "whole batch", "total"),
    "prefill_throughput": ("prefill_throughput", "prompt tokens", "total"),
    "median_decode_latency": ("decode_latency", "one step", "median"),
    "median_decode_throughput": ("decode_throughput", "tokens of the batch", "median"),
    "total_latency": ("e2e_latency", "sum of phases", "total"),
    "overall_throughput": ("overall_throughput", "input and output tokens", "total"),
}
_OURS = re.compile(r"\S+, (?P<model>\S+), tp (?P<gpus>\d{1,6})")


def knows(keys: set[str]) -> bool:
    """Whether an object with these keys is a result of the tool."""
    return keys >= {"batch_size", "input_len", "output_len", "prefill_latency", "total_latency", "overall_throughput"}


def read(content: Content) -> Iterator[ImportedRun]:
    """Each case of the file."""
    for position, values in enumerate(content.objects, 1):
        fields = Fields(values, f"{content.name}: object {position}")
        ours = _OURS.fullmatch(fields.maybe_text("run_name") or "")
        yield ImportedRun(
            tool=TOOL,
            tool_version=None,
            workload="static_batch",
            engine=None if ours else "sglang",
            model=ours["model"] if ours else None,
            axes={
                **{axis: fields.count(key) for key, axis in _AXES.items()},
                **({"tensor_parallel": int(ours["gpus"])} if ours else {}),
            },
            settings=fields.plain(("run_name",)),
            measures=tuple(
                Measure(metric=metric, definition=definition, stated={statistic: value})
                for key, (metric, definition, statistic) in _MEASURES.items()
                if (value := fields.maybe_number(key)) is not None
            ),
            notes=("the file does not say which engine",) if ours else ("the file does not say model or parallelism",),
            source=content.name,
            source_sha256=content.sha256,
            position=position,
        )
