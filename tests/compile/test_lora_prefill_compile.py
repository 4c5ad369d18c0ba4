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
from smbench_kernels.lora_prefill_kernels import Expand, Shrink
from smbench_kernels.op import Point, load
from smbench_kernels.own import OwnKernel

BF16, F16 = torch.bfloat16, torch.float16
CASES: list[Shrink | Expand] = [
    Shrink(64, 16, 1, 1, 1, 2, True, False, BF16),
    Shrink(128, 64, 1, 8, 1, 1, True, False, BF16),
    # the most sums that a thread keeps
    Shrink(128, 192, 1, 2, 1, 1, True, False, F16),
    Shrink(128, 64, 3, 4, 1, 1, False, True, BF16),
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


@pytest.mark.usefixtures("compiler")
def test_many_tokens_of_one_lora_may_be_expanded_by_the_wide_kernel() -> None:
    """On Hopper, where a LoRA has tokens enough; by default too, as far as the model likes it. Never elsewhere."""
    kernel: OwnKernel = load("smbench_kernels.bgmv_expand:KERNEL")
    few, many = ({**point_of(64), "seq_len": 1, "batch": 256, "num_loras": loras} for loras in (32, 1))
    wide = [config for config in kernel.tuning_space(many) if config.get("KERNEL") == lora_decode_wide.NUMBER]
    assert wide and not any(config.get("KERNEL") == lora_decode_wide.NUMBER for config in kernel.tuning_space(few))
    for capability in hardware.TYPICAL:
        for config in wide[:2]:
            binary = kernel.tunable.precompile(many, config, capability)
            assert binary == kernel.binary(many, config)
    for capability, device in hardware.TYPICAL.items():
        config = kernel.cuda_config(many, device)
        assert capability == kernels.CAPABILITY or config["KERNEL"] != lora_decode_wide.NUMBER
