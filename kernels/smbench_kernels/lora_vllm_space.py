"""Which launch parameters of vLLM's LoRA kernels the tuner searches, and what they do. Owns no call.

The space is that of vLLM's own tuning guide (`lora/ops/triton_ops/README_TUNING.md`: block_m from 16 to 256, block_n
and block_k from 32 to 256, 4 and 8 warps, 2 to 5 stages, split_k from 4 to 64) with the smaller blocks and splits that
win at decode, less what cannot win, or never won a search on an H200: blocks beyond the rank or the tokens of a batch,
splits of which most have no column, eight warps on a tile that four fill, an odd number of stages in the shrink. Group
size and CTAs stay at vLLM's own 8 and 1. All of it is tried at every point.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch

from smbench_kernels.launch import Call, ceil_div
from smbench_kernels.lora import SCALE
from smbench_kernels.lora_shapes import MANY, SHARED_BYTES, Shape
from smbench_kernels.model import Plan
from smbench_kernels.op import Config, Point

GROUP_SIZE_M = 8
"""vLLM's own."""


def shrink(point: Point) -> list[Config]:
    """Blocks of tokens, ranks and columns, splits of the columns, warps and stages."""
    shape = Shape.of(point)
    many = shape.tokens >= MANY
    rows = (16,) if shape.tokens == 1 else (16, 32, 64) if many else (16, 32)
    found: list[Config] = []
    for block_m in rows:
        for block_n in sorted({16, min(64, shape.padded_rank)}):
            for block_k in (64, 128, 256):
                splits = (1, 4, 8, 16) if many else (4, 8, 16, 32, 64)
                # splits of which half have no column have won at one token
                most = max(splits[0], 2 * ceil_div(shape.hidden, block_k))
                for split_k in [split for split in splits if split <= most]:
                    for num_warps in (4, 8) if block_m * block_n >= 2048 else (4,):
                        for num_stages in (2, 4):
                            config = {
                                "block_m": block_m,
                                "block_n": block_n,
                                "block_k": block_k,
                                "split_k": split_k,
                                "num_warps": num_warps,
                                "num_stages": num_stages,
                                "num_ctas": 1,
                                "group_size_m": GROUP_SIZE_M,
                            }
                            if _tile_bytes(config) <= SHARED_BYTES:
                                found.append(config)
    return found


def expand(point: Point) -> list[Config]:
    """Blocks of tokens, outputs and ranks, warps, and stages where the rank takes several blocks."""
    shape = Shape.of(point)
    rows = (16,) if shape.tokens == 1 else (16, 32, 64, 128) if shape.tokens >= MANY else (16, 32, 64)
    found: list[Config] = []
    for block_m in rows:
        for block_n in (64, 128, 256):
            for block_k in (16, 32, 64):
                if block_k > shape.padded_rank:
                    continue
                for num_warps in (4, 8):
                    for num_stages in (1, 2, 3) if block_k < shape.rank else (2,):
                        found.append(
                            {
                                "block_m": block_m,
                                "block_n": block_n,
                                "block_k": block_k,
                                "num_warps": num_warps,
                                "num_stages": num_stages,
                                "num_ctas": 1,
                            }
                        )
    return found


def shrink_plan(point: Point, config: Config) -> Plan:
    """What a configuration does, for the time model. The zeroing of the buffer is the same for all of them."""
    shape = Shape.of(point)
    split, block_m, block_n = config["split_k"], config["block_m"], config["block_n"]
    tiles = ceil_div(shape.rank, block_n) * shape.slices
    programs = shape.groups(block_m) * split * tiles
    launched = split * ceil_div(shape.tokens, block_m) * tiles * shape.used
    blocks = ceil_div(ceil_div(shape.hidden, config["block_k"]), split)
    weights = shape.slices * shape.rank * shape.hidden
    return Plan(
        programs=programs,
        threads=32 * config["num_warps"],
        # counts and places of the tokens first; then loads run num_stages - 1 blocks ahead
        rounds=3 + (blocks - 1) / max(1, config["num_stages"] - 1),
        device_bytes=2.0 * (shape.used * weights + shape.tokens * shape.hidden),
        cache_bytes=2.0 * programs * blocks * config["block_k"] * (block_m + block_n)
        + 8.0 * programs * block_m * block_n,
        operations=0.0,
        shared_bytes=_tile_bytes(config),
        idle_programs=max(0, launched - programs),
    )


