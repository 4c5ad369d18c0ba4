"""The decode kernels compile for every supported architecture, within its shared memory, without spilling."""

from __future__ import annotations

import itertools
import random
import re
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import triton

from smbench_kernels import configs, hardware, lora_decode, lora_decode_ops, lora_decode_space, nvrtc
from smbench_kernels.lora_decode import Launch, Shape
from smbench_kernels.lora_decode_ops import CLUSTERS_FROM, LOWEST, DecodeKernel
from smbench_kernels.op import Config, Point, load
from smbench_kernels.own import KERNEL, OwnKernel

pytestmark = pytest.mark.usefixtures("compiler")
CAPABILITIES = (80, 86, 89, 90)
SPILL_LIMIT_BYTES = 16
"""Of one thread: ptxas parks a value or two outside of loops though registers are left, which costs nothing."""
SAMPLE = 1
"""Configurations of each search space that one run compiles for each architecture, besides defaults."""
SHAPES = [
    Shape(256, 14336, 64, (14336,), 8, True),
    Shape(32, 4096, 16, (4096, 1024, 1024), 32, False),
    Shape(40, 127, 5, (33, 50), 3, True),
    Shape(17, 3424, 128, (3424,), 2, False),
]


def dump(launch: Launch, capability: int, what: str) -> str:
    """What cuobjdump says of a compiled kernel: `-res-usage`, or `-sass`, which takes longer than to compile it."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(nvrtc.compiled(launch.source, launch.macros, capability))
        command = [triton.knobs.nvidia.cuobjdump.path, what, str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def opcodes(launch: Launch, capability: int) -> list[str]:
    text = dump(launch, capability, "-sass")
    return re.findall(r"^\s+/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)", text, re.MULTILINE)


def check(launch: Launch, capability: int) -> None:
    sys.stderr.write(f"{launch.binary()} for {capability}\n")
    found = re.search(r"STACK:(\d+)", dump(launch, capability, "-res-usage"))
    assert found
    assert int(found[1]) <= SPILL_LIMIT_BYTES
    assert launch.shared_bytes <= hardware.TYPICAL[capability].shared_bytes_per_program


@pytest.mark.parametrize("capability", [86, 90])
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.hidden}-{shape.rank}")
def test_configurations_of_the_search_spaces(shape: Shape, capability: int) -> None:
    on_card = replace(shape, clusters=capability >= 90)
    room = hardware.TYPICAL[capability].shared_bytes_per_program
    shrinks = [lora_decode.shrink_launch(on_card, config) for config in lora_decode_space.shrink_space(shape)]
    for launch in random.sample([one for one in shrinks if one.shared_bytes <= room], SAMPLE):
        check(launch, capability)
    for config in random.sample(lora_decode_space.expand_space(shape), SAMPLE):
        check(lora_decode.expand_launch(on_card, config, ahead=on_card.clusters), capability)
    fused = lora_decode_space.fused_space(shape)
    for config in random.sample(fused, min(SAMPLE, len(fused))) if capability >= 90 else ():
        check(lora_decode.fused_launch(on_card, config), capability)


def point_of(batch: int, hidden: int, rank: int) -> Point:
    sizes = {"batch": batch, "seq_len": 1, "hidden_size": hidden, "rank": rank, "num_loras": 8}
    return {**sizes, "dtype": "bfloat16"}


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("decode", [lora_decode_ops.SHRINK, lora_decode_ops.EXPAND], ids=["shrink", "expand"])
def test_the_best_by_the_model_is_a_decode_kernel_and_compiles_ahead(decode: DecodeKernel, capability: int) -> None:
    kernel: OwnKernel = load(f"smbench_kernels.bgmv_{'expand' if decode.expands else 'shrink'}:KERNEL")
    for point in (point_of(256, 14336, 64), point_of(3, 127, 5)):
        config = kernel.cuda_config(point, hardware.TYPICAL[capability])
        assert config[KERNEL] == lora_decode_ops.NUMBER
        assert kernel.tunable.precompile(point, config, capability) == kernel.binary(point, config)
        check(decode.launch(decode.shape(point, capability), config), capability)
    if capability in (LOWEST, CLUSTERS_FROM):
        found = opcodes(decode.launch(decode.shape(point, capability), config), capability)
        assert any(code.startswith("HMMA") for code in found)


def test_equal_binary_means_equal_macros() -> None:
    kernel: OwnKernel = load("smbench_kernels.bgmv_shrink:KERNEL")
    assert kernel.cuda
    for points in ((point_of(32, 4096, 16), point_of(40, 8192, 16)), (point_of(32, 4096, 16), point_of(32, 4100, 16))):
        pairs = {kernel.binary(point, config) for point in points for config in [SMALL]}
        assert len(pairs) == (1 if int(points[1]["hidden_size"]) % 8 == 0 else 2)


WIDE_OR_PRODUCT = re.compile(r"LDG.*128\.CONSTANT|HMMA")
SMALL: Config = {
    **{KERNEL: 2, "CHUNK": 8, "TILES": 1, "WARPS": 4, "STAGES": 0, "STEPS": 2, "PARTS": 8, "CLUSTER": 1},
}


@pytest.mark.parametrize("steps", [1, 2, 4])
def test_shrink_has_all_loads_of_a_round_under_way_before_it_multiplies(steps: int) -> None:
    """What decides its time. The compiler saves registers instead, unless told that it need not."""
    launch = lora_decode.shrink_launch(Shape(8, 4096, 16, (4096,), 1, True), {**SMALL, "STEPS": steps})
    for capability in (80, 90):
        found = opcodes(launch, capability)
        wide = ["load" if "128.CONSTANT" in code else "product" for code in found if WIDE_OR_PRODUCT.match(code)]
        assert "product" in wide
        rounds = [len(list(codes)) for kind, codes in itertools.groupby(wide) if kind == "load"]
        # the compiler may put several rounds together
        assert rounds and all(loads % (3 * steps) == 0 for loads in rounds)


def test_shipped_configurations_are_of_the_space() -> None:
    for name in ("bgmv_shrink", "bgmv_expand"):
        kernel: OwnKernel = load(f"smbench_kernels.{name}:KERNEL")
        for path in configs.ROOT.glob(f"*/{name}.json"):
            for entry in configs.load(path).entries:
                assert KERNEL not in entry.config or entry.config in kernel.tuning_space(entry.point)


@pytest.mark.parametrize(
    ("name", "batch", "hidden", "rank", "portable"),
    [
        ("bgmv_shrink", 16, 4096, 16, True),
        ("bgmv_shrink", 16, 4608, 16, False),
        ("bgmv_shrink", 64, 4096, 16, False),
        ("bgmv_expand", 32, 14336, 16, True),
        ("bgmv_expand", 1, 14336, 16, False),
        ("bgmv_expand", 64, 14336, 16, False),
        ("bgmv_expand", 32, 14336, 64, False),
    ],
)
def test_the_portable_kernel_is_the_default_where_it_was_measured_to_be_faster(
    name: str, batch: int, hidden: int, rank: int, portable: bool
) -> None:
    """kernels/NOTES.md has the times. With 8 LoRAs, 32 tokens are 4 of each."""
    kernel: OwnKernel = load(f"smbench_kernels.{name}:KERNEL")
    point = point_of(batch, hidden, rank)
    config = kernel.default_config(point, hardware.TYPICAL[90])
    assert (KERNEL not in config) == portable
    assert config in kernel.tuning_space(point)
