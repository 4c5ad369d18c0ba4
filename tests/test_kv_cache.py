"""The cache with its host store: a step finds in its pages what earlier steps put there, wherever it was since."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smbench_kernels.hstu_paged import PagedBatch, append_reference
from smbench_kernels.kv_cache import KVCache, Step
from smbench_kernels.kv_onload import AHEAD
from smbench_kernels.kv_pages import CacheFull
from smbench_kernels.kv_staging import Slot, Staging
from smbench_kernels.kv_store import PinnedStore, Sizes

SIZES = Sizes(layers=2, heads=2, head_dim=4, page_size=4, dtype=torch.float32)
CPU = torch.device("cpu")
CHUNK = 8


def cache_of(pages: int, chunks: int = 0) -> KVCache:
    store = PinnedStore(SIZES, chunks, CHUNK, pinned=False) if chunks else None
    return KVCache(SIZES, pages, CPU, store)


def keys(user: int, first: int, last: int, layer: int) -> torch.Tensor:
    """Rows that name their user, token and layer: [tokens, heads, head_dim]."""
    rows = torch.arange(first, last, dtype=torch.float32)[:, None, None] + 1000 * user + 1e6 * layer
    return rows.expand(-1, SIZES.heads, SIZES.head_dim)


def write(cache: KVCache, step: Step) -> None:
    """Append the new history of a step in all layers; values are the keys' negatives."""
    news = [total - cached for total, cached in zip(step.totals, step.cached, strict=True)]
    offsets = torch.tensor([0, *news], dtype=torch.int32).cumsum(0).int()
    batch = PagedBatch(
        offsets,
        torch.zeros(len(news), dtype=torch.int32),
        torch.tensor(step.totals, dtype=torch.int32),
        torch.from_numpy(step.page_offsets),
        torch.from_numpy(step.page_ids),
        SIZES.page_size,
        max(news),
        1,
    )
    for layer in range(SIZES.layers):
        cache.wait(step, layer)
        parts = zip(step.users, step.cached, step.totals, strict=True)
        k = torch.cat([keys(user, cached, total, layer) for user, cached, total in parts])
        append_reference(cache.pool[layer], k, -k, batch)


def assert_whole(cache: KVCache, step: Step) -> None:
    """Every token of every user of a step is where the step says, in every layer."""
    for index, (user, total) in enumerate(zip(step.users, step.totals, strict=True)):
        pages = step.page_ids[step.page_offsets[index] : step.page_offsets[index + 1]]
        for layer in range(SIZES.layers):
            held = cache.pool[layer, torch.from_numpy(pages).long()]
            for part, sign in ((0, 1), (1, -1)):
                assert torch.equal(held[:, part].flatten(0, 1)[:total], sign * keys(user, 0, total, layer))


def run(cache: KVCache, users: list[int], totals: list[int]) -> Step:
    step = cache.begin(users, totals)
    write(cache, step)
    assert_whole(cache, step)
    cache.finish(step)
    return step


STEPS = st.lists(
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 9)), min_size=1, max_size=3, unique_by=lambda row: row[0]),
    min_size=1,
    max_size=25,
)


