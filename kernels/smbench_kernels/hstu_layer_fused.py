"""The HSTU layer of our kernels as one node of autograd that saves what it is told to. Owns the order of the launches.

**Layout.** u is kept before its SiLU, which the gate applies when it reads it, in a tensor of its own: its product is a
plain one with a bias. v, q and k are one tensor [T, 3 H D]. Their four gradients are one tensor [T, 4 H D], into which
the gate, the attention and SiLU's backward pass write, so that the gradients of input and weight are one product each.
Where SiLU is for u alone, the product for v, q and k is a plain one as well, and what it gives is what is kept.

**Parameters.** Gradients are sums in float32, rounded once to the parameter's dtype.

**Memory.** The backward pass works in place on what it allocated itself and drops each tensor with its last reader.
What was saved for it stays until autograd lets go of the node.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from smbench_kernels import hstu_linear as linear
from smbench_kernels import hstu_norm as norm
from smbench_kernels.hstu import EPS, UVQK, Jagged, Shape
from smbench_kernels.hstu_layer_attention import Attention
from smbench_kernels.hstu_layer_native import Layer
from smbench_kernels.hstu_norm import Dropout

PARAMETERS = (
    "norm_weight",
    "norm_bias",
    "uvqk_weight",
    "uvqk_bias",
    "out_norm_weight",
    "out_norm_bias",
    "out_weight",
)
"""The order in which the node takes them."""


DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class Recompute:
    """What the backward pass computes again, to the same bits, instead of keeping it from the forward pass."""

    norm: bool = False
    """The normed input: a pass over x."""
    silu: bool = False
    """v, q and k, from what SiLU was applied to; nothing where it is applied to u alone."""
    gate: bool = False
    """The gated output: written by the gate's backward pass, which has all of it in registers."""
    vqk: bool = False
    """The product for v, q and k: three quarters of the first one. Implies `silu`."""
    u: bool = False
    """The gate before its SiLU: the other quarter."""


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything about a layer that is no tensor of its own."""

    shape: Shape
    attention: Attention
    recompute: Recompute
    eps: float = EPS
    dropout: Dropout | None = None


def layer(plan: Plan) -> Layer:
    """The layer of a plan."""

    def run(x: torch.Tensor, params: Mapping[str, torch.Tensor], batch: Jagged) -> torch.Tensor:
        check(x, params, plan.shape)
        ordered = (params[name] for name in PARAMETERS)
        result: torch.Tensor = _Fused.apply(x, *ordered, batch, plan)  # type: ignore[no-untyped-call]
        return result

    return run


def check(x: torch.Tensor, params: Mapping[str, torch.Tensor], shape: Shape) -> None:
    """ValueError, naming the tensor, where x [T, E] or a parameter is not what a layer of that shape takes."""
    e, width = shape.embedding, shape.width
    if x.dtype not in DTYPES or x.dim() != 2 or x.shape[1] != e or x.stride(1) != 1:
        msg = f"x is {tuple(x.shape)} {x.dtype}; expected [tokens, {e}], rows contiguous, bfloat16 or float16"
        raise ValueError(msg)
    sizes = ((e,), (e,), (e, 4 * width), (4 * width,), (width,), (width,), (width, e))
    for name, size in zip(PARAMETERS, sizes, strict=True):
        value = params.get(name)
        if value is None or value.shape != size or value.dtype != x.dtype or not value.is_contiguous():
            found = "missing" if value is None else f"{tuple(value.shape)} {value.dtype}"
            msg = f"{name} is {found}; expected {size} {x.dtype}, contiguous"
            raise ValueError(msg)


class _Fused(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        norm_weight: torch.Tensor,
        norm_bias: torch.Tensor,
        uvqk_weight: torch.Tensor,
        uvqk_bias: torch.Tensor,
        out_norm_weight: torch.Tensor,
        out_norm_bias: torch.Tensor,
        out_weight: torch.Tensor,
        batch: Jagged,
        plan: Plan,
    ) -> torch.Tensor:
        again, width = plan.recompute, plan.shape.width
        normed, stats = norm.forward(x, norm_weight, norm_bias, plan.eps)
        u = linear.biased(normed, uvqk_weight[:, :width], uvqk_bias[:width])
        pre, vqk = vqk_of(plan.shape, normed, uvqk_weight, uvqk_bias, keep_pre=not again.vqk)
        if again.norm:
            del normed
        v, q, k = split_vqk(vqk, plan.shape)
        attended = plan.attention.forward(q, k, v, batch, plan.shape.alpha)
        gated, out_stats = norm.gate(attended.flatten(1), u, out_norm_weight, out_norm_bias, plan.eps, plan.dropout)
        ctx.save_for_backward(
            *(x, norm_weight, norm_bias, uvqk_weight, uvqk_bias, out_norm_weight, out_norm_bias, out_weight),
            *(stats, out_stats, attended),
            None if again.norm else normed,
            None if again.u else u,
            pre,
            None if again.vqk or (again.silu and pre is not None) else vqk,
            None if again.gate else gated,
        )
        ctx.batch, ctx.plan = batch, plan
        return linear.added(gated, out_weight, x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        saved = ctx.saved_tensors
        x, norm_weight, norm_bias, uvqk_weight, uvqk_bias, out_norm_weight, out_norm_bias, out_weight = saved[:8]
        stats, out_stats, attended, normed, u, pre, vqk, gated = saved[8:]
        del saved
        plan, width = ctx.plan, ctx.plan.shape.width
        dout = dout.contiguous()
        if normed is None:
            normed = norm.forward_again(x, norm_weight, norm_bias, stats, plan.eps)
        if u is None:
            u = linear.biased(normed, uvqk_weight[:, :width], uvqk_bias[:width])

        # gradients of out_norm_weight and out_norm_bias, then of uvqk_bias: the gate's kernel writes the first three
        # widths, SiLU's the others
        sums = x.new_empty(6 * width)
        dpre = x.new_empty((x.shape[0], 4 * width))
        dgated = torch.mm(dout, out_weight.t())
        missing = torch.empty_like(dgated) if gated is None else None
        norm.gate_gradients(
            *(dgated, attended.flatten(1), u, out_norm_weight, out_norm_bias, out_stats, plan.dropout),
            *(dgated, dpre[:, :width], sums[: 3 * width], missing),
        )
        dattended = dgated
        gated = gated if missing is None else missing
        dout_weight = torch.mm(gated.t(), dout)
        del u, gated, missing, attended, dgated

        if vqk is None and pre is not None:
            vqk = linear.silu(pre)
        elif vqk is None:
            pre, vqk = vqk_of(plan.shape, normed, uvqk_weight, uvqk_bias, keep_pre=True)
        v, q, k = split_vqk(vqk, plan.shape)
        dv, dq, dk = split_vqk(dpre[:, width:], plan.shape)
        shape = (x.shape[0], plan.shape.heads, plan.shape.head_dim)
        plan.attention.backward(dattended.view(shape), q, k, v, ctx.batch, plan.shape.alpha, dq, dk, dv)
        del dattended, vqk, v, q, k
        if pre is None:
            torch.sum(dpre[:, width:], 0, out=sums[3 * width :])
        else:
            linear.silu_gradients(dpre[:, width:], pre, sums[3 * width :])
        del pre, dv, dq, dk

        duvqk_weight = torch.mm(normed.t(), dpre)
        del normed
        dx = torch.mm(dpre, uvqk_weight.t())
        del dpre
        dnorm = x.new_empty(2 * plan.shape.embedding)
        norm.backward(dx, x, norm_weight, dout, stats, dx, dnorm)
        dnorm_weight, dnorm_bias = dnorm.chunk(2)
        dout_norm_weight, dout_norm_bias, duvqk_bias = sums.split((width, width, 4 * width))
        gradients = (dnorm_weight, dnorm_bias, duvqk_weight, duvqk_bias)
        return (dx, *gradients, dout_norm_weight, dout_norm_bias, dout_weight, None, None)


def vqk_of(
    shape: Shape, normed: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, keep_pre: bool
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """What SiLU was applied to, None if not kept or if there is no SiLU; v, q and k: both [T, 3 * H * D]."""
    weight, bias = weight[:, shape.width :], bias[shape.width :]
    if shape.silu == UVQK:
        return linear.activated(normed, weight, bias, keep_pre)
    return None, linear.biased(normed, weight, bias)


def split_vqk(vqk: torch.Tensor, shape: Shape) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """v, q, k [T, H, D], views of `vqk` [T, 3 * H * D]."""
    v, q, k = vqk.split(shape.width, dim=1)
    heads = (shape.heads, shape.head_dim)
    return v.unflatten(1, heads), q.unflatten(1, heads), k.unflatten(1, heads)
