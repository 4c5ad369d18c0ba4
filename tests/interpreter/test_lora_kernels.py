"""The LoRA kernels compute their definition: odd shapes, any configuration, no stray writes, same bits twice."""

from __future__ import annotations

import random
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from smbench_kernels import lora
from smbench_kernels.op import Config, Inputs, Point, load
from smbench_kernels.own import OwnKernel
from smbench_kernels.registry import op as find_op

CPU = torch.device("cpu")
OPS = ("bgmv_shrink", "bgmv_expand", "sgmv_shrink", "sgmv_expand")
SHAPES = {
    # batch, seq_len, hidden_size, rank
    "bgmv": [(1, 1, 127, 5), (3, 1, 3424, 16), (17, 1, 130, 12), (2, 1, 256, 80)],
    "sgmv": [(1, 1, 127, 5), (3, 5, 3424, 16), (2, 33, 130, 12), (1, 17, 256, 144)],
}
CASES = [(name, *shape) for name in OPS for shape in SHAPES[name[:4]]]
SAMPLE = 8
"""Configurations of each search space that one run checks."""


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """New float memory is NaN, so that an element nobody wrote cannot pass for a result."""
    empty = torch.empty

    def poisoned(*size: Any, **options: Any) -> torch.Tensor:
        memory = empty(*size, **options)
        return memory.fill_(float("nan")) if memory.is_floating_point() else memory

    monkeypatch.setattr(torch, "empty", poisoned)


def kernel_of(name: str) -> OwnKernel:
    kernel: OwnKernel = load(f"smbench_kernels.{name}:KERNEL")
    return kernel


def point_of(batch: int, seq_len: int, hidden: int, rank: int, dtype: str = "float16") -> Point:
    return {
        "batch": batch,
        "seq_len": seq_len,
        "hidden_size": hidden,
        "rank": rank,
        "num_loras": 3,
        "dtype": dtype,
    }


def make(name: str, point: Point, seed: int, no_lora: int = 0) -> Inputs:
    return lora.make_inputs(
        point, seed, CPU, expands=name.endswith("expand"), per_token=name.startswith("bgmv"), no_lora=no_lora
    )


def check(name: str, point: Point, inputs: Inputs, run: Callable[[], None], calls: int = 1) -> None:
    """Run and compare with the definition, call by call. Rows of NaN must stay as they are."""
    tolerance = find_op(name).tolerance(point)
    for _ in range(calls):
        before = inputs["y"].clone()
        expected = lora.reference(point, inputs)
        run()
        used = lora.token_indices(inputs) >= 0
        assert torch.equal(inputs["y"][~used].isnan(), before[~used].isnan())
        assert torch.equal(inputs["y"][~used].nan_to_num(), before[~used].nan_to_num())
        change = (expected - before.double())[used]
        error = (inputs["y"].double() - expected)[used]
        assert error.norm() <= tolerance.relative * change.norm()
        if change.numel():
            assert error.abs().max() <= tolerance.elementwise * change.square().mean().sqrt()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize(("name", "batch", "seq_len", "hidden", "rank"), CASES)
def test_default_configuration_accumulates_the_definition(
    name: str, batch: int, seq_len: int, hidden: int, rank: int, dtype: str, seed: int
) -> None:
    point = point_of(batch, seq_len, hidden, rank, dtype)
    inputs = make(name, point, seed)
    prepared = find_op(name).provider("smbench")(point, inputs)
    assert prepared.config_source == "default"
    check(name, point, inputs, prepared.run, calls=2)


@pytest.mark.parametrize("name", OPS)
def test_configurations_of_the_search_space_are_right(name: str, seed: int) -> None:
    point = point_of(2, 1 if name.startswith("bgmv") else 33, 2100, 12)
    kernel = kernel_of(name)
    for config in random.Random(seed).sample(kernel.space(point), SAMPLE):
        sys.stderr.write(f"{dict(config)}\n")
        inputs = make(name, point, seed)
        check(name, point, inputs, kernel.tunable.prepare(point, inputs, config).run)


FOREIGN = {
    "bgmv_shrink": {"BLOCK_R": 16, "BLOCK_K": 64, "SPLIT_K": 8, "num_warps": 4},
    "bgmv_expand": {"BLOCK_N": 64, "SPLIT_N": 8, "num_warps": 4},
    "sgmv_shrink": {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 64, "SPLIT_K": 8, "num_warps": 4, "num_stages": 2},
    "sgmv_expand": {"BLOCK_M": 64, "BLOCK_N": 256, "num_warps": 8},
}


