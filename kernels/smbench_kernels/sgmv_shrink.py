"""sgmv_shrink: y[t] += SCALE * x[t] . A[lora(sequence)]^T, one LoRA index per sequence. Owns its kernel and space.

Grid (token tiles x rank tiles, SPLIT_K, sequences): a program multiplies BLOCK_M tokens of one sequence with BLOCK_N
rows of A on the tensor cores, over every SPLIT_K-th block of columns. Where the columns are split, partial sums go to a
workspace and the last program of a tile to arrive adds them in a fixed order, as in `bgmv_shrink`. Both operands of the
product come from memory unchanged, which keeps clear of the ptxas fault with register operands of wgmma
(kernels/NOTES.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import triton.language as tl

from smbench_kernels import hardware, lora_prefill_own
from smbench_kernels.launch import SHARED_BYTES, Call, Workspace, ceil_div, jit, next_power_of_two
from smbench_kernels.lora import SCALE, Sizes, make_op
from smbench_kernels.lora_tiles import shrink_tile
from smbench_kernels.model import Plan
from smbench_kernels.op import Config, Point
from smbench_kernels.own import OwnKernel

HOPPER = 90
LEAST_WAVE, MOST_WAVES = 0.7, 2.2
"""Programs of a contender by multiprocessors."""
OP = make_op(
    "sgmv_shrink",
    "y[T, r] += x[T, h] . A[lora(sequence)]^T, one LoRA index per sequence",
    expands=False,
    per_token=False,
)


@jit(do_not_specialize=["split", "rank_tiles"])
def _sgmv_shrink(
    x_ptr: tl.tensor,
    a_ptr: tl.tensor,
    y_ptr: tl.tensor,
    indices_ptr: tl.tensor,
    starts_ptr: tl.tensor,
    lengths_ptr: tl.tensor,
    partials_ptr: tl.tensor,
    counters_ptr: tl.tensor,
    scale: tl.tensor,
    hidden: tl.tensor,
    rank: tl.tensor,
    rank_tiles: tl.tensor,
    split: tl.tensor,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EVEN_K: tl.constexpr,
    BLOCK_S: tl.constexpr,
) -> None:
    tile = tl.program_id(0)
    part = tl.program_id(1)
    sequence = tl.program_id(2)
    lora = tl.load(indices_ptr + sequence)
    if lora < 0:
        return
    length = tl.load(lengths_ptr + sequence)
    first = tile // rank_tiles * BLOCK_M
    if first >= length:
        return
    # 64-bit: T * h and L * r * h pass 2**31 at sizes that engines use
    token = (tl.load(starts_ptr + sequence) + first).to(tl.int64)
    m = tl.arange(0, BLOCK_M)
    shrink_tile(
        x_ptr + token * hidden + m[:, None] * hidden,
        m < length - first,
        a_ptr + lora.to(tl.int64) * rank * hidden,
        y_ptr + token * rank + m[:, None] * rank,
        partials_ptr,
        counters_ptr,
        sequence * tl.num_programs(0) + tile,
        part,
        tile % rank_tiles,
        scale,
        hidden,
        rank,
        split,
        BLOCK_M,
        BLOCK_N,
        BLOCK_K,
        EVEN_K,
        BLOCK_S,
    )


def _tiles(sizes: Sizes, config: Config) -> tuple[int, int]:
    """Token tiles of the longest sequence, and rank tiles."""
    return ceil_div(sizes.seq_len, config["BLOCK_M"]), ceil_div(sizes.rank, config["BLOCK_N"])


def workspace_sizes(point: Point, config: Config) -> tuple[int, int]:
    """Partial sums and counters that a configuration needs."""
    sizes = Sizes.of(point)
    token_tiles, rank_tiles = _tiles(sizes, config)
    slots = sizes.batch * token_tiles * rank_tiles
    split = config["SPLIT_K"]
    return (slots * split * config["BLOCK_M"] * config["BLOCK_N"], slots) if split > 1 else (0, 0)


def call(point: Point, inputs: Mapping[str, Any], workspace: Workspace, config: Config) -> Call:
    """The launch of a configuration. Tensors may be given as dtypes."""
    sizes = Sizes.of(point)
    token_tiles, rank_tiles = _tiles(sizes, config)
    return Call(
        kernel=_sgmv_shrink,
        grid=(token_tiles * rank_tiles, config["SPLIT_K"], sizes.batch),
        arguments=(
            inputs["x"],
            inputs["weights"],
            inputs["y"],
            inputs["indices"],
            inputs["seq_starts"],
            inputs["seq_lens"],
            workspace.partials,
            workspace.counters,
            SCALE,
            sizes.hidden,
            sizes.rank,
            rank_tiles,
            config["SPLIT_K"],
            config["BLOCK_M"],
            config["BLOCK_N"],
            config["BLOCK_K"],
            sizes.hidden % config["BLOCK_K"] == 0,
            # the last program loads at most 64 partial sums per thread at a time
            max(1, min(16, 2048 * config["num_warps"] // (config["BLOCK_M"] * config["BLOCK_N"]))),
        ),
        options={"num_warps": config["num_warps"], "num_stages": config["num_stages"]},
    )


def _tile_bytes(config: Config) -> int:
    """Shared memory of the tiles in flight."""
    return config["num_stages"] * 2 * config["BLOCK_K"] * (config["BLOCK_M"] + config["BLOCK_N"])


def space(point: Point) -> list[Config]:
    """Tiles of 16 to 64 tokens that fit any card's shared memory, splits up to 64; BLOCK_N covers the rank up to 64.

    Left out are splits and tiles that would leave programs idle.
    """
    return _space(point, (16, 32, 64), (2, 3, 4), SHARED_BYTES)


def contenders(point: Point) -> list[Config]:
    """Tiles that fit Hopper alone, of 128 tokens or with four and six stages of up to 256 columns, in one wave or two.

    At 8192 tokens the fastest peer had such tiles at 9 of 12 points, and took 1 to 3 % less time than ours
    (NOTES-lora-prefill.md). For the tuner: no default before they were timed.
    """
    sizes, card, known = Sizes.of(point), hardware.TYPICAL[HOPPER], space(point)
    wide = _space(point, (64, 128), (4, 6), card.shared_bytes_per_program)
    found = []
    for config in wide:
        token_tiles, rank_tiles = _tiles(sizes, config)
        waves = sizes.batch * token_tiles * rank_tiles * config["SPLIT_K"] / card.sm_count
        if config not in known and config["BLOCK_K"] >= 128 and LEAST_WAVE <= waves <= MOST_WAVES:
            found.append(config)
    return found


def _space(point: Point, tiles: Sequence[int], stages: Sequence[int], room_bytes: int) -> list[Config]:
    sizes = Sizes.of(point)
    block_n = min(64, max(16, next_power_of_two(sizes.rank)))
    found: list[Config] = []
    for block_m in tiles:
        if block_m > max(16, next_power_of_two(sizes.seq_len)):
            continue
        for block_k in (64, 128, 256):
            for split in (1, 2, 4, 8, 16, 32, 64):
                if split > ceil_div(sizes.hidden, block_k):
                    continue
                for num_stages in stages:
                    config = {
                        "BLOCK_M": block_m,
                        "BLOCK_N": block_n,
                        "BLOCK_K": block_k,
                        "SPLIT_K": split,
                        "num_warps": 4,
                        "num_stages": num_stages,
                    }
                    if _tile_bytes(config) <= room_bytes:
                        found.append(config)
    return found


def plan(point: Point, config: Config) -> Plan:
    """What a configuration does, for the time model."""
    sizes = Sizes.of(point)
    token_tiles, rank_tiles = _tiles(sizes, config)
    split = config["SPLIT_K"]
    tiles = sizes.batch * token_tiles * rank_tiles
    blocks = ceil_div(ceil_div(sizes.hidden, config["BLOCK_K"]), split)
    x = sizes.tokens * sizes.hidden
    distinct = min(sizes.loras, sizes.batch) * sizes.rank * sizes.hidden
    partials = tiles * split * config["BLOCK_M"] * config["BLOCK_N"] if split > 1 else 0
    return Plan(
        programs=tiles * split,
        threads=32 * config["num_warps"],
        # loads run num_stages - 1 blocks ahead
        rounds=1 + (blocks - 1) / (config["num_stages"] - 1),
        device_bytes=2.0 * (x + distinct) + 8.0 * sizes.tokens * sizes.rank,
        cache_bytes=2.0 * tiles * sizes.hidden * (config["BLOCK_M"] + config["BLOCK_N"]) + 8.0 * partials,
        operations=0.0,
        reduced_bytes=4.0 * split * config["BLOCK_M"] * config["BLOCK_N"] if split > 1 else 0.0,
        shared_bytes=_tile_bytes(config),
    )


KERNEL = OwnKernel(
    *(OP, space, plan, workspace_sizes, call),
    expands=False,
    cuda=lora_prefill_own.Prefill(expands=False, portable=space, portable_plan=plan),
    contenders=contenders,
)
TUNABLE = KERNEL.tunable
default = KERNEL.default
tuned = KERNEL.tuned
