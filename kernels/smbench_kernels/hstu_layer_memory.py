"""What an HSTU layer keeps between its forward and its backward pass, counted from shapes. Owns the counting only.

Parameters and the batch are not counted: they stay anyway. The input is: nothing else in a stack keeps it.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from smbench_kernels.hstu import UVQK, Shape
from smbench_kernels.hstu_layer import RECOMPUTES, VARIANTS
from smbench_kernels.hstu_layer_fused import Recompute

STATISTICS_BYTES = 4
"""A layer norm keeps a mean and a scale of each token in float32."""


def saved_tensors(variant: str, shape: Shape, tokens: int, dtype: torch.dtype) -> dict[str, int]:
    """Bytes of each tensor that one layer of a variant keeps, by name. KeyError for a variant that has no count.

    `native-cutlass` is counted as the other native variants, with q, k and v kept as they come. What `native-compiled`
    keeps is up to torch.compile.
    """
    if variant in RECOMPUTES:
        columns = _fused_columns(RECOMPUTES[variant], shape)
    elif variant == "native-compiled" or variant not in VARIANTS:
        counted = [name for name in VARIANTS if name != "native-compiled"]
        msg = f"nothing is known of what {variant!r} keeps; counted are: {', '.join(counted)}"
        raise KeyError(msg)
    else:
        columns = _native_columns(shape)
    found = {name: tokens * width * dtype.itemsize for name, width in columns.items()}
    return {**found, "statistics of both norms": 4 * tokens * STATISTICS_BYTES}


def saved_bytes(variant: str, shape: Shape, tokens: int, dtype: torch.dtype) -> int:
    """The sum of `saved_tensors`."""
    return sum(saved_tensors(variant, shape, tokens, dtype).values())


def _fused_columns(again: Recompute, shape: Shape) -> Mapping[str, int]:
    width, silu = shape.width, shape.silu == UVQK
    kept = {
        "x": shape.embedding,
        "attention": width,
        "normed x": 0 if again.norm else shape.embedding,
        "u before SiLU": 0 if again.u else width,
        "v, q, k before SiLU": 3 * width if silu and not again.vqk else 0,
        "v, q, k": 0 if again.vqk or (silu and again.silu) else 3 * width,
        "gated": 0 if again.gate else width,
    }
    return {name: columns for name, columns in kept.items() if columns}


def _native_columns(shape: Shape) -> Mapping[str, int]:
    width = shape.width
    return {
        "x": shape.embedding,
        "normed x": shape.embedding,
        "u, v, q, k before SiLU": 4 * width,
        # of uvqk, v, q and k are views where they have no SiLU
        "u, v, q, k": 4 * width if shape.silu == UVQK else width,
        "attention": width,
        "normed attention": width,
        "gated": width,
    }
