"""Providers of the operation `hstu_block`: without a cache, with one, with CUDA graphs. Owns the calls, no kernel.

A provider's cache is filled before any timed call, from the same input. Two sets of pages take turns, so that no call
finds the pages of the one before in the L2, as the document's benchmark does.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from smbench_kernels import hstu, hstu_attention
from smbench_kernels import hstu_block_definition as definition
from smbench_kernels.hstu_block import Block, layer_by_kernels
from smbench_kernels.hstu_block_definition import Sizes
from smbench_kernels.hstu_definition import PARAMETERS
from smbench_kernels.hstu_graphs import Captured, Graphs, HostBatch, PaddedShape
from smbench_kernels.hstu_paged import PagedBatch
from smbench_kernels.kv_onload import Onload, Span
from smbench_kernels.kv_store import Sizes as CacheSizes
from smbench_kernels.op import Config, Inputs, Op, Point, Prepared, UnsupportedPoint

SETS = 2
GRAPH_BATCHES = (1, 2, 4, 8, 16)
GRAPH_ROWS = (384, 512, 768, 1280, 2304, 4352)
"""The shapes that the document's benchmark captures."""
PAGES_SEED = 20250716
"""Which pages a user gets follows from the point alone."""


def block_of(sizes: Sizes, inputs: Inputs) -> Block:
    """The block of a point's parameters."""
    layers = [{name: inputs[name][layer] for name in PARAMETERS} for layer in range(sizes.layers)]
    return Block(sizes.shape, layers)


def recompute(point: Point, inputs: Inputs) -> Prepared:
    """No cache: all layers over whole sequences, of which the step's rows are kept."""
    sizes = Sizes.of(point)
    if sizes.source != "device":
        raise UnsupportedPoint("without a cache nothing is brought in from the host")
    block, x = block_of(sizes, inputs), inputs["x"]
    batch = definition.whole(sizes, sizes.batch, x.device)
    counted: Counter[str] = Counter()

    def run() -> None:
        whole_histories(counted, sizes)
        y = over_whole(block, x, batch, sizes)
        inputs["y"].unflatten(0, (sizes.batch, sizes.rows)).copy_(definition.step_rows(sizes, y))

    return Prepared(run, {}, "default", counts=lambda: dict(counted))


def whole_histories(counted: Counter[str], sizes: Sizes) -> None:
    """Count a step that finds nothing: every token is new to it."""
    counted["steps"] += 1
    counted["new_tokens"] += sizes.batch * sizes.total
    counted["attended_tokens"] += sizes.batch * sizes.total


def over_whole(block: Block, x: torch.Tensor, batch: hstu.Jagged, sizes: Sizes) -> torch.Tensor:
    """A block without a cache: x [tokens, E] of whole sequences."""
    layer = layer_by_kernels if x.device.type == "cuda" else hstu.layer_around
    forward = hstu_attention.forward if x.device.type == "cuda" else hstu.attention_reference
    for params in block.layers:
        x = layer(x, params, sizes.shape, lambda q, k, v: forward(q, k, v, batch, sizes.shape.alpha))
    return x


