"""The kernels in CUDA C++ compute their definition: run on a processor, thread by thread, where no GPU is needed."""

from __future__ import annotations

import math

import pytest
import torch

import emulated_cuda
from smbench_kernels import paged_attention, paged_attention_classic
from smbench_kernels import paged_attention_definition as definition
from smbench_kernels.launch import ceil_div
from smbench_kernels.op import Config, Inputs, Point
from smbench_kernels.paged_attention_classic_source import SOURCE as CLASSIC
from smbench_kernels.paged_attention_definition import Sizes
from smbench_kernels.paged_attention_source import SOURCE

pytestmark = pytest.mark.skipif(emulated_cuda.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
CPU = torch.device("cpu")
SMALL: Config = {"HEADS": 1, "SLICES": 2, "PIECES": 1, "STAGES": 3, "PER_SM": 1, "SNAP": 2}


def point_of(**axes: int | str) -> Point:
    plain: dict[str, int | str] = {"heads": 8, "kv_heads": 2, "head_dim": 64, "dtype": "float16", "batch": 2}
    words: dict[str, int | str] = {"seq_len": 70, "lengths": "ragged", "block_size": 4, "layout": "fair"}
    return {**plain, **words, "memory": "device", "address": "table", **axes}


def run(point: Point, inputs: Inputs, config: Config, blocks: int, counters: torch.Tensor | None = None) -> None:
    """Our kernel on so many thread blocks, in a workspace that holds no number."""
    sizes = Sizes.of(point)
    heads = paged_attention.heads_of(sizes, config)
    count = paged_attention.item_count(sizes, config)
    counters = torch.zeros(count, dtype=torch.int32) if counters is None else counters
    slots = torch.full((2 * blocks * paged_attention.result_floats(sizes, config),), torch.nan)
    size = sizes.block_size
    arguments = [
        *(inputs["y"], slots, counters, inputs["q"], inputs["k_cache"], inputs["v_cache"], inputs["block_tables"]),
        *(inputs["seq_lens"], sizes.scale * math.log2(math.e), sizes.kv_heads, sizes.batch, sizes.blocks_per_sequence),
        *(size, size.bit_length() - 1 if size & (size - 1) == 0 else -1, definition.pool_blocks(point)),
    ]
    shared = paged_attention.shared_bytes(point, config)
    macros = paged_attention.macros(point, config)
    assert macros["HEADS"] == heads
    threads = 32 * paged_attention.warps_of(config)
    emulated_cuda.launch(SOURCE, "paged_decode", macros, (blocks, 1, 1), threads, shared, arguments)
    assert not counters.any(), "a counter is not ready for the next launch"


def check(point: Point, inputs: Inputs) -> None:
    expected = definition.reference(point, inputs)
    error = inputs["y"].double() - expected
    assert error.norm() <= definition.tolerance(point).relative * expected.norm()


@pytest.mark.parametrize(
    ("axes", "config"),
    [
        ({}, {}),
        ({"heads": 4, "kv_heads": 4, "block_size": 1}, {"HEADS": 4, "SLICES": 1}),
        ({"heads": 4, "kv_heads": 4, "block_size": 3}, {"HEADS": 2, "SLICES": 2, "STAGES": 2}),
        ({"heads": 6, "kv_heads": 2, "head_dim": 80, "dtype": "bfloat16"}, {"PIECES": 2}),
        ({"heads": 12, "kv_heads": 1, "head_dim": 128, "batch": 3}, {"STAGES": 4}),
        ({"heads": 40, "kv_heads": 2, "block_size": 16}, {"HEADS": 2, "SLICES": 1}),
        ({"heads": 2, "kv_heads": 1, "head_dim": 256}, {"STAGES": 2}),
        ({"heads": 1, "kv_heads": 1, "batch": 1, "seq_len": 1}, {}),
        ({"batch": 40, "seq_len": 20, "kv_heads": 8}, {"HEADS": 8, "SLICES": 1}),
    ],
    ids=str,
)
def test_shapes_and_configurations(axes: dict[str, int | str], config: Config, seed: int) -> None:
    point = point_of(**axes)
    inputs = definition.make_inputs(point, seed, CPU)
    run(point, inputs, {**SMALL, **config}, 3)
    check(point, inputs)


@pytest.mark.parametrize("lengths", ["equal", "ragged"])
@pytest.mark.parametrize("snap", [1, 2])
def test_any_number_of_blocks_shares_the_work(snap: int, lengths: str, seed: int) -> None:
    point = point_of(seq_len=200, head_dim=16, lengths=lengths)
    inputs = definition.make_inputs(point, seed, CPU)
    counters = torch.zeros(4, dtype=torch.int32)
    for blocks in (1, 2, 3, 5, 8, 13, 31):
        inputs["y"].fill_(torch.nan)
        run(point, inputs, {**SMALL, "SNAP": snap}, blocks, counters)
        check(point, inputs)


@pytest.mark.parametrize("layout", definition.AXES["layout"].choices)
@pytest.mark.parametrize("address", definition.AXES["address"].choices)
def test_every_layout_and_address_mode(address: str, layout: str, seed: int) -> None:
    # 3 x 500 tokens in blocks of one pass the document's pool of 1024 blocks
    point = point_of(batch=3, seq_len=500, block_size=1, head_dim=16, address=address, layout=layout)
    inputs = definition.make_inputs(point, seed, CPU)
    run(point, inputs, SMALL, 4)
    check(point, inputs)


def test_an_empty_sequence_is_left_alone(seed: int) -> None:
    point = point_of(batch=3)
    inputs = definition.make_inputs(point, seed, CPU)
    inputs["seq_lens"].copy_(torch.tensor([5, 0, 70]))
    run(point, inputs, SMALL, 4)
    assert inputs["y"][1].isnan().all()
    inputs["seq_lens"][1] = 1
    expected = definition.reference(point, inputs)[[0, 2]]
    assert (inputs["y"][[0, 2]].double() - expected).norm() <= 2e-3 * expected.norm()


def test_the_order_of_blocks_does_not_change_a_bit(seed: int) -> None:
    """Blocks come in random order here, so another one merges each time."""
    point = point_of(seq_len=300, head_dim=16)
    results = []
    for _ in range(3):
        inputs = definition.make_inputs(point, seed, CPU)
        run(point, inputs, SMALL, 7)
        results.append(inputs["y"])
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


@pytest.mark.parametrize("partition", [0, 512])
@pytest.mark.parametrize("block_size", [1, 4, 8, 32, 128])
def test_the_classic_kernel(block_size: int, partition: int, seed: int) -> None:
    point = point_of(heads=4, head_dim=32, seq_len=700, block_size=block_size)
    inputs = definition.make_inputs(point, seed, CPU)
    sizes = Sizes.of(point)
    views = paged_attention_classic._views(point, inputs)
    keys, values = (views[name].contiguous() for name in ("k_cache", "v_cache"))
    partitions = ceil_div(sizes.seq_len, partition) if partition else 1
    states = (sizes.batch, sizes.heads, partitions)
    partial = torch.full((*states, sizes.head_dim), torch.nan)
    highest, sums = (torch.full(states, torch.nan) for _ in range(2))
    macros = paged_attention_classic.macros(point, partition)
    both = ("paged_attention", "paged_attention_reduce")
    y, lengths = inputs["y"], inputs["seq_lens"]
    arguments = [
        *(y, partial, highest, sums, inputs["q"], keys, values, inputs["block_tables"], lengths, sizes.scale),
        *(sizes.kv_heads, sizes.blocks_per_sequence, partitions),
    ]
    grid = (sizes.heads, sizes.batch, partitions)
    shared = 4 * max(partition or sizes.blocks_per_sequence * block_size, 2 * sizes.head_dim)
    emulated_cuda.launch(CLASSIC, "paged_attention", macros, grid, 128, shared, arguments, both)
    if partition:
        merging = [y, partial, highest, sums, lengths, partitions]
        emulated_cuda.launch(CLASSIC, "paged_attention_reduce", macros, (*grid[:2], 1), 128, 0, merging, both)
    check(point, inputs)
