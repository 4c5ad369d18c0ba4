"""Launches of the portable HSTU attention: which kernel with which arguments. Owns grids, descriptors, the workspace.

Kernels are in `hstu_attention_kernels`, configurations in `hstu_attention_configs`, the entry in `hstu_attention`.
Everything follows from shapes and `max_seqlen`: nothing waits for the device, so that a CUDA graph can hold it all.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from smbench_kernels import hstu_attention_kernels as kernels
from smbench_kernels import interpreter
from smbench_kernels.hstu import Jagged
from smbench_kernels.launch import Call, ceil_div, next_power_of_two
from smbench_kernels.op import Config

BLOCK = int(kernels.BLOCK.value)
KEPT_BYTES = 1 << 30
"""Most memory for dS. Where all heads of all sequences take more, they come in turns: a turn of this size still fills a
card many times over (kernels/NOTES-hstu.md has times for others)."""
TMA_ALIGNMENT_BYTES = 16


@dataclass(frozen=True, slots=True)
class Problem:
    """What all launches of a call share."""

    batch: Jagged
    heads: int
    head_dim: int
    alpha: float

    @property
    def items(self) -> int:
        """(sequence, head) pairs."""
        return self.batch.batch * self.heads

    @property
    def blocks(self) -> int:
        """Blocks of keys, and of queries, of the longest sequence."""
        return ceil_div(self.batch.max_seqlen, BLOCK)

    @property
    def triangle(self) -> bool:
        """Whether a row sees no column after its own, so that half of dS need not be stored."""
        return self.batch.causal and self.batch.num_contextuals is None

    def kept_elements(self) -> int:
        """Elements of dS of one item."""
        blocks = self.blocks
        return BLOCK * BLOCK * (blocks * (blocks + 1) // 2 if self.triangle else blocks * blocks)

    def sequences(self) -> tuple[Any, ...]:
        """The kernels' pointers to what a batch is."""
        return self.batch.offsets, self.batch.num_targets, self.batch.num_contextuals

    def constants(self, tma: bool) -> tuple[Any, ...]:
        """HEAD_DIM … TMA of the kernels."""
        return (
            *(self.head_dim, padded_dim(self.head_dim), self.batch.causal),
            *(self.batch.num_targets is not None, self.batch.num_contextuals is not None),
            *(not interpreter.active(), tma),
        )


def padded_dim(head_dim: int) -> int:
    """Columns of a tile: a power of two of at least one product's depth."""
    return max(16, next_power_of_two(head_dim))


def describable(*tensors: torch.Tensor) -> bool:
    """Whether the copy engine can read all of these [T, H, D] tensors: whole tiles, rows aligned to 16 bytes."""
    return all(
        padded_dim(x.shape[2]) == x.shape[2]
        and x.data_ptr() % TMA_ALIGNMENT_BYTES == 0
        and x.stride(0) * x.element_size() % TMA_ALIGNMENT_BYTES == 0
        and x.stride(0) > 0
        and (x.shape[1] == 1 or x.stride(1) >= x.shape[2])
        for x in tensors
    )


def source(x: torch.Tensor, rows: int, tma: bool) -> Any:
    """What a kernel loads tiles of `rows` rows of x [T, H, D] from: its pointer or a descriptor of [T, columns]."""
    if not tma:
        return x
    columns = (x.shape[1] - 1) * x.stride(1) + x.shape[2]
    return TensorDescriptor(x, [x.shape[0], columns], [x.stride(0), 1], [rows, x.shape[2]])


