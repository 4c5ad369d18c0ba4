"""Sources, macros and shared memory of the Hopper attention kernels, by name. Launches nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch

from smbench_kernels import (
    hstu_attention_sm90_dkdv,
    hstu_attention_sm90_dq,
    hstu_attention_sm90_dq_kept,
    hstu_attention_sm90_forward,
    hstu_attention_sm90_primitives,
    nvrtc,
)

FORWARD, DKDV, DQ, DQ_KEPT = "hstu_forward", "hstu_dkdv", "hstu_dq", "hstu_dq_kept"
SOURCES: Mapping[str, str] = {
    FORWARD: hstu_attention_sm90_forward.KERNEL,
    DKDV: hstu_attention_sm90_dkdv.KERNEL,
    DQ: hstu_attention_sm90_dq.KERNEL,
    DQ_KEPT: hstu_attention_sm90_dq_kept.KERNEL,
}
HEAD_DIM = 256
THREADS = 384
"""One group of four warps that copies, two that multiply."""
QUERIES, KEYS = 128, 64
"""Rows that a thread block keeps: of queries (forward, dq) and of keys (dk, dv)."""
FEATURES = "a"
"""wgmma and setmaxnreg are sm_90a's alone."""
ALIGNMENT = 1024
"""Of tiles that are swizzled, which dynamic shared memory may miss by as much."""
BARRIER_BYTES = 8


@dataclass(frozen=True, slots=True)
class Stream:
    """How one kernel streams tiles past the rows that a thread block keeps."""

    tile: int
    """Rows of a tile, a multiple of 16."""
    first: int
    """Stages of the ring of queries (dk, dv) or keys."""
    second: int
    """Stages of the ring of output gradients (dk, dv: as many as of queries) or values; 0: there is none."""


@lru_cache(maxsize=64)
def source(name: str, tile: int) -> str:
    """The whole CUDA C++ of a kernel for streamed tiles of `tile` rows."""
    return hstu_attention_sm90_primitives.source(tile) + SOURCES[name]


def macros(name: str, stream: Stream, dtype: torch.dtype, keeps: bool = False) -> dict[str, int]:
    """What a kernel is compiled with; `keeps`: that of keys and values keeps the gradients of the scores."""
    found = {"TILE": stream.tile, "BFLOAT16": int(dtype == torch.bfloat16)}
    if name == DKDV:
        return {**found, "STAGES": stream.first, "KEEP": int(keeps)}
    if name == DQ_KEPT:
        return {**found, "STAGES": stream.first}
    return {**found, "KEY_STAGES": stream.first, "VALUE_STAGES": stream.second}


def shared_bytes(name: str, stream: Stream) -> int:
    """Dynamic shared memory: rows that stay, rings, what groups exchange, barriers, and what aligning may cost."""
    resident = {FORWARD: QUERIES, DKDV: 2 * KEYS, DQ: 2 * QUERIES, DQ_KEPT: 0}[name]
    # silu's slopes, two stages of two bytes each; kept gradients with each tile of keys
    exchanged = {DKDV: 2 * KEYS * stream.tile * 2, DQ_KEPT: stream.first * QUERIES * stream.tile * 2}.get(name, 0)
    stages = stream.first + stream.second
    barriers = (1 + 2 * stages) * BARRIER_BYTES
    return (resident + stages * stream.tile) * HEAD_DIM * 2 + exchanged + barriers + ALIGNMENT


@lru_cache(maxsize=64)
def compiled(name: str, stream: Stream, dtype: torch.dtype, keeps: bool, device: torch.device) -> nvrtc.Kernel:
    """A loaded kernel. Kept beside what `nvrtc` keeps: a launch should not look through the device's properties."""
    return nvrtc.kernel(source(name, stream.tile), name, macros(name, stream, dtype, keeps), device, FEATURES)
