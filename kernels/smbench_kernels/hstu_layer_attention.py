"""The attention of an HSTU layer as a differentiable function, by whichever implementation. Owns no kernel.

An implementation is a pair of functions, forward and backward, on q, k, v [T, H, D] of any strides. NVIDIA's CUTLASS
kernels bring an autograd of their own: the package `hstu` is built from `fbgemm_gpu/experimental/hstu` of the FBGEMM
fork that NVIDIA/recsys-examples names as its submodule (`third_party/FBGEMM`), and is on no package index.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from smbench_kernels.hstu import Jagged, attention_gradients, attention_reference
from smbench_kernels.op import UnsupportedPoint

Differentiable = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Jagged, float], torch.Tensor]
"""(q, k, v, batch, alpha) -> [T, H, D], known to autograd."""


class Forward(Protocol):
    """Computes `hstu.attention_reference` in the dtype of q, contiguous."""

    def __call__(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Jagged, alpha: float
    ) -> torch.Tensor: ...


class Backward(Protocol):
    """Writes the gradients of q, k, v into dq, dk, dv, which may be views of rows of any stride."""

    def __call__(
        self,
        dout: torch.Tensor,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Jagged,
        alpha: float,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
    ) -> object: ...


@dataclass(frozen=True, slots=True)
class Attention:
    """One implementation."""

    name: str
    forward: Forward
    backward: Backward


def best() -> Attention:
    """Ours, the fastest that the device has."""
    from smbench_kernels import hstu_attention

    return Attention("best", hstu_attention.forward, hstu_attention.backward)


def portable() -> Attention:
    """Ours in portable Triton."""
    from smbench_kernels import hstu_attention

    return Attention("portable", hstu_attention.portable_forward, hstu_attention.portable_backward)


def reference() -> Attention:
    """The definition in PyTorch, computed in float32 or wider: for checks, and where no kernel runs."""
    return Attention("reference", _reference_forward, _reference_backward)


def _reference_forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Jagged, alpha: float) -> torch.Tensor:
    wide = torch.promote_types(q.dtype, torch.float32)
    return attention_reference(q.to(wide), k.to(wide), v.to(wide), batch, alpha).to(q.dtype)


def _reference_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    wide = torch.promote_types(q.dtype, torch.float32)
    gradients = attention_gradients(dout.to(wide), q.to(wide), k.to(wide), v.to(wide), batch, alpha)
    for gradient, out in zip(gradients, (dq, dk, dv), strict=True):
        out.copy_(gradient)


def differentiable(attention: Attention) -> Differentiable:
    """An implementation as a node of autograd that saves q, k and v."""
    return functools.partial(_attend, attention)


def _attend(
    attention: Attention, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Jagged, alpha: float
) -> torch.Tensor:
    result: torch.Tensor = _Attend.apply(q, k, v, batch, alpha, attention)  # type: ignore[no-untyped-call]
    return result


class _Attend(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        batch: Jagged,
        alpha: float,
        attention: Attention,
    ) -> torch.Tensor:
        ctx.save_for_backward(q, k, v)
        ctx.batch, ctx.alpha, ctx.attention = batch, alpha, attention
        return attention.forward(q, k, v, batch, alpha)

    @staticmethod
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        gradients = [x.new_empty(x.shape) for x in (q, k, v)]
        ctx.attention.backward(dout.contiguous(), q, k, v, ctx.batch, ctx.alpha, *gradients)
        return (*gradients, None, None, None)


def cutlass() -> Differentiable:
    """NVIDIA's CUTLASS attention. UnsupportedPoint where the package `hstu` is not installed."""
    try:
        library = importlib.import_module("hstu")
    except ImportError as error:
        msg = (
            "the package hstu (NVIDIA's CUTLASS attention) is not installed: it is on no package index and is built"
            " with nvcc from fbgemm_gpu/experimental/hstu of the FBGEMM fork in NVIDIA/recsys-examples"
            f" (third_party/FBGEMM): {error}"
        )
        raise UnsupportedPoint(msg) from error
    return functools.partial(_cutlass_attend, library.hstu_attn_varlen_func)


def _cutlass_attend(
    function: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    batch: Jagged,
    alpha: float,
) -> torch.Tensor:
    """The call of `modules/hstu_attention.py` in NVIDIA/recsys-examples, with the length that scores are divided by."""
    return function(
        q=q,
        k=k,
        v=v,
        cu_seqlens_q=batch.offsets,
        cu_seqlens_k=batch.offsets,
        seqused_q=None,
        seqused_k=None,
        max_seqlen_q=batch.max_seqlen,
        max_seqlen_k=batch.max_seqlen,
        scaling_seqlen=batch.max_seqlen,
        num_contexts=batch.num_contextuals,
        num_targets=batch.num_targets,
        target_group_size=1,
        window_size=(-1, 0) if batch.causal else (-1, -1),
        alpha=alpha,
    )


SCHEMA = (
    "(Tensor q, Tensor k, Tensor v, Tensor offsets, int max_seqlen, Tensor? num_targets, Tensor? num_contextuals,"
    " bool causal, float alpha) -> Tensor"
)
GRADIENT_SCHEMA = (
    "(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor offsets, int max_seqlen, Tensor? num_targets,"
    " Tensor? num_contextuals, bool causal, float alpha) -> (Tensor, Tensor, Tensor)"
)


def opaque(attention: Attention) -> Differentiable:
    """An implementation as an operator that torch.compile takes as it is, with its gradient as another."""
    operator = _operator(attention)

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, batch: Jagged, alpha: float) -> torch.Tensor:
        result: torch.Tensor = operator(q, k, v, *_flat(batch), alpha)
        return result

    return attend


def _flat(batch: Jagged) -> tuple[Any, ...]:
    return batch.offsets, batch.max_seqlen, batch.num_targets, batch.num_contextuals, batch.causal


@functools.cache
def _operator(attention: Attention) -> Any:
    """The custom operator of an implementation, registered once in a process by its name."""
    name = attention.name

    def run(q: Any, k: Any, v: Any, *rest: Any) -> torch.Tensor:
        *jagged, alpha = rest
        return attention.forward(q, k, v, Jagged(*jagged), alpha)

    def run_gradient(dout: Any, q: Any, k: Any, v: Any, *rest: Any) -> tuple[torch.Tensor, ...]:
        *jagged, alpha = rest
        gradients = tuple(x.new_empty(x.shape) for x in (q, k, v))
        attention.backward(dout.contiguous(), q, k, v, Jagged(*jagged), alpha, *gradients)
        return gradients

    def keep(ctx: Any, inputs: Any, output: Any) -> None:
        q, k, v, offsets, ctx.max_seqlen, targets, contextuals, ctx.causal, ctx.alpha = inputs
        ctx.save_for_backward(q, k, v, offsets, targets, contextuals)

    def differentiate(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, offsets, targets, contextuals = ctx.saved_tensors
        jagged = (offsets, ctx.max_seqlen, targets, contextuals, ctx.causal)
        return (*gradient(dout, q, k, v, *jagged, ctx.alpha), *(None,) * 6)

    operator: Any = torch.library.custom_op(f"smbench::hstu_{name}", run, mutates_args=(), schema=SCHEMA)
    gradient: Any = torch.library.custom_op(
        f"smbench::hstu_{name}_gradient", run_gradient, mutates_args=(), schema=GRADIENT_SCHEMA
    )
    operator.register_fake(lambda q, *_: q.new_empty(q.shape))
    gradient.register_fake(lambda _, *qkv: tuple(x.new_empty(x.shape) for x in qkv[:3]))
    operator.register_autograd(differentiate, setup_context=keep)
    return operator
