"""The KV cache of an HSTU model: pages on a device keyed by user, chunks on a host, copies between them beside compute.

Owns the page pool, the order of copies and their claims on pages. Page accounting is `kv_pages`', host memory
`kv_store`'s, who waits for a layer's copies `kv_onload`'s, attention the kernels'. A step goes `begin` (find or bring
in what is cached, make room), then for each layer `wait` and what is computed on it, then `finish` (store whole chunks
on the host).

Onload is layer by layer on a stream of its own: layer i waits for its own copy alone, and computes while that of layer
i + 1 runs (document 003, "Asynchronous H2D transfer"). Steps compute on one stream, one after another: pages that go
from one user to another are written after whatever reads them now, and only copies, on streams of their own, need
claims and events.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from smbench_kernels.kv_copies import Mover
from smbench_kernels.kv_onload import Onload, Span
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
    _hold: Hold
    _awaits: bool = False
    """Whether each layer waits for copies."""
    _stream: torch.cuda.Stream | None = None
    """What it computes on, once it was asked for."""


@dataclass(slots=True)
class _Transfer:
    """Work under way on a device, and what must stay as it is until then."""

    done: torch.cuda.Event
    leases: Sequence[Lease]
    hold: Hold | None
    counter: str = ""
    """Which of the counts its time goes to; empty for a step without copies."""
    span: Span | None = None

    def of(self, user: int) -> bool:
        """Whether it keeps anything of a user."""
        return any(lease.user == user for lease in self.leases) or (self.hold is not None and user in self.hold.users)


class _Events:
    """Events to be used again: making one costs as much as recording it."""

    def __init__(self) -> None:
        self._free: list[torch.cuda.Event] = []
        self._spans: list[Span] = []

    def record(self, stream: torch.cuda.Stream) -> torch.cuda.Event:
        """An event after what is enqueued on a stream."""
        event = self._free.pop() if self._free else torch.cuda.Event()
        event.record(stream)
        return event

    def span(self) -> Span:
        """Two events to be recorded."""
        if self._spans:
            return self._spans.pop()
        return Span(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))

    def give_back(self, used: torch.cuda.Event | Span) -> None:
        """Nobody will ask for it again; streams that were told to wait for it wait for what it was."""
        if isinstance(used, Span):
            self._spans.append(used)
        else:
            self._free.append(used)


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
        self._out: torch.cuda.Stream | None = None
        self._transfers: list[_Transfer] = []
        # spans of copies that are over, to be counted when the host has time
        self._over: list[tuple[str, Span]] = []
        self._events = _Events()
        # the last copy of a user's chunks to the host: whoever reads them waits for it
        self._stored: dict[int, torch.cuda.Event] = {}
        # leases and span of the copies that are not all enqueued
        self._loading: tuple[Sequence[Lease], Span] | None = None
        if store is None:
            return
        self._chunk_pages = store.chunk_tokens // sizes.page_size
        self._onload = Onload(self.pool, self._chunk_pages, overlap)
        if device.type == "cuda":
            # the few programs of a copy by a kernel go before those of a layer
            self._out = torch.cuda.Stream(device, priority=-1)
        self._storer = Mover(self.pool, self._chunk_pages, to_host=True, stream=self._out)
        if self._out is not None:
            # the pool and the mover's table are zeroed before anything is copied
            self._out.wait_stream(torch.cuda.current_stream(device))

    def __del__(self) -> None:
        # page-locked memory goes to whoever asks next once nobody names it: not before its copies are done
        for transfer in getattr(self, "_transfers", ()):
            transfer.done.synchronize()
        if getattr(self, "_loading", None) is not None:
            self._onload.settle()

    def begin(self, users: Sequence[int], totals: Sequence[int]) -> Step:
        """Find what is cached of each user, bring in what the host has, make room for `totals` tokens.

        `totals` counts a user's whole history with what is new in it. CacheFull and ValueError as `PageTable.grow`;
        either leaves the cache as it was.
        """
        self._load_all()
        if self._transfers:
            self._collect(wait=False)
        leases = self._leases(users, totals) if self._store is not None else {}
        try:
            growth = self._grow(users, totals)
        except (CacheFull, ValueError):
            self._give_back(leases.values())
            raise
        cached, sources = growth.cached, ["device" if here else "none" for here in growth.cached]
        found = sum(cached)
        pages = growth.pages
        page_offsets = np.array([0, *accumulate(map(len, pages))], np.int32)
        page_ids = np.concatenate(pages)
        if leases:
            # first of all: the bus is what the step will wait for
            self._bring(leases, page_offsets, page_ids)
            cached = list(cached)
            for index, lease in leases.items():
                cached[index], sources[index] = self._tokens(lease), "host"
        hold, evicted = self.table.hold(*users), growth.evicted
        awaits = bool(leases) and self.overlap
        step = Step(list(users), cached, list(totals), sources, page_offsets, page_ids, evicted, hold, awaits)
        counts, all_cached = self.counts, sum(cached)
        counts["steps"] += 1
        counts["device_tokens"] += found
        counts["host_tokens"] += all_cached - found
        counts["new_tokens"] += sum(totals) - all_cached
        counts["evicted_users"] += len(evicted)
        return step

    def wait(self, step: Step, layer: int) -> None:
        """Have the current stream wait until what is cached of a layer lies in its pages.

        To be called for one layer after the other: each call enqueues copies of layers behind it.
        """
        if not step._awaits or self._onload.stream is None:
            return
        if step._stream is None:
            step._stream = torch.cuda.current_stream(self.device)
        if self._onload.wait(layer, step._stream):
            self._loaded()

    def finish(self, step: Step) -> None:
        """End a step whose work is enqueued on the current stream: store whole new chunks on the host.

        What a step holds is given back when its copies are done.
        """
        if self._store is None:
            self.table.release(step._hold)
            return
        self._load_all()
        copies = self._chunks_to_store(step)
        leases = [lease for lease, _ in copies]
        if self._out is None:
            if copies:
                began = time.perf_counter_ns()
                self._offload(copies)
                self.counts["offload_ns"] += time.perf_counter_ns() - began
            self._give_back(leases)
            self.table.release(step._hold)
            return
        computed = self._events.record(step._stream or torch.cuda.current_stream(self.device))
        if copies:
            self._out.wait_event(computed)
            self._events.give_back(computed)
            span = self._events.span()
            span.begun.record(self._out)
            self._offload(copies)
            span.done.record(self._out)
            self._stored.update((lease.user, span.done) for lease in leases)
            self._transfers.append(_Transfer(span.done, leases, step._hold, "offload_ns", span))
        else:
            self._transfers.append(_Transfer(computed, (), step._hold))
        self._count()

    def drain(self) -> None:
        """Wait for every copy and give back what they held."""
        self._load_all()
        self._collect(wait=True)
        self._count()

    def rewind(self, user: int, on_device: int, on_host: int) -> None:
        """Forget what a user has beyond so many tokens, here and in the store; waits for copies of this user's.

        For repeating a step as if it had not been. Pages that stay hold what they held.
        """
        self._load_all()
        while any(transfer.of(user) for transfer in self._transfers):
            self._transfers[0].done.synchronize()
            self._collect(wait=False)
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

    def _leases(self, users: Sequence[int], totals: Sequence[int]) -> dict[int, Lease]:
        """What the host has of users who have nothing on the device, by their index in the step."""
        store, tokens = self._store, self.table.tokens
        assert store is not None
        return {
            index: store.read(user)
            for index, (user, total) in enumerate(zip(users, totals, strict=True))
            if not tokens(user) and 0 < store.tokens(user) <= total
        }

    def _bring(self, leases: dict[int, Lease], page_offsets: npt.NDArray[np.int32], page_ids: Pages) -> None:
        """Copy leased chunks into their users' pages, layer by layer."""
        held = list(leases.values())
        counts = [self._pages(lease) for lease in held]
        begins = [int(page_offsets[index]) for index in leases]
        chunks = np.concatenate([lease.addresses for lease in held])
        pages = np.concatenate([page_ids[begin : begin + n] for begin, n in zip(begins, counts, strict=True)])
        self.counts["onloaded_users"] += len(held)
        self.counts["onloaded_bytes"] += len(pages) * self.sizes.page_size * self.sizes.token_bytes
        if self._onload.stream is None:
            began = time.perf_counter_ns()
            self._onload.start(chunks, pages)
            self.counts["onload_ns"] += time.perf_counter_ns() - began
            self._give_back(held)
            return
        # nobody else can still read these pages: a step's users keep theirs until its work is done
        stored = [event for lease in held if (event := self._stored.get(lease.user)) is not None]
        span = self._events.span()
        self._loading = held, span
        self._onload.start(chunks, pages, span, stored)
        if not self._onload.under_way:
            self._loaded()

    def _loaded(self) -> None:
        """All copies of a step are enqueued: what they read may go once they are done."""
        if self._loading is not None:
            leases, span = self._loading
            self._transfers.append(_Transfer(span.done, leases, None, "onload_ns", span))
            self._loading = None

    def _load_all(self) -> None:
        """Enqueue what is left of a step's copies: the next ones have other pages."""
        if self._loading is not None and self._onload.advance(self.sizes.layers):
            self._loaded()

    def _chunks_to_store(self, step: Step) -> list[tuple[Lease, Pages]]:
        """Room on the host for each user's whole chunks that are not stored yet, and the pages that go there."""
        found: list[tuple[Lease, Pages]] = []
        store = self._store
        assert store is not None
        for index, (user, total) in enumerate(zip(step.users, step.totals, strict=True)):
            missing = total // store.chunk_tokens - store.tokens(user) // store.chunk_tokens
            if missing <= 0:
                continue
            lease = store.room(user, missing)
            if lease is None:
                self.counts["chunks_not_stored"] += missing
                continue
            begin = int(step.page_offsets[index]) + lease.first * self._chunk_pages
            found.append((lease, step.page_ids[begin : begin + self._pages(lease)]))
            self.counts["offloaded_bytes"] += missing * store.chunk_tokens * self.sizes.token_bytes
            self.counts["offloaded_chunks"] += missing
        return found

    def _offload(self, copies: Sequence[tuple[Lease, Pages]]) -> None:
        """Copy pages, all layers, into the chunks of their leases."""
        self._storer.take(
            np.concatenate([lease.addresses for lease, _ in copies]), np.concatenate([pages for _, pages in copies])
        )
        self._storer.all_layers()

    def _tokens(self, lease: Lease) -> int:
        return self._pages(lease) * self.sizes.page_size

    def _pages(self, lease: Lease) -> int:
        return len(lease.addresses) * self._chunk_pages

    def _give_back(self, leases: Iterable[Lease]) -> None:
        for lease in leases:
            assert self._store is not None
            self._store.give_back(lease)

    def _collect(self, wait: bool) -> None:
        """Give back what finished work held; with `wait`, of all of it."""
        left = []
        for transfer in self._transfers:
            done = transfer.done
            if wait:
                done.synchronize()
            if not done.query():
                left.append(transfer)
                continue
            for lease in transfer.leases:
                if self._stored.get(lease.user) is done:
                    del self._stored[lease.user]
            self._give_back(transfer.leases)
            if transfer.hold is not None:
                self.table.release(transfer.hold)
            if transfer.span is None:
                self._events.give_back(done)
            else:
                self._over.append((transfer.counter, transfer.span))
        self._transfers = left

    def _count(self) -> None:
        """Add up how long finished copies took."""
        for counter, span in self._over:
            self.counts[counter] += span.nanoseconds()
            self._events.give_back(span)
        self._over.clear()