@pytest.mark.parametrize(("name", "config"), FOREIGN.items())
def test_a_configuration_tuned_for_another_point_is_right(name: str, config: Config, seed: int) -> None:
    """More splits than blocks and tiles larger than the work: what the nearest tuned entry may bring."""
    point = point_of(3, 1 if name.startswith("bgmv") else 5, 130, 5)
    inputs = make(name, point, seed)
    check(name, point, inputs, kernel_of(name).tunable.prepare(point, inputs, config).run, calls=2)


SPLIT: list[tuple[str, Config]] = [
    ("bgmv_shrink", {"BLOCK_R": 4, "BLOCK_K": 64, "SPLIT_K": 4, "num_warps": 4}),
    ("bgmv_expand", {"BLOCK_N": 32, "SPLIT_N": 4, "num_warps": 4}),
    (
        "sgmv_shrink",
        {"BLOCK_M": 16, "BLOCK_N": 16, "BLOCK_K": 64, "SPLIT_K": 4, "num_warps": 4, "num_stages": 2},
    ),
    ("sgmv_expand", {"BLOCK_M": 16, "BLOCK_N": 64, "num_warps": 4}),
]
"""One of each kernel, with everything that can be split split."""


@pytest.mark.parametrize(("name", "config"), [case for case in SPLIT if case[0].startswith("bgmv")])
def test_many_tokens_of_a_lora_in_any_order(name: str, config: Config, seed: int) -> None:
    """What cards without the decode kernels run, however many tokens there are; some of them have no LoRA."""
    point = point_of(53, 1, 130, 5)
    inputs = make(name, point, seed, no_lora=2)
    check(name, point, inputs, kernel_of(name).tunable.prepare(point, inputs, config).run)


@pytest.mark.parametrize("none", [2, 5])
@pytest.mark.parametrize(("name", "config"), SPLIT)
def test_tokens_without_lora_stay_untouched(name: str, config: Config, none: int, seed: int) -> None:
    point = point_of(5, 1 if name.startswith("bgmv") else 17, 300, 12)
    inputs = make(name, point, seed, no_lora=none)
    inputs["y"][lora.token_indices(inputs) < 0] = float("nan")
    check(name, point, inputs, kernel_of(name).tunable.prepare(point, inputs, config).run)


@pytest.mark.parametrize(("name", "config"), SPLIT)
def test_indices_may_change_between_calls(name: str, config: Config, seed: int) -> None:
    """A captured graph is replayed for other LoRAs than those it was captured with."""
    point = point_of(5, 1 if name.startswith("bgmv") else 17, 300, 12)
    inputs = make(name, point, seed, no_lora=1)
    run = kernel_of(name).tunable.prepare(point, inputs, config).run
    for change in range(2):
        inputs["indices"].copy_(lora.draw_indices(5, 3, 2 * change, seed + change))
        check(name, point, inputs, run)


@pytest.mark.parametrize(("name", "config"), SPLIT)
def test_same_bits_every_time(name: str, config: Config, seed: int) -> None:
    point = point_of(3, 1 if name.startswith("bgmv") else 17, 300, 12)
    results = []
    for _ in range(2):
        inputs = make(name, point, seed)
        prepared = kernel_of(name).tunable.prepare(point, inputs, config)
        prepared.run()
        prepared.run()
        results.append(inputs["y"])
    assert torch.equal(*results)


@pytest.mark.parametrize(("name", "config"), [case for case in SPLIT if case[0].startswith("sgmv")])
def test_sequences_may_differ_in_length(name: str, config: Config, seed: int) -> None:
    """`seq_len` is the longest; a shorter sequence leaves its surplus tiles idle."""
    point = point_of(3, 33, 130, 12)
    whole = make(name, point, seed)
    lengths = torch.tensor([33, 0, 5], dtype=torch.int32)
    rows = int(lengths.sum())
    inputs = {
        **whole,
        "x": whole["x"][:rows].contiguous(),
        "y": whole["y"][:rows].contiguous(),
        "seq_lens": lengths,
        "seq_starts": torch.tensor([0, 33, 33], dtype=torch.int32),
    }
    check(name, point, inputs, kernel_of(name).tunable.prepare(point, inputs, config).run)


@pytest.mark.parametrize(("name", "config"), SPLIT)
def test_nothing_but_y_is_written(name: str, config: Config, seed: int) -> None:
    point = point_of(3, 1 if name.startswith("bgmv") else 17, 300, 12)
    inputs = make(name, point, seed)
    before = {key: value.clone() for key, value in inputs.items() if key != "y"}
    kernel_of(name).tunable.prepare(point, inputs, config).run()
    for key, value in before.items():
        assert torch.equal(inputs[key], value), key
