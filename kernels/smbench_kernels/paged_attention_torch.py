"""The baseline: PyTorch's scaled_dot_product_attention over a contiguous cache. What paging would cost nothing against.

The contiguous copies are made from the paged cache before the timed call (`begin`), so that no gather is in the time:
this is a bound for kernels that read the paged cache, not an implementation of paged attention.
"""

from __future__ import annotations

import torch

from smbench_kernels.op import Inputs, Point, Prepared, UnsupportedPoint
from smbench_kernels.paged_attention_definition import Sizes, cache_rows


def contiguous(point: Point, inputs: Inputs) -> Prepared:
    """`scaled_dot_product_attention` over K and V [B, Hk, S, D]. UnsupportedPoint for sequences of unequal length."""
    if point["lengths"] != "equal":
        raise UnsupportedPoint(
            "scaled_dot_product_attention takes a mask for unequal lengths and reads the padding too"
        )
    if point["memory"] != "device":
        raise UnsupportedPoint("the contiguous copy lies in device memory, whatever the paged cache lies in")
    sizes = Sizes.of(point)
    q, y = inputs["q"].unsqueeze(2), inputs["y"]
    shape = (sizes.batch, sizes.kv_heads, sizes.seq_len, sizes.head_dim)
    keys, values = (torch.empty(shape, dtype=q.dtype, device=q.device) for _ in range(2))
    grouped = sizes.group > 1

    def begin() -> None:
        for sequence in range(sizes.batch):
            rows = cache_rows(point, inputs, sequence)
            for target, name in ((keys, "k_cache"), (values, "v_cache")):
                cache = inputs[name].view(-1, sizes.kv_heads, sizes.head_dim)
                target[sequence] = cache[rows].transpose(0, 1)

    latest: list[torch.Tensor] = []

    def run() -> None:
        latest[:] = [
            torch.nn.functional.scaled_dot_product_attention(q, keys, values, scale=sizes.scale, enable_gqa=grouped)
        ]

    def finish() -> None:
        y.copy_(latest[0].squeeze(2))

    return Prepared(run=run, config={}, config_source="library", begin=begin, finish=finish)
