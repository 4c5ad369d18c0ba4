"""Inference over a cache gives what the whole sequence at once gives, and padding of graphs loses nothing."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from smbench_kernels import hstu
from smbench_kernels.hstu_block import Block, block_reference
from smbench_kernels.hstu_graphs import HostBatch, PaddedShape, empty_batch, smallest
from smbench_kernels.kv_cache import KVCache, Step
from smbench_kernels.kv_store import PinnedStore, Sizes

CPU = torch.device("cpu")
SHAPE = hstu.Shape(embedding=12, heads=2, head_dim=8)
SIZES = Sizes(layers=2, heads=2, head_dim=8, page_size=4, dtype=torch.float64)
LONGEST = 64


def block_of(seed: int) -> Block:
    layers = [hstu.parameters(SHAPE, seed + i, CPU, torch.float64) for i in range(SIZES.layers)]
    return Block(SHAPE, layers)


def host_batch(step: Step, targets: int) -> HostBatch:
    rows = [total - cached + targets for total, cached in zip(step.totals, step.cached, strict=True)]
    return HostBatch(
        np.cumsum([0, *rows], dtype=np.int32),
        np.full(len(rows), targets, np.int32),
        np.array(step.totals, np.int32),
        step.page_offsets,
        step.page_ids,
    )


def at_once(block: Block, x: torch.Tensor, targets: int) -> torch.Tensor:
    """The layer of the training side on one whole sequence, as deep as the block."""
    jagged = hstu.Jagged(
        torch.tensor([0, len(x)], dtype=torch.int32), LONGEST, torch.tensor([targets], dtype=torch.int32)
    )
    for params in block.layers:
        x = hstu.layer_reference(x, params, jagged, SHAPE)
    return x


@pytest.mark.parametrize("chunks", [0, 16])
def test_steps_over_a_cache_equal_whole_sequences(chunks: int, seed: int) -> None:
    """Three users over four rounds on a device that holds two: cached, onloaded or computed anew, all the same."""
    torch.manual_seed(seed)
    block, targets = block_of(seed), 3
    store = PinnedStore(SIZES, chunks, 8, pinned=False) if chunks else None
    cache = KVCache(SIZES, 16, CPU, store)
    histories = {user: torch.randn((32, SHAPE.embedding), dtype=torch.float64) for user in range(3)}
    sources: set[str] = set()
    for round_index in range(1, 5):
        for users in ([0, 1], [2]):
            totals = [7 * round_index + user for user in users]
            step = cache.begin(users, totals)
            sources.update(step.sources)
            wanted = torch.randn((len(users), targets, SHAPE.embedding), dtype=torch.float64)
            x = torch.cat(
                [
                    torch.cat([histories[user][cached:total], candidates])
                    for user, cached, total, candidates in zip(users, step.cached, totals, wanted, strict=True)
                ]
            )
            batch = host_batch(step, targets).batch(SIZES.page_size, len(x), LONGEST, CPU)
            y = block(x, batch, cache.pool, partial(cache.wait, step))
            cache.finish(step)
            for index, (user, total) in enumerate(zip(users, totals, strict=True)):
                whole = at_once(block, torch.cat([histories[user][:total], wanted[index]]), targets)
                rows = y[int(batch.offsets[index]) : int(batch.offsets[index + 1])]
                torch.testing.assert_close(rows, whole[-len(rows) :])
    assert sources == ({"none", "device", "host"} if chunks else {"none", "device"})


def test_truth_and_block_agree(seed: int) -> None:
    torch.manual_seed(seed)
    block = block_of(seed)
    cache = KVCache(SIZES, 8, CPU)
    step = cache.begin([5], [9])
    x = torch.randn((11, SHAPE.embedding), dtype=torch.float64)
    batch = host_batch(step, 2).batch(SIZES.page_size, len(x), LONGEST, CPU)
    truth = block_reference(block, x, batch, torch.zeros_like(cache.pool))
    torch.testing.assert_close(block(x, batch, cache.pool), truth)


def test_a_padded_batch_is_the_step_and_nothing_else(seed: int) -> None:
    torch.manual_seed(seed)
    block = block_of(seed)
    small, padded = KVCache(SIZES, 16, CPU), KVCache(SIZES, 16, CPU)
    step, same = small.begin([1, 2], [9, 5]), padded.begin([1, 2], [9, 5])
    x = torch.randn((18, SHAPE.embedding), dtype=torch.float64)
    plain = block(x, host_batch(step, 2).batch(SIZES.page_size, 11, LONGEST, CPU), small.pool)
    batch = empty_batch(PaddedShape(4, 16), SIZES.page_size, LONGEST, CPU)
    host_batch(same, 2).fill(batch)
    rows = torch.full((64, SHAPE.embedding), 1e3, dtype=torch.float64)
    rows[:18] = x
    torch.testing.assert_close(block(rows, batch, padded.pool)[:18], plain)
    assert torch.equal(small.pool, padded.pool)
    # and what the buffers held before is gone
    again = padded.begin([3], [1])
    host_batch(again, 0).fill(batch)
    assert [sequence.new for sequence in batch.sequences()] == [1, 0, 0, 0]


def test_the_smallest_shape_that_holds_a_step() -> None:
    shapes = [PaddedShape(batch, rows) for batch in (1, 2, 8) for rows in (384, 1024)]
    assert smallest(shapes, 1, 384, 384) == PaddedShape(1, 384)
    assert smallest(shapes, 2, 385, 500) == PaddedShape(2, 1024)
    assert smallest(shapes, 3, 10, 30) == PaddedShape(8, 384)
    with pytest.raises(ValueError, match="no graph holds 9 sequences of 10 rows; captured: 1x384, 1x1024, 2x384"):
        smallest(shapes, 9, 10, 90)


def test_more_pages_than_a_graph_has_room_for_are_refused() -> None:
    batch = empty_batch(PaddedShape(1, 8), 4, 8, CPU)
    one, two = np.zeros(1, np.int32), np.zeros(2, np.int32)
    many = HostBatch(two, one, one, two, np.zeros(3, np.int32))
    with pytest.raises(ValueError, match="3 pages do not fit the 2 of the graph"):
        many.fill(batch)
