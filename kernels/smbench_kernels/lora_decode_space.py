"""Search spaces and time models of the decode kernels. Owns no launch.

What a configuration means is said in `lora_decode`. A space holds what a card can have in flight at once without
spilling; the model orders it, and chooses where nothing is tuned. Its figures were fitted to 2,300 configurations timed
on an H200 (kernels/NOTES.md); elsewhere they are scaled by bandwidth and multiprocessors and nothing is measured.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping

from smbench_kernels import hardware, lora_decode
from smbench_kernels.launch import ceil_div
from smbench_kernels.lora_decode import FUSED_RANK, MOST_CLUSTER, Shape, fused_launch, shrink_launch, typical_segments
from smbench_kernels.lora_plan import capacity
from smbench_kernels.op import Config

ROOM = hardware.TYPICAL[90].shared_bytes_per_program
MOST_REGISTERS = 176
"""Of a thread for operands in flight and sums; the rest of 255 are addresses and what the compiler needs."""
MOST_BLOCKS = 2048
"""More thread blocks than a card holds at once only wait."""
MOST_CHUNK = 64
ROUNDS = (
    *({"STAGES": 0, "STEPS": steps} for steps in (1, 2, 4)),
    *({"STAGES": stages, "STEPS": 1} for stages in (3, 5)),
)
"""What a warp of shrink has under way: 32 columns at a time in registers, or buffers of a ring."""

PARTS = (1, 2, 4, 6, 8, 10, 14, MOST_CLUSTER)
"""Blocks that share a segment's columns. Six were 12 % faster than 4 or 8 where a LoRA has many tokens; 3, 5, 7 and 12
were never the fastest (12 points on an H200)."""

SMALL_GROUP = 12
"""Multiprocessors of an H200's smallest group within which a cluster may lie; 8 to 12 explain what was timed."""

START_S = {"shrink": 2.0e-6, "expand": 1.85e-6, "fused": 2.5e-6}
"""Launch, plan and the first operands."""
ROUND_S = {"shrink": 0.4e-6, "expand": 0.5e-6, "fused": 0.1e-6}
"""Each further round of loads of a warp."""
WAVE_S = 2.1e-6
"""Each further wave of blocks, where not all are resident at once."""
MEMORY_SHARE = {"shrink": 0.64, "expand": 0.67, "fused": 0.79}
"""Of the time that the bytes need at the card's bandwidth: the rest passes while multiprocessors load."""
BYTES_PER_S_PER_SM = {"shrink": 100e9, "expand": 55e9, "fused": 115e9}
"""What a multiprocessor pulls beside that, counted again whenever it is loaded again."""
SEND_S_PER_BYTE = 0.32e-9
"""Sums that a block of a cluster sends the others."""
PART_S = 0.036e-6
"""Each block whose sums are added."""
MEMORY_EXCHANGE_S = 1.0e-6
"""What sums through memory cost more than through a cluster."""
WARP_S = 0.42e-9
"""Starting one more warp of expand."""


