"""Which cells of a run the tables of document 002 show, and what they are called there. Owns no number."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from smbench.analysis import Row
from smbench.cell import AxisValue
from smbench.document_engines import Untested
from smbench.result import UNTESTED, Measurement, Status
from smbench.statements import Grouped, shape
from smbench.views import Axes, View

E2E, TTFT, TPOT = "e2e_latency", "ttft", "tpot"

EXLLAMA, MARLIN, MACHETE = "ExllamaLinearKernel", "MarlinLinearKernel", "MacheteLinearKernel"
"""The kernels that the document names, as vLLM calls them."""

WORDS: Mapping[str, Mapping[AxisValue, str]] = {
    "scheduling": {
        "chunked": "chunked prefill",
        "whole": "whole prompts",
        "v0-default": "default scheduler of vLLM 0.6",
    },
    "attention": {
        "default": "default attention",
        "flash-attention": "flash attention",
        "flashinfer": "flashinfer",
        "triton": "Triton attention",
    },
    "graphs": {"default": "compiled", "full": "full graphs", "eager": "eager"},
}
"""How a table calls the values of an axis."""
UNSAID = {"attention": "default"}
"""Values that a configuration's name leaves out: nothing was asked for."""
ORDER = ("scheduling", "chunk_tokens", "attention", "graphs", "dtype", "input_len", "output_len", "model")
"""The axes in the order of a configuration's name."""


@dataclass(frozen=True, slots=True)
class Sweep:
    """Short requests along the chunk size: a prefill table of the document."""

    setting: Axes
    """The axes that all of its cells share."""
    chunks: Sequence[int]
    """The largest first, as in the document."""
    providers: Sequence[str]
    rows: Mapping[tuple[int, str], Row]

    def row(self, chunk: int, provider: str) -> Row | None:
        """The cell of a chunk size and a provider, None where the plan has none."""
        return self.rows.get((chunk, provider))

    def of(self, provider: str) -> list[Row]:
        """A provider's cells, the largest chunk first."""
        return [row for chunk in self.chunks if (row := self.row(chunk, provider))]

    @property
    def input_len(self) -> int:
        """Prompt tokens of a request."""
        return int(self.setting["input_len"])


