"""The LoRA kernels on a GPU: what the interpreter cannot show, races between programs, graphs and 64-bit offsets."""

from __future__ import annotations

import gc
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from smbench.worker.timing import Flush
from smbench.worker.tune import PointClock
from smbench_kernels import hardware, lora, lora_decode_wide
from smbench_kernels.launch import Workspace
from smbench_kernels.op import Config, Inputs, Point, Prepared, load
from smbench_kernels.own import KERNEL, OwnKernel
from smbench_kernels.registry import op as find_op

pytestmark = pytest.mark.gpu
OPS = ("bgmv_shrink", "bgmv_expand", "sgmv_shrink", "sgmv_expand")


def point_of(name: str, batch: int, hidden: int, rank: int, dtype: str = "float16") -> Point:
    return {
        "batch": batch,
        "seq_len": 1 if name.startswith("bgmv") else 40,
        "hidden_size": hidden,
        "rank": rank,
        "num_loras": 4,
        "dtype": dtype,
    }


def make(name: str, point: Point, seed: int, no_lora: int = 0) -> Inputs:
    return lora.make_inputs(
        point,
        seed,
        torch.device("cuda"),
        expands=name.endswith("expand"),
        per_token=name.startswith("bgmv"),
        no_lora=no_lora,
    )


def check(name: str, point: Point, inputs: Inputs, run: Callable[[], None]) -> None:
    before, expected = inputs["y"].double(), lora.reference(point, inputs)
    run()
    tolerance = find_op(name).tolerance(point)
    error = inputs["y"].double() - expected
    assert error.norm() <= tolerance.relative * (expected - before).norm()


def prepared_of(name: str, point: Point, inputs: Inputs, most_split: bool) -> Prepared:
    """The configuration with the most programs sharing a result, or the default."""
    if not most_split:
        return find_op(name).provider("smbench")(point, inputs)
    tunable = find_op(name).tuning()
    keys = ("SPLIT_K", "SPLIT_N", "PARTS", "CLUSTER")
    config = max(tunable.space(point), key=lambda config: [config.get(key, 0) for key in keys])
    return tunable.prepare(point, inputs, config)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("batch", "hidden", "rank"), [(1, 127, 5), (17, 3424, 12), (40, 4096, 64), (8, 11008, 128)])
