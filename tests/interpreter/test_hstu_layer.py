"""The HSTU layer's kernels and every variant of the layer compute their definition, forward and backward."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from smbench_kernels import hstu_layer, hstu_layer_native, hstu_linear, hstu_norm
from smbench_kernels.hstu import EPS, UVQK, Jagged, Shape, U, attention_reference, layer_reference, parameters
from smbench_kernels.hstu_layer_attention import opaque, reference
from smbench_kernels.hstu_layer_fused import PARAMETERS
from smbench_kernels.hstu_layer_memory import saved_bytes, saved_tensors
from smbench_kernels.hstu_norm import Dropout
from smbench_kernels.op import UnsupportedPoint

pytestmark = pytest.mark.usefixtures("seed")
CPU = torch.device("cpu")
ROUNDING = {torch.float16: 1e-3, torch.bfloat16: 8e-3}
"""Relative error in the 2-norm of what is rounded a few times on its way."""
VARIANTS = [*hstu_layer.RECOMPUTES, "native", "native-attention"]


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that nobody has written holds NaN."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, _poisoning(plain))
    monkeypatch.setattr(torch.Tensor, "new_empty", _poisoning(torch.Tensor.new_empty))


def _poisoning(plain: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(*arguments: object, **options: object) -> torch.Tensor:
        made = plain(*arguments, **options)
        return made.fill_(torch.nan) if made.is_floating_point() else made

    return make


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative error in the 2-norm; NaN is infinite."""
    if found.numel() == 0 or not expected.any():
        return 0.0 if not found.any() else torch.inf
    difference = (found.double() - expected.double()).norm() / expected.double().norm()
    return torch.inf if difference.isnan() else difference.item()


