"""The result file of sglang's one-batch program: our static batches as its lines. Owns that form, and no number.

Keys and units are those of `sglang.bench_one_batch` 0.4.2.post2 and `sglang.benchmark.one_batch` 0.5.23: seconds and
token/s, one JSON object a line. A line is one real repetition, so that its rates follow from its times.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat

from smbench import rates
from smbench.result import Batch, Result

Positive = Annotated[FiniteFloat, Field(gt=0)]


class Line(BaseModel):
    """One case of the result file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    run_name: str
    batch_size: Annotated[int, Field(ge=1)]
    input_len: Annotated[int, Field(ge=1)]
    output_len: Annotated[int, Field(ge=1)]
    prefill_latency: Positive
    prefill_throughput: Positive
    median_decode_latency: Positive | None = None
    """Absent for one output token."""
    median_decode_throughput: Positive | None = None
    total_latency: Positive
    overall_throughput: Positive


def shown(result: Result, warmup: int) -> Batch | None:
    """The repetition that stands for a cell: of those that count, the one with the median total time, the lower of two.

    None for a cell without a number.
    """
    batches = result.serving.batches[warmup:] if result.serving and result.status == "ok" else ()
    ordered = sorted(batches, key=lambda batch: batch.e2e_s)
    return ordered[(len(ordered) - 1) // 2] if ordered else None


def lines(results: Sequence[Result], warmup: int) -> list[Line]:
    """The lines of the static batches among some results, in their order; none for a cell whose prefill nobody saw."""
    found = []
    for result in results:
        batch = shown(result, warmup) if result.cell.subject == "static_batch" else None
        if batch is not None and batch.prefill_s:
            found.append(_line(result, batch, batch.prefill_s))
    return found


def dump(found: Sequence[Line]) -> bytes:
    """The bytes of the file: an object a line; without decode steps, neither key of them."""
    return "".join(json.dumps(line.model_dump(exclude_none=True)) + "\n" for line in found).encode()


def median(values: Sequence[float]) -> float | None:
    """The middle value, between the two middle ones where there are two, as the program takes it; None for none."""
    ordered = sorted(values)
    middle = len(ordered) // 2
    if not ordered:
        return None
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def _line(result: Result, batch: Batch, prefill_s: float) -> Line:
    cell = result.cell
    input_len, output_len = int(cell.axes["input_len"]), int(cell.axes["output_len"])
    step = median(batch.step_s)
    found = rates.batch_rates(batch.batch, input_len, output_len, prefill_s, step, batch.e2e_s)
    return Line(
        # the form has no key for a model or for GPUs
        run_name=f"{cell.provider}, {cell.axes['model']}, tp {cell.axes['tensor_parallel']}",
        batch_size=batch.batch,
        input_len=input_len,
        output_len=output_len,
        prefill_latency=prefill_s,
        prefill_throughput=found["prefill_throughput"],
        median_decode_latency=step,
        median_decode_throughput=found.get("decode_throughput"),
        total_latency=batch.e2e_s,
        overall_throughput=found["overall_throughput"],
    )
