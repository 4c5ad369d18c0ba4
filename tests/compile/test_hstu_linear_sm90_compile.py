"""The Hopper kernels of HSTU inference around its attention compile for sm_90a without spilling, unserialised."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import torch
import triton

from smbench_kernels import hardware, hstu_linear_sm90, hstu_norm_sm90, nvrtc
from smbench_kernels.hstu_linear_sm90 import KNOWN, Product, Tiles, soonest
from smbench_kernels.hstu_linear_sm90_source import source

HOPPER = f"{hstu_linear_sm90.CAPABILITY}{hstu_linear_sm90.FEATURES}"
SMS = hardware.TYPICAL[hstu_linear_sm90.CAPABILITY].sm_count


def dumped(cubin: bytes, folder: Path) -> str:
    """Machine code and resources."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(path)]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("tiles", [tiles for tiles, _ in KNOWN], ids=str)
@pytest.mark.parametrize("residual", [False, True])
def test_the_product_compiles_without_spilling(tiles: Tiles, residual: bool, tmp_path: Path) -> None:
    product = Product(tiles, not residual, not residual, residual, torch.float16 if residual else torch.bfloat16)
    dump = dumped(nvrtc.compile_source(source(tiles.columns), product.macros, HOPPER), tmp_path)
    assert "STACK:0" in dump
    # four products of 64 x columns x 16 a buffer, the weight read along its rows
    assert dump.count("HGMMA") == 4 and dump.count(".tnspB") == 4
    assert "UTMALDG.3D" in dump and "UTMASTG.2D" in dump
    # ptxas waits after each product where it cannot tell that registers are left alone
    assert dump.count("WARPGROUP.DEPBAR") == 2
    assert product.stages >= 3
    assert product.shared_bytes <= hardware.TYPICAL[hstu_linear_sm90.CAPABILITY].shared_bytes_per_program


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("gate", [False, True])
def test_the_norm_compiles_without_spilling(gate: bool, tmp_path: Path) -> None:
    width = hstu_norm_sm90.PIECE * hstu_norm_sm90.MOST_PIECES
    macros = hstu_norm_sm90.macros(width, gate, torch.bfloat16)
    dump = dumped(nvrtc.compile_source(hstu_norm_sm90.source(), macros, HOPPER), tmp_path)
    assert "STACK:0" in dump
    # 16 bytes at a time: weight, bias, x and u, then what is made of them
    assert dump.count("LDG.E.128") == (4 if gate else 3) * hstu_norm_sm90.MOST_PIECES
    assert dump.count("STG.E.128") == hstu_norm_sm90.MOST_PIECES


def test_few_rows_get_small_tiles() -> None:
    """What an H200 takes in the fewest rounds: one wave of the output product, and of 384 rows."""
    for rows, columns in ((3072, 1024), (384, 4096), (384, 1024)):
        tiles = soonest(rows, columns, SMS)
        product = Product(tiles, False, False, True, torch.bfloat16)
        assert product.count(rows, columns)[1] <= SMS
    assert soonest(384, 1024, SMS).columns < soonest(3072, 4096, SMS).columns
