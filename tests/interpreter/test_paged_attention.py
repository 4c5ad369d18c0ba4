"""The Triton paged decode kernel computes its definition: odd shapes, any sharing of the work, same bits twice."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from smbench_kernels import paged_attention_definition as definition
from smbench_kernels import paged_attention_triton as paged
from smbench_kernels.launch import Launcher, Workspace
from smbench_kernels.op import Inputs, Point

CPU = torch.device("cpu")


def point_of(heads: int = 8, kv_heads: int = 2, **axes: int | str) -> Point:
    plain: dict[str, int | str] = {"head_dim": 64, "dtype": "float16", "batch": 2, "seq_len": 70, "lengths": "ragged"}
    words: dict[str, int | str] = {"block_size": 4, "layout": "fair", "memory": "device", "address": "table"}
    return {"heads": heads, "kv_heads": kv_heads, **plain, **words, **axes}


def bound(point: Point, inputs: Inputs, programs: int, snap: bool = True) -> Callable[[], None]:
    """The kernel on so many programs, in a workspace that holds no number."""
    config = paged.default_config(point)
    workspace = Workspace.allocate(*paged.workspace_sizes(point, config, programs), CPU)
    workspace.partials.fill_(torch.nan)
    launcher = Launcher(paged.call(point, inputs, workspace, config, programs, snap))

    def run() -> None:
        launcher()
        assert not workspace.counters.any(), "a counter is not ready for the next launch"

    return run


def check(point: Point, inputs: Inputs) -> None:
    expected = definition.reference(point, inputs)
    error = inputs["y"].double() - expected
    assert error.norm() <= definition.tolerance(point).relative * expected.norm()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    "axes",
    [
        {"heads": 4, "kv_heads": 4, "block_size": 1},
        {"heads": 6, "kv_heads": 2, "block_size": 3, "head_dim": 80},
        {"heads": 40, "kv_heads": 2, "block_size": 32},
        {"heads": 8, "kv_heads": 1, "block_size": 16, "head_dim": 128, "batch": 5},
        {"heads": 1, "kv_heads": 1, "block_size": 1, "batch": 1, "seq_len": 1},
    ],
)
def test_odd_shapes(axes: dict[str, int], dtype: str, seed: int) -> None:
    point = point_of(**axes, dtype=dtype)
    inputs = definition.make_inputs(point, seed, CPU)
    prepared = paged.default(point, inputs)
    prepared.run()
    assert prepared.config_source == "default"
    check(point, inputs)


@pytest.mark.parametrize("snap", [True, False])
@pytest.mark.parametrize("lengths", ["equal", "ragged"])
@pytest.mark.parametrize("programs", [1, 2, 3, 5, 8, 31])
def test_any_number_of_programs_shares_the_work(programs: int, lengths: str, snap: bool, seed: int) -> None:
    """From one program for everything to more programs than tiles."""
    point = point_of(seq_len=200, head_dim=16, lengths=lengths)
    inputs = definition.make_inputs(point, seed, CPU)
    run = bound(point, inputs, programs, snap)
    for _ in range(2):
        inputs["y"].fill_(torch.nan)
        run()
        check(point, inputs)


@pytest.mark.parametrize("layout", definition.AXES["layout"].choices)
@pytest.mark.parametrize("address", definition.AXES["address"].choices)
def test_every_layout_and_address_mode(address: str, layout: str, seed: int) -> None:
    # 3 x 500 tokens in blocks of one pass the document's pool of 1024 blocks
    point = point_of(batch=3, seq_len=500, block_size=1, head_dim=16, address=address, layout=layout)
    inputs = definition.make_inputs(point, seed, CPU)
    bound(point, inputs, 3)()
    check(point, inputs)


@pytest.mark.parametrize(("address", "follows"), [("table", True), ("contiguous", False), ("same-block", False)])
def test_another_table_changes_what_reads_it_and_nothing_else(address: str, follows: bool, seed: int) -> None:
    """Between two runs of one binding, as between replays of a graph; lengths change as well."""
    point = point_of(address=address, lengths="equal")
    inputs = definition.make_inputs(point, seed, CPU)
    run = bound(point, inputs, 5)
    run()
    before = inputs["y"].clone()
    inputs["block_tables"].copy_(definition.redraw(point, inputs, seed + 1)["block_tables"])
    inputs["y"].fill_(torch.nan)
    run()
    check(point, inputs)
    assert torch.equal(before, inputs["y"]) is not follows
    inputs["seq_lens"].copy_(torch.tensor([3, 70]))
    run()
    check(point, inputs)


def test_an_empty_sequence_is_left_alone(seed: int) -> None:
    point = point_of(batch=3)
    inputs = definition.make_inputs(point, seed, CPU)
    inputs["seq_lens"].copy_(torch.tensor([5, 0, 70]))
    bound(point, inputs, 4)()
    assert inputs["y"][1].isnan().all()
    inputs["y"][1] = 0
    inputs["seq_lens"][1] = 1
    expected = definition.reference(point, inputs)[[0, 2]]
    assert (inputs["y"][[0, 2]].double() - expected).norm() <= 2e-3 * expected.norm()


def test_same_bits_every_time(seed: int) -> None:
    point = point_of(seq_len=300, head_dim=16)
    inputs = definition.make_inputs(point, seed, CPU)
    run = bound(point, inputs, 7)
    run()
    first = inputs["y"].clone()
    run()
    assert torch.equal(first, inputs["y"])


def test_nothing_but_y_is_written(seed: int) -> None:
    point = point_of()
    inputs = definition.make_inputs(point, seed, CPU)
    before = {name: tensor.clone() for name, tensor in inputs.items() if name != "y"}
    bound(point, inputs, 3)()
    assert all(torch.equal(inputs[name], tensor) for name, tensor in before.items())
