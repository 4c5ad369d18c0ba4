"""Which launch parameters of sglang's chunked sgmv kernels the tuner searches, and what they do. Owns no call.

The space is that of sglang's own tuning script (`benchmark/kernels/lora_csgmv/tune_lora_csgmv.py`: BLOCK_N, BLOCK_K,
warps and stages for chunks of 16 to 128 tokens) with wider outputs and with splits of the shrink's columns, which that
script does not have, less what never won a search on an H200: eight warps and small blocks of columns in the shrink.
Caps on registers in the expand are left out. All of it is tried at every point.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import torch

from smbench_kernels.launch import Call, ceil_div
from smbench_kernels.lora_shapes import MANY, SHARED_BYTES, Shape
from smbench_kernels.model import Plan
from smbench_kernels.op import Config, Point

FOLDERS = ("sglang.kernels.ops.lora.dense", "sglang.kernels.ops.gemm")
"""Where the kernels are: in 0.5.23, and in 0.5.16."""
BLOCKS_AND_STAGES = ((128, 4), (256, 2), (256, 4))
"""BLOCK_K and num_stages of the shrink."""


def shrink(point: Point) -> list[Config]:
    """Chunks, blocks of ranks and columns, stages, splits of the columns."""
    shape = Shape.of(point)
    width = shape.padded_rank if shape.slices == 1 else 64
    found: list[Config] = []
    for chunk in _chunks(shape):
        for block_n in sorted({16, min(64, width)}):
            for block_k, num_stages in BLOCKS_AND_STAGES:
                for split in (1, 8, 16) if shape.tokens < MANY else (1, 4, 8):
                    if split > ceil_div(shape.hidden, block_k):
                        continue
                    config = {
                        "BLOCK_M": chunk,
                        "BLOCK_N": block_n,
                        "BLOCK_K": block_k,
                        "SPLIT_K": split,
                        "num_warps": 4,
                        "num_stages": num_stages,
                    }
                    if _tile_bytes(config) <= SHARED_BYTES:
                        found.append(config)
    return found


def expand(point: Point) -> list[Config]:
    """Chunks, blocks of outputs and ranks, warps."""
    shape = Shape.of(point)
    return [
        {"BLOCK_M": chunk, "BLOCK_N": block_n, "BLOCK_K": block_k, "num_warps": num_warps, "num_stages": 2}
        for chunk in _chunks(shape)
        for block_n in (64, 128)
        for block_k in sorted({16, min(64, shape.padded_rank)})
        for num_warps in (4, 8)
    ]


def shrink_plan(point: Point, config: Config) -> Plan:
    """What a configuration does, for the time model."""
    shape = Shape.of(point)
    split, chunk, block_n = config["SPLIT_K"], config["BLOCK_M"], config["BLOCK_N"]
    width = shape.slices * shape.rank
    programs = shape.groups(chunk) * split * ceil_div(width, block_n)
    blocks = ceil_div(ceil_div(shape.hidden, config["BLOCK_K"]), split)
    partials = shape.tokens * width * split if split > 1 else 0
    return Plan(
        programs=programs,
        threads=32 * config["num_warps"],
        # bounds, adapter, rank and places of the tokens first; the second kernel of a split is a round of its own
        rounds=3 + (blocks - 1) / (config["num_stages"] - 1) + (2 if split > 1 else 0),
        device_bytes=2.0 * (shape.used * width * shape.hidden + shape.tokens * shape.hidden),
        cache_bytes=2.0 * programs * blocks * config["BLOCK_K"] * (chunk + block_n) + 8.0 * partials,
        operations=0.0,
        shared_bytes=_tile_bytes(config),
    )


def expand_plan(point: Point, config: Config) -> Plan:
    """What a configuration does, for the time model."""
    shape = Shape.of(point)
    groups = shape.groups(config["BLOCK_M"])
    weights = sum(shape.outputs) * shape.rank
    traffic = 2.0 * shape.tokens * sum(shape.outputs) * 2
    return Plan(
        programs=groups * sum(ceil_div(width, config["BLOCK_N"]) for width in shape.outputs),
        threads=32 * config["num_warps"],
        rounds=3 + ceil_div(shape.rank, config["BLOCK_K"]),
        device_bytes=2.0 * shape.used * weights + traffic,
        cache_bytes=2.0 * groups * weights + traffic,
        operations=0.0,
        shared_bytes=4 * config["BLOCK_K"] * (config["BLOCK_M"] + config["BLOCK_N"]),
    )


def shrink_calls(point: Point, config: Config) -> list[Call]:
    """The launches that sglang makes of a configuration; none for a split in a version that has none."""
    shape = Shape.of(point)
    split = config["SPLIT_K"]
    named = {
        **_metadata(),
        "x": shape.dtype,
        "weights": shape.dtype,
        "output": torch.float32 if split > 1 else shape.dtype,
        "partials": torch.float32,
        "N": shape.slices * shape.rank,
        "K": shape.hidden,
        "NUM_SLICES": shape.slices,
        "TOTAL_ROWS": shape.tokens,
        **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K", "SPLIT_K")},
    }
    here = module("shrink")
    if split == 1:
        return [_call(here._chunked_lora_shrink_kernel, named, config)]
    if not hasattr(here, "_chunked_lora_shrink_split_k_kernel"):
        return []
    return [
        _call(here._chunked_lora_shrink_split_k_kernel, named, config),
        _call(here._reduce_shrink_split_k, {**named, "output": shape.dtype}, None),
    ]


def expand_calls(point: Point, config: Config) -> list[Call]:
    """The launch that sglang makes of a configuration."""
    shape = Shape.of(point)
    bounds = tuple(sum(shape.outputs[:number]) for number in range(shape.slices + 1))
    named = {
        **_metadata(),
        "x": shape.dtype,
        "weights": shape.dtype,
        "output": shape.dtype,
        "output_stride_0": sum(shape.outputs),
        "output_stride_1": 1,
        "scalings": torch.float32,
        "slice_offsets": torch.int32,
        "NUM_SLICES": shape.slices,
        "OUTPUT_DIM": sum(shape.outputs),
        "MAX_RANK": shape.rank,
        "SLICE_OFFSETS": bounds if shape.slices > 1 else (),
        **{name: config[name] for name in ("BLOCK_M", "BLOCK_N", "BLOCK_K")},
    }
    return [_call(module("expand")._chunked_lora_expand_kernel, named, config)]


def module(part: str) -> Any:
    """The library's module of `shrink` or `expand`. ImportError where no version that is known has it there."""
    # sglang's kernel cache keys on neither rank nor dtype; Triton's own cache launches the same code
    os.environ.setdefault("SGLANG_USE_CUSTOM_TRITON_KERNEL_CACHE", "0")
    errors = []
    for folder in FOLDERS:
        try:
            return importlib.import_module(f"{folder}.chunked_sgmv_{part}")
        except ImportError as error:
            errors.append(str(error))
    raise ImportError("; ".join(errors))


def _chunks(shape: Shape) -> tuple[int, ...]:
    """Chunk sizes that a server could be started with and that fit the tokens."""
    if shape.tokens >= MANY:
        return (16, 64, 128)
    return (16, 32) if shape.tokens >= 64 else (16,)


def _metadata() -> dict[str, Any]:
    names = ("seg_indptr", "weight_indices", "lora_ranks", "permutation")
    return {**dict.fromkeys(names, torch.int32), "num_segs": 2}


def _call(kernel: Any, named: dict[str, Any], config: Config | None) -> Call:
    """A launch with arguments by name; without a configuration with Triton's own warps and stages."""
    options = {name: config[name] for name in ("num_warps", "num_stages")} if config else {}
    return Call(kernel, (1, 1, 1), tuple(named[parameter.name] for parameter in kernel.params), options)


def _tile_bytes(config: Config) -> int:
    """Shared memory of the tiles in flight."""
    return config["num_stages"] * 2 * config["BLOCK_K"] * (config["BLOCK_M"] + config["BLOCK_N"])
