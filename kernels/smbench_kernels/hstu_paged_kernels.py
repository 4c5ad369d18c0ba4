"""The kernels of an HSTU inference step in Triton: append to pages, attend over pages. Owns device code, no launch.

**Attention.** A program owns a tile of rows of one head of one sequence, first new history, then candidates, and walks
over the pages of the history. Its rows see history tokens up to a limit: the row's own position, or for a candidate all
of them. Tiles that every row sees whole need no mask. What a candidate sees of itself is one element, outside of the
product of tiles: a row's own q . k, and its own v. SiLU as in `hstu_attention_tiles`.

Few rows against a long history leave most of a card without a program. There is no softmax, so a history can be cut
into SPLITS ranges of tiles without any rescaling: each program sums one range in float32, and `combine` adds the ranges
in order, so that equal inputs give equal bits.
"""

from __future__ import annotations

import triton.language as tl

from smbench_kernels.hstu_attention_tiles import tanh
from smbench_kernels.launch import jit


@jit()
def history_rows(
    cache_ptr: tl.tensor,
    page_ids_ptr: tl.tensor,
    token: tl.tensor,
    total: tl.tensor,
    page_stride: tl.tensor,
    token_stride: tl.tensor,
    COLUMNS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    CHECK: tl.constexpr,
) -> tl.tensor:
    """[COLUMNS, BLOCK_D] of a history from its token `token` on; `cache_ptr` is at a head's keys, or values, of page 0.

    With CHECK, tokens from `total` on are zero: their rows were never written, and their pages may be no pages.
    """
    at = token + tl.arange(0, COLUMNS)
    column = tl.arange(0, BLOCK_D)
    if CHECK:
        page = tl.load(page_ids_ptr + at // PAGE_SIZE, mask=at < total, other=0)
    else:
        page = tl.load(page_ids_ptr + at // PAGE_SIZE)
    places = cache_ptr + (page.to(tl.int64) * page_stride + at % PAGE_SIZE * token_stride)[:, None] + column[None, :]
    if BLOCK_D != HEAD_DIM:
        inside = (column < HEAD_DIM)[None, :]
        if CHECK:
            inside = inside & (at < total)[:, None]
        return tl.load(places, mask=inside, other=0.0)
    elif CHECK:
        return tl.load(places, mask=(at < total)[:, None], other=0.0)
    else:
        return tl.load(places)


@jit()
def own_rows(
    source_ptr: tl.tensor,
    rows: tl.tensor,
    wanted: tl.tensor,
    row_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> tl.tensor:
    """[rows, BLOCK_D] of q, k or v at a head; zero where a row is not wanted."""
    column = tl.arange(0, BLOCK_D)
    inside = wanted[:, None] & (column < HEAD_DIM)[None, :]
    return tl.load(source_ptr + rows.to(tl.int64)[:, None] * row_stride + column[None, :], mask=inside, other=0.0)


@jit()
def attend(
    q_ptr: tl.tensor,
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    out_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    page_offsets_ptr: tl.tensor,
    page_ids_ptr: tl.tensor,
    half_alpha: tl.tensor,
    scale: tl.tensor,
    heads: tl.tensor,
    q_row: tl.tensor,
    q_head: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    split_stride: tl.tensor,
    page_stride: tl.tensor,
    half_stride: tl.tensor,
    token_stride: tl.tensor,
    head_stride: tl.tensor,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    FAST: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    STAGES: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """out = P v for ROWS rows of one head of one sequence; with SPLITS above 1 over one range of the history."""
    sequence = tl.program_id(1) // heads
    head = tl.program_id(1) % heads
    begin = tl.load(offsets_ptr + sequence)
    length = tl.load(offsets_ptr + sequence + 1) - begin
    first = tl.program_id(0) * ROWS
    if first >= length:
        return
    total = tl.load(totals_ptr + sequence)
    new = length - tl.load(targets_ptr + sequence)
    page_ids = page_ids_ptr + tl.load(page_offsets_ptr + sequence)

    row = first + tl.arange(0, ROWS)
    # a row of new history sees itself and what was before it, a candidate the whole history
    position = total - new + row
    limit = tl.minimum(position + 1, total)
    full = tl.minimum(total - new + first + 1, total) // COLUMNS
    stop = tl.cdiv(tl.minimum(total - new + first + ROWS, total), COLUMNS)

    q_tile = own_rows(q_ptr + head * q_head, begin + row, row < length, q_row, HEAD_DIM, BLOCK_D)
    keys = cache_ptr + head * head_stride
    values = keys + half_stride
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    start = 0
    own = first + ROWS > new
    if SPLITS > 1:
        split = tl.program_id(2)
        out_ptr += split.to(tl.int64) * split_stride
        own = own & (split == SPLITS - 1)
        # empty for a history with fewer tiles than ranges: its sums are zero, and `combine` reads them
        each = tl.cdiv(stop, SPLITS)
        start = tl.minimum(split * each, stop)
        stop = tl.minimum(start + each, stop)
        full = tl.minimum(tl.maximum(full, start), stop)
    if own:
        # before the loop, where registers are free
        candidate = (row >= new) & (row < length)
        own_k = own_rows(k_ptr + head * k_head, begin + row, candidate, k_row, HEAD_DIM, BLOCK_D)
        h = tl.sum(q_tile.to(tl.float32) * own_k.to(tl.float32), 1) * half_alpha
        own_v = own_rows(v_ptr + head * v_head, begin + row, candidate, v_row, HEAD_DIM, BLOCK_D)
        acc = (h * tanh(h, FAST) + h)[:, None] * own_v.to(tl.float32)
    for MASKED in tl.static_range(2):
        for tile in tl.range(full if MASKED else start, stop if MASKED else full, num_stages=1 if MASKED else STAGES):
            token = tile * COLUMNS
            k_tile = history_rows(
                keys, page_ids, token, total, page_stride, token_stride, COLUMNS, HEAD_DIM, BLOCK_D, PAGE_SIZE, MASKED
            )
            v_tile = history_rows(
                values, page_ids, token, total, page_stride, token_stride, COLUMNS, HEAD_DIM, BLOCK_D, PAGE_SIZE, MASKED
            )
            h = tl.dot(q_tile, tl.trans(k_tile)) * half_alpha
            p = h * tanh(h, FAST) + h
            if MASKED:
                p = tl.where((token + tl.arange(0, COLUMNS))[None, :] < limit[:, None], p, 0.0)
            acc = tl.dot(p.to(v_tile.dtype), v_tile, acc)

    column = tl.arange(0, BLOCK_D)
    places = out_ptr + (begin + row).to(tl.int64)[:, None] * out_row + head * out_head + column[None, :]
    inside = (row < length)[:, None] & (column < HEAD_DIM)[None, :]
    tl.store(places, (acc * scale).to(out_ptr.dtype.element_ty), mask=inside)


@jit()
def combine(
    sums_ptr: tl.tensor,
    out_ptr: tl.tensor,
    rows_ptr: tl.tensor,
    split_stride: tl.tensor,
    out_row: tl.tensor,
    out_head: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLITS: tl.constexpr,
) -> None:
    """out = the sum over SPLITS of sums [SPLITS, rows, HEADS * HEAD_DIM], for as many rows as `rows_ptr` says."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    element = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = (row < tl.load(rows_ptr))[:, None] & (element < HEADS * HEAD_DIM)[None, :]
    places = sums_ptr + row.to(tl.int64)[:, None] * (HEADS * HEAD_DIM) + element[None, :]
    acc = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    for _ in range(SPLITS):
        acc += tl.load(places, mask=inside, other=0.0)
        places += split_stride
    targets = out_ptr + row.to(tl.int64)[:, None] * out_row
    targets += (element // HEAD_DIM * out_head + element % HEAD_DIM)[None, :]
    tl.store(targets, acc.to(out_ptr.dtype.element_ty), mask=inside)


@jit()
def append(
    k_ptr: tl.tensor,
    v_ptr: tl.tensor,
    cache_ptr: tl.tensor,
    offsets_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    totals_ptr: tl.tensor,
    page_offsets_ptr: tl.tensor,
    page_ids_ptr: tl.tensor,
    k_row: tl.tensor,
    k_head: tl.tensor,
    v_row: tl.tensor,
    v_head: tl.tensor,
    page_stride: tl.tensor,
    half_stride: tl.tensor,
    token_stride: tl.tensor,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PAGE_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """Copy the keys (program axis 2 is 0) or values (1) of ROWS rows of new history into their pages."""
    sequence = tl.program_id(1)
    begin = tl.load(offsets_ptr + sequence)
    new = tl.load(offsets_ptr + sequence + 1) - begin - tl.load(targets_ptr + sequence)
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    if tl.program_id(0) * ROWS >= new:
        return
    token = tl.load(totals_ptr + sequence) - new + row
    ids = page_ids_ptr + tl.load(page_offsets_ptr + sequence)
    page = tl.load(ids + token // PAGE_SIZE, mask=row < new, other=0).to(tl.int64)
    element = tl.arange(0, BLOCK)
    inside = (row < new)[:, None] & (element < HEADS * HEAD_DIM)[None, :]
    target = cache_ptr + tl.program_id(2) * half_stride
    places = target + (page * page_stride + token % PAGE_SIZE * token_stride)[:, None] + element[None, :]
    head, column = element // HEAD_DIM, element % HEAD_DIM
    if tl.program_id(2) == 0:
        source = k_ptr + (begin + row).to(tl.int64)[:, None] * k_row + (head * k_head + column)[None, :]
    else:
        source = v_ptr + (begin + row).to(tl.int64)[:, None] * v_row + (head * v_head + column)[None, :]
    tl.store(places, tl.load(source, mask=inside), mask=inside)
