"""The KV cache of an HSTU model: pages on a device keyed by user, chunks on a host, copies between them beside compute.

Owns the page pool, the order of copies and their claims on pages. Page accounting is `kv_pages`', host memory
`kv_store`'s, attention the kernels'. A step goes `begin` (find or bring in what is cached, make room), then for each
layer `wait` and what is computed on it, then `finish` (store whole chunks on the host).

Onload is layer by layer on a stream of its own: layer i waits for its own copy alone, and computes while that of layer
i + 1 runs (document 003, "Asynchronous H2D transfer").
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch

from smbench_kernels.kv_pages import CacheFull, Growth, Hold, Pages, PageTable
from smbench_kernels.kv_store import HostStore, Lease, Sizes


@dataclass(slots=True)
class Step:
    """One step's users and where their tokens are. `KVCache.finish` ends it."""

    users: Sequence[int]
    cached: Sequence[int]
    """Tokens of each user's history that need not be computed: on the device, or on their way there."""
    totals: Sequence[int]
    sources: Sequence[str]
    """Where each user's cached tokens were: `device`, `host` or, where none were, `none`."""
    page_offsets: npt.NDArray[np.int32]
    """[users + 1]: where each user's entries of `page_ids` begin."""
    page_ids: Pages
    """All users' pages, one after the other."""
    evicted: Sequence[int]
    """Users that lost their pages on the device for it."""
    _holds: list[Hold]
    _onloaded: list[torch.cuda.Event | None] = field(default_factory=list)
    """By layer: after its copies; None where nothing was copied, or at once."""


@dataclass(slots=True)
class _Transfer:
    """Copies that are under way, and what must stay as it is until then."""

    done: torch.cuda.Event
    finish: Callable[[], None]
    counter: str = ""
    """Which of the counts its time goes to; empty for a step without copies."""
    begun: torch.cuda.Event | None = None