def kept_source(kept: torch.Tensor | None, rows: int, columns: int, tma: bool) -> Any:
    """What a kernel reads tiles of dS^T from and writes them to."""
    if kept is None or not tma:
        return kept
    return TensorDescriptor(kept, [kept.numel() // BLOCK, BLOCK], [BLOCK, 1], [columns, rows])


def strides(*tensors: torch.Tensor) -> Iterator[int]:
    """Row and head stride of each."""
    for x in tensors:
        yield from (x.stride(0), x.stride(1))


def forward_call(problem: Problem, q: Any, k: Any, v: Any, out: Any, config: Config) -> Call:
    """The launch of the forward pass."""
    tma = config["TMA"] == 2 and describable(q, k, v)
    rows, columns = config["ROWS"], config["COLUMNS"]
    tiles = ceil_div(problem.batch.max_seqlen, rows)
    arguments = (
        *(source(q, rows, tma), source(k, columns, tma), source(v, columns, tma), out),
        *problem.sequences(),
        *(problem.alpha / 2, 1.0 / problem.batch.max_seqlen, problem.heads, tiles),
        *strides(q, k, v, out),
        *problem.constants(tma),
        *(rows, columns, config["STAGES"], config["MASKED_STAGES"]),
    )
    return Call(kernels.forward, (tiles * problem.items, 1, 1), arguments, {"num_warps": config["WARPS"]})


def backward_calls(
    problem: Problem, dout: Any, q: Any, k: Any, v: Any, dq: Any, dk: Any, dv: Any, kept: Any, config: Config
) -> Iterator[Call]:
    """The launches of the backward pass in their order. `kept` is a workspace of `kept_elements`, or None."""
    step = problem.items if kept is None else kept.numel() // problem.kept_elements()
    apart = config["KERNELS"] == 3
    for first in range(0, problem.items, step):
        items = range(first, min(first + step, problem.items))
        tensors = (dout, q, k, v)
        yield _columns(problem, tensors, None if apart else dk, dv, kept, items, config, "V_", read=False)
        if apart:
            yield _columns(problem, tensors, dk, None, kept, items, config, "K_", read=kept is not None)
        yield _rows(problem, tensors, dq, kept, items, config)


def _columns(
    problem: Problem,
    tensors: tuple[Any, Any, Any, Any],
    dk: Any,
    dv: Any,
    kept: Any,
    items: range,
    config: Config,
    prefix: str,
    read: bool,
) -> Call:
    dout, q, k, v = tensors
    rows, columns = config[f"{prefix}ROWS"], config[f"{prefix}COLUMNS"]
    tma = config["TMA"] == 2 and describable(*tensors)
    tiles = ceil_div(problem.batch.max_seqlen, columns)
    write = kept is not None and not read
    scale = 1.0 / problem.batch.max_seqlen
    arguments = (
        *(source(q, rows, tma), source(k, columns, tma), source(v, columns, tma), source(dout, rows, tma)),
        *(dk, dv, kept_source(kept, rows, columns, tma)),
        *problem.sequences(),
        *(problem.alpha / 2, problem.alpha / 2 * scale, scale),
        *(items.start, problem.heads, tiles, problem.blocks),
        *strides(q, k, v, dout, dk if dk is not None else q, dv if dv is not None else q),
        *problem.constants(tma),
        *(problem.triangle, dk is not None, dv is not None, write, read),
        *(rows, columns, config[f"{prefix}STAGES"], config[f"{prefix}MASKED_STAGES"]),
    )
    grid = (tiles * len(items), 1, 1)
    return Call(kernels.columns_gradient, grid, arguments, {"num_warps": config[f"{prefix}WARPS"]})


def _rows(
    problem: Problem, tensors: tuple[Any, Any, Any, Any], dq: Any, kept: Any, items: range, config: Config
) -> Call:
    dout, q, k, v = tensors
    rows, columns = config["Q_ROWS"], config["Q_COLUMNS"]
    tma = config["TMA"] == 2 and describable(*tensors)
    tiles = ceil_div(problem.batch.max_seqlen, rows)
    arguments = (
        *(source(q, rows, tma), source(k, columns, tma), source(v, columns, tma), source(dout, rows, tma)),
        *(dq, kept_source(kept, rows, columns, tma)),
        *problem.sequences(),
        *(problem.alpha / 2, problem.alpha / 2 / problem.batch.max_seqlen),
        *(items.start, problem.heads, tiles, problem.blocks),
        *strides(q, k, v, dout, dq),
        *problem.constants(tma),
        *(problem.triangle, kept is not None),
        *(rows, columns, config["Q_STAGES"], config["Q_MASKED_STAGES"]),
    )
    return Call(kernels.rows_gradient, (tiles * len(items), 1, 1), arguments, {"num_warps": config["Q_WARPS"]})


def turn(problem: Problem, element_bytes: int) -> int:
    """How many items' dS a workspace holds, in even turns; 0 where KEPT_BYTES do not hold one."""
    most = KEPT_BYTES // (problem.kept_elements() * element_bytes)
    return ceil_div(problem.items, ceil_div(problem.items, most)) if most else 0


def workspace(problem: Problem, q: torch.Tensor) -> torch.Tensor:
    """Room for dS of a turn. ValueError where KEPT_BYTES do not hold one item."""
    items = turn(problem, q.element_size())
    if items == 0:
        size = problem.kept_elements() * q.element_size()
        raise ValueError(f"dS of a sequence of {problem.batch.max_seqlen} is {size} bytes; {KEPT_BYTES} may be kept")
    return torch.empty(items * problem.kept_elements(), dtype=q.dtype, device=q.device)
