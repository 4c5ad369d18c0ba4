"""What the report of document 003's first half says beyond its table of times: rates, memory, protocols, the attention.

Pure values from a View and the published numbers. Owns no words and no format: those are in the template.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.document_hstu_layer_attention import Attention
from smbench.document_hstu_layer_peers import LAYER, LAYER_SILU_U, Peers
from smbench.published import Published
from smbench.recipe import MeasureRow
from smbench.result import Memory
from smbench.stats import Range, Summary
from smbench.views import Axes, Plot, View, slug

STEP = "step"
"""The measure of a whole step with gradients reset."""
HALVES = ("document-forward", "document-backward")
"""The measures whose medians the document adds up."""
DOCUMENT_LENGTH = 4096
"""The length whose memory the document shows."""


@dataclass(frozen=True, slots=True)
class Column:
    """A column of the document's latency table."""

    header: str
    provider: str
    published: str
    """What the published file calls it."""


COLUMNS = (
    Column("Baseline (ms)", "native", "baseline"),
    Column("+ cutlass kernel", "native-cutlass", "cutlass"),
    Column("+fusion", "fused", "fusion"),
    Column("+layer norm recompute (ms)", "fused-ln", "layer_norm_recompute"),
    Column("+silu recompute (ms)", "fused-ln-silu", "silu_recompute"),
)


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a variant of the layer is, in the words of the report."""

    operations: str
    attention: str
    again: str


MEANINGS: Mapping[str, Meaning] = {
    "torch": Meaning("PyTorch, the definition", "PyTorch, scores in memory", "nothing"),
    "native": Meaning("PyTorch, one after another", "ours in Triton", "nothing"),
    "native-cutlass": Meaning("PyTorch, one after another", "NVIDIA's CUTLASS kernels", "nothing"),
    "native-attention": Meaning("PyTorch, one after another", "our fastest on the card", "nothing"),
    "native-compiled": Meaning("PyTorch under torch.compile", "our fastest on the card", "what the compiler decides"),
    "fused": Meaning("our fused kernels", "our fastest on the card", "nothing"),
    "fused-ln": Meaning("our fused kernels", "our fastest on the card", "input layer norm"),
    "fused-ln-silu": Meaning("our fused kernels", "our fastest on the card", "input layer norm, SiLU"),
    "fused-least": Meaning(
        "our fused kernels", "our fastest on the card", "input layer norm, SiLU, gated output, product for v, q and k"
    ),
    "fused-none": Meaning("our fused kernels", "our fastest on the card", "all but the attention"),
    "nvidia-fused": Meaning("NVIDIA's fused kernels", "NVIDIA's Triton kernels", "nothing"),
    "nvidia-fused-ln": Meaning("NVIDIA's fused kernels", "NVIDIA's Triton kernels", "input layer norm"),
    "nvidia-fused-ln-silu": Meaning("NVIDIA's fused kernels", "NVIDIA's Triton kernels", "input layer norm, SiLU"),
}


@dataclass(frozen=True, slots=True)
class Speed:
    """One number of the layer with its rates."""

    summary: Summary
    flops_per_s: float | None
    utilization: float | None
    """Of the dense tensor peak that the vendor states; None where that is not known."""


@dataclass(frozen=True)
class HstuLayer:
    """A run of the recipe of document 003's first half, asked for what its report claims."""

    view: View
    published: Published | None

    @cached_property
    def attention(self) -> Attention:
        """The attention alone."""
        return Attention(self.view)

    @cached_property
    def peers(self) -> Peers:
        """Other projects' whole layers."""
        return Peers(self.view, self.family, self.lengths, self.step.name)

    @cached_property
    def family(self) -> Axes:
        """The axes of the document's table, but the length: those of the plan's first layer of equal lengths."""
        points = [p for p in self.view.points(LAYER) if p["lengths"] == "full" and p["layers"] == 1]
        return {axis: value for axis, value in points[0].items() if axis != "seq_len"} if points else {}

    @cached_property
    def lengths(self) -> list[AxisValue]:
        """The rows of the document's table."""
        return sorted(
            {p["seq_len"] for p in self.view.points(LAYER) if all(p[axis] == v for axis, v in self.family.items())},
            key=lambda value: int(value),
        )

    @cached_property
    def variants(self) -> list[str]:
        """The providers of the layer in this profile, in its order."""
        rows = [provider for provider in self.view.providers if self.view.rows(provider, LAYER)]
        return list(dict.fromkeys(rows))

    @cached_property
    def shown(self) -> list[str]:
        """Those of them that are more than a reason in the list of what was not tested; all where none is."""
        ran = [p for p in self.variants if any(row.status in ("ok", "verified") for row in self.view.rows(p, LAYER))]
        return ran or self.variants

    def meaning(self, provider: str) -> Meaning:
        """What a variant is; a provider that somebody added to the recipe is known by its title alone."""
        return MEANINGS.get(provider, Meaning(self.view.title(provider), "its own", "unknown"))

    @cached_property
    def columns(self) -> list[Column]:
        """The columns of the document whose provider this profile has."""
        return [column for column in COLUMNS if column.provider in self.variants]

    @cached_property
    def others(self) -> list[str]:
        """The variants that the document does not have."""
        known = {column.provider for column in COLUMNS}
        return [provider for provider in self.variants if provider not in known]

    @cached_property
    def step(self) -> MeasureRow:
        """The measure of a whole step."""
        return next((m for m in self.view.measures if m.name == STEP), self.view.headline)

    @property
    def halves(self) -> list[MeasureRow]:
        """The measures of the document's protocol, empty where the profile has them not."""
        found = [m for name in HALVES for m in self.view.measures if m.name == name]
        return found if len(found) == len(HALVES) else []

    def row(self, provider: str, length: AxisValue) -> Row | None:
        """A cell of the document's table."""
        return self.view.analysis.row(LAYER, provider, **self.family, seq_len=length) if self.family else None

    def ended(self, provider: str, length: AxisValue) -> str | None:
        """How that cell ended."""
        row = self.row(provider, length)
        return row.status if row else None

    def number(self, provider: str, length: AxisValue) -> Summary | None:
        """The time of a whole step."""
        row = self.row(provider, length)
        return row.summary(self.step.name) if row else None

    def half(self, provider: str, length: AxisValue, measure: MeasureRow) -> float | None:
        """The median of a half, seconds."""
        row = self.row(provider, length)
        summary = row.summary(measure.name) if row else None
        return summary.median if summary else None

    def by_protocol(self, row: Row | None) -> float | None:
        """The document's number of a cell, seconds: median of the forward passes + median of the backward passes."""
        halves = [row.summary(measure.name) if row else None for measure in self.halves]
        return sum(half.median for half in halves if half) if halves and all(halves) else None

    def document_number(self, provider: str, length: AxisValue) -> float | None:
        """The document's number of a cell of its table, seconds."""
        return self.by_protocol(self.row(provider, length))

    def published_seconds(self, column: Column, length: AxisValue) -> float | None:
        """The published number of a cell of the table."""
        return self._published.get((column.published, length))

    @cached_property
    def _published(self) -> Mapping[tuple[AxisValue, AxisValue], float]:
        points = self.published.points() if self.published else ()
        return {(p.at["variant"], p.at["seq_len"]): p.value for p in points if "variant" in p.at and "seq_len" in p.at}

    @property
    def comparable(self) -> bool:
        """Whether this table has the shape of the published one."""
        wanted = {"batch": 32, "heads": 4, "head_dim": 256, "embedding": 1024, "dtype": "bfloat16", "layers": 1}
        return all(self.family.get(axis) == value for axis, value in wanted.items())

    def speed(self, provider: str, length: AxisValue) -> Speed | None:
        """The rates of a whole step by the document's count of operations."""
        row, summary = self.row(provider, length), self.number(provider, length)
        if row is None or summary is None:
            return None
        rate = row.result.work.flops / summary.median if row.result and row.result.work else None
        return Speed(summary, rate, rate / self.peak if rate and self.peak else None)

    @cached_property
    def peak(self) -> float | None:
        """The dense tensor peak of the card for the dtype of the table, as its vendor states it."""
        device = self.view.analysis.device
        return device.tensor_peak_flops_per_s(str(self.family.get("dtype"))) if device else None

    def over(self, provider: str, against: str) -> Range | None:
        """Time of a whole step over that of another provider, over all lengths that have both."""
        pairs = [(self.number(provider, length), self.number(against, length)) for length in self.lengths]
        return Range.of(mine.median / theirs.median for mine, theirs in pairs if mine and theirs)

    def protocols(self) -> Range | None:
        """The document's number over the time of a whole step, over all cells that have both."""
        rows = [row for provider in self.variants for row in self.view.rows(provider, LAYER)]
        pairs = [(self.by_protocol(row), row.summary(self.step.name)) for row in rows]
        return Range.of(apart / whole.median for apart, whole in pairs if apart and whole)

    def ours(self) -> list[str]:
        """The fused variants that have numbers in the table, in the profile's order."""
        fused = [provider for provider in self.variants if provider.startswith("fused")]
        return [p for p in fused if any(self.number(p, length) for length in self.lengths)]

    def against_published(self, column: Column) -> Range | None:
        """Published time over measured time, both by the document's protocol."""
        if not self.comparable:
            return None
        pairs = [(self.published_seconds(column, n), self.document_number(column.provider, n)) for n in self.lengths]
        return Range.of(theirs / mine for theirs, mine in pairs if theirs and mine)

    # -- memory

    def weighed(self, layers: int) -> list[Axes]:
        """The points of so many layers and equal lengths at which any provider's memory is known."""
        points = [p for p in self.view.points(LAYER) if p["layers"] == layers and p["lengths"] == "full"]
        return [p for p in points if any(self.memory(provider, p) for provider in self.variants)]

    @cached_property
    def layer_counts(self) -> list[int]:
        """How many layers the weighed points have."""
        return sorted({int(p["layers"]) for p in self.view.points(LAYER)})

    def memory(self, provider: str, point: Axes, operation: str = LAYER) -> Memory | None:
        """What a step took, None where it was not weighed or its output was wrong."""
        row = self.view.analysis.row(operation, provider, **point)
        usable = row is not None and row.status in ("ok", "verified")
        return row.result.memory if usable and row and row.result else None

    def telling(self) -> Axes | None:
        """The point whose memory is shown by variant: the document's length, else the longest with most variants."""
        points = sorted(self.weighed(1), key=lambda point: int(point["seq_len"]), reverse=True)
        documents = [point for point in points if point["seq_len"] == DOCUMENT_LENGTH]
        most = sorted(points, key=lambda point: -sum(bool(self.memory(provider, point)) for provider in self.variants))
        return next(iter(documents or most), None)

    def timelines(self) -> list[tuple[str, Axes, Memory]]:
        """What has a recorded course of memory, of the most layers that have one: provider, point, memory."""
        for layers in reversed(self.layer_counts):
            found = [
                (provider, point, memory)
                for point in self.weighed(layers)
                for provider in self.variants
                if (memory := self.memory(provider, point)) and memory.timeline_bytes
            ]
            if found:
                lengths = {int(point["seq_len"]) for _, point, _ in found}
                wanted = DOCUMENT_LENGTH if DOCUMENT_LENGTH in lengths else max(lengths)
                return [entry for entry in found if entry[1]["seq_len"] == wanted]
        return []

    # -- other shapes

    def further(self) -> list[Axes]:
        """The points of the layer outside the table: unequal lengths, several layers."""
        table = [{**self.family, "seq_len": length} for length in self.lengths]
        return [point for point in self.view.points(LAYER) if dict(point) not in table]

    def further_number(self, provider: str, point: Axes) -> Summary | None:
        """The time of a whole step there."""
        return self.view.summary(LAYER, provider, point, self.step.name)

    def further_ended(self, provider: str, point: Axes) -> str | None:
        """How that cell ended."""
        return self.view.status(LAYER, provider, point)

    # -- files

    def plots(self) -> list[Plot]:
        """The figures that the numbers allow."""
        found = []
        if any(self.number(provider, length) for provider in self.variants for length in self.lengths):
            found.append(Plot("latency", f"latency_{slug(self.step.name)}.png", self.step, (LAYER,)))
        if self.timelines():
            found.append(Plot("memory", "memory_timeline.png", self.step, (LAYER,)))
        if self.attention.measured():
            found.append(Plot("attention", f"attention_{slug(self.step.name)}.png", self.step, ()))
        return found

    def draw(self, plot: Plot) -> bytes:
        """The PNG of one of `plots`."""
        # matplotlib takes most of a second to import, and who checks a report draws nothing
        from smbench import figures_hstu_layer

        return figures_hstu_layer.draw(plot, self)

    def records(self) -> Mapping[str, bytes]:
        """CSV files: the medians of each measure, memory, errors by output."""
        found = {
            f"times_{slug(measure.name)}.csv": _csv(self._times(measure.name))
            for measure in self.view.measures
            if any(row.summary(measure.name) for row in self.view.analysis.rows)
        }
        tables = {"memory.csv": self._memory_lines(), "errors.csv": self.attention.error_lines()}
        return found | {name: _csv(lines) for name, lines in tables.items() if len(lines) > 1}

    def _times(self, measure: str) -> list[list[object]]:
        axes = list(dict.fromkeys(axis for row in self.view.analysis.rows for axis in row.cell.axes))
        lines: list[list[object]] = [["operation", "provider", *axes, "time_ms", "low_ms", "high_ms", "tflops_per_s"]]
        for row in self.view.analysis.rows:
            summary = row.summary(measure)
            if summary is None or row.result is None:
                continue
            taken = next(m for m in row.result.measurements if m.name == measure)
            work = taken.work or row.result.work
            times = [f"{value * 1e3:.5f}" for value in (summary.median, summary.ci_low, summary.ci_high)]
            rate = f"{work.flops / summary.median / 1e12:.3f}" if work else ""
            values = [row.cell.axes.get(axis, "") for axis in axes]
            lines.append([row.cell.subject, row.cell.provider, *values, *times, rate])
        return lines

    def _memory_lines(self) -> list[list[object]]:
        axes = list(self.view.values(LAYER))
        head = ["operation", "provider", *axes, "method", "saved_bytes", "peak_bytes", "snapshot"]
        lines: list[list[object]] = [list(head)]
        for operation in (LAYER, LAYER_SILU_U):
            for point in self.view.points(operation):
                for provider in self.view.providers:
                    if memory := self.memory(provider, point, operation):
                        of_point = [operation, provider, *(point.get(axis, "") for axis in axes)]
                        told = [memory.method, memory.saved_bytes, memory.peak_bytes, memory.snapshot]
                        lines.append([*of_point, *("" if value is None else value for value in told)])
        return lines


def _csv(lines: Sequence[Sequence[object]]) -> bytes:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(lines)
    return file.getvalue().encode()
