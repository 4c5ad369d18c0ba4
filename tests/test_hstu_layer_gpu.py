"""On a GPU: every variant of the HSTU layer is the layer, can be captured in a CUDA graph and keeps what is counted."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

import pytest
import torch

from smbench_kernels import hstu_layer, hstu_linear, hstu_norm
from smbench_kernels.hstu import EPS, Jagged, Shape, layer_reference, parameters
from smbench_kernels.hstu_layer_memory import saved_bytes
from smbench_kernels.hstu_norm import Dropout

pytestmark = pytest.mark.gpu
SHAPE = Shape(embedding=256, heads=2, head_dim=256)
VARIANTS = [*hstu_layer.RECOMPUTES, "native", "native-attention", "native-compiled"]
ROUNDING = {torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device())


def jagged() -> Jagged:
    """Empty, of one token, of odd length, and the longest possible."""
    return Jagged(torch.tensor([0, 300, 300, 301, 778, 1290], dtype=torch.int32, device=device()), 512)


def gradients(
    layer: Callable[..., torch.Tensor],
    x: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    dout: torch.Tensor,
    *rest: object,
) -> tuple[torch.Tensor, ...]:
    """The output and the gradients of x and every parameter."""
    leaves = [value.detach().requires_grad_() for value in (x, *params.values())]
    out = layer(leaves[0], dict(zip(params, leaves[1:], strict=True)), *rest)
    return (out.detach(), *torch.autograd.grad(out, leaves, dout.to(out.dtype)))


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("probability", [None, 0.2])
@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_the_layer(variant: str, probability: float | None, dtype: torch.dtype) -> None:
    seed = random.randrange(2**31)
    torch.manual_seed(seed)
    batch, tokens = jagged(), 1290
    x, dout = torch.randn(2, tokens, SHAPE.embedding, device=device()).to(dtype)
    params = parameters(SHAPE, seed, device(), dtype)
    dropout, mask = None, None
    if probability is not None:
        dropout = Dropout(probability, torch.tensor([seed], device=device()))
        mask = hstu_norm.mask(dropout, tokens, SHAPE.width, torch.float32).double()
    wide = {name: value.double() for name, value in params.items()}
    truth = gradients(layer_reference, x.double(), wide, dout, batch, SHAPE, EPS, mask)
    found = gradients(hstu_layer.layer(variant, SHAPE, dropout=dropout), x, params, dout, batch)
    for name, one, expected in zip(("out", "x", *params), found, truth, strict=True):
        assert error(one, expected) <= ROUNDING[dtype], (name, seed)


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_captured_layer_follows_its_inputs(variant: str) -> None:
    """Replayed after the inputs, the lengths and the dropout's seed have changed."""
    batch, tokens, dtype = jagged(), 1290, torch.bfloat16
    x, dout = torch.randn(2, tokens, SHAPE.embedding, device=device()).to(dtype)
    params = parameters(SHAPE, 1, device(), dtype)
    dropout = Dropout(0.2, torch.tensor([3], device=device()))
    layer = hstu_layer.layer(variant, SHAPE, dropout=dropout)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradients(layer, x, params, dout, batch)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradients(layer, x, params, dout, batch)
    x.copy_(torch.randn_like(x))
    dropout.seed.fill_(4)
    batch.offsets.copy_(torch.tensor([0, 7, 500, 1000, 1001, 1290]))
    graph.replay()
    for one, expected in zip(captured, gradients(layer, x, params, dout, batch), strict=True):
        assert error(one, expected) <= 1e-3


@pytest.mark.parametrize("variant", hstu_layer.RECOMPUTES)
def test_what_stays_allocated_is_what_is_counted(variant: str) -> None:
    """The input was there before, the output came on top of what is kept: they are of one size."""
    shape, length, dtype = Shape(512, 4, 128), 2048, torch.bfloat16
    batch = Jagged(torch.arange(5, dtype=torch.int32, device=device()) * length, length)
    x = torch.randn(4 * length, 512, device=device()).to(dtype).requires_grad_()
    params = {name: value.requires_grad_() for name, value in parameters(shape, 1, device(), dtype).items()}
    layer = hstu_layer.layer(variant, shape)
    torch.autograd.grad(layer(x, params, batch).sum(), x)
    before = torch.cuda.memory_allocated()
    out = layer(x, params, batch)
    kept = torch.cuda.memory_allocated() - before
    assert out.shape == x.shape
    # the allocator hands out multiples of 512 bytes
    assert abs(kept - saved_bytes(variant, shape, 4 * length, dtype)) <= 16 * 512


@pytest.mark.parametrize("way", hstu_linear.ROUTES)
@pytest.mark.parametrize(("tokens", "depth", "columns"), [(300, 256, 768), (1000, 1024, 3072), (129, 72, 264)])
def test_linear_maps_by_every_way(tokens: int, depth: int, columns: int, way: str) -> None:
    if way == "persistent" and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no copy engine for tensors before sm90")
    x, residual = (torch.randn(tokens, n, device=device()).bfloat16() for n in (depth, columns))
    weight = (torch.randn(depth, columns + 8, device=device()) / depth**0.5).bfloat16()[:, 8:]
    bias = torch.randn(columns, device=device()).bfloat16()
    product = x.double() @ weight.double()
    pre, y = hstu_linear.activated(x, weight, bias, True, way)
    assert pre is not None
    assert error(pre, product + bias.double()) <= 4e-3
    assert error(y, torch.nn.functional.silu(product + bias.double())) <= 4e-3
    assert torch.equal(hstu_linear.silu(pre), y)
    assert torch.equal(hstu_linear.activated(x, weight, bias, False, way)[1], y)
    assert error(hstu_linear.added(x, weight, residual, way), product + residual.double()) <= 4e-3
    config = hstu_linear.soonest(tokens, columns, 132)
    assert error(hstu_linear.added(x, weight, residual, way, config), product + residual.double()) <= 4e-3
    partly = hstu_linear.partly_activated(x, weight, bias, 200, way)
    expected = torch.cat([(product + bias)[:, :200], torch.nn.functional.silu(product + bias)[:, 200:]], dim=1)
    assert error(partly, expected) <= 4e-3
