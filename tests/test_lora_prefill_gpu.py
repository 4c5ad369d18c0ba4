"""The Hopper prefill kernels on a GPU: the definition in float64, the same bits every time, graphs, plans, offsets."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable

import pytest
import torch

from smbench_kernels import lora, lora_plan, lora_prefill
from smbench_kernels.lora_prefill import Sequences
from smbench_kernels.op import Config, Inputs, Point
from smbench_kernels.registry import op as find_op

pytestmark = pytest.mark.gpu
OPS = ("sgmv_shrink", "sgmv_expand")
SCALE, LORAS = 0.5, 4
LIMIT = {torch.float16: 1.5e-3, torch.bfloat16: 1e-2}


@pytest.fixture(autouse=True)
def hopper() -> None:
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernels need compute capability 9.0")


def point_of(batch: int, seq_len: int, hidden: int, rank: int, dtype: str = "bfloat16") -> Point:
    sizes = {"batch": batch, "seq_len": seq_len, "hidden_size": hidden, "rank": rank, "num_loras": LORAS}
    return {**sizes, "dtype": dtype}


def make(name: str, point: Point, no_lora: int = 1) -> Inputs:
    device = torch.device("cuda")
    return lora.make_inputs(point, 1, device, expands=name == "sgmv_expand", per_token=False, no_lora=no_lora)


def hopper_configs(name: str, point: Point, count: int = 4) -> list[Config]:
    """Some of them, since each is compiled: others in each run."""
    every = [config for config in find_op(name).tuning().space(point) if "TOKENS" in config]
    return random.sample(every, min(count, len(every)))


def check(name: str, point: Point, inputs: Inputs, run: Callable[[], None]) -> None:
    before, expected = inputs["y"].double(), lora.reference(point, inputs)
    run()
    error = inputs["y"].double() - expected
    assert error.norm() <= find_op(name).tolerance(point).relative * (expected - before).norm()
    without = lora.token_indices(inputs) < 0
    assert torch.equal(inputs["y"][without].double(), before[without])


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "seq_len", "hidden", "rank"),
    [(3, 1, 64, 8), (5, 100, 1000, 24), (7, 131, 3424, 16), (40, 300, 2048, 64), (9, 257, 4104, 136)],
)
@pytest.mark.parametrize("name", OPS)
def test_sampled_configurations_are_right(
    name: str, batch: int, seq_len: int, hidden: int, rank: int, dtype: str
) -> None:
    point = point_of(batch, seq_len, hidden, rank, dtype)
    tunable = find_op(name).tuning()
    for config in hopper_configs(name, point):
        sys.stderr.write(f"{config}\n")
        inputs = make(name, point)
        check(name, point, inputs, tunable.prepare(point, inputs, config).run)


@pytest.mark.parametrize("name", OPS)
def test_same_bits_every_time_and_other_indices_in_a_graph(name: str) -> None:
    point = point_of(33, 128, 4096, 64)
    for config in hopper_configs(name, point, 8):
        sys.stderr.write(f"{config}\n")
        inputs = make(name, point)
        start = inputs["y"].clone()
        run = find_op(name).tuning().prepare(point, inputs, config).run
        run()
        first = inputs["y"].clone()
        for _ in range(50):
            inputs["y"].copy_(start)
            run()
            assert torch.equal(inputs["y"], first)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        for none in (0, 5, 33):
            inputs["indices"].copy_(lora.draw_indices(33, LORAS, none, none))
            check(name, point, inputs, graph.replay)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("outputs", [(1024,), (1536, 512, 520), (3000, 3000)], ids=["one", "qkv", "gate-up"])
@pytest.mark.parametrize("chunk", [64, 128])
def test_linear_over_a_plan_of_prefill_and_decode(chunk: int, outputs: tuple[int, ...], dtype: torch.dtype) -> None:
    """Long sequences and single tokens; the plan is filled again, for other LoRAs, between replays of one graph."""
    device, hidden, rank = torch.device("cuda"), 1032, 40
    lengths = torch.tensor([300, 1, 1, 77, 1, 700, 1, 5, 1, 130], dtype=torch.int32, device=device)
    starts = (lengths.cumsum(0) - lengths).to(torch.int32)
    tokens = int(lengths.sum())
    indices = lora.draw_indices(len(lengths), LORAS, 2, 0).to(device)
    a = [torch.randn(LORAS, rank, hidden, device=device).mul(hidden**-0.5).to(dtype) for _ in outputs]
    b = [torch.randn(LORAS, count, rank, device=device).mul(rank**-0.5).to(dtype) for count in outputs]
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    y = torch.randn(tokens, sum(outputs), device=device).to(dtype)
    workspace = torch.full((len(outputs), tokens, rank), torch.nan, device=device)
    plan = lora_plan.Plan.allocate(tokens, LORAS, chunk, device)
    fill = lora_plan.filler(plan, indices, starts, lengths)
    shrink = {"TOKENS": chunk, "CLUSTER": 4, "CHUNKS": 1, "PER_SM": 1}
    config = {**shrink, "RUN": 4, "EXPAND_CHUNKS": 1, "EXPAND_PER_SM": 1}
    run = lora_prefill.linear(x, a, b, y, plan, SCALE, config, workspace)
    fill()
    run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fill()
        run()
    for seed in (1, 2, 3):
        indices.copy_(lora.draw_indices(len(lengths), LORAS, seed, seed))
        of_token = indices.repeat_interleave(lengths)
        before, expected, begin = y.clone(), y.double(), 0
        for count, slice_a, slice_b in zip(outputs, a, b, strict=True):
            for which in range(LORAS):
                rows = (of_token == which).nonzero().squeeze(1)
                change = SCALE * (x[rows].double() @ slice_a[which].double().T) @ slice_b[which].double().T
                expected[rows, begin : begin + count] += change
            begin += count
        graph.replay()
        error, change = y.double() - expected, expected - before.double()
        assert error.norm() <= LIMIT[dtype] * change.norm()
        assert torch.equal(y[of_token < 0], before[of_token < 0])


def test_a_plan_of_another_chunk_is_refused() -> None:
    device = torch.device("cuda")
    plan = lora_plan.Plan.allocate(256, LORAS, 64, device)
    x, a = torch.randn(256, 64, device=device).half(), torch.randn(LORAS, 8, 64, device=device).half()
    out = torch.empty(1, 256, 8, device=device)
    with pytest.raises(ValueError, match="segments have 64 tokens"):
        lora_prefill.shrink(x, [a], plan, out, SCALE, {"TOKENS": 128, "CLUSTER": 1, "CHUNKS": 1, "PER_SM": 1})


@pytest.mark.parametrize("name", OPS)
def test_offsets_beyond_32_bits(name: str) -> None:
    """2**31 elements of x or y, of which the last rows are compared."""
    point = point_of(1, 17000, 128256, 16)
    inputs = make(name, point, no_lora=0)
    tail = slice(16900, None)
    wide = inputs["weights"][int(inputs["indices"][0])].double()
    before = inputs["y"][tail].double()
    config = hopper_configs(name, point)[0]
    find_op(name).tuning().prepare(point, inputs, config).run()
    change = inputs["x"][tail].double() @ wide.T
    error = inputs["y"][tail].double() - before - change
    assert error.norm() <= find_op(name).tolerance(point).relative * change.norm()


def test_ragged_sequences_without_a_plan() -> None:
    device, dtype, hidden, rank = torch.device("cuda"), torch.bfloat16, 512, 16
    lengths = torch.tensor([1, 200, 64, 65, 127, 3], dtype=torch.int32, device=device)
    starts = (lengths.cumsum(0) - lengths).to(torch.int32)
    indices = torch.tensor([0, 1, -1, 2, 3, 0], dtype=torch.int32, device=device)
    tokens = int(lengths.sum())
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    a = torch.randn(LORAS, rank, hidden, device=device).mul(hidden**-0.5).to(dtype)
    out = torch.full((1, tokens, rank), torch.nan, device=device)
    batch = Sequences(indices, lengths, starts, 200)
    lora_prefill.shrink(x, [a], batch, out, SCALE, {"TOKENS": 64, "CLUSTER": 2, "CHUNKS": 1, "PER_SM": 1})()
    of_token = indices.repeat_interleave(lengths)
    expected = SCALE * torch.einsum("th,trh->tr", x.double(), a.double()[of_token.long().clamp(min=0)])
    assert torch.equal(out[0].isnan().any(1), of_token < 0)
    torch.testing.assert_close(out[0, of_token >= 0].double(), expected[of_token >= 0], rtol=0, atol=1e-4)
