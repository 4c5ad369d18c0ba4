"""Binds the decode kernels of `lora_decode_source` to tensors. Owns their macros, grids and workspaces, no choice.

Shapes: x [T, h] and weights in float16 or bfloat16; A of each slice [L, r, h], B [L, n, r]; the intermediate
[slices, T, r] float32; y [T, sum of n]. At most three slices. Rows of tokens without a LoRA are left alone.

A configuration of shrink: WARPS, STAGES (buffers of a warp's ring, each for 32 columns; 0: none, it holds STEPS times
32 columns in registers), TILES (times 16 ranks of a block), PARTS (blocks that share the columns of a segment), CLUSTER
(1: they exchange sums as a cluster; 0: through memory). Of expand: WARPS, BLOCKS (times 32 outputs of
a warp). Of both in one launch: WARPS, STAGES, STEPS, PARTS. All: CHUNK of the plan.

The grid of shrink is for the segments that there usually are, not for the most there can be: surplus clusters, though
they end at once, cost their places and a load's time. Where LoRAs are drawn less evenly, blocks take several in turn.

Where the card has it, every launch is a dependent one: it is prepared while the kernel in front of it ends, and reads
nothing before that one has ended.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from smbench_kernels import hardware, nvrtc
from smbench_kernels.launch import Workspace, ceil_div
from smbench_kernels.lora_decode_source import EXPAND_SOURCE, FUSED_SOURCE, SHRINK_SOURCE
from smbench_kernels.lora_plan import Plan, capacity
from smbench_kernels.op import Config, UnsupportedPoint

MOST_SLICES = 3
MOST_CLUSTER = 16
"""Blocks of a cluster; above 8 a card may refuse, as an H200 does not."""
WARP = 32
FUSED_RANK = 64
"""Largest rank of the one launch."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What the kernels are compiled and launched for."""

    tokens: int
    hidden: int
    rank: int
    outputs: tuple[int, ...]
    """Of each slice."""
    loras: int
    bfloat16: bool
    accumulate: bool = False
    """Whether shrink adds to what its output holds."""
    clusters: bool = True
    """Whether the card has clusters and dependent launches (compute capability 9.0)."""

    @property
    def slices(self) -> int:
        return len(self.outputs)


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel's launch, but for the addresses."""

    source: str
    name: str
    macros: Mapping[str, int]
    grid: tuple[int, int, int]
    threads: int
    shared_bytes: int
    cluster: int
    dependent: bool
    partials: int = 0
    """Floats of the workspace."""
    counters: int = 0

    def binary(self) -> str:
        """What distinguishes compiled kernels."""
        return f"{self.name} {sorted(self.macros.items())}"

    def bind(self, device: torch.device, arguments: Sequence[Any]) -> tuple[Callable[[], None], nvrtc.Kernel]:
        """A function that launches on the current stream, and its kernel. UnsupportedPoint where it does not fit."""
        if self.shared_bytes > hardware.of(device).shared_bytes_per_program:
            raise UnsupportedPoint(f"{self.name} needs {self.shared_bytes} bytes of shared memory")
        kernel = nvrtc.kernel(self.source, self.name, self.macros, device)
        run = kernel.launcher(
            self.grid, self.threads, self.shared_bytes, arguments, cluster=self.cluster, dependent=self.dependent
        )
        return run, kernel


def widest(*sizes: int) -> int:
    """Elements that one load takes where rows are these multiples of elements: 8, 4, 2 or 1."""
    return math.gcd(8, *sizes)


def shrink_launch(shape: Shape, config: Config) -> Launch:
    """Shrink of all slices."""
    chunk, warps, tiles, parts = config["CHUNK"], config["WARPS"], config["TILES"], config["PARTS"]
    segments = capacity(shape.tokens, shape.loras, chunk)
    started = typical_segments(shape, chunk)
    rank_blocks = ceil_div(shape.rank, 16 * tiles)
    by_cluster = bool(config["CLUSTER"]) and shape.clusters
    exchange = by_cluster and parts > 1
    quads = chunk * 4 * tiles
    slots = segments * shape.slices * rank_blocks if parts > 1 and not by_cluster else 0
    return Launch(
        source=SHRINK_SOURCE,
        name="lora_shrink",
        macros={
            "BFLOAT16": int(shape.bfloat16),
            "CHUNK": chunk,
            "TILES": tiles,
            "WARPS": warps,
            **_round_macros(shape, config),
            "CLUSTERS": int(exchange),
            "QUADS_WHOLE": int(shape.rank % 4 == 0),
        },
        grid=(parts * started, shape.slices * rank_blocks, 1),
        threads=32 * warps,
        shared_bytes=warps * _warp_bytes(shape, config, tiles) + (16 * _inbox(quads, parts) + 8) * int(exchange),
        cluster=parts if by_cluster else 1,
        dependent=shape.clusters,
        partials=slots * parts * quads * 4,
        counters=slots,
    )


def _inbox(quads: int, parts: int) -> int:
    """Quads that a block of a cluster may receive: those it owns, from every part (`Owners` of the source)."""
    run = 1
    while run < WARP and 2 * run * parts <= quads:
        run *= 2
    return ceil_div(quads, run * parts) * run * parts


def expand_launch(shape: Shape, config: Config, *, ahead: bool = False) -> Launch:
    """Expand of all slices; `ahead`: as a dependent of the shrink before it, loading weights and y while that runs."""
    chunk, warps, blocks = config["CHUNK"], config["WARPS"], config["BLOCKS"]
    tile = 32 * warps * blocks
    return Launch(
        source=EXPAND_SOURCE,
        name="lora_expand",
        macros={
            "BFLOAT16": int(shape.bfloat16),
            "CHUNK": chunk,
            "WARPS": warps,
            "BLOCKS": blocks,
            "AHEAD": int(ahead),
            **_expand_macros(shape),
        },
        grid=(sum(ceil_div(n, tile) for n in shape.outputs) * capacity(shape.tokens, shape.loras, chunk), 1, 1),
        threads=32 * warps,
        shared_bytes=h_bytes(shape, chunk),
        cluster=1,
        dependent=shape.clusters,
    )


