"""The inference operations on a processor: every provider gives what whole histories give, and follows its inputs."""

from __future__ import annotations

import random

import pytest
import torch

from smbench_kernels.kv_pages import PageTable
from smbench_kernels.op import Inputs, Op, Point, UnsupportedPoint
from smbench_kernels.registry import op as find_op

CPU = torch.device("cpu")
BLOCK: Point = {
    **{"batch": 2, "total": 24, "new": 8, "targets": 3, "source": "device", "page_size": 4, "max_seqlen": 32},
    **{"layers": 2, "embedding": 16, "heads": 2, "head_dim": 8, "dtype": "float32"},
}
REQUEST: Point = {**BLOCK, "chunk_tokens": 8}


def error(op: Op, point: Point, inputs: Inputs) -> float:
    expected = op.expected(point, inputs)["y"]
    return float((inputs["y"].double() - expected).norm() / expected.norm())


CASES = [
    ("hstu_block", "recompute", BLOCK),
    ("hstu_block", "cache", BLOCK),
    ("hstu_block", "cache", {**BLOCK, "new": 24}),
    ("hstu_block", "cache", {**BLOCK, "source": "host"}),
    ("hstu_block", "cache", {**BLOCK, "targets": 0}),
    ("hstu_request", "recompute", {**REQUEST, "source": "nowhere"}),
    ("hstu_request", "cache", {**REQUEST, "source": "nowhere"}),
    ("hstu_request", "cache", REQUEST),
    ("hstu_request", "cache", {**REQUEST, "source": "host"}),
]


@pytest.mark.parametrize(("name", "provider", "point"), CASES)
def test_every_call_gives_what_whole_histories_give(name: str, provider: str, point: Point) -> None:
    op, seed = find_op(name), random.randrange(2**31)
    inputs = op.make_inputs(point, seed, CPU)
    prepared = op.provider(provider)(point, inputs)
    prepared.begin()
    for _ in range(3):
        inputs["y"].fill_(torch.nan)
        prepared.run()
        assert error(op, point, inputs) < op.tolerance(point).relative, f"seed {seed}"
    # other values in the same buffers, as the gate's second round has them
    again = op.make_inputs(point, seed + 1, CPU)
    for key, buffer in inputs.items():
        if buffer.is_floating_point():
            buffer.copy_(again[key])
    prepared.begin()
    prepared.run()
    assert error(op, point, inputs) < op.tolerance(point).relative, f"seed {seed}"


def test_counts_say_what_moved() -> None:
    op, point = find_op("hstu_request"), {**REQUEST, "source": "host"}
    inputs = op.make_inputs(point, 1, CPU)
    prepared = op.provider("cache")(point, inputs)
    prepared.begin()
    before = dict(prepared.counts())
    prepared.run()
    after = prepared.counts()
    token_bytes = 2 * 2 * 2 * 8 * 4
    # what fills the cache before a request is no request
    assert not before
    # sixteen cached tokens of two users came in, their chunk of eight new ones went out, two others made room
    assert after["onloaded_bytes"] == 2 * 16 * token_bytes
    assert after["offloaded_bytes"] == 2 * 8 * token_bytes
    assert after["evicted_users"] == 2
    assert after["onload_ns"] > 0 and after["offload_ns"] > 0


@pytest.mark.parametrize(("name", "provider", "point"), CASES)
def test_tokens_attended_are_those_cached_and_the_new(name: str, provider: str, point: Point) -> None:
    op = find_op(name)
    inputs = op.make_inputs(point, 1, CPU)
    prepared = op.provider(provider)(point, inputs)
    prepared.begin()
    for _ in range(3):
        prepared.run()
    counts = prepared.counts()
    history = 3 * int(point["batch"]) * int(point["total"])
    cached = 3 * int(point["batch"]) * (int(point["total"]) - int(point["new"]))
    found = {name: counts.get(name, 0) for name in ("steps", "attended_tokens", "device_tokens", "host_tokens")}
    here = cached if provider == "cache" and point["source"] == "device" else 0
    there = cached if point["source"] == "host" else 0
    assert found == {"steps": 3, "attended_tokens": history, "device_tokens": here, "host_tokens": there}
    assert counts["new_tokens"] == history - here - there


def test_points_that_make_no_sense_say_why() -> None:
    block, request = find_op("hstu_block"), find_op("hstu_request")
    with pytest.raises(ValueError, match="new = 25 of a history of total = 24 tokens"):
        block.make_inputs({**BLOCK, "new": 25}, 0, CPU)
    with pytest.raises(ValueError, match="total \\+ targets = 27 exceeds max_seqlen = 26"):
        block.make_inputs({**BLOCK, "max_seqlen": 26}, 0, CPU)
    inputs = request.make_inputs(REQUEST, 0, CPU)
    for op, provider, point, reason in (
        (block, "cache", {**BLOCK, "source": "host", "new": 9}, "15 cached tokens are no whole pages of 4"),
        (block, "cache-graph", BLOCK, "CUDA graphs need a CUDA device"),
        (block, "recompute", {**BLOCK, "source": "host"}, "nothing is brought in from the host"),
        (request, "recompute", REQUEST, "source has to be nowhere"),
        (request, "cache", {**REQUEST, "source": "host", "new": 4}, "20 cached tokens are no whole chunks of 8"),
        (request, "cache-graph-serial", REQUEST, "nothing to overlap"),
    ):
        given = inputs if op is request else block.make_inputs(point, 0, CPU)
        with pytest.raises(UnsupportedPoint, match=reason):
            op.provider(provider)(point, given)


def test_bookkeeping_is_right_for_every_user_it_meets() -> None:
    op = find_op("hstu_bookkeeping")
    point: Point = {"batch": 2, "users": 6, "total": 20, "new": 5, "targets": 3, "page_size": 4}
    inputs = op.make_inputs(point, 0, CPU)
    prepared = op.provider("cache")(point, inputs)
    prepared.begin()
    # more steps than there are groups of users
    for _ in range(7):
        prepared.run()
        prepared.finish()
        assert inputs["y"].tolist() == op.expected(point, inputs)["y"].tolist() == [[15, 20, 5, 6]] * 2
    with pytest.raises(ValueError, match="users = 7 in steps of 2"):
        op.make_inputs({**point, "users": 7}, 0, CPU)


def test_a_truncated_user_gets_the_same_pages_again() -> None:
    table = PageTable(8, 4)
    before = list(table.grow([1], [21]).pages[0])
    table.truncate(1, 9)
    assert (table.tokens(1), table.free_pages) == (9, 5)
    assert list(table.grow([1], [21]).pages[0]) == before
    with pytest.raises(ValueError, match="has 21 tokens, not 22"):
        table.truncate(1, 22)
    hold = table.hold(1)
    with pytest.raises(ValueError, match="are held"):
        table.truncate(1, 0)
    table.release(hold)
