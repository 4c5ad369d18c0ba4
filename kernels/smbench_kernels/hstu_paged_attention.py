"""HSTU attention over pages: append a step's keys and values, attend to history and candidates. Owns launches.

Definitions are in `hstu_paged`. What `hstu_paged_sm90` takes is one launch of its kernel; the rest is Triton's, with
device code in `hstu_paged_kernels`. Nothing here waits for the device and grids follow from `max_rows`, so that a CUDA
graph captured once serves every step that fits.
"""

from __future__ import annotations

from typing import Any

import torch

from smbench_kernels import hardware, hstu_paged_sm90, interpreter
from smbench_kernels import hstu_paged_kernels as kernels
from smbench_kernels.hstu_paged import PagedBatch
from smbench_kernels.launch import Call, Launcher, ceil_div, next_power_of_two
from smbench_kernels.op import Config

APPEND_ROWS = 8
ELEMENT_BYTES = 2
MOST_ROWS, NARROW_ROWS = 128, 64
MOST_SPLITS, SPLIT_COST = 16, 0.02
COMBINE_ROWS, COMBINE_ELEMENTS = 4, 256
WIDE = 64
"""Widest head, in elements, whose sums of MOST_ROWS rows leave registers for everything else on every card."""


def default_config(head_dim: int, max_rows: int, capability: int) -> Config:
    """The largest tiles that spill no register and, with two stages of keys and values, fit the memory of a card.

    Rows of queries are bounded by what a sequence has. Heads wider than WIDE take NARROW_ROWS of them: twice as many
    spill (56 bytes a thread at 256 elements on Hopper, 80 on Ampere) and leave more of a card without work. Tiles of
    64 keys feed the products of Hopper's warp groups best, 32 fit smaller cards.
    """
    columns_of_head = padded_dim(head_dim)
    room = hardware.typical(capability).shared_bytes_per_program
    most = max(16, min(MOST_ROWS if columns_of_head <= WIDE else NARROW_ROWS, next_power_of_two(max_rows)))
    for rows in (most, most // 2, most // 4):
        for columns in (64, 32, 16):
            if rows >= 16 and (rows + 2 * 2 * columns) * columns_of_head * ELEMENT_BYTES <= room:
                return {"ROWS": rows, "COLUMNS": columns, "STAGES": 2, "WARPS": 8 if rows >= NARROW_ROWS else 4}
    return {"ROWS": 16, "COLUMNS": 16, "STAGES": 1, "WARPS": 4}


def default_splits(programs: int, sm_count: int) -> int:
    """Into how many ranges of keys a history is cut, for so many programs that take it whole.

    The fewest waves of programs, in units of one that takes a history whole; every range adds float32 sums to be
    written and read, which is worth SPLIT_COST of such a unit (counted in bytes for 4096 keys, not measured). Cards
    that have enough programs for two waves are left as they are.
    """
    if programs >= 2 * sm_count:
        return 1

    def cost(splits: int) -> float:
        return ceil_div(programs * splits, sm_count) / splits + SPLIT_COST * (splits - 1)

    return min(range(1, MOST_SPLITS + 1), key=cost)


def padded_dim(head_dim: int) -> int:
    """Columns of a tile."""
    return max(16, next_power_of_two(head_dim))


def append_and_attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    batch: PagedBatch,
    alpha: float,
    workspace: hstu_paged_sm90.Workspace | None = None,
    *,
    dependent: bool = False,
) -> torch.Tensor:
    """`append`, then `attend`: by one kernel where the card, the dtype and the head's width have it, else by Triton.

    `dependent`: the kernel in front does not write the batch's lengths, so that this one may begin before it has ended.
    """
    if alpha > 0 and hstu_paged_sm90.supports(q, k, v, cache, batch) is None:
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        return hstu_paged_sm90.attend(
            q, k, v, cache, batch, alpha, out, appends=True, workspace=workspace, dependent=dependent
        )
    append(cache, k, v, batch)
    return attend(q, k, v, cache, batch, alpha)


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
    """`hstu_paged.paged_attention_reference` by Triton: float16 or bfloat16, summed in float32, on the current stream.

    q, k, v, out [rows, heads, head_dim], any row and head strides; returns `out`. Rows of no sequence are not written.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    if config is None:
        config = configured(batch, q.shape[1], q.shape[2], hardware.of(q.device))
    splits = config.get("SPLITS", 1)
    if splits == 1:
        Launcher(attend_call(q, k, v, cache, out, batch, alpha, config))()
        return out
    # from a graph's own pool while one is captured
    sums = torch.empty((splits, *q.shape), dtype=torch.float32, device=q.device)
    Launcher(attend_call(q, k, v, cache, sums[0], batch, alpha, config))()
    Launcher(combine_call(sums, out, batch))()
    return out


def configured(batch: PagedBatch, heads: int, head_dim: int, device: hardware.Hardware) -> Config:
    """The default configuration of a batch, the ranges of its histories included."""
    config = default_config(head_dim, batch.max_rows, device.capability)
    programs = ceil_div(batch.max_rows, config["ROWS"]) * batch.batch * heads
    return {**config, "SPLITS": default_splits(programs, device.sm_count)}


def attend_call(q: Any, k: Any, v: Any, cache: Any, out: Any, batch: PagedBatch, alpha: float, config: Config) -> Call:
    """The launch of `attend`; with SPLITS above 1, `out` is the first of as many blocks of sums, one after another."""
    _, heads, head_dim = q.shape
    rows, splits = config["ROWS"], config.get("SPLITS", 1)
    arguments = (
        *(q, k, v, cache, out),
        *_sequences(batch),
        *(alpha / 2, 1.0 / batch.max_seqlen, heads),
        *(stride for x in (q, k, v, out) for stride in x.stride()[:2]),
        out.numel(),
        *cache.stride()[:4],
        *(head_dim, padded_dim(head_dim), batch.page_size, not interpreter.active()),
        *(rows, config["COLUMNS"], config["STAGES"], splits),
    )
    grid = (ceil_div(batch.max_rows, rows), batch.batch * heads, splits)
    return Call(kernels.attend, grid, arguments, {"num_warps": config["WARPS"]})


def combine_call(sums: Any, out: Any, batch: PagedBatch) -> Call:
    """The launch that adds the ranges: sums [SPLITS, rows, heads, head_dim] float32, contiguous."""
    splits, rows, heads, head_dim = sums.shape
    arguments = (
        *(sums, out, batch.offsets[-1:]),
        *(sums.stride()[0], *out.stride()[:2]),
        *(heads, head_dim, COMBINE_ELEMENTS, COMBINE_ROWS, splits),
    )
    grid = (ceil_div(rows, COMBINE_ROWS), ceil_div(heads * head_dim, COMBINE_ELEMENTS), 1)
    return Call(kernels.combine, grid, arguments, {"num_warps": 4})


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
