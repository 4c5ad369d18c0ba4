"""The HSTU layer in its variants, from separate operations to fused kernels that recompute. Owns names and accounting.

The columns of document 003, each with what the one before it has. The layers themselves are in `hstu_layer_native` and
`hstu_layer_fused`, the attentions in `hstu_layer_attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from smbench_kernels import hstu_layer_attention as attentions
from smbench_kernels import hstu_layer_fused as fused
from smbench_kernels import hstu_layer_native as native
from smbench_kernels.hstu import Jagged, Shape
from smbench_kernels.hstu_layer_attention import Attention
from smbench_kernels.hstu_layer_fused import Plan, Recompute
from smbench_kernels.hstu_layer_native import Layer
from smbench_kernels.hstu_norm import Dropout

VARIANTS: Mapping[str, str] = {
    "native": "separate PyTorch operations, our portable Triton attention",
    "native-attention": "native with the fastest attention of ours",
    "native-cutlass": "native with NVIDIA's CUTLASS attention, where the package hstu is installed",
    "native-compiled": "native-attention under torch.compile, the attention one opaque operator",
    "fused": "our kernels around the attention, nothing computed twice",
    "fused-ln": "fused, the normed input computed again in the backward pass",
    "fused-ln-silu": "fused-ln, v, q and k computed again from what SiLU was applied to",
    "fused-least": "fused-ln-silu, the gated output and the product for v, q and k computed again as well",
    "fused-none": "fused-least, the product for u computed again as well: input and attention alone are saved",
}
"""Name to meaning."""

RECOMPUTES: Mapping[str, Recompute] = {
    "fused": Recompute(),
    "fused-ln": Recompute(norm=True),
    "fused-ln-silu": Recompute(norm=True, silu=True),
    "fused-least": Recompute(norm=True, silu=True, gate=True, vqk=True),
    "fused-none": Recompute(norm=True, silu=True, gate=True, vqk=True, u=True),
}
"""The recompute settings of the fused variants."""


def layer(variant: str, shape: Shape, *, dropout: Dropout | None = None, attention: Attention | None = None) -> Layer:
    """A variant as a function of (x [T, E], parameters, batch), differentiable in x and all parameters.

    float16 or bfloat16 on a GPU of sm80 or later, or under Triton's interpreter. `attention` replaces the variant's
    own, for checks. ValueError for an unknown variant, UnsupportedPoint where the variant needs what is not installed.
    """
    if variant not in VARIANTS:
        msg = f"unknown variant {variant!r} of the HSTU layer; known: {', '.join(VARIANTS)}"
        raise ValueError(msg)
    if variant in RECOMPUTES:
        return fused.layer(Plan(shape, attention or attentions.best(), RECOMPUTES[variant], dropout=dropout))
    if variant == "native-cutlass":
        return native.layer(attentions.cutlass(), shape, dropout=dropout)
    if variant == "native-compiled":
        return native.compiled(attentions.opaque(attention or attentions.best()), shape, dropout=dropout)
    own = attentions.portable if variant == "native" else attentions.best
    return native.layer(attentions.differentiable(attention or own()), shape, dropout=dropout)


def layers(
    variant: str,
    shape: Shape,
    count: int,
    *,
    dropout: Sequence[Dropout] | None = None,
    attention: Attention | None = None,
) -> Callable[[torch.Tensor, Sequence[Mapping[str, torch.Tensor]], Jagged], torch.Tensor]:
    """A stack of `count` layers: a function of (x, a sequence of `count` parameter mappings, batch).

    `dropout` holds one for each layer, with seeds of their own. ValueError where there are not `count` of something.
    """
    drops: Sequence[Dropout | None] = dropout or [None] * count
    if len(drops) != count:
        msg = f"a stack of {count} layers takes {count} dropouts, not {len(drops)}"
        raise ValueError(msg)
    stack = [layer(variant, shape, dropout=own, attention=attention) for own in drops]

    def run(x: torch.Tensor, params: Sequence[Mapping[str, torch.Tensor]], batch: Jagged) -> torch.Tensor:
        if len(params) != count:
            msg = f"a stack of {count} layers takes {count} sets of parameters, not {len(params)}"
            raise ValueError(msg)
        for one, own in zip(stack, params, strict=True):
            x = one(x, own, batch)
        return x

    return run
