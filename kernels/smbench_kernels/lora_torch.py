"""The baseline: gather the weights, batched matrix product, add. What one writes without a kernel of one's own.

Owns the `torch` providers. The row selection is made once per binding, as engines make their metadata once per
batch; gather, product and accumulation are in each call. Every call may be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch

from smbench_kernels.lora import SCALE, Sizes
from smbench_kernels.lora_linear import LinearSizes, weights
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


def lora_linear(point: Point, inputs: Inputs) -> Prepared:
    """Two products for each sequence and slice, by runs of equal lengths; the intermediate has the dtype of x."""
    x, y, indices = inputs["x"], inputs["y"], inputs["indices"]
    rows = indices.clamp(min=0)
    without = (indices < 0)[:, None, None]
    any_without = bool(without.any())
    runs: list[tuple[slice, slice, int]] = []
    sequence = token = 0
    for length, group in groupby(LinearSizes.of(point).lengths):
        count = len(list(group))
        runs.append((slice(sequence, sequence + count), slice(token, token + count * length), count))
        sequence, token = sequence + count, token + count * length

    def run() -> None:
        for sequences, tokens, count in runs:
            column = 0
            here = x[tokens].view(count, -1, x.shape[1])
            for a, b in weights(inputs):
                hidden = torch.bmm(here, a.index_select(0, rows[sequences]).transpose(1, 2))
                change = torch.bmm(hidden, b.index_select(0, rows[sequences]).transpose(1, 2))
                if any_without:
                    change.masked_fill_(without[sequences], 0.0)
                y[tokens, column : column + b.shape[1]].add_(change.flatten(0, 1), alpha=SCALE)
                column += b.shape[1]

    return Prepared(run=run, config={}, config_source="library")


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
