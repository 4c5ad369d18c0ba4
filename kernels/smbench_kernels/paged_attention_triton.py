"""Our paged decode kernel in Triton as a provider: what runs where there is no NVRTC, and under the interpreter.

Owns its one configuration; the kernel is in `paged_attention_triton_kernel`. The kernel in CUDA C++ is faster, since
Triton's pipeline joins all warps at a barrier in each round and computes the addresses of a round again for each of
its uses.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from smbench_kernels import hardware
from smbench_kernels import paged_attention_definition as definition
from smbench_kernels.compile import compile_for
from smbench_kernels.launch import Call, Launcher, Workspace, ceil_div, next_power_of_two
from smbench_kernels.op import Config, Inputs, Point, Prepared
from smbench_kernels.paged_attention_definition import Sizes
from smbench_kernels.paged_attention_triton_kernel import paged_decode

ADDRESSES = {"table": 0, "contiguous": 1, "same-block": 2}
"""The kernel's ADDRESS of each value of the axis."""
ROWS = 8
"""Most query heads of one KV head that an item takes: the columns of a product."""
WARPS, STAGES, PER_SM, PARTS = 4, 3, 2, 8
INTERPRETED_PROGRAMS = 7
"""The interpreter runs one program after the other: enough for items to be shared."""


def default(point: Point, inputs: Inputs) -> Prepared:
    """Provider `smbench-triton`."""
    config = default_config(point)
    device = inputs["y"].device
    programs = PER_SM * hardware.of(device).sm_count if device.type == "cuda" else INTERPRETED_PROGRAMS
    workspace = Workspace.allocate(*workspace_sizes(point, config, programs), device)
    launcher = Launcher(call(point, inputs, workspace, config, programs))
    return Prepared(run=launcher, config=config, config_source="default", kernels=launcher.kernels)


def default_config(point: Point) -> Config:
    """Warps side by side on the KV heads where each has one query head, on the tokens of one KV head where it has more.

    The first reads longer runs of memory, the second leaves more items to share out.
    """
    sizes = Sizes.of(point)
    heads = math.gcd(sizes.kv_heads, WARPS) if sizes.group == 1 else 1
    tokens = 32 if padded_dim(sizes) <= 128 and sizes.group <= ROWS else 16
    # a warp that holds the sums of a large head has no registers left for rounds ahead
    stages = STAGES if padded_dim(sizes) <= 128 else STAGES - 1
    return {"HEADS": heads, "SLICES": WARPS // heads, "TOKENS": tokens, "STAGES": stages, "PARTS": PARTS}


def padded_dim(sizes: Sizes) -> int:
    """Columns of a tile: the head size, as a power of two of at least one product's depth."""
    return max(16, next_power_of_two(sizes.head_dim))


def workspace_sizes(point: Point, config: Config, programs: int) -> tuple[int, int]:
    """Partial results, two slots for each program, and a counter for each item."""
    sizes = Sizes.of(point)
    slot = config["HEADS"] * next_power_of_two(min(ROWS, sizes.group)) * (padded_dim(sizes) + 2)
    items = sizes.batch * (sizes.kv_heads // config["HEADS"]) * ceil_div(sizes.group, ROWS)
    return 2 * programs * slot, items


def call(
    point: Point, inputs: Mapping[str, Any], workspace: Workspace, config: Config, programs: int, snap: bool = True
) -> Call:
    """The launch of a configuration on so many programs. Tensors may be given as dtypes."""
    sizes = Sizes.of(point)
    blocks = definition.pool_blocks(point)
    wraps = point["address"] == "contiguous" and sizes.batch * sizes.blocks_per_sequence > blocks
    arguments = (
        *(inputs[name] for name in ("q", "k_cache", "v_cache", "block_tables", "seq_lens", "y")),
        *(workspace.partials, workspace.counters, sizes.scale * math.log2(math.e)),
        *(sizes.batch, sizes.blocks_per_sequence, programs),
        *(sizes.kv_heads, sizes.group, sizes.head_dim, padded_dim(sizes), sizes.block_size),
        *(ADDRESSES[str(point["address"])], blocks if wraps else 0, batch_class(sizes.batch)),
        *(config["HEADS"], config["SLICES"], config["TOKENS"], config["STAGES"], config["PARTS"], snap),
    )
    return Call(paged_decode, (programs, 1, 1), arguments, {"num_warps": config["HEADS"] * config["SLICES"]})


def batch_class(batch: int) -> int:
    """Sequences that the kernel is compiled for: one, or a power of four, so that few binaries serve all batches."""
    return 1 << 2 * ceil_div((batch - 1).bit_length(), 2)


def compiled(point: Point, config: Config, capability: int) -> Any:
    """Triton's CompiledKernel of a configuration for a capability."""
    workspace = Workspace(torch.float32, torch.int32)
    return compile_for(call(point, definition.input_dtypes(point), workspace, config, PER_SM), capability)