@dataclass(slots=True)
class _Cached:
    """A block with the pages of SETS copies of a point's users."""

    sizes: Sizes
    inputs: Inputs
    block: Block
    pool: torch.Tensor
    steps: Sequence[HostBatch]
    fills: Sequence[HostBatch]
    """What fills the pages before a step: all cached tokens as new ones."""
    host: torch.Tensor | None
    """With source `host`: [layers, users' cached pages, 2, page_size, heads, head_dim], pinned where there is a GPU."""
    ids: Sequence[npt.NDArray[np.int32]]
    """Of each set the pages that are brought in."""
    turn: int = 0
    counted: Counter[str] = field(default_factory=Counter)

    @classmethod
    def of(cls, point: Point, inputs: Inputs) -> _Cached:
        sizes, device = Sizes.of(point), inputs["x"].device
        cache = CacheSizes(sizes.layers, sizes.shape.heads, sizes.shape.head_dim, sizes.page_size, sizes.dtype)
        count = SETS * sizes.batch * sizes.pages
        # all pages, in random order: neighbours in a history are none in memory
        order = torch.randperm(count, generator=torch.Generator().manual_seed(PAGES_SEED)).int()
        sets = [part.numpy() for part in order.chunk(SETS)]
        pool = torch.empty((sizes.layers, count, *cache.page_shape), dtype=sizes.dtype, device=device)
        steps = [_batch(sizes, ids, sizes.total, sizes.new, sizes.targets) for ids in sets]
        fills = [_batch(sizes, ids, sizes.cached, sizes.cached, 0) for ids in sets]
        host, brought = None, []
        if sizes.source == "host":
            per_user = sizes.cached // sizes.page_size
            if per_user * sizes.page_size != sizes.cached:
                raise UnsupportedPoint(f"{sizes.cached} cached tokens are no whole pages of {sizes.page_size}")
            if not per_user:
                raise UnsupportedPoint("nothing is cached, so nothing is brought in")
            shape = (sizes.layers, sizes.batch * per_user, *cache.page_shape)
            host = torch.empty(shape, dtype=sizes.dtype, pin_memory=device.type == "cuda")
            brought = [ids.reshape(sizes.batch, -1)[:, :per_user].reshape(-1) for ids in sets]
        return cls(sizes, inputs, block_of(sizes, inputs), pool, steps, fills, host, brought)

    def begin(self) -> None:
        """Fill the pages from the input; what is to come from the host is there afterwards, and nowhere else."""
        self.pool.fill_(torch.nan)
        sizes = self.sizes
        if not sizes.cached:
            return
        history = self.inputs["x"].unflatten(0, (sizes.batch, sizes.length))[:, : sizes.cached].flatten(0, 1)
        for fill in self.fills:
            self.block(history.contiguous(), self.on_device(fill, sizes.cached), self.pool)
        if self.host is not None:
            self.host.copy_(self.pool[:, torch.from_numpy(self.ids[0]).long().to(self.pool.device)])
            self.pool.fill_(torch.nan)

    def on_device(self, batch: HostBatch, rows: int) -> PagedBatch:
        sizes = self.sizes
        return batch.batch(sizes.page_size, rows, sizes.max_seqlen, self.pool.device, self.host is not None)

    def next(self) -> int:
        """The set of pages whose turn it is; counts its step."""
        self.turn = (self.turn + 1) % SETS
        step = self.steps[self.turn]
        self.counted["steps"] += 1
        # what the attention is told, what the rows bring, and what was put into the pages: three sources
        self.counted["attended_tokens"] += int(step.totals.sum())
        self.counted["new_tokens"] += int(step.offsets[-1] - step.num_targets.sum())
        found = "host_tokens" if self.host is not None else "device_tokens"
        self.counted[found] += int(self.fills[self.turn].totals.sum())
        return self.turn

    def rows(self) -> torch.Tensor:
        """The step's rows, contiguous [batch * (new + targets), E]."""
        return definition.step_rows(self.sizes, self.inputs["x"]).flatten(0, 1)

    def write_rows(self, into: torch.Tensor) -> None:
        """The same into a tensor of that shape."""
        rows = definition.step_rows(self.sizes, self.inputs["x"])
        into.unflatten(0, rows.shape[:2]).copy_(rows)


class _Onload:
    """Copies from the host for one step after another, all of a layer's pages as one chunk; counts them."""

    def __init__(self, cached: _Cached, overlap: bool) -> None:
        self._cached = cached
        self._spans: list[Span] = []
        self._current: torch.cuda.Stream | None = None
        self._copies: Onload | None = None
        if cached.host is not None:
            self._copies = Onload(cached.pool, cached.host.shape[1], overlap)

    def start(self, turn: int) -> None:
        """Begin with the copies of a step into a set's pages."""
        counted, host, copies = self._cached.counted, self._cached.host, self._copies
        assert host is not None and copies is not None
        counted["onloaded_bytes"] += host.nbytes
        chunk, ids = np.array([host.data_ptr()], np.int64), self._cached.ids[turn]
        if copies.stream is None:
            began = time.perf_counter_ns()
            copies.start(chunk, ids)
            counted["onload_ns"] += time.perf_counter_ns() - began
            return
        self._current = torch.cuda.current_stream(self._cached.pool.device)
        # the set's pages were read by the step before the last one
        copies.stream.wait_stream(self._current)
        self._spans.append(Span(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)))
        copies.start(chunk, ids, self._spans[-1])

    def wait(self, layer: int) -> None:
        """Have the current stream wait for a layer's copies, and enqueue those of layers behind it."""
        assert self._copies is not None
        self._copies.wait(layer, self._current)

    def counts(self) -> Mapping[str, int]:
        """Those of the steps, with bytes and nanoseconds on the stream of the copies. Waits for all copies."""
        counted = self._cached.counted
        for span in self._spans:
            span.done.synchronize()
            counted["onload_ns"] += span.nanoseconds()
        self._spans.clear()
        return dict(counted)


