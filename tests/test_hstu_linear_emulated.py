"""The HSTU layer's Hopper kernels compute their definition: run on a processor, thread by thread, without a GPU."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import emulated_cuda
import emulated_sm90
from smbench_kernels import hstu_linear_sm90, hstu_norm_sm90
from smbench_kernels.hstu import EPS
from smbench_kernels.hstu_linear_sm90 import Product, Tiles
from smbench_kernels.hstu_linear_sm90_source import KERNEL, SILU

pytestmark = [
    pytest.mark.skipif(emulated_cuda.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++"),
    pytest.mark.usefixtures("seed"),
]
ROUNDING = {torch.float16: 2.0**-10, torch.bfloat16: 2.0**-7}
LEAVES = r"""
constexpr int GROUP_THREADS = 128, CHUNK = 64, ROW_BYTES = CHUNK * 2;
static unsigned load_pair(const element *from) { unsigned found; std::memcpy(&found, from, 4); return found; }
static float hyperbolic_tangent(float x) { return tanhf(x); }
struct Eight { unsigned words[4]; };
static Eight load_eight(const element *from)
{
    if (reinterpret_cast<uintptr_t>(from) % 16)
        std::abort();
    Eight found;
    std::memcpy(&found, from, 16);
    return found;
}
static Eight load_parameters(const element *from) { return load_eight(from); }
static void store_eight(element *to, const Eight &eight) { std::memcpy(to, &eight, 16); }
static float inverse_root(float x) { return 1 / sqrtf(x); }
"""


@dataclass(frozen=True)
class Case:
    """A kernel and the sizes of what it multiplies."""

    product: Product
    rows: int
    depth: int
    columns: int
    first: int = 0


BF16, FP16 = torch.bfloat16, torch.float16
CASES = {
    "SiLU from a column on": Case(Product(Tiles(2, 128), True, True, False, BF16), 200, 328, 320, 192),
    "one group": Case(Product(Tiles(1, 64), True, True, False, FP16), 130, 136, 192),
    "residual, three groups": Case(Product(Tiles(3, 64), False, False, True, BF16), 210, 264, 192),
}


@pytest.mark.parametrize("case", CASES)
def test_a_product_is_what_pytorch_computes(case: str) -> None:
    what = CASES[case]
    product, dtype = what.product, what.product.dtype
    # parts of wider matrices
    x = torch.randn(what.rows, what.depth + 16).to(dtype)[:, 8:-8]
    weight = (torch.randn(what.depth, what.columns + 8) / what.depth**0.5).to(dtype)[:, 8:]
    residual = torch.randn(what.rows, what.columns + 8).to(dtype)[:, :-8] if product.residual else None
    bias = torch.randn(what.columns).to(dtype) if product.bias else None
    y = torch.full((what.rows, what.columns), torch.nan, dtype=dtype)
    assert hstu_linear_sm90.misfit(x, weight, bias, residual, what.first) is None
    # fewer blocks than tiles, and fewer buffers than there is room for, so that all are used again
    grid, arguments = hstu_linear_sm90.bound(
        product, x, weight, bias, residual, y, what.first, 2, emulated_sm90.tensor_map
    )
    source, macros = LEAVES + SILU + KERNEL, {**product.macros, "STAGES": 3}
    emulated_sm90.launch(source, hstu_linear_sm90.NAME, macros, grid, product.threads, product.shared_bytes, arguments)
    expected = x.double() @ weight.double()
    if bias is not None:
        expected += bias.double()
    if residual is not None:
        expected += residual.double()
    if product.silu:
        expected[:, what.first :] = F.silu(expected[:, what.first :])
    torch.testing.assert_close(y.double(), expected, rtol=ROUNDING[dtype], atol=1e-5)


@pytest.mark.parametrize("gate", [False, True])
def test_a_norm_is_what_pytorch_computes(gate: bool) -> None:
    rows, width, dtype, of_warp = 11, 512, BF16 if gate else FP16, 1 + gate
    # rows of a wider matrix, and a number of them that no thread block divides
    x, u = ((3 * torch.randn(rows, width + 16) + 2).to(dtype)[:, 8:-8] for _ in range(2))
    weight, bias = (torch.randn(width).to(dtype) for _ in range(2))
    y, gates = torch.full((rows, width), torch.nan, dtype=dtype), u if gate else None
    assert hstu_norm_sm90.misfit(x, gates, weight, bias) is None
    emulated_sm90.launch(
        LEAVES + SILU + hstu_norm_sm90.KERNEL,
        hstu_norm_sm90.NAME,
        hstu_norm_sm90.macros(width, gate, dtype, of_warp),
        hstu_norm_sm90.grid(rows, of_warp),
        hstu_norm_sm90.WARPS * hstu_norm_sm90.WARP,
        0,
        hstu_norm_sm90.arguments(x, gates, weight, bias, y, EPS),
    )
    expected = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), EPS)
    if gate:
        expected *= F.silu(u.double())
    torch.testing.assert_close(y.double(), expected, rtol=ROUNDING[dtype], atol=1e-4)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4, 64)}, "not torch.float32"),
        ({"x": torch.zeros(0, 64, dtype=BF16)}, "empty"),
        ({"weight": torch.zeros(64, 72, dtype=BF16)}, "multiples of 64 columns, not 72"),
        ({"first": 32}, "SiLU from 32 on"),
        ({"x": torch.zeros(64, 64, dtype=BF16).T}, "x needs rows"),
        ({"weight": torch.zeros(64, 129, dtype=BF16)[:, :128]}, "weight needs rows"),
        ({"residual": torch.zeros(4, 132, dtype=BF16)[:, 4:]}, "residual needs rows"),
        ({"bias": torch.zeros(128, 2, dtype=BF16)[:, 0]}, "bias needs adjacent"),
    ],
)
def test_what_a_product_does_not_take_is_said(change: dict[str, Any], words: str) -> None:
    fitting: dict[str, Any] = {
        **{"x": torch.zeros(4, 64, dtype=BF16), "weight": torch.zeros(64, 128, dtype=BF16)},
        **{"bias": torch.zeros(128, dtype=BF16), "residual": None, "first": 64},
    }
    assert hstu_linear_sm90.misfit(**fitting) is None
    assert words in (hstu_linear_sm90.misfit(**{**fitting, **change}) or "")


@pytest.mark.parametrize(
    ("x", "u", "words"),
    [
        (torch.zeros(4, 192, dtype=BF16), None, "multiple of 256"),
        (torch.zeros(4, 2304, dtype=BF16), None, "up to 2048"),
        (torch.zeros(4, 256), None, "not torch.float32"),
        (torch.zeros(4, 256, dtype=BF16), torch.zeros(4, 260, dtype=BF16)[:, :256], "u needs rows"),
    ],
)
def test_what_a_norm_does_not_take_is_said(x: torch.Tensor, u: torch.Tensor | None, words: str) -> None:
    weight = torch.zeros(x.shape[1], dtype=x.dtype)
    assert words in (hstu_norm_sm90.misfit(x, u, weight, weight) or "")
