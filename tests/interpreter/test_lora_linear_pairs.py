"""Every pair of lora_linear computes the definition: CUDA C++ emulated, plans and the portable expand interpreted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import torch

import emulated_cuda
import emulated_sm90
from smbench_kernels import lora, lora_linear, lora_linear_own, lora_prefill, lora_prefill_expand_source, nvrtc
from smbench_kernels.lora_linear_expands import EXPANDS, PORTABLE, WAITING, WIDE
from smbench_kernels.lora_linear_space import joined
from smbench_kernels.lora_prefill_source import TILES
from smbench_kernels.op import Config, Inputs, Point, Prepared, UnsupportedPoint
from smbench_kernels.own import KERNEL
from smbench_kernels.registry import op as find_op

pytestmark = pytest.mark.skipif(emulated_cuda.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++")
CPU = torch.device("cpu")
OP = find_op("lora_linear")
TOKENS, LORAS = 21, 3
SHRINK: Config = {"CHUNK": 16, "TILES": 1, "WARPS": 2, "STAGES": 0, "STEPS": 1, "PARTS": 2, "CLUSTER": 1}
PARTS: dict[str, tuple[str, Config]] = {
    "ahead": ("qkv", {"CHUNK": 16, "WARPS": 2, "BLOCKS": 1}),
    "waiting": ("qkv", {KERNEL: WAITING, "CHUNK": 8, "WARPS": 2, "BLOCKS": 1}),
    "wide": ("qkv", {KERNEL: WIDE, "TOKENS": 64, "CHUNKS": 1, "PER_SM": 1, "RUN": 2}),
    "portable": ("square", {KERNEL: PORTABLE, "BLOCK_N": 64, "SPLIT_N": 3, "num_warps": 1}),
}


@dataclass(frozen=True)
class Emulated:
    """What stands in for a kernel that NVRTC compiles."""

    source: str
    name: str
    macros: Mapping[str, int]

    def launcher(self, *launch: Any, cluster: int = 1, dependent: bool = False) -> Callable[[], object]:
        run: Callable[..., object] = emulated_cuda.launch
        source = self.source
        if self.name == "lora_prefill_expand":
            run, source = emulated_sm90.launch, TILES + lora_prefill_expand_source.KERNEL
        return partial(run, source, self.name, self.macros, *launch, cluster=cluster)


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels for Hopper run here."""
    monkeypatch.setattr(nvrtc, "kernel", lambda source, name, macros, *_: Emulated(source, name, macros))
    encode = emulated_sm90.tensor_map
    monkeypatch.setattr(lora_prefill, "bound_expand", partial(lora_prefill.bound_expand, encode=encode))


def point_of(projection: str, **axes: int | str) -> Point:
    sizes: Point = {"batch": TOKENS, "seq_len": 1, "hidden_size": 160, "rank": 16, "num_loras": LORAS}
    return {**sizes, "dtype": "bfloat16", "projection": projection, "prefill": "all", **axes}


def pair(point: Point, inputs: Inputs, expand: Config) -> Prepared:
    batch = lora_linear_own._Batch.of(point, inputs)
    return batch._pair(joined(SHRINK, expand), "given", 90)


def test_there_is_a_case_for_every_expand() -> None:
    assert {part.get(KERNEL, 0) for _, part in PARTS.values()} == set(EXPANDS)


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize("name", PARTS)
def test_a_pair_accumulates_the_definition_and_follows_the_indices(name: str, seed: int) -> None:
    projection, expand = PARTS[name]
    point = point_of(projection)
    inputs = lora_linear.make_inputs(point, seed, CPU, no_lora=4)
    prepared = pair(point, inputs, expand)
    for without in (TOKENS - 2, 3):
        # other LoRAs with the next step
        inputs["indices"].copy_(lora.draw_indices(TOKENS, LORAS, without, seed + without))
        prepared.begin()
        used = inputs["indices"] >= 0
        inputs["x"].normal_()
        inputs["y"].normal_()
        # what tokens without a LoRA hold must not matter
        inputs["x"][~used], inputs["y"][~used] = torch.nan, torch.nan
        before, expected = inputs["y"].double(), OP.expected(point, inputs)["y"]
        prepared.run()
        assert inputs["y"][~used].isnan().all(), "a row of a token without a LoRA was written"
        error, change = (inputs["y"].double() - expected)[used], (expected - before)[used]
        assert error.norm() <= OP.tolerance(point).relative * change.norm()


@pytest.mark.usefixtures("hopper")
def test_an_expand_whose_rings_do_not_fit_is_refused(seed: int) -> None:
    point = point_of("square", rank=256)
    expand: Config = {KERNEL: WIDE, "TOKENS": 64, "CHUNKS": 2, "PER_SM": 2, "RUN": 2}
    with pytest.raises(UnsupportedPoint, match="is too large for 2 blocks"):
        pair(point, lora_linear.make_inputs(point, seed, CPU), expand)
