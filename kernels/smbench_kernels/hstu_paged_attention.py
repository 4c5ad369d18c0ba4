"""HSTU attention over pages: append a step's keys and values, attend to history and candidates. Owns launches.

Definitions are in `hstu_paged`, device code in `hstu_paged_kernels`. Nothing here waits for the device and grids follow
from `max_rows`, so that a CUDA graph captured once serves every step that fits.
"""

from __future__ import annotations

from typing import Any

import torch

from smbench_kernels import hardware, interpreter
from smbench_kernels import hstu_paged_kernels as kernels
from smbench_kernels.hstu_paged import PagedBatch
from smbench_kernels.launch import Call, Launcher, ceil_div, next_power_of_two
from smbench_kernels.op import Config

APPEND_ROWS = 8
ELEMENT_BYTES = 2


def default_config(head_dim: int, max_rows: int, capability: int) -> Config:
    """The largest tiles whose rows of queries and two stages of keys and values fit the shared memory of a card.

    Rows are bounded by what a sequence has; tiles of 64 keys feed a warp group's products best, 32 fit smaller cards.
    """
    width = padded_dim(head_dim) * ELEMENT_BYTES
    room = hardware.typical(capability).shared_bytes_per_program
    most = max(16, min(128, next_power_of_two(max_rows)))
    for rows in (most, most // 2, most // 4):
        for columns in (64, 32, 16):
            if rows >= 16 and (rows + 2 * 2 * columns) * width <= room:
                return {"ROWS": rows, "COLUMNS": columns, "STAGES": 2, "WARPS": 8 if rows >= 128 else 4}
    return {"ROWS": 16, "COLUMNS": 16, "STAGES": 1, "WARPS": 4}


def padded_dim(head_dim: int) -> int:
    """Columns of a tile."""
    return max(16, next_power_of_two(head_dim))


def append(cache: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: PagedBatch) -> None:
    """Write the keys and values of new history into their pages, in place, on the current stream.

    cache [pages, 2, page_size, heads, head_dim], contiguous; k, v [rows, heads, head_dim], any row and head strides.
    """
    Launcher(append_call(cache, k, v, batch))()


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    batch: PagedBatch,
    alpha: float,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`hstu_paged.paged_attention_reference` in float16 or bfloat16, summed in float32, on the current stream.

    q, k, v, out [rows, heads, head_dim], any row and head strides; returns `out`. Rows of no sequence are not written.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if config is None:
        config = default_config(q.shape[2], batch.max_rows, hardware.of(q.device).capability)
    Launcher(attend_call(q, k, v, cache, out, batch, alpha, config))()
    return out


def attend_call(q: Any, k: Any, v: Any, cache: Any, out: Any, batch: PagedBatch, alpha: float, config: Config) -> Call:
    """The launch of `attend`."""
    _, heads, head_dim = q.shape
    rows = config["ROWS"]
    arguments = (
        *(q, k, v, cache, out),
        *_sequences(batch),
        *(alpha / 2, 1.0 / batch.max_seqlen, heads),
        *(stride for x in (q, k, v, out) for stride in x.stride()[:2]),
        *cache.stride()[:4],
        *(head_dim, padded_dim(head_dim), batch.page_size, not interpreter.active()),
        *(rows, config["COLUMNS"], config["STAGES"]),
    )
    grid = (ceil_div(batch.max_rows, rows), batch.batch * heads, 1)
    return Call(kernels.attend, grid, arguments, {"num_warps": config["WARPS"]})


def append_call(cache: Any, k: Any, v: Any, batch: PagedBatch) -> Call:
    """The launch of `append`."""
    _, heads, head_dim = k.shape
    arguments = (
        *(k, v, cache),
        *_sequences(batch),
        *(stride for x in (k, v) for stride in x.stride()[:2]),
        *cache.stride()[:3],
        *(heads, head_dim, next_power_of_two(heads * head_dim), batch.page_size, APPEND_ROWS),
    )
    grid = (ceil_div(batch.max_rows, APPEND_ROWS), batch.batch, 2)
    return Call(kernels.append, grid, arguments, {"num_warps": 4})


def _sequences(batch: PagedBatch) -> tuple[Any, ...]:
    return batch.offsets, batch.num_targets, batch.totals, batch.page_offsets, batch.page_ids
