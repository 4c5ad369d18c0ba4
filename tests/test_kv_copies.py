"""Pages move to where they belong however they lie, and neighbours on both sides by one copy."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from smbench_kernels import kv_driver
from smbench_kernels.kv_cache import KVCache
from smbench_kernels.kv_copies import Mover
from smbench_kernels.kv_store import PinnedStore, Sizes

LAYERS, CHUNKS, CHUNK_PAGES, WORDS = 3, 4, 3, 4
PAGES = CHUNKS * CHUNK_PAGES + 2


@given(st.permutations(range(PAGES)), st.permutations(range(CHUNKS)), st.integers(1, CHUNKS), st.booleans())
@settings(max_examples=60, deadline=None)
def test_pages_move_to_where_they_belong(order: list[int], chunks: list[int], count: int, to_host: bool) -> None:
    pool = torch.arange(LAYERS * PAGES * WORDS, dtype=torch.float32).view(LAYERS, PAGES, WORDS)
    store = -1 - torch.arange(CHUNKS * LAYERS * CHUNK_PAGES * WORDS, dtype=torch.float32)
    store = store.view(CHUNKS, LAYERS, CHUNK_PAGES, WORDS)
    source, target = (pool, store) if to_host else (store, pool)
    expected, before = target.clone(), source.clone()
    chosen, ids = chunks[:count], order[: count * CHUNK_PAGES]
    for index, page in enumerate(ids):
        place = (chosen[index // CHUNK_PAGES], slice(1, None), index % CHUNK_PAGES)
        if to_host:
            expected[place] = pool[1:, page]
        else:
            expected[1:, page] = store[place]
    mover = Mover(pool, CHUNK_PAGES, to_host)
    mover.take(np.array([store[chunk].data_ptr() for chunk in chosen], np.int64), np.array(ids, np.int32))
    for layer in range(1, LAYERS):
        mover.layer(layer)
    assert torch.equal(target, expected) and torch.equal(source, before)
    mover.all_layers()
    assert not torch.equal(target, expected)


@pytest.mark.parametrize(
    ("ids", "copies"),
    [
        ([0, 1, 2, 3, 4, 5], 2),
        ([0, 1, 2, 4, 5, 6], 2),
        ([5, 4, 3, 2, 1, 0], 6),
        ([7, 8, 2, 3, 4, 5], 3),
        ([3, 4, 5], 1),
    ],
)
def test_neighbours_on_both_sides_are_one_copy(ids: list[int], copies: int) -> None:
    """A chunk's layers lie between its pages and those of the next, so a run ends with its chunk."""
    pool, store = torch.zeros((LAYERS, PAGES, WORDS)), torch.ones((CHUNKS, LAYERS, CHUNK_PAGES, WORDS))
    mover = Mover(pool, CHUNK_PAGES, to_host=False)
    mover.take(
        np.array([chunk.data_ptr() for chunk in store[: len(ids) // CHUNK_PAGES]], np.int64), np.array(ids, np.int32)
    )
    assert mover._lists is not None and mover._lists.count == copies
    mover.all_layers()
    assert sorted(pool[0, :, 0].nonzero().flatten().tolist()) == sorted(ids) and pool.sum() == LAYERS * len(ids) * WORDS


def test_the_driver_is_given_the_lists_of_the_layers_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the driver reads them: three lists of 64-bit numbers at addresses, here over memory of the host."""
    streams = []

    def copy_all(sources: int, targets: int, sizes: int, count: int, stream: int) -> None:
        streams.append(stream)
        lists = [(ctypes.c_int64 * count).from_address(address) for address in (sources, targets, sizes)]
        for source, target, size in zip(*lists, strict=True):
            ctypes.memmove(target, source, size)

    monkeypatch.setattr(kv_driver, "copy_all", copy_all)
    pool, store = torch.zeros((LAYERS, PAGES, WORDS)), torch.randn((CHUNKS, LAYERS, CHUNK_PAGES, WORDS))
    stream: Any = SimpleNamespace(cuda_stream=7)
    mover = Mover(pool, CHUNK_PAGES, to_host=False, stream=stream)
    mover.take(np.array([store[3].data_ptr(), store[1].data_ptr()], np.int64), np.array([4, 5, 9, 0, 2, 3], np.int32))
    mover.layer(1)
    expected = torch.zeros_like(pool)
    expected[1, [4, 5, 9, 0, 2, 3]] = torch.cat([store[3, 1], store[1, 1]])
    assert torch.equal(pool, expected)
    mover.all_layers()
    expected[:, [4, 5, 9, 0, 2, 3]] = torch.cat([store[3], store[1]], dim=1)
    assert torch.equal(pool, expected) and streams == [7, 7]


def test_what_a_user_comes_back_with_are_copies_of_whole_chunks() -> None:
    sizes = Sizes(layers=2, heads=2, head_dim=4, page_size=4, dtype=torch.float32)
    cache = KVCache(sizes, 24, torch.device("cpu"), PinnedStore(sizes, 12, 16, pinned=False))
    cache.finish(cache.begin([1, 2], [40, 33]))
    cache.finish(cache.begin([3], [64]))
    step = cache.begin([1], [48])
    assert (step.sources, step.cached, step.evicted) == (["host"], [32], [3])
    lists = cache._onload._mover._lists
    assert lists is not None and lists.count == 2
