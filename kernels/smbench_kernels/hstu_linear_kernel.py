"""The HSTU layer's linear maps in Triton, and the elementwise passes around them. Owns the device code.

Grids, launches and the choice between these kernels and a library are in `hstu_linear`.

**Products.** Both compute `x @ weight` with what follows it in the epilogue: a bias, SiLU, a residual. Weights are
[in, out]. Programs take tiles in groups of GROUP rows of tiles, so that neighbours share the weight's columns in L2.
`linear_persistent` loads and stores by tensor descriptors (TMA): a program works on tile after tile and the loop is
flattened, so that the loads of a tile begin during the epilogue before it; the epilogue works in two halves, which
halves its shared memory. `linear_tiled` loads by pointers, one tile a program, for cards without TMA.

**Rounding.** SiLU is applied to the rounded pre-activation: computing it again from a stored pre-activation gives the
same bits as the epilogue did, so that layers that recompute equal layers that store.
"""

from __future__ import annotations

import triton.language as tl

from smbench_kernels.hstu_norm_kernel import sigmoid, silu_slope
from smbench_kernels.launch import jit


@jit()
def tile_of(index: tl.tensor, row_tiles: tl.tensor, column_tiles: tl.tensor, GROUP: tl.constexpr) -> tl.tuple:
    """Row and column of a tile in grouped order: column by column within GROUP rows of tiles."""
    in_group = GROUP * column_tiles
    first = index // in_group * GROUP
    rows = tl.minimum(row_tiles - first, GROUP)
    return first + index % in_group % rows, index % in_group // rows


@jit(do_not_specialize=["tokens"])
def linear_persistent(
    x: tl.tensor,
    weight: tl.tensor,
    bias_ptr: tl.tensor,
    residual: tl.tensor,
    pre: tl.tensor,
    y: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    PRE: tl.constexpr,
    FIRST: tl.constexpr,
) -> None:
    """y = x @ weight [+ bias] [+ residual], or its SiLU from column FIRST on; with PRE what came before goes to `pre`.

    x [tokens, DEPTH], weight [DEPTH, columns], residual, pre, y [tokens, columns] are descriptors: tiles of x and
    weight are [BLOCK_M, BLOCK_K] and [BLOCK_K, BLOCK_N], the others' [BLOCK_M, BLOCK_N / 2].
    """
    HALF: tl.constexpr = BLOCK_N // 2
    row_tiles = tl.cdiv(tokens, BLOCK_M)
    column_tiles = tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=True):
        row, column = tile_of(tile, row_tiles, column_tiles, GROUP)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
            total = tl.dot(x.load([row * BLOCK_M, k]), weight.load([k, column * BLOCK_N]), total)
        halves = tl.split(tl.permute(tl.reshape(total, (BLOCK_M, 2, HALF)), (0, 2, 1)))
        for half in tl.static_range(2):
            first = column * BLOCK_N + half * HALF
            value = halves[half]
            if BIAS:
                places = first + tl.arange(0, HALF)
                value += tl.load(bias_ptr + places, mask=places < columns, other=0.0).to(tl.float32)[None, :]
            if RESIDUAL:
                value += residual.load([row * BLOCK_M, first]).to(tl.float32)
            rounded = value.to(y.dtype)
            if PRE:
                pre.store([row * BLOCK_M, first], rounded)
            if SILU:
                widened = rounded.to(tl.float32)
                active = (widened * sigmoid(widened)).to(y.dtype)
                rounded = tl.where((first + tl.arange(0, HALF) >= FIRST)[None, :], active, rounded) if FIRST else active
            y.store([row * BLOCK_M, first], rounded)


@jit(do_not_specialize=["tokens"])
def linear_tiled(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    pre_ptr: tl.tensor,
    y_ptr: tl.tensor,
    tokens: tl.tensor,
    columns: tl.tensor,
    x_stride: tl.tensor,
    weight_stride: tl.tensor,
    residual_stride: tl.tensor,
    DEPTH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
    STAGES: tl.constexpr,
    BIAS: tl.constexpr,
    RESIDUAL: tl.constexpr,
    SILU: tl.constexpr,
    PRE: tl.constexpr,
    FIRST: tl.constexpr,
) -> None:
    """As `linear_persistent`, by pointers: one tile a program; pre and y are contiguous."""
    row, column = tile_of(tl.program_id(0), tl.cdiv(tokens, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    rows = row * BLOCK_M + tl.arange(0, BLOCK_M).to(tl.int64)
    places = column * BLOCK_N + tl.arange(0, BLOCK_N)
    depth = tl.arange(0, BLOCK_K)
    x_tile = x_ptr + rows[:, None] * x_stride + depth[None, :]
    weight_tile = weight_ptr + depth[:, None] * weight_stride + places[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in tl.range(0, DEPTH, BLOCK_K, num_stages=STAGES):
        x = tl.load(x_tile + k, mask=(rows[:, None] < tokens) & (k + depth[None, :] < DEPTH), other=0.0)
        inside = (k + depth[:, None] < DEPTH) & (places[None, :] < columns)
        weight = tl.load(weight_tile + k * weight_stride, mask=inside, other=0.0)
        total = tl.dot(x, weight, total)
    if BIAS:
        total += tl.load(bias_ptr + places, mask=places < columns, other=0.0).to(tl.float32)[None, :]
    inside = (rows[:, None] < tokens) & (places[None, :] < columns)
    if RESIDUAL:
        residual = residual_ptr + rows[:, None] * residual_stride + places[None, :]
        total += tl.load(residual, mask=inside, other=0.0).to(tl.float32)
    out = rows[:, None] * columns + places[None, :]
    rounded = total.to(y_ptr.dtype.element_ty)
    if PRE:
        tl.store(pre_ptr + out, rounded, mask=inside)
    if SILU:
        widened = rounded.to(tl.float32)
        active = (widened * sigmoid(widened)).to(y_ptr.dtype.element_ty)
        rounded = tl.where((places >= FIRST)[None, :], active, rounded) if FIRST else active
    tl.store(y_ptr + out, rounded, mask=inside)


@jit()
def silu_forward(pre_ptr: tl.tensor, y_ptr: tl.tensor, elements: tl.tensor, BLOCK: tl.constexpr) -> None:
    """y = silu(pre), element by element of contiguous memory; they may be the same."""
    places = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pre = tl.load(pre_ptr + places, mask=places < elements, other=0.0).to(tl.float32)
    tl.store(y_ptr + places, (pre * sigmoid(pre)).to(y_ptr.dtype.element_ty), mask=places < elements)


@jit(do_not_specialize=["tokens"])
def silu_backward(
    d_ptr: tl.tensor,
    pre_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    tokens: tl.tensor,
    d_stride: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """d [tokens, columns] becomes d * silu'(pre) in place; partials [programs, columns] are sums of what was stored."""
    places = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in tl.range(tl.program_id(1), tl.cdiv(tokens, ROWS), tl.num_programs(1), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows[:, None] < tokens) & (places[None, :] < columns)
        pre = tl.load(pre_ptr + rows[:, None] * columns + places[None, :], mask=inside, other=0.0).to(tl.float32)
        d_tile = d_ptr + rows[:, None] * d_stride + places[None, :]
        d = tl.load(d_tile, mask=inside, other=0.0).to(tl.float32)
        product = (d * silu_slope(pre, sigmoid(pre))).to(d_ptr.dtype.element_ty)
        tl.store(d_tile, product, mask=inside)
        total += product.to(tl.float32)
    partials = partials_ptr + tl.program_id(1).to(tl.int64) * columns + places
    tl.store(partials, tl.sum(total, axis=0), mask=places < columns)
