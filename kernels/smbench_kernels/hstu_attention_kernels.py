"""The kernels of HSTU attention in Triton: forward, and a backward pass in pieces. Owns device code, no launch.

A program owns a tile of rows (queries) or of columns (keys) and walks over the other. Scores are `s = q k^T`, with
h = alpha s / 2 and t = tanh h: P = h (1 + t) without its 1 / N, and dP/ds = (alpha / 2N) (1 + w), w = t + h (1 - t^2).
What is constant multiplies the sums once, at the end.

**No softmax, so no order.** Nothing of a row depends on its other columns. dQ = dS K, dK = dS^T Q and dV = P^T dO are
three independent sums, and each is made by the program that owns its rows, in float32 registers, in one order: no
atomics, no locks, the same bits on every run.

**dS by way of memory.** Making dQ apart from dK means making dS twice (two products of three), unless the first kernel
writes it and others read it: `columns_gradient` can write dS^T (WRITE), and both kernels can read it (READ). What of a
tile lies outside of a sequence is not always written; it is masked, or goes into rows that are not stored.
"""

from __future__ import annotations

import triton.language as tl

from smbench_kernels.hstu_attention_tiles import (
    columns_of_rows,
    rows_of,
    rows_of_columns,
    sequence_of,
    store_rows,
    tanh,
    visible,
)
from smbench_kernels.launch import jit

BLOCK = tl.constexpr(128)
"""Keys and queries of a block of dS^T in the workspace. Tiles divide it."""


@jit(do_not_specialize=["heads", "tiles"])
def forward(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    out_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    contextuals_ptr: tl.tensor,
    half_alpha: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    tiles: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    TARGETS: tl.constexpr,
    CONTEXT: tl.constexpr,
    FAST: tl.constexpr,
    TMA: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
) -> None:
    """out = P v for ROWS rows of one head of one sequence. Later tiles first, since causal ones are the longest."""
    begin, head, length, history, context = sequence_of(
        tl.program_id(0) // tiles, heads, offsets_ptr, targets_ptr, contextuals_ptr, TARGETS, CONTEXT
    )
    row = (tl.cdiv(length, ROWS) - 1 - tl.program_id(0) % tiles) * ROWS
    if row < 0:
        return
    full, near, stop, skip = columns_of_rows(row, length, history, context, CAUSAL, TARGETS, CONTEXT, ROWS, COLUMNS)
    rows = row + tl.arange(0, ROWS)
    q_tile = rows_of(q, begin, head, row, length, q_row, q_head, ROWS, HEAD_DIM, BLOCK_D, TMA, not TMA)
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for tile in tl.range(
            full if MASKED else 0, stop if MASKED else full, num_stages=MASKED_STAGES if MASKED else STAGES
        ):
            at = tile * COLUMNS
            if MASKED:
                at += tl.where(tile >= near, skip, 0) * COLUMNS
            k_tile = rows_of(
                k, begin, head, at, length, k_row, k_head, COLUMNS, HEAD_DIM, BLOCK_D, TMA, MASKED and not TMA
            )
            v_tile = rows_of(v, begin, head, at, length, v_row, v_head, COLUMNS, HEAD_DIM, BLOCK_D, TMA, MASKED)
            h = tl.dot(q_tile, tl.trans(k_tile)) * half_alpha
            p = h * tanh(h, FAST) + h
            if MASKED:
                columns = at + tl.arange(0, COLUMNS)
                seen = visible(rows[:, None], columns[None, :], length, history, context, CAUSAL, TARGETS, CONTEXT)
                p = tl.where(seen, p, 0.0)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)
    store_rows(out_ptr, acc * scale, begin, head, row, length, out_row, out_head, ROWS, HEAD_DIM, BLOCK_D)


