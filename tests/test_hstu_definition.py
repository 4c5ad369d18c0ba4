"""HSTU's definition: the mask as published code has it, truth and gradients in agreement, points as named."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping

import pytest
import torch

from smbench.worker.op import Job, OpRunner
from smbench_kernels import hstu
from smbench_kernels import hstu_definition as definition
from smbench_kernels.hstu import Jagged, Shape
from smbench_kernels.op import Point
from smbench_kernels.registry import op as find_op

CPU = torch.device("cpu")
MASKS = definition.ATTENTION_AXES["mask"].choices
LAYERS = ("hstu_layer", "hstu_layer_silu_u")
NAMES = ("hstu_attention_forward", "hstu_attention_backward", *LAYERS)


def point_of(name: str = "hstu_layer", **axes: int | str) -> Point:
    plain: dict[str, int | str] = {"batch": 4, "seq_len": 24, "lengths": "jagged", "mask": "contextual", "heads": 2}
    plain |= {"head_dim": 16, "dtype": "float16"}
    return plain | ({"embedding": 48, "layers": 2} if name in LAYERS else {}) | axes


def published_mask(length: int, targets: int, contextuals: int, causal: bool) -> torch.Tensor:
    """The rule of both public PyTorch paths, by ids: all context has one, all candidates have one."""
    token = torch.arange(length)
    ids = (token - contextuals + 1).clamp(min=0) if contextuals else token
    last = length - targets - (contextuals - 1 if contextuals else 0)
    ids = ids.clamp(max=last)
    apart = ids[:, None] - ids[None, :]
    seen = torch.eye(length, dtype=torch.bool) | ((apart if causal else apart.abs()) > 0)
    return seen | ((ids[:, None] == 0) & (ids[None, :] < last)) if contextuals else seen


def test_the_mask_is_the_published_one() -> None:
    for length, causal in itertools.product(range(1, 9), (True, False)):
        for targets in range(length + 1):
            for contextuals in range(length + 1 - targets):
                found = hstu.visible(length, targets, contextuals, causal, CPU)
                assert torch.equal(found, published_mask(length, targets, contextuals, causal))


@pytest.mark.parametrize(("targets", "contextuals"), [(3, 3), (-1, 0), (0, 6)])
def test_more_candidates_and_context_than_tokens_are_refused(targets: int, contextuals: int) -> None:
    with pytest.raises(ValueError, match="a sequence of 5 tokens cannot have"):
        hstu.visible(5, targets, contextuals, True, CPU)


@pytest.mark.parametrize("mask", MASKS)
def test_gradients_by_formula_are_those_of_autograd(mask: str) -> None:
    point = point_of("hstu_attention_backward", mask=mask, seq_len=9)
    inputs = definition.backward_inputs(point, 1, CPU)
    batch = definition.batch_of(point, inputs)
    leaves = [part.double().requires_grad_() for part in definition.split(point, inputs["uvqk"])]
    y = hstu.attention_reference(leaves[0], leaves[1], leaves[2], batch, 0.25)
    found = torch.autograd.grad(y, leaves, inputs["dout"].double())
    for mine, theirs in zip(definition.backward_reference(point, inputs).values(), found, strict=True):
        torch.testing.assert_close(mine, theirs)
    torch.testing.assert_close(definition.forward_reference(point, inputs), y.detach())


def test_scores_are_divided_by_the_batch_bound_and_not_by_a_length() -> None:
    q = torch.ones(1, 1, 16, dtype=torch.float64)
    short = hstu.attention_reference(q, q, q, Jagged(torch.tensor([0, 1]), 1), 1.0)
    long = hstu.attention_reference(q, q, q, Jagged(torch.tensor([0, 1]), 8), 1.0)
    torch.testing.assert_close(short, 8 * long)


def test_the_layers_truth_is_autograds_of_the_whole_batch() -> None:
    """Taken sequence by sequence, with parameters' gradients added up, and the attention's scores not kept."""
    point = point_of(seq_len=7)
    inputs = definition.layer_inputs(point, 2, CPU)
    params = {name: inputs[name].double().requires_grad_() for name in definition.PARAMETERS}
    x = inputs["x"].double().requires_grad_()
    y, batch = x, definition.batch_of(point, inputs)
    for layer in range(2):
        y = hstu.layer_reference(y, {n: p[layer] for n, p in params.items()}, batch, Shape(48, 2, 16))
    y.backward(inputs["dy"].double())
    whole = {"y": y.detach(), "dx": x.grad, **{f"d{name}": p.grad for name, p in params.items()}}
    found = definition.layer_reference(point, inputs)
    assert found.keys() == whole.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, whole[name])


@pytest.mark.parametrize("silu", [hstu.UVQK, hstu.U])
def test_the_layer_is_what_its_steps_are(silu: str) -> None:
    """Written out once more for one token, where the attention of a token to itself is a product."""
    shape = Shape(48, 2, 16, silu)
    params = {n: p.double() for n, p in hstu.parameters(shape, 3, CPU, torch.float32).items()}
    x = torch.randn(1, 48, dtype=torch.float64)
    batch = Jagged(torch.tensor([0, 1]), 1)

    def norm(value: torch.Tensor, name: str) -> torch.Tensor:
        centred = value - value.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt() * params[f"{name}weight"] + params[f"{name}bias"]

    mixed = norm(x, "norm_") @ params["uvqk_weight"] + params["uvqk_bias"]
    factor = torch.sigmoid(mixed)
    if silu == hstu.U:
        factor[:, 32:] = 1
    u, v, q, k = (mixed * factor).view(4, 1, 2, 16)
    score = (q * k).sum(-1, keepdim=True) / 4
    attended = (score * torch.sigmoid(score) * v).view(1, 32)
    dropout = torch.full((1, 32), 2.0, dtype=torch.float64)
    expected = (norm(attended, "out_norm_") * u.reshape(1, 32) * 2) @ params["out_weight"] + x
    torch.testing.assert_close(hstu.layer_reference(x, params, batch, shape, dropout=dropout), expected)


def test_an_unknown_choice_of_silu_is_refused() -> None:
    with pytest.raises(ValueError, match="silu is 'uv'; known: uvqk, u"):
        Shape(48, 2, 16, "uv")


@pytest.mark.parametrize("name", NAMES)
def test_shapes_follow_from_the_point_and_values_from_the_seed(name: str) -> None:
    op, point = find_op(name), point_of(name)
    first, again, other = (op.make_inputs(point, seed, CPU) for seed in (1, 1, 2))
    assert {n: t.shape for n, t in first.items()} == {n: t.shape for n, t in other.items()}
    assert all(torch.equal(first[n], again[n]) for n in first if n not in op.outputs)
    assert all(bool(first[n].isnan().all()) for n in op.outputs)
    assert not torch.equal(first["x" if name in LAYERS else "uvqk"], other["x" if name in LAYERS else "uvqk"])


def test_jagged_has_the_longest_one_token_and_nothing() -> None:
    counts = definition.Sizes.of(point_of(batch=40)).token_counts()
    assert counts[:3] == [24, 1, 0] and max(counts) == 24 and len(set(counts)) > 10
    assert definition.Sizes.of(point_of(lengths="full")).token_counts() == [24] * 4


@pytest.mark.parametrize("name", NAMES)
def test_other_integers_make_another_truth_of_the_same_shapes(name: str) -> None:
    op, point = find_op(name), point_of(name)
    inputs = op.make_inputs(point, 1, CPU)
    assert op.redraw is not None
    redrawn = op.redraw(point, inputs, 9)
    assert redrawn is not None and not torch.equal(redrawn["offsets"], inputs["offsets"])
    before, after = op.expected(point, inputs), op.expected(point, redrawn)
    assert all(before[n].shape == after[n].shape and not torch.equal(before[n], after[n]) for n in op.outputs)
    assert op.redraw({**point, "lengths": "full", "mask": "causal"}, inputs, 9) is None


def test_operations_are_counted_by_the_documents_formula() -> None:
    """document 003: 1.27 TFLOP for a step of 1024 tokens, batch 32, 4 heads of 256, embedding 1024."""
    shape = Shape(1024, 4, 256)
    attention = hstu.attention_flops([1024] * 32, None, 4, 256)
    assert attention == 32 * 2 * 1024 * 1024**2
    step = 3 * hstu.gemm_flops(32 * 1024, shape) + (1 + hstu.BACKWARD_ATTENTION) * attention
    assert step == pytest.approx(1.27e12, rel=0.01)
    # a candidate adds itself and the history: 4 H D s h - 2 H D h^2 + 4 H D t
    assert hstu.attention_flops([10], [4], 1, 1) == 4 * 10 * 6 - 2 * 36 + 4 * 4
    assert hstu.attention_flops([10], None, 1, 1, causal=False) == 2 * hstu.attention_flops([10], None, 1, 1)


def test_the_halves_of_a_step_add_up() -> None:
    op, point = find_op("hstu_layer"), point_of(mask="causal", lengths="full")
    inputs = op.make_inputs(point, 1, CPU)
    halves = [op.pass_work[part](point, inputs).flops for part in ("forward", "backward")]
    assert op.work(point, inputs).flops == sum(halves)
    assert 2 < halves[1] / halves[0] < 2.5


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", NAMES)
def test_the_definition_as_a_provider_passes_its_own_gate(name: str, mask: str) -> None:
    """Rounds: first inputs, other values, other integers, and the halves of a step."""
    job = Job("c", name, "torch", point_of(name, mask=mask), 5, "verified only")
    found = OpRunner(CPU, [], io.StringIO()).run(job)
    assert (found["status"], found["check"]["rounds"]) == ("verified", 4 if name in LAYERS else 3)


WITHOUT: Mapping[str, str] = {
    "smbench-sm90": "need an NVIDIA GPU of compute capability 9.0",
    "meta-triton": "generative_recommenders is not installed",
    "nvidia-triton": "recsys-examples is not installed",
    "nvidia-cutlass": "needs an NVIDIA GPU",
}
LAYERS_WITHOUT = [
    ("hstu_layer", "native-cutlass", "package hstu"),
    ("hstu_layer", "nvidia-fused", "recsys-examples is not installed"),
    ("hstu_layer", "nvidia-fused-ln", "recsys-examples is not installed"),
    ("hstu_layer", "nvidia-fused-ln-silu", "recsys-examples is not installed"),
    ("hstu_layer_silu_u", "meta-fused", "generative_recommenders is not installed"),
    ("hstu_layer_silu_u", "meta-fused-least", "generative_recommenders is not installed"),
]


@pytest.mark.parametrize("name", NAMES[:2])
@pytest.mark.parametrize(("provider", "told"), WITHOUT.items(), ids=WITHOUT)
def test_what_is_not_here_says_so(name: str, provider: str, told: str) -> None:
    found = OpRunner(CPU, [], io.StringIO()).run(Job("c", name, provider, point_of(name), 5, "verified only"))
    assert found["status"] == "unsupported" and told in found["reason"]


@pytest.mark.parametrize(("name", "provider", "told"), LAYERS_WITHOUT)
def test_a_layer_by_a_package_that_is_not_here_says_so(name: str, provider: str, told: str) -> None:
    found = OpRunner(CPU, [], io.StringIO()).run(Job("c", name, provider, point_of(), 5, "verified only"))
    assert found["status"] == "unsupported" and told in found["reason"]


def test_every_variant_of_the_layer_is_a_provider() -> None:
    from smbench_kernels.hstu_layer import VARIANTS

    ours = {name for name in find_op("hstu_layer").providers if not name.startswith("nvidia-")}
    assert set(VARIANTS) == ours - {"torch"}
    silu_u = {name for name in find_op("hstu_layer_silu_u").providers if not name.startswith("meta-")}
    assert silu_u - {"torch"} < set(VARIANTS)
