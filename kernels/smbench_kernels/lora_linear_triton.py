"""lora_linear in Triton: shrink and expand of each slice over a plan. Owns its kernels and their one configuration.

For where the kernels in CUDA C++ do not run: under the interpreter, and on a GPU without libnvrtc. One tile is one
segment of the plan, of any sequences; the rank-r intermediate is float32 and rounded to the weights' type for the
second product.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import triton.language as tl

from smbench_kernels.launch import Call, Launcher, ceil_div, jit, next_power_of_two
from smbench_kernels.lora_plan import Plan
from smbench_kernels.lora_tiles import expand_tile
from smbench_kernels.op import Config

CONFIG: Config = {"CHUNK": 16, "BLOCK_K": 128, "BLOCK_N": 128, "num_warps": 4}


@jit(do_not_specialize=["rank"])
def _shrink_segment(
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    h_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    members_ptr: tl.tensor,
    scale: tl.tensor,
    hidden: tl.tensor,
    rank: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    count = tl.load(segments_ptr + segment * 4 + 1)
    if count == 0:
        return
    lora = tl.load(segments_ptr + segment * 4 + 2).to(tl.int64)
    m = tl.arange(0, CHUNK)
    m_ok = m < count
    token = tl.load(members_ptr + segment * CHUNK + m, mask=m_ok, other=0).to(tl.int64)
    r = tl.program_id(1) * BLOCK_R + tl.arange(0, BLOCK_R)
    r_ok = r < rank
    a_rows = a_ptr + lora * rank * hidden + r[None, :] * hidden
    acc = tl.zeros([CHUNK, BLOCK_R], dtype=tl.float32)
    for begin in range(0, hidden, BLOCK_K):
        k = begin + tl.arange(0, BLOCK_K)
        k_ok = k < hidden
        x = tl.load(x_ptr + token[:, None] * hidden + k[None, :], mask=m_ok[:, None] & k_ok[None, :], other=0.0)
        a = tl.load(a_rows + k[:, None], mask=k_ok[:, None] & r_ok[None, :], other=0.0)
        acc = tl.dot(x, a, acc)
    tl.store(h_ptr + token[:, None] * rank + r[None, :], scale * acc, mask=m_ok[:, None] & r_ok[None, :])


@jit(do_not_specialize=["rank", "width"])
def _expand_segment(
    h_ptr: tl.tensor,
    b_ptr: tl.tensor,
    y_ptr: tl.tensor,
    segments_ptr: tl.tensor,
    members_ptr: tl.tensor,
    outputs: tl.tensor,
    rank: tl.tensor,
    width: tl.tensor,
    offset: tl.tensor,
    CHUNK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STEPS_R: tl.constexpr,
) -> None:
    segment = tl.program_id(0)
    count = tl.load(segments_ptr + segment * 4 + 1)
    if count == 0:
        return
    lora = tl.load(segments_ptr + segment * 4 + 2).to(tl.int64)
    m = tl.arange(0, CHUNK)
    token = tl.load(members_ptr + segment * CHUNK + m, mask=m < count, other=0).to(tl.int64)
    expand_tile(
        h_ptr + token[:, None] * rank,
        m < count,
        b_ptr + lora * outputs * rank,
        y_ptr + token[:, None] * width + offset,
        tl.program_id(1) * BLOCK_N,
        outputs,
        rank,
        CHUNK,
        BLOCK_N,
        BLOCK_R,
        STEPS_R,
    )


def calls(
    x: Any, a: Sequence[Any], b: Sequence[Any], y: Any, h: Any, plan: Any, sizes: Mapping[str, Any], scale: float
) -> list[Call]:
    """The launches, two for each slice. Tensors may be given as dtypes.

    `h` [slices, T, r] float32; `plan` a Plan, or the dtype of one; `sizes`: hidden, rank, outputs, and the plan's
    capacity.
    """
    hidden, rank, outputs = sizes["hidden"], sizes["rank"], sizes["outputs"]
    chunk, options = CONFIG["CHUNK"], {"num_warps": CONFIG["num_warps"]}
    segments, members = (plan.segments, plan.members) if isinstance(plan, Plan) else (plan, plan)
    block_r = min(64, max(16, next_power_of_two(rank)))
    found = []
    for number, (a_slice, b_slice) in enumerate(zip(a, b, strict=True)):
        h_slice = h[number] if isinstance(h, torch.Tensor) else h
        arguments = (x, a_slice, h_slice, segments, members, scale, hidden, rank, chunk, block_r, CONFIG["BLOCK_K"])
        grid = (sizes["capacity"], ceil_div(rank, block_r), 1)
        found.append(Call(_shrink_segment, grid, arguments, options))
        shape = (outputs[number], rank, sum(outputs), sum(outputs[:number]))
        constants = (chunk, CONFIG["BLOCK_N"], block_r, ceil_div(rank, block_r))
        grid = (sizes["capacity"], ceil_div(outputs[number], CONFIG["BLOCK_N"]), 1)
        found.append(Call(_expand_segment, grid, (h_slice, b_slice, y, segments, members, *shape, *constants), options))
    return found


def linear(
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    y: torch.Tensor,
    h: torch.Tensor,
    plan: Plan,
    scale: float,
) -> tuple[Callable[[], None], list[Launcher]]:
    """A function that enqueues the launches, and these."""
    sizes = {
        "hidden": x.shape[1],
        "rank": a[0].shape[1],
        "outputs": tuple(weights.shape[1] for weights in b),
        "capacity": plan.capacity,
    }
    launchers = [Launcher(call) for call in calls(x, a, b, y, h, plan, sizes, scale)]

    def run() -> None:
        for launcher in launchers:
            launcher()

    return run, launchers
