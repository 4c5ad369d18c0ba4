"""Paged attention's definition: layouts as named, truth as SDPA has it, bytes counted once, memory refused in time."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from smbench_kernels import managed_memory
from smbench_kernels import paged_attention_definition as definition
from smbench_kernels.op import Point, UnsupportedPoint
from smbench_kernels.paged_attention_classic import _views, macros
from smbench_kernels.paged_attention_peers import token_rows
from smbench_kernels.registry import op as find_op

CPU = torch.device("cpu")
LAYOUTS = definition.AXES["layout"].choices


def point_of(**axes: int | str) -> Point:
    plain: dict[str, int | str] = {"heads": 8, "kv_heads": 2, "head_dim": 32, "dtype": "float16", "batch": 3}
    words: dict[str, int | str] = {
        "seq_len": 50,
        "lengths": "equal",
        "block_size": 4,
        "layout": "fair",
        "memory": "device",
    }
    return {**plain, **words, "address": "table", **axes}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_what_they_are_called(layout: str) -> None:
    point = point_of(layout=layout)
    tables = definition.draw_tables(point, 1)
    assert tables.shape == (3, 13) and tables.dtype == torch.int32
    flat = tables.flatten().tolist()
    if layout == "document":
        large = definition.draw_tables(point_of(layout=layout, block_size=1, seq_len=2000), 1)
        assert definition.pool_blocks(point) == 1024 and large.unique().numel() < large.numel()
    else:
        assert sorted(flat) == list(range(39)) == list(range(definition.pool_blocks(point)))
        assert (flat == sorted(flat)) == (layout == "ordered")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_another_table_is_another_table_of_the_same_pool(layout: str) -> None:
    inputs = definition.make_inputs(point_of(layout=layout), 1, CPU)
    other = definition.redraw(point_of(layout=layout), inputs, 2)
    assert not torch.equal(other["block_tables"], inputs["block_tables"])
    assert int(other["block_tables"].max()) < definition.pool_blocks(point_of(layout=layout))
    assert all(other[name] is inputs[name] for name in inputs if name != "block_tables")


def test_ragged_lengths_hold_the_longest_and_nothing_empty() -> None:
    lengths = definition.draw_lengths(point_of(lengths="ragged", batch=200), 3)
    assert int(lengths.max()) == 50 == int(lengths[0]) and int(lengths.min()) >= 1 and lengths.unique().numel() > 10


@pytest.mark.parametrize(("address", "layout"), [("table", "fair"), ("contiguous", "fair"), ("contiguous", "document")])
def test_the_truth_is_scaled_dot_product_attention(address: str, layout: str) -> None:
    point = point_of(address=address, layout=layout, lengths="ragged")
    inputs = definition.make_inputs(point, 5, CPU)
    truth = definition.reference(point, inputs)
    for sequence in range(3):
        rows = token_rows(inputs, sequence)
        if address == "contiguous":
            rows = sequence * 13 * 4 + torch.arange(len(rows))
        keys, values = (inputs[name].view(-1, 2, 32)[rows].double().transpose(0, 1) for name in ("k_cache", "v_cache"))
        query = inputs["q"][sequence].double().unsqueeze(1)
        expected = torch.nn.functional.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
        torch.testing.assert_close(truth[sequence], expected.squeeze(1))


def test_addresses_decide_whether_the_table_matters() -> None:
    inputs = definition.make_inputs(point_of(), 5, CPU)
    for address, matters in (("table", True), ("contiguous", False), ("same-block", False)):
        point = point_of(address=address)
        before = definition.reference(point, inputs)
        after = definition.reference(point, definition.redraw(point, inputs, 6))
        assert torch.equal(before, after) is not matters


def test_one_block_for_everything_is_no_attention() -> None:
    """Every fourth token is the same one: permuting the rest of the cache changes nothing."""
    point = point_of(address="same-block")
    inputs = dict(definition.make_inputs(point, 5, CPU))
    before = definition.reference(point, inputs)
    for name in ("k_cache", "v_cache"):
        inputs[name] = torch.cat([inputs[name][:1], torch.randn_like(inputs[name][1:])])
    assert torch.equal(before, definition.reference(point, inputs))


@pytest.mark.parametrize(("layout", "address"), list(product(LAYOUTS, ("table", "same-block"))))
def test_bytes_are_counted_once(layout: str, address: str) -> None:
    point = point_of(layout=layout, address=address)
    inputs = definition.make_inputs(point, 5, CPU)
    rows = {int(row) for sequence in range(3) for row in definition.cache_rows(point, inputs, sequence)}
    work = definition.work(point, inputs)
    table = 3 * 13 * 4 if address == "table" else 0
    assert work.bytes == len(rows) * 2 * 2 * 32 * 2 + 2 * inputs["q"].numel() * 2 + table + 3 * 4
    assert work.flops == 4 * 8 * 32 * 150
    assert len(rows) == (4 if address == "same-block" else 150 if layout != "document" else len(rows)) <= 150


def test_heads_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UnsupportedPoint, match="6 query heads are no multiple of 4"):
        definition.make_inputs(point_of(heads=6, kv_heads=4), 0, CPU)


@pytest.mark.parametrize("kind", managed_memory.KINDS)
def test_managed_memory_needs_a_card_and_two_kinds_are_never_measured(kind: str) -> None:
    inputs = definition.make_inputs(point_of(), 0, CPU)
    wanted = "not measured: .*hang the GPU" if kind in managed_memory.REFUSED else "CUDA device"
    with pytest.raises(UnsupportedPoint, match=wanted):
        definition.place(point_of(memory=kind), inputs)


def test_managed_memory_beyond_what_is_free_is_refused_with_the_arithmetic() -> None:
    managed_memory.refuse_unless_free(3 << 30, 6 << 30)
    with pytest.raises(UnsupportedPoint, match=r"3073 MiB wanted, 6144 MiB free on the card, of which 50% = 3072 MiB"):
        managed_memory.refuse_unless_free(3073 << 20, 6 << 30)


def test_device_memory_is_copied_whole() -> None:
    inputs = definition.make_inputs(point_of(), 0, CPU)
    copy = definition.place(point_of(), inputs)
    assert copy.keys() == inputs.keys()
    assert all(torch.equal(copy[n].nan_to_num(), inputs[n].nan_to_num()) for n in inputs)
    assert all(copy[name].data_ptr() != inputs[name].data_ptr() for name in inputs)


def test_the_classic_layouts_hold_every_element_where_the_algorithm_looks() -> None:
    inputs = definition.make_inputs(point_of(), 0, CPU)
    views = _views(point_of(), inputs)
    block, slot, head, element = 7, 2, 1, 19
    assert (
        views["k_cache"][block, head, element // 8, slot, element % 8] == inputs["k_cache"][block, slot, head, element]
    )
    assert views["v_cache"][block, head, element, slot] == inputs["v_cache"][block, slot, head, element]


@pytest.mark.parametrize(("axes", "reason"), [({"block_size": 3}, "power of two"), ({"head_dim": 80}, "steps of 32")])
def test_the_classic_kernel_says_what_it_does_not_take(axes: dict[str, int], reason: str) -> None:
    with pytest.raises(UnsupportedPoint, match=reason):
        macros(point_of(**axes), 0)


@pytest.mark.parametrize(
    "provider", ["smbench", "smbench-tuned", "classic-v1", "classic-v2", "fa3", "flashinfer", "sglang"]
)
def test_what_needs_a_card_or_a_library_says_so(provider: str) -> None:
    inputs = definition.make_inputs(point_of(), 0, CPU)
    with pytest.raises(UnsupportedPoint, match=r"GPU|not installed|not tuned"):
        find_op("paged_attention").provider(provider)(point_of(), inputs)


@pytest.mark.parametrize("provider", ["vllm-unified", "vllm-decode", "sglang", "flashinfer", "fa3"])
def test_libraries_are_not_asked_to_compute_addresses(provider: str) -> None:
    point = point_of(address="contiguous")
    with pytest.raises(UnsupportedPoint, match="from a table, not by the rule 'contiguous'"):
        find_op("paged_attention").provider(provider)(point, definition.make_inputs(point, 0, CPU))


@pytest.mark.parametrize("address", ["table", "contiguous"])
def test_the_baseline_is_right_on_a_processor(address: str) -> None:
    point = point_of(address=address, layout="document")
    inputs = definition.make_inputs(point, 4, CPU)
    prepared = find_op("paged_attention").provider("torch")(point, inputs)
    prepared.begin()
    prepared.run()
    prepared.finish()
    expected = definition.reference(point, inputs)
    assert (inputs["y"].double() - expected).norm() <= definition.tolerance(point).relative * expected.norm()
