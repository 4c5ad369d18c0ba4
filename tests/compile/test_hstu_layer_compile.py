"""The HSTU layer's own kernels compile for every supported architecture, within its shared memory, without spilling."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch

from smbench_kernels import hardware, hstu_linear, hstu_norm
from smbench_kernels.compile import compile_for, resources
from smbench_kernels.hstu_norm import Dropout
from smbench_kernels.launch import Call

TOKENS, WIDTH, EPS = 4096, 1024, 1e-5
WARP_SIZE, SM_REGISTERS = 32, 65536


def absent(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    """A tensor without memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def sums(columns: int) -> torch.Tensor:
    return absent(8, columns, dtype=torch.float32)


def row_calls(dropout: Dropout | None = None) -> Mapping[str, Call]:
    x, u, weight = absent(TOKENS, WIDTH), absent(TOKENS, WIDTH), absent(WIDTH)
    stats, wide = absent(2, TOKENS, dtype=torch.float32), absent(TOKENS, 4 * WIDTH)
    gradients = (x, x, u, weight, weight, x, wide[:, :WIDTH])
    rest = (sums(3 * WIDTH), stats, dropout)
    return {
        "norm": hstu_norm.forward_call(x, weight, weight, x, stats, EPS, again=False),
        "norm again": hstu_norm.forward_call(x, weight, weight, x, stats, EPS, again=True),
        "norm backward": hstu_norm.backward_call(x, x, weight, x, x, sums(2 * WIDTH), stats),
        "gate": hstu_norm.gate_call(x, u, weight, weight, x, stats, EPS, dropout),
        "gate backward": hstu_norm.gate_gradients_call(*gradients, None, *rest),
        "gate backward again": hstu_norm.gate_gradients_call(*gradients, x, *rest),
        "sums": hstu_norm.add_partials_call(sums(3 * WIDTH), absent(3 * WIDTH)),
    }


def linear_calls() -> Mapping[str, Call]:
    x, vqk, wide = absent(TOKENS, WIDTH), absent(TOKENS, 3 * WIDTH), absent(TOKENS, 4 * WIDTH)
    weight, bias = absent(WIDTH, 4 * WIDTH)[:, WIDTH:], absent(3 * WIDTH)
    out_weight, tiled = absent(WIDTH, WIDTH), hstu_linear.TILED
    return {
        "tiled, SiLU": hstu_linear.tiled_call(x, weight, bias, None, vqk, vqk, True, tiled),
        "tiled, residual": hstu_linear.tiled_call(x, out_weight, None, x, None, x, False, tiled),
        "silu": hstu_linear.silu_call(vqk, vqk),
        "silu backward": hstu_linear.silu_gradients_call(wide[:, WIDTH:], vqk, sums(3 * WIDTH)),
    }


def persistent_calls() -> Mapping[str, Call]:
    x, vqk = absent(TOKENS, WIDTH), absent(TOKENS, 3 * WIDTH)
    weight, bias = absent(WIDTH, 4 * WIDTH)[:, WIDTH:], absent(3 * WIDTH)
    config, out_weight = hstu_linear.PERSISTENT, absent(WIDTH, WIDTH)
    whole, uvqk = absent(WIDTH, 4 * WIDTH), absent(TOKENS, 4 * WIDTH)
    return {
        "SiLU": hstu_linear.persistent_call(x, weight, bias, None, None, vqk, True, config, 132),
        "SiLU and before": hstu_linear.persistent_call(x, weight, bias, None, vqk, vqk, True, config, 132),
        "residual": hstu_linear.persistent_call(x, out_weight, None, x, None, x, False, config, 132),
        **{
            f"SiLU of a part, {other['BLOCK_M']} x {other['BLOCK_N']}": hstu_linear.persistent_call(
                x, whole, absent(4 * WIDTH), None, None, uvqk, True, other, 132, first=WIDTH
            )
            for other, _ in hstu_linear.PERSISTENT_WAVES
        },
        **{
            f"residual, {other['BLOCK_M']} x {other['BLOCK_N']}": hstu_linear.persistent_call(
                x, out_weight, None, x, None, x, False, other, 132
            )
            for other, _ in hstu_linear.PERSISTENT_WAVES[1:]
        },
    }


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_row_kernels_fit_and_load_sixteen_bytes(capability: int) -> None:
    dropping = row_calls(Dropout(0.1, absent(1, dtype=torch.int64)))
    calls = {**row_calls(), **{f"{name}, dropout": call for name, call in dropping.items() if "gate" in name}}
    for name, call in calls.items():
        compiled = compile_for(call, capability)
        found = resources(compiled)
        assert found.shared_bytes <= hardware.TYPICAL[capability].shared_bytes_per_program, name
        assert found.stack_bytes == 0, name
        assert name == "sums" or "v4.b32" in compiled.asm["ptx"] or "cp.async.cg" in compiled.asm["ptx"], name


@pytest.mark.parametrize("name", ["norm backward", "gate backward", "gate backward again"])
def test_all_programs_of_a_sum_over_rows_are_resident(name: str) -> None:
    """Where they are not, the last ones start when the first have done their share of the rows: a long tail."""
    call = row_calls()[name]
    threads = call.options["num_warps"] * WARP_SIZE
    settings = getattr(hstu_norm, name.replace(" ", "_").upper())
    programs = settings["PROGRAMS"] * hstu_norm.WARPS * WARP_SIZE // threads
    assert programs * threads * resources(compile_for(call, 90)).registers <= SM_REGISTERS


@pytest.mark.parametrize("capability", [80, 86, 89, 90])
def test_linear_kernels_fit(capability: int) -> None:
    for name, call in linear_calls().items():
        compiled = compile_for(call, capability)
        found = resources(compiled)
        assert found.shared_bytes <= hardware.TYPICAL[capability].shared_bytes_per_program, name
        assert found.stack_bytes == 0, name
        # a size that is no constant hides how far a mask reaches, and the loads become single elements
        assert "v4.b32" in compiled.asm["ptx"] or "cp.async.cg" in compiled.asm["ptx"], name


def test_the_persistent_product_uses_what_sm90_has() -> None:
    for name, call in persistent_calls().items():
        compiled = compile_for(call, 90)
        found = resources(compiled)
        assert found.shared_bytes <= hardware.TYPICAL[90].shared_bytes_per_program, name
        assert found.stack_bytes == 0, name
        assert "wgmma.mma_async" in compiled.asm["ptx"], name
        assert "cp.async.bulk.tensor" in compiled.asm["ptx"], name
