"""The kernel that moves pages between a device and chunks on a host moves what the host's own copies move."""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch

from smbench_kernels.kv_copies import Mover, move_call, table_of
from smbench_kernels.kv_staging import fetch_words
from smbench_kernels.launch import Launcher

LAYERS, PAGES, CHUNKS, CHUNK_PAGES = 3, 7, 4, 2


@pytest.mark.parametrize("to_host", [False, True])
@pytest.mark.parametrize("page", [(2, 4, 2, 8), (2, 16, 3, 28)])
def test_the_kernel_moves_what_copies_of_the_host_move(page: tuple[int, ...], to_host: bool) -> None:
    """Pages of one tile and of more, of which the last is not full; programs that have several and none."""
    seed = random.randrange(2**31)
    sys.stderr.write(f"seed {seed}\n")
    generator = torch.Generator().manual_seed(seed)
    pool = torch.randn((LAYERS, PAGES, *page), generator=generator)
    store = torch.randn((CHUNKS, LAYERS, CHUNK_PAGES, *page), generator=generator)
    start, target = (pool, store) if to_host else (store, pool)
    before, source = target.clone(), start.clone()
    mover = Mover(pool, CHUNK_PAGES, to_host)
    ids = torch.randperm(PAGES, generator=generator)[: 3 * CHUNK_PAGES]
    chunks = torch.randperm(CHUNKS, generator=generator)[:3]
    addresses = np.array([store[int(chunk)].data_ptr() for chunk in chunks], np.int64)
    mover.take(addresses, ids.int().numpy())
    mover.layer(1)
    expected = before.clone()
    host = store[chunks].transpose(0, 1).flatten(1, 2)
    if to_host:
        expected[chunks, 1] = pool[1, ids].unflatten(0, (3, CHUNK_PAGES))
    else:
        expected[1, ids] = host[1]
    assert torch.equal(target, expected) and torch.equal(start, source)
    mover.all_layers()
    copied = target.clone()
    page_bytes = pool[0, 0].numel() * pool.itemsize
    hosts = np.concatenate([address + np.arange(CHUNK_PAGES) * page_bytes for address in addresses])
    table = torch.from_numpy(table_of(*mover._ways(hosts, ids.int().numpy()), np.zeros(1 + 2 * len(ids) + 3, np.int64)))
    for programs, launches in ((2, [(1, 1), (0, 1), (2, 1)]), (64, [(0, LAYERS)])):
        target.copy_(before)
        for first, layers in launches:
            Launcher(move_call(table, first, layers, *mover._strides, page_bytes, programs))()
        assert torch.equal(target, copied)
    assert not torch.equal(copied, expected)


def test_pages_that_no_thread_can_read_whole_are_refused() -> None:
    with pytest.raises(ValueError, match="pages of 24 bytes are no multiple of 16"):
        Mover(torch.zeros((1, 2, 2, 1, 1, 3)), 1, to_host=False)


@pytest.mark.parametrize("words", [0, 1, 16, 45])
def test_the_kernel_fetches_the_first_words_and_writes_no_more(words: int) -> None:
    source, target = torch.arange(1, 60, dtype=torch.int32), torch.zeros(60, dtype=torch.int32)
    fetch_words[(2, 1, 1)](source.data_ptr(), target.data_ptr(), words, 16)
    assert target.tolist() == [*range(1, words + 1), *[0] * (60 - words)]
