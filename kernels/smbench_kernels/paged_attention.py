"""paged_attention: one query token for each sequence over a paged KV cache. Owns our providers, their configurations.

The definition is in `paged_attention_definition`, the kernel, CUDA C++, in `paged_attention_source`; the same idea in
Triton in `paged_attention_triton`. A configuration says which heads and tokens the warps of a thread block take
(HEADS * SLICES warps, PIECES times 16 tokens at a time), how many rounds of copies a warp's ring holds (STAGES), how
many thread blocks each multiprocessor gets (PER_SM) and whether equal items are divided without a rest where that
idles few of them (SNAP 2, else 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache

import torch

from smbench_kernels import configs, hardware, model, nvrtc
from smbench_kernels import paged_attention_definition as definition
from smbench_kernels.hardware import Hardware
from smbench_kernels.launch import Workspace, ceil_div
from smbench_kernels.op import Config, Inputs, Op, Point, Prepared, Tunable, UnsupportedPoint
from smbench_kernels.paged_attention_definition import Sizes
from smbench_kernels.paged_attention_source import SOURCE

OP = Op(
    name="paged_attention",
    doc="one query token for each sequence attends to its KV cache, which lies in blocks anywhere in a pool",
    axes=definition.AXES,
    make_inputs=definition.make_inputs,
    reference=definition.reference,
    work=definition.work,
    tolerance=definition.tolerance,
    providers={
        "torch": "smbench_kernels.paged_attention_torch:contiguous",
        "smbench": "smbench_kernels.paged_attention:default",
        "smbench-tuned": "smbench_kernels.paged_attention:tuned",
        "smbench-triton": "smbench_kernels.paged_attention_triton:default",
        "classic-v1": "smbench_kernels.paged_attention_classic:version_1",
        "classic-v2": "smbench_kernels.paged_attention_classic:version_2",
        "vllm-unified": "smbench_kernels.paged_attention_vllm:unified",
        "vllm-decode": "smbench_kernels.paged_attention_vllm:split_decode",
        "sglang": "smbench_kernels.paged_attention_sglang:decode",
        "flashinfer": "smbench_kernels.paged_attention_flashinfer:decode",
        "fa3": "smbench_kernels.paged_attention_fa3:decode",
    },
    baseline="torch",
    tunable="smbench_kernels.paged_attention:TUNABLE",
    place=definition.place,
    redraw=definition.redraw,
)

ADDRESSES = {"table": 0, "contiguous": 1, "same-block": 2}
PLAIN = {"layout": "fair", "memory": "device", "address": "table", "lengths": "equal"}
"""The words of the points that are worth tuning."""
CHUNK = 16
"""Tokens of a product."""
ROWS = 16
"""Most query heads of a KV head that one item takes."""
MOST_WARPS = 16
FILL_S = 0.25e-6
"""One round of copies at the start, while nothing else runs: address arithmetic and issue."""


def default(point: Point, inputs: Inputs) -> Prepared:
    """Provider `smbench`: the configuration that the time model ranks first for this device."""
    return bind(point, inputs, default_config(point, hardware.of(inputs["y"].device)), "default")


def tuned(point: Point, inputs: Inputs) -> Prepared:
    """Provider `smbench-tuned`: the tuned configuration of this device for the point, or for the nearest one.

    What decides a configuration are sizes. So where no point with the same layout, memory, addresses and lengths is
    tuned, the nearest of the plain ones counts as near.
    """
    try:
        config, source = configs.tuned_config(OP.name, point, inputs["y"].device)
    except UnsupportedPoint:
        config, source = configs.tuned_config(OP.name, {**point, **PLAIN}, inputs["y"].device)
        if source == "tuned-exact":
            source = "tuned-nearest: " + ", ".join(
                f"{name} {word}" for name, word in PLAIN.items() if point[name] != word
            )
    return bind(point, inputs, config, source)


def bind(point: Point, inputs: Inputs, config: Config, source: str = "given") -> Prepared:
    """A configuration bound to inputs, with a workspace of its own. UnsupportedPoint for sizes it does not take."""
    sizes = Sizes.of(point)
    device = inputs["y"].device
    if device.type != "cuda":
        raise UnsupportedPoint("the CUDA C++ kernel needs an NVIDIA GPU")
    if sizes.head_dim % 16:
        raise UnsupportedPoint(f"the CUDA C++ kernel takes head sizes that are multiples of 16, not {sizes.head_dim}")
    facts = hardware.of(device)
    kernel = nvrtc.kernel(SOURCE, "paged_decode", macros(point, config), device)
    workspace = Workspace.allocate(*workspace_sizes(point, config, facts), device)
    size = sizes.block_size
    run = kernel.launcher(
        (config["PER_SM"] * facts.sm_count, 1, 1),
        32 * warps_of(config),
        shared_bytes(point, config),
        [
            *(inputs["y"], workspace.partials, workspace.counters, inputs["q"], inputs["k_cache"], inputs["v_cache"]),
            *(inputs["block_tables"], inputs["seq_lens"], sizes.scale * math.log2(math.e), sizes.kv_heads, sizes.batch),
            *(sizes.blocks_per_sequence, size, size.bit_length() - 1 if size & (size - 1) == 0 else -1),
            definition.pool_blocks(point),
        ],
    )
    return Prepared(run, config, source, kernels=lambda: {kernel.name: kernel.facts()})


def macros(point: Point, config: Config) -> dict[str, int]:
    """What the source is compiled with."""
    sizes = Sizes.of(point)
    heads = heads_of(sizes, config)
    return {
        "HEAD_DIM": sizes.head_dim,
        "GROUP": sizes.group,
        "HEADS": heads,
        "SLICES": warps_of(config) // heads,
        "PIECES": config["PIECES"],
        "STAGES": config["STAGES"],
        "ADDRESS": ADDRESSES[str(point["address"])],
        "BFLOAT16": int(sizes.dtype == torch.bfloat16),
        "SNAP": config["SNAP"] - 1,
    }


def warps_of(config: Config) -> int:
    """Warps of a thread block."""
    return config["HEADS"] * config["SLICES"]


def heads_of(sizes: Sizes, config: Config) -> int:
    """KV heads of a block: those of the configuration, or fewer where it was tuned for a multiple that this is not."""
    return math.gcd(sizes.kv_heads, config["HEADS"])


def item_count(sizes: Sizes, config: Config) -> int:
    """Items that blocks share: groups of KV heads, for each 16 query heads of one, for each sequence."""
    return sizes.batch * (sizes.kv_heads // heads_of(sizes, config)) * ceil_div(sizes.group, ROWS)


def result_floats(sizes: Sizes, config: Config) -> int:
    """Floats of a partial result of an item."""
    return heads_of(sizes, config) * min(ROWS, sizes.group) * (sizes.head_dim + 2)


def workspace_sizes(point: Point, config: Config, device: Hardware) -> tuple[int, int]:
    """Partial results, two slots for each block, and a counter for each item."""
    sizes = Sizes.of(point)
    return 2 * config["PER_SM"] * device.sm_count * result_floats(sizes, config), item_count(sizes, config)


def shared_bytes(point: Point, config: Config) -> int:
    """Shared memory of a block: each warp's ring and table entries, and the states of all slices."""
    sizes = Sizes.of(point)
    tokens = CHUNK * config["PIECES"]
    row_bytes = ceil_div(sizes.head_dim, 64) * 128
    ring = config["STAGES"] * (2 * tokens * row_bytes + tokens * 4)
    slices = warps_of(config) // heads_of(sizes, config)
    return warps_of(config) * ring + (4 * slices * result_floats(sizes, config) if slices > 1 else 0)