def fused_launch(shape: Shape, config: Config) -> Launch:
    """Shrink and expand in one launch, which needs clusters and a rank of at most 64."""
    chunk, warps, parts = config["CHUNK"], config["WARPS"], config["PARTS"]
    tiles = ceil_div(shape.rank, 16)
    inbox = shape.slices * parts * chunk * 4 * tiles * 16
    return Launch(
        source=FUSED_SOURCE,
        name="lora_linear",
        macros={
            "BFLOAT16": int(shape.bfloat16),
            "CHUNK": chunk,
            "TILES": tiles,
            "WARPS": warps,
            **_round_macros(shape, config),
            "SLICES": shape.slices,
            **_expand_macros(shape),
        },
        grid=(parts * capacity(shape.tokens, shape.loras, chunk), 1, 1),
        threads=32 * warps,
        shared_bytes=max(warps * _warp_bytes(shape, config, tiles), shape.slices * h_bytes(shape, chunk)) + inbox + 8,
        cluster=parts,
        dependent=True,
    )


def typical_segments(shape: Shape, chunk: int) -> int:
    """Segments that tokens need when each draws its LoRA at random: the mean and a standard deviation."""
    used = min(shape.loras, shape.tokens)
    each = shape.tokens / used
    if used in (1, shape.tokens):
        return used * ceil_div(shape.tokens // used, chunk)
    scatter = math.sqrt(2 * each * (1 - 1 / used))
    # the chance that a LoRA needs one more segment than k
    chances = [0.5 * math.erfc((k * chunk + 0.5 - each) / scatter) for k in range(1, ceil_div(shape.tokens, chunk))]
    mean = 1 + sum(chances)
    variance = sum((2 * k + 1) * chance for k, chance in enumerate(chances, 1)) + 1 - mean * mean
    total = used * mean + math.sqrt(max(0.0, used * variance))
    # a quarter of a block is no reason to start one
    return max(1, min(capacity(shape.tokens, shape.loras, chunk), math.ceil(total - 0.25)))


def stages_of(shape: Shape, config: Config) -> int:
    """Buffers of a warp's ring; none where rows are no whole pieces of 16 bytes, which then go through registers."""
    return config["STAGES"] if widest(shape.hidden) == 8 else 0


def _round_macros(shape: Shape, config: Config) -> dict[str, int]:
    # a ring has no use for the other
    stages = stages_of(shape, config)
    return {"STAGES": stages, "STEPS": 1 if stages else config["STEPS"], "VECTOR": widest(shape.hidden)}


def _warp_bytes(shape: Shape, config: Config, tiles: int) -> int:
    """Shared memory of a warp of shrink: its ring, then its sums, a row of ranks and a gap for each token."""
    chunk = config["CHUNK"]
    ring = stages_of(shape, config) * (2 * tiles + chunk // 8) * 16 * 32
    return max(ring, chunk * (16 * tiles + 4) * 4)


def h_bytes(shape: Shape, chunk: int) -> int:
    """Shared memory of the intermediate of one slice as expand's operand."""
    whole = 16 * ceil_div(shape.rank, 16)
    if whole >= 64:
        # pieces of 64 ranks, and a gap that spreads rows over the banks
        whole = 64 * ceil_div(whole, 64) + 8
    row_bytes = 2 * whole
    return ceil_div(chunk * row_bytes, 16) * 16


def _expand_macros(shape: Shape) -> dict[str, int]:
    ranks = min(64, 16 * ceil_div(shape.rank, 16))
    return {"RANK": shape.rank, "B_VECTOR": widest(shape.rank, ranks // 4), "Y_VECTOR": widest(*shape.outputs)}


def shrink_arguments(
    shape: Shape,
    config: Config,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    plan: Plan,
    out: torch.Tensor,
    workspace: Workspace,
    scale: float,
) -> list[Any]:
    """Arguments of shrink in the order of the kernel."""
    rank_blocks = ceil_div(shape.rank, 16 * config["TILES"])
    return [
        *(out, workspace.partials, workspace.counters, x, *_three(a), plan.segments, plan.members, scale),
        *(shape.tokens, plan.capacity, shape.hidden, shape.rank, rank_blocks, config["PARTS"], int(shape.accumulate)),
    ]


def expand_arguments(
    shape: Shape, h: torch.Tensor, b: Sequence[torch.Tensor], y: torch.Tensor, plan: Plan
) -> list[Any]:
    """Arguments of expand in the order of the kernel."""
    return [y, h, *_three(b), plan.segments, plan.members, shape.tokens, *_three(shape.outputs, 0)]


def fused_arguments(
    shape: Shape,
    config: Config,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    y: torch.Tensor,
    plan: Plan,
    scale: float,
) -> list[Any]:
    """Arguments of the one launch in the order of the kernel."""
    return [
        *(y, x, *_three(a), *_three(b), plan.segments, plan.members, scale, shape.hidden),
        *(*_three(shape.outputs, 0), config["PARTS"]),
    ]


def _three(values: Sequence[Any], filler: Any = None) -> list[Any]:
    """As many as the kernels take: the first once more, or a filler, for those that are not there."""
    rest = MOST_SLICES - len(values)
    return [*values, *[values[0] if filler is None else filler] * rest]
