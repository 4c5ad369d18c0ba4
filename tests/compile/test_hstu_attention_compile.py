"""The Triton HSTU attention compiles for every architecture: default configurations, shared memory, spills.

With candidates and context, whose masks take the most registers.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from itertools import product

import pytest
import torch

from smbench_kernels import hardware
from smbench_kernels import hstu_attention_configs as configurations
from smbench_kernels import hstu_attention_triton as launches
from smbench_kernels import hstu_attention_tuning as tuning
from smbench_kernels.compile import compile_for, resources
from smbench_kernels.hstu import Jagged, Shape, split_uvqk
from smbench_kernels.hstu_attention_triton import Problem
from smbench_kernels.launch import Call
from smbench_kernels.op import Config, Point, Tunable

CAPABILITIES = (80, 86, 89, 90)
SPILL_LIMIT_BYTES = {64: 16, 128: 64, 256: 256}
"""Of one thread, by head size: what ptxas parks lies between the loops and in the masked one, of a few tiles."""
TOKENS = 64


def problem_of(head_dim: int, masks: bool = True) -> Problem:
    one = torch.ones(1, dtype=torch.int32) if masks else None
    batch = Jagged(torch.tensor([0, TOKENS], dtype=torch.int32), 1024, one, one)
    return Problem(batch, 2, head_dim, head_dim**-0.5)


def calls(problem: Problem, capability: int, kept: bool, dtype: torch.dtype = torch.bfloat16) -> Iterator[Call]:
    """Forward and backward launches on views of one tensor, as in a layer."""
    head_dim = problem.head_dim
    shape = Shape(1, problem.heads, head_dim)
    _, v, q, k = split_uvqk(torch.empty(TOKENS, 4 * shape.width, dtype=dtype), shape)
    _, dv, dq, dk = split_uvqk(torch.empty(TOKENS, 4 * shape.width, dtype=dtype), shape)
    out = torch.empty(TOKENS, problem.heads, head_dim, dtype=dtype)
    forward = configurations.default_forward(capability, head_dim)
    yield launches.forward_call(problem, q, k, v, out, forward)
    backward = configurations.default_backward(capability, head_dim, kept)
    keeps = backward["KEPT"] == configurations.KEPT
    kept_tensor = torch.empty(problem.items * problem.kept_elements(), dtype=dtype) if keeps else None
    yield from launches.backward_calls(problem, out, q, k, v, dq, dk, dv, kept_tensor, backward)


@pytest.mark.parametrize(
    ("capability", "head_dim", "kept"),
    [
        *((80, 128, True), (80, 256, True)),
        *((86, 64, True), (86, 256, True), (86, 256, False)),
        *((89, 128, True),),
        *((90, 64, True), (90, 128, True), (90, 256, True), (90, 256, False)),
    ],
)
def test_default_configurations_compile_within_the_limits(capability: int, head_dim: int, kept: bool) -> None:
    for call in calls(problem_of(head_dim), capability, kept):
        compiled = compile_for(call, capability)
        found = resources(compiled)
        sys.stderr.write(f"{call.kernel.__name__} {found.shared_bytes} {found.registers} {found.stack_bytes}\n")
        assert found.shared_bytes <= hardware.TYPICAL[capability].shared_bytes_per_program
        assert found.stack_bytes <= SPILL_LIMIT_BYTES[head_dim]
        if capability == 90:
            # products of warp groups and the copy engine, nothing older
            ptx = compiled.asm["ptx"]
            assert "wgmma.mma_async" in ptx
            assert "cp.async.bulk.tensor" in ptx
            assert not re.search(r"\bmma\.sync", ptx)


def test_padded_heads_take_pointers() -> None:
    """The copy engine would read into the next head."""
    forward = next(calls(problem_of(80, masks=False), 90, kept=True))
    ptx = compile_for(forward, 90).asm["ptx"]
    assert "wgmma.mma_async" in ptx
    assert "cp.async.bulk.tensor" not in ptx


@pytest.mark.parametrize("mask", ["causal", "contextual"])
def test_precompiling_fills_the_cache_entries_that_a_launch_looks_up(mask: str) -> None:
    """Other batches, lengths and numbers of heads share their kernels."""
    axes: dict[str, int | str] = {
        "batch": 5,
        "seq_len": 4096,
        "lengths": "jagged",
        "heads": 3,
        "head_dim": 64,
        "dtype": "bfloat16",
    }
    point: Point = {**axes, "mask": mask}
    device = hardware.TYPICAL[90]
    keys = [
        key
        for tunable in (tuning.FORWARD, tuning.BACKWARD)
        for key in tunable.precompile(point, tunable_default(tunable, point, device), 90).split("+")
    ]
    launched = calls(problem_of(64, masks=mask == "contextual"), 90, kept=True)
    assert keys == [compile_for(call, 90).hash for call in launched]
    for tunable in (tuning.FORWARD, tuning.BACKWARD):
        config = tunable_default(tunable, point, device)
        other = {**point, "batch": 2, "seq_len": 1000, "heads": 2}
        assert tunable.binary(point, config) == tunable.binary(other, config)
        assert tunable.binary(point, config) != tunable.binary({**point, "dtype": "float16"}, config)


def tunable_default(tunable: Tunable, point: Point, device: hardware.Hardware) -> Config:
    assert tunable.default is not None
    return tunable.default(point, device)


def test_the_default_is_one_of_the_candidates() -> None:
    for head_dim, tunable in product((32, 64, 128, 256), (tuning.FORWARD, tuning.BACKWARD)):
        point: Point = {
            **{"batch": 2, "seq_len": 4096, "lengths": "full", "heads": 2, "head_dim": head_dim},
            **{"dtype": "bfloat16", "mask": "causal"},
        }
        space = tunable.space(point)
        assert tunable_default(tunable, point, hardware.TYPICAL[90]) in space
        facts = hardware.TYPICAL[90].facts()
        times = [tunable.predict(point, config, facts) for config in space]
        # what the default takes is not pruned away by the model
        assert tunable.predict(point, tunable_default(tunable, point, hardware.TYPICAL[90]), facts) <= 1.5 * min(times)


def test_every_architecture_has_a_row_for_every_head_size() -> None:
    for capability in CAPABILITIES:
        for head_dim in (1, 32, 64, 100, 128, 192, 256):
            assert configurations.default_forward(capability, head_dim)["ROWS"] >= 16
            for kept in (False, True):
                backward = configurations.default_backward(capability, head_dim, kept)
                assert backward["KEPT"] == configurations.RECOMPUTED or kept
                # tiles of dS divide a block of the workspace
                assert all(launches.BLOCK % backward[key] == 0 for key in backward if key.endswith(("ROWS", "COLUMNS")))
