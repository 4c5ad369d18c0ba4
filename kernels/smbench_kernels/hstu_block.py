"""A stack of HSTU layers for inference over a paged cache. Owns which kernels a layer is made of, not the cache.

On a CUDA device the layer's parts are our kernels; elsewhere they are PyTorch's, in the dtype of the input, as is the
truth. Weights are those of the training layer (`hstu.parameters`), dropout is off.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from smbench_kernels import hstu_linear as linear
from smbench_kernels import hstu_norm as norm
from smbench_kernels import hstu_paged_attention as paged
from smbench_kernels.hstu import EPS, Attend, Shape, layer_around
from smbench_kernels.hstu_paged import PagedBatch, append_reference, paged_attention_reference
from smbench_kernels.hstu_paged_sm90 import Workspace, on_card

Parameters = Mapping[str, torch.Tensor]
Wait = Callable[[int], None]
"""Called with a layer's index before anything of that layer reads the cache."""


@dataclass(frozen=True, slots=True)
class Block:
    """Layers of one shape. On one device for one stream at a time: steps share a workspace."""

    shape: Shape
    layers: Sequence[Parameters]
    _workspaces: dict[torch.device, Workspace] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __call__(
        self, x: torch.Tensor, batch: PagedBatch, pool: torch.Tensor, wait: Wait | None = None
    ) -> torch.Tensor:
        """All layers on x [rows, embedding]; appends to `pool` [layers, pages, 2, page_size, heads, head_dim]."""
        for index in range(len(self.layers)):
            if wait is not None:
                wait(index)
            x = self.layer(index, x, batch, pool[index])
        return x

    def layer(self, index: int, x: torch.Tensor, batch: PagedBatch, cache: torch.Tensor) -> torch.Tensor:
        """One layer on x [rows, embedding]: appends its new history to `cache`, then attends to it.

        Rows of no sequence are computed from whatever they hold, and reach no other row.
        """
        params = self.layers[index]
        if x.device.type == "cuda":
            attend = _over_pages(cache, batch, self.shape.alpha, self._workspace(x.device))
            return layer_by_kernels(x, params, self.shape, attend)
        return layer_around(x, params, self.shape, _over_pages_torch(cache, batch, self.shape.alpha))

    def _workspace(self, device: torch.device) -> Workspace | None:
        """Made by the first step, which therefore must not be one that a graph captures."""
        if not on_card(device):
            return None
        if device not in self._workspaces:
            self._workspaces[device] = Workspace.on(device)
        return self._workspaces[device]


def layer_by_kernels(x: torch.Tensor, params: Parameters, shape: Shape, attend: Attend) -> torch.Tensor:
    """`hstu.layer_around` by our kernels, without dropout, keeping nothing for a backward pass."""
    width, heads = shape.width, (shape.heads, shape.head_dim)
    weight, bias = params["uvqk_weight"], params["uvqk_bias"]
    normed = norm.normed(x, params["norm_weight"], params["norm_bias"], EPS)
    # the gate's kernel applies SiLU to u itself
    uvqk = linear.partly_activated(normed, weight, bias, first=width)
    u, *vqk = uvqk.split(width, dim=1)
    v, q, k = (part.unflatten(1, heads) for part in vqk)
    attended = attend(q, k, v).flatten(1)
    gated = norm.gated(attended, u, params["out_norm_weight"], params["out_norm_bias"], EPS)
    return linear.completed(gated, params["out_weight"], x)


def _over_pages(cache: torch.Tensor, batch: PagedBatch, alpha: float, workspace: Workspace | None) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        # in front is the product of q, k and v, which writes no length
        return paged.append_and_attend(q, k, v, cache, batch, alpha, workspace, dependent=True)

    return attend


def _over_pages_torch(cache: torch.Tensor, batch: PagedBatch, alpha: float) -> Attend:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        append_reference(cache, k, v, batch)
        return paged_attention_reference(q, k, v, cache, batch, alpha)

    return attend


def widened(block: Block, dtype: torch.dtype) -> Block:
    """The same block with its parameters in another dtype: what the truth computes with."""
    return Block(block.shape, [{name: value.to(dtype) for name, value in layer.items()} for layer in block.layers])


def block_reference(block: Block, x: torch.Tensor, batch: PagedBatch, pool: torch.Tensor) -> torch.Tensor:
    """The block's output in float64 by PyTorch, from an empty cache or one in float64, which it appends to."""
    exact = widened(block, torch.float64)
    y = x.double()
    for index, params in enumerate(exact.layers):
        y = layer_around(y, params, block.shape, _over_pages_torch(pool[index], batch, block.shape.alpha))
    return y
