"""The paged-attention kernel that document 001 profiled, as providers: versions 1 and 2. Owns calls and layouts.

The code is in `paged_attention_classic_source`. Its cache layouts are its own, so the caches are converted before the
timed call, into memory of the kind that the point asks for.
"""

from __future__ import annotations

import torch

from smbench_kernels import hardware, managed_memory, nvrtc
from smbench_kernels import paged_attention_definition as definition
from smbench_kernels.launch import ceil_div, next_power_of_two
from smbench_kernels.op import Inputs, Point, Prepared, UnsupportedPoint
from smbench_kernels.paged_attention_classic_source import SOURCE
from smbench_kernels.paged_attention_definition import Sizes

THREADS = 128
HALF_OF_THE_WARPS = 2
PARTITION = 512
"""Tokens that a thread block of version 2 takes."""
PACK = 8
"""Elements of 16 bytes."""
LARGEST_BLOCK = 256
ADDRESSES = {"table": 0, "contiguous": 1, "same-block": 2}


def version_1(point: Point, inputs: Inputs) -> Prepared:
    """One thread block for each head and sequence. UnsupportedPoint for sizes that the original did not take."""
    return _prepared(point, inputs, 0)


def version_2(point: Point, inputs: Inputs) -> Prepared:
    """One thread block for each 512 tokens of each head and sequence, then a second kernel that merges them."""
    return _prepared(point, inputs, PARTITION)


def macros(point: Point, partition: int) -> dict[str, int]:
    """What the source is compiled with. UnsupportedPoint for sizes that it does not take."""
    sizes = Sizes.of(point)
    if sizes.head_dim % 32 or sizes.head_dim > 256:
        raise UnsupportedPoint(f"the classic kernel takes head sizes of 32 to 256 in steps of 32, not {sizes.head_dim}")
    size = sizes.block_size
    if size > LARGEST_BLOCK or next_power_of_two(size) != size:
        raise UnsupportedPoint(
            f"the classic kernel takes blocks of a power of two up to {LARGEST_BLOCK} tokens, not {size}"
        )
    blocks = definition.pool_blocks(point)
    wraps = point["address"] == "contiguous" and sizes.batch * sizes.blocks_per_sequence > blocks
    return {
        "HEAD_SIZE": sizes.head_dim,
        "BLOCK_SIZE": size,
        "ADDRESS": ADDRESSES[str(point["address"])],
        "WRAP": blocks if wraps else 0,
        "BFLOAT16": int(sizes.dtype == torch.bfloat16),
        "PARTITION": partition,
    }


def _prepared(point: Point, inputs: Inputs, partition: int) -> Prepared:
    constants = macros(point, partition)
    sizes = Sizes.of(point)
    device, y = inputs["y"].device, inputs["y"]
    if device.type != "cuda":
        raise UnsupportedPoint("the classic kernel is CUDA C++ and needs an NVIDIA GPU")
    tokens = partition or ceil_div(sizes.seq_len, sizes.block_size) * sizes.block_size
    shared = 4 * max(tokens, HALF_OF_THE_WARPS * sizes.head_dim)
    limit = hardware.of(device).shared_bytes_per_program
    if shared > limit:
        raise UnsupportedPoint(
            f"the scores of {tokens} tokens take {shared} bytes of shared memory, the card has {limit}"
        )
    kernel = nvrtc.kernel(SOURCE, "paged_attention", constants, device)
    caches = _own_layout(point, inputs)
    partitions = ceil_div(sizes.seq_len, partition) if partition else 1
    states = (sizes.batch, sizes.heads, partitions)
    partial = torch.empty((*states, sizes.head_dim), dtype=torch.float32, device=device)
    highest, sums = (torch.empty(states, dtype=torch.float32, device=device) for _ in range(2))
    lengths = inputs["seq_lens"]
    attend = kernel.launcher(
        (sizes.heads, sizes.batch, partitions),
        THREADS,
        shared,
        [
            y, partial, highest, sums, inputs["q"], caches["k_cache"], caches["v_cache"], inputs["block_tables"],
            lengths, sizes.scale, sizes.kv_heads, sizes.blocks_per_sequence, partitions,
        ],
    )  # fmt: skip
    run = attend
    if partition:
        merging = nvrtc.kernel(SOURCE, "paged_attention_reduce", constants, device)
        merge = merging.launcher(
            (sizes.heads, sizes.batch, 1), THREADS, 0, [y, partial, highest, sums, lengths, partitions]
        )

        def run() -> None:
            attend()
            merge()

    def begin() -> None:
        for name, view in _views(point, inputs).items():
            caches[name].copy_(view)

    config = {"THREADS": THREADS, "PARTITION": partition}
    return Prepared(run, config, "default", kernels=lambda: {kernel.name: kernel.facts()}, begin=begin)


def _views(point: Point, inputs: Inputs) -> dict[str, torch.Tensor]:
    """The caches seen in the kernel's layouts: K [N, Hk, D / 8, S, 8] and V [N, Hk, D, S] of N blocks of S tokens."""
    sizes = Sizes.of(point)
    packed = inputs["k_cache"].view(-1, sizes.block_size, sizes.kv_heads, sizes.head_dim // PACK, PACK)
    return {"k_cache": packed.permute(0, 2, 3, 1, 4), "v_cache": inputs["v_cache"].permute(0, 2, 3, 1)}


def _own_layout(point: Point, inputs: Inputs) -> dict[str, torch.Tensor]:
    caches = {name: view.contiguous() for name, view in _views(point, inputs).items()}
    memory = str(point["memory"])
    return caches if memory == "device" else managed_memory.copies(memory, caches)