def _with_cache(point: Point, inputs: Inputs, overlap: bool) -> Prepared:
    cached = _Cached.of(point, inputs)
    sizes, onload = cached.sizes, _Onload(cached, overlap)

    def run() -> None:
        turn = cached.next()
        batch = cached.on_device(cached.steps[turn], sizes.rows)
        if cached.host is None:
            y = cached.block(cached.rows(), batch, cached.pool)
        else:
            onload.start(turn)
            y = cached.block(cached.rows(), batch, cached.pool, onload.wait)
        inputs["y"].copy_(y)

    # the host writes each step's page table anew, which a graph would not repeat
    return Prepared(run, {}, "default", begin=cached.begin, capturable=False, counts=onload.counts)


def cache(point: Point, inputs: Inputs) -> Prepared:
    """Over pages, kernel by kernel; from the host, each layer's copies beside the layers before it."""
    return _with_cache(point, inputs, overlap=True)


def _with_graphs(point: Point, inputs: Inputs, overlap: bool) -> Prepared:
    if inputs["x"].device.type != "cuda":
        raise UnsupportedPoint("CUDA graphs need a CUDA device")
    cached = _Cached.of(point, inputs)
    sizes, onload = cached.sizes, _Onload(cached, overlap)
    graphs = Graphs(cached.block, cached.pool, sizes.page_size, sizes.max_seqlen)
    captured = graphs.capture(padded(sizes.batch, sizes.rows), sizes.dtype)

    def run() -> None:
        turn = cached.next()
        if cached.host is None:
            y = graphs.run(cached.write_rows, cached.steps[turn])
        else:
            onload.start(turn)
            y = graphs.run(cached.write_rows, cached.steps[turn], onload.wait)
        inputs["y"].copy_(y)

    facts = graph_facts(captured)
    return Prepared(run, facts, "default", begin=cached.begin, capturable=False, counts=onload.counts)


def graph_facts(captured: Captured) -> Config:
    """Which graph runs, and what it cost to have it."""
    return {
        "GRAPH_BATCH": captured.shape.batch,
        "GRAPH_ROWS": captured.shape.rows,
        "CAPTURE_US": round(captured.seconds * 1e6),
        "CAPTURE_BYTES": captured.memory_bytes,
    }


def padded(batch: int, rows: int) -> PaddedShape:
    """The smallest of the document's shapes that holds a step, or one of the step's own size where none does."""
    users = next((size for size in GRAPH_BATCHES if size >= batch), batch)
    return PaddedShape(users, next((size for size in GRAPH_ROWS if size >= rows), rows))


def cache_graph(point: Point, inputs: Inputs) -> Prepared:
    """Over pages, by CUDA graphs: one of all layers, or one a layer where copies from the host run beside them."""
    return _with_graphs(point, inputs, overlap=True)


def cache_graph_serial(point: Point, inputs: Inputs) -> Prepared:
    """As `cache_graph`, but every copy from the host comes before the first layer: what the overlap is worth."""
    if Sizes.of(point).source != "host":
        raise UnsupportedPoint("nothing is brought in from the host, so there is nothing to overlap")
    return _with_graphs(point, inputs, overlap=False)


def _batch(sizes: Sizes, ids: npt.NDArray[np.int32], total: int, new: int, targets: int) -> HostBatch:
    """All users alike, over the first pages of each."""
    users, pages = sizes.batch, -(-total // sizes.page_size)
    return HostBatch(
        np.arange(users + 1, dtype=np.int32) * (new + targets),
        np.full(users, targets, np.int32),
        np.full(users, total, np.int32),
        np.arange(users + 1, dtype=np.int32) * pages,
        ids.reshape(users, -1)[:, :pages].reshape(-1),
    )


_HERE = "smbench_kernels.hstu_block_ops"
OP = Op(
    name="hstu_block",
    doc="HSTU layers on a step of new history and candidates, whose earlier history may be cached",
    axes=definition.AXES,
    make_inputs=definition.make_inputs,
    reference=definition.reference,
    work=definition.work,
    tolerance=definition.tolerance,
    providers={
        "recompute": f"{_HERE}:recompute",
        "cache": f"{_HERE}:cache",
        "cache-graph": f"{_HERE}:cache_graph",
        "cache-graph-serial": f"{_HERE}:cache_graph_serial",
    },
    baseline="recompute",
)
