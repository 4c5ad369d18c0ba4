"""sgmv_expand: y[t] += x[t] . B[lora(sequence)]^T, one LoRA index per sequence. Owns its kernel and search space.

Grid (output tiles, token tiles, sequences): a program multiplies BLOCK_M tokens of one sequence with BLOCK_N rows of B
on the tensor cores, in one step over the whole rank, and adds the tile to y. x is rounded to the weights' type before,
as the serving engines do; the sum is float32 and y is rounded once. Ranks above 128 take several steps.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton.language as tl

from smbench_kernels import lora_prefill_own
from smbench_kernels.launch import Call, Workspace, ceil_div, jit, next_power_of_two
from smbench_kernels.lora import Sizes, make_op
from smbench_kernels.lora_tiles import expand_tile
from smbench_kernels.model import Plan
from smbench_kernels.op import Config, Point
from smbench_kernels.own import OwnKernel

OP = make_op(
    "sgmv_expand",
    "y[T, h] += x[T, r] . B[lora(sequence)]^T, one LoRA index per sequence",
    expands=True,
    per_token=False,
)

VALUES_PER_THREAD = 160
"""Most registers of a thread for the tile; the rest of 255 are addresses and what the compiler needs."""


@jit()
def _sgmv_expand(
    x_ptr: tl.tensor,
    b_ptr: tl.tensor,
    y_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    hidden: tl.tensor,
    rank: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS_R: tl.constexpr,
) -> None:
    sequence = tl.program_id(2)
    lora = tl.load(indices_ptr + sequence)
    if lora < 0:
        return
    length = tl.load(lengths_ptr + sequence)
    first = tl.program_id(1) * BLOCK_M
    if first >= length:
        return
    # 64-bit: T * h and L * h * r pass 2**31 at sizes that engines use
    token = (tl.load(starts_ptr + sequence) + first).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    expand_tile(
        x_ptr + token * rank + m[:, None] * rank,
        m < length - first,
        b_ptr + lora.to(tl.int64) * hidden * rank,
        y_ptr + token * hidden + m[:, None] * hidden,
        tl.program_id(0) * BLOCK_N,
        hidden,
        rank,
        BLOCK_M,
        BLOCK_N,
        BLOCK_R,
        STEPS_R,
    )


def workspace_sizes(point: Point, config: Config) -> tuple[int, int]:
    """None: every output has one owner."""
    return 0, 0


def call(point: Point, inputs: Mapping[str, Any], workspace: Workspace, config: Config) -> Call:
    """The launch of a configuration. Tensors may be given as dtypes."""
    sizes = Sizes.of(point)
    block_r = min(128, max(16, next_power_of_two(sizes.rank)))
    return Call(
        kernel=_sgmv_expand,
        grid=(ceil_div(sizes.hidden, config["BLOCK_N"]), ceil_div(sizes.seq_len, config["BLOCK_M"]), sizes.batch),
        arguments=(
            inputs["x"],
            inputs["weights"],
            inputs["y"],
            inputs["indices"],
            inputs["seq_starts"],
            inputs["seq_lens"],
            sizes.hidden,
            sizes.rank,
            config["BLOCK_M"],
            config["BLOCK_N"],
            block_r,
            ceil_div(sizes.rank, block_r),
        ),
        options={"num_warps": config["num_warps"]},
    )


def _held_values(block_m: int, block_n: int, rank: int) -> int:
    """Registers of a tile: sums and y, weights two to a register, x before it is rounded; all are loaded early."""
    ranks = max(16, next_power_of_two(rank))
    return block_m * block_n * 3 // 2 + block_n * ranks // 2 + block_m * ranks


def space(point: Point) -> list[Config]:
    """Tiles of 16 to 64 tokens by 32 to 256 outputs, as far as a thread's registers go; the least tile at any rank."""
    sizes = Sizes.of(point)
    found: list[Config] = []
    for block_m in (16, 32, 64):
        if block_m > max(16, next_power_of_two(sizes.seq_len)):
            continue
        for block_n in (32, 64, 128, 256):
            if block_n > max(32, next_power_of_two(sizes.hidden)):
                continue
            for num_warps in (2, 4, 8):
                held = _held_values(block_m, block_n, sizes.rank) // (32 * num_warps)
                if held <= VALUES_PER_THREAD or (block_m, block_n, num_warps) == (16, 32, 8):
                    found.append({"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": num_warps})
    return found


def plan(point: Point, config: Config) -> Plan:
    """What a configuration does, for the time model."""
    sizes = Sizes.of(point)
    tiles_m = sizes.batch * ceil_div(sizes.seq_len, config["BLOCK_M"])
    tiles_n = ceil_div(sizes.hidden, config["BLOCK_N"])
    y = sizes.tokens * sizes.hidden
    weights = sizes.hidden * sizes.rank
    return Plan(
        programs=tiles_m * tiles_n,
        threads=32 * config["num_warps"],
        rounds=1,
        device_bytes=4.0 * y + 2.0 * min(sizes.loras, sizes.batch) * weights + 4.0 * sizes.tokens * sizes.rank,
        cache_bytes=4.0 * y + 2.0 * tiles_m * weights + 4.0 * tiles_n * sizes.tokens * sizes.rank,
        operations=0.0,
    )


KERNEL = OwnKernel(
    *(OP, space, plan, workspace_sizes, call),
    expands=True,
    cuda=lora_prefill_own.Prefill(expands=True, portable=space, portable_plan=plan),
)
TUNABLE = KERNEL.tunable
default = KERNEL.default
tuned = KERNEL.tuned
