"""HSTU attention for Hopper in CUDA C++: forward and backward of heads of 256 elements. Owns the host's side.

The kernels copy by tensor maps and multiply by warpgroups (sm_90a). The backward pass is one kernel for keys and values
and one for queries. The first keeps the gradients of the scores, in as many parts as a workspace allows, and the second
multiplies them by the keys: five products in all. Where one head of one sequence does not fit, the second makes them
once more: seven products. Either way nothing is added atomically and the bits are the same every time. The work of each
kernel and its budget: `hstu_attention_sm90_dkdv`, `_dq_kept`, `_dq`, `_forward` and kernels/NOTES-hstu-sm90.md.

Rows of other sequences are read at the edges of a sequence and weighted by 0: an infinity or NaN there would spread.
No sequence may be longer than `max_seqlen`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from smbench_kernels import hstu_attention_sm90_kernels as kernels
from smbench_kernels import nvrtc
from smbench_kernels.hstu import Jagged
from smbench_kernels.hstu_attention_sm90_kernels import HEAD_DIM, KEYS, QUERIES, Stream
from smbench_kernels.hstu_attention_sm90_maps import tensor_map

__all__ = ["DEFAULT", "Config", "Stream", "backward", "forward", "supports", "workspace_of"]


@dataclass(frozen=True, slots=True)
class Config:
    """Streams of the kernels, and how the backward pass makes dq."""

    forward: Stream
    dkdv: Stream
    dq: Stream
    """Of the kernel that makes the gradients of the scores once more."""
    dq_kept: Stream
    """Of the kernel that reads them, as the kernel of dk and dv kept them; its second ring is not there."""
    workspace_bytes: int
    """What may be kept of them at a time; 0, or less than one head of one sequence takes: they are made once more."""


DEFAULT = Config(
    forward=Stream(64, 3, 2),
    dkdv=Stream(48, 3, 3),
    dq=Stream(48, 2, 2),
    dq_kept=Stream(64, 4, 0),
    workspace_bytes=1 << 30,
)
MOST_PAIRS = 65535
"""Of sequence and head in one launch: the limit of a grid's second dimension."""


def supports(q: torch.Tensor, batch: Jagged) -> str | None:
    """Why these kernels cannot take queries [tokens, heads, head_dim] of a batch; None where they can."""
    del batch
    if q.device.type != "cuda" or torch.cuda.get_device_capability(q.device) != (9, 0):
        return "needs a GPU of compute capability 9.0 (Hopper)"
    if q.dtype not in (torch.bfloat16, torch.float16):
        return f"takes bfloat16 and float16, not {q.dtype}"
    if q.shape[2] != HEAD_DIM:
        return f"takes heads of {HEAD_DIM} elements, not {q.shape[2]}"
    try:
        nvrtc._nvrtc()
    except OSError as error:
        return f"needs NVRTC: {error}"
    return _unaligned(q)


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
    out: torch.Tensor | None = None,
    config: Config | None = None,
) -> torch.Tensor:
    """`silu(alpha q k^T) / max_seqlen`, masked, `@ v`, as `hstu.attention_reference` says; sums in float32.

    q, k, v, out: [tokens, heads, 256] bfloat16 or float16, strided views with 16-byte rows; alpha is positive. Waits
    for nothing and allocates only `out`. ValueError where a tensor or alpha does not fit.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device) if out is None else out
    stream = (config or DEFAULT).forward
    _check(batch, alpha, q=q, k=k, v=v, out=out)
    if q.shape[0] == 0:
        return out
    maps = [tensor_map(q, QUERIES), tensor_map(k, stream.tile), tensor_map(v, stream.tile)]
    tail = [*_layout(out), alpha / 2, 1.0 / batch.max_seqlen, int(batch.causal)]
    grid = (_blocks(batch, QUERIES), q.shape[1], batch.batch)
    _launch(kernels.FORWARD, stream, q, grid, [*maps, out, *_batch(batch), *tail])
    return out


def backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
    dq: torch.Tensor | None = None,
    dk: torch.Tensor | None = None,
    dv: torch.Tensor | None = None,
    config: Config | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients (dq, dk, dv) of `forward`, as `hstu.attention_gradients` says; sums in float32, deterministic.

    All tensors [tokens, heads, 256] of one dtype, strided views with 16-byte rows. ValueError as `forward`.
    """
    dq, dk, dv = (torch.empty(q.shape, dtype=q.dtype, device=q.device) if d is None else d for d in (dq, dk, dv))
    config = config or DEFAULT
    _check(batch, alpha, q=q, k=k, v=v, dout=dout, dq=dq, dk=dk, dv=dv)
    pairs = batch.batch * q.shape[1]
    if q.shape[0] == 0 or pairs == 0:
        return dq, dk, dv
    room = workspace_of(batch)
    at_once = min(room.pairs_in(config.workspace_bytes, pairs) or pairs, MOST_PAIRS)
    kept = room.pair_bytes <= config.workspace_bytes
    workspace = torch.empty(room.pair_bytes * at_once if kept else 0, dtype=torch.uint8, device=q.device)
    for first in range(0, pairs, at_once):
        part = Part(first, min(at_once, pairs - first), workspace, room.pair_bytes if kept else 0, room.pitch)
        _keys_and_values(dout, q, k, v, batch, alpha, dk, dv, part, config.dkdv)
        if kept:
            _kept_queries(k, batch, alpha, dq, part, config.dq_kept)
    if not kept:
        _queries(dout, q, k, v, batch, alpha, dq, config.dq)
    return dq, dk, dv