@dataclass(frozen=True)
class Cells:
    """The cells of a run, sorted into the document's tables."""

    view: View

    @cached_property
    def lengths(self) -> Sequence[int]:
        """The output lengths of the run, shortest first."""
        return sorted({int(row.cell.axes["output_len"]) for row in self.view.analysis.rows})

    @property
    def short(self) -> int:
        """The output length of the document's `prefills`."""
        return self.lengths[0]

    @property
    def long(self) -> int | None:
        """The output length of the document's `decoding`; None where the run has one length only."""
        return self.lengths[-1] if len(self.lengths) > 1 else None

    @cached_property
    def sweeps(self) -> Sequence[Sweep]:
        """Each setting in which short requests ran with several chunk sizes, in plan order."""
        groups: dict[tuple[tuple[str, AxisValue], ...], list[Row]] = {}
        for row in self._of_length(self.short):
            if row.cell.axes["scheduling"] == "chunked":
                key = tuple(sorted((name, v) for name, v in row.cell.axes.items() if name != "chunk_tokens"))
                groups.setdefault(key, []).append(row)
        return [
            Sweep(
                dict(key),
                sorted({int(row.cell.axes["chunk_tokens"]) for row in rows}, reverse=True),
                [name for name in self.view.providers if any(row.cell.provider == name for row in rows)],
                {(int(row.cell.axes["chunk_tokens"]), row.cell.provider): row for row in rows},
            )
            for key, rows in groups.items()
            if len({row.cell.axes["chunk_tokens"] for row in rows}) > 1
        ]

    @property
    def main(self) -> Sweep | None:
        """The sweep that conclusions are about: the one with most numbers."""
        return max(self.sweeps, key=lambda sweep: sum(bool(r.summaries) for r in sweep.rows.values()), default=None)

    @cached_property
    def whole(self) -> Sequence[Row]:
        """Short requests whose prompts were not cut: the document's `vllm default scheduler`."""
        return [row for row in self._of_length(self.short) if row.cell.axes["scheduling"] != "chunked"]

    @cached_property
    def single(self) -> Sequence[Row]:
        """Short requests in chunks of one size only: what the long ones of the same settings are split by."""
        swept = {row.cell.cell_id for sweep in self.sweeps for row in sweep.rows.values()}
        rows = self._of_length(self.short)
        return [r for r in rows if r.cell.cell_id not in swept and r.cell.axes["scheduling"] == "chunked"]

    @cached_property
    def decoding(self) -> Sequence[Row]:
        """Long requests: the document's `decoding`."""
        return self._of_length(self.long) if self.long is not None else []

    def partner(self, row: Row) -> Row | None:
        """The short request of the very same settings, None where the plan has none."""
        axes = {**row.cell.axes, "output_len": self.short}
        return self.view.analysis.row(row.cell.subject, row.cell.provider, **axes)

    def role(self, engine: str, kernel: str | None = None) -> str | None:
        """The profile's provider of an engine, with a linear kernel where one is named; None where there is none."""
        table = self.view.analysis.recipe.providers
        found = [name for name in self.view.providers if table[name].engine == engine]
        return next((name for name in found if kernel is None or table[name].kernel == kernel), None)

    def names(self, rows: Iterable[Row]) -> Mapping[str, str]:
        """What a table calls its cells, by cell_id: the provider, and what differs between them."""
        listed = list(rows)
        varying = [axis for axis in ORDER if _varies(axis, listed)]
        return {
            row.cell.cell_id: " + ".join(
                [
                    self.view.title(row.cell.provider),
                    *(
                        word(axis, row.cell.axes[axis])
                        for axis in varying
                        if UNSAID.get(axis) != row.cell.axes[axis] and not _is_whole(axis, row)
                    ),
                ]
            )
            for row in listed
        }

    def shared(self, rows: Sequence[Row]) -> str:
        """What all cells of a table have in common, as words."""
        axes = rows[0].cell.axes
        return self.setting({axis: axes[axis] for axis in ORDER if len({row.cell.axes[axis] for row in rows}) == 1})

    def setting(self, axes: Axes) -> str:
        """Axes as words, such as those that all cells of a table share."""
        return ", ".join(word(axis, axes[axis]) for axis in ORDER if axis in axes)

    def untested(self) -> list[Untested]:
        """Every situation without a checked result, by provider, status and reason, in plan order."""
        rows = self.view.analysis.rows
        varying = [axis for axis in ORDER if len({row.cell.axes[axis] for row in rows}) > 1]
        found: dict[tuple[str, Status, str], list[Row]] = {}
        for row in rows:
            if row.status in UNTESTED:
                found.setdefault((row.cell.provider, row.status, shape(row.reason or "")), []).append(row)
        return [
            Untested(
                provider,
                status,
                "; ".join(_values(axis, group) for axis in varying),
                Grouped((), group[0].reason or "", len(group), len({row.reason for row in group}) == 1),
            )
            for (provider, status, _), group in found.items()
        ]

    def _of_length(self, length: int) -> list[Row]:
        return [row for row in self.view.analysis.rows if row.cell.axes["output_len"] == length]


def word(axis: str, value: AxisValue) -> str:
    """A value of an axis as a table has it."""
    if axis == "chunk_tokens":
        return f"chunks of {value}"
    if axis in ("input_len", "output_len"):
        return f"{value} {'prompt' if axis == 'input_len' else 'output'} tokens"
    return WORDS.get(axis, {}).get(value, str(value))


def measurement(row: Row, name: str) -> Measurement | None:
    """A measurement of a cell, None where it has none or a guard refuted it."""
    found = row.result.measurements if row.result and row.summaries else ()
    return next((entry for entry in found if entry.name == name), None)


def _varies(axis: str, rows: Sequence[Row]) -> bool:
    return len({row.cell.axes[axis] for row in rows if not _is_whole(axis, row)}) > 1


def _is_whole(axis: str, row: Row) -> bool:
    """Whole prompts have the context limit for a chunk size, which says nothing."""
    return axis == "chunk_tokens" and row.cell.axes["scheduling"] != "chunked"


def _values(axis: str, rows: Sequence[Row]) -> str:
    values = list(dict.fromkeys(row.cell.axes[axis] for row in rows))
    if axis in ("chunk_tokens", "output_len", "input_len"):
        return f"{axis} {', '.join(map(str, values))}"
    return ", ".join(word(axis, value) for value in values)
