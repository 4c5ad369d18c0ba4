"""On a GPU: the decode kernels and lora_linear, with what no processor shows: clusters, dependent launches, graphs."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest
import torch

from smbench_kernels import lora, lora_linear, lora_plan
from smbench_kernels.lora_linear_expands import AHEAD, EXPANDS, PORTABLE, WAITING, WIDE
from smbench_kernels.lora_linear_space import FUSED, expand_part, joined
from smbench_kernels.op import Config, Inputs, Point, UnsupportedPoint
from smbench_kernels.own import KERNEL
from smbench_kernels.registry import op as find_op

pytestmark = pytest.mark.gpu
OP = find_op("lora_linear")
SHRINK: Config = {"CHUNK": 16, "TILES": 1, "WARPS": 4, "STAGES": 0, "STEPS": 2, "PARTS": 8, "CLUSTER": 1}
EXPAND: Config = {"CHUNK": 16, "WARPS": 4, "BLOCKS": 2}
ONE: Config = {KERNEL: FUSED, "CHUNK": 16, "WARPS": 4, "STAGES": 0, "STEPS": 1, "PARTS": 16}
CONFIGS: dict[str, Config] = {
    "pair": joined(SHRINK, EXPAND),
    "pair through memory": joined({**SHRINK, "CLUSTER": 0}, {**EXPAND, "CHUNK": 8}),
    "pair of a ring": joined({**SHRINK, "CHUNK": 48, "STAGES": 4, "STEPS": 1}, {**EXPAND, "CHUNK": 48}),
    "pair unsplit": joined({**SHRINK, "PARTS": 1, "CHUNK": 8}, {**EXPAND, "BLOCKS": 1}),
    "pair that waits": joined(SHRINK, {**EXPAND, KERNEL: WAITING, "CHUNK": 8}),
    "pair that waits, through memory": joined({**SHRINK, "CLUSTER": 0}, {**EXPAND, KERNEL: WAITING}),
    "pair with prefill's": joined(SHRINK, {KERNEL: WIDE, "TOKENS": 64, "CHUNKS": 1, "PER_SM": 2, "RUN": 4}),
    "pair with prefill's long tiles": joined(
        {**SHRINK, "PARTS": 1}, {KERNEL: WIDE, "TOKENS": 128, "CHUNKS": 1, "PER_SM": 1, "RUN": 16}
    ),
    "pair with the portable": joined(SHRINK, {KERNEL: PORTABLE, "BLOCK_N": 64, "SPLIT_N": 8, "num_warps": 1}),
    "one": ONE,
    "one of a ring": {**ONE, "STAGES": 3, "PARTS": 4, "CHUNK": 24},
}
SHAPES: list[dict[str, int | str]] = [
    {"batch": 1, "hidden_size": 4096},
    {"batch": 33, "hidden_size": 4096, "projection": "qkv"},
    {"batch": 61, "hidden_size": 3428, "rank": 12, "num_loras": 40},
    {"batch": 97, "hidden_size": 1272, "rank": 5, "dtype": "float16", "projection": "gate-up"},
    {"batch": 130, "hidden_size": 1271, "rank": 64},
    {"batch": 7, "seq_len": 50, "prefill": "one", "hidden_size": 2048, "rank": 48},
]


def point_of(axes: dict[str, int | str]) -> Point:
    plain: dict[str, int | str] = {"batch": 8, "seq_len": 1, "hidden_size": 4096, "rank": 16, "num_loras": 4}
    return {**plain, "dtype": "bfloat16", "projection": "square", "prefill": "all", **axes}


def make(point: Point, without: int = 0) -> Inputs:
    seed = random.randrange(2**31)
    sys.stderr.write(f"seed {seed}\n")
    inputs = lora_linear.make_inputs(point, seed, torch.device("cuda"), no_lora=without)
    for name in ("x", "y"):
        inputs[name][lora.token_indices(inputs) < 0] = torch.nan
    return inputs


def check(point: Point, inputs: Inputs, run: Callable[[], None]) -> None:
    before = inputs["y"].clone()
    expected = OP.expected(point, inputs)["y"]
    run()
    used = lora.token_indices(inputs) >= 0
    assert inputs["y"][~used].isnan().all(), "a row of a token without a LoRA was written"
    error, change = (inputs["y"].double() - expected)[used], (expected - before.double())[used]
    assert error.norm() <= OP.tolerance(point).relative * change.norm()


def test_every_expand_of_a_pair_has_a_configuration_here() -> None:
    assert {expand_part(config).get(KERNEL, AHEAD) for config in CONFIGS.values()} == set(EXPANDS)


@pytest.mark.parametrize("axes", SHAPES, ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_configurations_compute_the_definition(name: str, axes: dict[str, int | str]) -> None:
    point = point_of(axes)
    inputs = make(point, int(point["batch"]) // 4)
    try:
        prepared = OP.tuning().prepare(point, inputs, CONFIGS[name])
    except UnsupportedPoint as reason:
        pytest.skip(str(reason))
    for _ in range(2):
        check(point, inputs, prepared.run)


@pytest.mark.parametrize("axes", SHAPES, ids=str)
def test_the_default_computes_the_definition(axes: dict[str, int | str]) -> None:
    point = point_of(axes)
    inputs = make(point, 1 if int(point["batch"]) > 1 else 0)
    prepared = OP.provider("smbench")(point, inputs)
    assert KERNEL in prepared.config
    check(point, inputs, prepared.run)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_graph_is_replayed_for_other_loras_with_the_same_bits(name: str) -> None:
    # the portable expand takes one slice
    point = point_of({"batch": 33, "projection": "square" if "portable" in name else "qkv"})
    inputs = make(point)
    try:
        prepared = OP.tuning().prepare(point, inputs, CONFIGS[name])
    except UnsupportedPoint as reason:
        pytest.skip(str(reason))
    prepared.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        # twice in a row: the second may start only when the first is done
        prepared.run()
        prepared.run()
    for without in (0, 5, 33):
        drawn = lora.draw_indices(33, 4, without, without)
        # and once so unevenly that there are more segments than usual
        inputs["indices"].copy_(torch.arange(33).clamp(max=3) if without == 5 else drawn)
        prepared.begin()
        inputs["y"].normal_()
        start = inputs["y"].clone()
        first: torch.Tensor | None = None
        for _ in range(100):
            inputs["y"].copy_(start)
            graph.replay()
            first = inputs["y"].clone() if first is None else first
            assert torch.equal(inputs["y"], first)
        expected = 2 * OP.expected(point, {**inputs, "y": start})["y"] - start.double()
        error = inputs["y"].double() - expected
        assert error.norm() <= 2e-2 * (expected - start.double()).norm() + 1e-9


def test_the_plan_is_the_same_on_the_device() -> None:
    for tokens, loras, chunk in ((1, 1, 8), (257, 33, 8), (16384, 9, 64)):
        indices = lora.draw_indices(tokens, loras, tokens // 5, tokens)
        plan = lora_plan.Plan.allocate(tokens, loras, chunk, torch.device("cuda"))
        lora_plan.filler(plan, indices.cuda())()
        order = torch.argsort(torch.where(indices < 0, loras, indices), stable=True).to(torch.int32)
        assert torch.equal(plan.order.cpu(), order)
        counts = torch.bincount(indices[indices >= 0].long(), minlength=loras)
        assert int(plan.count) == int((-(-counts // chunk)).sum())
        segments = plan.segments[: int(plan.count)].cpu()
        assert torch.equal(torch.bincount(segments[:, 2].long(), segments[:, 1].double(), loras).long(), counts)
        for number, (first, count, _, _) in enumerate(segments.tolist()):
            assert torch.equal(plan.members[number, :count].cpu(), order[first : first + count])
