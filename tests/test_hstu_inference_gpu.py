"""On a GPU: the paged kernels, the block, graphs and copies beside compute give what whole histories give.

Also when users are evicted while their chunks are under way, and whatever was in the pages before.
"""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch

from smbench_kernels import hstu, hstu_paged_sm90, kv_copy_engine
from smbench_kernels import hstu_paged_attention as paged
from smbench_kernels.hstu_attention_sm90_kernels import HEAD_DIM
from smbench_kernels.hstu_block import Block, widened
from smbench_kernels.hstu_graphs import Graphs, HostBatch, PaddedShape, empty_batch
from smbench_kernels.hstu_paged import PagedBatch, append_reference, paged_attention_reference
from smbench_kernels.kv_cache import KVCache, Step
from smbench_kernels.kv_copies import WAYS, Mover
from smbench_kernels.kv_staging import DEPTH
from smbench_kernels.kv_store import Lease, PinnedStore, Sizes
from smbench_kernels.op import Point
from smbench_kernels.registry import op as find_op

pytestmark = pytest.mark.gpu
SHAPE = hstu.Shape(embedding=256, heads=2, head_dim=64)
# more layers than are copied ahead
SIZES = Sizes(layers=4, heads=2, head_dim=64, page_size=32, dtype=torch.bfloat16)
LONGEST = 768
ROUNDING = 2e-2
"""Relative, of four layers in bfloat16."""


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


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


def paged_batch(
    sequences: list[tuple[int, int, int]], page_size: int, longest: int = LONGEST
) -> tuple[PagedBatch, int]:
    """(cached, new, candidates) of each user over pages in random order, and how many pages there are."""
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
    return host.batch(page_size, max(1, *rows), longest, device()), sum(pages) + 3


@pytest.mark.parametrize("page_size", [16, 32, 128])
@pytest.mark.parametrize(("head_dim", "dtype"), [(64, torch.bfloat16), (80, torch.float16), (256, torch.bfloat16)])
@pytest.mark.parametrize("case", CASES)
def test_paged_attention_is_its_definition(
    case: str, head_dim: int, dtype: torch.dtype, page_size: int, seed: int
) -> None:
    sequences = CASES[case]
    batch, pages = paged_batch(sequences, page_size)
    rows = int(batch.offsets[-1])
    heads = 2
    v, q, k = torch.randn((rows + 5, 3 * heads * head_dim), device=device()).to(dtype).split(heads * head_dim, 1)
    v, q, k = (part.unflatten(1, (heads, head_dim)) for part in (v, q, k))
    cache = torch.randn((pages, 2, page_size, heads, head_dim), device=device()).to(dtype)
    truth = cache.double()
    append_reference(truth, k.double(), v.double(), batch)
    expected = paged_attention_reference(q.double(), k.double(), v.double(), truth, batch, head_dim**-0.5)
    paged.append(cache, k, v, batch)
    torch.testing.assert_close(cache.double(), truth, rtol=0, atol=0)
    out = torch.full_like(q, 7.0)
    paged.attend(q, k, v, cache, batch, head_dim**-0.5, out=out)
    assert error(out[:rows], expected[:rows]) < 1e-2
    assert bool((out[rows:] == 7.0).all())


HOPPER_CASES = {
    **CASES,
    "a document's batch": [(3968, 128, 256)] * 2,
    "long and short": [(2003, 131, 300), (0, 0, 0), (15, 1, 0), (1040, 0, 129), (64, 64, 64), (0, 0, 0)],
    "new rows by the thousand": [(0, 1500, 40), (200, 900, 0)],
    # more strips than a card has multiprocessors, so that none is cut
    "many users": [(100 + 37 * user, 290 - 9 * user, 3 * user) for user in range(30)],
}
HOPPER_ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
LONGEST_ON_HOPPER = 8192


