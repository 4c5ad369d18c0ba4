"""Providers of the operation `hstu_request`: a ranking request from ids to scores. Owns the calls, no kernel.

A call is what a server does for a batch of users, the bookkeeping of its cache on the host included, and is over when
the scores are there. So that a call can be repeated, each begins by putting the cache's tables back to how the request
found them; what lies in pages stays.

With source `host`, HOST_SETS sets of users with the same histories take turns on a device that holds all but one of
them: a request's users were evicted by those who came after them, and evict whose turn is longest ago. What a request
stores on the host is so copied beside the next one, as a server's would be, and not waited for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch

from smbench_kernels import hstu_block_ops as block_ops
from smbench_kernels import hstu_request_definition as definition
from smbench_kernels.hstu_block_definition import whole
from smbench_kernels.hstu_graphs import Graphs, HostBatch
from smbench_kernels.hstu_request_definition import HEAD, Sizes
from smbench_kernels.kv_cache import KVCache, Step
from smbench_kernels.kv_store import PinnedStore
from smbench_kernels.kv_store import Sizes as CacheSizes
from smbench_kernels.launch import ceil_div
from smbench_kernels.op import Inputs, Op, Point, Prepared, UnsupportedPoint

HOST_SETS = 3
"""With two, a request would evict users whose chunks are still on their way to the host, and wait for them."""


@dataclass(frozen=True, slots=True)
class _Model:
    """What is around the block."""

    sizes: Sizes
    inputs: Inputs

    def rows(self, cached: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """[batch * (total - cached + targets), E]: embeddings of what is not cached, and of the candidates."""
        return torch.index_select(self.inputs["table"], 0, self.inputs["ids"][:, cached:].flatten(), out=into)

    def answer(self, y: torch.Tensor) -> None:
        """Scores of the candidates among a step's rows."""
        sizes = self.sizes
        candidates = y.unflatten(0, (sizes.batch, -1))[:, -sizes.targets :].flatten(0, 1)
        heads = [self.inputs[f"head{i}"] for i in range(len(HEAD))]
        self.inputs["y"].copy_(definition.scores(candidates, heads))

    def wait(self) -> None:
        """Until the scores are there: a request is over, and the next one does not hide what the host did for it."""
        if (y := self.inputs["y"]).is_cuda:
            torch.cuda.current_stream(y.device).synchronize()


def recompute(point: Point, inputs: Inputs) -> Prepared:
    """No cache: all layers over whole histories."""
    sizes = Sizes.of(point)
    if sizes.source != "nowhere":
        raise UnsupportedPoint("without a cache nothing is anywhere: source has to be nowhere")
    block, model = block_ops.block_of(sizes, inputs), _Model(sizes, inputs)
    batch = whole(sizes, sizes.batch, inputs["ids"].device)
    counted: Counter[str] = Counter()

    def run() -> None:
        block_ops.whole_histories(counted, sizes)
        model.answer(block_ops.over_whole(block, model.rows(0), batch, sizes))
        model.wait()

    return Prepared(run, {}, "default", capturable=False, counts=lambda: dict(counted))


