"""A block's steps as CUDA graphs: one set for each padded batch and length, one graph for each layer. Owns the padding.

A graph's sizes are fixed, a step's are not: a step runs in the smallest shape that holds it, its other rows and
sequences empty. Between the layers' graphs the stream waits for the copies of the next layer's cache (document 003,
"Optimization with CUDA graph"); where nothing is copied, a graph of all layers is replayed instead.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from smbench_kernels.hstu_block import Block, Wait
from smbench_kernels.hstu_paged import PagedBatch
from smbench_kernels.kv_staging import staging
from smbench_kernels.launch import ceil_div

Write = Callable[[torch.Tensor], object]
"""Writes a step's rows into a tensor [rows, embedding]."""


@dataclass(frozen=True, slots=True, order=True)
class PaddedShape:
    """What a set of graphs was captured for."""

    batch: int
    rows: int
    """Rows of each sequence: new history and candidates."""

    @property
    def all_rows(self) -> int:
        """Rows of all sequences: what the linear maps compute, whatever a step has."""
        return self.batch * self.rows


def smallest(shapes: Sequence[PaddedShape], batch: int, rows: int, all_rows: int) -> PaddedShape:
    """The shape with the fewest rows that holds a step of `batch` sequences, `rows` the longest, `all_rows` together.

    ValueError lists the shapes that exist where none does.
    """
    fitting = [s for s in shapes if s.batch >= batch and s.rows >= rows and s.all_rows >= all_rows]
    if not fitting:
        known = ", ".join(f"{s.batch}x{s.rows}" for s in sorted(shapes))
        raise ValueError(f"no graph holds {batch} sequences of {rows} rows; captured: {known}")
    return min(fitting, key=lambda s: (s.all_rows, s.batch))


@dataclass(frozen=True, slots=True)
class Captured:
    """The graphs of one shape and the buffers that they read and write."""

    shape: PaddedShape
    x: torch.Tensor
    batch: PagedBatch
    y: torch.Tensor
    layers: Sequence[torch.cuda.CUDAGraph]
    whole: torch.cuda.CUDAGraph
    seconds: float
    """Capturing took that long, warm-up and compilation included."""
    memory_bytes: int
    """Device memory that the graphs and their buffers keep."""


class Graphs:
    """Graphs of a block over one cache pool, by padded shape."""

    def __init__(self, block: Block, pool: torch.Tensor, page_size: int, max_seqlen: int) -> None:
        self._block, self._pool = block, pool
        self._page_size, self._max_seqlen = page_size, max_seqlen
        self._memory = torch.cuda.graph_pool_handle()
        self.captured: dict[PaddedShape, Captured] = {}

    def capture(self, shape: PaddedShape, dtype: torch.dtype) -> Captured:
        """Capture a shape's graphs. Writes to no page of the cache: while capturing, no sequence has a row."""
        device = self._pool.device
        began, before = time.perf_counter(), torch.cuda.memory_allocated(device)
        x = torch.zeros((shape.all_rows, self._block.shape.embedding), dtype=dtype, device=device)
        batch = empty_batch(shape, self._page_size, self._max_seqlen, device)
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            # compiles, and lets libraries make their work spaces, outside of a graph
            self._block(x, batch, self._pool)
        torch.cuda.current_stream(device).wait_stream(stream)
        layers, y = [], x
        for index in range(len(self._block.layers)):
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._memory):
                y = self._block.layer(index, y, batch, self._pool[index])
            layers.append(graph)
        whole = torch.cuda.CUDAGraph()
        with torch.cuda.graph(whole, pool=self._memory):
            # into the same output, whichever graphs ran
            y.copy_(self._block(x, batch, self._pool))
        torch.cuda.synchronize(device)
        taken = torch.cuda.memory_allocated(device) - before
        found = Captured(shape, x, batch, y, layers, whole, time.perf_counter() - began, taken)
        self.captured[shape] = found
        return found

    def capture_call(self, call: Callable[[], object]) -> torch.cuda.CUDAGraph:
        """A graph of a call that reads and writes the same memory each time, such as what is around the layers."""
        device = self._pool.device
        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            call()
        torch.cuda.current_stream(device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory):
            call()
        return graph

    def run(self, x: torch.Tensor | Write, step: HostBatch, wait: Wait | None = None) -> torch.Tensor:
        """A step on x [rows, embedding] in the smallest shape that holds it: its rows of the graphs' own output.

        `x` may be what writes the rows into the graphs' input. `wait` is called before each layer; without it the graph
        of all layers runs. The result is overwritten by the next step of that shape.
        """
        rows = int(step.offsets[-1])
        shape = smallest(list(self.captured), len(step.totals), int(np.diff(step.offsets).max(initial=0)), rows)
        captured = self.captured[shape]
        if isinstance(x, torch.Tensor):
            captured.x[:rows].copy_(x, non_blocking=True)
        else:
            x(captured.x[:rows])
        step.fill(captured.batch, beside_copies=wait is not None)
        if wait is None:
            captured.whole.replay()
        else:
            for index, graph in enumerate(captured.layers):
                wait(index)
                graph.replay()
        return captured.y[:rows]


