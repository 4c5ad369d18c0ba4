"""bgmv_expand: y[t] += x[t] . B[lora(t)]^T, one LoRA index per token. Owns its portable kernel and its space.

On a GPU with libnvrtc the decode kernels in CUDA C++ (`lora_decode`) serve it; this one, in Triton, needs no metadata,
runs under the interpreter, and is what configurations without `KERNEL` in the shipped files mean.

Grid (tokens, SPLIT_N): a program owns neighbouring blocks of BLOCK_N outputs of one token, so N need not divide by the
split and no result is shared between programs. It computes them by plain multiply-adds; rows of B are contiguous, so
that a block is one stretch of memory when the rank is a power of two. x is not rounded, accumulation is float32, and y
is rounded once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton.language as tl

from smbench_kernels import hardware, lora_decode_wide, model
from smbench_kernels.launch import Call, Workspace, ceil_div, jit, next_power_of_two
from smbench_kernels.lora import Sizes, make_op
from smbench_kernels.model import Plan
from smbench_kernels.op import Config, Point
from smbench_kernels.own import OwnKernel

OP = make_op("bgmv_expand", "y[T, h] += x[T, r] . B[lora(t)]^T, one LoRA index per token", expands=True, per_token=True)

WEIGHTS_PER_THREAD = 64
"""Most weights that a thread may hold at once without spilling: each is widened to float32 in its own register."""

MOST_CONTENDERS = 16


@jit(do_not_specialize=["blocks"])
def _bgmv_expand(
    x_ptr: tl.tensor,
    b_ptr: tl.tensor,
    y_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    hidden: tl.tensor,
    rank: tl.tensor,
    blocks: tl.tensor,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
) -> None:
    token = tl.program_id(0)
    part = tl.program_id(1)
    lora = tl.load(indices_ptr + token)
    if lora < 0:
        return
    lanes = tl.arange(0, BLOCK_R)
    lane_ok = lanes < rank
    # 64-bit: T * h and L * h * r pass 2**31 at sizes that engines use
    x = tl.load(x_ptr + token.to(tl.int64) * rank + lanes, mask=lane_ok, other=0.0).to(tl.float32)
    b_mat = b_ptr + lora.to(tl.int64) * hidden * rank
    y_row = y_ptr + token.to(tl.int64) * hidden
    for block in range(0, blocks):
        cols = (part * blocks + block) * BLOCK_N + tl.arange(0, BLOCK_N)
        col_ok = cols < hidden
        b = tl.load(b_mat + cols[:, None] * rank + lanes[None, :], mask=col_ok[:, None] & lane_ok[None, :], other=0.0)
        y = tl.load(y_row + cols, mask=col_ok, other=0.0)
        change = tl.sum(b.to(tl.float32) * x[None, :], axis=1)
        tl.store(y_row + cols, (y.to(tl.float32) + change).to(y_ptr.dtype.element_ty), mask=col_ok)


def workspace_sizes(point: Point, config: Config) -> tuple[int, int]:
    """None: every output has one owner."""
    return 0, 0


def call(point: Point, inputs: Mapping[str, Any], workspace: Workspace, config: Config) -> Call:
    """The launch of a configuration. Tensors may be given as dtypes."""
    sizes = Sizes.of(point)
    tensors = (inputs["x"], inputs["weights"], inputs["y"], inputs["indices"])
    options = {"num_warps": config["num_warps"]}
    blocks = ceil_div(ceil_div(sizes.hidden, config["BLOCK_N"]), config["SPLIT_N"])
    grid = (sizes.tokens, config["SPLIT_N"], 1)
    constants = (config["BLOCK_N"], next_power_of_two(sizes.rank))
    return Call(_bgmv_expand, grid, (*tensors, sizes.hidden, sizes.rank, blocks, *constants), options)


def space(point: Point) -> list[Config]:
    """The document's blocks, splits and warps; fewer warps and splits up to 1024 besides.

    Left out is what would do the same work with idle programs, and blocks of more weights than a thread can hold.
    """
    sizes = Sizes.of(point)
    found: list[Config] = []
    for block_n in (32, 64, 128, 256, 512, 1024):
        if block_n > max(32, next_power_of_two(sizes.hidden)):
            continue
        for split in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024):
            if split > ceil_div(sizes.hidden, block_n):
                continue
            for num_warps in (1, 2, 4, 8):
                # the least block is always allowed, whatever the rank
                held = block_n * next_power_of_two(sizes.rank) // (32 * num_warps)
                if held <= WEIGHTS_PER_THREAD or (block_n, num_warps) == (32, 8):
                    found.append({"BLOCK_N": block_n, "SPLIT_N": split, "num_warps": num_warps})
    return found


def plan(point: Point, config: Config) -> Plan:
    """What a configuration does, for the time model."""
    sizes = Sizes.of(point)
    split = config["SPLIT_N"]
    weights = sizes.hidden * sizes.rank
    y = sizes.tokens * sizes.hidden
    return Plan(
        programs=sizes.tokens * split,
        threads=32 * config["num_warps"],
        rounds=ceil_div(ceil_div(sizes.hidden, config["BLOCK_N"]), split),
        device_bytes=2.0 * min(sizes.loras, sizes.tokens) * weights + 4.0 * y,
        cache_bytes=2.0 * sizes.tokens * weights + 4.0 * y + 4.0 * sizes.tokens * split * sizes.rank,
        # convert and multiply-add each weight, load several at once, shuffle and round each output
        operations=sizes.tokens * weights * 2.2 + y * 8.0,
    )


def contenders(point: Point) -> list[Config]:
    """Few tokens and small ranks on one or two warps: 5 % faster than the CUDA kernel at some points (NOTES.md)."""
    sizes = Sizes.of(point)
    if sizes.tokens > 64 or sizes.rank > 16:
        return []
    small = [config for config in space(point) if config["num_warps"] <= 2]
    h200 = hardware.TYPICAL[90].facts()
    return sorted(small, key=lambda config: model.seconds(plan(point, config), h200))[:MOST_CONTENDERS]


def preferred(point: Point) -> Config | None:
    """For few tokens of a LoRA and small ranks as many blocks of 64 outputs and one warp as there may be, which is not
    what the model likes best (NOTES.md)."""
    sizes = Sizes.of(point)
    if sizes.tokens == 1 or sizes.tokens > 4 * sizes.loras:
        return None
    small = [config for config in contenders(point) if config["BLOCK_N"] == 64 and config["num_warps"] == 1]
    return max(small, key=lambda config: config["SPLIT_N"], default=None)


KERNEL = OwnKernel(
    OP,
    space,
    plan,
    workspace_sizes,
    call,
    expands=True,
    cuda=lora_decode_wide.EXPAND,
    contenders=contenders,
    preferred=preferred,
)
TUNABLE = KERNEL.tunable
default = KERNEL.default
tuned = KERNEL.tuned
