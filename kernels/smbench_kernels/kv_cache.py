"""The KV cache of an HSTU model: pages on a device keyed by user, chunks on a host, copies between them beside compute.

Owns the page pool, the order of copies and their claims on pages. Page accounting is `kv_pages`', host memory
`kv_store`'s, attention the kernels'. A step goes `begin` (find or bring in what is cached, make room), then for each
layer `wait` and what is computed on it, then `finish` (store whole chunks on the host).

Onload is layer by layer on a stream of its own: layer i waits for its own copy alone, and computes while that of layer
i + 1 runs (document 003, "Asynchronous H2D transfer"). Steps compute on one stream, one after another: pages that go
from one user to another are written after whatever reads them now, and only copies, on streams of their own, need
claims and events.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import numpy as np
import numpy.typing as npt
import torch

from smbench_kernels.kv_copies import Mover
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
    _onloaded: list[torch.cuda.Event] = field(default_factory=list)
    """By layer, as far as its copies are enqueued: after them; empty where nothing was copied, or at once."""


@dataclass(slots=True)
class _Transfer:
    """Work under way on a device, and what must stay as it is until then."""

    done: torch.cuda.Event
    leases: Sequence[Lease]
    holds: Sequence[Hold]
    counter: str = ""
    """Which of the counts its time goes to; empty for a step without copies."""
    begun: torch.cuda.Event | None = None

    def of(self, user: int) -> bool:
        """Whether it keeps anything of a user."""
        return any(lease.user == user for lease in self.leases) or any(hold.user == user for hold in self.holds)


@dataclass(slots=True)
class _Loading:
    """A step whose copies from the host are not all enqueued."""

    step: Step
    leases: Sequence[Lease]
    begun: torch.cuda.Event


class _Events:
    """Events to be used again: making one costs as much as recording it."""

    def __init__(self) -> None:
        self._free: dict[bool, list[torch.cuda.Event]] = {False: [], True: []}

    def record(self, stream: torch.cuda.Stream, timing: bool = False) -> torch.cuda.Event:
        """An event after what is enqueued on a stream."""
        free = self._free[timing]
        event = free.pop() if free else torch.cuda.Event(enable_timing=timing)
        event.record(stream)
        return event

    def give_back(self, event: torch.cuda.Event, timing: bool = False) -> None:
        """Nobody will ask for it again; streams that were told to wait for it wait for what it was."""
        self._free[timing].append(event)


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
        self._in = self._out = None
        self._transfers: list[_Transfer] = []
        self._events = _Events()
        # the last copy of a user's chunks to the host: whoever reads them waits for it
        self._stored: dict[int, torch.cuda.Event] = {}
        self._loading: _Loading | None = None
        if store is None:
            return
        self._chunk_pages = store.chunk_tokens // sizes.page_size
        self._loader = Mover(self.pool, self._chunk_pages, to_host=False)
        self._storer = Mover(self.pool, self._chunk_pages, to_host=True)
        if device.type == "cuda":
            # the few programs of a copy go before those of a layer
            self._in = torch.cuda.Stream(device, priority=-1)
            self._out = torch.cuda.Stream(device, priority=-1)
            for stream in (self._in, self._out):
                # the pool and the movers' tables are zeroed before anything is copied
                stream.wait_stream(torch.cuda.current_stream(device))

    def __del__(self) -> None:
        # page-locked memory goes to whoever asks next once nobody names it: not before its copies are done
        for transfer in getattr(self, "_transfers", ()):
            transfer.done.synchronize()
        if (loading := getattr(self, "_loading", None)) is not None:
            for event in loading.step._onloaded:
                event.synchronize()

    def begin(self, users: Sequence[int], totals: Sequence[int]) -> Step:
        """Find what is cached of each user, bring in what the host has, make room for `totals` tokens.

        `totals` counts a user's whole history with what is new in it. CacheFull and ValueError as `PageTable.grow`;
        either leaves the cache as it was.
        """
        self._load_all()
        if self._transfers:
            self._collect(wait=False)
        on_device = [self.table.tokens(user) for user in users]
        leases = self._leases(users, on_device, totals)
        try:
            growth = self._grow(users, totals)
        except (CacheFull, ValueError):
            self._give_back(list(leases.values()))
            raise
        cached, sources = on_device, ["device" if here else "none" for here in on_device]
        if leases:
            cached = list(on_device)
            for index, lease in leases.items():
                cached[index], sources[index] = self._tokens(lease), "host"
        pages = [placement.pages for placement in growth.placements]
        step = Step(
            list(users),
            cached,
            list(totals),
            sources,
            np.array([0, *accumulate(map(len, pages))], np.int32),
            np.concatenate(pages),
            growth.evicted,
            [self.table.hold(user) for user in users],
        )
        counts, found, all_cached = self.counts, sum(on_device), sum(cached)
        counts["steps"] += 1
        counts["device_tokens"] += found
        counts["host_tokens"] += all_cached - found
        counts["new_tokens"] += sum(totals) - all_cached
        counts["evicted_users"] += len(growth.evicted)
        if leases:
            self._onload(step, leases)
        return step

    def wait(self, step: Step, layer: int) -> None:
        """Have the current stream wait until what is cached of a layer lies in its pages.

        To be called for one layer after the other: each call enqueues the copies of the layer behind it. All of them
        beforehand would not fit what a device takes, and would keep the host from enqueueing the first layer.
        """
        if (loading := self._loading) is not None and loading.step is step:
            self._load(loading, min(layer + 2, self.sizes.layers))
        if step._onloaded:
            torch.cuda.current_stream(self.device).wait_event(step._onloaded[layer])

    def finish(self, step: Step) -> None:
        """End a step whose work is enqueued on the current stream: store whole new chunks on the host.

        What a step holds is given back when its copies are done.
        """
        if self._store is None:
            self._release(step._holds)
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
            self._release(step._holds)
            return
        for event in step._onloaded[:-1]:
            # every layer was told to wait for its own; the last one is the transfer's
            self._events.give_back(event)
        computed = self._events.record(torch.cuda.current_stream(self.device))
        if not copies:
            self._transfers.append(_Transfer(computed, (), step._holds))
            return
        self._out.wait_event(computed)
        self._events.give_back(computed)
        begun = self._events.record(self._out, timing=True)
        with torch.cuda.stream(self._out):
            self._offload(copies)
        done = self._events.record(self._out, timing=True)
        self._stored.update((lease.user, done) for lease in leases)
        self._transfers.append(_Transfer(done, leases, step._holds, "offload_ns", begun))

    def drain(self) -> None:
        """Wait for every copy and give back what they held."""
        self._load_all()
        self._collect(wait=True)

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

    def _leases(self, users: Sequence[int], on_device: Sequence[int], totals: Sequence[int]) -> dict[int, Lease]:
        """What the host has of users who have nothing on the device, by their index in the step."""
        store = self._store
        if store is None:
            return {}
        return {
            index: store.read(user)
            for index, (user, here, total) in enumerate(zip(users, on_device, totals, strict=True))
            if not here and 0 < store.tokens(user) <= total
        }

    def _onload(self, step: Step, leases: dict[int, Lease]) -> None:
        """Copy leased chunks into their pages by layer; with `overlap` all but the first when their turn is near."""
        chunks = np.concatenate([lease.addresses for lease in leases.values()])
        begins = {index: int(step.page_offsets[index]) for index in leases}
        pages = np.concatenate([step.page_ids[begins[i] : begins[i] + self._pages(x)] for i, x in leases.items()])
        held = list(leases.values())
        self.counts["onloaded_users"] += len(held)
        self.counts["onloaded_bytes"] += len(pages) * self.sizes.page_size * self.sizes.token_bytes
        if self._in is None:
            began = time.perf_counter_ns()
            self._loader.take(chunks, pages)
            self._loader.all_layers()
            self.counts["onload_ns"] += time.perf_counter_ns() - began
            self._give_back(held)
            return
        # nobody else can still read these pages: a step's users keep theirs until its work is done
        for lease in held:
            if (stored := self._stored.get(lease.user)) is not None:
                self._in.wait_event(stored)
        begun = self._events.record(self._in, timing=True)
        with torch.cuda.stream(self._in):
            self._loader.take(chunks, pages)
        self._loading = loading = _Loading(step, held, begun)
        if self.overlap:
            self._load(loading, 1)
        else:
            self._load_all()
            torch.cuda.current_stream(self.device).wait_event(step._onloaded[-1])

    def _load(self, loading: _Loading, end: int) -> None:
        """Enqueue a step's copies of the layers before `end`, as far as they are not yet."""
        assert self._in is not None
        layers, arrived = self.sizes.layers, loading.step._onloaded
        with torch.cuda.stream(self._in):
            while len(arrived) < end:
                self._loader.layer(len(arrived))
                arrived.append(self._events.record(self._in, timing=len(arrived) + 1 == layers))
        if len(arrived) == layers:
            self._transfers.append(_Transfer(arrived[-1], loading.leases, (), "onload_ns", loading.begun))
            self._loading = None

    def _load_all(self) -> None:
        """Enqueue what is left of a step's copies: the next ones have other pages."""
        if self._loading is not None:
            self._load(self._loading, self.sizes.layers)

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

    def _give_back(self, leases: Sequence[Lease]) -> None:
        for lease in leases:
            assert self._store is not None
            self._store.give_back(lease)

    def _release(self, holds: Sequence[Hold]) -> None:
        for hold in holds:
            self.table.release(hold)

    def _collect(self, wait: bool) -> None:
        """Give back what finished work held; with `wait`, of all of it."""
        left = []
        for transfer in self._transfers:
            done, timing = transfer.done, transfer.begun is not None
            if wait:
                done.synchronize()
            if not done.query():
                left.append(transfer)
                continue
            if transfer.begun is not None:
                self.counts[transfer.counter] += round(transfer.begun.elapsed_time(done) * 1e6)
                self._events.give_back(transfer.begun, timing)
            for lease in transfer.leases:
                if self._stored.get(lease.user) is done:
                    del self._stored[lease.user]
            self._give_back(transfer.leases)
            self._release(transfer.holds)
            self._events.give_back(done, timing)
        self._transfers = left
