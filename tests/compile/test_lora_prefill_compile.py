"""The Hopper prefill kernels compile for sm_90a without spilling and fit a block's shared memory."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from smbench_kernels import hardware, lora_decode_wide, nvrtc
from smbench_kernels import lora_prefill_kernels as kernels
from smbench_kernels.launch import ceil_div
from smbench_kernels.lora_prefill_kernels import Expand, Shrink
from smbench_kernels.op import Config, Point, load
from smbench_kernels.own import OwnKernel

BF16, F16 = torch.bfloat16, torch.float16
CASES: list[Shrink | Expand] = [
    Shrink(64, 16, 1, 1, 1, 2, True, False, BF16),
    Shrink(128, 64, 1, 8, 1, 1, True, False, BF16),
    # the most sums that a thread keeps
    Shrink(128, 192, 1, 2, 1, 1, True, False, F16),
    Shrink(128, 64, 3, 4, 1, 1, False, True, BF16),
    # the most parts of a row that a thread adds up
    Shrink(64, 64, 1, 16, 1, 2, True, True, BF16, split=2),
    Expand(128, 64, 1, 1, 1, False, False, BF16),
    Expand(64, 16, 1, 1, 2, False, False, F16),
    Expand(128, 256, 1, 1, 1, False, False, BF16),
    Expand(128, 64, 3, 1, 1, True, True, F16),
]


def point_of(rank: int, hidden: int = 4096, seq_len: int = 512) -> Point:
    sizes = {"batch": 16, "seq_len": seq_len, "hidden_size": hidden, "rank": rank, "num_loras": 8}
    return {**sizes, "dtype": "bfloat16"}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("kernel", CASES, ids=str)
def test_the_kernel_compiles_without_spilling(kernel: Shrink | Expand, tmp_path: Path) -> None:
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(nvrtc.compiled(kernels.source(kernel), kernel.macros, f"{kernels.CAPABILITY}a"))
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "STACK:0" in dump
    # products by warpgroups, as many as a stage has of 16 deep, copies by tensor map of two and three dimensions
    depth = kernel.inner if isinstance(kernel, Expand) else kernels.COLUMNS
    assert dump.count("HGMMA") == kernel.chunks * depth // 16
    assert "UTMALDG.2D" in dump
    assert "UTMALDG.3D" in dump
    assert ("UTMASTG.2D" in dump) == isinstance(kernel, Expand)
    # ptxas waits after each product where it cannot tell that registers are left alone
    assert dump.count("WARPGROUP.DEPBAR") <= 2


@pytest.mark.parametrize("expands", [False, True])
def test_every_configuration_of_the_space_fits(expands: bool) -> None:
    kernel: OwnKernel = load(f"smbench_kernels.sgmv_{'expand' if expands else 'shrink'}:KERNEL")
    room = hardware.TYPICAL[kernels.CAPABILITY].shared_bytes_per_program + hardware.KIB
    for rank, hidden in itertools.product((8, 16, 64, 128, 256), (64, 4096, 14336)):
        point = point_of(rank, hidden)
        ours = [config for config in kernel.tuning_space(point) if "TOKENS" in config]
        assert ours
        for config in ours:
            built = kernel.cuda.kernel(point, config)  # type: ignore[union-attr]
            assert built.stages >= 2
            assert config["PER_SM"] * (built.shared_bytes + hardware.KIB) <= room
            # a warpgroup starts at a multiple of four warps; the hardware has 64 for all blocks of a multiprocessor
            assert config["PER_SM"] * built.threads <= 2048


@pytest.mark.parametrize("name", ["sgmv_shrink", "sgmv_expand"])
def test_cards_get_what_they_can_run(name: str) -> None:
    """Long batches get the Hopper kernel on Hopper; other cards, and ranks that it does not take, the portable one."""
    kernel: OwnKernel = load(f"smbench_kernels.{name}:KERNEL")
    for capability, device in hardware.TYPICAL.items():
        assert ("TOKENS" in kernel.default_config(point_of(64), device)) == (capability == kernels.CAPABILITY)
    odd = point_of(5, hidden=100)
    assert "TOKENS" not in kernel.default_config(odd, hardware.TYPICAL[kernels.CAPABILITY])
    assert all("TOKENS" not in config for config in kernel.tuning_space(odd))


def wide_configs(kernel: OwnKernel, point: Point) -> list[Config]:
    return [config for config in kernel.tuning_space(point) if config.get("KERNEL") == lora_decode_wide.NUMBER]


def decode_point(tokens: int, loras: int, rank: int = 64, hidden: int = 4096) -> Point:
    return {**point_of(rank, hidden, seq_len=1), "batch": tokens, "num_loras": loras}


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("name", ["bgmv_shrink", "bgmv_expand"])
def test_many_tokens_of_one_lora_may_be_served_by_the_wide_kernel(name: str) -> None:
    """On Hopper, where a LoRA has tokens enough; expand by default too, as far as the model likes it; not elsewhere."""
    kernel: OwnKernel = load(f"smbench_kernels.{name}:KERNEL")
    many = decode_point(256, 1)
    wide = wide_configs(kernel, many)
    assert wide and not wide_configs(kernel, decode_point(256, 32))
    assert wide_configs(kernel, decode_point(48, 1)) and not wide_configs(kernel, decode_point(47, 1))
    for capability in hardware.TYPICAL:
        for config in wide[:2]:
            binary = kernel.tunable.precompile(many, config, capability)
            assert binary == kernel.binary(many, config)
    for capability, device in hardware.TYPICAL.items():
        config = kernel.cuda_config(many, device)
        by_default = name == "bgmv_expand" and capability == kernels.CAPABILITY
        assert by_default or config["KERNEL"] != lora_decode_wide.NUMBER


def test_the_wide_shrink_fits_and_gives_most_multiprocessors_a_block() -> None:
    """It comes behind the decode kernels; shares of ranks are made only where they make more blocks."""
    kernel: OwnKernel = load("smbench_kernels.bgmv_shrink:KERNEL")
    room = hardware.TYPICAL[kernels.CAPABILITY].shared_bytes_per_program + hardware.KIB
    for tokens, rank, hidden in itertools.product((64, 256), (8, 19, 64, 256), (4096, 14336)):
        point = decode_point(tokens, 1, rank, hidden)
        every, wide = kernel.tuning_space(point), wide_configs(kernel, point)
        assert 0 < len(wide) <= lora_decode_wide.MOST_CONTENDERS and every[-len(wide) :] == wide != every
        built = [
            Shrink(
                *(config["TOKENS"], rank, 1, config["CLUSTER"], config["CHUNKS"], config["PER_SM"]),
                *(True, True, BF16, config["SPLIT"]),
            )
            for config in wide
        ]
        assert len({str(one.macros) for one in built}) == len(wide), "two configurations of one kernel"
        for one in built:
            assert one.stages >= 2
            assert one.per_sm * (one.shared_bytes + hardware.KIB) <= room
        if tokens == 256 and rank >= 64:
            assert ceil_div(tokens, built[0].tokens) * built[0].rank_tiles * built[0].cluster >= 64
