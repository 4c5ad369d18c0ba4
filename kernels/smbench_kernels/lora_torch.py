"""The baseline: gather the weights, batched matrix product, add. What one writes without a kernel of one's own.

Owns the four `torch` providers. The row selection is made once per binding, as engines make their metadata once per
batch; gather, product and accumulation are in each call. Every call may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from smbench_kernels.lora import SCALE, Sizes
from smbench_kernels.op import Inputs, Point, Prepared


def bgmv_shrink(point: Point, inputs: Inputs) -> Prepared:
    """One product [1, h] x [h, r] for each token."""
    return _prepared(_grouped(inputs, tokens=1), SCALE)


def bgmv_expand(point: Point, inputs: Inputs) -> Prepared:
    """One product [1, r] x [r, h] for each token."""
    return _prepared(_grouped(inputs, tokens=1), 1.0)


def sgmv_shrink(point: Point, inputs: Inputs) -> Prepared:
    """One product [seq_len, h] x [h, r] for each sequence: weights are gathered per sequence, not per token."""
    return _prepared(_grouped(inputs, tokens=Sizes.of(point).seq_len), SCALE)


def sgmv_expand(point: Point, inputs: Inputs) -> Prepared:
    """One product [seq_len, r] x [r, h] for each sequence."""
    return _prepared(_grouped(inputs, tokens=Sizes.of(point).seq_len), 1.0)


def _grouped(inputs: Inputs, tokens: int) -> Callable[[float], None]:
    """The call for inputs whose every index covers `tokens` tokens."""
    indices, weights = inputs["indices"], inputs["weights"]
    rows = indices.clamp(min=0)
    without = (indices < 0)[:, None, None]
    any_without = bool(without.any())
    x = inputs["x"].view(len(indices), tokens, -1)
    y = inputs["y"].view(len(indices), tokens, -1)

    def call(scale: float) -> None:
        gathered = weights.index_select(0, rows)
        change = torch.bmm(x.to(weights.dtype), gathered.transpose(1, 2))
        if any_without:
            change.masked_fill_(without, 0.0)
        y.add_(change, alpha=scale)

    return call


def _prepared(call: Callable[[float], None], scale: float) -> Prepared:
    return Prepared(run=lambda: call(scale), config={}, config_source="library")
