"""On a GPU: every kernel of ours computes its definition, follows what changes between replays, repeats its bits."""

from __future__ import annotations

import random
import sys

import pytest
import torch

from smbench_kernels import managed_memory, paged_attention
from smbench_kernels import paged_attention_definition as definition
from smbench_kernels.op import Inputs, Point, UnsupportedPoint
from smbench_kernels.registry import op as find_op

pytestmark = pytest.mark.gpu
OWN = ("smbench", "smbench-triton", "classic-v1", "classic-v2")
CASES: list[dict[str, int | str]] = [
    {"heads": 8, "kv_heads": 2, "batch": 3, "seq_len": 200},
    {"heads": 40, "kv_heads": 40, "batch": 5, "seq_len": 777, "block_size": 5},
    {"heads": 4, "kv_heads": 4, "batch": 3, "seq_len": 333, "block_size": 1},
    {"heads": 12, "kv_heads": 1, "batch": 7, "seq_len": 500, "head_dim": 80},
    {"heads": 64, "kv_heads": 2, "batch": 2, "seq_len": 100},
    {"heads": 16, "kv_heads": 2, "batch": 40, "seq_len": 300, "head_dim": 64, "dtype": "bfloat16", "block_size": 2},
    {"heads": 8, "kv_heads": 2, "batch": 2, "seq_len": 300, "head_dim": 256, "block_size": 64},
    {"heads": 8, "kv_heads": 2, "batch": 2, "seq_len": 4096, "address": "contiguous", "layout": "document"},
    {"heads": 8, "kv_heads": 8, "batch": 2, "seq_len": 130, "address": "same-block", "block_size": 8},
    {"heads": 1, "kv_heads": 1, "batch": 1, "seq_len": 1, "block_size": 1},
]


def point_of(axes: dict[str, int | str]) -> Point:
    plain: dict[str, int | str] = {"head_dim": 128, "dtype": "float16", "lengths": "ragged", "block_size": 16}
    return {**plain, "layout": "fair", "memory": "device", "address": "table", **axes}


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def error(point: Point, inputs: Inputs) -> float:
    expected = definition.reference(point, inputs)
    return float((inputs["y"].double() - expected).norm() / expected.norm())


@pytest.mark.parametrize("provider", OWN)
@pytest.mark.parametrize("axes", CASES, ids=lambda axes: "-".join(str(value) for value in axes.values()))
def test_the_definition_is_computed(axes: dict[str, int | str], provider: str) -> None:
    point = point_of(axes)
    inputs = definition.make_inputs(point, random.randrange(2**31), device())
    try:
        prepared = find_op("paged_attention").provider(provider)(point, inputs)
    except UnsupportedPoint as reason:
        assert provider.startswith("classic"), reason
        pytest.skip(str(reason))
    prepared.begin()
    prepared.run()
    assert error(point, inputs) <= definition.tolerance(point).relative


def test_configurations_of_the_search_space_are_right() -> None:
    seed = random.randrange(2**31)
    for axes in CASES[:6]:
        point = point_of(axes)
        for config in random.Random(seed).sample(paged_attention.space(point), 4):
            for snap in (1, 2):
                sys.stderr.write(f"seed {seed} {dict(point)} {dict(config)}\n")
                inputs = definition.make_inputs(point, seed, device())
                paged_attention.bind(point, inputs, {**config, "SNAP": snap}).run()
                assert error(point, inputs) <= definition.tolerance(point).relative


@pytest.mark.parametrize("provider", ["smbench", "smbench-triton"])
def test_a_replayed_graph_follows_table_and_lengths(provider: str) -> None:
    point = point_of({"heads": 32, "kv_heads": 8, "batch": 6, "seq_len": 900})
    inputs = definition.make_inputs(point, 1, device())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        prepared = find_op("paged_attention").provider(provider)(point, inputs)
        prepared.run()
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        prepared.run()
        graph.capture_end()
        results = []
        for change in range(4):
            if change < 3:
                tables = definition.redraw(point, inputs, change)["block_tables"]
                inputs["block_tables"].copy_(tables)
                inputs["seq_lens"].copy_(definition.draw_lengths(point, change).to(device()))
            inputs["y"].fill_(torch.nan)
            graph.replay()
            stream.synchronize()
            assert error(point, inputs) <= definition.tolerance(point).relative
            results.append(inputs["y"].clone())
    assert torch.equal(results[2], results[3]) and not torch.equal(results[1], results[2])


@pytest.mark.parametrize("kind", [kind for kind in managed_memory.KINDS if kind not in managed_memory.REFUSED])
def test_managed_memory_holds_the_cache_and_comes_back(kind: str) -> None:
    point = point_of({"heads": 8, "kv_heads": 2, "batch": 2, "seq_len": 500, "memory": kind})
    inputs = definition.make_inputs(point, 1, device())
    placed = definition.place(point, inputs)
    size = sum(placed[name].numel() * placed[name].element_size() for name in ("k_cache", "v_cache"))
    assert managed_memory.held_bytes() >= size
    assert all(torch.equal(placed[name], inputs[name]) for name in ("k_cache", "v_cache", "q"))
    find_op("paged_attention").provider("smbench")(point, placed).run()
    assert error(point, placed) <= definition.tolerance(point).relative