def expand_plan(point: Point, config: Config) -> Plan:
    """What a configuration does, for the time model."""
    shape = Shape.of(point)
    block_m, block_n = config["block_m"], config["block_n"]
    groups = shape.groups(block_m)
    programs = groups * sum(ceil_div(width, block_n) for width in shape.outputs)
    launched = ceil_div(shape.tokens, block_m) * ceil_div(max(shape.outputs), block_n) * shape.slices * shape.used
    weights = sum(shape.outputs) * shape.rank
    traffic = 2.0 * shape.tokens * sum(shape.outputs) * 2
    return Plan(
        programs=programs,
        threads=32 * config["num_warps"],
        rounds=3 + ceil_div(shape.rank, config["block_k"]),
        device_bytes=2.0 * shape.used * weights + traffic,
        cache_bytes=2.0 * groups * weights + traffic + 4.0 * programs * block_m * shape.rank,
        operations=0.0,
        shared_bytes=4 * config["block_k"] * (block_m + block_n),
        idle_programs=max(0, launched - programs),
    )


def shrink_calls(point: Point, config: Config) -> list[Call]:
    """The launch that vLLM makes of a configuration, with dtypes in place of tensors."""
    shape = Shape.of(point)
    index, split, block_k = torch.int32, config["split_k"], config["block_k"]
    arguments = (
        shape.dtype,
        # the weights themselves, or a table of pointers to them
        shape.dtype if shape.slices == 1 else torch.uint64,
        torch.float32,
        *(shape.tokens, shape.rank, shape.hidden),
        *(index, index, index, index),
        SCALE,
        *(shape.hidden, 1),
        *(shape.rank * shape.hidden, shape.hidden, 1),
        *(shape.tokens * shape.rank, shape.rank, 1),
        *(config["block_m"], config["block_n"], block_k),
        shape.hidden % (block_k * split) == 0,
        split,
        config["group_size_m"],
        shape.slices,
        # programmatic dependent launch, which vLLM leaves out
        *(False, False),
    )
    return [Call(_kernel("shrink"), (1, 1, 1), arguments, _options(config))]


def expand_calls(point: Point, config: Config) -> list[Call]:
    """The launch that vLLM makes of a configuration, with dtypes in place of tensors."""
    shape = Shape.of(point)
    index, several, widest = torch.int32, shape.slices > 1, max(shape.outputs)
    alike = len(set(shape.outputs)) == 1
    strides = (widest * shape.rank, shape.rank, 1) if alike else (torch.int64,) * 3
    arguments = (
        torch.float32,
        torch.uint64 if several else shape.dtype,
        shape.dtype,
        *(shape.tokens, widest, shape.rank),
        *(index, index, index, index),
        torch.uint64 if several else 0,
        *(shape.tokens * shape.rank, shape.rank, 1),
        *strides,
        *(sum(shape.outputs), 1),
        widest if alike else torch.int64,
        *(config["block_m"], config["block_n"], config["block_k"]),
        shape.rank % config["block_k"] == 0,
        # y is added to, and the float32 input is rounded to the weights' type
        *(True, True),
        shape.slices,
        alike,
        *(False, False),
    )
    return [Call(_kernel("expand"), (1, 1, 1), arguments, _options(config))]


def _tile_bytes(config: Config) -> int:
    """Shared memory of the tiles in flight."""
    return config["num_stages"] * 2 * config["block_k"] * (config["block_m"] + config["block_n"])


def _options(config: Config) -> dict[str, int]:
    return {name: config[name] for name in ("num_warps", "num_stages", "num_ctas")}


def _kernel(part: str) -> Any:
    module = importlib.import_module(f"vllm.lora.ops.triton_ops.lora_{part}_op")
    return getattr(module, f"_lora_{part}_kernel")