@jit()
def kept_at(
    item: tl.tensor,
    column: tl.tensor,
    row: tl.tensor,
    blocks: tl.tensor,
    TRIANGLE: tl.constexpr,
) -> tl.tuple:
    """Where a tile of dS^T begins in the workspace [blocks * BLOCK, BLOCK]: its row and its column there.

    Of each (sequence, head), blocks of BLOCK keys by BLOCK queries lie one after the other, ordered by query, then key;
    `blocks` of them side by side, with TRIANGLE only those that a causal mask leaves.
    """
    down, across = row // BLOCK, column // BLOCK
    if TRIANGLE:
        block = item * (blocks * (blocks + 1) // 2) + down * (down + 1) // 2 + across
    else:
        block = (item * blocks + down) * blocks + across
    return block * BLOCK + column % BLOCK, row % BLOCK


@jit()
def kept_places(
    kept_ptr: tl.tensor, first: tl.tensor, second: tl.tensor, ROWS: tl.constexpr, COLUMNS: tl.constexpr
) -> tl.tensor:
    """Pointers to the [COLUMNS, ROWS] tile of the workspace that begins there."""
    inner = tl.arange(0, COLUMNS)[:, None] * BLOCK + tl.arange(0, ROWS)[None, :]
    return kept_ptr + (first.to(tl.int64) * BLOCK + second) + inner


@jit()
def kept_tile(
    kept: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
) -> tl.tensor:
    """A [COLUMNS, ROWS] tile of dS^T."""
    if TMA:
        return kept.load([first, second])
    else:
        return tl.load(kept_places(kept, first, second, ROWS, COLUMNS))


@jit()
def keep_tile(
    kept: tl.tensor,
    ds: tl.tensor,
    first: tl.tensor,
    second: tl.tensor,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    TMA: tl.constexpr,
) -> None:
    """The counterpart of `kept_tile`."""
    if TMA:
        kept.store([first, second], ds)
    else:
        tl.store(kept_places(kept, first, second, ROWS, COLUMNS), ds)


@jit()
def times_slope(x: tl.tensor, h: tl.tensor, t: tl.tensor) -> tl.tensor:
    """x times twice the derivative of silu at 2h, t = tanh h."""
    return x * (h * (1.0 - t * t) + t) + x


@jit(do_not_specialize=["first_item", "heads", "tiles", "blocks"])
def columns_gradient(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dout: tl.tensor,
    dk_ptr: tl.tensor,
    dv_ptr: tl.tensor,
    kept: tl.tensor,
    offsets_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    contextuals_ptr: tl.tensor,
    half_alpha: tl.tensor,
    dk_scale: tl.tensor,
    dv_scale: tl.tensor,
    first_item: tl.tensor,
    heads: tl.tensor,
    tiles: tl.tensor,
    blocks: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    dout_row: tl.tensor,
    dout_head: tl.tensor,
    dk_row: tl.tensor,
    dk_head: tl.tensor,
    dv_row: tl.tensor,
    dv_head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    TARGETS: tl.constexpr,
    CONTEXT: tl.constexpr,
    FAST: tl.constexpr,
    TMA: tl.constexpr,
    TRIANGLE: tl.constexpr,
    DK: tl.constexpr,
    DV: tl.constexpr,
    WRITE: tl.constexpr,
    READ: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
) -> None:
    """dv = P^T dout (DV) and dk = dS^T q (DK): COLUMNS columns of one head of one sequence, the first the longest."""
    place = tl.program_id(0) // tiles
    begin, head, length, history, context = sequence_of(
        first_item + place, heads, offsets_ptr, targets_ptr, contextuals_ptr, TARGETS, CONTEXT
    )
    column = tl.program_id(0) % tiles * COLUMNS
    if column >= length:
        return
    ahead, start, full, after, stop = rows_of_columns(
        column, length, history, context, CAUSAL, TARGETS, CONTEXT, ROWS, COLUMNS
    )
    columns = column + tl.arange(0, COLUMNS)
    if not READ:
        k_tile = rows_of(k, begin, head, column, length, k_row, k_head, COLUMNS, HEAD_DIM, BLOCK_D, TMA, not TMA)
        if DK or WRITE:
            v_tile = rows_of(v, begin, head, column, length, v_row, v_head, COLUMNS, HEAD_DIM, BLOCK_D, TMA, not TMA)
    dk = tl.zeros([COLUMNS, BLOCK_D], dtype=tl.float32)
    dv = tl.zeros([COLUMNS, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        begins = 0 if MASKED else full
        ends = ahead + (full - start) + (stop - after) if MASKED else after
        for number in tl.range(begins, ends, num_stages=MASKED_STAGES if MASKED else STAGES):
            tile = number
            if MASKED:
                tile = tl.where(number < ahead, number, number - ahead + start)
                tile = tl.where(tile >= full, tile - full + after, tile)
            row = tile * ROWS
            rows = row + tl.arange(0, ROWS)
            seen = visible(rows[None, :], columns[:, None], length, history, context, CAUSAL, TARGETS, CONTEXT)
            q_tile = rows_of(
                q, begin, head, row, length, q_row, q_head, ROWS, HEAD_DIM, BLOCK_D, TMA, MASKED and (DK or not TMA)
            )
            first, second = kept_at(place, column, row, blocks, TRIANGLE)
            if READ:
                ds = kept_tile(kept, first, second, ROWS, COLUMNS, TMA)
                if MASKED:
                    ds = tl.where(seen, ds, 0.0)
            else:
                dout_tile = rows_of(
                    dout,
                    begin,
                    head,
                    row,
                    length,
                    dout_row,
                    dout_head,
                    ROWS,
                    HEAD_DIM,
                    BLOCK_D,
                    TMA,
                    MASKED and (DV or not TMA),
                )
                h = tl.dot(k_tile, tl.trans(q_tile)) * half_alpha
                t = tanh(h, FAST)
                if DV:
                    p = h * t + h
                    if MASKED:
                        p = tl.where(seen, p, 0.0)
                if DK or WRITE:
                    ds = times_slope(tl.dot(v_tile, tl.trans(dout_tile)), h, t)
                    if MASKED:
                        ds = tl.where(seen, ds, 0.0)
                    ds = ds.to(q_tile.dtype)
                if DV:
                    dv = tl.dot(p.to(dout_tile.dtype), dout_tile, dv)
                if WRITE:
                    keep_tile(kept, ds, first, second, ROWS, COLUMNS, TMA)
            if DK:
                dk = tl.dot(ds, q_tile, dk)
    if DK:
        store_rows(dk_ptr, dk * dk_scale, begin, head, column, length, dk_row, dk_head, COLUMNS, HEAD_DIM, BLOCK_D)
    if DV:
        store_rows(dv_ptr, dv * dv_scale, begin, head, column, length, dv_row, dv_head, COLUMNS, HEAD_DIM, BLOCK_D)


@jit(do_not_specialize=["first_item", "heads", "tiles", "blocks"])
def rows_gradient(
    q: tl.tensor,
    k: tl.tensor,
    v: tl.tensor,
    dout: tl.tensor,
    dq_ptr: tl.tensor,
    kept: tl.tensor,
    offsets_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    contextuals_ptr: tl.tensor,
    half_alpha: tl.tensor,
    dq_scale: tl.tensor,
    first_item: tl.tensor,
    heads: tl.tensor,
    tiles: tl.tensor,
    blocks: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    dout_row: tl.tensor,
    dout_head: tl.tensor,
    dq_row: tl.tensor,
    dq_head: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CAUSAL: tl.constexpr,
    TARGETS: tl.constexpr,
    CONTEXT: tl.constexpr,
    FAST: tl.constexpr,
    TMA: tl.constexpr,
    TRIANGLE: tl.constexpr,
    READ: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    MASKED_STAGES: tl.constexpr,
) -> None:
    """dq = dS k for ROWS rows of one head of one sequence, in the order of `forward`."""
    place = tl.program_id(0) // tiles
    begin, head, length, history, context = sequence_of(
        first_item + place, heads, offsets_ptr, targets_ptr, contextuals_ptr, TARGETS, CONTEXT
    )
    row = (tl.cdiv(length, ROWS) - 1 - tl.program_id(0) % tiles) * ROWS
    if row < 0:
        return
    full, near, stop, skip = columns_of_rows(row, length, history, context, CAUSAL, TARGETS, CONTEXT, ROWS, COLUMNS)
    rows = row + tl.arange(0, ROWS)
    if not READ:
        q_tile = rows_of(q, begin, head, row, length, q_row, q_head, ROWS, HEAD_DIM, BLOCK_D, TMA, not TMA)
        dout_tile = rows_of(dout, begin, head, row, length, dout_row, dout_head, ROWS, HEAD_DIM, BLOCK_D, TMA, not TMA)
    dq = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    for MASKED in tl.static_range(2):
        for tile in tl.range(
            full if MASKED else 0, stop if MASKED else full, num_stages=MASKED_STAGES if MASKED else STAGES
        ):
            at = tile * COLUMNS
            if MASKED:
                at += tl.where(tile >= near, skip, 0) * COLUMNS
            columns = at + tl.arange(0, COLUMNS)
            k_tile = rows_of(k, begin, head, at, length, k_row, k_head, COLUMNS, HEAD_DIM, BLOCK_D, TMA, MASKED)
            if READ:
                first, second = kept_at(place, at, row, blocks, TRIANGLE)
                ds_t = kept_tile(kept, first, second, ROWS, COLUMNS, TMA)
                if MASKED:
                    seen = visible(rows[None, :], columns[:, None], length, history, context, CAUSAL, TARGETS, CONTEXT)
                    ds_t = tl.where(seen, ds_t, 0.0)
                ds = tl.trans(ds_t)
            else:
                v_tile = rows_of(
                    v, begin, head, at, length, v_row, v_head, COLUMNS, HEAD_DIM, BLOCK_D, TMA, MASKED and not TMA
                )
                h = tl.dot(q_tile, tl.trans(k_tile)) * half_alpha
                ds = times_slope(tl.dot(dout_tile, tl.trans(v_tile)), h, tanh(h, FAST))
                if MASKED:
                    seen = visible(rows[:, None], columns[None, :], length, history, context, CAUSAL, TARGETS, CONTEXT)
                    ds = tl.where(seen, ds, 0.0)
                ds = ds.to(k_tile.dtype)
            dq = tl.dot(ds, k_tile, dq)
    store_rows(dq_ptr, dq * dq_scale, begin, head, row, length, dq_row, dq_head, ROWS, HEAD_DIM, BLOCK_D)
