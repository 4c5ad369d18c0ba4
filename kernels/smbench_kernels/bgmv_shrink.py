"""bgmv_shrink: y[t] += SCALE * x[t] . A[lora(t)]^T, one LoRA index per token. Owns its portable kernel and its space.

On a GPU with libnvrtc the decode kernels in CUDA C++ (`lora_decode`) serve it; this one, in Triton, needs no metadata,
runs under the interpreter, and is what configurations without `KERNEL` in the shipped files mean.

Grid (tokens, SPLIT_K, rank tiles). A program multiplies BLOCK_R rows of A with its share of one token's columns by
plain multiply-adds: a single token gives a tensor core nothing to share, and tokens of one LoRA share nothing here.
Where the columns are split, partial sums go to a workspace and the last program to arrive adds them in a fixed order:
the same bits on every run, no zero-filled output, no float atomics.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton.language as tl

from smbench_kernels import hardware, lora_decode_wide, model
from smbench_kernels.launch import Call, Workspace, ceil_div, jit, next_power_of_two
from smbench_kernels.lora import SCALE, Sizes, make_op
from smbench_kernels.model import Plan
from smbench_kernels.op import Config, Point
from smbench_kernels.own import OwnKernel

OP = make_op(
    "bgmv_shrink", "y[T, r] += x[T, h] . A[lora(t)]^T, one LoRA index per token", expands=False, per_token=True
)

WEIGHTS_PER_THREAD = 32
"""Weights that a thread holds at once: four loads of 16 bytes in flight, and few enough registers not to spill."""

SHORT_HIDDEN, MOST_TOKENS, FEW_TOKENS, MOST_CONTENDERS = 6400, 64, 8, 16
"""Where this kernel may be faster than the CUDA one, and how many of its configurations are tried there."""


@jit(do_not_specialize=["split"])
def _bgmv_shrink(
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    y_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    scale: tl.tensor,
    hidden: tl.tensor,
    rank: tl.tensor,
    split: tl.tensor,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    part = tl.program_id(1)
    tile = tl.program_id(2)
    lora = tl.load(indices_ptr + token)
    if lora < 0:
        return
    lane = tl.arange(0, BLOCK_R)
    rows = tile * BLOCK_R + lane
    row_ok = rows < rank
    # 64-bit: T * h and L * r * h pass 2**31 at sizes that engines use
    x_row = x_ptr + token.to(tl.int64) * hidden
    a_rows = a_ptr + lora.to(tl.int64) * rank * hidden + rows[:, None] * hidden
    y_at = y_ptr + token.to(tl.int64) * rank + rows
    # loaded before the sum, so that the loads overlap
    before = tl.load(y_at, mask=row_ok & (split == 1), other=0.0)
    acc = tl.zeros([BLOCK_R, BLOCK_K], dtype=tl.float32)
    for k in range(part * BLOCK_K, hidden, split * BLOCK_K):
        cols = k + tl.arange(0, BLOCK_K)
        col_ok = cols < hidden
        x = tl.load(x_row + cols, mask=col_ok, other=0.0).to(tl.float32)
        a = tl.load(a_rows + cols[None, :], mask=row_ok[:, None] & col_ok[None, :], other=0.0).to(tl.float32)
        acc += a * x[None, :]
    total = tl.sum(acc, axis=1)
    if split == 1:
        tl.store(y_at, before + scale * total, mask=row_ok)
    else:
        slot = token * tl.num_programs(2) + tile
        mine = partials_ptr + slot.to(tl.int64) * split * BLOCK_R
        tl.store(mine + part * BLOCK_R + lane, total)
        # every thread's partials must be out before one thread announces them
        tl.debug_barrier()
        arrived = tl.atomic_add(counters_ptr + slot, 1, sem="acq_rel", scope="gpu")
        if arrived == split - 1:
            y = tl.load(y_at, mask=row_ok, other=0.0)
            total = tl.zeros([BLOCK_R], dtype=tl.float32)
            for first in range(0, split, BLOCK_S):
                parts = first + tl.arange(0, BLOCK_S)
                at = mine + parts[:, None] * BLOCK_R + lane[None, :]
                # past the L1, which may hold an older launch's values
                several = tl.load(at, mask=parts[:, None] < split, other=0.0, cache_modifier=".cg")
                total += tl.sum(several, axis=0)
            tl.store(y_at, y + scale * total, mask=row_ok)
            # ready for the next launch
            tl.store(counters_ptr + slot, 0)


def workspace_sizes(point: Point, config: Config) -> tuple[int, int]:
    """Partial sums and counters that a configuration needs."""
    sizes = Sizes.of(point)
    split = config["SPLIT_K"]
    slots = sizes.tokens * ceil_div(sizes.rank, config["BLOCK_R"])
    return (slots * split * config["BLOCK_R"], slots) if split > 1 else (0, 0)


def call(point: Point, inputs: Mapping[str, Any], workspace: Workspace, config: Config) -> Call:
    """The launch of a configuration. Tensors may be given as dtypes."""
    sizes = Sizes.of(point)
    block_r = config["BLOCK_R"]
    grid = (sizes.tokens, config["SPLIT_K"], ceil_div(sizes.rank, block_r))
    tensors = (inputs["x"], inputs["weights"], inputs["y"], inputs["indices"], workspace.partials, workspace.counters)
    shape = (sizes.hidden, sizes.rank, config["SPLIT_K"])
    # the last program loads 16 partial sums per thread at a time
    block_s = min(256, max(4, 512 * config["num_warps"] // block_r))
    arguments = (*tensors, SCALE, *shape, block_r, config["BLOCK_K"], block_s)
    return Call(_bgmv_shrink, grid, arguments, {"num_warps": config["num_warps"]})


def space(point: Point) -> list[Config]:
    """The document's blocks, splits and warps; larger blocks and fewer warps besides.

    Left out is what would do the same work with idle programs: blocks past the hidden size, splits past the number of
    blocks. BLOCK_R follows from what a thread can hold, so that a wide block takes few rows and many programs.
    """
    sizes = Sizes.of(point)
    ranks = next_power_of_two(sizes.rank)
    found: list[Config] = []
    for block_k in (32, 64, 128, 256, 512, 1024, 2048, 4096):
        if block_k > max(32, next_power_of_two(sizes.hidden)):
            continue
        for split in (1, 2, 4, 8, 16, 32, 64, 128, 256):
            if split > ceil_div(sizes.hidden, block_k):
                continue
            blocks = {"BLOCK_K": block_k, "SPLIT_K": split}
            for num_warps in (1, 2, 4, 8):
                rows = num_warps * 32 * WEIGHTS_PER_THREAD // block_k
                if rows:
                    found.append({"BLOCK_R": min(rows, ranks, 64), **blocks, "num_warps": num_warps})
    return found


def plan(point: Point, config: Config) -> Plan:
    """What a configuration does, for the time model."""
    sizes = Sizes.of(point)
    block_r, split = config["BLOCK_R"], config["SPLIT_K"]
    tiles = ceil_div(sizes.rank, block_r)
    programs = sizes.tokens * split * tiles
    x = sizes.tokens * sizes.hidden
    weights = sizes.rank * sizes.hidden
    partials = programs * block_r if split > 1 else 0
    return Plan(
        programs=programs,
        threads=32 * config["num_warps"],
        rounds=ceil_div(ceil_div(sizes.hidden, config["BLOCK_K"]), split),
        device_bytes=2.0 * (min(sizes.loras, sizes.tokens) * weights + x),
        cache_bytes=2.0 * (sizes.tokens * weights + x * tiles) + 8.0 * partials,
        # convert and multiply-add each weight, load several at once, share x among rows
        operations=sizes.tokens * weights * (2.2 + 1.5 / block_r),
        reduced_bytes=4.0 * split * block_r if split > 1 else 0.0,
    )


def contenders(point: Point) -> list[Config]:
    """Rows so short that no block needs a part of one, and single tokens: up to 18 % faster than the CUDA kernel, and
    twice as fast for one token of 128,000 elements, which 16 blocks of a cluster cannot fetch as fast (NOTES.md)."""
    sizes = Sizes.of(point)
    short = sizes.hidden <= SHORT_HIDDEN and sizes.tokens <= MOST_TOKENS
    if not short and sizes.tokens > FEW_TOKENS:
        return []
    found = [config for config in space(point) if not short or config["SPLIT_K"] == 1]
    h200 = hardware.TYPICAL[90].facts()
    return sorted(found, key=lambda config: model.seconds(plan(point, config), h200))[:MOST_CONTENDERS]


def preferred(point: Point) -> Config | None:
    """For short rows, few tokens and small ranks the contender that the model likes best (NOTES.md)."""
    sizes = Sizes.of(point)
    found = contenders(point) if sizes.hidden <= 4096 and sizes.tokens * sizes.rank <= 512 else []
    return found[0] if found else None


KERNEL = OwnKernel(
    OP,
    space,
    plan,
    workspace_sizes,
    call,
    expands=False,
    cuda=lora_decode_wide.SHRINK,
    # prefill's kernel too: no default before it was timed
    contenders=lambda point: contenders(point) + lora_decode_wide.SHRINK.contenders(point),
    preferred=preferred,
)
TUNABLE = KERNEL.tunable
default = KERNEL.default
tuned = KERNEL.tuned
