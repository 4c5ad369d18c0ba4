"""HSTU attention over pages for Hopper in CUDA C++: heads of 256 elements. Owns the host's side.

One launch appends a step's new history to its pages and attends: cached keys and values are read from pages, those of
the step's own rows from k and v. Device code: `hstu_paged_sm90_kernel`, how work is shared: `hstu_paged_sm90_schedule`.
Everything about the sequences is read on the device, so that a CUDA graph serves every step that fits its tensors.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from smbench_kernels import (
    hardware,
    hstu_attention_sm90_primitives,
    hstu_launches,
    hstu_paged_sm90_copies,
    hstu_paged_sm90_schedule,
    hstu_paged_sm90_sums,
    nvrtc,
)
from smbench_kernels.hstu_attention_sm90_kernels import ALIGNMENT, BARRIER_BYTES, FEATURES, HEAD_DIM, THREADS, Stream
from smbench_kernels.hstu_attention_sm90_maps import page_map, tensor_map
from smbench_kernels.hstu_paged import PagedBatch
from smbench_kernels.hstu_paged_sm90_kernel import KERNEL
from smbench_kernels.hstu_paged_sm90_schedule import MOST_USERS

STRIP = 128
"""Rows of queries that a thread block keeps."""
MANY, FEW = Stream(64, 3, 2), Stream(32, 5, 5)
MOST_FEW_ROWS = 384
"""Of a sequence, up to which tiles are small: 95.5 us instead of 102.9 where pages have most keys (H200, batch 8)."""
PAGE_SIZES = (16, 32, 64, 128)
"""Those that divide a tile, or that a tile divides."""
NAME = "hstu_paged"


@dataclass(frozen=True, slots=True)
class Workspace:
    """What thread blocks hand to each other within a launch. For one launch at a time: those of one stream in turn."""

    sums: torch.Tensor
    counters: torch.Tensor
    """Zero between launches."""

    @classmethod
    def on(cls, device: torch.device) -> Workspace:
        """One for any step on a device."""
        blocks = _blocks(device)
        sums = torch.empty(2 * blocks * STRIP * HEAD_DIM, dtype=torch.float32, device=device)
        return cls(sums, torch.zeros(blocks, dtype=torch.int32, device=device))


def on_card(device: torch.device) -> bool:
    """Whether this is for a device at all, whatever the tensors are."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)


def supports(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cache: torch.Tensor, batch: PagedBatch) -> str | None:
    """Why the kernel cannot take q, k, v [rows, heads, head_dim] of a batch over `cache`; None where it can."""
    if not on_card(q.device):
        return "needs a GPU of compute capability 9.0 (Hopper)"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[2] != HEAD_DIM:
        return f"takes heads of {HEAD_DIM} elements, not {q.shape[2]}"
    if batch.page_size not in PAGE_SIZES:
        return f"takes pages of {', '.join(map(str, PAGE_SIZES))} tokens, not {batch.page_size}"
    if batch.batch > MOST_USERS:
        return f"takes up to {MOST_USERS} sequences, not {batch.batch}"
    if not cache.is_contiguous() or cache.data_ptr() % 16:
        return "needs contiguous pages"
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if fault := unaligned(tensor):
            return f"{name} {fault}"
    try:
        nvrtc._nvrtc()
    except OSError as error:
        return f"needs NVRTC: {error}"
    return None