def space(point: Point) -> list[Config]:
    """Every way to use a multiprocessor's warps and shared memory that leaves room for copies to run ahead."""
    sizes = Sizes.of(point)
    room = hardware.TYPICAL[90].shared_bytes_per_program
    found: list[Config] = []
    for heads in (1, 2, 4, 8):
        if sizes.kv_heads % heads:
            continue
        for warps in (2, 4, 8, 16):
            if warps < heads:
                continue
            for pieces in (1, 2):
                for stages in (2, 3, 4, 6):
                    for per_sm in (1, 2, 3, 4):
                        config = {
                            **{"HEADS": heads, "SLICES": warps // heads, "PIECES": pieces, "STAGES": stages},
                            **{"PER_SM": per_sm, "SNAP": 2},
                        }
                        used = per_sm * (shared_bytes(point, config) + 1024)
                        if used <= room + 1024 and warps * per_sm <= MOST_WARPS:
                            found.append(config)
    return found


def default_config(point: Point, device: Hardware) -> Config:
    """The configuration of the space with the least modelled time among those that fit the device."""
    return _ranked(tuple(sorted(point.items())), device)


@lru_cache(maxsize=4096)
def _ranked(point: tuple[tuple[str, int | str], ...], device: Hardware) -> Config:
    axes, facts = dict(point), device.facts()
    fitting = [c for c in space(axes) if shared_bytes(axes, c) <= device.shared_bytes_per_program]
    return min(fitting, key=lambda config: predict(axes, config, facts))


def predict(point: Point, config: Config, device: Mapping[str, float]) -> float:
    """Modelled seconds of one call."""
    sizes = Sizes.of(point)
    blocks = config["PER_SM"] * int(device["sm_count"])
    tile = warps_of(config) // heads_of(sizes, config) * CHUNK * config["PIECES"]
    items = item_count(sizes, config)
    tiles = items * ceil_div(sizes.seq_len, tile)
    share = ceil_div(tiles, blocks)
    kv_bytes = 2.0 * sizes.batch * sizes.seq_len * sizes.kv_heads * sizes.head_dim * sizes.dtype.itemsize
    parts = blocks / items
    plan = model.Plan(
        programs=min(blocks, tiles),
        threads=32 * warps_of(config),
        rounds=1 + share / max(1, config["STAGES"] - 1),
        device_bytes=kv_bytes * share * blocks / tiles,
        cache_bytes=kv_bytes,
        operations=0.0,
        reduced_bytes=parts * 4 * result_floats(sizes, config),
        shared_bytes=shared_bytes(point, config),
    )
    # a warp issues the copies of its whole ring before its first product
    return model.seconds(plan, device) + config["STAGES"] * config["PIECES"] * FILL_S


def binary(point: Point, config: Config) -> str:
    """What distinguishes compiled kernels."""
    return f"paged_decode {sorted(macros(point, config).items())}"


def precompile(point: Point, config: Config, capability: int) -> str:
    """Compile for a capability into Triton's cache folder; the same string as `binary`."""
    nvrtc.compiled(SOURCE, macros(point, config), capability)
    return binary(point, config)


TUNABLE = Tunable(
    space=space, prepare=bind, predict=predict, binary=binary, precompile=precompile, default=default_config
)
