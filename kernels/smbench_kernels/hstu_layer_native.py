"""The HSTU layer of separate PyTorch operations, each kept by autograd as it likes. Owns no kernel.

What document 003 calls native: LayerNorm, addmm, SiLU, split, attention, LayerNorm, product, addmm, one after another;
here also the same under torch.compile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F

from smbench_kernels import hstu_norm
from smbench_kernels.hstu import EPS, Jagged, Shape, activated
from smbench_kernels.hstu_layer_attention import Differentiable
from smbench_kernels.hstu_norm import Dropout

Layer = Callable[[torch.Tensor, Mapping[str, torch.Tensor], Jagged], torch.Tensor]
"""(x [T, E], parameters as of `hstu.parameters`, batch) -> [T, E], differentiable."""


def layer(attend: Differentiable, shape: Shape, eps: float = EPS, dropout: Dropout | None = None) -> Layer:
    """The layer with an attention."""
    return functools.partial(_layer, attend, shape, eps, dropout)


def compiled(
    attend: Differentiable,
    shape: Shape,
    eps: float = EPS,
    dropout: Dropout | None = None,
    backend: str = "inductor",
) -> Layer:
    """The same under torch.compile, which must take the attention as one operator. Compiles at the first call."""
    function = functools.partial(_compute, attend, shape, eps)
    program = torch.compile(function, dynamic=False, fullgraph=True, backend=backend)

    def run(x: torch.Tensor, params: Mapping[str, torch.Tensor], batch: Jagged) -> torch.Tensor:
        result: torch.Tensor = program(x, params, batch, _mask(dropout, x, shape))
        return result

    return run


def _layer(
    attend: Differentiable,
    shape: Shape,
    eps: float,
    dropout: Dropout | None,
    x: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    batch: Jagged,
) -> torch.Tensor:
    return _compute(attend, shape, eps, x, params, batch, _mask(dropout, x, shape))


def _compute(
    attend: Differentiable,
    shape: Shape,
    eps: float,
    x: torch.Tensor,
    params: Mapping[str, torch.Tensor],
    batch: Jagged,
    mask: torch.Tensor | None,
) -> torch.Tensor:
    normed = F.layer_norm(x, (shape.embedding,), params["norm_weight"], params["norm_bias"], eps)
    u, v, q, k = activated(torch.addmm(params["uvqk_bias"], normed, params["uvqk_weight"]), shape)
    attended = attend(q, k, v, batch, shape.alpha).flatten(1)
    gated = F.layer_norm(attended, (shape.width,), params["out_norm_weight"], params["out_norm_bias"], eps) * u
    if mask is not None:
        gated = gated * mask
    return torch.addmm(x, gated, params["out_weight"])


def _mask(dropout: Dropout | None, x: torch.Tensor, shape: Shape) -> torch.Tensor | None:
    return None if dropout is None else hstu_norm.mask(dropout, x.shape[0], shape.width, x.dtype)