@pytest.mark.parametrize("page_size", hstu_paged_sm90.PAGE_SIZES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", HOPPER_CASES)
def test_hopper_appends_and_attends_in_one_launch(case: str, dtype: torch.dtype, page_size: int, seed: int) -> None:
    """What nobody may see is no number: pages beyond the cached tokens, and rows of no sequence."""
    sequences, heads, head_dim = HOPPER_CASES[case], 4, HEAD_DIM
    batch, pages = paged_batch(sequences, page_size, LONGEST_ON_HOPPER)
    rows = int(batch.offsets[-1])
    uvqk = torch.randn((rows + 70, 4 * heads * head_dim), device=device()).to(dtype)
    uvqk[rows:] = torch.nan
    v, q, k = (part.unflatten(1, (heads, head_dim)) for part in uvqk.split(heads * head_dim, 1)[1:])
    drawn = torch.randn((pages, 2, page_size, heads, head_dim), device=device()).to(dtype)
    cache = torch.full_like(drawn, torch.nan)
    for sequence in batch.sequences():
        token = torch.arange(sequence.cached, device=device())
        at = batch.page_ids[sequence.first_page + token // page_size].long()
        cache[at, :, token % page_size] = drawn[at, :, token % page_size]
    if reason := hstu_paged_sm90.supports(q, k, v, cache, batch):
        pytest.skip(reason)
    truth = cache.double()
    append_reference(truth, k.double(), v.double(), batch)
    expected = paged_attention_reference(q.double(), k.double(), v.double(), truth, batch, 1 / 16)
    workspace = hstu_paged_sm90.Workspace.on(device())
    workspace.sums.fill_(torch.nan)
    found = []
    for appends, dependent in ((True, False), (True, True), (False, False)):
        out = torch.full((rows + 70, heads + 1, head_dim), 7.0, dtype=dtype, device=device())
        hstu_paged_sm90.attend(
            q, k, v, cache, batch, 1 / 16, out[:, 1:], appends=appends, workspace=workspace, dependent=dependent
        )
        found.append(out)
        assert int(workspace.counters.abs().sum()) == 0
    torch.testing.assert_close(cache.double(), truth, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    assert bool((found[0][rows:] == 7.0).all()) and bool((found[0][:, 0] == 7.0).all())
    for sequence in batch.sequences():
        part = slice(sequence.start, sequence.start + sequence.new + sequence.targets)
        if part.stop > part.start:
            # of a few rows the roundings are not averaged
            bound = HOPPER_ERROR[dtype] * (3 if part.stop - part.start < 8 else 1)
            assert error(found[0][part, 1:], expected[part]) < bound


def test_hopper_serves_other_steps_from_one_graph(seed: int) -> None:
    """A graph knows the room for users and rows; lengths, candidates and pages come with each step."""
    heads, head_dim, page_size = 4, HEAD_DIM, 32
    shape = PaddedShape(4, 400)
    batch = empty_batch(shape, page_size, LONGEST_ON_HOPPER, device())
    uvqk = torch.zeros((shape.all_rows, 4 * heads * head_dim), dtype=torch.bfloat16, device=device())
    v, q, k = (part.unflatten(1, (heads, head_dim)) for part in uvqk.split(heads * head_dim, 1)[1:])
    cache = torch.randn((600, 2, page_size, heads, head_dim), device=device()).to(torch.bfloat16)
    if reason := hstu_paged_sm90.supports(q, k, v, cache, batch):
        pytest.skip(reason)
    workspace, out = hstu_paged_sm90.Workspace.on(device()), torch.empty_like(q)

    def step() -> None:
        hstu_paged_sm90.attend(q, k, v, cache, batch, 1 / 16, out, appends=True, workspace=workspace)

    step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for sequences in ([(3968, 128, 256)], [(77, 5, 8), (0, 400, 0), (2000, 1, 399)], [(0, 0, 0)], [(31, 100, 1)] * 4):
        totals = [cached + new for cached, new, _ in sequences]
        pages = np.cumsum([0, *(-(-total // page_size) for total in totals)], dtype=np.int32)
        rows = np.cumsum([0, *(new + targets for _, new, targets in sequences)], dtype=np.int32)
        targets = np.array([targets for *_, targets in sequences], np.int32)
        ids = torch.randperm(600)[: pages[-1]].int().numpy()
        HostBatch(rows, targets, np.array(totals, np.int32), pages, ids).fill(batch)
        uvqk.normal_()
        out.fill_(7.0)
        graph.replay()
        expected = paged_attention_reference(q.double(), k.double(), v.double(), cache.double(), batch, 1 / 16)
        assert bool((out[rows[-1] :] == 7.0).all())
        if rows[-1]:
            assert error(out[: rows[-1]], expected[: rows[-1]]) < HOPPER_ERROR[torch.bfloat16]


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


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("to_host", [False, True])
@pytest.mark.parametrize("page_size", [2, 32, 96])
def test_pages_move_between_host_and_device_to_the_bit(page_size: int, to_host: bool, way: str, seed: int) -> None:
    """Pages of less than a tile and of several; what is not named keeps what it had."""
    if way == "engine" and not kv_copy_engine.works(device()):
        pytest.skip("this driver has no cuMemcpyBatchAsync")
    sizes = Sizes(layers=3, heads=4, head_dim=192, page_size=page_size, dtype=torch.bfloat16)
    chunk_pages, users, pages = 4, 5, 40
    store = PinnedStore(sizes, users, chunk_pages * page_size, pinned=True)
    leases = [store.room(user, 1) for user in range(users)]
    addresses = np.concatenate([lease.addresses for lease in leases if lease])[[3, 0, 4]]
    pool = torch.randn((sizes.layers, pages, *sizes.page_shape), device=device()).to(sizes.dtype)
    # the chunks as one tensor: they lie in one block
    host = store._blocks[0].view(sizes.dtype).view(users, sizes.layers, chunk_pages, *sizes.page_shape)
    host.copy_(torch.randn(host.shape, device=device()).to(sizes.dtype))
    at = {int(lease.addresses[0]): index for index, lease in enumerate(sorted(filter(None, leases), key=_address))}
    chunks = [at[int(address)] for address in addresses]
    ids = torch.randperm(pages)[: len(chunks) * chunk_pages].int()
    expected = (host if to_host else pool).clone()
    for i, chunk in enumerate(chunks):
        own = ids[i * chunk_pages : (i + 1) * chunk_pages].long()
        if to_host:
            expected[chunk] = pool[:, own].cpu()
        else:
            expected[:, own] = host[chunk].to(device())
    torch.cuda.synchronize()
    mover = Mover(pool, chunk_pages, to_host, torch.cuda.Stream(device()), way)
    mover.take(addresses, ids.numpy())
    if to_host:
        mover.all_layers()
    else:
        for layer in range(sizes.layers):
            mover.layer(layer)
    torch.cuda.synchronize()
    assert torch.equal(host if to_host else pool, expected)


def _address(lease: Lease) -> int:
    return int(lease.addresses[0])


@pytest.mark.parametrize("beside_copies", [False, True])
def test_a_step_s_page_table_is_its_own_however_far_the_host_is_ahead(beside_copies: bool) -> None:
    """More steps than buffers on the host, all enqueued behind a kernel that keeps the device busy."""
    batch = empty_batch(PaddedShape(2, 8), 16, 512, device())
    buffer = batch.offsets.as_strided((16 + 2 * 32,), (1,))
    pairs, triples = ([np.full(n, step, np.int32) for step in range(3 * DEPTH)] for n in (2, 3))
    steps = [
        HostBatch(three, two, two, three, np.full(20 + index, index, np.int32))
        for index, (two, three) in enumerate(zip(pairs, triples, strict=True))
    ]
    torch.cuda._sleep(200_000_000)
    found = []
    for step in steps:
        step.fill(batch, beside_copies)
        found.append(buffer.clone())
    for index, (words, step) in enumerate(zip(found, steps, strict=True)):
        used = words[16 : 16 + len(step.page_ids)]
        assert used.tolist() == step.page_ids.tolist() and int(words[0]) == index


def test_a_page_table_does_not_queue_behind_the_copies_of_a_step() -> None:
    """A copy engine takes copies as they were enqueued: a first layer would wait for the copies of the last one."""
    pool = torch.zeros((1, 256, 1 << 21), dtype=torch.uint8, device=device())
    host = torch.ones((1, 256, 1 << 21), dtype=torch.uint8, pin_memory=True)
    batch = empty_batch(PaddedShape(16, 8), 16, 2048, device())
    ids = np.arange(16 * 128, dtype=np.int32)
    each, borders = np.zeros(16, np.int32), np.zeros(17, np.int32)
    step = HostBatch(borders, each, each, borders, ids)
    # compiled before
    step.fill(batch, beside_copies=True)
    batch.page_ids.zero_()
    stream = torch.cuda.Stream(device())
    mover = Mover(pool, 256, to_host=False, stream=stream, way="engine" if kv_copy_engine.works(device()) else "kernel")
    torch.cuda.synchronize()
    mover.take(np.array([host.data_ptr()], np.int64), np.random.default_rng(0).permutation(256).astype(np.int32))
    mover.layer(0)
    copied = stream.record_event()
    step.fill(batch, beside_copies=True)
    torch.cuda.current_stream(device()).synchronize()
    assert not copied.query()
    torch.cuda.synchronize()
    assert batch.page_ids[: len(ids)].tolist() == ids.tolist() and bool((pool == 1).all())


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