class KVCache:
    """Pages of keys and values on one device, backed by a host store.

    `pool` is [layers, pages, 2, page_size, heads, head_dim]. Not for several threads. With `overlap` False the stream
    that computes waits for every copy of a step before its first layer.
    """

    def __init__(
        self,
        sizes: Sizes,
        pages: int,
        device: torch.device,
        store: HostStore | None = None,
        overlap: bool = True,
    ) -> None:
        if store is not None and store.chunk_tokens % sizes.page_size:
            raise ValueError(f"chunks of {store.chunk_tokens} tokens are no whole pages of {sizes.page_size}")
        self.sizes, self.device, self.overlap = sizes, device, overlap
        self.table = PageTable(pages, sizes.page_size)
        self.pool = torch.zeros((sizes.layers, pages, *sizes.page_shape), dtype=sizes.dtype, device=device)
        self.counts: Counter[str] = Counter()
        """Since the beginning: tokens found on the device and on the host, bytes and users that moved, nanoseconds from
        the turn of a step's first copy to the end of its last one, on the stream of the copies."""
        self._store = store
        self._cuda = device.type == "cuda"
        self._in = torch.cuda.Stream(device) if self._cuda else None
        self._out = torch.cuda.Stream(device) if self._cuda else None
        if self._in is not None:
            # the pool is zeroed before anything is copied into it
            self._in.wait_stream(torch.cuda.current_stream(device))
        self._transfers: list[_Transfer] = []
        # the last copy of a user's chunks to the host: whoever reads them waits for it
        self._stored: dict[int, torch.cuda.Event] = {}

    def begin(self, users: Sequence[int], totals: Sequence[int]) -> Step:
        """Find what is cached of each user, bring in what the host has, make room for `totals` tokens.

        `totals` counts a user's whole history with what is new in it. CacheFull and ValueError as `PageTable.grow`;
        either leaves the cache as it was.
        """
        self._collect(wait=False)
        on_device = [self.table.tokens(user) for user in users]
        leases = [
            self._store.read(user) if self._store and not here and 0 < self._store.tokens(user) <= total else None
            for user, here, total in zip(users, on_device, totals, strict=True)
        ]
        try:
            growth = self._grow(users, totals)
        except (CacheFull, ValueError):
            self._give_back([lease for lease in leases if lease])
            raise
        tokens = [self._tokens(lease) for lease in leases]
        cached = [here or there for here, there in zip(on_device, tokens, strict=True)]
        sources = [
            "device" if here else "host" if there else "none" for here, there in zip(on_device, tokens, strict=True)
        ]
        counts = np.array([len(placement.pages) for placement in growth.placements], np.int32)
        step = Step(
            list(users),
            cached,
            list(totals),
            sources,
            np.concatenate([np.zeros(1, np.int32), np.cumsum(counts, dtype=np.int32)]),
            np.concatenate([placement.pages for placement in growth.placements]),
            growth.evicted,
            [self.table.hold(user) for user in users],
        )
        self.counts["steps"] += 1
        self.counts["device_tokens"] += sum(on_device)
        self.counts["host_tokens"] += sum(tokens)
        self.counts["new_tokens"] += sum(total - before for total, before in zip(totals, cached, strict=True))
        self.counts["evicted_users"] += len(growth.evicted)
        self._onload(step, [(lease, step.page_ids[step.page_offsets[i] :]) for i, lease in enumerate(leases) if lease])
        return step

    def wait(self, step: Step, layer: int) -> None:
        """Have the current stream wait until what is cached of a layer lies in its pages."""
        if step._onloaded and (event := step._onloaded[layer]) is not None:
            torch.cuda.current_stream(self.device).wait_event(event)

    def finish(self, step: Step) -> None:
        """End a step whose work is enqueued on the current stream: store whole new chunks on the host.

        What a step holds is given back when its copies are done.
        """
        copies = self._chunks_to_store(step)
        if self._out is None:
            began = time.perf_counter_ns()
            for lease, pages in copies:
                self._copy_out(lease, pages)
            if copies:
                self.counts["offload_ns"] += time.perf_counter_ns() - began
            self._give_back([lease for lease, _ in copies])
            self._release(step._holds)
            return
        computed = torch.cuda.Event()
        computed.record(torch.cuda.current_stream(self.device))
        done, begun = computed, None
        if copies:
            self._out.wait_event(computed)
            begun = torch.cuda.Event(enable_timing=True)
            begun.record(self._out)
            with torch.cuda.stream(self._out):
                for lease, pages in copies:
                    self._copy_out(lease, pages)
                done = torch.cuda.Event(enable_timing=True)
                done.record(self._out)
            for lease, _ in copies:
                self._stored[lease.user] = done

        def finish() -> None:
            self._give_back([lease for lease, _ in copies])
            self._release(step._holds)
            for lease, _ in copies:
                if self._stored.get(lease.user) is done:
                    del self._stored[lease.user]

        self._transfers.append(_Transfer(done, finish, "offload_ns", begun))

    def drain(self) -> None:
        """Wait for every copy and give back what they held."""
        self._collect(wait=True)

    def rewind(self, user: int, on_device: int, on_host: int) -> None:
        """Forget what a user has beyond so many tokens, here and in the store; waits for every copy.

        For repeating a step as if it had not been. Pages that stay hold what they held.
        """
        self.drain()
        if user in self.table:
            if on_device:
                self.table.truncate(user, on_device)
            else:
                self.table.evict(user)
        if self._store is not None:
            self._store.truncate(user, on_host)

    def _grow(self, users: Sequence[int], totals: Sequence[int]) -> Growth:
        """Grow the table; where its pages are held by copies, wait for those first."""
        while True:
            try:
                return self.table.grow(users, totals)
            except CacheFull:
                if not self._transfers:
                    raise
                # the oldest copy holds what comes free first
                self._transfers[0].done.synchronize()
                self._collect(wait=False)

    def _onload(self, step: Step, loads: Sequence[tuple[Lease, Pages]]) -> None:
        """Copy leased chunks into their pages, layer by layer."""
        if not loads:
            return
        leases = [lease for lease, _ in loads]
        self.counts["onloaded_users"] += len(leases)
        self.counts["onloaded_bytes"] += sum(chunk.nbytes for lease in leases for chunk in lease.chunks)
        if self._in is None:
            began = time.perf_counter_ns()
            placed = self._places(loads)
            for layer in range(self.sizes.layers):
                self._copy_in(layer, placed)
            self.counts["onload_ns"] += time.perf_counter_ns() - began
            self._give_back(leases)
            return
        # nobody else can still read these pages: a step's users keep theirs until its work is done
        for lease in leases:
            if (stored := self._stored.get(lease.user)) is not None:
                self._in.wait_event(stored)
        events = []
        begun = torch.cuda.Event(enable_timing=True)
        begun.record(self._in)
        with torch.cuda.stream(self._in):
            placed = self._places(loads)
            for layer in range(self.sizes.layers):
                self._copy_in(layer, placed)
                event = torch.cuda.Event(enable_timing=layer + 1 == self.sizes.layers)
                event.record(self._in)
                events.append(event)
        step._onloaded.extend(events)
        if not self.overlap:
            torch.cuda.current_stream(self.device).wait_event(events[-1])
        self._transfers.append(_Transfer(events[-1], lambda: self._give_back(leases), "onload_ns", begun))

    def _places(self, loads: Sequence[tuple[Lease, Pages]]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Every chunk with the ids of its pages, which are the same in all layers; on the current stream."""
        return [
            (chunk, ids)
            for lease, pages in loads
            for chunk, ids in zip(
                lease.chunks, self._ids(pages[: self._pages_of(lease)]).split(chunk_pages(lease)), strict=True
            )
        ]

    def _copy_in(self, layer: int, placed: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Enqueue the copies of one layer's chunks into their pages."""
        for chunk, ids in placed:
            self.pool[layer].index_copy_(0, ids, chunk[layer].to(self.device, non_blocking=True))

    def _chunks_to_store(self, step: Step) -> list[tuple[Lease, Pages]]:
        """Room on the host for each user's whole chunks that are not stored yet, and the pages that go there."""
        found: list[tuple[Lease, Pages]] = []
        if self._store is None:
            return found
        chunk, pages_per_chunk = self._store.chunk_tokens, self._store.chunk_tokens // self.sizes.page_size
        for index, (user, total) in enumerate(zip(step.users, step.totals, strict=True)):
            missing = total // chunk - self._store.tokens(user) // chunk
            lease = self._store.room(user, missing) if missing > 0 else None
            if lease is None:
                self.counts["chunks_not_stored"] += max(0, missing)
                continue
            begin = int(step.page_offsets[index]) + lease.first * pages_per_chunk
            pages = step.page_ids[begin : begin + missing * pages_per_chunk]
            found.append((lease, pages))
            self.counts["offloaded_bytes"] += sum(part.nbytes for part in lease.chunks)
            self.counts["offloaded_chunks"] += missing
        return found

    def _copy_out(self, lease: Lease, pages: Pages) -> None:
        """Enqueue the copy of a user's pages, all layers, into the chunks of its lease."""
        for chunk, part in zip(lease.chunks, self._ids(pages).split(chunk_pages(lease)), strict=True):
            # a chunk is one block of host memory, so the scattered pages are gathered first
            chunk.copy_(self.pool[:, part], non_blocking=True)

    def _ids(self, pages: Pages) -> torch.Tensor:
        return torch.from_numpy(pages.astype(np.int64)).to(self.device, non_blocking=True)

    def _tokens(self, lease: Lease | None) -> int:
        return self._pages_of(lease) * self.sizes.page_size if lease else 0

    def _pages_of(self, lease: Lease) -> int:
        return sum(chunk.shape[1] for chunk in lease.chunks)

    def _give_back(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            assert self._store is not None
            self._store.give_back(lease)

    def _release(self, holds: Sequence[Hold]) -> None:
        for hold in holds:
            self.table.release(hold)

    def _collect(self, wait: bool) -> None:
        """Give back what finished copies held; with `wait`, of all of them."""
        left = []
        for transfer in self._transfers:
            if wait:
                transfer.done.synchronize()
            if transfer.done.query():
                if transfer.begun is not None:
                    self.counts[transfer.counter] += round(transfer.begun.elapsed_time(transfer.done) * 1e6)
                transfer.finish()
            else:
                left.append(transfer)
        self._transfers = left


def chunk_pages(lease: Lease) -> int:
    """Pages of one chunk of a lease."""
    return int(lease.chunks[0].shape[1])
