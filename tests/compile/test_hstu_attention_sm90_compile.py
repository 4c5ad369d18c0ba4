"""The Hopper attention kernels compile for sm_90a without spilling, within a block's shared memory, unserialised."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import triton

from smbench_kernels import hardware, nvrtc
from smbench_kernels import hstu_attention_sm90_kernels as kernels
from smbench_kernels.hstu_attention_sm90 import DEFAULT, Stream

HOPPER = 90
# what each kernel multiplies of a tile, in instructions of 16 deep: (scores products, products by a tile's rows)
PRODUCTS = {kernels.FORWARD: (1, 1), kernels.DKDV: (2, 2), kernels.DQ: (2, 1), kernels.DQ_KEPT: (0, 1)}
STREAMS = {
    kernels.FORWARD: DEFAULT.forward,
    kernels.DKDV: DEFAULT.dkdv,
    kernels.DQ: DEFAULT.dq,
    kernels.DQ_KEPT: DEFAULT.dq_kept,
}
BF16, F16 = torch.bfloat16, torch.float16
CASES = [
    (kernels.FORWARD, BF16, False),
    (kernels.DKDV, BF16, True),
    (kernels.DKDV, F16, False),
    (kernels.DQ, F16, False),
    (kernels.DQ_KEPT, BF16, False),
]


def assembled(name: str, stream: Stream, dtype: torch.dtype, keeps: bool, folder: Path) -> str:
    """What cuobjdump says of a kernel."""
    cubin = folder / "kernel.cubin"
    macros = kernels.macros(name, stream, dtype, keeps)
    cubin.write_bytes(nvrtc.compile_source(kernels.source(name, stream.tile), macros, f"{HOPPER}{kernels.FEATURES}"))
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("name", "dtype", "keeps"), CASES)
def test_the_kernel_compiles_without_spilling(name: str, dtype: torch.dtype, keeps: bool, tmp_path: Path) -> None:
    stream = STREAMS[name]
    dump = assembled(name, stream, dtype, keeps, tmp_path)
    assert "STACK:0" in dump
    # copies by tensor map, products by warpgroups, registers moved from the group that copies to those that multiply
    scores, others = PRODUCTS[name]
    assert dump.count("HGMMA") >= scores * 256 // 16 + others * stream.tile // 16
    assert "UTMALDG.3D" in dump
    assert "USETMAXREG" in dump
    # ptxas waits after each product where it cannot tell that registers are left alone
    assert dump.count("WARPGROUP.DEPBAR") < 12
    assert ("STG.E " in dump) == keeps


@pytest.mark.parametrize("name", STREAMS)
def test_the_kernel_fits_a_blocks_shared_memory(name: str) -> None:
    assert kernels.shared_bytes(name, STREAMS[name]) <= hardware.TYPICAL[HOPPER].shared_bytes_per_program


def test_tiles_are_whole_groups_of_swizzled_rows() -> None:
    """Descriptors count in groups of 8 rows of 1024 bytes and in products of 16."""
    assert all(stream.tile % 16 == 0 for stream in STREAMS.values())
    # the gradients of scores are kept in blocks of 64 keys, and the streams of dk and dv go in step
    assert DEFAULT.dq_kept.tile == kernels.KEYS
    assert DEFAULT.dkdv.first == DEFAULT.dkdv.second
