"""Row kernels of the HSTU layer: layer norm, and layer norm times a gate, forward and backward. Owns the device code.

Grids, launches and the meaning of the tensors are in `hstu_norm`.

**Bytes.** A program holds ROWS whole rows in registers, so that each tensor crosses memory once. The forward pass
leaves mean and scale of each row, so that the backward pass has one reduction along a row instead of four.

**Parameter gradients.** Sums over all tokens in two stages, without atomics: a program adds up the rows that it owns in
float32 and stores one row of partial sums; `sum_partials` adds those rows in a fixed order. Same device, same bits.

**Dropout.** Whether an element is kept is a function of (seed, row, column) by Philox, so that the backward pass and a
recomputation draw the mask of the forward pass without one being stored. The seed is read from memory: a CUDA graph
replays with whatever the tensor holds by then.
"""

from __future__ import annotations

import triton.language as tl

from smbench_kernels import interpreter
from smbench_kernels.launch import jit

FAST = tl.constexpr(not interpreter.active())
"""Whether the hardware's tanh is there: the interpreter runs no assembly."""


@jit()
def sigmoid(x: tl.tensor) -> tl.tensor:
    """The logistic function of float32, `(1 + tanh(x / 2)) / 2`: one special function instead of exp and a division.

    The hardware's tanh is right to 2^-11 of itself (PTX ISA, "tanh"), less than bfloat16 rounds off.
    """
    if FAST:
        half: tl.constexpr = (
            "mul.f32 $0, $1, 0f3F000000; tanh.approx.f32 $0, $0; fma.rn.f32 $0, $0, 0f3F000000, 0f3F000000;"
        )
        return tl.inline_asm_elementwise(half, "=&f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / (1.0 + tl.exp(-x))


@jit()
def silu_slope(x: tl.tensor, s: tl.tensor) -> tl.tensor:
    """The derivative of `x * s`, where s is the logistic function of x."""
    return s * (1.0 + x * (1.0 - s))


@jit()
def statistics(x: tl.tensor, inside: tl.tensor, WIDTH: tl.constexpr, BLOCK: tl.constexpr, eps: tl.tensor) -> tl.tuple:
    """Mean of each row, and one over the square root of its (biased) variance plus eps. What is not inside is 0."""
    mean = tl.sum(x, axis=1) / WIDTH
    centred = x - mean[:, None]
    if WIDTH != BLOCK:
        centred = tl.where(inside, centred, 0.0)
    return mean, tl.rsqrt(tl.sum(centred * centred, axis=1) / WIDTH + eps)


@jit()
def add_pairs(a: tl.tensor, b: tl.tensor, c: tl.tensor, d: tl.tensor) -> tl.tuple:
    """The sum of two pairs."""
    return a + c, b + d


@jit()
def standardized_slope(g: tl.tensor, unit: tl.tensor, scale: tl.tensor, WIDTH: tl.constexpr) -> tl.tensor:
    """The gradient of x from g, that of `unit = (x - mean) * scale`; both are 0 outside. One reduction, two sums."""
    if FAST:
        total, along = tl.reduce((g, g * unit), 1, add_pairs)
    else:
        # the interpreter goes through a tuple element by element
        total, along = tl.sum(g, axis=1), tl.sum(g * unit, axis=1)
    return (g - (total / WIDTH)[:, None] - unit * (along / WIDTH)[:, None]) * scale[:, None]


@jit()
def kept(
    seed: tl.tensor, rows: tl.tensor, columns: tl.tensor, WIDTH: tl.constexpr, probability: tl.tensor
) -> tl.tensor:
    """1 / (1 - probability) where an element stays and 0 where it is dropped, by its place.

    Repeats after 2^32 elements.
    """
    place = (rows[:, None] * WIDTH + columns[None, :]).to(tl.int32)
    return tl.where(tl.rand(seed, place) >= probability, 1.0 / (1.0 - probability), 0.0)


@jit(do_not_specialize=["tokens"])
def norm_forward(
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    AGAIN: tl.constexpr,
) -> None:
    """y = LayerNorm(x), and its statistics: one program for ROWS rows, y contiguous. AGAIN: from the statistics."""
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    if AGAIN:
        mean = tl.load(mean_ptr + rows, mask=rows < tokens, other=0.0)
        scale = tl.load(scale_ptr + rows, mask=rows < tokens, other=0.0)
    else:
        mean, scale = statistics(x, inside, WIDTH, BLOCK, eps)
        tl.store(mean_ptr + rows, mean, mask=rows < tokens)
        tl.store(scale_ptr + rows, scale, mask=rows < tokens)
    unit = (x - mean[:, None]) * scale[:, None]
    y = unit * weight[None, :] + bias[None, :]
    tl.store(y_ptr + rows[:, None] * WIDTH + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["tokens"])
def norm_backward(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    residual_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    residual_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
) -> None:
    """dx = the gradient through LayerNorm of dy, plus `residual`; partials [programs, 2 * WIDTH] of weight and bias.

    dy and dx are contiguous and may be the same memory: a row is read before it is written, by one program.
    """
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
        places = rows[:, None] * WIDTH + columns[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)
        residual = tl.load(residual_ptr + rows[:, None] * residual_stride + columns[None, :], mask=inside, other=0.0)
        mean = tl.load(mean_ptr + rows, mask=rows < tokens, other=0.0)
        scale = tl.load(scale_ptr + rows, mask=rows < tokens, other=0.0)
        unit = (x - mean[:, None]) * scale[:, None]
        if WIDTH != BLOCK:
            unit = tl.where(inside, unit, 0.0)
        dweight += dy * unit
        dbias += dy
        dx = standardized_slope(dy * weight[None, :], unit, scale, WIDTH) + residual.to(tl.float32)
        tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    partials = partials_ptr + tl.program_id(0) * 2 * WIDTH + columns
    tl.store(partials, tl.sum(dweight, axis=0), mask=columns < WIDTH)
    tl.store(partials + WIDTH, tl.sum(dbias, axis=0), mask=columns < WIDTH)


@jit(do_not_specialize=["tokens"])
def gate_forward(
    x_ptr: tl.tensor,
    u_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    y_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    probability: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    u_stride: tl.tensor,
    eps: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    DROPOUT: tl.constexpr,
) -> None:
    """y = LayerNorm(x) * silu(u), dropped out, and the statistics of x: one program for ROWS rows, y contiguous."""
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    u = tl.load(u_ptr + rows[:, None] * u_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    mean, scale = statistics(x, inside, WIDTH, BLOCK, eps)
    tl.store(mean_ptr + rows, mean, mask=rows < tokens)
    tl.store(scale_ptr + rows, scale, mask=rows < tokens)
    unit = (x - mean[:, None]) * scale[:, None]
    y = (unit * weight[None, :] + bias[None, :]) * (u * sigmoid(u))
    if DROPOUT:
        y *= kept(tl.load(seed_ptr), rows, columns, WIDTH, probability)
    tl.store(y_ptr + rows[:, None] * WIDTH + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["tokens"])
def gate_backward(
    dy_ptr: tl.tensor,
    x_ptr: tl.tensor,
    u_ptr: tl.tensor,
    weight_ptr: tl.tensor,
    bias_ptr: tl.tensor,
    dx_ptr: tl.tensor,
    du_ptr: tl.tensor,
    y_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    mean_ptr: tl.tensor,
    scale_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    probability: tl.tensor,
    tokens: tl.tensor,
    x_stride: tl.tensor,
    u_stride: tl.tensor,
    du_stride: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
    STAGES: tl.constexpr,
    DROPOUT: tl.constexpr,
    AGAIN: tl.constexpr,
) -> None:
    """Gradients through `gate_forward`: dx, du; partials [programs, 3 * WIDTH] of weight, bias and the sum of du.

    With AGAIN y is computed once more, to the bit. dy and dx are contiguous and may be the same memory.
    """
    columns = tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + columns, mask=columns < WIDTH, other=0.0).to(tl.float32)
    dweight = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    dbias = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for tile in tl.range(tl.program_id(0), tl.cdiv(tokens, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
        inside = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
        places = rows[:, None] * WIDTH + columns[None, :]
        x = tl.load(x_ptr + rows[:, None] * x_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        u = tl.load(u_ptr + rows[:, None] * u_stride + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + places, mask=inside, other=0.0).to(tl.float32)
        mean = tl.load(mean_ptr + rows, mask=rows < tokens, other=0.0)
        scale = tl.load(scale_ptr + rows, mask=rows < tokens, other=0.0)
        unit = (x - mean[:, None]) * scale[:, None]
        if WIDTH != BLOCK:
            unit = tl.where(inside, unit, 0.0)
        normed = unit * weight[None, :] + bias[None, :]
        s = sigmoid(u)
        gate = u * s
        if DROPOUT:
            keep = kept(tl.load(seed_ptr), rows, columns, WIDTH, probability)
            dy *= keep
        if AGAIN:
            y = normed * gate
            if DROPOUT:
                y *= keep
            tl.store(y_ptr + places, y.to(y_ptr.dtype.element_ty), mask=inside)
        du = dy * normed * silu_slope(u, s)
        # what is summed is what is stored: the bias sees the rounded gradient, as a sum of the stored tensor would
        du = du.to(du_ptr.dtype.element_ty)
        tl.store(du_ptr + rows[:, None] * du_stride + columns[None, :], du, mask=inside)
        total += du.to(tl.float32)
        dnormed = dy * gate
        dweight += dnormed * unit
        dbias += dnormed
        dx = standardized_slope(dnormed * weight[None, :], unit, scale, WIDTH)
        tl.store(dx_ptr + places, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    partials = partials_ptr + tl.program_id(0) * 3 * WIDTH + columns
    tl.store(partials, tl.sum(dweight, axis=0), mask=columns < WIDTH)
    tl.store(partials + WIDTH, tl.sum(dbias, axis=0), mask=columns < WIDTH)
    tl.store(partials + 2 * WIDTH, tl.sum(total, axis=0), mask=columns < WIDTH)


@jit(do_not_specialize=["tokens"])
def dropout_mask(
    mask_ptr: tl.tensor,
    seed_ptr: tl.tensor,
    probability: tl.tensor,
    tokens: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """The factors that the gate kernels apply, as a tensor: for checks and for layers of separate operations."""
    columns = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS).to(tl.int64)
    inside = (rows[:, None] < tokens) & (columns[None, :] < WIDTH)
    keep = kept(tl.load(seed_ptr), rows, columns, WIDTH, probability)
    tl.store(mask_ptr + rows[:, None] * WIDTH + columns[None, :], keep.to(mask_ptr.dtype.element_ty), mask=inside)


@jit(do_not_specialize=["count", "columns"])
def sum_partials(
    partials_ptr: tl.tensor,
    out_ptr: tl.tensor,
    count: tl.tensor,
    columns: tl.tensor,
    BLOCK: tl.constexpr,
    ROWS: tl.constexpr,
) -> None:
    """out[columns] = the sum of partials [count, columns] over its rows, in a fixed order."""
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((ROWS, BLOCK), dtype=tl.float32)
    for first in range(0, count, ROWS):
        row = first + tl.arange(0, ROWS)
        inside = (row[:, None] < count) & (column[None, :] < columns)
        total += tl.load(partials_ptr + row[:, None] * columns + column[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + column, tl.sum(total, axis=0).to(out_ptr.dtype.element_ty), mask=column < columns)
