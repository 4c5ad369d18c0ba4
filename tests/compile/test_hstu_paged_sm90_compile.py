"""The paged Hopper kernel compiles for sm_90a without spilling, within a block's shared memory, unserialised."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest
import torch
import triton

from smbench_kernels import hardware, hstu_paged_sm90, nvrtc
from smbench_kernels.hstu_attention_sm90_kernels import FEATURES, Stream

HOPPER = 90


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(
    ("page_size", "config"),
    [(16, hstu_paged_sm90.MANY), (32, hstu_paged_sm90.FEW), (64, hstu_paged_sm90.MANY), (128, hstu_paged_sm90.FEW)],
)
def test_the_kernel_compiles_without_spilling(page_size: int, config: Stream, tmp_path: Path) -> None:
    cubin = tmp_path / "kernel.cubin"
    dtype = torch.float16 if page_size == 64 else torch.bfloat16
    macros = hstu_paged_sm90.macros(config, page_size, dtype)
    source = hstu_paged_sm90.source(config.tile)
    cubin.write_bytes(nvrtc.compile_source(source, macros, f"{HOPPER}{FEATURES}"))
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
    dump = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert "STACK:0" in dump
    # pages and own rows by tensor maps, products by warpgroups, registers moved to those that multiply
    assert "UTMALDG.4D" in dump and "UTMALDG.3D" in dump and "USETMAXREG" in dump
    # it waits for the launch in front, and lets the next one start
    assert "ACQBULK" in dump and "PREEXIT" in dump
    # before, in and after the loop: scores, scores and sums, sums
    assert dump.count("HGMMA") == 2 * 256 // 16 + 2 * config.tile // 16
    # ptxas waits after each product where it cannot tell that registers are left alone
    assert dump.count("WARPGROUP.DEPBAR") == 4
    # what is asked for at the launch, and what the kernel and the driver have of themselves
    declared = re.search(r"SHARED:(\d+)", dump)
    assert declared and int(declared[1]) + hstu_paged_sm90.shared_bytes(config) <= 228 * 1024
    assert hstu_paged_sm90.shared_bytes(config) <= hardware.TYPICAL[HOPPER].shared_bytes_per_program