def chunks(shape: Shape) -> list[int]:
    """Tokens of a segment worth trying: room for what a LoRA gets of tokens that choose at random, half, the mean."""
    each = shape.tokens / min(shape.tokens, shape.loras)
    scatter = 2 * math.sqrt(each) if 1 < shape.loras < shape.tokens else 0.0
    room = min(MOST_CHUNK, max(8, 8 * ceil_div(math.ceil(each + scatter), 8)))
    if room == 8 and shape.tokens > 8:
        return [8, 16]
    return sorted({room, min(room, 8 * ceil_div(math.ceil(each), 8)), room // 16 * 8} - {0})


def shrink_registers(config: Config, tiles: int) -> int:
    """Registers of a thread for the operands of one round and for the sums."""
    chunk = config["CHUNK"]
    return 4 * config["STEPS"] * (2 * tiles + chunk // 8) + tiles * chunk // 2


def expand_registers(shape: Shape, chunk: int, blocks: int) -> int:
    """Registers of a thread for one or two tiles of 32 outputs and for the sums."""
    piece, rows = min(64, 16 * ceil_div(shape.rank, 16)), ceil_div(chunk, 16)
    return (piece // 2 + 8 * rows) * min(2, blocks) + 16 * rows + piece // 4


def _tiles(shape: Shape) -> list[int]:
    """Tiles of 16 ranks of a block: none more than there are."""
    most = ceil_div(shape.rank, 16)
    return [tiles for tiles in (1, 2, 4) if tiles < 2 * most]


def _useful(shape: Shape, config: Config) -> bool:
    """Whether every warp has a round, and none has buffers that stay empty."""
    steps = ceil_div(shape.hidden, 32)
    share = steps / (config["PARTS"] * config["WARPS"])
    stages = lora_decode.stages_of(shape, config)
    if config["STAGES"] and not stages:
        return False
    least = stages - 2 if stages else (config["STEPS"] - 1) / 2
    return share > least or (config["PARTS"], config["WARPS"]) == (1, 4)


def shrink_space(shape: Shape) -> list[Config]:
    """Every split of a segment's columns that gives all its blocks something to do."""
    found: list[Config] = []
    for chunk, tiles, warps, parts in itertools.product(chunks(shape), _tiles(shape), (4, 8), PARTS):
        blocks = parts * capacity(shape.tokens, shape.loras, chunk) * shape.slices * ceil_div(shape.rank, 16 * tiles)
        if blocks > MOST_BLOCKS and parts > 1:
            continue
        for rounds in ROUNDS:
            config = {"CHUNK": chunk, "TILES": tiles, "WARPS": warps, **rounds, "PARTS": parts, "CLUSTER": 1}
            if shrink_registers(config, tiles) <= MOST_REGISTERS and _useful(shape, config) and _fits(shape, config):
                found.append(config)
    return found


def _fits(shape: Shape, config: Config) -> bool:
    return shrink_launch(shape, config).shared_bytes <= ROOM


def expand_space(shape: Shape) -> list[Config]:
    """Every number of warps and blocks that fits a thread's registers.

    One warp a block only for segments of 8: with more it won nowhere, and took 27 us where 7 are enough (NOTES.md).
    """
    return [
        {"CHUNK": chunk, "WARPS": warps, "BLOCKS": blocks}
        for chunk in chunks(shape)
        for warps in (1, 2, 4, 8)
        for blocks in (1, 2, 4)
        if (warps > 1 or chunk == 8)
        and expand_registers(shape, chunk, blocks) <= MOST_REGISTERS
        and 32 * warps * blocks < 2 * max(64, *shape.outputs)
    ]


def fused_space(shape: Shape) -> list[Config]:
    """Clusters that hold a segment's whole intermediate; none where the rank is too large."""
    found: list[Config] = []
    if shape.rank > FUSED_RANK:
        return found
    tiles = ceil_div(shape.rank, 16)
    for chunk, warps, rounds, parts in itertools.product(chunks(shape), (4, 8), ROUNDS, PARTS[2:]):
        config = {"CHUNK": chunk, "WARPS": warps, **rounds, "PARTS": parts}
        expand = expand_registers(shape, chunk, 2)
        if max(shrink_registers(config, tiles), expand) > MOST_REGISTERS or not _useful(shape, config):
            continue
        if fused_launch(shape, config).shared_bytes <= ROOM:
            found.append(config)
    return found


def _resident(config: Config, registers: int, shared_bytes: int, device: Mapping[str, float]) -> int:
    """Clusters, or blocks that are none, which a card holds at once; a cluster lies within one of its groups of SMs."""
    warps, parts = config["WARPS"], config.get("PARTS", 1)
    threads = int(device.get("threads_per_sm", 2048))
    shared = int(device.get("shared_bytes_per_sm", ROOM + 1024)) // (shared_bytes + 1024)
    # fitted to what ptxas gives 36 configurations; registers are given out by eights
    held = min(255, 8 * math.ceil((68 + 1.15 * registers) / 8))
    per_sm = max(1, min(65536 // (held * 32 * warps), shared, threads // (32 * warps)))
    sms = int(device["sm_count"])
    if parts == 1 or not config.get("CLUSTER", 1):
        return max(1, sms * per_sm // parts)
    # an H200's 132 are groups of 16 and 18 and one of fewer: 16 clusters of 14 do not fit at two blocks each
    return max(1, sms // 18 * (16 * per_sm // parts) + SMALL_GROUP * per_sm // parts)


def _segments(shape: Shape, chunk: int) -> int:
    return typical_segments(shape, chunk)


def _seconds(kind: str, rounds: float, waves: int, read: float, loaded: float, sms: float, bandwidth: float) -> float:
    """Start, rounds, waves, and bytes: `read` from memory once, `loaded` by all multiprocessors."""
    memory_s = MEMORY_SHARE[kind] * read / bandwidth
    return (
        START_S[kind]
        + rounds * ROUND_S[kind]
        + (waves - 1) * WAVE_S
        + memory_s
        + loaded / (sms * BYTES_PER_S_PER_SM[kind])
    )


def _rounds(shape: Shape, config: Config) -> int:
    """Rounds of a warp of shrink, of which a ring has all but one under way."""
    stages = lora_decode.stages_of(shape, config)
    steps = shape.hidden / (32 * config["PARTS"] * config["WARPS"])
    return math.ceil(steps / (stages - 1 if stages else config["STEPS"]))


def _loras(shape: Shape) -> int:
    return min(shape.loras, shape.tokens)


def shrink_seconds(shape: Shape, config: Config, device: Mapping[str, float]) -> float:
    """Modelled time of shrink; infinite where a block needs more shared memory than the device is said to have."""
    chunk, tiles, parts = config["CHUNK"], config["TILES"], config["PARTS"]
    launch = shrink_launch(shape, config)
    if launch.shared_bytes >= device.get("shared_bytes_per_sm", math.inf):
        return math.inf
    clusters = _segments(shape, chunk) * shape.slices * ceil_div(shape.rank, 16 * tiles)
    waves = ceil_div(clusters, _resident(config, shrink_registers(config, tiles), launch.shared_bytes, device))
    weights, x = 2.0 * shape.slices * shape.rank * shape.hidden, 2.0 * shape.tokens * shape.hidden
    loaded = _segments(shape, chunk) * weights + x * shape.slices * ceil_div(shape.rank, 16 * tiles)
    exchange = 0.0
    if parts > 1:
        exchange = 64.0 * chunk * tiles * SEND_S_PER_BYTE + parts * PART_S
        exchange += 0.0 if launch.cluster > 1 else MEMORY_EXCHANGE_S
    busy = min(device["sm_count"], clusters * parts)
    bandwidth = device["memory_bytes_per_s"]
    read = _loras(shape) * weights + x
    return _seconds("shrink", _rounds(shape, config) * waves, waves, read, loaded, busy, bandwidth) + exchange


def expand_seconds(shape: Shape, config: Config, device: Mapping[str, float]) -> float:
    """Modelled time of expand."""
    chunk, warps, blocks = config["CHUNK"], config["WARPS"], config["BLOCKS"]
    tiles = sum(ceil_div(n, 32 * warps * blocks) for n in shape.outputs)
    segments, width = _segments(shape, chunk), sum(shape.outputs)
    registers, shared_bytes = expand_registers(shape, chunk, blocks), lora_decode.h_bytes(shape, chunk)
    count = capacity(shape.tokens, shape.loras, chunk) * tiles
    waves = ceil_div(count, _resident(config, registers, shared_bytes, device))
    weights, y = 2.0 * width * shape.rank, 4.0 * shape.tokens * width
    intermediate = 4.0 * segments * tiles * chunk * shape.rank
    loaded = segments * weights + y + intermediate
    busy = min(device["sm_count"], segments * tiles)
    read, bandwidth = _loras(shape) * weights + y, device["memory_bytes_per_s"]
    # half of what is under way ahead of a warp is there when it comes to it
    seconds = _seconds("expand", blocks - 1, 1, read, loaded, busy, bandwidth)
    return seconds + count * warps * WARP_S + (waves - 1) * WAVE_S / 4


def fused_seconds(shape: Shape, config: Config, device: Mapping[str, float]) -> float:
    """Modelled time of both in one launch."""
    chunk, warps, parts = config["CHUNK"], config["WARPS"], config["PARTS"]
    tiles, width = ceil_div(shape.rank, 16), sum(shape.outputs)
    launch = fused_launch(shape, config)
    segments = capacity(shape.tokens, shape.loras, chunk)
    registers = max(shrink_registers(config, tiles), expand_registers(shape, chunk, 2))
    waves = ceil_div(segments, _resident(config, registers, launch.shared_bytes, device))
    weights = 2.0 * shape.rank * (shape.slices * shape.hidden + width)
    tokens = 2.0 * shape.tokens * (shape.hidden + 2 * width)
    busy = min(device["sm_count"], _segments(shape, chunk) * parts)
    read, loaded = _loras(shape) * weights + tokens, _segments(shape, chunk) * weights + tokens
    seconds = _seconds(
        "fused", shape.slices * _rounds(shape, config), waves, read, loaded, busy, device["memory_bytes_per_s"]
    )
    expanded = ceil_div(ceil_div(width, 32), warps * parts)
    sent = 64.0 * chunk * tiles * parts * shape.slices
    return seconds + waves * (expanded - 1) * 0.7e-6 + sent * SEND_S_PER_BYTE / 4
