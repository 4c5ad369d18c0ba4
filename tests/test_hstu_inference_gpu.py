"""On a GPU: the paged kernels, the block, graphs and copies beside compute give what whole histories give.

Also when users are evicted while their chunks are under way, and whatever was in the pages before.
"""

from __future__ import annotations

import random
import sys

import numpy as np
import pytest
import torch

from smbench_kernels import hstu
from smbench_kernels import hstu_paged_attention as paged
from smbench_kernels.hstu_block import Block, widened
from smbench_kernels.hstu_graphs import Graphs, HostBatch, PaddedShape
from smbench_kernels.hstu_paged import append_reference, paged_attention_reference
from smbench_kernels.kv_cache import KVCache, Step
from smbench_kernels.kv_store import PinnedStore, Sizes
from smbench_kernels.op import Point
from smbench_kernels.registry import op as find_op

pytestmark = pytest.mark.gpu
SHAPE = hstu.Shape(embedding=256, heads=2, head_dim=64)
SIZES = Sizes(layers=3, heads=2, head_dim=64, page_size=32, dtype=torch.bfloat16)
LONGEST = 768
ROUNDING = 2e-2
"""Relative, of three layers in bfloat16."""


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


@pytest.fixture
def seed() -> int:
    value = random.randrange(2**31)
    sys.stderr.write(f"seed {value}\n")
    torch.manual_seed(value)
    return value


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def block_of(seed: int) -> Block:
    layers = [hstu.parameters(SHAPE, seed + i, device(), torch.bfloat16) for i in range(SIZES.layers)]
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
    """A whole sequence in float64, which knows no cache."""
    wanted = torch.tensor([targets], dtype=torch.int32, device=device())
    jagged = hstu.Jagged(torch.tensor([0, len(x)], dtype=torch.int32, device=device()), LONGEST, wanted)
    y = x.double()
    for params in widened(block, torch.float64).layers:
        y = hstu.layer_reference(y, params, jagged, SHAPE)
    return y


