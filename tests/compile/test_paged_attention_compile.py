"""The paged attention kernels compile for every supported architecture, within its shared memory, without spilling."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import triton

from smbench_kernels import configs, hardware, nvrtc, paged_attention, paged_attention_classic, paged_attention_triton
from smbench_kernels.compile import resources
from smbench_kernels.op import Config, Point, load
from smbench_kernels.paged_attention_classic_source import SOURCE as CLASSIC
from smbench_kernels.paged_attention_source import SOURCE

CAPABILITIES = (80, 86, 89, 90)
SPILL_LIMIT_BYTES = {128: 16, 256: 1024}
"""Of one thread, by the largest head size: ptxas parks a value or two outside of loops though registers are left, which
costs nothing. Heads of 256 elements do not fit the Triton kernel's registers; the CUDA kernel is there for those."""


def point_of(heads: int, kv_heads: int, **axes: int | str) -> Point:
    plain: dict[str, int | str] = {"head_dim": 128, "dtype": "float16", "batch": 16, "seq_len": 1024}
    words: dict[str, int | str] = {
        "lengths": "equal",
        "block_size": 16,
        "layout": "fair",
        "memory": "device",
        "address": "table",
    }
    return {"heads": heads, "kv_heads": kv_heads, **plain, **words, **axes}


POINTS = [
    point_of(40, 40, block_size=1),
    point_of(32, 8),
    point_of(32, 8, head_dim=64, dtype="bfloat16", batch=1),
    point_of(16, 2, head_dim=256),
    point_of(40, 2, head_dim=80, address="contiguous", layout="document", seq_len=4096),
]


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point['heads']}-{point['kv_heads']}-{point['head_dim']}")
def test_the_triton_kernel_fits(point: Point, capability: int) -> None:
    config = paged_attention_triton.default_config(point)
    found = resources(paged_attention_triton.compiled(point, config, capability))
    assert found.shared_bytes <= hardware.TYPICAL[capability].shared_bytes_per_program
    assert found.stack_bytes <= next(
        limit for size, limit in SPILL_LIMIT_BYTES.items() if int(point["head_dim"]) <= size
    )


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point['heads']}-{point['kv_heads']}-{point['head_dim']}")
def test_the_default_configuration_fits_the_card(point: Point, capability: int) -> None:
    card = hardware.TYPICAL[capability]
    config = paged_attention.default_config(point, card)
    assert paged_attention.shared_bytes(point, config) <= card.shared_bytes_per_program
    assert config in paged_attention.space(point)


def test_shipped_configurations_are_of_the_space() -> None:
    for path in configs.ROOT.glob("*/paged_attention.json"):
        for entry in configs.load(path).entries:
            snapped = {**entry.config, "SNAP": 2}
            assert snapped in paged_attention.space(entry.point)


def assembled(source: str, macros: dict[str, int], capability: int) -> str:
    """What cuobjdump says of a compiled source."""
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(nvrtc.compile_source(source, macros, capability))
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", "-sass", str(cubin)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("point", POINTS, ids=lambda point: f"{point['heads']}-{point['kv_heads']}-{point['head_dim']}")
def test_the_cuda_kernel_compiles_without_spilling(point: Point, capability: int) -> None:
    config: Config = paged_attention.default_config(point, hardware.TYPICAL[capability])
    dump = assembled(SOURCE, paged_attention.macros(point, config), capability)
    found = re.search(r"STACK:(\d+)", dump)
    assert found
    assert int(found[1]) <= SPILL_LIMIT_BYTES[128]
    assert dump.count("HMMA") >= 2 * int(point["head_dim"]) // 16
    assert "LDGSTS" in dump


@pytest.mark.usefixtures("compiler")
@pytest.mark.parametrize(("block_size", "width"), [(1, "U16"), (8, "128"), (32, "128")])
def test_the_classic_kernel_loads_as_the_original_did(block_size: int, width: str) -> None:
    """Two bytes a thread at a block of one token: what makes small blocks slow in it."""
    point = point_of(64, 8, block_size=block_size)
    dump = assembled(CLASSIC, paged_attention_classic.macros(point, 0), 90)
    loads = [line for line in dump.splitlines() if "LDG.E" in line]
    assert any(f"LDG.E.{width}" in line for line in loads)
    assert any("LDG.E.128" in line for line in loads) == (block_size >= 8)


@pytest.mark.usefixtures("compiler")
def test_a_broken_source_says_why() -> None:
    with pytest.raises(nvrtc.CompileError, match="no_such_thing"):
        nvrtc.compile_source("__global__ void kernel() { no_such_thing(); }", {}, 80)


def test_every_provider_of_the_operation_can_be_imported() -> None:
    op = load("smbench_kernels.paged_attention:OP")
    for name in op.providers:
        assert callable(op.provider(name))
