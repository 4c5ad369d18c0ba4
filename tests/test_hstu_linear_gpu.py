"""On a GPU: the linear maps and norms of HSTU inference are what PyTorch computes in float64, also in a chain."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from smbench_kernels import hstu_launches, hstu_linear, hstu_linear_sm90, hstu_norm
from smbench_kernels.hstu import EPS
from smbench_kernels.hstu_linear_sm90 import KNOWN, Product, Tiles

pytestmark = pytest.mark.gpu
TOLERANCE = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
"""Of the error's norm against the truth's: what rounding once leaves, and the hardware's tanh."""
SIZES = ((3072, 1024, 4096), (384, 1024, 1024), (200, 328, 320), (1, 64, 64))
"""Rows, inner and outer columns."""


@pytest.fixture
def device(seed: int) -> torch.device:
    found = torch.device("cuda", 0)
    if why := hstu_launches.missing(found):
        pytest.skip(f"gpu: {why}")
    return found


def error(y: torch.Tensor, truth: torch.Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm())


def wide(*sizes: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A part of the columns of a wider matrix."""
    return torch.randn(sizes[0], sizes[1] + 16, device=device).to(dtype)[:, 8:-8]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("tiles", [tiles for tiles, _ in KNOWN], ids=str)
def test_every_way_to_cut_an_output_gives_it(
    tiles: Tiles, sizes: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    rows, depth, columns = sizes
    x, weight = wide(rows, depth, dtype=dtype, device=device), wide(depth, columns, dtype=dtype, device=device)
    residual, bias = wide(rows, columns, dtype=dtype, device=device), torch.randn(columns, device=device).to(dtype)
    first = columns // 128 * 64
    y, z = (torch.full((rows, columns), torch.nan, dtype=dtype, device=device) for _ in range(2))
    exact = x.double() @ weight.double()
    truth = exact + bias.double()
    truth[:, first:] = F.silu(truth[:, first:])
    # weights must be there before the kernel in front of a product starts
    torch.cuda.synchronize()
    hstu_linear_sm90.multiply(x, weight, bias, None, y, Product(tiles, True, True, False, dtype), first)
    hstu_linear_sm90.multiply(x, weight, None, residual, z, Product(tiles, False, False, True, dtype))
    assert error(y, truth) < TOLERANCE[dtype]
    assert error(z, exact + residual.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("width", [256, 1024, 2048, 192])
def test_norms_are_what_pytorch_computes(width: int, dtype: torch.dtype, device: torch.device) -> None:
    """A width that the kernel does not take goes to Triton's."""
    x, u = (wide(77, width, dtype=dtype, device=device) for _ in range(2))
    x = x * 3 + 2
    weight, bias = (torch.randn(width, device=device).to(dtype) for _ in range(2))
    torch.cuda.synchronize()
    truth = F.layer_norm(x.double(), (width,), weight.double(), bias.double(), EPS)
    assert error(hstu_norm.normed(x, weight, bias, EPS), truth) < TOLERANCE[dtype]
    assert error(hstu_norm.gated(x, u, weight, bias, EPS), truth * F.silu(u.double())) < TOLERANCE[dtype]


def test_a_chain_of_dependent_launches_in_a_graph_gives_the_same_bits(device: torch.device) -> None:
    """Kernels that start before the one in front has ended wait for what it writes, whatever was there before."""
    layers, width, rows = 8, 512, 640
    weights = [torch.randn(width, 2 * width, device=device).bfloat16() / width**0.5 for _ in range(layers)]
    outs = [torch.randn(width, width, device=device).bfloat16() / width**0.5 for _ in range(layers)]
    bias, ones = torch.randn(2 * width, device=device).bfloat16(), torch.ones(width, device=device).bfloat16()
    x = torch.randn(rows, width, device=device).bfloat16()

    def run(y: torch.Tensor, wait: Callable[[], None]) -> torch.Tensor:
        for weight, out in zip(weights, outs, strict=True):
            normed = hstu_norm.normed(y, ones, ones, EPS)
            wait()
            both = hstu_linear.partly_activated(normed, weight, bias, first=width)
            wait()
            gated = hstu_norm.gated(both[:, width:], both[:, :width], ones, ones, EPS)
            wait()
            y = hstu_linear.completed(gated, out, y)
            wait()
        return y

    expected = run(x, torch.cuda.synchronize)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = run(x, lambda: None)
    for _ in range(20):
        graph.replay()
        assert torch.equal(y, expected)
        # the next replay must not find its own results of before
        y.fill_(torch.nan)
    assert torch.equal(run(x, lambda: None), expected)