def strided(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The middle of wider rows."""
    return torch.randn(rows, columns + 24).to(dtype)[:, 8 : 8 + columns]


def dropping(probability: float, seed: int) -> Dropout:
    return Dropout(probability, torch.tensor([seed]))


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (7, 48), (131, 24), (3, 2100), (0, 16)])
def test_layer_norm(tokens: int, width: int, dtype: torch.dtype) -> None:
    x, residual, dy = strided(tokens, width, dtype), strided(tokens, width, dtype), torch.randn(tokens, width).to(dtype)
    weight, bias = torch.randn(2, width).to(dtype)
    leaves = [t.double().requires_grad_() for t in (x, weight, bias)]
    expected = F.layer_norm(leaves[0], (width,), leaves[1], leaves[2], EPS)
    y, stats = hstu_norm.forward(x, weight, bias, EPS)
    assert error(y, expected) <= ROUNDING[dtype]
    assert torch.equal(hstu_norm.forward_again(x, weight, bias, stats, EPS), y)
    expected.backward(dy.double())
    dx, dparams = dy.clone(), torch.full((2 * width,), torch.nan, dtype=dtype)
    hstu_norm.backward(dx, x, weight, residual, stats, dx, dparams)
    gradients = [t.grad for t in leaves if t.grad is not None]
    assert error(dx, gradients[0] + residual.double()) <= ROUNDING[dtype]
    assert error(dparams[:width], gradients[1]) <= ROUNDING[dtype]
    assert error(dparams[width:], gradients[2]) <= ROUNDING[dtype]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("probability", [None, 0.4])
@pytest.mark.parametrize(("tokens", "width"), [(1, 16), (37, 48), (2, 2100), (0, 16)])
def test_gate(tokens: int, width: int, probability: float | None, dtype: torch.dtype, seed: int) -> None:
    """u and its gradient are ranges of wider rows; what is around the gradient stays as it was."""
    x, u, dy = torch.randn(tokens, width).to(dtype), strided(tokens, width, dtype), torch.randn(tokens, width).to(dtype)
    weight, bias = torch.randn(2, width).to(dtype)
    dropout = None if probability is None else dropping(probability, seed)
    mask = 1.0 if dropout is None else hstu_norm.mask(dropout, tokens, width, torch.float32).double()
    leaves = [t.double().requires_grad_() for t in (x, u, weight, bias)]
    expected = F.layer_norm(leaves[0], (width,), leaves[2], leaves[3], EPS) * F.silu(leaves[1]) * mask
    y, stats = hstu_norm.gate(x, u, weight, bias, EPS, dropout)
    assert error(y, expected) <= ROUNDING[dtype]
    expected.backward(dy.double())
    around = torch.full((tokens, 4 * width), 7.0, dtype=dtype)
    dx, again, dparams = dy.clone(), torch.empty_like(y), torch.full((3 * width,), torch.nan, dtype=dtype)
    hstu_norm.gate_gradients(dx, x, u, weight, bias, stats, dropout, dx, around[:, width : 2 * width], dparams, again)
    gradients = [t.grad for t in leaves if t.grad is not None]
    found = [dx, around[:, width : 2 * width], dparams[:width], dparams[width : 2 * width], dparams[2 * width :]]
    for one, truth in zip(found, [*gradients, gradients[1].sum(0)], strict=True):
        assert error(one, truth) <= ROUNDING[dtype]
    assert torch.equal(again, y)
    assert (around[:, :width] == 7).all() and (around[:, 2 * width :] == 7).all()


def test_dropout_follows_its_seed_and_keeps_the_mean() -> None:
    first, second = (hstu_norm.mask(dropping(0.25, seed), 64, 512, torch.float32) for seed in (1, 2))
    assert first.unique().tolist() == [0.0, pytest.approx(4 / 3)]
    # standard deviation of the mean: 0.0032
    assert abs(first.mean() - 1) < 0.016
    # two independent masks agree at 0.25^2 + 0.75^2 of all places
    assert abs((first == second).double().mean() - 0.625) < 0.016
    assert torch.equal(first, hstu_norm.mask(dropping(0.25, 1), 64, 512, torch.float32))
    assert torch.equal(first[:5], hstu_norm.mask(dropping(0.25, 1), 5, 512, torch.float32))


@pytest.mark.parametrize("probability", [-0.1, 1.0, float("nan")])
def test_an_impossible_probability_is_refused(probability: float) -> None:
    with pytest.raises(ValueError, match="at least 0 and below 1"):
        dropping(probability, 1)


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", hstu_linear.ROUTES)
@pytest.mark.parametrize(
    ("tokens", "depth", "columns", "dtype"),
    [(150, 72, 272, torch.bfloat16), (3, 40, 8, torch.float16), (129, 64, 24, torch.float16)],
)
def test_linear_maps(tokens: int, depth: int, columns: int, way: str, dtype: torch.dtype) -> None:
    """On a range of a weight's columns, with sizes that end inside a tile."""
    x, residual = strided(tokens, depth, dtype), strided(tokens, columns, dtype)
    weight, bias = strided(depth, columns, dtype) / depth**0.5, torch.randn(columns).to(dtype)
    product = x.double() @ weight.double()
    for keep in (True, False):
        pre, y = hstu_linear.activated(x, weight, bias, keep, way)
        assert error(y, F.silu(product + bias.double())) <= ROUNDING[dtype]
        assert (pre is not None) is keep
        if pre is not None:
            assert error(pre, product + bias.double()) <= ROUNDING[dtype]
            assert torch.equal(hstu_linear.silu(pre), y)
    assert error(hstu_linear.added(x, weight, residual, way), product + residual.double()) <= ROUNDING[dtype]


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("way", hstu_linear.ROUTES)
@pytest.mark.parametrize("first", [0, 24, 200])
def test_linear_map_with_silu_from_a_column_on(first: int, way: str) -> None:
    """Wherever the column lies in a tile."""
    x, weight = strided(70, 40, torch.float16), strided(40, 272, torch.float16) / 40**0.5
    bias = torch.randn(272).half()
    product = x.double() @ weight.double() + bias.double()
    y = hstu_linear.partly_activated(x, weight, bias, first, way)
    expected = torch.cat([product[:, :first], F.silu(product[:, first:])], dim=1)
    assert error(y, expected) <= ROUNDING[torch.float16]


def test_tiles_follow_the_work() -> None:
    """Few rows in small tiles, so that no multiprocessor is left without; many in the largest."""

    def tile(rows: int, columns: int) -> tuple[int, int]:
        config = hstu_linear.soonest(rows, columns, 132)
        return config["BLOCK_M"], config["BLOCK_N"]

    assert tile(384, 1024) == (64, 64)
    assert tile(384, 4096) == (128, 128)
    assert tile(3072, 4096) == tile(100_000, 1024) == (128, 256)


def test_an_unknown_way_is_refused() -> None:
    x = torch.zeros(1, 8, dtype=torch.float16)
    with pytest.raises(ValueError, match="persistent"):
        hstu_linear.added(x, torch.zeros(8, 8), x, "cublas")


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize(("tokens", "columns"), [(1, 8), (77, 300), (0, 8)])
def test_gradient_of_silu_in_place(tokens: int, columns: int, dtype: torch.dtype) -> None:
    pre = torch.randn(tokens, columns).to(dtype) * 3
    around = torch.randn(tokens, columns + 8).to(dtype)
    before = around.clone()
    leaf = pre.double().requires_grad_()
    F.silu(leaf).backward(before[:, 8:].double())
    assert leaf.grad is not None
    dbias = torch.full((columns,), torch.nan, dtype=dtype)
    hstu_linear.silu_gradients(around[:, 8:], pre, dbias)
    assert error(around[:, 8:], leaf.grad) <= ROUNDING[dtype]
    assert error(dbias, leaf.grad.sum(0)) <= ROUNDING[dtype]
    assert torch.equal(around[:, :8], before[:, :8])


BATCHES = {
    "jagged": Jagged(torch.tensor([0, 9, 9, 10, 33], dtype=torch.int32), 24),
    "candidates": Jagged(
        torch.tensor([0, 7, 27], dtype=torch.int32),
        32,
        num_targets=torch.tensor([2, 5], dtype=torch.int32),
        num_contextuals=torch.tensor([3, 0], dtype=torch.int32),
    ),
    "both ways": Jagged(torch.tensor([0, 13], dtype=torch.int32), 13, causal=False),
    "empty": Jagged(torch.tensor([0, 0], dtype=torch.int32), 8),
}
SHAPE = Shape(embedding=40, heads=3, head_dim=16)


def values(
    layer: Callable[..., torch.Tensor],
    x: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    dout: torch.Tensor,
    *rest: object,
) -> dict[str, torch.Tensor]:
    """The output and the gradient of everything."""
    leaf = x.clone().requires_grad_()
    own = {name: value.clone().requires_grad_() for name, value in params.items()}
    out = layer(leaf, own, *rest)
    out.backward(dout.to(out.dtype))
    gradients = {name: value.grad for name, value in {"x": leaf, **own}.items() if value.grad is not None}
    assert gradients.keys() == {"x", *PARAMETERS}
    return {"out": out.detach(), **gradients}


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(
    ("name", "probability", "dtype", "silu"),
    [
        ("jagged", None, torch.bfloat16, UVQK),
        ("jagged", 0.3, torch.float16, UVQK),
        ("candidates", 0.3, torch.bfloat16, UVQK),
        ("both ways", None, torch.float16, UVQK),
        ("empty", None, torch.bfloat16, UVQK),
        ("candidates", 0.3, torch.bfloat16, U),
        ("empty", None, torch.float16, U),
    ],
)
def test_every_variant_is_the_layer(
    name: str, probability: float | None, dtype: torch.dtype, silu: str, seed: int
) -> None:
    """Output and all gradients against float64; the fused variants agree to the bit, whatever they compute again.

    But for the gate's sums over tokens: its kernel has other tiles where it writes its output again.
    """
    batch, shape = BATCHES[name], replace(SHAPE, silu=silu)
    tokens = int(batch.offsets[-1])
    x, dout = torch.randn(2, tokens, SHAPE.embedding).to(dtype)
    params = parameters(SHAPE, seed, CPU, dtype)
    dropout = None if probability is None else dropping(probability, seed)
    mask = None if dropout is None else hstu_norm.mask(dropout, tokens, SHAPE.width, torch.float32).double()
    wide = {key: value.double() for key, value in params.items()}
    truth = values(layer_reference, x.double(), wide, dout, batch, shape, EPS, mask)
    first: dict[str, torch.Tensor] = {}
    for variant in VARIANTS:
        found = values(hstu_layer.layer(variant, shape, dropout=dropout, attention=reference()), x, params, dout, batch)
        for key, expected in truth.items():
            assert found[key].dtype == dtype
            assert error(found[key], expected) <= 2.5 * ROUNDING[dtype], (variant, key)
        if variant in hstu_layer.RECOMPUTES:
            first = first or found
            for key in first.keys() - {"out_norm_weight", "out_norm_bias", "uvqk_bias"}:
                assert torch.equal(first[key], found[key]), (variant, key)


def test_a_stack_of_layers(seed: int) -> None:
    batch = BATCHES["jagged"]
    x = torch.randn(33, SHAPE.embedding).half()
    params = [parameters(SHAPE, seed + n, CPU, torch.float16) for n in range(2)]
    stack = hstu_layer.layers("fused-least", SHAPE, 2, attention=reference())
    expected = x.double()
    for own in params:
        expected = layer_reference(expected, {k: v.double() for k, v in own.items()}, batch, SHAPE)
    assert error(stack(x, params, batch), expected) <= 2 * ROUNDING[torch.float16]
    with pytest.raises(ValueError, match="2 layers takes 2 sets of parameters, not 1"):
        stack(x, params[:1], batch)


@pytest.mark.parametrize("silu", [UVQK, U])
@pytest.mark.parametrize("variant", VARIANTS)
def test_what_is_saved_is_what_is_counted(variant: str, silu: str, seed: int) -> None:
    batch, shape = BATCHES["jagged"], replace(SHAPE, silu=silu)
    dtype = torch.float32 if variant.startswith("native") else torch.bfloat16
    x = torch.randn(33, SHAPE.embedding).to(dtype).requires_grad_()
    params = {k: v.requires_grad_() for k, v in parameters(SHAPE, seed, CPU, dtype).items()}
    apart = {t.untyped_storage().data_ptr() for t in (*params.values(), batch.offsets)}
    saved: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in apart:
            saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = hstu_layer.layer(variant, shape, attention=reference())(x, params, batch)
    assert sum(saved.values()) == saved_bytes(variant, shape, 33, dtype)
    assert out.shape == x.shape


def test_the_least_at_the_documents_size() -> None:
    """Batch 32 of 4096 tokens, embedding and heads 1024 wide, bfloat16: a tensor of that is 268 MB."""
    shape, tokens = Shape(1024, 4, 256), 32 * 4096
    count = {name: len(saved_tensors(name, shape, tokens, torch.bfloat16)) for name in hstu_layer.RECOMPUTES}
    found = {name: saved_bytes(name, shape, tokens, torch.bfloat16) for name in hstu_layer.RECOMPUTES}
    unit, statistics = tokens * 1024 * 2, tokens * 16
    assert {name: (size - statistics) / unit for name, size in found.items()} == {
        "fused": 11,
        "fused-ln": 10,
        "fused-ln-silu": 7,
        "fused-least": 3,
        "fused-none": 2,
    }
    assert count["fused-none"] == 3
    assert found["fused-none"] <= 0.8e9
    with pytest.raises(KeyError, match="native-compiled"):
        saved_bytes("native-compiled", shape, tokens, torch.bfloat16)


def test_an_unknown_variant_lists_the_known() -> None:
    with pytest.raises(ValueError, match="fused-ln-silu"):
        hstu_layer.layer("fussed", SHAPE)


def test_what_is_no_input_of_the_layer_is_refused_by_name(seed: int) -> None:
    batch, x = BATCHES["jagged"], torch.zeros(33, SHAPE.embedding, dtype=torch.bfloat16)
    params = parameters(SHAPE, seed, CPU, torch.bfloat16)
    run = hstu_layer.layer("fused", SHAPE, attention=reference())
    with pytest.raises(ValueError, match=r"x is \(33, 40\) torch.float32"):
        run(x.float(), params, batch)
    with pytest.raises(ValueError, match="out_weight is missing"):
        run(x, {name: value for name, value in params.items() if name != "out_weight"}, batch)
    with pytest.raises(ValueError, match=r"uvqk_bias is \(7,\)"):
        run(x, {**params, "uvqk_bias": params["uvqk_bias"][:7].clone()}, batch)


def test_an_opaque_attention_is_one_operator_with_its_gradient(seed: int) -> None:
    """What native-compiled gives to torch.compile, traced as a whole, without waiting for its code generator."""
    batch = BATCHES["candidates"]
    x, dout = torch.randn(2, 27, SHAPE.embedding)
    params = parameters(SHAPE, seed, CPU, torch.float32)
    run = hstu_layer_native.compiled(opaque(reference()), SHAPE, backend="aot_eager")
    found = values(run, x, params, dout, batch)
    truth = values(layer_reference, x, params, dout, batch, SHAPE)
    assert all(error(found[key], truth[key]) < 1e-5 for key in truth)


def test_cutlass_is_called_as_its_own_layer_calls_it(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Its arguments, by a stand-in that takes exactly those and computes the definition."""
    batch = BATCHES["candidates"]

    def stand_in(
        *,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        cu_seqlens_q: torch.Tensor,
        cu_seqlens_k: torch.Tensor,
        seqused_q: None,
        seqused_k: None,
        max_seqlen_q: int,
        max_seqlen_k: int,
        scaling_seqlen: int,
        num_contexts: torch.Tensor,
        num_targets: torch.Tensor,
        target_group_size: int,
        window_size: tuple[int, int],
        alpha: float,
    ) -> torch.Tensor:
        assert cu_seqlens_q is cu_seqlens_k and max_seqlen_q == max_seqlen_k == scaling_seqlen
        assert target_group_size == 1 and window_size == (-1, 0)
        return attention_reference(q, k, v, Jagged(cu_seqlens_q, max_seqlen_q, num_targets, num_contexts), alpha)

    library = types.ModuleType("hstu")
    library.__dict__["hstu_attn_varlen_func"] = stand_in
    monkeypatch.setitem(sys.modules, "hstu", library)
    x, params = torch.randn(27, SHAPE.embedding), parameters(SHAPE, seed, CPU, torch.float32)
    found = hstu_layer.layer("native-cutlass", SHAPE)(x, params, batch)
    assert error(found, layer_reference(x, params, batch, SHAPE)) < 1e-5


def test_without_cutlass_the_reason_says_how_it_is_built(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "hstu", None)
    with pytest.raises(UnsupportedPoint, match="FBGEMM fork in NVIDIA/recsys-examples"):
        hstu_layer.layer("native-cutlass", SHAPE)