@dataclass(frozen=True, slots=True)
class HostBatch:
    """What a step's sequences are, on the host: int32 arrays as in `PagedBatch`."""

    offsets: npt.NDArray[np.int32]
    num_targets: npt.NDArray[np.int32]
    totals: npt.NDArray[np.int32]
    page_offsets: npt.NDArray[np.int32]
    page_ids: npt.NDArray[np.int32]

    def fill(self, batch: PagedBatch, beside_copies: bool = False) -> None:
        """Write it into the buffers of a batch of at least as many sequences; those beyond have no row.

        One copy on the current stream, which nothing here waits for: all buffers of `empty_batch` lie in one.
        `beside_copies` as `Slot.send`.
        """
        ids, size = self.page_ids, batch.batch
        if len(ids) > batch.page_ids.numel():
            raise ValueError(f"{len(ids)} pages do not fit the {batch.page_ids.numel()} of the graph")
        begin = _ids_at(size)
        used = begin + len(ids)
        slot = staging(batch.offsets.device).take(used)
        staged = slot.words
        for first, values in zip(
            range(0, begin, begin // 4),
            (self.offsets, self.num_targets, self.totals, self.page_offsets),
            strict=True,
        ):
            staged[first : first + len(values)] = values
            if len(self.totals) < size:
                # a sequence beyond begins and ends where the last one ends
                rest = values[-1] if len(values) > len(self.totals) else 0
                staged[first + len(values) : first + begin // 4] = rest
        staged[begin:used] = ids
        # all buffers of a batch lie in one, the offsets first
        slot.send(batch.offsets, used, beside_copies)

    def batch(
        self, page_size: int, max_rows: int, max_seqlen: int, device: torch.device, beside_copies: bool = False
    ) -> PagedBatch:
        """The same on a device, for a step that runs without a graph."""
        shape = PaddedShape(len(self.totals), max_rows)
        words = _ids_at(shape.batch) + max(1, len(self.page_ids))
        found = _batch_in(torch.empty(words, dtype=torch.int32, device=device), shape, page_size, max_seqlen)
        self.fill(found, beside_copies)
        return found


def empty_batch(shape: PaddedShape, page_size: int, max_seqlen: int, device: torch.device) -> PagedBatch:
    """A batch without a row, its tensors parts of one buffer; room for the page ids of whole histories."""
    words = _ids_at(shape.batch) + max(1, shape.batch * ceil_div(max_seqlen, page_size))
    return _batch_in(torch.zeros(words, dtype=torch.int32, device=device), shape, page_size, max_seqlen)


def _batch_in(buffer: torch.Tensor, shape: PaddedShape, page_size: int, max_seqlen: int) -> PagedBatch:
    offsets, targets, totals, page_offsets = (buffer[part] for part in _parts(shape.batch))
    ids = buffer[_ids_at(shape.batch) :]
    return PagedBatch(offsets, targets, totals, page_offsets, ids, page_size, shape.rows, max_seqlen)


def _parts(batch: int) -> tuple[slice, slice, slice, slice]:
    """Where offsets, targets, totals and page offsets lie in the one buffer; page ids follow."""
    step = _ids_at(batch) // 4
    first, second, third, fourth = (
        slice(step * i, step * i + size) for i, size in enumerate((batch + 1, batch, batch, batch + 1))
    )
    return first, second, third, fourth


def _ids_at(batch: int) -> int:
    """Where page ids begin: like all parts at a multiple of 16 bytes, which Triton would compile apart otherwise."""
    return 4 * 4 * ceil_div(batch + 1, 4)
