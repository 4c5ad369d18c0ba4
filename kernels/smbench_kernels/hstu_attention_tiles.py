"""Device code that the HSTU attention kernels share: the mask, rows of a sequence, SiLU. Owns no loop and no launch.

**Mask** (`hstu.visible`). Row i of a sequence sees column j < limit(i), and itself. Causal, limit(i) is the end of the
history for rows of context, else min(i + 1, that end); not causal, it is the end of the history for candidates, else
the sequence's. So a tile is decided by two numbers: the least and the largest limit of its rows.

**SiLU.** silu(x) = h + h tanh(h) with h = x / 2: one multiplication, one `tanh.approx`, one multiply-add. Its error is
at most 2^-11 of the tanh (PTX ISA, "tanh"), below what the rounding of P to bfloat16 costs; where there is no such
instruction (the interpreter) tanh comes from exponentials.
"""

from __future__ import annotations

import triton.language as tl

from smbench_kernels.launch import jit


@jit()
def tanh(x: tl.tensor, FAST: tl.constexpr) -> tl.tensor:
    """tanh of float32: the hardware's, or computed."""
    if FAST:
        return tl.inline_asm_elementwise("tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 2.0 * tl.sigmoid(2.0 * x) - 1.0


@jit()
def sequence_of(
    item: tl.tensor,
    heads: tl.tensor,
    offsets_ptr: tl.tensor,
    targets_ptr: tl.tensor,
    contextuals_ptr: tl.tensor,
    TARGETS: tl.constexpr,
    CONTEXT: tl.constexpr,
) -> tl.tuple:
    """First token, head, length, end of the history and end of the context of the item-th (sequence, head)."""
    sequence = item // heads
    begin = tl.load(offsets_ptr + sequence)
    length = tl.load(offsets_ptr + sequence + 1) - begin
    history = length
    if TARGETS:
        history = tl.maximum(length - tl.maximum(tl.load(targets_ptr + sequence), 0), 0)
    context = length * 0
    if CONTEXT:
        context = tl.minimum(tl.load(contextuals_ptr + sequence), history)
    return begin, item % heads, length, history, context


@jit()
def rows_of(
    source: tl.tensor,
    begin: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    length: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    TMA: tl.constexpr,
    CHECK: tl.constexpr,
) -> tl.tensor:
    """[ROWS, BLOCK_D] of a head of a sequence that begins at token `begin`, from its row-th token on.

    `source` is a pointer, or with TMA a descriptor of [tokens, columns]. With CHECK, rows from `length` on are zero:
    what lies there belongs to others and may be no number.
    """
    at = row + tl.arange(0, ROWS)
    if TMA:
        x = source.load([begin + row, head * head_stride])
        if CHECK:
            x = tl.where((at < length)[:, None], x, 0.0)
    else:
        column = tl.arange(0, BLOCK_D)
        # 64-bit: all tokens together pass 2**31 elements
        base = source + begin.to(tl.int64) * row_stride + head * head_stride
        places = base + at[:, None] * row_stride + column[None, :]
        if BLOCK_D == HEAD_DIM:
            x = tl.load(places, mask=(at < length)[:, None], other=0.0) if CHECK else tl.load(places)
        else:
            inside = (column < HEAD_DIM)[None, :]
            if CHECK:
                inside = inside & (at < length)[:, None]
            x = tl.load(places, mask=inside, other=0.0)
    return x


@jit()
def store_rows(
    target: tl.tensor,
    x: tl.tensor,
    begin: tl.tensor,
    head: tl.tensor,
    row: tl.tensor,
    length: tl.tensor,
    row_stride: tl.tensor,
    head_stride: tl.tensor,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
) -> None:
    """The counterpart of `rows_of`: rows of the sequence only, columns of the head only."""
    at = row + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK_D)
    base = target + begin.to(tl.int64) * row_stride + head * head_stride
    places = base + at[:, None] * row_stride + column[None, :]
    inside = (at < length)[:, None]
    if BLOCK_D != HEAD_DIM:
        inside = inside & (column < HEAD_DIM)[None, :]
    tl.store(places, x.to(target.dtype.element_ty), mask=inside)


@jit()
def visible(
    row: tl.tensor,
    column: tl.tensor,
    length: tl.tensor,
    history: tl.tensor,
    context: tl.tensor,
    CAUSAL: tl.constexpr,
    TARGETS: tl.constexpr,
    CONTEXT: tl.constexpr,
) -> tl.tensor:
    """Which rows see which columns; `row` and `column` broadcast against each other."""
    if CAUSAL:
        limit = tl.minimum(row + 1, history)
        if CONTEXT:
            limit = tl.where(row < context, history, limit)
    else:
        limit = tl.where(row < history, length, history)
    seen = column < limit
    if TARGETS:
        seen = seen | (row == column)
    return seen & (row < length)


@jit()
def columns_of_rows(
    row: tl.tensor,
    length: tl.tensor,
    history: tl.tensor,
    context: tl.tensor,
    CAUSAL: tl.constexpr,
    TARGETS: tl.constexpr,
    CONTEXT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tuple:
    """Tiles of COLUMNS columns that ROWS rows from `row` on see: (full, near, stop, skip), counted in tiles.

    Tiles 0 … full-1 are seen by every row. Tiles full … stop-1 need the mask; from the near-th on, `skip` is added to
    the number, which brings a candidate's tiles next to those of its history.
    """
    least = tl.where(row + ROWS <= history, length, history)
    most = tl.where(row < history, length, history)
    if CAUSAL:
        least, most = tl.minimum(row + 1, history), tl.minimum(row + ROWS, history)
        if CONTEXT:
            least = tl.where(row + ROWS <= context, history, least)
            most = tl.where(row < context, history, most)
    full = least // COLUMNS
    near = tl.cdiv(most, COLUMNS)
    stop, skip = near, near * 0
    if TARGETS:
        own = tl.maximum(row // COLUMNS, near)
        last = tl.cdiv(tl.minimum(row + ROWS, length), COLUMNS)
        skip = own - near
        stop = near + tl.where(row + ROWS > history, tl.maximum(last - own, 0), 0)
    return full, near, stop, skip


@jit()
def rows_of_columns(
    column: tl.tensor,
    length: tl.tensor,
    history: tl.tensor,
    context: tl.tensor,
    CAUSAL: tl.constexpr,
    TARGETS: tl.constexpr,
    CONTEXT: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
) -> tl.tuple:
    """Tiles of ROWS rows that see COLUMNS columns from `column` on: (ahead, start, full, after, stop), in tiles.

    Tiles full … after-1 see every column. The mask is needed for tiles 0 … ahead-1 (context), start … full-1 (the
    diagonal) and after … stop-1 (the end of the sequence).
    """
    stop = tl.cdiv(length, ROWS)
    start = stop * 0
    full = start
    after = length // ROWS
    if CAUSAL:
        start = column // ROWS
        full = tl.minimum(tl.cdiv(column + COLUMNS - 1, ROWS), stop)
    ahead = stop * 0
    if CONTEXT and CAUSAL:
        ahead = tl.minimum(tl.cdiv(context, ROWS), start)
    if TARGETS:
        mixed = column + COLUMNS > history
        if CAUSAL:
            # a candidate is seen by itself alone
            own = column >= history
            ahead = tl.where(own, 0, ahead)
            stop = tl.where(own, tl.cdiv(tl.minimum(column + COLUMNS, length), ROWS), stop)
            full = tl.where(mixed, stop, full)
            after = tl.where(mixed, stop, after)
        else:
            after = tl.where(mixed, history // ROWS, after)
    after = tl.maximum(after, full)
    return ahead, start, full, after, stop