@given(STEPS, st.integers(12, 24), st.sampled_from([0, 4, 9]))
@settings(max_examples=120, deadline=None)
def test_every_step_finds_its_users_histories_whole(
    steps: list[list[tuple[int, int]]], pages: int, chunks: int
) -> None:
    cache = cache_of(pages, chunks)
    histories: dict[int, int] = {}
    for rows in steps:
        users = [user for user, _ in rows]
        totals = [histories.get(user, 0) + more for user, more in rows]
        # the device cannot hold more than its pages: such a step is refused whole
        if sum(-(-total // SIZES.page_size) for total in totals) > pages:
            with pytest.raises(CacheFull):
                cache.begin(users, totals)
            continue
        step = run(cache, users, totals)
        histories.update(zip(users, totals, strict=True))
        for source, cached, before in zip(step.sources, step.cached, step.totals, strict=True):
            assert (source == "none") == (cached == 0)
            assert cached <= before
    assert cache.table.leaving_pages == 0
    owned = sum(len(cache.table.pages_of(user)) for user in cache.table)
    assert owned + cache.table.free_pages == pages


def test_a_user_who_lost_the_device_comes_back_from_the_host_in_whole_chunks() -> None:
    cache = cache_of(pages=6, chunks=8)
    run(cache, [1], [21])
    run(cache, [2], [24])
    assert 1 not in cache.table
    step = run(cache, [1], [23])
    # two chunks of eight were whole, the five tokens after them were lost with the pages
    assert (step.sources, step.cached, step.evicted) == (["host"], [16], [2])
    assert cache.counts["onloaded_bytes"] == 16 * SIZES.token_bytes
    assert cache.counts["offloaded_bytes"] == (16 + 24) * SIZES.token_bytes
    assert cache.counts["evicted_users"] == 2


def test_without_a_host_a_lost_user_begins_anew() -> None:
    cache = cache_of(pages=4)
    run(cache, [1], [16])
    run(cache, [2], [16])
    step = run(cache, [1], [16])
    assert (step.sources, step.cached) == (["none"], [0])


def test_a_host_without_room_is_counted_and_does_no_harm() -> None:
    cache = cache_of(pages=16, chunks=2)
    run(cache, [1], [40])
    assert cache.counts["chunks_not_stored"] == 5
    assert cache.counts["offloaded_bytes"] == 0
    assert run(cache, [1], [41]).sources == ["device"]


def test_a_step_that_does_not_fit_leaves_everything_as_it_was() -> None:
    cache = cache_of(pages=4, chunks=4)
    run(cache, [1], [16])
    running = cache.begin([2], [8])
    # user 2's pages are in use, and user 3 needs three of four
    with pytest.raises(CacheFull, match="pages of 4 tokens are missing"):
        cache.begin([3], [12])
    assert list(cache.table) == [2]
    write(cache, running)
    cache.finish(running)
    assert run(cache, [3], [12]).evicted == [2]


def test_chunks_are_whole_pages() -> None:
    with pytest.raises(ValueError, match="10 tokens is no whole number of pages of 4"):
        PinnedStore(SIZES, 4, 10, pinned=False)


class LateEvent:
    """An event of a device that is sometimes done and sometimes not yet, until somebody waits for it."""

    order = random.Random()

    def __init__(self, enable_timing: bool = False) -> None:
        self.timing, self.waited = enable_timing, False

    def record(self, stream: LateStream) -> None:
        assert isinstance(stream, LateStream)
        self.waited = False

    def query(self) -> bool:
        self.waited = self.waited or self.order.random() < 0.3
        return self.waited

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, other: LateEvent) -> float:
        assert self.timing and other.timing and other.waited
        return 0.5


class LateStream:
    """A stream whose work is done when it is enqueued, and says so later."""

    def __init__(self, *_sizes: object, **_options: object) -> None:
        self.awaited: list[LateEvent] = []

    def wait_event(self, event: LateEvent) -> None:
        self.awaited.append(event)


@pytest.fixture
def late_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events and streams of a device that is late."""
    for name, value in (("Event", LateEvent), ("Stream", LateStream)):
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _device: LateStream())


def late(cache: KVCache) -> None:
    """As on a device, but over memory of the host."""
    stream: Any = LateStream()
    cache._out = cache._onload.stream = stream


@pytest.mark.usefixtures("late_device")
@pytest.mark.parametrize("chunks", [4, 9, 40])
def test_nothing_is_lost_or_kept_while_copies_are_under_way(chunks: int) -> None:
    """The bookkeeping of a device whose copies are done late, whenever that is; copies themselves are a GPU's test."""
    seed = random.randrange(2**31)
    LateEvent.order = random.Random(seed)
    for pages in range(12, 24):
        cache = cache_of(pages, chunks)
        late(cache)
        histories: dict[int, int] = {}
        for _ in range(25):
            users = LateEvent.order.sample(range(6), LateEvent.order.choice([1, 2, 3]))
            totals = [histories.get(user, 0) + LateEvent.order.randrange(10) for user in users]
            if sum(-(-total // SIZES.page_size) for total in totals) > pages:
                continue
            run(cache, users, totals)
            histories.update(zip(users, totals, strict=True))
            owned = sum(len(cache.table.pages_of(user)) for user in cache.table)
            assert owned + cache.table.free_pages + cache.table.leaving_pages == pages, f"seed {seed}"
        cache.drain()
        assert cache.table.leaving_pages == 0
        # whoever is left is claimed by nobody: all pages can be had at once
        last = cache.begin([100], [pages * SIZES.page_size])
        assert len(last.page_ids) == pages and last.cached == [0], f"seed {seed}"


def test_a_buffer_is_not_written_again_before_its_copy_is_done() -> None:
    staging = Staging(CPU, depth=2)
    slots = [staging.take(8) for _ in range(2)]
    for slot in slots:
        event = LateEvent()
        event.order = random.Random(0)
        slot._copied, slot._pending = event, True  # type: ignore[assignment]
    again = [staging.take(4), staging.take(5000)]
    assert again == slots and all(slot._copied.waited for slot in slots)  # type: ignore[union-attr]
    assert len(slots[1].words) >= 5000
    target = torch.zeros(3, dtype=torch.int32)
    plain = Slot(CPU)
    plain.words[:3] = np.array([4, 5, 6])
    plain.send(target, 3)
    assert target.tolist() == [4, 5, 6]


@pytest.mark.usefixtures("late_device")
def test_a_repeated_step_waits_for_its_own_users_copies_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    never = random.Random()
    monkeypatch.setattr(never, "random", lambda: 1.0)
    LateEvent.order = never
    cache = cache_of(pages=20, chunks=9)
    late(cache)
    for user in (1, 2, 3):
        run(cache, [user], [16])
    cache.rewind(1, 8, 8)
    assert [transfer.of(3) for transfer in cache._transfers] == [False, True]
    assert (cache.table.tokens(1), cache.table.tokens(3)) == (8, 16)
    left = [transfer.done for transfer in cache._transfers]
    assert not any(event.query() for event in left)
    # the host's memory may be somebody else's as soon as the cache is gone
    del cache
    assert left and all(event.query() for event in left)


@pytest.mark.usefixtures("late_device")
@pytest.mark.parametrize("left", ["finish", "another step", "drain"])
def test_a_layers_copies_are_enqueued_some_layers_ahead(left: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enough that the bus has work while the host prepares a layer, and not all before the first layer is enqueued."""
    LateEvent.order = random.Random(0)
    sizes = dataclasses.replace(SIZES, layers=5)
    cache = KVCache(sizes, 20, CPU, PinnedStore(sizes, 9, CHUNK, pinned=False))
    late(cache)
    cache.finish(cache.begin([1], [16]))
    cache.rewind(1, 0, 16)
    copied: list[int] = []
    monkeypatch.setattr(cache._onload._mover, "layer", copied.append)
    step = cache.begin([1], [20])
    assert step.sources == ["host"] and copied == [*range(1 + AHEAD)]
    for layer in range(2):
        cache.wait(step, layer)
        assert copied == [*range(1 + AHEAD + layer)]
    computing: Any = step._stream
    assert computing.awaited == cache._onload._arrived[:2]
    # who stops in the middle leaves nothing behind
    if left == "another step":
        assert cache.begin([2], [4]).sources == ["none"]
    else:
        cache.finish(step) if left == "finish" else cache.drain()
    assert copied == list(range(5))
    cache.drain()
    assert cache._loading is None and not cache._transfers
