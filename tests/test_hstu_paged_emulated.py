"""The paged Hopper kernel appends and attends as defined: run on a processor, thread by thread, without a GPU.

Functions that are PTX are left out of its sources; cuda_emulation_hstu.hpp has others of the same names.
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import pytest
import torch

import emulated_cuda
import emulated_sm90
from smbench_kernels import (
    hstu_attention_sm90_primitives,
    hstu_attention_sm90_schedule,
    hstu_paged_sm90,
    hstu_paged_sm90_copies,
    hstu_paged_sm90_schedule,
    hstu_paged_sm90_sums,
)
from smbench_kernels.hstu_attention_sm90_kernels import HEAD_DIM, THREADS, Stream
from smbench_kernels.hstu_paged import PagedBatch, append_reference, paged_attention_reference
from smbench_kernels.hstu_paged_sm90_kernel import KERNEL

pytestmark = [
    pytest.mark.skipif(emulated_cuda.COMPILER is None, reason="no C++ compiler: neither g++ nor clang++"),
    pytest.mark.usefixtures("seed"),
]
LEAVES = Path(__file__).with_name("cuda_emulation_hstu.hpp")
ERROR = {torch.bfloat16: 4e-3, torch.float16: 6e-4}
ALPHA, LONGEST, SWIZZLE = 1 / 16, 4352, 128


def without_ptx(source: str) -> str:
    """A source without its functions that are PTX, and without what the header defines in their place."""
    source = re.sub(r"^(template <[^\n]*>)\n__device__", r"\1 __device__", source, flags=re.MULTILINE)
    source = re.sub(r"^struct __align__\(16\) Four \{.*?^\};", "", source, flags=re.MULTILINE | re.DOTALL)
    functions = re.split(r"(?=^(?:template <[^\n]*> )?__device__ inline )", source, flags=re.MULTILINE)
    return "".join(function if "asm" not in function else after(function) for function in functions)


def after(text: str) -> str:
    """What follows the function that a text begins with, of one line or of several."""
    first = text.partition("\n")[0]
    return text[len(first) :] if first.endswith("}") else text[text.index("\n}\n") + 2 :]


def source() -> str:
    parts = (
        hstu_attention_sm90_schedule.SOURCE,
        hstu_attention_sm90_primitives.BASE,
        hstu_attention_sm90_primitives.PRODUCTS,
        hstu_paged_sm90_schedule.SOURCE,
        hstu_paged_sm90_copies.SOURCE,
        hstu_paged_sm90_sums.SOURCE,
        KERNEL,
    )
    return f'#include "{LEAVES}"\n' + "".join(map(without_ptx, parts))


def words(*values: int) -> ctypes.Array[ctypes.c_char]:
    padded = (ctypes.c_uint64 * emulated_sm90.MAP_WORDS)(*values)
    return (ctypes.c_char * ctypes.sizeof(padded)).from_buffer_copy(padded)


def row_map(x: torch.Tensor, rows: int) -> ctypes.Array[ctypes.c_char]:
    tokens, heads, width = x.shape
    return words(x.data_ptr(), 3, width, heads, tokens, x.stride(1) * 2, x.stride(0) * 2, 64, 1, rows, SWIZZLE)


def page_map(cache: torch.Tensor, rows: int) -> ctypes.Array[ctypes.c_char]:
    pages, halves, size, heads, width = cache.shape
    _, half, token, head, _ = cache.stride()
    box = (64, 1, rows, SWIZZLE)
    return words(cache.data_ptr(), 3, width, heads, size, head * 2, token * 2, *box, half * 2, pages * halves)


@dataclass(frozen=True)
class Case:
    """(cached, new, candidates) of each user, on so many thread blocks."""

    config: Stream
    page_size: int
    dtype: torch.dtype
    users: Sequence[tuple[int, int, int]]
    heads: int
    blocks: int
    cut: bool
    """Whether blocks share strips."""


FEW, MANY = hstu_paged_sm90.FEW, hstu_paged_sm90.MANY
CASES = {
    # the second of three blocks has the end of one strip and the beginning of the next
    "two strips by three blocks": Case(FEW, 16, torch.bfloat16, [(700, 40, 60)] * 2, 1, 3, cut=True),
    "one strip by six blocks": Case(FEW, 64, torch.bfloat16, [(620, 30, 70)], 1, 6, cut=True),
    "whole strips": Case(MANY, 128, torch.float16, [(90, 40, 95), (0, 0, 0), (33, 1, 2)], 2, 3, cut=False),
}


def batch_of(case: Case) -> PagedBatch:
    """Pages in random order, three more than are used."""
    totals = [cached + new for cached, new, _ in case.users]
    pages = [-(-total // case.page_size) for total in totals]
    rows = [new + targets for _, new, targets in case.users]
    every = torch.randperm(sum(pages) + 3)[: sum(pages)]
    numbers = [torch.tensor(list(accumulate(x, initial=0)), dtype=torch.int32) for x in (rows, pages)]
    targets = torch.tensor([targets for *_, targets in case.users], dtype=torch.int32)
    counts = (targets, torch.tensor(totals, dtype=torch.int32), numbers[1], every.int())
    return PagedBatch(numbers[0], *counts, case.page_size, max(rows), LONGEST)


@pytest.mark.parametrize("name", CASES)
def test_the_kernel_appends_and_attends(name: str) -> None:
    """What nobody may see is no number, and what launches before left of sums is none either."""
    case = CASES[name]
    batch, tile = batch_of(case), case.config.tile
    rows, width = int(batch.offsets[-1]), case.heads * HEAD_DIM
    uvqk = torch.randn(rows + 70, 4 * width).to(case.dtype)
    uvqk[rows:] = torch.nan
    v, q, k = (part.unflatten(1, (case.heads, HEAD_DIM)) for part in uvqk.split(width, 1)[1:])
    drawn = torch.randn(batch.page_ids.numel() + 3, 2, case.page_size, case.heads, HEAD_DIM).to(case.dtype)
    cache = torch.full_like(drawn, torch.nan)
    for sequence in batch.sequences():
        token = torch.arange(sequence.cached)
        at = batch.page_ids[sequence.first_page + token // case.page_size].long()
        cache[at, :, token % case.page_size] = drawn[at, :, token % case.page_size]
    truth = cache.double()
    append_reference(truth, k.double(), v.double(), batch)
    expected = paged_attention_reference(q.double(), k.double(), v.double(), truth, batch, ALPHA)
    out = torch.full((rows + 70, case.heads, HEAD_DIM), 7.0, dtype=case.dtype)
    sums = torch.full((2 * case.blocks * hstu_paged_sm90.STRIP * HEAD_DIM,), torch.nan)
    counters = torch.zeros(case.blocks, dtype=torch.int32)
    maps = (row_map(q, 128), row_map(k, tile), row_map(v, tile), page_map(cache, min(tile, case.page_size)))
    lengths = (batch.offsets, batch.num_targets, batch.totals, batch.page_offsets, batch.page_ids)
    addresses = (ctypes.c_uint64(x.data_ptr()) for x in (out, k, v, cache, *lengths, sums, counters))
    strides = (ctypes.c_int64(stride) for x in (out, k, v) for stride in x.stride()[:2])
    arguments: list[Any] = [*maps, *addresses, *strides, batch.batch, case.heads, ALPHA / 2, 1.0 / LONGEST, 1]
    macros = hstu_paged_sm90.macros(case.config, case.page_size, case.dtype)
    shared = hstu_paged_sm90.shared_bytes(case.config)
    grid = (case.blocks, 1)
    emulated_sm90.launch(source(), hstu_paged_sm90.NAME, macros, grid, THREADS, shared, arguments, cluster=case.blocks)
    torch.testing.assert_close(cache.double(), truth, rtol=0, atol=0, equal_nan=True)
    assert float((out[:rows] - expected[:rows]).norm() / expected[:rows].norm()) < ERROR[case.dtype]
    assert bool((out[rows:] == 7.0).all()) and not counters.any()
    assert bool(sums.isfinite().any()) == case.cut