@pytest.mark.parametrize("name", OPS)
def test_every_sampled_configuration_is_right(name: str, batch: int, hidden: int, rank: int, dtype: str) -> None:
    point = point_of(name, batch, hidden, rank, dtype)
    tunable = find_op(name).tuning()
    inputs = make(name, point, 1, no_lora=batch // 8)
    check(name, point, inputs, find_op(name).provider("smbench")(point, inputs).run)
    portable = load(f"smbench_kernels.{name}:KERNEL").space(point)
    for config in [*tunable.space(point)[::9], *portable[::9]]:
        inputs = make(name, point, 2, no_lora=batch // 8)
        check(name, point, inputs, tunable.prepare(point, inputs, config).run)


@pytest.mark.parametrize("most_split", [False, True], ids=["default", "most split"])
@pytest.mark.parametrize("name", OPS)
def test_same_bits_whatever_order_programs_run_in(name: str, most_split: bool) -> None:
    point = point_of(name, 33, 14336, 16)
    inputs = make(name, point, 1)
    start = inputs["y"].clone()
    run = prepared_of(name, point, inputs, most_split).run
    run()
    first = inputs["y"].clone()
    for _ in range(300):
        inputs["y"].copy_(start)
        run()
        assert torch.equal(inputs["y"], first)


@pytest.mark.parametrize("most_split", [False, True], ids=["default", "most split"])
@pytest.mark.parametrize("name", OPS)
def test_a_graph_is_replayed_for_other_indices(name: str, most_split: bool) -> None:
    point = point_of(name, 33, 4096, 16)
    inputs = make(name, point, 1)
    prepared = prepared_of(name, point, inputs, most_split)
    prepared.run()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        prepared.run()
    for none in (0, 5, 33):
        inputs["indices"].copy_(lora.draw_indices(33, 4, none, none))
        # once per step, for all layers: kernels that take a plan have it filled here
        prepared.begin()
        check(name, point, inputs, graph.replay)


@pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="for Hopper")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(
    ("batch", "hidden", "rank", "loras"),
    [(130, 1000, 16, 2), (256, 4104, 64, 1), (200, 2056, 136, 4), (256, 14336, 64, 1)],
)
@pytest.mark.parametrize("name", ["bgmv_shrink", "bgmv_expand"])
def test_many_tokens_of_a_lora_are_served_over_a_plan(
    name: str, batch: int, hidden: int, rank: int, loras: int, dtype: str
) -> None:
    """By prefill's kernels: tokens in any order, some without a LoRA, other indices when the graph is replayed.

    Every time the same bits: where blocks of a cluster exchange sums, one that comes too early reads old ones.
    """
    point = {**point_of(name, batch, hidden, rank, dtype), "num_loras": loras}
    tunable = find_op(name).tuning()
    wide = [config for config in tunable.space(point) if config.get(KERNEL) == lora_decode_wide.NUMBER]
    assert wide
    for config in wide[::3]:
        sys.stderr.write(f"{config}\n")
        inputs = make(name, point, 2, no_lora=batch // 8)
        start = inputs["y"].clone()
        prepared = tunable.prepare(point, inputs, config)
        check(name, point, inputs, prepared.run)
        first = inputs["y"].clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            prepared.run()
        for _ in range(20):
            inputs["y"].copy_(start)
            graph.replay()
            assert torch.equal(inputs["y"], first)
        for none in (0, 5):
            inputs["indices"].copy_(lora.draw_indices(batch, loras, none, none))
            prepared.begin()
            check(name, point, inputs, graph.replay)


def test_what_a_candidate_of_the_tuner_works_in_stays_allocated() -> None:
    """A graph holds addresses: memory freed after the capture is given to the next candidate."""
    point, found = point_of("bgmv_shrink", 33, 4096, 16), find_op("bgmv_shrink")
    tunable = found.tuning()
    seen: list[weakref.ref[torch.Tensor]] = []

    def bind(point: Point, inputs: Inputs) -> Callable[[Config], Prepared]:
        bound = tunable.binding(point, inputs)

        def prepare(config: Config) -> Prepared:
            prepared, workspace = bound(config), torch.zeros(1024, device="cuda")
            seen.append(weakref.ref(workspace))

            def run() -> None:
                workspace.add_(1)
                prepared.run()

            return replace(prepared, run=run)

        return prepare

    device = torch.device("cuda")
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        clock = PointClock(found, replace(tunable, bind=bind), point, 0, stream, Flush(device))
        assert clock(tunable.space(point)[0], 3)
        gc.collect()
        assert len(seen) > 1 and all(workspace() is not None for workspace in seen)


@pytest.mark.parametrize("name", ["sgmv_shrink", "sgmv_expand"])
def test_offsets_beyond_32_bits(name: str) -> None:
    """2**31 elements of x or y, of which the last rows are compared."""
    point = {**point_of(name, 1, 128256, 16), "seq_len": 17000}
    inputs = make(name, point, 1)
    tail = slice(16900, None)
    wide = inputs["weights"][int(inputs["indices"][0])].double()
    before = inputs["y"][tail].double()
    find_op(name).provider("smbench")(point, inputs).run()
    change = inputs["x"][tail].double() @ wide.T
    error = inputs["y"][tail].double() - before - change
    assert error.norm() <= find_op(name).tolerance(point).relative * change.norm()


@pytest.mark.parametrize("name", OPS)
def test_a_launch_finds_what_was_precompiled(name: str) -> None:
    """The key of a compilation without a GPU is the one that the launch used."""
    major, minor = torch.cuda.get_device_capability()
    point = point_of(name, 8, 1024, 16)
    inputs = make(name, point, 1)
    kernel: OwnKernel = load(f"smbench_kernels.{name}:KERNEL")
    config = kernel.portable_config(point, hardware.of(torch.device("cuda")))
    workspace = Workspace.allocate(*kernel.workspace_sizes(point, config), torch.device("cuda"))
    call = kernel.call(point, inputs, workspace, config)
    launched = call.kernel[call.grid](*call.arguments, **call.options)
    assert launched.hash == kernel.tunable.precompile(point, config, 10 * major + minor)