def unaligned(tensor: torch.Tensor) -> str | None:
    """Why the copy engine cannot read [rows, heads, head_dim]; None where it can."""
    if tensor.stride(2) != 1 or tensor.stride(0) % 8 or tensor.stride(1) % 8 or tensor.data_ptr() % 16:
        return f"needs rows of adjacent elements at multiples of 16 bytes, not strides {tensor.stride()}"
    return None


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cache: torch.Tensor,
    batch: PagedBatch,
    alpha: float,
    out: torch.Tensor,
    *,
    appends: bool,
    workspace: Workspace | None = None,
    dependent: bool = False,
    config: Stream | None = None,
) -> torch.Tensor:
    """`hstu_paged.append_reference`, if it `appends`, and `paged_attention_reference` in float16 or bfloat16.

    q, k, v, out [rows, heads, 256], rows and heads at multiples of 16 bytes; cache [pages, 2, page_size, heads, 256],
    contiguous; alpha is positive. Of the pages only tokens from before the step are read. Returns `out`, whose rows
    of no sequence are not written. `workspace` is for callers that have one: making it is a launch more. A `dependent`
    launch may begin before the kernel in front of it has ended, which must not be what writes the batch's lengths
    (programmatic dependent launch). ValueError where a tensor does not fit.
    """
    fault = supports(q, k, v, cache, batch) or unaligned(out)
    if fault or not alpha > 0:
        raise ValueError(fault or f"alpha must be positive, not {alpha}")
    if q.shape[0] == 0:
        return out
    room = Workspace.on(q.device) if workspace is None else workspace
    config = stream_for(batch.max_rows) if config is None else config
    tensors = (out, k, v, cache, *_sequences(batch), room.sums, room.counters)

    def make() -> hstu_launches.Launch:
        rows = min(config.tile, batch.page_size)
        maps = [tensor_map(q, STRIP), tensor_map(k, config.tile), tensor_map(v, config.tile), page_map(cache, rows)]
        strides = (ctypes.c_int64(stride) for x in (out, k, v) for stride in x.stride()[:2])
        # addresses alone, which keep no tensor alive
        arguments = [
            *(*maps, *(ctypes.c_uint64(tensor.data_ptr()) for tensor in tensors), *strides),
            *(batch.batch, q.shape[1], alpha / 2, 1.0 / batch.max_seqlen, int(appends)),
        ]
        kernel, grid = compiled(config, batch.page_size, q.dtype, q.device), (_blocks(q.device), 1, 1)
        launch: hstu_launches.Launch = kernel.launcher(
            grid, THREADS, shared_bytes(config), arguments, dependent=dependent
        )
        return launch

    scalars = (alpha, batch.max_seqlen, batch.page_size, appends, dependent)
    hstu_launches.run((NAME, config, q.dtype, *scalars, *map(_identity, (q, *tensors))), make)
    return out


def stream_for(max_rows: int) -> Stream:
    """How keys and values are streamed past sequences of up to so many rows."""
    return FEW if max_rows <= MOST_FEW_ROWS else MANY


def _sequences(batch: PagedBatch) -> tuple[torch.Tensor, ...]:
    return batch.offsets, batch.num_targets, batch.totals, batch.page_offsets, batch.page_ids


def _identity(tensor: torch.Tensor) -> tuple[Any, ...]:
    """All that a launch knows of a tensor of a known dtype."""
    return tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.device


@lru_cache(maxsize=8)
def source(tile: int) -> str:
    """The whole CUDA C++ for tiles of so many keys."""
    shared = hstu_attention_sm90_primitives.source(tile)
    parts = (hstu_paged_sm90_schedule, hstu_paged_sm90_copies, hstu_paged_sm90_sums)
    return shared + "".join(part.SOURCE for part in parts) + KERNEL


def macros(config: Stream, page_size: int, dtype: torch.dtype) -> dict[str, int]:
    """What the kernel is compiled with."""
    stages = {"KEY_STAGES": config.first, "VALUE_STAGES": config.second}
    return {"TILE": config.tile, "PAGE": page_size, **stages, "BFLOAT16": int(dtype == torch.bfloat16)}


def shared_bytes(config: Stream) -> int:
    """Dynamic shared memory: a strip of queries, rings, their barriers, and what aligning may cost."""
    stages = config.first + config.second
    return (STRIP + stages * config.tile) * HEAD_DIM * 2 + 2 * (1 + stages) * BARRIER_BYTES + ALIGNMENT


@lru_cache(maxsize=32)
def compiled(config: Stream, page_size: int, dtype: torch.dtype, device: torch.device) -> nvrtc.Kernel:
    """The loaded kernel."""
    return nvrtc.kernel(source(config.tile), NAME, macros(config, page_size, dtype), device, FEATURES)


@lru_cache(maxsize=64)
def _blocks(device: torch.device) -> int:
    """One thread block a multiprocessor: they wait for each other."""
    return hardware.of(device).sm_count
