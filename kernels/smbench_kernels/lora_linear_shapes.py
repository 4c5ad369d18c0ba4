"""What a point of lora_linear is to the kernels of decode and of prefill. Owns no kernel, no launch and no space."""

from __future__ import annotations

import torch

from smbench_kernels import lora_prefill_space
from smbench_kernels.launch import ceil_div
from smbench_kernels.lora_decode import Shape
from smbench_kernels.lora_linear import LinearSizes

LEAST_PREFILL = 16
"""Tokens of a LoRA from which the kernels of `lora_prefill` are tried."""
NEIGHBOURS = 4
"""Tokens of a sequence from which most of its rows have neighbours."""
BOX_S, ROWS_OF_WARP = 50e-9, 32
"""Asking for a row of 64 columns by itself (H200, NOTES-lora-prefill.md), and how many of a tile one warp asks for."""


def shape_of(sizes: LinearSizes, capability: int = 90) -> Shape:
    """What the decode kernels are compiled for."""
    return Shape(
        tokens=sizes.tokens,
        hidden=sizes.hidden,
        rank=sizes.rank,
        outputs=sizes.outputs,
        loras=sizes.loras,
        bfloat16=sizes.dtype == torch.bfloat16,
        clusters=capability >= 90,
    )


def problem_of(sizes: LinearSizes) -> lora_prefill_space.Problem:
    """What the prefill kernels are compiled for; expand reads what the kernel in front of it writes."""
    used = min(sizes.loras, len(sizes.lengths))
    return lora_prefill_space.over_plan(
        sizes.tokens, sizes.hidden, sizes.rank, sizes.outputs, used, sizes.dtype, dependent=True
    )


def tokens_of_lora(sizes: LinearSizes) -> float:
    """Tokens of a LoRA where each has as many."""
    return sizes.tokens / min(sizes.tokens, sizes.loras)


def rows_alone(sizes: LinearSizes) -> int:
    """Tokens of a LoRA that decode: rows of x and y without neighbours of the same LoRA."""
    alone = sum(length for length in sizes.lengths if length < NEIGHBOURS)
    return ceil_div(alone, min(problem_of(sizes).used_loras, max(1, alone)))


def asking_s(sizes: LinearSizes) -> float:
    """Seconds that a warp of the prefill kernels spends on 64 columns of such rows, asking for one after the other."""
    return BOX_S * min(ROWS_OF_WARP, rows_alone(sizes))
