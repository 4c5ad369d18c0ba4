"""Tensor-core tiles that the portable kernels of sgmv and lora_linear share: one of shrink, one of expand.

Device functions only. Owns no grid and no configuration.
"""

from __future__ import annotations

import triton.language as tl

from smbench_kernels.launch import jit


@jit()
def shrink_tile(
    x_rows: tl.tensor,
    m_ok: tl.tensor,
    a_mat: tl.tensor,
    y_rows: tl.tensor,
    partials_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    slot: tl.tensor,
    part: tl.tensor,
    rank_tile: tl.tensor,
    scale: tl.tensor,
    hidden: tl.tensor,
    rank: tl.tensor,
    split: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    """Add `scale * x . A^T` to BLOCK_M rows of y [M, 1] for one tile of BLOCK_N ranks and one of `split` parts of h.

    The parts of a slot leave partial sums in the workspace; the last to arrive adds them in a fixed order and sets the
    counter back to zero, ready for the next launch.
    """
    n = rank_tile * BLOCK_N + tl.arange(0, BLOCK_N)
    n_ok = n < rank
    k = tl.arange(0, BLOCK_K)
    a_rows = a_mat + n[None, :] * hidden
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for start in range(part * BLOCK_K, hidden, split * BLOCK_K):
        cols = start + k
        if EVEN_K:
            x = tl.load(x_rows + cols[None, :], mask=m_ok[:, None], other=0.0)
            a = tl.load(a_rows + cols[:, None], mask=n_ok[None, :], other=0.0)
        else:
            x = tl.load(x_rows + cols[None, :], mask=m_ok[:, None] & (cols < hidden)[None, :], other=0.0)
            a = tl.load(a_rows + cols[:, None], mask=n_ok[None, :] & (cols < hidden)[:, None], other=0.0)
        acc = tl.dot(x, a, acc)
    y_at = y_rows + n[None, :]
    ok = m_ok[:, None] & n_ok[None, :]
    if split == 1:
        tl.store(y_at, tl.load(y_at, mask=ok, other=0.0) + scale * acc, mask=ok)
    else:
        inside = tl.arange(0, BLOCK_M)[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        # 64-bit: partial sums of long batches pass 2**31 bytes
        mine = partials_ptr + slot.to(tl.int64) * split * (BLOCK_M * BLOCK_N)
        tl.store(mine + part * (BLOCK_M * BLOCK_N) + inside, acc)
        # every thread's partials must be out before one thread announces them
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + slot, 1, sem="acq_rel", scope="gpu")
        if arrived == split - 1:
            y = tl.load(y_at, mask=ok, other=0.0)
            total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
            for first in range(0, split, BLOCK_S):
                # unrolled, so that BLOCK_S loads are in flight
                for ahead in tl.static_range(BLOCK_S):
                    at = mine + (first + ahead) * (BLOCK_M * BLOCK_N) + inside
                    # past the L1, which may hold an older launch's values
                    total += tl.load(at, mask=first + ahead < split, other=0.0, cache_modifier=".cg")
            tl.store(y_at, y + scale * total, mask=ok)
            tl.store(counters_ptr + slot, 0)


@jit()
def expand_tile(
    x_rows: tl.tensor,
    m_ok: tl.tensor,
    b_mat: tl.tensor,
    y_rows: tl.tensor,
    column: tl.tensor,
    hidden: tl.tensor,
    rank: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS_R: tl.constexpr,
) -> None:
    """Add `x . B^T` to BLOCK_M rows of y [M, 1] for the BLOCK_N outputs from `column` on."""
    n = column + tl.arange(0, BLOCK_N)
    n_ok = n < hidden
    y_at = y_rows + n[None, :]
    ok = m_ok[:, None] & n_ok[None, :]
    # loaded before the product, so that the loads overlap
    y = tl.load(y_at, mask=ok, other=0.0)
    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in tl.static_range(STEPS_R):
        r = step * BLOCK_R + tl.arange(0, BLOCK_R)
        r_ok = r < rank
        x = tl.load(x_rows + r[None, :], mask=m_ok[:, None] & r_ok[None, :], other=0.0)
        b = tl.load(b_mat + n[None, :] * rank + r[:, None], mask=r_ok[:, None] & n_ok[None, :], other=0.0)
        acc = tl.dot(x.to(b_mat.dtype.element_ty), b, acc)
    tl.store(y_at, (y.to(tl.float32) + acc).to(y_rows.dtype.element_ty), mask=ok)
