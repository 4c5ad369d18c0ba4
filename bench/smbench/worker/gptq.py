"""The GPTQ checkpoint format, 4 bits: packing, quantizing by rounding, and what packed weights mean.

Owns the arithmetic of one linear layer. Owns no file and no model.

A layer that computes `x @ W.T` with W of [out, in] is stored as
    qweight int32 [in / 8, out]         eight rows a word, the lowest row in the lowest four bits
    qzeros  int32 [groups, out / 8]     eight columns a word, zero point minus one
    scales  float16 [groups, out]
    g_idx   int32 [in]                  the group of each row
and W[o, i] = scales[g, o] * (q[i, o] - zero[g, o]) with g = g_idx[i] and zero = stored zero + 1.
Source: AutoGPTQ's layer `qlinear_cuda_old` (format `gptq`; `gptq_v2` stores the zero point as it is).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BITS = 4
PER_WORD = 32 // BITS
ZERO = 8
"""The zero point of symmetric quantization."""
SYMMETRIC_ZEROS = 0x77777777
"""A word of eight zero points of 8 as they are stored: minus one."""
LARGEST = 7
"""Largest step above the zero point; below it there is one more."""


@dataclass(frozen=True, slots=True)
class Packed:
    """The tensors of a layer; shapes as this module's docstring says."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor


def pack(values: Tensor) -> Tensor:
    """Values of 0 to 15, int32 [n, m] with n in multiples of 8, into words [n / 8, m], the first row lowest."""
    rows = values.reshape(-1, PER_WORD, values.shape[1])
    words: Tensor = rows[:, 0].clone()
    for i in range(1, PER_WORD):
        words |= rows[:, i] << (BITS * i)
    return words


def unpack(words: Tensor) -> Tensor:
    """The values of words [n, m], int32 [8 * n, m]: `pack` backwards."""
    # `>>` copies the sign, which the mask removes
    shifts = BITS * torch.arange(PER_WORD, dtype=torch.int32, device=words.device)
    values: Tensor = (words[:, None, :] >> shifts[None, :, None]) & (2**BITS - 1)
    return values.reshape(-1, words.shape[1])


def quantize(weight: Tensor, group: int) -> Packed:
    """A layer's weights, float32 [in, out], rounded to the nearest step of symmetric groups of `group` rows.

    Only single correctly rounded operations, so equal weights give equal bytes on every device.
    """
    rows, columns = weight.shape
    grouped = weight.reshape(-1, group, columns)
    # a group of zeros needs a scale all the same
    scales = (grouped.abs().amax(dim=1) / LARGEST).to(torch.float16).clamp_(min=torch.finfo(torch.float16).tiny)
    steps = (grouped / scales.to(torch.float32)[:, None, :]).round_().clamp_(-LARGEST - 1, LARGEST)
    values = steps.to(torch.int32).add_(ZERO).reshape(rows, columns)
    groups = rows // group
    return Packed(
        qweight=pack(values),
        qzeros=torch.full((groups, columns // PER_WORD), SYMMETRIC_ZEROS, dtype=torch.int32, device=weight.device),
        scales=scales,
        g_idx=torch.arange(rows, dtype=torch.int32, device=weight.device) // group,
    )


def dequantize(qweight: Tensor, qzeros: Tensor, scales: Tensor, g_idx: Tensor, bits: int = BITS) -> Tensor:
    """The weights that packed tensors stand for, float32 [out, in], on their device.

    Shapes as this module's docstring says. ValueError for other widths than 4 bits.
    """
    if bits != BITS:
        raise ValueError(f"only {BITS} bits are unpacked here, not {bits}")
    zeros = unpack(qzeros.T.contiguous()).T + 1
    group = g_idx.to(torch.int64)
    steps = unpack(qweight) - zeros[group]
    return (steps.to(torch.float32) * scales.to(torch.float32)[group]).T.contiguous()