class _Served:
    """A model with its cache, and the users of a point in it."""

    def __init__(self, point: Point, inputs: Inputs, overlap: bool) -> None:
        self.sizes = Sizes.of(point)
        self.model = _Model(self.sizes, inputs)
        self.block = block_ops.block_of(self.sizes, inputs)
        sizes, device = self.sizes, inputs["ids"].device
        shape = sizes.shape
        cache = CacheSizes(sizes.layers, shape.heads, shape.head_dim, sizes.page_size, sizes.dtype)
        chunk = int(point["chunk_tokens"])
        store, sets, resident = None, 1, 1
        if sizes.source == "host":
            if not sizes.cached or sizes.cached % chunk:
                raise UnsupportedPoint(f"{sizes.cached} cached tokens are no whole chunks of {chunk}")
            sets, resident = HOST_SETS, HOST_SETS - 1
            chunks = sets * sizes.batch * ceil_div(sizes.total, chunk)
            store = PinnedStore(cache, chunks, chunk, pinned=device.type == "cuda")
        self.cache = KVCache(cache, resident * sizes.batch * sizes.pages, device, store, overlap)
        self.sets = [list(range(first, first + sizes.batch)) for first in range(0, sets * sizes.batch, sizes.batch)]
        self._turn = 0

    def begin(self) -> None:
        """Serve the users' earlier history; with source `host` it is on the host alone afterwards, pages poisoned."""
        sizes, cache = self.sizes, self.cache
        cache.drain()
        for user in range(len(self.sets) * sizes.batch):
            cache.rewind(user, 0, 0)
        self._turn = 0
        cache.pool.fill_(torch.nan)
        if sizes.source == "nowhere" or not sizes.cached:
            return
        counted = Counter(cache.counts)
        for users in self.sets:
            self._serve_history(users)
        cache.drain()
        if sizes.source == "host":
            for users in self.sets:
                for user in users:
                    cache.rewind(user, 0, sizes.cached)
            # the first set comes next, and the others have all pages
            for users in self.sets[1:]:
                cache.table.grow(users, [sizes.total] * sizes.batch)
            cache.pool.fill_(torch.nan)
            if cache.pool.is_cuda:
                # copies of a request run on a stream that does not wait for this one
                torch.cuda.current_stream(cache.device).synchronize()
        # counts are those of requests
        cache.counts.clear()
        cache.counts.update(counted)

    def _serve_history(self, users: list[int]) -> None:
        """Compute what is cached of some users, and store it where a store is."""
        sizes, cache = self.sizes, self.cache
        step = cache.begin(users, [sizes.cached] * sizes.batch)
        x = self.model.inputs["table"][self.model.inputs["ids"][:, : sizes.cached].flatten()]
        batch = self.host_batch(step, 0).batch(sizes.page_size, sizes.cached, sizes.max_seqlen, cache.device)
        self.block(x, batch, cache.pool, lambda layer: cache.wait(step, layer))
        cache.finish(step)

    def rewind(self) -> list[int]:
        """Put the tables back to how a request finds them; the users whose turn it is."""
        users = self.sets[self._turn]
        self._turn = (self._turn + 1) % len(self.sets)
        cached = self.sizes.cached
        on_device, on_host = (cached if self.sizes.source == place else 0 for place in ("device", "host"))
        for user in users:
            self.cache.rewind(user, on_device, on_host)
        return users

    def host_batch(self, step: Step, targets: int) -> HostBatch:
        """A step's sequences: users alike."""
        rows = step.totals[0] - step.cached[0] + targets
        users = len(step.users)
        return HostBatch(
            np.arange(users + 1, dtype=np.int32) * rows,
            np.full(users, targets, np.int32),
            np.array(step.totals, np.int32),
            step.page_offsets,
            step.page_ids,
        )

    def request(self, graphed: _Graphed | None) -> None:
        """One request of all users."""
        sizes, cache = self.sizes, self.cache
        step = cache.begin(self.rewind(), [sizes.total] * sizes.batch)
        host = self.host_batch(step, sizes.targets)
        # what the attention is told, apart from what the cache counts
        cache.counts["attended_tokens"] += int(host.totals.sum())

        def wait(layer: int) -> None:
            cache.wait(step, layer)

        onloads = "host" in step.sources
        if graphed is not None:
            graphed.layers.run(graphed.embed, host, wait if onloads else None)
            graphed.answer.replay()
        else:
            x = self.model.rows(step.cached[0])
            rows = len(x) // sizes.batch
            batch = host.batch(sizes.page_size, rows, sizes.max_seqlen, cache.device, onloads)
            self.model.answer(self.block(x, batch, cache.pool, wait if onloads else None))
        # before waiting: what goes to the host is on its way while the scores are computed
        cache.finish(step)
        self.model.wait()

    def counts(self) -> Mapping[str, int]:
        """What requests met and moved since the cache was made."""
        self.cache.drain()
        return dict(self.cache.counts)


def _eager(point: Point, inputs: Inputs, overlap: bool) -> Prepared:
    served = _Served(point, inputs, overlap)
    return Prepared(
        lambda: served.request(None), {}, "default", begin=served.begin, capturable=False, counts=served.counts
    )


def cache(point: Point, inputs: Inputs) -> Prepared:
    """With a cache, kernel by kernel."""
    return _eager(point, inputs, overlap=True)


class _Graphed:
    """A request's device work as graphs: embeddings, the layers, scores; of one shape, as a point's requests are."""

    def __init__(self, served: _Served) -> None:
        sizes, model = served.sizes, served.model
        cached = 0 if sizes.source == "nowhere" else sizes.cached
        rows = sizes.total - cached + sizes.targets
        self.layers = Graphs(served.block, served.cache.pool, sizes.page_size, sizes.max_seqlen)
        self.captured = self.layers.capture(block_ops.padded(sizes.batch, rows), sizes.dtype)
        x, y = (part[: sizes.batch * rows] for part in (self.captured.x, self.captured.y))
        self._embed = self.layers.capture_call(lambda: model.rows(cached, x))
        self.answer = self.layers.capture_call(lambda: model.answer(y))

    def embed(self, _into: torch.Tensor) -> None:
        """Write a request's embeddings into the layers' input."""
        self._embed.replay()


def _graphed(point: Point, inputs: Inputs, overlap: bool) -> Prepared:
    if inputs["ids"].device.type != "cuda":
        raise UnsupportedPoint("CUDA graphs need a CUDA device")
    served = _Served(point, inputs, overlap)
    graphed = _Graphed(served)
    return Prepared(
        lambda: served.request(graphed),
        block_ops.graph_facts(graphed.captured),
        "default",
        begin=served.begin,
        capturable=False,
        counts=served.counts,
    )


def cache_graph(point: Point, inputs: Inputs) -> Prepared:
    """With a cache, embeddings, layers and scores as CUDA graphs."""
    return _graphed(point, inputs, overlap=True)


def cache_graph_serial(point: Point, inputs: Inputs) -> Prepared:
    """As `cache_graph`, every copy from the host before the first layer."""
    if Sizes.of(point).source != "host":
        raise UnsupportedPoint("nothing is brought in from the host, so there is nothing to overlap")
    return _graphed(point, inputs, overlap=False)


_HERE = "smbench_kernels.hstu_request_ops"
OP = Op(
    name="hstu_request",
    doc="a ranking request of a batch of users: embeddings, HSTU layers over a cache, scores of candidates",
    axes=definition.AXES,
    make_inputs=definition.make_inputs,
    reference=definition.reference,
    work=definition.work,
    tolerance=definition.tolerance,
    redraw=definition.redraw,
    providers={
        "recompute": f"{_HERE}:recompute",
        "cache": f"{_HERE}:cache",
        "cache-graph": f"{_HERE}:cache_graph",
        "cache-graph-serial": f"{_HERE}:cache_graph_serial",
    },
    baseline="recompute",
)