CASES = {
    "cached, new and candidates": [(300, 70, 40), (64, 128, 256), (1, 1, 1)],
    "nothing cached": [(0, 200, 30), (0, 1, 0)],
    "candidates only": [(333, 0, 17)],
    "empty sequences": [(0, 0, 0), (40, 3, 2), (0, 0, 5), (0, 0, 0)],
}


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (80, torch.float16), (256, torch.bfloat16)])
@pytest.mark.parametrize("case", CASES)
def test_paged_attention_is_its_definition(
    case: str, head_dim: int, dtype: torch.dtype, page_size: int, seed: int
) -> None:
    sequences = CASES[case]
    totals = [cached + new for cached, new, _ in sequences]
    pages = [-(-total // page_size) for total in totals]
    rows = [new + targets for _, new, targets in sequences]
    ids = torch.randperm(sum(pages) + 3)[: sum(pages)].int().numpy()
    host = HostBatch(
        np.cumsum([0, *rows], dtype=np.int32),
        np.array([targets for *_, targets in sequences], np.int32),
        np.array(totals, np.int32),
        np.cumsum([0, *pages], dtype=np.int32),
        ids,
    )
    batch = host.batch(page_size, max(1, *rows), LONGEST, device())
    heads = 2
    v, q, k = torch.randn((sum(rows) + 5, 3 * heads * head_dim), device=device()).to(dtype).split(heads * head_dim, 1)
    v, q, k = (part.unflatten(1, (heads, head_dim)) for part in (v, q, k))
    cache = torch.randn((sum(pages) + 3, 2, page_size, heads, head_dim), device=device()).to(dtype)
    truth = cache.double()
    append_reference(truth, k.double(), v.double(), batch)
    expected = paged_attention_reference(q.double(), k.double(), v.double(), truth, batch, head_dim**-0.5)
    paged.append(cache, k, v, batch)
    torch.testing.assert_close(cache.double(), truth, rtol=0, atol=0)
    out = torch.full_like(q, 7.0)
    paged.attend(q, k, v, cache, batch, head_dim**-0.5, out=out)
    assert error(out[: sum(rows)], expected[: sum(rows)]) < 1e-2
    assert bool((out[sum(rows) :] == 7.0).all())


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("overlap", [False, True])
def test_users_evicted_while_copies_are_under_way_lose_nothing(overlap: bool, graphs: bool, seed: int) -> None:
    """Eight users on a device that holds three: each round chunks go out, come in, and others make room for them."""
    order = random.Random(seed)
    block, targets, users = block_of(seed), 24, 8
    per_user = LONGEST // SIZES.page_size
    store = PinnedStore(SIZES, users * per_user, 64, pinned=True)
    cache = KVCache(SIZES, 3 * per_user, device(), store, overlap)
    # whatever was never written is no number
    cache.pool.fill_(torch.nan)
    torch.cuda.synchronize()
    captured = Graphs(block, cache.pool, SIZES.page_size, LONGEST)
    if graphs:
        captured.capture(PaddedShape(2, LONGEST), torch.bfloat16)
    histories = torch.randn((users, LONGEST, SHAPE.embedding), device=device()).to(torch.bfloat16)
    totals = dict.fromkeys(range(users), 0)
    checks: list[tuple[torch.Tensor, torch.Tensor]] = []
    sources: set[str] = set()
    for _ in range(24):
        chosen = order.sample(range(users), 2)
        for user in chosen:
            totals[user] = min(LONGEST - targets, totals[user] + order.choice([1, 96, 130, 225]))
        step = cache.begin(chosen, [totals[user] for user in chosen])
        sources.update(step.sources)
        wanted = torch.randn((2, targets, SHAPE.embedding), device=device()).to(torch.bfloat16)
        parts = [
            torch.cat([histories[user, cached : totals[user]], candidates])
            for user, cached, candidates in zip(chosen, step.cached, wanted, strict=True)
        ]
        x, host = torch.cat(parts), host_batch(step, targets)

        def wait(layer: int, step: Step = step) -> None:
            cache.wait(step, layer)

        if graphs:
            y = captured.run(x, host, wait).clone()
        else:
            longest = max(len(part) for part in parts)
            y = block(x, host.batch(SIZES.page_size, longest, LONGEST, device()), cache.pool, wait)
        # nothing here waits for the device: the next step evicts while this one's copies are on their way
        cache.finish(step)
        for rows, user, candidates in zip(y.split([len(part) for part in parts]), chosen, wanted, strict=True):
            checks.append((rows, torch.cat([histories[user, : totals[user]], candidates])))
    cache.drain()
    for rows, whole in checks:
        assert error(rows, at_once(block, whole, targets)[-len(rows) :]) < ROUNDING
    counts = cache.counts
    assert sources == {"none", "device", "host"} and counts["evicted_users"] > 5
    assert counts["onload_ns"] > 0 and counts["offload_ns"] > 0
    assert cache.table.leaving_pages == 0


def test_graphs_by_layer_and_of_all_layers_agree_with_single_kernels(seed: int) -> None:
    block = block_of(seed)
    caches = [KVCache(SIZES, 64, device()) for _ in range(3)]
    graphs = [Graphs(block, cache.pool, SIZES.page_size, LONGEST) for cache in caches[1:]]
    for one in graphs:
        for shape in (PaddedShape(1, 128), PaddedShape(4, 384)):
            one.capture(shape, torch.bfloat16)
    for users, totals, targets in (([1], [100], 20), ([1, 2, 3], [150, 300, 7], 60)):
        steps = [cache.begin(users, totals) for cache in caches]
        host = host_batch(steps[0], targets)
        x = torch.randn((int(host.offsets[-1]), SHAPE.embedding), device=device()).to(torch.bfloat16)
        longest = int(np.diff(host.offsets).max())
        plain = block(x, host.batch(SIZES.page_size, longest, LONGEST, device()), caches[0].pool)
        whole = graphs[0].run(x, host_batch(steps[1], targets))
        layers = graphs[1].run(x, host_batch(steps[2], targets), lambda _layer: None)
        assert error(whole, plain) < 5e-3 and torch.equal(whole, layers)
        for cache, step in zip(caches, steps, strict=True):
            cache.finish(step)


POINT: Point = {
    **{"batch": 3, "total": 512, "new": 128, "targets": 40, "source": "device", "page_size": 32, "max_seqlen": 640},
    **{"layers": 2, "embedding": 256, "heads": 2, "head_dim": 128, "dtype": "bfloat16"},
}
OPERATIONS = [
    *(("hstu_block", provider, "device") for provider in ("recompute", "cache", "cache-graph")),
    *(("hstu_block", provider, "host") for provider in ("cache", "cache-graph", "cache-graph-serial")),
    *(("hstu_request", provider, "device") for provider in ("cache", "cache-graph")),
    *(("hstu_request", provider, "host") for provider in ("cache", "cache-graph", "cache-graph-serial")),
    *(("hstu_request", provider, "nowhere") for provider in ("recompute", "cache", "cache-graph")),
]


@pytest.mark.parametrize(("name", "provider", "source"), OPERATIONS)
def test_every_provider_gives_what_whole_histories_give(name: str, provider: str, source: str, seed: int) -> None:
    point = {**POINT, "source": source, **({"chunk_tokens": 128} if name == "hstu_request" else {})}
    operation = find_op(name)
    inputs = operation.make_inputs(point, seed, device())
    expected = operation.expected(point, inputs)["y"]
    with torch.cuda.stream(torch.cuda.Stream(device())):
        prepared = operation.provider(provider)(point, inputs)
        prepared.begin()
        for _ in range(4):
            inputs["y"].fill_(torch.nan)
            prepared.run()
            torch.cuda.synchronize()
            assert error(inputs["y"], expected) < operation.tolerance(point).relative
        counts = prepared.counts()
    assert counts["attended_tokens"] == counts["steps"] * 3 * 512 == 4 * 3 * 512
    if source == "host":
        assert counts["onloaded_bytes"] == 4 * 3 * 384 * 2 * 2 * 2 * 128 * 2
        assert counts["onload_ns"] > 0


def test_bookkeeping_fills_the_devices_page_table() -> None:
    operation = find_op("hstu_bookkeeping")
    point: Point = {"batch": 4, "users": 40, "total": 256, "new": 64, "targets": 8, "page_size": 32}
    inputs = operation.make_inputs(point, 0, device())
    prepared = operation.provider("cache")(point, inputs)
    prepared.begin()
    for _ in range(12):
        prepared.run()
    prepared.finish()
    assert inputs["y"].tolist() == operation.expected(point, inputs)["y"].tolist()