@dataclass(frozen=True, slots=True)
class Part:
    """Pairs of sequence and head that are worked on at a time, and where the gradients of their scores are kept."""

    first: int
    count: int
    workspace: torch.Tensor
    pair_bytes: int
    """0: they are not kept."""
    pitch: int


def _keys_and_values(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
    dk: torch.Tensor,
    dv: torch.Tensor,
    part: Part,
    stream: Stream,
) -> None:
    maps = [tensor_map(q, stream.tile), tensor_map(k, KEYS), tensor_map(v, KEYS), tensor_map(dout, stream.tile)]
    scale = 1.0 / batch.max_seqlen
    tail = [*_layout(dk), *_layout(dv), alpha / 2, alpha * scale, scale, int(batch.causal), *_part(q, part)]
    grid = (_blocks(batch, KEYS), part.count, 1)
    _launch(kernels.DKDV, stream, q, grid, [*maps, dk, dv, *_batch(batch), *tail], keeps=part.pair_bytes > 0)


def _kept_queries(k: torch.Tensor, batch: Jagged, alpha: float, dq: torch.Tensor, part: Part, stream: Stream) -> None:
    tail = [*_layout(dq), alpha / batch.max_seqlen, int(batch.causal), *_part(k, part)]
    grid = (_blocks(batch, QUERIES), part.count, 1)
    arguments = [tensor_map(k, stream.tile), dq, *_batch(batch), *tail]
    _launch(kernels.DQ_KEPT, stream, k, grid, arguments)


def _queries(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
    dq: torch.Tensor,
    stream: Stream,
) -> None:
    maps = [tensor_map(q, QUERIES), tensor_map(k, stream.tile), tensor_map(v, stream.tile), tensor_map(dout, QUERIES)]
    tail = [*_layout(dq), alpha / 2, alpha / batch.max_seqlen, int(batch.causal)]
    grid = (_blocks(batch, QUERIES), q.shape[1], batch.batch)
    _launch(kernels.DQ, stream, q, grid, [*maps, dq, *_batch(batch), *tail])


def _launch(
    name: str,
    stream: Stream,
    q: torch.Tensor,
    grid: tuple[int, int, int],
    arguments: Sequence[object],
    keeps: bool = False,
) -> None:
    kernel = kernels.compiled(name, stream, q.dtype, keeps, q.device)
    kernel.launcher(grid, kernels.THREADS, kernels.shared_bytes(name, stream), arguments)()


def _blocks(batch: Jagged, rows: int) -> int:
    """Thread blocks for the longest sequence that the batch may have."""
    return -(-batch.max_seqlen // rows)


@dataclass(frozen=True, slots=True)
class Workspace:
    """What the gradients of the scores of one head of one sequence take."""

    pair_bytes: int
    pitch: int
    """Key blocks of a query block; 0: as many as causal history has."""

    def pairs_in(self, size: int, pairs: int) -> int:
        """How many of `pairs` to work on at a time within `size` bytes, in parts as equal as can be."""
        fitting = min(size // self.pair_bytes, pairs)
        return -(-pairs // -(-pairs // fitting)) if fitting else 0


def workspace_of(batch: Jagged) -> Workspace:
    """By the longest sequence that the batch may have, in blocks of 64 queries by 64 keys, 2 bytes a gradient."""
    blocks = -(-batch.max_seqlen // KEYS)
    pitch = 0 if batch.causal and batch.num_contextuals is None else blocks
    return Workspace(max(1, blocks * pitch if pitch else blocks * (blocks + 1) // 2) * KEYS * KEYS * 2, pitch)


def _part(q: torch.Tensor, part: Part) -> list[object]:
    return [q.shape[1], part.first, part.workspace, ctypes.c_int64(part.pair_bytes), part.pitch]


def _batch(batch: Jagged) -> list[object]:
    counts = (batch.num_targets, batch.num_contextuals)
    return [batch.offsets, *(ctypes.c_uint64(0) if count is None else count for count in counts)]


def _layout(tensor: torch.Tensor) -> list[object]:
    return [ctypes.c_int64(tensor.stride(0)), ctypes.c_int64(tensor.stride(1))]


def _check(batch: Jagged, alpha: float, **tensors: torch.Tensor) -> None:
    q = tensors["q"]
    counts = {"offsets": batch.offsets, "num_targets": batch.num_targets, "num_contextuals": batch.num_contextuals}
    for name, count in counts.items():
        if count is not None and (count.dtype != torch.int32 or not count.is_contiguous()):
            msg = f"{name} must be contiguous int32, not {count.dtype} of strides {count.stride()}"
            raise ValueError(msg)
    if not alpha > 0:
        msg = f"alpha must be positive, not {alpha}"
        raise ValueError(msg)
    for name, tensor in tensors.items():
        if tensor.shape != q.shape or tensor.dtype != q.dtype or tensor.shape[2] != HEAD_DIM:
            msg = (
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}, q is {q.dtype} {tuple(q.shape)}, heads are {HEAD_DIM}"
            )
            raise ValueError(msg)
        if fault := _unaligned(tensor):
            msg = f"{name}: {fault}"
            raise ValueError(msg)


def _unaligned(tensor: torch.Tensor) -> str | None:
    if tensor.stride(2) != 1 or tensor.stride(0) % 8 or tensor.stride(1) % 8 or tensor.data_ptr() % 16:
        return f"needs rows of adjacent elements at multiples of 16 bytes, not strides {tensor.stride()}"
    return None
