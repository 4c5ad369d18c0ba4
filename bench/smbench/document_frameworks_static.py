"""Static single batches in numbers, in the forms of document 004: table, result file, what the terminal shows.

Owns which repetition stands for a cell in the document's forms, and their text. The formulas of rates are in `rates`,
the result file's form in `onebatch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from smbench import onebatch, rates
from smbench.analysis import Row
from smbench.document_frameworks_cells import STATIC, Group, serving_of
from smbench.result import Batch
from smbench.stats import Summary

PRINTED_STEPS = 5
"""Decode steps that sglang's program prints."""


@dataclass(frozen=True, slots=True)
class Case:
    """One cell; rates are of the medians beside them."""

    row: Row
    batch: int
    input_len: int
    output_len: int
    prefill: Summary | None
    """None where the engine does not show it."""
    step: Summary | None
    """The median decode step of each repetition; None for one output token, or as above."""
    total: Summary
    rates: Mapping[str, float]
    """By metric."""

    @property
    def prefill_share(self) -> float | None:
        """Part of the whole batch that is its prefill."""
        return self.prefill.median / self.total.median if self.prefill else None


@dataclass(frozen=True, slots=True)
class Worked:
    """The formulas of the document with the numbers of one cell in them."""

    provider: str
    batch: int
    input_len: int
    output_len: int
    shown: Batch
    median_step_s: float | None
    rates: Mapping[str, float]


def case(row: Row) -> Case | None:
    """The numbers of a static cell; None where it has none."""
    total = row.summary("e2e_latency")
    if row.cell.subject != STATIC or total is None:
        return None
    batch, input_len, output_len = (int(row.cell.axes[name]) for name in ("batch", "input_len", "output_len"))
    prefill, step = row.summary("prefill_latency"), row.summary("decode_latency")
    medians = prefill.median if prefill else None, step.median if step else None, total.median
    return Case(
        row,
        batch,
        input_len,
        output_len,
        prefill,
        step,
        total,
        rates.batch_rates(batch, input_len, output_len, *medians),
    )


def shown(row: Row, warmup: int) -> Batch | None:
    """The repetition that stands for a cell where one must; None where it has no number."""
    return onebatch.shown(row.result, warmup) if row.result and row.summaries else None


def worked(row: Row, warmup: int) -> Worked | None:
    """The formulas with the numbers of a cell; None for one whose phases nobody saw."""
    batch, found = shown(row, warmup), case(row)
    if batch is None or found is None or batch.prefill_s is None:
        return None
    step = onebatch.median(batch.step_s)
    return Worked(
        row.cell.provider,
        found.batch,
        found.input_len,
        found.output_len,
        batch,
        step,
        rates.batch_rates(found.batch, found.input_len, found.output_len, batch.prefill_s, step, batch.e2e_s),
    )


def listing(group: Group, provider: str, warmup: int) -> str | None:
    """What sglang's one-batch program prints of such cells, from the records; None where no phase was seen."""
    seen = [(row, batch) for row in group.of(provider) if (batch := shown(row, warmup)) and batch.prefill_s is not None]
    if not seen:
        return None
    lines = []
    serving = serving_of(seen[0][0])
    if serving and (tokens := serving.memory.get("kv_cache_tokens")):
        lines.append(f"max_total_num_tokens={tokens}")
    if serving and warmup and serving.batches[0].prefill_s is not None:
        lines += ["Warmup ...", *_lines(seen[0][0], serving.batches[0])]
    lines.append("Benchmark ...")
    for row, batch in seen:
        lines += _lines(row, batch)
    return "\n".join(lines)


def _lines(row: Row, batch: Batch) -> Sequence[str]:
    """One run of the program: its prefill, its first steps, their median, the whole."""
    input_len, output_len = int(row.cell.axes["input_len"]), int(row.cell.axes["output_len"])
    step = onebatch.median(batch.step_s)
    found = rates.batch_rates(batch.batch, input_len, output_len, batch.prefill_s, step, batch.e2e_s)
    lines = [f"Prefill. latency: {batch.prefill_s:6.5f} s, throughput: {found['prefill_throughput']:9.2f} token/s"]
    lines += [
        f"Decode.  latency: {seconds:6.5f} s, throughput: {batch.batch / seconds:9.2f} token/s"
        for seconds in batch.step_s[:PRINTED_STEPS]
    ]
    if step is not None:
        throughput = found["decode_throughput"]
        lines.append(f"Decode.  median latency: {step:6.5f} s, median throughput: {throughput:9.2f} token/s")
    lines.append(f"Total. latency: {batch.e2e_s:6.3f} s, throughput: {found['overall_throughput']:9.2f} token/s")
    return lines


def command(group: Group) -> str:
    """sglang's own program for the cases of a table, where it is a program still: `sglang.benchmark.one_batch`."""
    values = {
        name: " ".join(map(str, dict.fromkeys(point[name] for point in group.points))) for name in group.points[0]
    }
    return " \\\n    ".join(
        [
            "python -m sglang.benchmark.one_batch",
            "--model-path MODEL",
            f"--tp {group.setting['tensor_parallel']}",
            f"--batch-size {values['batch']}",
            f"--input-len {values['input_len']}",
            f"--output-len {values['output_len']}",
            "--result-filename benchmark.log",
            "--run-name test_run",
        ]
    )


def result_file(rows: Sequence[Row], warmup: int) -> bytes:
    """The result file of sglang's one-batch program for the cells of a provider that have numbers."""
    return onebatch.dump(onebatch.lines([row.result for row in rows if row.result and row.summaries], warmup))
