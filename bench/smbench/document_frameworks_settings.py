"""What the engines of a run were told, side by side: one row a quantity, whatever each engine calls it.

Owns which settings of different engines mean the same quantity. Which of them all must share is in `guards_engine`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from smbench.analysis import Row
from smbench.document_frameworks_cells import serving_of
from smbench.guards import leaves_of
from smbench.guards_engine import ALIKE, alike
from smbench.views import View

QUANTITIES: Mapping[str, tuple[str, ...]] = {
    "tensor parallel": ("tensor_parallel_size", "tp_size", "tp"),
    "most tokens of a step": (
        "max_num_batched_tokens",
        "chunked_prefill_size",
        "max_prefill_token_num",
        "max_num_tokens",
    ),
    "prompts in chunks": ("enable_chunked_prefill", "enable_chunked_context"),
    "share of the memory": (
        "gpu_memory_utilization",
        "mem_fraction_static",
        "cache_max_entry_count",
        "free_gpu_memory_fraction",
    ),
    "tokens of a KV cache page": ("block_size", "page_size", "cache_block_seq_len", "tokens_per_block"),
    "attention": ("attention_backend", "attn_backend", "attn_implementation"),
    "no CUDA graphs": ("enforce_eager", "disable_cuda_graph", "eager_mode"),
    "next step while one runs": ("async_scheduling", "!disable_overlap_schedule", "!disable_overlap_scheduler"),
    "order of requests": ("policy", "schedule_policy", "capacity_scheduler_policy"),
}
"""A quantity that engines may differ in to the settings that hold it: of vLLM, sglang, lmdeploy, TensorRT-LLM and
transformers; `!` marks the opposite sense."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """One quantity in all engines."""

    name: str
    given_alike: bool
    """Whether the recipe gives it to all engines alike, so that a difference is a fault."""
    values: Mapping[str, Sequence[str]]
    """Provider to its values, empty where the engine has no such setting or does not say."""

    @property
    def verdict(self) -> str:
        """Whether all that say something say the same."""
        said = [tuple(values) for values in self.values.values() if values]
        if len(said) < 2:
            return "one says"
        return "alike" if len(set(said)) == 1 else "differs"


def quantities(view: View, rows: Sequence[Row]) -> list[Quantity]:
    """The quantities that some engine of these cells says something of, those that all were given first."""
    settings: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        if serving := serving_of(row):
            settings.setdefault(row.cell.provider, []).append(serving.settings)
    told = {name: settings[name] for name in view.providers if name in settings}
    found = [
        *(Quantity(name, True, {p: _distinct(_alike(cells, name)) for p, cells in told.items()}) for name in ALIKE),
        *(
            Quantity(name, False, {p: _distinct(_words(cells, names)) for p, cells in told.items()})
            for name, names in QUANTITIES.items()
        ),
    ]
    return [quantity for quantity in found if any(quantity.values.values())]


def _alike(cells: Iterable[Mapping[str, Any]], name: str) -> Iterator[str | None]:
    """A quantity that all must share, by the guard's own reading of each cell's settings."""
    return (alike(settings)[name] for settings in cells)


def _words(cells: Iterable[Mapping[str, Any]], names: Sequence[str]) -> Iterator[str | None]:
    """A quantity in each cell's settings, by the first of its names that has a value."""
    for settings in cells:
        # the last part of a path is the setting's own name; of several, the one nearest to the top
        leaves = sorted(leaves_of(settings), key=lambda leaf: -leaf[0].count("."))
        found = {path.rpartition(".")[2]: value for path, value in leaves}
        values = [(found.get(name.removeprefix("!")), name.startswith("!")) for name in names]
        yield next((_word(value, opposite) for value, opposite in values if _is_one(value)), None)


def _is_one(value: object) -> bool:
    return value is not None and not isinstance(value, list | tuple)


def _distinct(values: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(value for value in values if value is not None))


def _word(value: object, opposite: bool) -> str:
    if isinstance(value, bool):
        return "on" if value != opposite else "off"
    return str(value).removeprefix("torch.")
